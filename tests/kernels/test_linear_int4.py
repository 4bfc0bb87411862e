"""`kernels.linear_int4`: a few rows times four-bit weights, and the same weights widened."""

import pytest
import torch
from tiny import make_llada
from truth import LINEARS, assert_as_exact, linear_inputs

import dllm_fast
from dllm_fast import launchers
from dllm_fast.kernels import reference, reference_rounded
from dllm_fast.kernels.linear_int4 import fits_int4, linear_int4, widen_int4
from dllm_fast.kernels.tiles import counters

BF16, FP16 = torch.bfloat16, torch.float16


def inputs(name, dtype, device):
    x, weight = linear_inputs(name)
    weight[0], weight[1], weight[2] = 0, weight[1].abs(), 1000 * weight[2]  # all q equal; zero points of 0
    return x.to(dtype).to(device), [part.to(device) for part in reference_rounded.round_int4(weight)]


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("name", LINEARS)
def test_reference(name, dtype, gated, device):
    """Only the weights are rounded: the truth is computed from the rounded weights."""
    x, four_bits = inputs(name, dtype, device)
    widened = reference_rounded.widen_int4(*four_bits, x.shape[-1])
    truth = reference.linear(x.double(), widened.double(), gated=gated)
    assert_as_exact(linear_int4(x, *four_bits, gated), reference.linear(x, widened, gated=gated), truth)


def test_every_q_and_zero(device):
    """W x for one input at a time: each of the 16 x 16 pairs, at each index in a group."""
    weight = torch.zeros(256, 128)
    zeros, values = torch.arange(256) // 16, torch.arange(256) % 16
    q = values[:, None].expand(256, 128).to(torch.uint8)
    packed = (q[:, :64] | q[:, :64] << 4).contiguous().to(device)
    scale = torch.ones(1, 256, dtype=BF16, device=device)
    zero = zeros.to(torch.uint8)[None].to(device)
    expected = (values - zeros).float().to(device)
    assert torch.equal(widen_int4(packed, scale, zero, 128, torch.float32), expected[:, None] + weight.to(device))
    for dtype in (BF16, FP16):
        y = linear_int4(torch.eye(128, dtype=dtype, device=device)[:64], packed, scale, zero)
        assert torch.equal(y.float(), expected.expand(64, 256))


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_a_rows_bits_do_not_depend_on_its_neighbours(gated, device):
    x, four_bits = inputs("most-rows", BF16, device)
    all_rows = linear_int4(x, *four_bits, gated)
    for rows in (1, 2, 17, 33):
        assert torch.equal(linear_int4(x[:rows], *four_bits, gated), all_rows[:rows])


def test_counts_are_left_as_they_were_found(device):
    x, four_bits = inputs("tiles-cut-anywhere", BF16, device)
    expected, kept = linear_int4(x, *four_bits), torch.zeros(8, dtype=torch.int32, device=device)
    with counters(kept):
        for _ in range(3):
            assert torch.equal(linear_int4(x, *four_bits), expected)
            assert not kept.any()


def test_rows_that_are_apart(device):
    x, four_bits = inputs("tiles-cut-anywhere", BF16, device)
    wide = torch.full((17, 2, 640), float("nan"), dtype=BF16, device=device)
    wide[:, 1] = x
    assert torch.equal(linear_int4(wide[:, 1], *four_bits), linear_int4(x, *four_bits))


@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16], ids=str)
@pytest.mark.parametrize("n, k", [(1, 1), (37, 300), (64, 256)])
def test_widened(n, k, dtype, device):
    torch.manual_seed(0)
    four_bits = [part.to(device) for part in reference_rounded.round_int4(torch.randn(n, k))]
    assert torch.equal(widen_int4(*four_bits, k, dtype), reference_rounded.widen_int4(*four_bits, k).to(dtype))


def test_ops(device):
    x, four_bits = inputs("one-row", BF16, device)
    torch.library.opcheck(linear_int4, (x, *four_bits))
    torch.library.opcheck(linear_int4, (x, *four_bits), {"gated": True})
    torch.library.opcheck(widen_int4, (*four_bits, 256, BF16))


@pytest.mark.parametrize("rows, n, k", [(0, 128, 128), (65, 128, 128), (1, 100, 128), (1, 128, 96)])
def test_what_does_not_fit(rows, n, k, device):
    x = torch.ones(rows, k, dtype=BF16, device=device)
    four_bits = [part.to(device) for part in reference_rounded.round_int4(torch.ones(n, k))]
    assert not fits_int4(x, four_bits[0])
    with pytest.raises(ValueError, match="expected 1 to 64 rows"):
        linear_int4(x, *four_bits)


def test_what_fits(device):
    x, four_bits = inputs("one-row", BF16, device)
    assert fits_int4(x, four_bits[0]) and not fits_int4(x.float(), four_bits[0])
    with pytest.raises(ValueError, match=r"scale is torch.float32"):
        linear_int4(x, four_bits[0], four_bits[1].float(), four_bits[2])
    with pytest.raises(ValueError, match=r"dtype=torch.float64 is not one of"):
        widen_int4(*four_bits, 256, torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("rows, served", [(16, "linear_int4"), (80, "widen_int4")], ids=["few", "many"])
def test_a_model_is_served_by_them(rows, served, device, monkeypatch):
    """In fp16, which the interpreter supports: PyTorch's logits from the same four bits, to fp16's rounding."""
    model = make_llada(d_model=128, n_heads=2, mlp_hidden_size=128, n_layers=2).half().to(device)
    ids = torch.arange(rows, device=device)[None] % 99
    calls = []
    op = getattr(launchers.triton(), served)
    monkeypatch.setattr(launchers.triton(), served, lambda *arguments: calls.append(1) or op(*arguments))
    own = dllm_fast.patch(model, impl="torch")(ids).logits
    expected = dllm_fast.patch(model, impl="torch", weights="int4")(ids).logits
    got = dllm_fast.patch(model, impl="triton", weights="int4")(ids).logits
    assert len(calls) == 2 * 4
    assert (got - expected).abs().max() < 0.02 * expected.abs().max() < (own - expected).abs().max()
