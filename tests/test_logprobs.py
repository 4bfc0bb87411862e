"""``logprobs=True``: of each token its log-probability at the step that committed it, and the order of the steps."""

import functools
import random
import re
from pathlib import Path

import plain_loop
import pytest
import torch
from needs import needs_cpp, needs_triton
from rows import draw_request
from tiny import EOS, MAKERS, MASK, make_llada

import dllm_fast
from dllm_fast import Ancestral, Drift, Edit, Factor, ReMDM, Threshold, Uniform, ops
from dllm_fast.decoding.options import Options
from dllm_fast.patch import bound_family


@functools.cache
def model_of(name):
    return dllm_fast.patch(MAKERS[name]().double(), impl="torch")


@pytest.mark.parametrize("name", ["llada-gqa", "modernbert"])
@pytest.mark.parametrize("seed", [pytest.param(n, marks=() if n < 3 else pytest.mark.long) for n in range(40)])
def test_those_of_the_plain_loop(name, seed):
    """Random requests: caches, refreshes, remasks, guidance, noise, drafts, one row at a time and seated together."""
    model, rng = model_of(name), random.Random(seed)
    family = bound_family(model)
    while True:
        request = draw_request(rng, rows=(3,), most_blocks=3, longest=12, windows=any(family.windows))
        options = request.options | {"logprobs": True, "eos_id": None}
        planless = isinstance(options["schedule"], Ancestral) or isinstance(options.get("refresh"), Drift)
        suffix = options.get("suffix_length")
        seen = 40 if suffix is None else options["block_length"] + suffix + options.get("suffix_sample", 0)
        level = any((prompt[:seen] == MASK).all() for prompt in request.prompts)
        if options["cache"] != "none" and not planless and not level:  # the plain loop has neither of the two
            break
    resolved = Options(**options).resolved(model, family)
    expected = [plain_loop.run(family, ids, resolved, row) for row, ids in enumerate(request.prompts)]
    for seats in (1, 2, 3):
        for plain, done in zip(
            expected, dllm_fast.generate_many(model, request.prompts, seats, **options), strict=True
        ):
            check(plain, done)


def check(plain, done):
    assert done.sequence.tolist() == plain.ids.tolist()
    assert done.logprobs.dtype == torch.float32 and done.order.dtype == torch.int64
    numbers = {key: n for n, key in enumerate(sorted(set(plain.steps.values())))}
    assert done.order.tolist() == [numbers.get(plain.steps.get(i), -1) for i in range(len(plain.ids))]
    wanted = torch.tensor([plain.logprobs.get(i, 0.0) for i in range(len(plain.ids))])
    torch.testing.assert_close(done.logprobs, wanted, atol=2e-6, rtol=2e-6)


@torch.no_grad()
def replayed(model, ids, out, suppressed=()):
    """Log-probabilities of the tokens of ``out`` [B, L], from forwards of the states that its order says."""
    found = torch.zeros_like(out.logprobs)
    for step in range(int(out.order.max()) + 1):
        state = out.sequences.masked_fill(out.order >= step, MASK)
        logits = model(state).logits.float()
        logits[..., list(suppressed)] = -torch.inf
        own = logits.log_softmax(-1).gather(2, out.sequences[..., None])[..., 0]
        found = torch.where(out.order == step, own, found)
    return found


SAMPLED = [
    {"schedule": Uniform(12), "temperature": 0.8, "suppress_tokens": [3, 4]},
    {"schedule": Threshold(0.05), "temperature": 1.0, "confidence": "margin"},
    {"schedule": Factor(1.0), "defer_tokens": [EOS], "speculate": 2},
]


@pytest.mark.parametrize("options", SAMPLED, ids=str)
def test_replaying_the_order_gives_them_again(either, ids, options):
    """What a policy gradient needs: without a cache, the same weights give a ratio of 1."""
    dllm_fast.patch(either)
    run = functools.partial(dllm_fast.generate, either, ids, gen_length=24, block_length=12, cache="none", seed=5)
    out = run(logprobs=True, **options)
    assert torch.equal(out.sequences, run(**options).sequences)
    assert (out.order[:, :24] == -1).all() and (out.order[:, 24:] >= 0).all() and (out.logprobs[:, :24] == 0).all()
    assert (out.order[:, 24:36].amax(1) < out.order[:, 36:].amin(1)).all(), "block after block"
    expected = replayed(either, ids, out, options.get("suppress_tokens", ()))
    torch.testing.assert_close(out.logprobs, expected, atol=2e-5, rtol=1e-4)


def test_what_is_given_and_what_ends_a_text_has_none(llada):
    dllm_fast.patch(llada)
    ids = torch.randint(0, EOS, (2, 10), generator=torch.Generator().manual_seed(2))
    ids[0, 3] = ids[1, 9] = MASK
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    options = {"gen_length": 16, "block_length": 8, "schedule": Uniform(6), "logprobs": True}
    free = dllm_fast.generate(llada, ids, mask, **options)
    assert (free.order[:, :10] >= 0).tolist() == (ids == MASK).tolist()
    assert (free.logprobs < 0).tolist() == (free.order >= 0).tolist()
    eos_id = int(free.sequences[0, 12])  # ends the first row there, or before
    cut = dllm_fast.generate(llada, ids, mask, eos_id=eos_id, **options)
    end = int(((cut.sequences[0] == eos_id) & (free.order[0] >= 0)).nonzero()[0])  # of what was filled
    assert (cut.order[0, end + 1 :] == -1).all() and (cut.logprobs[0, end + 1 :] == 0).all()
    assert torch.equal(cut.logprobs[0, : end + 1], free.logprobs[0, : end + 1]) and cut.order[0, end] >= 0


