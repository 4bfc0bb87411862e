"""``skip_committed``, ``suffix_length``, ``suffix_sample``: tokens, forwards and positions of their plain loop."""

import functools
import random
import re

import plain_loop
import pytest
import torch
from rows import Request, batched, draw_request
from tiny import EOS, MAKERS, MASK

import dllm_fast
from dllm_fast import Ancestral, Drift, Every, Threshold, Uniform, Window
from dllm_fast.decoding.options import Options
from dllm_fast.patch import bound_family


@pytest.mark.parametrize("name", ["llada-gqa", "modernbert"])
@pytest.mark.parametrize("seed", [pytest.param(n, marks=() if n < 15 else pytest.mark.long) for n in range(30)])
def test_tokens_of_the_plain_loop(name, seed):
    check_plain_loop(name, seed, skip_committed=True)


def check_plain_loop(name, seed, make=None, memory=plain_loop.Memory, **options_of_all):
    """Random requests, each row alone by the plain loop and all rows as one batch: in fp64, where nothing is level but
    positions that see [MASK]s alone."""
    model = dllm_fast.patch((make or MAKERS[name])().double(), impl="torch")
    family = bound_family(model)
    rng = random.Random(seed)
    while True:
        request = draw_request(rng, rows=(1, 3), most_blocks=3, longest=12, windows=any(family.windows))
        options = request.options
        planless = isinstance(options["schedule"], Ancestral) or isinstance(options.get("refresh"), Drift)
        suffix = options.get("suffix_length")
        seen = 40 if suffix is None else options["block_length"] + suffix + options.get("suffix_sample", 0)
        level = any((prompt[:seen] == MASK).all() for prompt in request.prompts)
        if options["cache"] != "none" and not planless and not level:  # the plain loop has neither of the two
            break
    request.options |= {"speculate": None, "eos_id": None} | options_of_all
    resolved = Options(**options).resolved(model, family)
    expected = [plain_loop.run(family, ids, resolved, row, memory) for row, ids in enumerate(request.prompts)]
    done, positions = batched(model, request)
    assert done == [(plain.ids.tolist(), plain.nfe) for plain in expected], str(request)
    assert positions == sum(plain.positions for plain in expected)


@pytest.mark.parametrize("cache", ["dual", "prefix"])
@pytest.mark.parametrize("refresh", [Window(2), Window(0, 9), Every(2)], ids=str)
def test_a_block_far_behind_the_one_before(refresh, cache):
    """What lies between the two is seen for the first time, and evaluated once."""
    model = dllm_fast.patch(MAKERS["llada-gqa"]().double(), impl="torch")
    ids = torch.randint(0, EOS, (30,), generator=torch.Generator().manual_seed(0))
    prompts = [torch.cat((torch.full((5,), MASK), ids)), ids[:7]]
    options = {"gen_length": 8, "block_length": 4, "schedule": Threshold(0.02), "cache": cache, "refresh": refresh}
    request = Request(prompts, options | {"suffix_length": 3, "skip_committed": True, "seed": 1}, right=False)
    resolved = Options(**request.options).resolved(model, bound_family(model))
    expected = [plain_loop.run(bound_family(model), prompt, resolved, row) for row, prompt in enumerate(prompts)]
    done, positions = batched(model, request)
    assert done == [(plain.ids.tolist(), plain.nfe) for plain in expected]
    assert positions == sum(plain.positions for plain in expected)


