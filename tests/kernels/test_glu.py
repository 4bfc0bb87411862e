import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from truth import INSTRUCTIONS, ROUNDED, assert_as_exact, assert_within, exp_error, far_apart

from dllm_fast.kernels import reference
from dllm_fast.kernels.glu import geglu, swiglu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GATES = {"swiglu": (swiglu, reference.swiglu), "geglu": (geglu, reference.geglu)}
SHAPES = {"one": (1,), "odd": (3, 5, 77), "past-a-tile": (2, 1025), "two-tiles": (1, 2, 2048), "narrow": (9, 3)}


def halves(shape, dtype, device, seed=0):
    """gate and up as the two halves of one matmul's output."""
    make = torch.Generator().manual_seed(seed)
    both = torch.randn(*shape[:-1], 2 * shape[-1], generator=make).mul(3).to(dtype).to(device)
    return both.chunk(2, -1)


def check(name, gate, up):
    kernel, definition = GATES[name]
    out = kernel(gate, up)
    assert out.is_contiguous()
    assert_as_exact(out, definition(gate, up), definition(gate.double(), up.double()), ulps=2)


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_reference(shape, dtype, name, device):
    check(name, *halves(SHAPES[shape], dtype, device))


def largest_error(name, gate, y):
    """The error bound of each element of a gate (times 1) before rounding to its dtype, fp64."""
    if name == "swiglu":
        # exp's share of 1 + exp(-g), the sum, the division. Beyond 88.72 exp is infinite and the quotient 0, where the
        # truth is at most 88.72 e^-88.72 < 2^-121.
        share = torch.sigmoid(-gate)
        relative = exp_error(gate) * share + ROUNDED + INSTRUCTIONS["div.full.f32"]
        return relative.clamp(max=1.0) * y.abs() + 2.0**-121
    # erf of a rounded product with a rounded constant, by libdevice within 2 units (CUDA C++ Programming Guide,
    # "Mathematical Functions"); 1 + erf, two products. Below 0 the sum cancels, and its terms' errors remain.
    at = gate * 0.5**0.5
    slope = 2 / torch.pi**0.5 * torch.exp(-at.square())
    erf = 2 * 2**-23 * torch.erf(at).abs() + slope * at.abs() * 2 * ROUNDED
    return gate.abs() / 2 * (erf + ROUNDED * (1 + torch.erf(at))) + 2 * ROUNDED * y.abs()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_tails(dtype, name, device):
    """Inputs for which exp overflows, and for which the gate leaves float32's normal range, each on its own scale."""
    sizes = torch.tensor([1e-30, 1e-3, 20.0, 88.0, 89.0, 1e4], dtype=dtype, device=device)
    gate = torch.cat([sizes, -sizes])
    kernel, definition = GATES[name]
    truth = definition(gate.double(), torch.ones_like(gate, dtype=torch.float64))
    assert_within(kernel(gate, torch.ones_like(gate)), truth, largest_error(name, gate.double(), truth))


@pytest.mark.parametrize("name", GATES)
def test_any_strides(name, device):
    gate, up = halves((4, 6, 40), BF16, device)
    check(name, gate[::2, 1::2, 3:], up.contiguous()[:2, :3, :37])
    gate, up = gate[0, :2], up[0, :2]
    assert torch.equal(GATES[name][0](far_apart(gate), far_apart(up)), GATES[name][0](gate, up))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 5),
    f=st.integers(1, 1100),
    name=st.sampled_from(list(GATES)),
    dtype=st.sampled_from([BF16, FP32]),
    seed=st.integers(0, 99),
)
def test_any_shape(device, rows, f, name, dtype, seed):
    check(name, *halves((rows, f), dtype, device, seed))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)], ids=str)
@pytest.mark.parametrize("name", GATES)
def test_empty(name, shape, device):
    empty = torch.zeros(shape, device=device)
    assert GATES[name][0](empty, empty).shape == shape


@pytest.mark.parametrize(
    ("gate", "up", "message"),
    [
        (torch.zeros(2, 4).double(), torch.zeros(2, 4).double(), "gate is torch.float64"),
        (torch.zeros(2, 4), torch.zeros(2, 5), r"up is torch.float32 \[2, 5\]"),
        (torch.zeros(()), torch.zeros(()), r"gate is \[\]"),
        (torch.zeros(2, 4), torch.zeros(2, 4).half(), "up is torch.float16"),
        (torch.zeros(2, 8)[:, ::2], torch.zeros(2, 4), r"gate is .* strides \(8, 2\)"),
        (torch.zeros(2, 4), torch.zeros(4, 2).T, r"up is .* strides \(1, 2\)"),
    ],
    ids=["double", "shapes", "scalar", "dtypes", "gate-strides", "up-strides"],
)
@pytest.mark.parametrize("name", GATES)
def test_refused(name, gate, up, message):
    with pytest.raises(ValueError, match=message):
        GATES[name][0](gate, up)


@pytest.mark.parametrize("gelu", [False, True], ids=["swiglu", "geglu"])
def test_opcheck(gelu, device):
    torch.library.opcheck(torch.ops.dllm_fast.glu, (*halves((3, 40), BF16, device), gelu))


@pytest.mark.parametrize("name", GATES)
def test_compiles_whole(name, device):
    kernel = GATES[name][0]
    both = torch.cat(halves((3, 40), BF16, device), -1)

    def mlp(both):
        return kernel(*both.chunk(2, -1)) + 1

    assert torch.equal(torch.compile(mlp, fullgraph=True, backend="aot_eager")(both), mlp(both))
