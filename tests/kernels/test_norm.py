import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from truth import INSTRUCTIONS, ROUNDED, assert_as_exact, assert_within, far_apart

from dllm_fast.kernels import reference
from dllm_fast.kernels.norm import layer_norm, rms_norm

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EPS = 1e-5
KINDS = ("rms_norm", "layer_norm", "layer_norm_bias")

SHAPES = {
    "one": (1, 1),
    "row": (1, 1, 4096),
    "narrow-several-rows-a-program": (2, 9, 40),
    "odd": (3, 5, 769),
    "modernbert": (2, 3, 768),
    "longest": (2, 16384),
    "just-past-a-power": (4, 1025),
}


def inputs(shape, dtype, device, residual, seed=0, weight_dtype=None):
    make = torch.Generator().manual_seed(seed)
    d = shape[-1]
    x, r = (torch.randn(shape, generator=make).mul(3).add(1).to(dtype).to(device) for _ in range(2))
    weight, bias = (torch.randn(d, generator=make).to(weight_dtype or dtype).to(device) for _ in range(2))
    return x, weight, bias, r if residual else None


def call(kind, where, x, weight, bias, residual):
    """Call the kernel or the reference for that kind of norm; only the last kind has a bias."""
    if kind == "rms_norm":
        return (rms_norm if where == "kernel" else reference.rms_norm)(x, weight, EPS, residual)
    bias = bias if kind == "layer_norm_bias" else None
    return (layer_norm if where == "kernel" else reference.layer_norm)(x, weight, bias, EPS, residual)


def check(kind, arguments):
    exact = [None if x is None else x.double() for x in arguments]
    y, h = call(kind, "kernel", *arguments)
    eager_y, eager_h = call(kind, "reference", *arguments)
    truth_y, _ = call(kind, "reference", *exact)
    assert_as_exact(y, eager_y, truth_y, ulps=2)
    assert torch.equal(h, eager_h)
    assert h.dtype == eager_h.dtype
    if arguments[3] is None:
        assert h is arguments[0]


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_reference(name, dtype, kind, residual, device):
    check(kind, inputs(SHAPES[name], dtype, device, residual))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight_dtype", [FP16, FP32], ids=str)
def test_fp16_and_mixed_weights(weight_dtype, kind, device):
    check(kind, inputs(SHAPES["odd"], FP16, device, True, weight_dtype=weight_dtype))


def test_rms_norm_rounds_before_the_weight(device):
    """Equal to the model's bits: a weight of 1 + 2^-7 in bfloat16 distinguishes the two orders of operations."""
    x, _, _, residual = inputs(SHAPES["modernbert"], BF16, device, True)
    weight = torch.full((768,), 1 + 2**-7, dtype=BF16, device=device)
    y, expected = rms_norm(x, weight, EPS, residual)[0], reference.rms_norm(x, weight, EPS, residual)[0]
    assert (y == expected).float().mean() > 0.995  # the last bit of the mean may move a value across a tie


def largest_error(kind, x, weight, y):
    """The error bound of each element of a norm before rounding to its dtype: [rows, d], fp64.

    It adds up the errors of the fp32 operations, and those that the manual states for the division and the root.
    """
    h, weight, d = x.double(), weight.double().abs(), x.shape[-1]
    mean_error = torch.zeros_like(h[:, :1])
    if kind != "rms_norm":
        mean = h.mean(-1, keepdim=True)
        # A sum of d equal fp16 numbers is exact, and its division by d is correctly rounded, so a constant row's mean
        # is its value. By div.full it could be 2 units away, which 1 / sqrt(eps) magnifies by 300. Any other sum: d
        # additions in any order.
        summed = ROUNDED * d * h.abs().mean(-1, keepdim=True) + INSTRUCTIONS["div.rn.f32"] * mean.abs()
        mean_error = torch.where((x == x[:, :1]).all(-1, keepdim=True), 0.0, summed)
        h = h - mean
    inverse = (h.square().mean(-1, keepdim=True) + EPS).rsqrt()
    # Squares, d additions, the addition of eps and the division; a root halves the relative error.
    under_root = (d + 2) * ROUNDED + INSTRUCTIONS["div.full.f32"] + (mean_error * inverse).square()
    # The root, the multiplication by it, and the subtraction of a mean.
    relative = under_root / 2 + INSTRUCTIONS["rsqrt.approx.f32"] + 2 * ROUNDED
    normed = h.abs() * inverse
    error = normed * relative + mean_error * inverse
    if kind == "rms_norm":
        return weight * (error + torch.finfo(x.dtype).eps / 2 * (normed + error))  # rounded before the weight
    return weight * error + ROUNDED * (weight * normed + y.abs())  # the weight and the bias


