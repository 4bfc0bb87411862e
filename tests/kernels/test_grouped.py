"""Triton's grouped matmul against the fp64 definition, and experts made of it."""

import pytest
import torch
from truth import assert_as_exact

from dllm_fast import ops
from dllm_fast.kernels import reference
from dllm_fast.kernels.grouped import grouped_linear

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# inputs, outputs, rows of each group
SHAPES = {
    "one": (16, 16, [5]),
    "one-row-each": (40, 24, [1, 1, 1, 1, 1]),
    "empty-groups": (33, 70, [0, 3, 0, 0, 17, 1, 0]),
    "all-in-the-last": (64, 130, [0, 0, 40]),
    "many-rows": (96, 40, [70, 64, 33]),
    "many-groups": (16, 16, [1, 0, 2] * 11),
    "none": (16, 8, [0, 0]),
}


def inputs(shape, dtype, device, seed=0):
    width, outputs, counts = shape
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(counts), width + 8, generator=make).to(device, dtype)[:, :width]
    weight = torch.randn(len(counts), outputs, width, generator=make).to(device, dtype)
    return x, weight, torch.tensor(counts, device=device).cumsum(0)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_reference(name, dtype, device):
    x, weight, ends = inputs(SHAPES[name], dtype, device)
    out = grouped_linear(x, weight, ends)
    if not len(x):
        return  # its shape is all there is
    truth = reference.grouped_linear(x.double(), weight.double(), ends)
    assert_as_exact(out, reference.grouped_linear(x, weight, ends), truth)
    assert torch.equal(out, grouped_linear(x, weight, ends.int()))


def test_empty(device):
    x, weight, ends = inputs(SHAPES["none"], FP32, device)
    assert grouped_linear(x, weight, ends).shape == (0, 8)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_experts(dtype, device):
    make = torch.Generator().manual_seed(1)
    x = torch.randn(21, 32, generator=make).to(device, dtype)
    gate_up, down = (torch.randn(9, *shape, generator=make).to(device, dtype) / 6 for shape in ((48, 32), (32, 24)))
    chosen = torch.stack([torch.randperm(9, generator=make)[:3] for _ in range(21)]).to(device)
    weight = torch.rand(21, 3, generator=make).to(device)
    parts = [part.double() for part in (x, gate_up, down)]
    truth = reference.experts(*parts, chosen, weight)
    eager = reference.experts(x, gate_up, down, chosen, weight)
    assert_as_exact(ops.experts(x, gate_up, down, chosen, weight, impl="triton"), eager, truth, ulps=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 3)}, r"weight is .*\[2, 5, 16\].*expected .*\[any, any, 3\]"),
        ({"weight": torch.zeros(5, 16)}, r"weight is torch.float32 \[5, 16\]"),
        ({"weight": torch.zeros(2, 16, 5).transpose(1, 2)}, "weight is .*contiguous"),
        ({"weight": torch.zeros(2, 10, 16)[:, ::2]}, "the rows of a group must lie together"),
        ({"ends": torch.zeros(3, dtype=torch.int64)}, r"ends is torch.int64 \[3\]"),
    ],
)
def test_refused(change, message, device):
    given = {"x": torch.zeros(4, 16), "weight": torch.zeros(2, 5, 16), "ends": torch.tensor([1, 4])} | change
    with pytest.raises(ValueError, match=message):
        grouped_linear(**{name: x.to(device) for name, x in given.items()})


def test_opcheck(device):
    torch.library.opcheck(grouped_linear, inputs(SHAPES["empty-groups"], BF16, device))
