"""A row's tokens, NFE, keys, values and hidden states do not depend on its batch.

Models run in fp64 on PyTorch, where the order of a sum, which may depend on the batch size, does not matter. In fp32 it
may decide between two candidates that are nearly equal. If a row differs, this must be the reason: alone, with weights
changed by a rounding error, it must give the other tokens too.
"""

import random

import pytest
import torch
from needs import needs_cpp, needs_triton
from rows import alone, draw_request, is_as_alone, is_level, seated, together, with_seeds
from tiny import EOS, MASK, make_llada, make_modernbert

import dllm_fast
from dllm_fast import Ancestral, Drift, Every, FirstHitting, Threshold, Uniform, Verify, Window
from dllm_fast.decoding.engine import Engine

FAMILIES = {
    "llada": make_llada,
    "llada-gqa": lambda seed: make_llada(seed, n_kv_heads=2),
    "modernbert": make_modernbert,
}


def make(name: str, seed: int, impl: str):
    model = FAMILIES[name](seed)
    if impl == "torch":
        model = model.double()
    try:
        return dllm_fast.patch(model, impl=impl)
    except ValueError as error:
        if impl == "cpp":
            pytest.skip(str(error))
        raise


def check(impl: str, seed: int, requests: int) -> None:
    rng = random.Random(seed)
    name = rng.choice(sorted(FAMILIES))
    model = make(name, seed, impl)
    for _ in range(requests):
        request = draw_request(rng, windows=name == "modernbert")
        expected = alone(model, request)
        ways = {"a batch": together(model, request), "2 seats": seated(model, request, 2)}
        ways["3 seats"] = seated(model, request, 3)
        for way, found in ways.items():
            for row, (mine, own) in enumerate(zip(found, expected, strict=True)):
                same = is_as_alone(request, mine, own) or (impl == "cpp" and is_level(model, request, row, mine))
                assert same, f"row {row} of {way}: {request}"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("impl", ["torch", pytest.param("cpp", marks=needs_cpp)])
def test_a_row_alone_in_a_batch_and_through_seats(impl, seed):
    check(impl, seed, 2)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 148))
@pytest.mark.parametrize("impl", ["torch", pytest.param("cpp", marks=needs_cpp)])
def test_many_rows_alone_in_a_batch_and_through_seats(impl, seed):
    check(impl, seed, 12)


@pytest.mark.parametrize("seed", [pytest.param(n, marks=() if n < 3 else pytest.mark.long) for n in range(40)])
def test_rows_with_seeds_of_their_own(seed):
    """In one engine, each has the tokens of `generate` with its seed."""
    rng = random.Random(seed)
    name = rng.choice(sorted(FAMILIES))
    model, request = make(name, seed, "torch"), draw_request(rng, windows=name == "modernbert")
    request.options["temperature"] = rng.choice([0.5, 1.0])
    seeds = [rng.randrange(1 << 63) for _ in request.prompts]
    expected = [
        dllm_fast.generate(model, prompt[None], **request.options | {"seed": own}).sequences[0].tolist()
        for prompt, own in zip(request.prompts, seeds, strict=True)
    ]
    for seats in (2, len(seeds)):
        assert with_seeds(model, request, seeds, seats) == expected, request


@needs_triton
def test_rows_on_the_kernels():
    """A row that waits, a row with padding, and a window at its edge."""
    model = make_llada(n_layers=2).to("cuda" if torch.cuda.is_available() else "cpu")
    dllm_fast.patch(model, impl="triton")
    prompts = [torch.tensor([5, MASK, 7, 8, 9, 3]), torch.tensor([MASK, MASK, MASK, MASK])]
    options = {"gen_length": 4, "block_length": 4, "schedule": FirstHitting(), "refresh": Window(4, 0)}
    many = list(dllm_fast.generate_many(model, prompts, batch_size=2, seed=3, **options))
    for row, prompt in enumerate(prompts):
        (own,) = dllm_fast.generate_many(model, [prompt], noise_rows=[row], seed=3, **options)
        assert torch.equal(own.sequence, many[row].sequence) and own.nfe == many[row].nfe


# What a row leaves in the cache


@pytest.fixture
def after_blocks(monkeypatch):
    """By noise row: the row's cache entries after each of its blocks, and the block's NFE."""
    found = {}
    block = Engine.block

    def watched(self, *args):
        block(self, *args)
        for b in range(self.rows):
            own = slice(self.slots - self.lengths[b], self.slots)
            passes = [b + p * self.rows for p in range(self.passes)]
            kept = [self.cache.buffers[:, :, passes, own].clone()]
            if self.cache.states is not None:
                kept.append(self.cache.states[:, passes, own].clone())
            found.setdefault(int(self.row[b]), []).append((kept, self.counts[b].nfe))

    monkeypatch.setattr(Engine, "block", watched)
    return found


