"""The definitions against loops, PyTorch, transformers and published constants, in fp64."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental import _config

from dllm_fast.kernels import reference, reference_noise, reference_rounded

DOUBLE = {"dtype": torch.float64}


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance, check_dtype=False)


def test_norms_are_pytorchs():
    x, r = torch.randn(2, 3, 7, 40, **DOUBLE)
    weight, bias = torch.randn(2, 40, **DOUBLE)
    y, h = reference.rms_norm(x, weight, 1e-5, r)
    close(h, x + r)
    close(y, F.rms_norm(x + r, (40,), weight, 1e-5))
    for b in (bias, None):
        y, h = reference.layer_norm(x, weight, b, 1e-5, r)
        close(y, F.layer_norm(x + r, (40,), weight, b, 1e-5))
    y, h = reference.layer_norm(x, weight, bias, 1e-5)
    assert h is x


def test_gates_are_pytorchs():
    gate, up = torch.randn(2, 5, 33, **DOUBLE) * 4
    close(reference.swiglu(gate, up), F.silu(gate) * up)
    close(reference.geglu(gate, up), F.gelu(gate) * up)


def test_rope_rotates_by_complex_multiplication_and_writes_the_buffers():
    q, k, v = torch.randn(3, 2, 5, 4, 16, **DOUBLE)
    k, v = k[:, :, :2], v[:, :, :2]
    cos, sin = reference.rope_table(50, 16, 10000.0)
    keys, values = torch.full((2, 2, 20, 2, 16), float("nan"), **DOUBLE)
    position, slot = torch.tensor([7, -2]), torch.tensor([9, 17])
    out = reference.rope(q, k, v, cos, sin, position, slot, keys, values)

    def rotate(x, p):  # [heads, D]
        turn = torch.complex(cos[p].double(), sin[p].double())
        z = torch.complex(x[..., :8], x[..., 8:]) * turn
        return torch.cat((z.real, z.imag), -1)

    for b in range(2):
        for t in range(5):
            p = max(int(position[b]) + t, 0)
            close(out[b, t], rotate(q[b, t], p))
            s = int(slot[b]) + t
            if s < 20:
                close(keys[b, s], rotate(k[b, t], p))
                close(values[b, s], v[b, t])
    untouched = torch.ones(2, 20, dtype=torch.bool)
    untouched[0, 9:14] = untouched[1, 17:] = False
    assert keys[untouched].isnan().all() and not keys[~untouched].isnan().any()


@pytest.mark.parametrize("window", [None, 0, 3, 100], ids="window-{}".format)
@pytest.mark.parametrize("heads,groups", [(4, 4), (4, 2), (4, 1)], ids="heads-{}".format)
def test_attention_is_the_sum_over_visible_slots(window, heads, groups):
    torch.manual_seed(0)
    q = torch.randn(3, 4, heads, 8, **DOUBLE)
    keys, values = torch.randn(2, 3, 12, groups, 8, **DOUBLE)
    start, end, slot = torch.tensor([0, 5, 6]), torch.tensor([12, 9, 6]), torch.tensor([3, 4, 0])
    out = reference.attention(q, keys, values, start, end, slot, window)
    for b in range(3):
        for t in range(4):
            i = int(slot[b]) + t
            see = [j for j in range(int(start[b]), int(end[b])) if window is None or abs(i - j) <= window]
            for h in range(heads):
                g = h * groups // heads
                if not see:
                    assert (out[b, t, h] == 0).all()
                    continue
                weight = torch.softmax(keys[b, see, g] @ q[b, t, h] / math.sqrt(8), 0)
                close(out[b, t, h], weight @ values[b, see, g])


# Known answers of Random123 for philox4x32-10: (counter, key, result).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter,key,result", KNOWN, ids=["zeros", "ones", "pi"])
def test_philox_gives_the_published_words(counter, key, result):
    seed = key[0] | key[1] << 32
    assert tuple(int(word) for word in reference.philox(seed, *counter)) == result


def test_gumbel_noise_is_gumbel():
    n, v = 100, 2000
    noise = reference.gumbel(7, 3, torch.arange(n), torch.arange(n) + 5, torch.arange(v)).flatten().sort().values
    exact = torch.exp(-torch.exp(-noise))
    rank = torch.arange(1, n * v + 1, **DOUBLE) / (n * v)
    assert (exact - rank).abs().max() < 1.95 / math.sqrt(n * v)  # Kolmogorov-Smirnov, p = 0.001
    assert abs(float(noise.mean()) - 0.5772156649) < 4 * math.pi / math.sqrt(6 * n * v)


def test_gumbel_noise_is_exact_in_both_tails(monkeypatch):
    words = {}
    monkeypatch.setattr(reference_noise, "philox", lambda *args: words["w"])
    column, row = torch.tensor([0]), torch.tensor([0])

    def noise(high, low):
        words["w"] = tuple(torch.tensor([[x]]) for x in (high, low, 0, 0))
        return float(reference.gumbel(0, 0, row, row, column))

    most = 0xFFFFFFFF
    assert noise(most, most) == pytest.approx(-math.log(2.0**-65), rel=1e-12)  # U = 1 - 2^-65
    assert noise(0, 0) == pytest.approx(-math.log(65 * math.log(2)), rel=1e-12)  # U = 2^-65
    for high in (most - 1, most - 1000, 1 << 31, (1 << 31) - 1, 12345):
        u = (high + 0.5) / 2**32  # low word at its middle
        assert noise(high, 1 << 31) == pytest.approx(-math.log(-math.log(u)), rel=1e-9, abs=1e-9)


def test_gumbel_noise_is_a_pure_function_of_its_key():
    row, position, columns = torch.arange(3), torch.tensor([4, 9, 4]), torch.arange(11)
    whole = reference.gumbel(5, 2, row, position, columns)
    torch.testing.assert_close(reference.gumbel(5, 2, row[1:2], position[1:2], columns[3:8]), whole[1:2, 3:8])
    keys = [(6, 2, 0, 0), (5, 3, 0, 0), (5, 2, 1, 0), (5, 2, 0, 1), (5 + (1 << 40), 2, 0, 0)]
    for seed, step, r, p in keys:
        assert not torch.isclose(reference.gumbel(seed, step, row + r, position + p, columns), whole).any()


def test_sampled_tokens_follow_the_softmax():
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0, 3.0, 0.5], **DOUBLE)
    n, temperature = 20000, 1.7
    token, confidence, _ = reference.select(
        logits.expand(n, -1), 5, temperature=temperature, seed=1, row=torch.zeros(n), position=torch.arange(n)
    )
    share = torch.softmax(logits[:5] / temperature, 0)
    count = torch.bincount(token, minlength=6)
    assert count[5] == 0
    assert float(((count[:5] - n * share) ** 2 / (n * share)).sum()) < 18.47  # chi-squared, 4 df, p = 0.001
    close(confidence, torch.softmax(logits, 0)[token])


@pytest.mark.parametrize("deferred", [(), (4, 7, 12)], ids=["none-deferred", "some-deferred"])
def test_predict_counts_the_mask_but_neither_banned_nor_deferred_ids(deferred):
    """LLaDA's `logits_eos_inf` and `confidence_eos_eot_inf`, as in its generate.py at temperature 0."""
    hidden, weight, bias = torch.randn(60, 8, **DOUBLE), torch.randn(20, 8, **DOUBLE), torch.randn(20, **DOUBLE)
    bias[[3, 7, 11]] += 50  # by far the most probable
    logits = hidden @ weight.T + bias
    logits[:, [7, 11]] = -torch.inf
    allowed = [i for i in range(20) if i != 3]
    best = torch.tensor(allowed)[logits[:, allowed].argmax(-1)]
    held = torch.isin(best, torch.tensor(deferred))
    assert not deferred or 0 < held.sum() < 60
    logits[:, deferred] = -torch.inf
    p = torch.softmax(logits, -1)
    two = p[:, allowed].topk(2, -1).values
    expected = {
        "probability": p.gather(1, best[:, None])[:, 0],
        "margin": two[:, 0] - two[:, 1],
        "entropy": -torch.special.entr(p).sum(-1),
    }
    for kind, confidence in expected.items():
        options = {"banned": (7, 11), "deferred": deferred, "confidence": kind}
        token, got, lse = reference.predict(hidden, weight, bias, mask_id=3, **options)
        assert torch.equal(token, best)
        close(got, confidence.masked_fill(held, -torch.inf))
        close(lse, torch.logsumexp(logits, -1))


