"""The fused and the streamed prediction against the fp64 definition."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F

from dllm_fast.kernels import predict as kernel
from dllm_fast.kernels import reference
from dllm_fast.kernels.checks import CONFIDENCES
from dllm_fast.kernels.predict import predict

PATHS = ("fused", "streamed")
SHAPES = {  # rows, vocabulary, width
    "1row-300vocab-40wide": (1, 300, 40),
    "5rows-257vocab-64wide": (5, 257, 64),
    "19rows-130vocab-100wide": (19, 130, 100),
    "66rows-65vocab-16wide": (66, 65, 16),
    "2rows-2vocab-8wide": (2, 2, 8),
}
ULP = 2.0**-24
MASK = 1


@pytest.fixture
def poison(monkeypatch):
    """Fill tensors that kernels allocate with NaN; return a list with the largest number of elements asked for."""
    empty, largest = torch.empty, [0]

    def filled(*args, **options):
        x = empty(*args, **options)
        largest[0] = max(largest[0], x.numel())
        return x.fill_(float("nan") if x.is_floating_point() else 0x7ABCDEF1)

    monkeypatch.setattr(torch, "empty", filled)
    return largest


def problem(rows, vocabulary, width, dtype, device, seed=0):
    """hidden, weight, bias; their logits have a standard deviation of about 2."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, width), (vocabulary, width), (vocabulary,))
    hidden, weight, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    return hidden.to(device, dtype), (weight * 2 / width**0.5).to(device, dtype), bias.to(device, dtype)


def double(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def noise_key(rows, device, step=3):
    position = torch.arange(rows, device=device) * 3 + 10
    return {"seed": (1 << 63) + 7, "step": step, "row": torch.arange(rows, device=device) % 4, "position": position}


def definition(hidden, weight, bias=None, **options):
    return reference.predict(
        double(hidden), double(weight), double(bias), **{name: double(x) for name, x in options.items()}
    )


def eager(hidden, weight, bias=None, uncond=None, cfg_scale=0.0, **options):
    """PyTorch's result, with logits in the model's dtype and everything after them in fp32."""
    logits = F.linear(hidden, weight, bias)
    if uncond is not None:
        base = F.linear(uncond, weight, bias)
        logits = base + (cfg_scale + 1) * (logits - base)
    return reference.select(logits.float(), **options)


def assert_matches(hidden, weight, bias=None, path="fused", **options):
    """Tokens equal; confidence and log-sum-exp at most twice as far from the truth as eager's, or 8 ulp of the logits.

    The last digits of logits, which are fp32 sums, are random: eager's error in a few rows may happen to be tiny.
    """
    result = predict(hidden, weight, bias, _path=path, **options)
    truth = definition(hidden, weight, bias, **options)
    rough = eager(hidden, weight, bias, **options)
    assert [x.dtype for x in result] == [torch.int64, torch.float32, torch.float32]
    assert torch.equal(result[0], truth[0])
    scale = truth[2].abs().max().clamp(1, 64)  # of the logits, unless a single huge one sets it
    for ours, theirs, exact in zip(result[1:], rough[1:], truth[1:], strict=True):
        finite = exact.isfinite()
        assert torch.equal(ours[~finite].double(), exact[~finite])
        if finite.any():
            error, allowed = (ours - exact)[finite].abs().max(), (theirs - exact)[finite].abs().max()
            assert error <= 2 * allowed + 8 * ULP * scale
    return result


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("path", PATHS)
def test_matches_definition(shape, path, device, poison):
    hidden, weight, bias = problem(*shape, torch.bfloat16, device)
    for confidence in CONFIDENCES if shape[0] < 60 else CONFIDENCES[:1]:  # only this one uses the widest group
        options = {"mask_id": MASK, "confidence": confidence, **noise_key(shape[0], device)}
        assert_matches(hidden, weight, None if confidence == "margin" else bias, path, **options)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=("fp32", "fp16"))
@pytest.mark.parametrize("path", PATHS)
def test_other_dtypes(dtype, path, device, poison):
    for rows, confidence in ((5, "margin"), (17, "entropy")):  # fp32 takes two groups for the latter
        hidden, weight, bias = problem(rows, 257, 100, dtype, device)
        assert_matches(hidden, weight, bias, path, mask_id=MASK, confidence=confidence)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("chosen", ("none", "one", "some", "all"))
def test_candidates(path, chosen, device, poison):
    hidden, weight, bias = problem(21, 150, 24, torch.bfloat16, device)
    candidate = torch.zeros(21, dtype=torch.bool, device=device)
    candidate[{"none": [], "one": [18], "some": [0, 3, 4, 17, 20], "all": list(range(21))}[chosen]] = True
    options = {"mask_id": MASK, "candidate": candidate}
    for confidence in ("probability", "entropy"):
        token, score, lse = assert_matches(hidden, weight, bias, path, **options, confidence=confidence)
        assert (token[~candidate] == MASK).all() and (score[~candidate] == -torch.inf).all()
        assert (lse[~candidate] == 0).all()
    noise = {**noise_key(21, device), "temperature": 0.7, "confidence": "random"}
    assert_matches(hidden, weight, bias, path, **options, **noise)


