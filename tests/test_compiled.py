"""Attention of the compiled extension, on every instruction set that this CPU has, against the fp64 definition."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dllm_fast import ops
from dllm_fast.cpu import compiled
from dllm_fast.kernels import reference

ROOT = Path(__file__).parent.parent
BF16, FP32 = torch.bfloat16, torch.float32

every_level = pytest.mark.parametrize("level", () if compiled.missing() else compiled.levels())
pytestmark = [
    pytest.mark.skipif(bool(compiled.missing()), reason=str(compiled.missing())),
    pytest.mark.usefixtures("poisoned_outputs"),
]

# batch, queries, heads, kv heads, head dim, slots, [start], [end], [slot], window
SHAPES = {
    "one-query": (1, 1, 1, 1, 32, 5, [0], [5], [4], None),
    "one-query-many-slots": (1, 1, 3, 1, 64, 300, [0], [300], [7], None),
    "block": (1, 32, 4, 4, 64, 200, [0], [200], [150], None),
    "block-left-padded": (2, 8, 2, 2, 64, 100, [17, 0], [100, 99], [60, 60], None),
    "block-right-padded": (2, 8, 2, 2, 64, 129, [0, 0], [65, 128], [9, 100], None),
    "odd-number-of-slots": (1, 5, 1, 1, 16, 131, [0], [131], [3], None),
    "gqa-2": (2, 5, 4, 2, 32, 70, [3, 0], [66, 70], [65, 1], None),
    "gqa-4-rows-past-a-tile": (1, 29, 8, 2, 16, 90, [0], [90], [30], None),
    "gqa-3": (1, 23, 6, 2, 32, 40, [1], [39], [0], None),
    "dim-40": (2, 9, 2, 1, 40, 75, [0, 70], [75, 75], [0, 66], None),
    "dim-33": (2, 9, 2, 1, 33, 75, [0, 70], [75, 75], [0, 66], None),
    "dim-1": (1, 4, 2, 2, 1, 20, [0], [20], [0], None),
    "dim-256": (1, 4, 1, 1, 256, 70, [5], [70], [66], None),
    "dim-300": (1, 18, 1, 1, 300, 140, [5], [140], [66], None),
    "long": (1, 130, 1, 1, 64, 260, [0], [260], [0], None),
    "long-ragged": (2, 97, 2, 1, 16, 131, [0, 40], [101, 131], [0, 0], None),
    "window-5": (2, 40, 2, 2, 32, 80, [0, 3], [80, 71], [0, 10], 5),
    "window-5-gqa-2": (2, 40, 4, 2, 32, 80, [0, 3], [80, 71], [0, 10], 5),
    "window-0": (1, 9, 2, 1, 16, 9, [0], [9], [0], 0),
    "window-past-everything": (1, 6, 2, 1, 16, 33, [2], [30], [11], 2**40),
    "window-64": (1, 66, 1, 1, 64, 300, [0], [300], [150], 64),
    "block-at-the-end-of-a-window": (1, 8, 2, 2, 32, 150, [0], [150], [142], 9),
    "range-wider-than-the-buffer": (1, 4, 1, 1, 16, 10, [-3], [99], [3], None),
}


def inputs(shape, dtype, seed=0):
    """q as a slice of a wider projection, buffers with NaN in every slot outside its row's range; the same with 0."""
    batch, queries, heads, kv_heads, dim, slots, start, end, slot, window = shape
    make = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, queries, heads + 2, dim, generator=make).to(dtype)[:, :, 1 : heads + 1]
    buffers = torch.randn(2, batch, slots, kv_heads, dim, generator=make).to(dtype)
    rows = [torch.tensor(row, dtype=torch.int64) for row in (start, end, slot)]
    j = torch.arange(slots)
    outside = ~((j >= rows[0][:, None]) & (j < rows[1][:, None]))[None, :, :, None, None]
    clean = buffers.masked_fill(outside, 0.0)
    return (q, *buffers.masked_fill_(outside, float("nan")), *rows, window), (q, *clean, *rows, window)


def assert_as_exact(out, eager, truth):
    """The largest error is at most twice PyTorch's, or two units in the last place of the largest value."""
    assert out.shape == truth.shape and out.dtype == eager.dtype and out.is_contiguous()
    assert out.isfinite().all()
    error, eager_error = ((x.double() - truth).abs().max().item() for x in (out, eager))
    limit = max(2 * eager_error, 2 * torch.finfo(out.dtype).eps * truth.abs().max().item())
    assert error <= limit, f"error {error:.3g}, PyTorch's {eager_error:.3g}, limit {limit:.3g}"


def assert_as_exact_on_average(out, eager, truth, times=2.0):
    """The root mean square error is at most twice PyTorch's, or half a unit in the last place."""
    assert out.shape == truth.shape and out.dtype == eager.dtype
    error, eager_error, size = (x.square().mean().sqrt().item() for x in (out - truth, eager - truth, truth))
    limit = max(times * eager_error, torch.finfo(out.dtype).eps * size / 2)
    assert error <= limit, f"error {error:.3g}, PyTorch's {eager_error:.3g}, limit {limit:.3g}"


