"""``top_k`` and ``top_p``: tokens, noise and confidences against a transcription in loops, in fp64."""

import functools
import math

import pytest
import torch
from needs import needs_cpp, needs_triton
from tiny import EOS, MASK, VOCAB, make_llada

import dllm_fast
from dllm_fast import D2F, Every, ReMDM, Threshold, Uniform, ops
from dllm_fast.decoding import memory
from dllm_fast.decoding.options import Options
from dllm_fast.kernels import reference, reference_nucleus
from dllm_fast.patch import bound_family

FILTERS = [(0, 0.3), (0, 0.9), (1, 1.0), (6, 1.0), (6, 0.6), (10**6, 0.9)]
filters = pytest.mark.parametrize("top_k, top_p", FILTERS, ids=str)
IMPLS = [
    "torch",
    pytest.param("cpp", marks=needs_cpp),
    pytest.param("triton", marks=needs_triton),
]


def likely(z: list[float], temperature: float, top_k: int, top_p: float) -> list[int]:
    """The ids that are kept of one position's logits; -inf is what must not be chosen."""
    order = sorted((i for i in range(len(z)) if z[i] > -math.inf), key=lambda i: (-z[i], i))
    order = order[: top_k or None]
    weight = {i: math.exp((z[i] - z[order[0]]) / temperature) for i in order}
    found, reached = [], 0.0
    for i in order:
        found.append(i)
        reached += weight[i]
        if top_p < 1 and reached >= top_p * sum(weight.values()):
            break
    return found


def transcribed(logits, mask_id, temperature, top_k, top_p, seed, step, row, position, banned=()):
    """Token [N] of logits [N, V] fp64."""
    noise = reference.gumbel(seed, step, row, position, torch.arange(logits.shape[1]))
    tokens = []
    for z, drawn in zip(logits.tolist(), noise.tolist()):
        for i in (mask_id, *banned):
            z[i] = -math.inf
        kept = sorted(likely(z, temperature, top_k, top_p))
        tokens.append(max(kept, key=lambda i: z[i] + temperature * drawn[i]))
    return torch.tensor(tokens)


def keys(rows: int) -> dict:
    at = torch.arange(rows)
    return {"seed": 7, "step": at % 4, "row": at % 3, "position": at}


@filters
@pytest.mark.parametrize("temperature", [0.2, 1.0, 5.0])
def test_tokens_are_the_transcriptions(temperature, top_k, top_p):
    """Logits in steps of a half have many ties, also where the last token is kept."""
    torch.manual_seed(0)
    logits = (torch.randn(60, 50, dtype=torch.float64) * 4).round() / 2
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, **keys(60)}
    expected = transcribed(logits, 3, **options, banned=(8, 9))
    token, score, lse = reference.select(logits, 3, **options, banned=(8, 9))
    assert torch.equal(token, expected)
    # The confidence is the noise-free softmax's over the whole vocabulary.
    counted = logits.clone()
    counted[:, [8, 9]] = -torch.inf
    torch.testing.assert_close(score, counted.softmax(1).gather(1, token[:, None])[:, 0])
    torch.testing.assert_close(lse, counted.logsumexp(1))


@filters
@pytest.mark.parametrize("impl", IMPLS)
def test_every_implementation_has_the_same_tokens(impl, top_k, top_p, monkeypatch):
    """Of logits that are exact in fp32: with guidance, candidates, a bias, forbidden tokens and deferred ones."""
    torch.manual_seed(1)
    hidden, uncond, weight, bias = (torch.randint(-2, 3, size).float() for size in ((37, 8), (37, 8), (60, 8), (60,)))
    exact = (hidden @ weight.T).double() + bias, (uncond @ weight.T).double() + bias
    logits = exact[1] + 2 * (exact[0] - exact[1])
    options = {"temperature": 3.0, "top_k": top_k, "top_p": top_p, **keys(37)}
    expected = transcribed(logits, 3, **options, banned=(8,))
    monkeypatch.setattr(ops, "FILTERED", 10)
    more = {"mask_id": 3, "banned": (8,), "deferred": (4, 20), "cfg_scale": 1.0}
    candidate = torch.rand(37) < 0.7
    for confidence in ("probability", "margin", "entropy", "random"):
        found = ops.predict(
            hidden, weight, bias, candidate=candidate, uncond=uncond, confidence=confidence, impl=impl, **more,
            **options,
        )  # fmt: skip
        assert torch.equal(found[0], expected.where(candidate, 3))
        truth = reference.select(logits, 3, candidate, confidence, **options, banned=(8,), deferred=(4, 20))
        for ours, exact in zip(found[1:], truth[1:], strict=True):
            torch.testing.assert_close(ours.double(), exact, atol=2e-6, rtol=2e-6)