def test_an_edited_token_has_that_of_its_edit(llada, ids):
    """By a loop over one block: threshold 0 replaces a token whenever another one is predicted."""
    dllm_fast.patch(llada)
    out = dllm_fast.generate(
        llada, ids[:1], gen_length=8, block_length=8, cache="none", schedule=Threshold(0.02), remask=Edit(0.0, 6),
        logprobs=True,
    )  # fmt: skip
    state = torch.cat((ids[:1], torch.full((1, 8), MASK)), 1)
    logprobs, steps, step, rounds = torch.zeros(32), torch.full((32,), -1), 0, 6
    while True:
        with torch.no_grad():
            logits = llada(state).logits[0]
        token = logits.index_fill(1, torch.tensor([MASK]), -torch.inf).argmax(-1)
        own = logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
        masked = state[0] == MASK
        chosen = masked & (own.exp() >= 0.02)
        if masked.any() and not chosen.any():
            chosen[own.masked_fill(~masked, -torch.inf).argmax()] = True
        edited = ~masked & (token != state[0]) & (torch.arange(32) >= 24)
        changed = chosen | edited
        state = torch.where(changed, token, state[0])[None]
        logprobs, steps = torch.where(changed, own, logprobs), torch.where(changed, step, steps)
        step += 1
        if not (state == MASK).any():
            if rounds == 0 or not (masked.any() or edited.any()):
                break
            rounds -= 1
    assert torch.equal(out.sequences, state)
    torch.testing.assert_close(out.logprobs[0], logprobs, atol=2e-5, rtol=1e-4)
    assert torch.equal(out.order[0].unique(return_inverse=True)[1], steps.unique(return_inverse=True)[1])


CASES = [
    pytest.param("cpp", None, marks=needs_cpp),
    pytest.param("cpp", "fp8", marks=needs_cpp),
    pytest.param("triton", None, marks=needs_triton),
    pytest.param("triton", "fp8", marks=[needs_triton, pytest.mark.long]),
]


@pytest.mark.parametrize(("impl", "head"), CASES)
def test_every_implementation_gives_them(impl, head, ids):
    options = {"gen_length": 2, "block_length": 2, "schedule": Uniform(2), "temperature": 0.5, "seed": 0}
    found = []
    for one in ("torch", impl):
        device = "cuda" if one == "triton" and torch.cuda.is_available() else "cpu"
        model = dllm_fast.patch(make_llada(n_layers=1, d_model=32, n_heads=2, mlp_hidden_size=32), one, head=head)
        out = dllm_fast.generate(
            model.to(device), ids[:2, :4].to(device), logprobs=True, cfg_scale=0.5, remask=ReMDM(0.5), **options
        )
        found.append((out.sequences.cpu(), out.order.cpu(), out.logprobs.cpu()))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[0][2], found[1][2], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("impl", ["torch", pytest.param("cpp", marks=needs_cpp)])
@pytest.mark.parametrize("scaled", [False, True])
def test_in_bf16_they_are_of_the_same_logits_as_the_confidence(impl, scaled):
    """PyTorch rounds logits to bf16, and a likely token's must not come out above 0 for that."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=draw).bfloat16() for n in (400, 300))
    head = (weight, None, None)
    if scaled:
        head = weight.to(torch.float8_e4m3fn), None, torch.rand(300, generator=draw) + 0.5
    token, confidence, lse = ops.predict(hidden, *head, mask_id=1, impl=impl)
    found = ops.token_logprob(hidden, *head, token=token, lse=lse, impl=impl)
    # The same sum in another order may be rounded to the next number.
    away = (found - confidence.log()).abs()
    assert (away < 1e-4).float().mean() > (0.9 if impl == "torch" or scaled else 0.999)
    assert (away <= 2**-7 * 40).all() and (found <= 2**-7 * 40).all()


def test_refused(llada, ids):
    dllm_fast.patch(llada)
    with pytest.raises(ValueError, match="logprobs='yes' is not True or False"):
        dllm_fast.generate(llada, ids, logprobs="yes")
    with pytest.raises(ValueError, match="logprobs=True: not an argument that can be honoured"):
        llada.generate(ids, max_new_tokens=8, logprobs=True)
    out = dllm_fast.generate(llada, ids, gen_length=8, block_length=8)
    assert out.logprobs is None and out.order is None


def test_the_loop_of_the_page_runs():
    page = (Path(__file__).parents[1] / "docs" / "rollouts.md").read_text(encoding="utf-8")
    names = {}
    exec(compile(re.findall(r"```python\n(.*?)```", page, re.S)[0], "rollouts.md", "exec"), names)
    assert names["ratio"].isfinite().all() and (names["out"].order.amax(1) == 7).all()
