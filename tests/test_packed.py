"""Packed queries in PyTorch's and the compiled ops, against the fp64 definitions."""

import packs
import pytest
import torch
from needs import needs_cpp
from test_compiled import assert_as_exact

from dllm_fast import ops
from dllm_fast.cpu import compiled, elementwise
from dllm_fast.families.rows import Packed, States
from dllm_fast.kernels import reference, reference_states

BF16, FP32 = torch.bfloat16, torch.float32
LEVELS = ["torch", *(() if compiled.missing() else compiled.levels())]

every = pytest.mark.parametrize("level", LEVELS)


@pytest.fixture
def impl(level, monkeypatch):
    if level == "torch":
        return "torch"
    monkeypatch.setattr(compiled, "_level", compiled.LEVELS.index(level))
    return "cpp"


@every
@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("name", packs.SHAPES)
def test_attention(name, dtype, impl):
    poisoned, clean, first, most, total = packs.inputs(packs.SHAPES[name], dtype)
    wide = [x.double() for x in clean[:3]]
    truth, eager = (reference.attention(*x, *clean[3:], first=first)[:total] for x in (wide, clean[:3]))
    given = poisoned if impl == "cpp" else clean  # PyTorch multiplies what no query sees by 0
    q, keys, values, start, end, slot, window = given
    packed = Packed(reference.row_of(first, len(q)), first, most)
    seen = ops.visible(q, keys.shape[1], start, end, slot, window, packed, impl=impl)
    out = ops.attention(q, keys, values, seen, impl=impl)
    assert out.shape == q.shape
    assert_as_exact(out[:total].contiguous(), eager, truth)


@every
@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("name", packs.STATES)
def test_states(name, dtype, impl):
    poisoned, clean, queries = packs.states_inputs(packs.STATES[name], dtype)
    wide = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in clean]
    truth, eager = (reference_states.attention(*x) for x in (wide, clean))
    q, keys, values, start, end, slot, window, first, hole, length, *own = poisoned if impl == "cpp" else clean
    packed = Packed(reference.row_of(first, len(q)), first, queries, states=States(hole, length, queries // length))
    seen = ops.visible(q, keys.shape[1], start, end, slot, window, packed, impl=impl)
    assert_as_exact(ops.attention(q, keys, values, seen, own, impl=impl).contiguous(), eager, truth)


@every
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("name", packs.SHAPES)
def test_rope(name, dtype, impl):
    mine = packs.rope_inputs(packs.SHAPES[name], dtype)
    eager, exact = [x.clone() for x in mine], [x.double() if x.is_floating_point() else x.clone() for x in mine]
    truth, expected = reference.rope(*exact), reference.rope(*eager)
    q, keys, values = ops.rope(*mine, impl=impl)
    assert keys is mine[7] and values is mine[8]
    assert_as_exact(q, expected, truth)
    assert_as_exact(keys, eager[7], exact[7])
    assert torch.equal(values, eager[8])


@needs_cpp
def test_wrong_arguments_are_named():
    (q, keys, values, start, end, slot, window), _, first, most, _ = packs.inputs(packs.SHAPES["rows-apart"], FP32)
    with pytest.raises(ValueError, match="first: packed queries are q"):
        compiled.attention(q, keys, values, start, end, None, window, None, first, most)
    with pytest.raises(ValueError, match=r"first is torch.int64 \[3\]"):
        compiled.attention(q, keys, values, start, end, slot, window, None, first[1:], most)
    *given, row = packs.rope_inputs(packs.SHAPES["rows-apart"], FP32)
    with pytest.raises(ValueError, match=r"row is torch.int64 \[2\]"):
        elementwise.rope(*given, row[:2])


@needs_cpp
def test_opcheck():
    shape = packs.SHAPES["rows-apart"]
    _, clean, first, most, _ = packs.inputs(shape, FP32)
    tests = "test_schema", "test_faketensor"
    torch.library.opcheck(compiled.attention, (*clean, None, first, most), test_utils=tests)
    torch.library.opcheck(elementwise._rope_op, tuple(packs.rope_inputs(shape, FP32)))