WAITING = {
    "none left": FirstHitting(),
    "as it goes": Threshold(1.0),
    "other steps": Ancestral(63),
    "shares": Uniform(12),
}
REFRESHES = ["block", Every(2), Window(0, 0), Window(3, 20), Window(8, 8), Window(40, 0), Drift(0.0), Drift(0.3)]
EXTRAS = [{}, {"cfg_scale": 1.0}, {"remask": Verify(0.3)}]


@pytest.mark.parametrize("schedule", WAITING.values(), ids=WAITING)
@pytest.mark.parametrize(
    "name, cache", [("llada", "dual"), pytest.param("modernbert", "prefix", marks=pytest.mark.long)]
)
def test_a_row_that_waits_leaves_no_trace(name, cache, schedule, after_blocks):
    check_traces(name, cache, schedule, after_blocks, [EXTRAS[i % 3] for i in range(len(REFRESHES))], REFRESHES)


@pytest.mark.long
@pytest.mark.parametrize("schedule", WAITING.values(), ids=WAITING)
@pytest.mark.parametrize("cache", ["dual", "prefix"])
@pytest.mark.parametrize("name", ["llada-gqa", "modernbert"])
@pytest.mark.parametrize("extra", EXTRAS, ids=str)
def test_rows_leave_no_trace_under_any_option(name, cache, schedule, extra, after_blocks):
    check_traces(name, cache, schedule, after_blocks, [extra] * len(REFRESHES), REFRESHES)


def check_traces(name, cache, schedule, after_blocks, extras, refreshes):
    """Keys, values and hidden states after each block, and its evaluations, are those of the row alone.

    The rows have 8, 3 and 1 positions to fill in the first of three blocks, so that some wait under any schedule; the
    first begins with [MASK]s.
    """
    model = make(name, 0, "torch")
    words = torch.randint(0, EOS, (3, 20), generator=torch.Generator().manual_seed(1))
    prompts = [torch.cat((torch.full((8,), MASK), words[0])), words[1][:16], words[2][:13]]
    prompts[1][[2, 4, 7]], prompts[2][2] = MASK, MASK
    fixed = {"gen_length": 16, "block_length": 8, "schedule": schedule, "cache": cache, "temperature": 0.5, "seed": 4}
    for refresh, extra in zip(refreshes, extras, strict=True):
        run = {**fixed, "refresh": refresh, **extra}
        list(dllm_fast.generate_many(model, prompts, batch_size=3, **run))
        found = dict(after_blocks)
        after_blocks.clear()
        for row, prompt in enumerate(prompts):
            list(dllm_fast.generate_many(model, [prompt], noise_rows=[row], **run))
        expected = dict(after_blocks)
        after_blocks.clear()
        assert len({blocks[0][1] for blocks in expected.values()}) > 1, "no row waits"
        for row, blocks in expected.items():
            assert [count for _, count in found[row]] == [count for _, count in blocks]
            for (kept, _), (own, _) in zip(found[row], blocks, strict=True):
                for mine, its in zip(kept, own, strict=True):
                    torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-9)


def test_positions_of_a_batch_are_those_of_its_rows_alone():
    model = make("llada", 0, "torch")
    words = torch.randint(0, EOS, (2, 20), generator=torch.Generator().manual_seed(1))
    words[0, :3] = MASK
    mask = torch.ones_like(words)
    mask[1, :13] = 0
    for cache in ("none", "prefix", "dual"):
        for refresh in REFRESHES[: 1 if cache == "none" else None]:
            options = {"gen_length": 16, "block_length": 8, "schedule": Threshold(0.1), "cache": cache}
            options["refresh"] = refresh
            rows = [dllm_fast.generate(model, ids[own.bool()][None], **options) for ids, own in zip(words, mask)]
            batch = dllm_fast.generate(model, words, mask, **options)
            assert batch.positions == pytest.approx(sum(row.positions for row in rows), abs=1), str(options)
            assert batch.row_nfe == [row.nfe for row in rows] == [row.row_nfe[0] for row in rows]


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_a_batchs_evaluations_are_those_of_the_row_that_takes_most(either, ids, padded, cache):
    """Rows whose long blocks come at different times make more forwards than any of them needs."""
    dllm_fast.patch(either)
    options = {"gen_length": 24, "block_length": 8, "schedule": Threshold(0.02), "cache": cache}
    out = dllm_fast.generate(either, ids, padded, **options)
    alone = [
        dllm_fast.generate(either, row[mask.bool()][None], **options) for row, mask in zip(ids, padded, strict=True)
    ]
    most = max(alone, key=lambda one: one.nfe)
    assert out.row_nfe == [one.nfe for one in alone]
    assert (out.nfe, out.nfe_full, out.nfe_block) == (most.nfe, most.nfe_full, most.nfe_block)
    assert out.positions == sum(one.positions for one in alone)
