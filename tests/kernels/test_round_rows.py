"""`kernels.round_rows` against its definition, bit for bit."""

import pytest
import torch

from dllm_fast.kernels import reference_rounded
from dllm_fast.kernels.round_rows import round_rows


def by_definition(x):
    """On the CPU, because PyTorch on a GPU multiplies by the rounded 1 / 448 instead of dividing."""
    return (part.to(x.device) for part in reference_rounded.round_rows(x.cpu()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (2, 769), (5, 4096), (1, 12288)], ids=str)
def test_reference(shape, dtype, device):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(3).to(dtype).to(device)
    x[-1] *= 1e-3
    out, scale = round_rows(x)
    expected, expected_scale = by_definition(x)
    assert torch.equal(scale, expected_scale)
    apart = out.view(torch.uint8) != expected.view(torch.uint8)
    assert not apart.any(), (x[apart][:4], (x / scale)[apart][:4], out.float()[apart][:4], expected.float()[apart][:4])


def test_rows_of_zeros_and_rows_that_are_apart(device):
    wide = torch.full((4, 2, 64), float("nan"), device=device)
    wide[:, 0] = torch.arange(256.0, device=device).view(4, 64)
    wide[1, 0] = 0
    out, scale = round_rows(wide[:, 0])
    expected, expected_scale = by_definition(wide[:, 0])
    assert torch.equal(out.float(), expected.float())
    assert torch.equal(scale, expected_scale)


def test_op(device):
    x = torch.randn(2, 64, device=device)
    # opcheck's schema test multiplies the results by numbers, which PyTorch cannot do in e4m3.
    kinds = ("test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(round_rows, (x,), test_utils=kinds)
    with pytest.raises(ValueError, match=r"x is torch.float32 \[64\]"):
        round_rows(x[0])