def check(shape, dtype, seeds=(0,), judge=assert_as_exact):
    """As exact as PyTorch over all seeds together: the largest error of a few numbers is a matter of luck."""
    outs, eagers, truths = [], [], []
    for seed in seeds:
        poisoned, (q, keys, values, *ranges) = inputs(shape, dtype, seed)
        truths.append(reference.attention(q.double(), keys.double(), values.double(), *ranges))
        outs.append(compiled.attention(*poisoned))
        eagers.append(ops.attention(q, keys, values, ops.visible(q, keys.shape[1], *ranges)))
    return judged(outs, eagers, truths, judge)


def judged(outs, eagers, truths, judge):
    """The first of ``outs``, of all of which ``judge`` thinks well."""
    assert all(out.is_contiguous() for out in outs)
    judge(torch.stack(outs), torch.stack(eagers), torch.stack(truths))
    return outs[0]


@every_level
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_attention(name, dtype, level, use):
    use(level)
    check(SHAPES[name], dtype)


@every_level
@pytest.mark.parametrize("window", [None, 4])
def test_queries_that_see_nothing_get_zero(window, level, use):
    use(level)
    # Rows with ranges empty at 0, empty inside and reversed, and between them a full row.
    out = check((4, 6, 2, 1, 32, 70, [0, 30, 0, 50], [0, 30, 70, 20], [0, 28, 8, 30], window), BF16)
    assert (out[[0, 1, 3]] == 0).all()
    assert (out[2] != 0).any()


@every_level
def test_window_that_leaves_the_range(level, use):
    """The first queries' windows end before the range begins; the last queries' windows reach into it."""
    use(level)
    out = check((1, 80, 1, 1, 16, 200, [100], [200], [20], 3), FP32)
    assert (out[0, :77] == 0).all()
    assert (out[0, 77:] != 0).any(-1).all()


@pytest.mark.parametrize("slot", [-500, 500])
def test_window_outside_the_buffer(slot):
    assert (check((1, 5, 1, 1, 16, 40, [0], [40], [slot], 8), FP32) == 0).all()


@every_level
def test_one_valid_slot_is_returned_as_it_is(level, use):
    use(level)
    for dtype in (BF16, FP32):
        poisoned, _ = inputs((2, 7, 2, 2, 32, 90, [40, 89], [41, 90], [0, 80], None), dtype)
        out = compiled.attention(*poisoned)
        for row, j in enumerate((40, 89)):
            assert torch.equal(out[row], poisoned[2][row, j].expand_as(out[row]))


@every_level
def test_extreme_scores(level, use):
    use(level)
    (q, keys, values, *rest), _ = inputs(SHAPES["block"], FP32)
    # The best slot takes all the weight, however far below 0 the others, or all scores, are.
    for factor in (1e6, -1e18):
        out = compiled.attention(q * factor, keys, values, *rest)
        best = torch.einsum("bthd,bshd->bhts", q.double() * factor, keys.double()).argmax(-1)  # [1, H, T]
        expected = values[0, best[0].T, torch.arange(4)]
        torch.testing.assert_close(out[0], expected, rtol=0, atol=1e-6)
    # NaN and infinite inputs show in the result.
    q[0, 0, 0, 0] = float("nan")
    out = compiled.attention(q, keys, values, *rest)
    assert out[0, 0, 0].isnan().all() and out[0, 1:].isfinite().all()


def test_scale_and_defaults():
    (q, keys, values, *_), _ = inputs(SHAPES["block"], BF16)
    wide = [x.double() for x in (q, keys, values)]
    zero = torch.zeros(1, dtype=torch.int64)
    eager = reference.attention(q, keys, values, zero, zero + 200, zero, scale=0.3)
    truth = reference.attention(*wide, zero, zero + 200, zero, scale=0.3)
    assert_as_exact(compiled.attention(q, keys, values, scale=0.3), eager, truth)
    full = compiled.attention(q, keys, values, zero, zero + 200, zero)
    assert torch.equal(compiled.attention(q, keys, values), full)