@pytest.mark.parametrize("path", PATHS)
def test_many_tiles_splits_and_chunks(path, device, monkeypatch, poison):
    monkeypatch.setattr(kernel, "CHUNK_ELEMENTS", 1)  # a tile at a time
    hidden, weight, bias = problem(3, 2 * 2048 + 77 if path == "streamed" else 9 * 64 + 5, 8, torch.float32, device)
    for confidence in ("probability", "margin", "entropy"):
        options = {"mask_id": MASK, "confidence": confidence, "temperature": 0.5, **noise_key(3, device)}
        assert_matches(hidden, weight, bias, path, **options)


@pytest.mark.parametrize("path", PATHS)
def test_ties_go_to_the_lowest_id(path, device):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randint(1, 4, (4, 16), generator=generator).to(device, torch.bfloat16)
    twins = {  # in one tile, in several, in several chunks
        "fused": [2, 9, 70, 127, 128, 300],
        "streamed": [2, 9, 128, 2047, 2048, 4190],
    }[path]
    weight = torch.randint(-2, 2, (twins[-1] + 6, 16), generator=generator).to(device, torch.bfloat16)
    weight[twins] = 2.0  # larger than all others, and exact
    for lowest in (0, 2, 4):
        options = {"mask_id": 0, "banned": tuple(twins[:lowest]), "confidence": "margin"}
        token, score, _ = predict(hidden, weight, **options, _path=path)
        assert (token == twins[lowest]).all() and (score == 0).all()
    token, score, _ = predict(hidden, weight, mask_id=0, banned=tuple(twins[:-1]), confidence="margin", _path=path)
    assert (token == twins[-1]).all() and (score > 0).all()


@pytest.mark.parametrize("path", PATHS)
def test_extreme_logits(path, device, poison):
    # Multiples of 1/16, which fp32 adds to 1e4 exactly, so fp32 and the definition choose the same tokens.
    hidden, weight = ((x * 4).round() / 4 for x in problem(3, 200, 16, torch.float32, device)[:2])
    biases = {
        "huge": torch.randn(200) * 1e30,
        "all huge, close": torch.full((200,), 1e4),
        "tiny": torch.randn(200) * 1e-30,
        "minus infinity": torch.where(torch.arange(200) % 3 == 0, 0.0, -torch.inf),
        "one tile minus infinity": torch.where(torch.arange(200) < 130, -torch.inf, 0.0),
        "both ends": torch.where(torch.arange(200) == 150, 3e38, -3e38),
    }
    for bias in biases.values():
        for confidence in ("probability", "margin", "entropy"):
            result = assert_matches(hidden, weight, bias.to(device), path, mask_id=MASK, confidence=confidence)
            assert not any(x.isnan().any() for x in result)


@pytest.mark.parametrize("path", PATHS)
def test_two_admissible_tokens(path, device, poison):
    hidden, weight, bias = problem(3, 150, 16, torch.float32, device)
    banned = tuple(i for i in range(150) if i not in (3, 140, MASK))
    for temperature in (0.0, 2.0):
        options = {"mask_id": MASK, "banned": banned, "confidence": "margin", **noise_key(3, device)}
        token, score, _ = assert_matches(hidden, weight, bias, path, **options, temperature=temperature)
        assert set(token.tolist()) <= {3, 140} and (score >= 0).all()


@pytest.mark.parametrize("path", PATHS)
def test_banned_and_deferred_ids(path, device, poison):
    """At temperature 0 and 1, as ranges and as single ids, at a tile's edges: each is among the best of some row."""
    hidden, weight, bias = problem(18, 2100 if path == "streamed" else 260, 16, torch.float32, device)
    best = definition(hidden, weight, bias, mask_id=MASK)[0].tolist()
    sets = {"banned": (best[0], 0, 127, 128, 129), "deferred": (*best[1:9], 64, 65, len(weight) - 1)}
    for confidence in CONFIDENCES:
        for temperature in (0.0, 1.0) if confidence in ("probability", "margin") else (1.0,):
            options = {"mask_id": MASK, "confidence": confidence, "temperature": temperature, **noise_key(18, device)}
            for given in (("banned",), ("deferred",), ("banned", "deferred")):
                chosen = {name: sets[name] for name in given}
                token, score, _ = assert_matches(hidden, weight, bias, path, **options, **chosen)
                held = torch.isin(token, torch.tensor(chosen.get("deferred", ()), device=device))
                assert torch.equal(score == -torch.inf, held) and held.any() == ("deferred" in given)
                assert not set(token.tolist()) & {MASK, *chosen.get("banned", ())}


