"""Blocks in Triton's attention, against the fp64 definition."""

import blocks
import pytest
import torch
from test_attention import split_over
from truth import assert_as_exact

from dllm_fast.kernels import reference
from dllm_fast.kernels.attention import attention

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize("splits", [None, 3])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("name", blocks.SHAPES)
def test_reference(name, dtype, splits, device, monkeypatch):
    if splits:
        split_over(splits, monkeypatch)
    poisoned, clean, options = blocks.inputs(name, dtype, device)
    size = clean[2].abs().max().item() if dtype == FP32 else None
    truth = reference.attention(*(x.double() for x in clean[:3]), *clean[3:], **options)
    assert_as_exact(attention(*poisoned, **options), reference.attention(*clean, **options), truth, size=size)


@pytest.mark.parametrize("name", blocks.SHAPES)
def test_packed(name, device):
    poisoned, clean, options = blocks.inputs(name, BF16, device)
    given, first, most = blocks.packed(poisoned)
    same, *_ = blocks.packed(clean)
    truth = reference.attention(*(x.double() for x in same[:3]), *same[3:], first=first, **options)
    eager = reference.attention(*same, first=first, **options)
    assert_as_exact(attention(*given, first=first, most=most, **options), eager, truth)


def test_a_block_that_ends_with_the_range_is_a_plain_range(device):
    poisoned, _, options = blocks.inputs("one-block", BF16, device)
    assert torch.equal(attention(*poisoned, **options), attention(*poisoned))


@pytest.mark.parametrize(
    ("block", "hole", "message"), [(0, None, "block=0"), (4, [0], "block=4: the queries of states")]
)
def test_refused(block, hole, message, device):
    (*given, _), _, _ = blocks.inputs("one-block", FP32, device)
    hole = None if hole is None else torch.tensor(hole, device=device)
    with pytest.raises(ValueError, match=message):
        attention(*given, hole=hole, block=block)
    with pytest.raises(ValueError, match="origin: given with block=None"):
        attention(*given, origin=given[3])


def test_opcheck(device):
    poisoned, _, options = blocks.inputs("after-a-prompt", BF16, device)
    torch.library.opcheck(attention, poisoned, options)