@pytest.mark.parametrize("name", ["block", "long-ragged", "dim-33"])
def test_any_strides_but_the_last(name):
    poisoned, _ = inputs(SHAPES[name], BF16)
    permuted = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in poisoned[:3]]
    odd = [torch.nn.functional.pad(x, (1, 2))[..., 1:-2] for x in poisoned[:3]]  # rows at odd addresses
    for tensors in (permuted, odd):
        assert torch.equal(compiled.attention(*tensors, *poisoned[3:]), compiled.attention(*poisoned))


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(data, use):
    draw = data.draw
    use(draw(st.sampled_from(compiled.levels()), "level"))
    batch, slots = draw(st.integers(1, 3), "batch"), draw(st.integers(1, 300), "slots")
    queries = draw(st.integers(1, min(slots, 120)), "queries")
    kv_heads, group = draw(st.integers(1, 2), "kv heads"), draw(st.sampled_from([1, 2, 3]), "group")
    per_row = st.lists(st.integers(0, slots), min_size=batch, max_size=batch)
    slot = st.lists(st.integers(0, slots - queries), min_size=batch, max_size=batch)
    shape = (
        *(batch, queries, kv_heads * group, kv_heads, draw(st.integers(1, 70), "head dim"), slots),
        *(draw(per_row, "start"), draw(per_row, "end"), draw(slot, "slot")),
        draw(st.none() | st.integers(0, slots), "window"),
    )
    if draw(st.sampled_from([BF16, FP32]), "dtype") == BF16:
        check(shape, BF16, range(8))
    else:
        # A row's error in fp32 is that of its few largest scores, so the largest of some draws is luck: 3.5 times
        # PyTorch's in 8 of them, half of it in the next 8. The average of a thousand numbers is not.
        numbers = batch * queries * shape[2] * shape[4]
        check(shape, FP32, range(max(8, 1000 // numbers)), assert_as_exact_on_average)


@every_level
@pytest.mark.parametrize("name", ["few-rows", "block", "block-left-padded", "long", "dim-300"])
def test_sums_are_made_in_stretches(name, level, use):
    """One sum over the head, or over a tile of slots, has up to 1.5 times PyTorch's error in fp32."""
    use(level)
    few_rows = (4, 1, 4, 4, 128, 16, [0] * 4, [16] * 4, [3] * 4, None)
    judge = functools.partial(assert_as_exact_on_average, times=1.2)
    check(SHAPES.get(name, few_rows), FP32, range(16), judge)


@pytest.mark.parametrize("name", ["block-left-padded", "gqa-4-rows-past-a-tile", "long", "window-64", "dim-300"])
def test_threads_change_nothing(name):
    poisoned, _ = inputs(SHAPES[name], BF16)
    before = torch.get_num_threads()
    outs = []
    try:
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            outs.append(compiled.attention(*poisoned))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(outs[0], out) for out in outs[1:])


@pytest.mark.parametrize("empty", ["batch", "queries", "slots"])
def test_empty(empty):
    batch, queries, slots = (0 if empty == name else 2 for name in ("batch", "queries", "slots"))
    buffer = torch.randn(batch, slots, 1, 16)
    out = compiled.attention(torch.randn(batch, queries, 2, 16), buffer, buffer)
    assert out.shape == (batch, queries, 2, 16)
    assert (out == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 4, 2, 16, dtype=torch.float16)}, "q is torch.float16"),
        ({"q": torch.zeros(2, 4, 16)}, r"q is torch.float32 \[2, 4, 16\]"),
        ({"q": torch.zeros(2, 4, 2, 32)[..., ::2]}, "q is .* strides .*last dimension"),
        ({"keys": torch.zeros(2, 9, 2, 16).bfloat16()}, "keys is torch.bfloat16"),
        ({"keys": torch.zeros(2, 9, 3, 16)}, r"keys.shape=\(2, 9, 3, 16\)"),
        ({"values": torch.zeros(2, 8, 2, 16)}, r"values is torch.float32 \[2, 8, 2, 16\]"),
        ({"start": torch.zeros(3, dtype=torch.int64)}, r"start is torch.int64 \[3\]"),
        ({"end": torch.zeros(2)}, "end is torch.float32"),
        ({"slot": torch.zeros(4, dtype=torch.int64)[::2]}, "slot is .* strides"),
        ({"window": -1}, "window=-1"),
        ({"scale": 0.0}, "scale=0.0"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_refused(change, message):
    rows = torch.zeros(2, dtype=torch.int64)
    good = {"q": torch.zeros(2, 4, 2, 16), "keys": torch.zeros(2, 9, 2, 16), "values": torch.zeros(2, 9, 2, 16)}
    good |= {"start": rows, "end": rows, "slot": rows}
    with pytest.raises(ValueError, match=message):
        compiled.attention(**(good | change))


def test_opcheck():
    poisoned, _ = inputs(SHAPES["block-at-the-end-of-a-window"], BF16)
    torch.library.opcheck(compiled.attention, poisoned)
    torch.library.opcheck(compiled.attention, poisoned[:3])


def test_compiles_whole():
    poisoned, _ = inputs(SHAPES["gqa-2"], BF16)
    whole = torch.compile(lambda q, *rest: compiled.attention(q * 2, *rest) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(whole(*poisoned), compiled.attention(poisoned[0] * 2, *poisoned[1:]) + 1)


FORKED = """
import os, torch
from dllm_fast.cpu import compiled

torch.set_num_threads(2)
q = torch.randn(1, 64, 4, 32)
parent = compiled.attention(q, q, q)
if os.fork() == 0:  # the parent's second thread is not here
    os._exit(0 if torch.equal(compiled.attention(q, q, q), parent) else 1)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
print("forked")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_goes_on():
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.stdout.strip() == "forked", done.stderr
