"""`kernels.linear`: a few rows times a weight, with tiles shared between programs, gates and e4m3 weights."""

import pytest
import torch
from truth import LINEARS, assert_as_exact, linear_inputs

from dllm_fast.kernels import linear as kernel
from dllm_fast.kernels import reference
from dllm_fast.kernels.linear import fits, linear
from dllm_fast.kernels.reference_rounded import round_rows
from dllm_fast.kernels.tiles import counters

BF16, FP16 = torch.bfloat16, torch.float16


def inputs(name, dtype, device):
    return [part.to(dtype).to(device) for part in linear_inputs(name)]


def rounded(weight):
    """e4m3 copies and their scales."""
    copy, scale = round_rows(weight)
    return copy, scale[:, 0].contiguous()


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("name", LINEARS)
def test_reference(name, dtype, gated, device):
    x, weight = inputs(name, dtype, device)
    truth = reference.linear(x.double(), weight.double(), gated=gated)
    assert_as_exact(linear(x, weight, gated=gated), reference.linear(x, weight, gated=gated), truth)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("name", ["one-row", "tiles-cut-anywhere", "most-rows"])
def test_e4m3_weights(name, dtype, gated, device):
    """Only the weights are rounded: the truth is computed from the rounded weights."""
    x, weight = inputs(name, dtype, device)
    copy, scale = rounded(weight)
    truth = reference.linear(x.double(), copy.double(), scale.double(), gated)
    eager = reference.linear(x, copy, scale, gated)
    assert_as_exact(linear(x, copy, scale, gated), eager, truth)


def test_e4m3_weights_of_rows_with_outliers(device):
    """A row's largest number sets its scale, but does not cost a number a thousandth of its size any precision."""
    x, weight = inputs("tiles-cut-anywhere", BF16, device)
    x[:, 3] *= 1000
    copy, scale = rounded(weight)
    copy[:, 3] = 0
    truth = reference.linear(x.double(), copy.double(), scale.double())
    assert_as_exact(linear(x, copy, scale), reference.linear(x, copy, scale), truth)


def test_every_e4m3_number(device):
    """Each of the 254 finite e4m3 numbers times 1, including subnormals and -0."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    weight = torch.where(codes.float().isfinite(), codes.float(), 0).to(torch.float8_e4m3fn)
    weight = weight[:, None].expand(256, 128).contiguous().to(device)
    x = torch.zeros(1, 128, dtype=BF16, device=device)
    for place in (0, 1, 2, 3, 127):
        x.zero_()[0, place] = 1
        y = linear(x, weight, torch.ones(256, device=device))
        assert torch.equal(y[0].float(), weight[:, 0].float())


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("byte", [False, True], ids=["bf16", "e4m3"])
def test_a_rows_bits_do_not_depend_on_its_neighbours(byte, gated, device):
    x, weight = inputs("most-rows", BF16, device)
    weights = rounded(weight) if byte else (weight,)
    all_rows = linear(x, *weights, gated=gated)
    for rows in (1, 2, 16, 17, 32, 33):
        assert torch.equal(linear(x[:rows], *weights, gated=gated), all_rows[:rows])


def test_counts_are_left_as_they_were_found(device):
    x, weight = inputs("tiles-cut-anywhere", BF16, device)
    expected, kept = linear(x, weight), torch.zeros(8, dtype=torch.int32, device=device)
    with counters(kept):
        for _ in range(3):
            assert torch.equal(linear(x, weight), expected)
            assert not kept.any()


def test_rows_that_are_apart(device):
    x, weight = inputs("tiles-cut-anywhere", BF16, device)
    wide = torch.full((17, 2, 640), float("nan"), dtype=BF16, device=device)
    wide[:, 1] = x
    assert torch.equal(linear(wide[:, 1], weight), linear(x, weight))


def test_leading_dimensions(device):
    x, weight = inputs("most-rows", BF16, device)
    assert torch.equal(linear(x.view(2, 32, 256), weight), linear(x, weight).view(2, 32, 256))


def test_op(device):
    x, weight = inputs("one-row", BF16, device)
    torch.library.opcheck(linear, (x, weight))
    torch.library.opcheck(linear, (x, weight), {"gated": True})
    copy, scale = rounded(weight)
    # opcheck's schema test multiplies e4m3 tensors by numbers, which PyTorch cannot do.
    kinds = ("test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(linear, (x, copy, scale), test_utils=kinds)


@pytest.mark.parametrize("rows, n, k", [(0, 128, 128), (65, 128, 128), (1, 100, 128), (1, 128, 96)])
def test_what_does_not_fit(rows, n, k, device):
    x, weight = torch.ones(rows, k, dtype=BF16, device=device), torch.ones(n, k, dtype=BF16, device=device)
    assert not fits(x, weight)
    with pytest.raises(ValueError, match="expected 1 to 64 rows"):
        linear(x, weight)


def test_what_fits(device):
    x, weight = inputs("one-row", BF16, device)
    assert fits(x, rounded(weight)[0]) == kernel._measured(x.device)
    copy = rounded(weight)[0]
    shifted = torch.cat((copy.view(torch.uint8).flatten()[:1], copy.view(torch.uint8).flatten()))[1:]
    assert not fits(x, shifted.view(copy.dtype).view(copy.shape))  # words of four bytes would be misaligned
    assert not fits(x, weight)  # cuBLAS is faster
    assert not fits(x.float(), rounded(weight)[0])
    with pytest.raises(ValueError, match=r"weight is torch.float32"):
        linear(x, weight.float())