def test_the_last_token_is_the_one_that_reaches_top_p():
    """Probabilities 1/2, 1/4, 1/8, 1/16, 1/16 at temperature 1, and other ones at temperature 2."""
    logits = torch.tensor([[2.0, 4.0, 1.0, 5.0, 3.0]], dtype=torch.float64).sub(2).exp2().log2() * math.log(2)
    logits[0, 2] = logits[0, 0]
    order = [3, 1, 4, 0, 2]
    for dtype in (torch.float64, torch.float32):
        for top_p, count in ((1e-9, 1), (0.5, 1), (0.5001, 2), (0.75, 2), (0.876, 4), (0.9375, 4), (0.94, 5)):
            z, ids = reference_nucleus.kept(logits.to(dtype), 1.0, 0, top_p)
            # Logits are fp32's, so a sum may miss the share that it is just about to reach.
            exact = dtype == torch.float64 or top_p not in (0.5, 0.75, 0.9375)
            assert ids[0].tolist() == order and (not exact or int((z > -torch.inf).sum()) == count), top_p
    z, _ = reference_nucleus.kept(logits, 2.0, 0, 0.5)
    assert int((z > -torch.inf).sum()) == 2
    # Of the first three, 4/7, 2/7 and 1/7: top_k comes first.
    z, _ = reference_nucleus.kept(logits, 1.0, 3, 0.86)
    assert int((z > -torch.inf).sum()) == 3
    z, _ = reference_nucleus.kept(logits, 1.0, 3, 0.85)
    assert int((z > -torch.inf).sum()) == 2


@pytest.mark.parametrize("width", [1, 7, 64, 999])
def test_equal_logits_are_in_the_order_of_their_ids(width):
    torch.manual_seed(width)
    logits = torch.randn(20, 1000).mul(3).round().mul(0.25)
    logits[:, ::7] *= -1  # has -0.0 among the zeros
    logits[:, 5::11] = -torch.inf
    logits[3], logits[4], logits[5] = 0.0, -torch.inf, torch.linspace(-1e38, 1e38, 1000)
    logits[6] = torch.randint(-99, 99, (1000,)) * 1e-45
    z, ids = reference_nucleus.ordered(logits, width)
    expected = torch.sort(logits, dim=1, descending=True, stable=True)
    assert torch.equal(ids, expected.indices[:, :width]) and torch.equal(z, expected.values[:, :width])


@pytest.mark.parametrize("top_p", [0.1, 0.6, 0.97])
def test_trying_a_few_first_changes_nothing(top_p, monkeypatch):
    """Rows that keep few tokens beside rows that keep most: some sizes suffice and others do not."""
    torch.manual_seed(2)
    spread = torch.tensor([0.01, 1.0, 4.0, 9.0]).repeat(3)[:, None]
    logits = torch.randn(12, 3000) * spread
    whole = reference.select(logits, 5, temperature=0.8, top_p=top_p, **keys(12))
    seen = []
    ordered = reference_nucleus.ordered
    monkeypatch.setattr(reference_nucleus, "ordered", lambda z, width: seen.append(width) or ordered(z, width))
    for few, rows in (((), range(12)), ((8, 200), range(12)), ((8, 200), (3, 7)), ((4000,), (2, 3))):
        monkeypatch.setattr(reference_nucleus, "FEW", few)
        at = torch.tensor(list(rows))
        of_rows = {name: x if isinstance(x, int) else x[at] for name, x in keys(12).items()}
        found = reference.select(logits[at], 5, temperature=0.8, top_p=top_p, **of_rows)
        for ours, expected in zip(found, whole, strict=True):
            torch.testing.assert_close(ours, expected[at], rtol=1e-6, atol=1e-6)
    assert seen[:4] == [3000, 8, 200, 3000] and seen[4] == 8 and seen[-1] == 3000


