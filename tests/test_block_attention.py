"""Blocks in PyTorch's and the compiled attention, against the fp64 definition."""

import blocks
import pytest
import torch
from needs import needs_cpp
from test_compiled import assert_as_exact, assert_as_exact_on_average
from test_packed import every, impl  # noqa: F401 - a fixture

from dllm_fast import ops
from dllm_fast.cpu import compiled
from dllm_fast.families.rows import Packed
from dllm_fast.kernels import reference

BF16, FP32 = torch.bfloat16, torch.float32


def test_what_each_query_sees():
    """The definition itself, written out."""
    start, end, slot = (torch.tensor(row) for row in ([2, 0], [20, 9], [1, 5]))
    seen = reference.visible_slots(12, 20, start, end, slot, None, 4)
    for row in range(2):
        for query in range(12):
            own = int(slot[row]) + query - int(start[row])  # its position in the row; padding has a negative one
            last = min(int(end[row]), int(start[row]) + (own // 4 + 1) * 4)
            assert seen[row, query].nonzero()[:, 0].tolist() == list(range(int(start[row]), last))


def test_what_each_query_sees_after_a_prompt():
    """The same with an origin: the slots before it are one block."""
    start, end, slot, origin = (torch.tensor(row) for row in ([2, 0], [20, 15], [1, 0], [5, 9]))
    seen = reference.visible_slots(16, 20, start, end, slot, None, 4, origin)
    for row in range(2):
        for query in range(16):
            at, first = int(slot[row]) + query, int(origin[row])
            last = first if at < first else first + ((at - first) // 4 + 1) * 4
            expected = list(range(int(start[row]), min(int(end[row]), last)))
            assert seen[row, query].nonzero()[:, 0].tolist() == expected


@every
@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("way", ["consecutive", "packed"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("name", blocks.SHAPES)
def test_attention(name, dtype, way, impl):  # noqa: F811
    """Over all seeds together, and in fp32 on average: the largest error of a few numbers is a matter of luck."""
    results = []
    for seed in range(8):
        poisoned, clean, options = blocks.inputs(name, dtype, seed=seed)
        first = packed = None
        if way == "packed":
            poisoned, first, most = blocks.packed(poisoned)
            clean, *_ = blocks.packed(clean)
            packed = Packed(reference.row_of(first, len(poisoned[0])), first, most)
        wide = [x.double() for x in clean[:3]]
        truth, eager = (reference.attention(*x, *clean[3:], first=first, **options) for x in (wide, clean[:3]))
        q, keys, values, *rest = poisoned if impl == "cpp" else clean  # PyTorch multiplies what no query sees by 0
        seen = ops.visible(q, keys.shape[1], *rest, packed, impl=impl, **options)
        results.append((ops.attention(q, keys, values, seen, impl=impl), eager, truth))
    judge = assert_as_exact if dtype == BF16 else assert_as_exact_on_average
    judge(*map(torch.stack, zip(*results, strict=True)))


@every
def test_defaults(impl):  # noqa: F811
    """Without ranges rows begin at slot 0 and see all slots."""
    (q, keys, values, start, end, slot, _), _, options = blocks.inputs("prefill", FP32)
    explicit = ops.visible(q, keys.shape[1], start, end, slot, impl=impl, block=options["block"], origin=start)
    found = ops.attention(q, keys, values, ops.visible(q, keys.shape[1], impl=impl, **options), impl=impl)
    assert torch.equal(found, ops.attention(q, keys, values, explicit, impl=impl))


@needs_cpp
def test_refused_and_opcheck():
    (*given, window), _, options = blocks.inputs("after-a-prompt", FP32)
    with pytest.raises(ValueError, match="block=0"):
        compiled.attention(*given, window, block=0)
    with pytest.raises(ValueError, match="origin: given with block=None"):
        compiled.attention(*given, window, origin=options["origin"])
    with pytest.raises(ValueError, match=r"origin is torch.int32 \[2\]"):
        compiled.attention(*given, window, block=4, origin=options["origin"].int())
    torch.library.opcheck(compiled.attention, (*given, window), options, test_utils=("test_schema", "test_faketensor"))