def test_the_exact_positions_and_no_others():
    """Three rows of 24 + 32 in four blocks of 8, by hand."""
    model = dllm_fast.patch(MAKERS["llada"]())
    ids = torch.randint(0, EOS, (3, 24), generator=torch.Generator().manual_seed(0))
    run = functools.partial(dllm_fast.generate, model, ids, gen_length=32, block_length=8, schedule=Uniform(16))
    later = 3 * 4 * ((6 + 2) + (4 + 2) + (2 + 2))  # rows, blocks, steps: masked ones, and the two of the step before
    assert run(skip_committed=True).positions == 3 * 4 * 56 + later
    assert run(skip_committed=True, cfg_scale=1.0).positions == 2 * (3 * 4 * 56 + later)
    assert run(skip_committed=True, refresh=Window(8)).positions == 3 * (56 + 3 * 16) + later
    whole = 3 * sum(24 + 8 * (block + 1) + 5 - max(0, 8 * (block + 1) + 5 - 32) for block in range(4))
    assert run(suffix_length=5).positions == whole + 3 * 4 * 3 * 8
    assert run(suffix_length=5, skip_committed=True).positions == whole + later
    window = 3 * (24 + 13) + 3 * (3 * 16 + 5 + 5 + 0)  # the last of them are beyond the window, and come into sight
    assert run(suffix_length=5, refresh=Window(8)).positions == window + 3 * 4 * 3 * 8
    assert run(suffix_length=5, cache="none").positions == 4 * whole


def test_a_long_suffix_is_all_of_it():
    model = dllm_fast.patch(MAKERS["modernbert"]().double(), impl="torch")
    ids = torch.randint(0, EOS, (2, 9), generator=torch.Generator().manual_seed(0))
    options = {"gen_length": 24, "block_length": 8, "schedule": Threshold(0.02)}
    for cache in ("none", "prefix", "dual"):
        for refresh in ("block", Window(8, 3)) if cache != "none" else ("block",):
            expected = dllm_fast.generate(model, ids, cache=cache, refresh=refresh, **options)
            out = dllm_fast.generate(model, ids, cache=cache, refresh=refresh, suffix_length=100, **options)
            assert torch.equal(out.sequences, expected.sequences) and out.positions == expected.positions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip_committed": True, "cache": "none"}, "skip_committed=True: with cache='none'"),
        ({"skip_committed": 1}, "skip_committed=1 is not True or False"),
        ({"suffix_length": -1}, "suffix_length=-1 is not a whole number from 0 up"),
        ({"suffix_length": 2.5}, "suffix_length=2.5 is not a whole number from 0 up"),
        ({"suffix_sample": -1, "suffix_length": 4}, "suffix_sample=-1 is not a whole number from 0 up"),
        ({"suffix_sample": 3}, "suffix_sample=3: without suffix_length every position is seen"),
        ({"suffix_sample": 3, "suffix_length": 4, "cache": "none"}, "suffix_sample=3: needs a cache, and cache='none'"),
        ({"suffix_sample": 3, "suffix_length": 4, "refresh": Drift(0.1)}, "suffix_sample=3: Drift(tau=0.1) begins at"),
        ({"suffix_length": 4, "gen_length": 8}, "suffix_length=4: nothing follows the only block; gen_length=8"),
    ],
)
def test_refused(options, message):
    model = dllm_fast.patch(MAKERS["llada"]())
    ids = torch.zeros(1, 5, dtype=torch.int64)
    given = {"gen_length": 16, "block_length": 8, **options}
    with pytest.raises(ValueError, match=re.escape(message)):
        dllm_fast.generate(model, ids, **given)
    with pytest.raises(ValueError, match=re.escape(message)):
        dllm_fast.generate_many(model, [ids[0]], **given)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("refresh", [Window(0, 0), Window(2, 1), Every(3)], ids=str)
def test_what_lies_between_two_blocks_comes_into_sight(refresh, skip):
    """Of text between [MASK]s and the answer, positions that no block saw and that the window does not reach."""
    model = dllm_fast.patch(MAKERS["modernbert"]().double(), impl="torch")
    words = torch.randint(0, EOS, (12,), generator=torch.Generator().manual_seed(0))
    ids = torch.cat((torch.full((6,), MASK), words))
    options = {"block_length": 4, "gen_length": 4, "suffix_length": 4, "schedule": Threshold(0.1), "seed": 6}
    options |= {"skip_committed": skip, "refresh": refresh, "temperature": 0.5}
    plain = plain_loop.run(bound_family(model), ids, Options(**options).resolved(model, bound_family(model)))
    out = dllm_fast.generate(model, ids[None], **options)
    assert out.sequences[0].tolist() == plain.ids.tolist()
    assert (out.nfe, out.positions) == (plain.nfe, plain.positions)