def test_predict_gives_ties_to_the_lowest_id_and_nothing_to_other_positions():
    hidden, weight = torch.ones(3, 2), torch.ones(9, 2)
    candidate = torch.tensor([True, False, True])
    token, confidence, lse = reference.predict(hidden, weight, mask_id=0, candidate=candidate)
    assert token.tolist() == [1, 0, 1]
    assert confidence[1] == float("-inf") and lse[1] == 0
    close(confidence[[0, 2]], torch.full((2,), 1 / 9), 1e-6)


def test_predict_guides_with_logits_and_random_confidence_is_uniform():
    hidden, uncond, weight = torch.randn(4, 8, **DOUBLE), torch.randn(4, 8, **DOUBLE), torch.randn(20, 8, **DOUBLE)
    base, cond = uncond @ weight.T, hidden @ weight.T
    _, confidence, _ = reference.predict(hidden, weight, mask_id=0, uncond=uncond, cfg_scale=1.5)
    p = torch.softmax(base + 2.5 * (cond - base), -1)
    close(confidence, p[:, 1:].max(-1).values)
    n = torch.arange(5000)
    draw = reference.uniform(3, 0, n, n)
    assert draw.min() > 0 and draw.max() < 1 and abs(float(draw.mean()) - 0.5) < 4 / math.sqrt(12 * 5000)