@pytest.mark.parametrize("path", PATHS)
def test_every_token_may_be_deferred(path, device, poison):
    hidden, weight, bias = problem(3, 150, 16, torch.float32, device)
    for deferred in (tuple(i for i in range(150) if i != MASK), tuple(range(1, 150))):
        token, score, lse = assert_matches(hidden, weight, bias, path, mask_id=MASK, deferred=deferred)
        assert (score[token != 0] == -torch.inf).all() and lse.isfinite().all()


@pytest.mark.parametrize("path", PATHS)
def test_noise_is_the_definitions(path, device, poison):
    hidden, weight, bias = problem(18, 333, 16, torch.bfloat16, device)
    options = {"mask_id": MASK, "temperature": 1.5, "confidence": "probability"}
    token, _, _ = assert_matches(hidden, weight, bias, path, **options, **noise_key(18, device))
    later = {**noise_key(18, device), "step": torch.tensor([4], device=device)}
    assert not torch.equal(token, assert_matches(hidden, weight, bias, path, **options, **later)[0])
    each = {**noise_key(18, device), "step": torch.arange(18, device=device) // 2}
    assert_matches(hidden, weight, bias, path, **options, **each)
    assert_matches(hidden, weight, bias, path, **options | {"confidence": "random"}, **each)
    # A row alone, at another index in a tile of another size, draws the same.
    alone = {
        name: x[7:8].contiguous() if isinstance(x, torch.Tensor) else x for name, x in noise_key(18, device).items()
    }
    assert predict(hidden[7:8], weight, bias, **options, **alone, _path=path)[0] == token[7]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
def test_guidance(path, dtype, device, poison):
    hidden, weight, bias = problem(5, 260, 40, dtype, device)
    uncond = problem(5, 1, 40, dtype, device, seed=5)[0]
    for scale, confidence in ((0.0, "probability"), (1.5, "margin"), (4.0, "entropy")):
        options = {"mask_id": MASK, "uncond": uncond, "cfg_scale": scale, "confidence": confidence}
        assert_matches(hidden, weight, bias, path, **options)
    options |= {"temperature": 1.0, "candidate": torch.tensor([1, 0, 1, 1, 0], device=device).bool()}
    assert_matches(hidden, weight, bias, path, **options, **noise_key(5, device))
    assert torch.equal(
        predict(hidden, weight, bias, mask_id=MASK, uncond=uncond, cfg_scale=-1.0, _path=path)[0],
        predict(uncond, weight, bias, mask_id=MASK, _path=path)[0],
    )


def test_paths_agree(device, poison):
    hidden, weight, bias = problem(3, 2100, 24, torch.bfloat16, device)
    for confidence in ("margin", "entropy"):
        options = {"mask_id": MASK, "confidence": confidence, "temperature": 0.3, **noise_key(3, device)}
        fused, streamed = (predict(hidden, weight, bias, **options, _path=path) for path in PATHS)
        assert torch.equal(fused[0], streamed[0])
        for a, b in zip(fused[1:], streamed[1:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_sampler_chi_squared(device):
    rows, vocabulary = 640, 8
    hidden, weight, bias = problem(1, vocabulary, 8, torch.float32, device)
    logits = (hidden @ weight.T + bias).double()[0]
    logits[MASK] = -torch.inf
    key = {"seed": 29, "step": 1, "row": torch.zeros(rows, dtype=torch.int64, device=device)}
    key["position"] = torch.arange(rows, device=device)
    # bf16's widest groups save time in the interpreter; products of these integers are exact in bf16.
    same = torch.zeros(rows, 8, dtype=torch.bfloat16, device=device)
    zero = torch.zeros(vocabulary, 8, dtype=torch.bfloat16, device=device)
    token, _, _ = predict(same, zero, logits.float(), mask_id=MASK, temperature=0.8, _path="fused", **key)
    expected = torch.softmax(logits / 0.8, 0) * rows
    observed = torch.bincount(token, minlength=vocabulary).double()
    admissible = torch.arange(vocabulary, device=device) != MASK
    assert observed[MASK] == 0
    statistic = ((observed - expected).square() / expected)[admissible].sum()
    assert statistic < 16.81  # 6 degrees of freedom, 1 %


def test_no_logits_in_memory(device, poison, monkeypatch):
    hidden, weight, bias = problem(9, 3000, 8, torch.bfloat16, device)
    predict(hidden, weight, bias, mask_id=MASK, _path="fused")
    assert poison[0] * 16 <= 9 * 3000
    monkeypatch.setattr(kernel, "CHUNK_ELEMENTS", 1)
    chunks = []
    product = kernel._logits
    monkeypatch.setattr(kernel, "_logits", lambda *a: chunks.append(product(*a)) or chunks[-1])
    predict(hidden, weight, bias, mask_id=MASK, _path="streamed")
    assert [x.shape[1] for x in chunks] == [2048, 952]


def test_crossover_chooses_the_path(device, monkeypatch):
    calls = []
    monkeypatch.setattr(kernel, "select", lambda *a: calls.append(a))
    hidden, weight, _ = problem(4, 40, 8, torch.bfloat16, device)
    monkeypatch.setitem(kernel.CROSSOVER, 2, 3)
    predict(hidden[:3], weight, mask_id=MASK)
    assert not calls
    predict(hidden, weight, mask_id=MASK)
    assert calls


def test_no_rows(device):
    hidden, weight, _ = problem(0, 40, 8, torch.bfloat16, device)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    for path in PATHS:
        result = predict(hidden, weight, mask_id=MASK, temperature=1.0, row=none, position=none, _path=path)
        assert [tuple(x.shape) for x in result] == [(0,)] * 3


@hypothesis.settings(max_examples=8, deadline=None, derandomize=True)
@hypothesis.given(
    rows=st.integers(1, 20), vocabulary=st.integers(3, 140), width=st.integers(1, 70), seed=st.integers(0, 99),
    confidence=st.sampled_from(CONFIDENCES), path=st.sampled_from(PATHS), temperature=st.sampled_from((0.0, 0.9)),
)  # fmt: skip
def test_any_shape(rows, vocabulary, width, seed, confidence, path, temperature):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hidden, weight, bias = problem(rows, vocabulary, width, torch.bfloat16, device, seed)
    generator = torch.Generator().manual_seed(seed)
    candidate = (torch.rand(rows, generator=generator) < 0.6).to(device)
    options = {"mask_id": seed % vocabulary, "candidate": candidate, "confidence": confidence}
    assert_matches(hidden, weight, bias, path, **options, temperature=temperature, **noise_key(rows, device))


def test_bad_arguments(device):
    hidden, weight, bias = problem(4, 40, 8, torch.bfloat16, device)
    row = torch.arange(4, device=device)
    for message, (arguments, options) in {
        "hidden is": ((hidden[0], weight), {}),
        "weight is torch.float32": ((hidden, weight.float()), {}),
        r"weight is torch.bfloat16 \[40, 7\]": ((hidden, weight[:, :7]), {}),
        "weight is torch.float8_e4m3fn": ((hidden, weight.to(torch.float8_e4m3fn)), {}),
        "weight is torch.bfloat16 .*expected torch.float8_e4m3fn": ((hidden, weight, None, bias.float()), {}),
        r"scale is torch.bfloat16 \[40\]": ((hidden, weight.to(torch.float8_e4m3fn), None, bias), {}),
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
        "seed is": ((hidden, weight), {"temperature": 1.0, "row": row, "position": row, "seed": row[1:]}),
        "seed is torch.int32": ((hidden, weight), {"temperature": 1.0, "row": row, "position": row, "seed": row.int()}),
        "_path='cublas'": ((hidden, weight), {"_path": "cublas"}),
    }.items():
        with pytest.raises(ValueError, match=message):
            predict(*arguments, **{"mask_id": MASK, **options})


def test_custom_op(device):
    hidden, weight, bias = problem(4, 40, 8, torch.bfloat16, device)
    row = torch.arange(4, device=device)
    one = torch.tensor([1], device=device)
    for path, optional in (("fused", (bias, row < 2, hidden + 1)), ("streamed", (None, None, None))):
        arguments = (
            hidden,
            weight,
            *optional,
            None,
            row + 2,
            row + 1,
            row,
            row,
            MASK,
            [3, 5],
            [7, 8],
            "margin",
            0.5,
            2.0,
            0.0,
            path,
        )
        torch.library.opcheck(kernel._predict, arguments)

    def step(hidden, number):
        options = {
            "temperature": 1.0,
            "seed": 3,
            "step": number,
            "row": row,
            "position": row,
            "banned": (7, 8),
            "deferred": (9,),
        }
        return predict(hidden * 2, weight, bias, mask_id=MASK, **options)

    expected = step(hidden, one)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(hidden, one), expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(compiled(hidden, 1), expected, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 5 GB of GPU memory")
def test_more_than_2_31_elements(device):
    vocabulary, width = (1 << 20) + 3, 2056
    weight = torch.zeros(vocabulary, width, dtype=torch.bfloat16, device=device)
    weight[-2] = 1.0
    hidden = torch.ones(2, width, dtype=torch.bfloat16, device=device)
    for path in PATHS:
        token, _, lse = predict(hidden, weight, mask_id=MASK, _path=path)
        assert (token == vocabulary - 2).all() and (lse == width).all()
