"""Prediction and matmuls of the compiled extension, on every instruction set that this CPU has, against fp64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dllm_fast import ops
from dllm_fast.cpu import compiled
from dllm_fast.kernels import reference

BF16, FP32 = torch.bfloat16, torch.float32
ULP, MASK = 2.0**-24, 1

pytestmark = [
    pytest.mark.skipif(bool(compiled.missing()), reason=str(compiled.missing())),
    pytest.mark.usefixtures("poisoned_outputs"),
]
every_level = pytest.mark.parametrize("level", () if compiled.missing() else compiled.levels())
both_dtypes = pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)

SHAPES = {  # rows, vocabulary, width
    "1row-300vocab-40wide": (1, 300, 40),
    "5rows-257vocab-64wide": (5, 257, 64),
    "16rows-600vocab-32wide": (16, 600, 32),
    "19rows-130vocab-101wide": (19, 130, 101),
    "50rows-65vocab-16wide": (50, 65, 16),
    "100rows-1100vocab-7wide": (100, 1100, 7),
    "2rows-2vocab-8wide": (2, 2, 8),
    "3rows-77vocab-1031wide": (3, 77, 1031),
}


def problem(rows, vocabulary, width, dtype, seed=0):
    """hidden, weight, bias; their logits have a standard deviation of about 2."""
    make = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(s, generator=make) for s in ((rows, width), (vocabulary, width), (vocabulary,)))
    return hidden.to(dtype), (weight * 2 / width**0.5).to(dtype), bias.to(dtype)


def noise_key(rows, step=3):
    position = torch.arange(rows) * 3 + 10
    return {"seed": (1 << 63) + 7, "step": step, "row": torch.arange(rows) % 4, "position": position}


def double(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def definition(hidden, weight, bias=None, **options):
    return reference.predict(*map(double, (hidden, weight, bias)), **{name: double(x) for name, x in options.items()})


def eager(hidden, weight, bias=None, uncond=None, cfg_scale=0.0, **options):
    """PyTorch's result, with logits in the model's dtype and everything after them in fp32."""
    logits = F.linear(hidden, weight, bias)
    if uncond is not None:
        base = F.linear(uncond, weight, bias)
        logits = base + (cfg_scale + 1) * (logits - base)
    return reference.select(logits.float(), **options)


def assert_matches(hidden, weight, bias=None, **options):
    """Tokens equal; confidence and log-sum-exp at most twice as far from the truth as eager's, or 8 ulp of the logits.

    The last digits of logits, which are fp32 sums, are random: eager's error in a few rows may happen to be tiny.
    """
    result = compiled.predict(hidden, weight, bias, **options)
    truth = definition(hidden, weight, bias, **options)
    rough = eager(hidden, weight, bias, **options)
    assert [x.dtype for x in result] == [torch.int64, FP32, FP32]
    assert torch.equal(result[0], truth[0])
    scale = truth[2].abs().max().clamp(1, 64)  # of the logits, unless a single huge one sets it
    for ours, theirs, exact in zip(result[1:], rough[1:], truth[1:], strict=True):
        finite = exact.isfinite()
        assert torch.equal(ours[~finite].double(), exact[~finite])
        if finite.any():
            error, allowed = (ours - exact)[finite].abs().max(), (theirs - exact)[finite].abs().max()
            assert error <= 2 * allowed + 8 * ULP * scale
    return result


@every_level
@both_dtypes
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_predict(shape, dtype, level, use):
    use(level)
    hidden, weight, bias = problem(*shape, dtype)
    for confidence in compiled.CONFIDENCES:
        options = {"mask_id": MASK, "confidence": confidence, **noise_key(shape[0])}
        assert_matches(hidden, weight, None if confidence == "margin" else bias, **options)


@every_level
@pytest.mark.parametrize("chosen", ("none", "one", "some", "all"))
def test_candidates(chosen, level, use):
    use(level)
    hidden, weight, _ = problem(60, 150, 24, BF16)
    candidate = torch.zeros(60, dtype=torch.bool)
    candidate[{"none": [], "one": [58], "some": [0, 3, 4, 17, 59], "all": list(range(60))}[chosen]] = True
    options = {"mask_id": MASK, "candidate": candidate}
    for confidence in ("probability", "entropy"):
        token, score, lse = assert_matches(hidden, weight, **options, confidence=confidence)
        assert (token[~candidate] == MASK).all() and (score[~candidate] == -torch.inf).all()
        assert (lse[~candidate] == 0).all()
    assert_matches(hidden, weight, **options, **noise_key(60), temperature=0.7, confidence="random")


@every_level
def test_ties_go_to_the_lowest_id(level, use):
    use(level)
    hidden = torch.randint(1, 4, (4, 16), generator=torch.Generator().manual_seed(1)).bfloat16()
    twins = [2, 9, 63, 64, 70, 511, 512, 1300]  # in one stretch of ids, in several, in several tasks
    weight = torch.randint(-2, 2, (twins[-1] + 6, 16), generator=torch.Generator().manual_seed(2)).bfloat16()
    weight[twins] = 2.0  # larger than all others, and exact
    for lowest in range(len(twins) - 1):
        options = {"mask_id": 0, "banned": tuple(twins[:lowest]), "confidence": "margin"}
        token, score, _ = compiled.predict(hidden, weight, **options)
        assert (token == twins[lowest]).all() and (score == 0).all()
    token, score, _ = compiled.predict(hidden, weight, mask_id=0, banned=tuple(twins[:-1]), confidence="margin")
    assert (token == twins[-1]).all() and (score > 0).all()


@every_level
def test_extreme_logits(level, use):
    use(level)
    # Multiples of 1/16, which fp32 adds to 1e4 exactly, so fp32 and the definition choose the same tokens.
    hidden, weight = ((x * 4).round() / 4 for x in problem(3, 700, 16, FP32)[:2])
    at = torch.arange(700)
    biases = {
        "huge": torch.randn(700, generator=torch.Generator().manual_seed(3)) * 1e30,
        "all huge, close": torch.full((700,), 1e4),
        "tiny": torch.randn(700, generator=torch.Generator().manual_seed(4)) * 1e-30,
        "minus infinity": torch.where(at % 3 == 0, 0.0, -torch.inf),
        "a task of minus infinity": torch.where(at < 530, -torch.inf, 0.0),
        "both ends": torch.where(at == 650, 3e38, -3e38),
    }
    for bias in biases.values():
        for confidence in ("probability", "margin", "entropy"):
            result = assert_matches(hidden, weight, bias, mask_id=MASK, confidence=confidence)
            assert not any(x.isnan().any() for x in result)


@every_level
def test_two_admissible_tokens(level, use):
    use(level)
    hidden, weight, bias = problem(3, 600, 16, FP32)
    banned = tuple(i for i in range(600) if i not in (3, 540, MASK))
    for temperature in (0.0, 2.0):
        options = {"mask_id": MASK, "banned": banned, "confidence": "margin", **noise_key(3)}
        token, score, _ = assert_matches(hidden, weight, bias, **options, temperature=temperature)
        assert set(token.tolist()) <= {3, 540} and (score >= 0).all()


@every_level
@both_dtypes
def test_banned_and_deferred_ids(dtype, level, use):
    """At temperature 0 and 1, guided or not, in ranges and alone, at the edges of stretches and tasks."""
    use(level)
    hidden, weight, bias = problem(19, 600, 16, dtype)
    guided = {"uncond": problem(19, 1, 16, dtype, seed=5)[0], "cfg_scale": 1.5}
    best = definition(hidden, weight, bias, mask_id=MASK)[0].tolist()
    sets = {"banned": (best[0], 0, 63, 64, 65), "deferred": (*best[1:9], 66, 511, 512, 599)}
    for confidence in compiled.CONFIDENCES:
        for more in ({}, {"temperature": 1.0}, guided):
            options = {"mask_id": MASK, "confidence": confidence, **noise_key(19), **more}
            for names in (("banned",), ("deferred",), ("banned", "deferred")):
                chosen = {name: sets[name] for name in names}
                token, score, _ = assert_matches(hidden, weight, bias, **options, **chosen)
                assert torch.equal(score == -torch.inf, torch.isin(token, torch.tensor(chosen.get("deferred", ()))))
                assert not set(token.tolist()) & {MASK, *chosen.get("banned", ())}


@every_level
def test_every_token_may_be_deferred(level, use):
    use(level)
    hidden, weight, bias = problem(3, 600, 16, FP32)
    for deferred in (tuple(i for i in range(600) if i != MASK), tuple(range(1, 600))):
        token, score, lse = assert_matches(hidden, weight, bias, mask_id=MASK, deferred=deferred)
        assert (score[token != 0] == -torch.inf).all() and lse.isfinite().all()


@every_level
def test_noise_is_the_definitions(level, use):
    use(level)
    hidden, weight, bias = problem(50, 1333, 16, BF16)
    options = {"mask_id": MASK, "temperature": 1.5}
    token, _, _ = assert_matches(hidden, weight, bias, **options, **noise_key(50))
    later = {**noise_key(50), "step": torch.tensor([4])}
    assert not torch.equal(token, assert_matches(hidden, weight, bias, **options, **later)[0])
    # A row alone, in another SIMD lane, draws the same.
    alone = {name: x[7:8] if isinstance(x, torch.Tensor) else x for name, x in noise_key(50).items()}
    assert compiled.predict(hidden[7:8], weight, bias, **options, **alone)[0] == token[7]


@every_level
@pytest.mark.parametrize("position", [7070, 12404, 32832])
def test_noise_in_its_tails(position, level, use):
    """Rows whose largest draws are 21.0, 17.7 and 19.8, beyond 24-bit uniforms, which must beat their smallest."""
    use(level)
    key = {"seed": 7, "step": 0, "row": torch.zeros(1, dtype=torch.int64), "position": torch.tensor([position])}
    noise = reference.gumbel(*key.values(), torch.arange(2048))[0]
    high, low = noise.argmax().item(), noise.argmin().item()
    assert noise[high] > 17 and noise[low] < -1.5
    for nudge, winner in ((3e-5, low), (-3e-5, high)):
        bias = torch.zeros(2048)
        bias[low] = noise[high] - noise[low] + nudge
        options = {"mask_id": MASK, "temperature": 1.0, **key}
        assert compiled.predict(torch.zeros(1, 8), torch.zeros(2048, 8), bias, **options)[0] == winner


@every_level
@both_dtypes
def test_guidance(dtype, level, use):
    use(level)
    for rows in (1, 3, 40):
        hidden, weight, bias = problem(rows, 260, 40, dtype)
        uncond = problem(rows, 1, 40, dtype, seed=5)[0]
        for scale, confidence in ((0.0, "probability"), (1.5, "margin"), (4.0, "entropy")):
            options = {"mask_id": MASK, "uncond": uncond, "cfg_scale": scale, "confidence": confidence}
            assert_matches(hidden, weight, bias, **options)
        options |= {"temperature": 1.0, "candidate": torch.arange(rows) % 3 != 1}
        assert_matches(hidden, weight, bias, **options, **noise_key(rows))


def test_sampler_chi_squared():
    rows, vocabulary = 4000, 8
    logits = problem(1, vocabulary, 8, FP32)[2]
    key = {"seed": 29, "step": 1, "row": torch.zeros(rows, dtype=torch.int64), "position": torch.arange(rows)}
    zero = torch.zeros(rows, 8), torch.zeros(vocabulary, 8)
    token, _, _ = compiled.predict(*zero, logits, mask_id=MASK, temperature=0.8, **key)
    admissible = torch.arange(vocabulary) != MASK
    expected = torch.softmax(logits.double().where(admissible, -torch.inf) / 0.8, 0) * rows
    observed = torch.bincount(token, minlength=vocabulary).double()
    assert observed[MASK] == 0
    assert ((observed - expected).square() / expected)[admissible].sum() < 16.81  # 6 degrees of freedom, 1 %


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 60), vocabulary=st.integers(3, 700), width=st.integers(1, 70), seed=st.integers(0, 99),
    confidence=st.sampled_from(compiled.CONFIDENCES), temperature=st.sampled_from((0.0, 0.9)), data=st.data(),
)  # fmt: skip
def test_any_prediction(rows, vocabulary, width, seed, confidence, temperature, data, use):
    use(data.draw(st.sampled_from(compiled.levels())))
    hidden, weight, bias = problem(rows, vocabulary, width, BF16, seed)
    candidate = torch.rand(rows, generator=torch.Generator().manual_seed(seed)) < 0.6
    options = {"mask_id": seed % vocabulary, "candidate": candidate, "confidence": confidence}
    assert_matches(hidden, weight, bias, **options, temperature=temperature, **noise_key(rows))


# Matmuls


def check_linear(x, weight, bias=None):
    truth = F.linear(*map(double, (x, weight, bias)))
    out, plain = compiled.linear(x, weight, bias), F.linear(x, weight, bias)
    assert out.shape == plain.shape and out.dtype == plain.dtype and out.is_contiguous() and out.isfinite().all()
    error, allowed = ((y.double() - truth).abs().max() for y in (out, plain))
    assert error <= max(2 * allowed, 2 * torch.finfo(out.dtype).eps * truth.abs().max())


@every_level
@both_dtypes
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_linear(shape, dtype, level, use):
    use(level)
    x, weight, bias = problem(*shape, dtype)
    check_linear(x, weight)
    check_linear(x, weight, bias)


@every_level
@both_dtypes
def test_linear_over_long_rows(dtype, level, use):
    """More inputs than one partial sum; rows of W 4096 bytes apart; x and W as parts of larger tensors."""
    use(level)
    for rows, inputs in ((3, 5000), (50, 2500), (16, 4096 // dtype.itemsize), (2, 1)):
        x, weight, _ = problem(rows, 70, inputs + 3, dtype)
        check_linear(x[:, 2:-1], weight[:, 1:-2])
        check_linear(x[:, :-3].contiguous(), weight[:, :-3].contiguous())
        check_linear(x[:, 2:-1].unflatten(0, (1, rows)).expand(2, -1, -1), weight[5:, 1:-2])


@every_level
@both_dtypes
@pytest.mark.parametrize("width", [1, 2, 31, 250, 1000, 1152, 5001])
def test_a_row_does_not_depend_on_its_neighbours(width, dtype, level, use):
    """Nor on the number of rows: a separate function for few rows sums in the same order."""
    use(level)
    hidden, weight, bias = problem(70, 141, width, dtype)
    weight = F.pad(weight, (2, 3), value=torch.nan)[:, 2:-3]  # memory beside a row is not part of it
    linear = compiled.linear(hidden, weight, bias)
    for guided in (None, hidden.flip(0)):
        options = {"mask_id": MASK, "confidence": "entropy", "cfg_scale": 1.5}
        whole = compiled.predict(hidden, weight, bias, uncond=guided, **options)
        for rows in (*(slice(3, 3 + n) for n in range(1, 9)), slice(40, 60), slice(60, 63)):
            assert torch.equal(compiled.linear(hidden[rows], weight, bias), linear[rows])
            beside = None if guided is None else guided[rows]
            some = compiled.predict(hidden[rows], weight, bias, uncond=beside, **options)
            assert all(torch.equal(a, b[rows]) for a, b in zip(some, whole, strict=True))


def test_threads_change_nothing():
    hidden, weight, bias = problem(70, 2000, 100, BF16)
    options = {"mask_id": MASK, "confidence": "entropy", "temperature": 0.8, "uncond": hidden.flip(0), "cfg_scale": 1.0}
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            predicted = compiled.predict(hidden, weight, bias, **options, **noise_key(70))
            results.append((*(compiled.linear(x, weight, bias) for x in (hidden, hidden[:3])), *predicted))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_ops_predict_takes_expanded_rows():
    """As the engine passes it for a batch of one: a row number with stride 0."""
    hidden, weight, bias = problem(4, 40, 8, FP32)
    row = torch.tensor([2]).expand(4)
    options = {"mask_id": MASK, "temperature": 0.7, "seed": 3, "row": row, "position": torch.arange(4)}
    ours, plain = (ops.predict(hidden, weight, bias, impl=impl, **options) for impl in ("cpp", "torch"))
    assert torch.equal(ours[0], plain[0])
    torch.testing.assert_close(ours[1], plain[1])


def test_nothing_to_do():
    hidden, weight, _ = problem(4, 40, 8, BF16)
    none = torch.zeros(0, dtype=torch.int64)
    result = compiled.predict(hidden[:0], weight, mask_id=MASK, temperature=1.0, row=none, position=none)
    assert [tuple(x.shape) for x in result] == [(0,)] * 3
    assert compiled.linear(hidden[:0], weight).shape == (0, 40)
    assert compiled.linear(hidden, weight[:0]).shape == (4, 0)
    assert (compiled.linear(hidden[:, :0], weight[:, :0]) == 0).all()


def test_bad_arguments():
    hidden, weight, bias = problem(4, 40, 8, BF16)
    row = torch.arange(4)
    for message, (arguments, options) in {
        r"hidden is torch.bfloat16 \[8\]": ((hidden[0], weight), {}),
        "weight is torch.float32": ((hidden, weight.float()), {}),
        r"weight is torch.bfloat16 \[40, 7\]": ((hidden, weight[:, :7]), {}),
        "hidden is torch.bfloat16 .* strides": ((hidden.T.contiguous().T, weight), {}),
        "hidden is torch.float64": ((hidden.double(), weight.double()), {}),
        r"bias is torch.bfloat16 \[39\]": ((hidden, weight, bias[1:]), {}),
        "candidate is torch.int64": ((hidden, weight), {"candidate": row}),
        "uncond is": ((hidden, weight), {"uncond": hidden[:3]}),
        "confidence='best'": ((hidden, weight), {"confidence": "best"}),
        "temperature=-1": ((hidden, weight), {"temperature": -1}),
        "temperature=nan": ((hidden, weight), {"temperature": float("nan")}),
        "mask_id=40": ((hidden, weight), {"mask_id": 40}),
        r"banned=\(-1,\)": ((hidden, weight), {"banned": (-1,)}),
        r"deferred=\(40,\)": ((hidden, weight), {"deferred": (40,)}),
        "all of, the vocabulary of 40": ((hidden, weight), {"banned": tuple(range(40))}),
        "row and position are needed for temperature": ((hidden, weight), {"temperature": 1.0, "row": row}),
        "row and position are needed .*random": ((hidden, weight), {"confidence": "random"}),
        "position is": ((hidden, weight), {"confidence": "random", "row": row, "position": row[:3]}),
        "seed=": ((hidden, weight), {"temperature": 1.0, "row": row, "position": row, "seed": 1 << 64}),
        "step is": ((hidden, weight), {"temperature": 1.0, "row": row, "position": row, "step": row[1:]}),
    }.items():
        with pytest.raises(ValueError, match=message):
            compiled.predict(*arguments, **{"mask_id": MASK, **options})
    for message, arguments in {
        r"x is torch.bfloat16 \[4, 7\]": (hidden[:, 1:], weight),
        "x is torch.float32": (hidden.float(), weight),
        "weight is torch.float16": (hidden.half(), weight.half()),
        "weight is torch.bfloat16 .* strides": (hidden, weight.T.contiguous().T),
        r"bias is torch.bfloat16 \[39\]": (hidden, weight, bias[1:]),
    }.items():
        with pytest.raises(ValueError, match=message):
            compiled.linear(*arguments)


def test_custom_ops():
    hidden, weight, bias = problem(4, 40, 8, BF16)
    row = torch.arange(4)
    one, choice = torch.tensor([1]), ("margin", 0.5, 2.0, 9.0)
    for optional in ((bias, row < 2, hidden + 1), (None, None, None)):
        arguments = (hidden, weight, *optional, row + 2, row + 1, row, row, MASK, [3, 5], [7, 8], *choice)
        torch.library.opcheck(torch.ops.dllm_fast.cpu_predict, arguments)
    torch.library.opcheck(torch.ops.dllm_fast.cpu_linear, (hidden, weight, bias))

    def step(hidden, number):
        options = {"temperature": 1.0, "seed": 3, "step": number, "row": row, "position": row}
        options |= {"banned": (7, 8), "deferred": (9,)}
        return compiled.predict(compiled.linear(hidden, weight[:8]), weight, bias, mask_id=MASK, **options)

    expected = step(hidden, one)
    whole = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(whole(hidden, one), expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(whole(hidden, 1), expected, strict=True))