def commit_by_loops(sequence, token, confidence, candidate, slot, k_of):
    sequence, chosen = sequence.clone(), torch.zeros_like(candidate)
    for b in range(len(sequence)):
        at = [t for t in range(token.shape[1]) if candidate[b, t]]
        at.sort(key=lambda t: (-float(confidence[b, t]), t))
        for t in at[: k_of(b, [float(confidence[b, t]) for t in at])]:
            chosen[b, t] = True
            sequence[b, int(slot[b]) + t] = token[b, t]
    return sequence, chosen


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(0, 10**6),
    st.sampled_from(["count", "threshold", "factor", "bound"]),
)
def test_commit_is_the_plain_loop(batch, length, seed, kind):
    g = torch.Generator().manual_seed(seed)
    sequence = torch.randint(0, 9, (batch, length + 5), generator=g)
    token = torch.randint(10, 99, (batch, length), generator=g)
    confidence = torch.randint(0, 5, (batch, length), generator=g) / 4  # many ties
    candidate = torch.rand(batch, length, generator=g) < 0.7
    slot = torch.randint(0, 6, (batch,), generator=g)
    count = torch.randint(0, length + 2, (batch,), generator=g)

    def by_factor(b, c):
        return max([1, *(k for k, x in enumerate(c, 1) if (k + 1) * (1 - x) < 1.3)])

    def by_bound(b, c):
        return max([1, *(k for k in range(1, len(c) + 1) if -sum(c[: k - 1]) <= 1.25)])

    rules = {
        "count": ({"count": count}, lambda b, c: int(count[b])),
        "threshold": ({"threshold": 0.5}, lambda b, c: max(1, sum(x >= 0.5 for x in c))),
        "factor": ({"factor": 1.3}, by_factor),
        "bound": ({"bound": 1.25}, by_bound),
    }
    rule, k_of = rules[kind]
    if kind == "bound":
        confidence = confidence - 1  # negative entropies
    expected = commit_by_loops(sequence, token, confidence, candidate, slot, k_of)
    chosen = reference.commit(sequence, token, confidence, candidate, slot, **rule)
    assert torch.equal(sequence, expected[0]) and torch.equal(chosen, expected[1])


def test_commit_always_keeps_a_candidate():
    sequence, token = torch.zeros(2, 3, dtype=torch.int64), torch.full((2, 3), 5)
    confidence = torch.tensor([[float("-inf")] * 3, [float("nan"), float("inf"), 0.1]])
    candidate = torch.tensor([[False, False, True], [True, True, False]])
    slot = torch.zeros(2, dtype=torch.int64)
    for rule in ({"threshold": 0.9}, {"factor": 1.0}, {"bound": -1.0}, {"bound": 9.0}):
        sequence.zero_()
        chosen = reference.commit(sequence, token, confidence, candidate, slot, **rule)
        assert chosen.tolist() == [[False, False, True], [True, False, False]]
        assert torch.equal(sequence, chosen * 5)
    sequence.zero_()
    assert not reference.commit(sequence, token, confidence, candidate, slot, count=slot).any() and not sequence.any()


