"""Packed queries in Triton's attention, rotation and rotating matmul, against the fp64 definitions."""

import packs
import pytest
import torch
from test_attention import split_over
from truth import assert_as_exact, average_ulps

from dllm_fast.kernels import reference, reference_states
from dllm_fast.kernels.attention import attention
from dllm_fast.kernels.linear import linear
from dllm_fast.kernels.linear_rope import linear_rope
from dllm_fast.kernels.rope import rope

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize("splits", [None, 3])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("name", packs.SHAPES)
def test_attention(name, dtype, splits, device, monkeypatch):
    if splits:
        split_over(splits, monkeypatch)
    poisoned, clean, first, most, total = packs.inputs(packs.SHAPES[name], dtype, device)
    wide = [x.double() for x in clean[:3]]
    truth, eager = (reference.attention(*x, *clean[3:], first=first)[:total] for x in (wide, clean[:3]))
    out = attention(*poisoned, first=first, most=most)
    assert out.is_contiguous() and out.shape == poisoned[0].shape
    size = clean[2].abs().max().item() if dtype == FP32 else None
    assert_as_exact(out[:total], eager, truth, average_ulps(out), size)
    looser = attention(*poisoned, first=first.int(), most=most + 70)
    torch.testing.assert_close(looser[:total], out[:total], rtol=0, atol=8 * torch.finfo(dtype).eps * 4)


@pytest.mark.parametrize("splits", [None, 3])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("name", packs.STATES)
def test_states(name, dtype, splits, device, monkeypatch):
    if splits:
        split_over(splits, monkeypatch)
    poisoned, clean, queries = packs.states_inputs(packs.STATES[name], dtype, device)
    wide = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in clean]
    truth, eager = (reference_states.attention(*x) for x in (wide, clean))
    q, keys, values, start, end, slot, window, first, *rest = poisoned
    out = attention(q, keys, values, start, end, slot, window, None, first, queries, *rest)
    size = clean[2].abs().max().item() if dtype == FP32 else None
    assert_as_exact(out, eager, truth, average_ulps(out), size)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("name", packs.SHAPES)
def test_rope(name, dtype, device):
    mine = packs.rope_inputs(packs.SHAPES[name], dtype, device)
    eager, exact = [x.clone() for x in mine], [x.double() if x.is_floating_point() else x.clone() for x in mine]
    truth, expected = reference.rope(*exact), reference.rope(*eager)
    assert_as_exact(rope(*mine), expected, truth, ulps=2)
    assert_as_exact(mine[7], eager[7], exact[7], ulps=2)
    assert torch.equal(mine[8], eager[8])


def test_a_matmul_that_rotates(device):
    """The bits of the two kernels one after the other."""
    *_, cos, sin, position, slot, keys, values, row = packs.rope_inputs(
        (2, 1, 128, 20, [0, 3], [20, 20], [[1, 7, 19], [3, 4]], None), BF16, device
    )
    make = torch.Generator().manual_seed(2)
    x = torch.randn(len(row), 1, 256, generator=make).to(device, BF16)
    weight = torch.randn(4 * 128, 256, generator=make).to(device, BF16)
    rest = cos, sin, position, slot
    mine, others = (keys.clone(), values.clone()), (keys.clone(), values.clone())
    q = linear_rope(x, weight, None, *rest, *mine, row)
    parts = linear(x, weight).unflatten(-1, (4, 128)).split((2, 1, 1), 2)
    assert torch.equal(q, rope(*parts, *rest, *others, row))
    assert torch.equal(mine[0], others[0]) and torch.equal(mine[1], others[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first": [0, 1]}, r"first is torch.int64 \[2\].*\[3\]"),
        ({"slot": [1, 2]}, r"slot is torch.int64 \[2\].*\[4\]"),
        ({"q": torch.zeros(4, 2, 2, 16)}, r"q is .*\[4, 2, 2, 16\]"),
    ],
)
def test_refused(change, message, device):
    shape = (2, 1, 16, 20, [0, 0], [20, 20], [[0, 19], [4]], None)
    (q, keys, values, start, end, slot, _), _, first, most, _ = packs.inputs(shape, FP32, device, spare=1)
    given = {"q": q, "keys": keys, "values": values, "start": start, "end": end, "slot": slot, "first": first}
    given |= {name: torch.as_tensor(x, device=device) for name, x in change.items()}
    with pytest.raises(ValueError, match=message):
        attention(**given, most=most)


def test_opcheck(device):
    shape = packs.SHAPES["rows-apart"]
    _, clean, first, most, _ = packs.inputs(shape, FP32, device)
    torch.library.opcheck(attention, (*clean, None, first, most), test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(rope, tuple(packs.rope_inputs(shape, FP32, device)))