def test_what_changes_nothing_takes_the_path_of_before(monkeypatch):
    torch.manual_seed(3)
    hidden, weight = torch.randn(20, 16), torch.randn(90, 16)
    plain = functools.partial(ops.predict, hidden, weight, mask_id=3, **keys(20))
    drawn, greedy = plain(temperature=1.0), plain()
    every = plain(temperature=1.0, top_k=90)
    for ours, theirs in zip(every, drawn, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(plain(temperature=1.0, top_k=1)[0], greedy[0])
    assert torch.equal(plain(temperature=9.0, top_p=1e-6)[0], greedy[0])
    assert torch.equal(plain(temperature=1e-300, top_p=0.5)[0], greedy[0])
    monkeypatch.setattr(reference, "kept", None)
    for off in ({"temperature": 1.0, "top_k": 0, "top_p": 1.0}, {"top_k": 4, "top_p": 0.5}):
        for ours, theirs in zip(plain(**off), drawn if "temperature" in off else greedy, strict=True):
            assert torch.equal(ours, theirs)
    with pytest.raises(TypeError):
        plain(temperature=1.0, top_k=4)


@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_p": 0.8}, {"top_k": 6, "top_p": 0.9}], ids=str)
def test_draws_have_the_distribution(options):
    """A chi-squared test at 20,000 positions, at the probability of one in a million."""
    torch.manual_seed(4)
    logits, n, temperature = torch.randn(11, dtype=torch.float64) * 1.5, 20_000, 0.7
    z = [-math.inf if i == 2 else x for i, x in enumerate(logits.tolist())]
    kept = likely(z, temperature, options.get("top_k", 0), options.get("top_p", 1.0))
    token, _, _ = reference.select(logits.float().expand(n, -1), 2, temperature=temperature, **keys(n), **options)
    probability = (logits[kept] / temperature).softmax(0)
    count = token.bincount(minlength=11)
    assert int(count[kept].sum()) == n and 3 <= len(kept) < 10
    surprise = float(((count[kept] - n * probability) ** 2 / (n * probability)).sum())
    degrees = len(kept) - 1
    # Wilson and Hilferty's approximation of the quantile.
    assert surprise < degrees * (1 - 2 / (9 * degrees) + 4.75 * math.sqrt(2 / (9 * degrees))) ** 3


LENGTHS = {"gen_length": 16, "block_length": 8, "temperature": 0.8, "seed": 5}
GENERATED = [
    {"top_k": 3},
    {"top_p": 0.4, "schedule": Uniform(12), "cfg_scale": 1.0, "cache": "prefix"},
    {"top_k": 9, "top_p": 0.7, "schedule": Uniform(12), "skip_committed": True, "refresh": Every(2)},
    {"top_p": 0.4, "schedule": Uniform(12), "remask": ReMDM(0.5), "confidence": "entropy"},
    {"top_k": 5, "pipeline": D2F(0.5, 0.5), "schedule": Threshold(0.3)},
]


@pytest.mark.parametrize("options", GENERATED, ids=str)
def test_a_row_has_the_tokens_that_it_has_alone(options, ids):
    """Filling gaps too, with other rows, and with drafts where they are to be had."""
    model = dllm_fast.patch(make_llada(n_layers=2))
    options = LENGTHS | options
    prompts = [ids[0], ids[1, :7], ids[2, :15].clone()]
    if "pipeline" not in options:
        prompts[2][4:9] = MASK
    alone = [next(dllm_fast.generate_many(model, [p], 1, noise_rows=[n], **options)) for n, p in enumerate(prompts)]
    ways = [options] if "pipeline" in options or "skip_committed" in options else [options, options | {"speculate": 2}]
    for way in ways:
        for done, expected in zip(dllm_fast.generate_many(model, prompts, 2, **way), alone, strict=True):
            assert done.sequence.tolist() == expected.sequence.tolist()
    free = list(dllm_fast.generate_many(model, prompts, 2, **options | {"top_k": None, "top_p": 1.0}))
    assert any(done.sequence.tolist() != expected.sequence.tolist() for done, expected in zip(free, alone))


def test_one_token_is_the_greedy_one(either, ids, padded):
    dllm_fast.patch(either)
    greedy = dllm_fast.generate(either, ids, padded, gen_length=16, block_length=8).sequences
    run = functools.partial(dllm_fast.generate, either, ids, padded, **LENGTHS)
    assert not torch.equal(run().sequences, greedy)
    assert torch.equal(run(top_k=1).sequences, greedy)
    assert torch.equal(run(top_p=1e-9).sequences, greedy)
    assert torch.equal(run(top_k=0).sequences, run().sequences)
    assert torch.equal(run(top_k=2, top_p=0.1, temperature=0.0).sequences, greedy)


@pytest.mark.parametrize("impl", IMPLS[:2])
def test_log_probabilities_are_of_the_logits_that_drew_the_token(impl, ids):
    """Of logits in the thousands, which bf16 rounds by up to 8: one that is not rounded like the sum's would be far
    from 0."""
    model = make_llada(n_layers=2)
    with torch.no_grad():
        model.model.transformer.ff_out.weight.mul_(3000)
    dllm_fast.patch(model.bfloat16(), impl)
    out = dllm_fast.generate(model, ids, **LENGTHS | {"top_k": 4, "logprobs": True, "temperature": 0.01})
    own = out.logprobs[:, 24:]
    assert own.median() > -1e-3 and own.max() < 1e-3


def test_the_plain_loop_has_them_too(llada, ids):
    for options in ({"top_k": 3}, {"top_p": 0.5}):
        options = LENGTHS | options
        plain = dllm_fast.generate_plain(llada, ids, **options).sequences
        with dllm_fast.patched(llada, "torch"):
            assert torch.equal(dllm_fast.generate(llada, ids, cache="none", **options).sequences, plain)


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"top_k": -1}, "top_k=-1 is not a whole number from 0 up"),
        ({"top_k": 2.0}, "top_k=2.0 is not a whole number"),
        ({"top_k": True}, "top_k=True is not a whole number"),
        ({"top_p": 0}, "top_p=0 is not a number above 0 and up to 1"),
        ({"top_p": 1.01}, "top_p=1.01 is not a number above 0 and up to 1"),
        ({"top_p": float("nan")}, "top_p=nan is not a number above 0"),
        ({"top_p": None}, "top_p=None is not a number above 0"),
        ({"top_p": "0.9"}, "top_p='0.9' is not a number above 0"),
    ],
    ids=str,
)
def test_values_are_checked_before_any_work(bad, message, llada, ids):
    dllm_fast.patch(llada)
    for run in (dllm_fast.generate, lambda model, ids, **options: dllm_fast.generate_many(model, [ids[0]], **options)):
        with pytest.raises(ValueError, match=message):
            run(llada, ids, **bad)


def test_off_is_one_engine():
    """0 and None are the same options, for which an engine is kept."""
    assert Options(top_k=0) == Options() and Options(top_k=3) != Options()
    assert not Options(top_k=3, top_p=0.5).filters and Options(top_k=3, temperature=0.1).filters
    assert not Options(temperature=1.0).filters


def test_the_memory_of_sorting_is_counted(llada):
    family = bound_family(dllm_fast.patch(llada))
    options = Options(temperature=1.0, mask_id=MASK, eos_id=EOS).resolved(llada, family)
    asked = Options(temperature=1.0, mask_id=MASK, eos_id=EOS, top_p=0.9).resolved(llada, family)
    more = memory.need(family, asked, 2, 64, 0) - memory.need(family, options, 2, 64, 0)
    assert more == (200 * 32 - 12 * 64) * VOCAB