@pytest.mark.parametrize("kind", KINDS)
def test_constant_and_large_rows(kind, device):
    """A constant row has variance 0, never below; squares of 1e4 exceed fp16's largest number."""
    x, weight, bias, _ = inputs((4, 96), FP16, device, False)
    x[0], x[1], x[2] = 0, 7, 1e4
    y, _ = call(kind, "kernel", x, weight, bias, None)
    truth, _ = call(kind, "reference", x.double(), weight.double(), bias.double(), None)
    assert_within(y, truth, largest_error(kind, x, weight, truth))
    if kind != "rms_norm":
        expected = bias if kind == "layer_norm_bias" else torch.zeros_like(bias)
        assert torch.equal(y[:3], expected.expand(3, -1))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_far_apart(kind, device):
    x, weight, bias, residual = inputs((4, 3, 50), BF16, device, True)
    check(kind, (x[:, ::2, :33], weight[:33], bias[:33], residual[:, 1:, 7:40]))
    x, residual = x[:2, 0], residual[:2, 0]
    y, h = call(kind, "kernel", far_apart(x), weight, bias, far_apart(residual))
    for out, expected in zip((y, h), call(kind, "kernel", x, weight, bias, residual), strict=True):
        assert torch.equal(out, expected)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 9),
    d=st.integers(1, 300),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([BF16, FP32]),
    residual=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape(device, rows, d, kind, dtype, residual, seed):
    check(kind, inputs((rows, d), dtype, device, residual, seed))


@pytest.mark.parametrize("kind", KINDS)
def test_empty(kind, device):
    arguments = inputs((2, 0, 8), FP32, device, True)
    assert [x.shape for x in call(kind, "kernel", *arguments)] == [(2, 0, 8)] * 2


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(2, 8, dtype=torch.int32), "x is torch.int32"),
        ("x", torch.zeros(2, 16385), "16385.*last dimension"),
        ("x", torch.zeros(2, 16)[:, ::2], r"x is .* strides \(16, 2\) .*last dimension contiguous"),
        ("weight", torch.zeros(7), r"weight is torch.float32 \[7\]"),
        ("weight", torch.zeros(8).double(), "weight is torch.float64"),
        ("weight", torch.zeros(16)[::2], r"weight is .* strides \(2,\)"),
        ("bias", torch.zeros(9), r"bias is torch.float32 \[9\]"),
        ("residual", torch.zeros(1, 8), r"residual is torch.float32 \[1, 8\]"),
        ("residual", torch.zeros(2, 8).half(), "residual is torch.float16"),
        ("residual", torch.zeros(8, 2).T, r"residual is .* strides \(1, 2\)"),
    ],
    ids=lambda x: x if isinstance(x, str) and x.isalpha() else "",
)
def test_refused(name, value, message):
    good = dict(zip(("x", "weight", "bias", "residual"), inputs((2, 8), FP32, "cpu", True), strict=True))
    with pytest.raises(ValueError, match=message):
        layer_norm(**(good | {name: value}), eps=EPS)
    if name != "bias":
        with pytest.raises(ValueError, match=message):
            rms_norm(**{n: x for n, x in (good | {name: value}).items() if n != "bias"}, eps=EPS)


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_opcheck(residual, device):
    x, weight, bias, residual = inputs((3, 40), BF16, device, residual)
    torch.library.opcheck(torch.ops.dllm_fast.norm, (x, weight, None, EPS, residual, False))
    torch.library.opcheck(torch.ops.dllm_fast.norm, (x, weight, bias, EPS, residual, True))
    torch.library.opcheck(torch.ops.dllm_fast.norm, (x, weight.float(), None, EPS, residual, False))


def test_compiles_whole(device):
    x, weight, bias, residual = inputs((3, 40), BF16, device, True)

    def block(x, weight, bias, residual):
        y, h = rms_norm(x, weight, EPS)
        y, h = rms_norm(y, weight, EPS, h)
        return layer_norm(y, weight, bias, EPS, residual + h)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for out, expected in zip(compiled(x, weight, bias, residual), block(x, weight, bias, residual), strict=True):
        assert torch.equal(out, expected)