def test_masked_loss_is_weighted_cross_entropy():
    hidden, weight, bias = torch.randn(6, 8, **DOUBLE), torch.randn(20, 8, **DOUBLE), torch.randn(20, **DOUBLE)
    target, w = torch.randint(0, 20, (6,)), torch.rand(6, **DOUBLE)
    expected = (F.cross_entropy(hidden @ weight.T + bias, target, reduction="none") * w).sum()
    close(reference.masked_loss(hidden, weight, bias, target, w), expected)


META = torch.device("meta")


@pytest.mark.parametrize("seeded", [False, True], ids=["plain-seed", "seed-on-the-device"])
@pytest.mark.parametrize("confidence", ["probability", "margin", "entropy", "random"])
def test_predict_on_any_device(confidence, seeded):
    """Intermediate tensors are on the arguments' device."""

    def on(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=META)

    rows = on(6, dtype=torch.int64)
    seed = on(1, dtype=torch.int64) if seeded else 3
    results = reference.predict(
        on(6, 16), on(50, 16), on(50), mask_id=49, candidate=on(6, dtype=torch.bool), confidence=confidence,
        temperature=0.5, seed=seed, step=on(1, dtype=torch.int64) if seeded else 0, row=rows, position=rows,
        uncond=on(6, 16), cfg_scale=1.0,
    )  # fmt: skip
    assert all(x.device == META and x.shape == (6,) for x in results)


def test_noise_on_any_device():
    rows = torch.empty(6, dtype=torch.int64, device=META)
    assert reference.gumbel(1, 2, rows, rows, torch.empty(50, dtype=torch.int64, device=META)).device == META
    assert reference.uniform(1, 2, rows, rows).device == META


def test_every_function_on_any_device(monkeypatch):
    """Each public function is called, directly or by another; a new one fails here until it is."""
    public = {name for name, x in vars(reference).items() if inspect.isfunction(x) and name[0] != "_"}
    public = {name for name in public if getattr(reference, name).__module__ == reference.__name__}
    called = set()

    def noted(name, function):
        def call(*args, **options):
            called.add(name)
            return function(*args, **options)

        return call

    for name in public:
        monkeypatch.setattr(reference, name, noted(name, getattr(reference, name)))

    def on(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=META)

    rows = on(2, dtype=torch.int64)
    q, kv = on(2, 4, 4, 8), on(2, 9, 2, 8)
    cos, sin = reference.rope_table(16, 8, 1e4, META)
    made = [
        *reference.rms_norm(on(2, 8), on(8), 1e-5, on(2, 8)),
        *reference.layer_norm(on(2, 8), on(8), on(8), 1e-5, on(2, 8)),
        reference.swiglu(on(2, 8), on(2, 8)),
        reference.geglu(on(2, 8), on(2, 8)),
        reference.linear(on(2, 8), on(4, 8), on(4), gated=True),
        reference.grouped_linear(on(4, 8), on(2, 3, 8), rows),
        reference.experts(on(4, 8), on(2, 6, 8), on(2, 8, 3), on(4, 1, dtype=torch.int64), on(4, 1)),
        *reference_rounded.round_rows(on(2, 8)),
        cos,
        sin,
        reference.attention(q, kv, kv, rows, rows, rows, window=2),
        reference.visible_slots(4, 9, rows, rows, rows, 2),
        reference.attention(q[:, :1], kv, kv, rows, rows, rows, first=on(3, dtype=torch.int64)),
        *reference.predict(on(2, 8), on(50, 8), mask_id=49, temperature=0.5, row=rows, position=rows, softcap=9.0),
        reference.guided(on(2, 8), on(2, 8), 1.0),
        reference.masked_loss(on(2, 8), on(50, 8), on(50), rows, on(2)),
    ]
    with _config.patch(meta_nonzero_assume_all_nonzero=True):  # how many rows are inside depends on values
        new = on(2, 4, 2, 8)
        made.append(reference.rope(q, new, new, cos, sin, rows, rows, kv, on(2, 9, 2, 8)))
    block, truths = on(2, 4, dtype=torch.int64), on(2, 4, dtype=torch.bool)
    for rule in ({"count": rows}, {"threshold": 0.5}, {"factor": 1.0}, {"bound": 2.0}):
        made.append(reference.commit(on(2, 9, dtype=torch.int64), block, on(2, 4), truths, rows, **rule))
    assert all(x.device == META for x in made)
    assert called == public
