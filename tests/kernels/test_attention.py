import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from truth import assert_as_exact, average_ulps, far_apart

import dllm_fast.kernels.attention as module
from dllm_fast.kernels import reference
from dllm_fast.kernels.attention import attention

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# batch, queries, heads, kv heads, head dim, slots, [start], [end], [slot], window
SHAPES = {
    "one-query": (1, 1, 1, 1, 32, 5, [0], [5], [4], None),
    "block-mha": (1, 32, 4, 4, 128, 200, [0], [200], [150], None),
    "block-left-padded": (2, 8, 2, 2, 64, 100, [17, 0], [100, 99], [60, 60], None),
    "block-right-padded": (2, 8, 2, 2, 64, 129, [0, 0], [65, 128], [9, 100], None),
    "gqa-2": (2, 5, 4, 2, 32, 70, [3, 0], [66, 70], [65, 1], None),
    "gqa-4-rows-past-a-tile": (1, 17, 8, 2, 16, 90, [0], [90], [30], None),
    "gqa-8": (1, 3, 8, 1, 64, 67, [1], [67], [0], None),
    "gqa-3": (1, 23, 6, 2, 32, 40, [1], [39], [0], None),
    "dim-40": (2, 9, 2, 1, 40, 75, [0, 70], [75, 75], [0, 66], None),
    "dim-96": (1, 4, 2, 2, 96, 70, [5], [70], [66], None),
    "dim-1": (1, 4, 2, 2, 1, 20, [0], [20], [0], None),
    "dim-256": (1, 4, 1, 1, 256, 70, [5], [70], [66], None),
    "long": (1, 130, 1, 1, 64, 260, [0], [260], [0], None),
    "long-ragged": (2, 67, 2, 1, 16, 131, [0, 40], [101, 131], [0, 0], None),
    "long-gqa-dim-96": (1, 65, 4, 1, 96, 129, [0], [129], [59], None),
    "window-5": (2, 40, 2, 2, 32, 80, [0, 3], [80, 71], [0, 10], 5),
    "window-0": (1, 9, 2, 1, 16, 9, [0], [9], [0], 0),
    "window-past-everything": (1, 6, 2, 1, 16, 33, [2], [30], [11], 2**40),
    "window-64": (1, 66, 1, 1, 64, 200, [0], [200], [50], 64),
    "block-at-the-end-of-a-window": (1, 8, 2, 2, 32, 150, [0], [150], [142], 9),
    "range-wider-than-the-buffer": (1, 4, 1, 1, 16, 10, [-3], [99], [3], None),
}


def inputs(shape, dtype, device, seed=0):
    """q, a slice of a wider projection, and buffers with NaN in every slot outside the row's range."""
    batch, queries, heads, kv_heads, dim, slots, start, end, slot, window = shape
    make = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, queries, heads + 2, dim, generator=make).to(device, dtype)[:, :, 1 : heads + 1]
    buffers = torch.randn(2, batch, slots, kv_heads, dim, generator=make).to(dtype)
    rows = [torch.tensor(row, dtype=torch.int64) for row in (start, end, slot)]
    j = torch.arange(slots)
    valid = (j >= rows[0][:, None]) & (j < rows[1][:, None])
    clean = buffers.masked_fill(~valid[None, :, :, None, None], 0.0)
    buffers.masked_fill_(~valid[None, :, :, None, None], float("nan"))
    buffers, clean, *rows = (x.to(device) for x in (buffers, clean, *rows))
    return (q, *buffers, *rows, window), (q, *clean, *rows, window)


def check(shape, dtype, device, seed=0, **options):
    poisoned, clean = inputs(shape, dtype, device, seed)
    truth = reference.attention(*(x.double() for x in clean[:3]), *clean[3:], **options)
    out = attention(*poisoned, **options)
    assert out.is_contiguous()
    # fp32 results are not rounded at the end, so an average's error is on the scale of its values.
    size = clean[2].abs().max().item() if dtype == FP32 else None
    assert_as_exact(out, reference.attention(*clean, **options), truth, average_ulps(out), size)
    return out


@pytest.mark.parametrize("name", SHAPES)
def test_reference(name, device):
    check(SHAPES[name], BF16, device)


@pytest.mark.parametrize("name", ["one-query", "block-left-padded", "gqa-3", "dim-40", "long-ragged", "window-5"])
def test_fp32(name, device):
    check(SHAPES[name], FP32, device)


@pytest.mark.parametrize("name", ["block-left-padded", "window-5"])
def test_fp16_and_int32_rows(name, device):
    out = check(SHAPES[name], FP16, device)
    *tensors, start, end, slot, window = inputs(SHAPES[name], FP16, device)[0]
    assert torch.equal(out, attention(*tensors, start.int(), end.int(), slot.int(), window))


@pytest.mark.parametrize("name", ["block-right-padded", "long", "long-gqa-dim-96"])
def test_tiles_of_smaller_chips(name, device, monkeypatch):
    small = {(size, dim, big): module.CONFIGS[size, dim, False] for size, dim, big in module.CONFIGS}
    monkeypatch.setattr(module, "CONFIGS", small)
    check(SHAPES[name], BF16, device)


@pytest.mark.parametrize(
    ("name", "splits", "dtype"),
    [
        *(("gqa-2", splits, dtype) for splits in (2, 5) for dtype in (BF16, FP32)),
        ("block-right-padded", 3, BF16),
        ("long-gqa-dim-96", 2, BF16),
        ("window-0", 2, FP32),
        ("dim-40", 4, BF16),
        ("dim-1", 2, FP32),
    ],
)
def test_split_over_slots(name, splits, dtype, device, monkeypatch):
    split_over(splits, monkeypatch)
    split = check(SHAPES[name], dtype, device)
    split_over(1, monkeypatch)
    whole = check(SHAPES[name], dtype, device)
    torch.testing.assert_close(split, whole, rtol=0, atol=4 * torch.finfo(dtype).eps * whole.abs().max().item())


def split_over(splits, monkeypatch):
    plan = module._plan
    monkeypatch.setattr(module, "_plan", lambda *shape: (*plan(*shape)[:2], splits))


def test_plan_fills_the_machine_from_shapes():
    def programs(batch, queries, slots, window=None):
        config, _, splits = module._plan(batch, queries, 32, 1, 128, slots, window, 2, True)
        return batch * 32 * -(-queries // config[0]) * splits, splits

    assert programs(1, 32, 2048) == (256, 8)
    assert programs(8, 32, 2048) == (256, 1)
    assert programs(1, 32, 300) == (64, 2)
    assert programs(1, 2048, 2048) == (512, 1)
    assert programs(1, 128, 2048) == (128, 4)
    assert programs(1, 32, 2048, window=64) == (32, 1)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("window", [None, 4])
def test_queries_that_see_nothing_get_zero(window, splits, device, monkeypatch):
    split_over(splits, monkeypatch)
    # Rows with ranges empty at 0, empty inside and reversed, and between them a full row.
    shape = (4, 6, 2, 1, 32, 70, [0, 30, 0, 50], [0, 30, 70, 20], [0, 28, 8, 30], window)
    out = check(shape, BF16, device)
    assert (out[[0, 1, 3]] == 0).all()
    assert (out[2] != 0).any()


def test_window_that_leaves_the_range(device):
    """The first queries' windows end before the range begins; the last queries' windows reach into it."""
    out = check((1, 80, 1, 1, 16, 200, [100], [200], [20], 3), FP32, device)
    assert (out[0, :77] == 0).all()
    assert (out[0, 77:] != 0).any(-1).all()


@pytest.mark.parametrize("slot", [-500, 500])
def test_window_outside_the_buffer(slot, device):
    assert (check((1, 5, 1, 1, 16, 40, [0], [40], [slot], 8), FP32, device) == 0).all()


def test_one_valid_slot_is_returned_as_it_is(device):
    poisoned, _ = inputs((2, 7, 2, 2, 32, 90, [40, 89], [41, 90], [0, 80], None), BF16, device)
    out = attention(*poisoned)
    values = poisoned[2]
    for row, j in enumerate((40, 89)):
        assert torch.equal(out[row], values[row, j].expand_as(out[row]))


def test_large_scores(device):
    poisoned, _ = inputs(SHAPES["block-mha"], FP32, device)
    out = attention(poisoned[0] * 1e4, *poisoned[1:])
    assert out.isfinite().all()


def test_scale(device):
    check(SHAPES["block-left-padded"], BF16, device, scale=0.3)


@pytest.mark.parametrize("name", ["block-mha", "long-ragged"])
def test_permuted_buffers(name, device):
    """Head-major buffers: any strides work if the head dim is contiguous."""
    poisoned, _ = inputs(SHAPES[name], BF16, device)
    permuted = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in poisoned[:3]]
    assert torch.equal(attention(*permuted, *poisoned[3:]), attention(*poisoned))


def test_past_2_to_the_31(device):
    poisoned, _ = inputs((2, 3, 1, 1, 16, 5, [0, 0], [5, 5], [0, 0], None), BF16, device)
    far = [far_apart(x) for x in poisoned[:3]]
    assert torch.equal(attention(*far, *poisoned[3:]), attention(*poisoned))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(device, data):
    draw = data.draw
    batch, slots = draw(st.integers(1, 3), "batch"), draw(st.integers(1, 150), "slots")
    queries = draw(st.integers(1, min(slots, 80)), "queries")
    kv_heads, group = draw(st.integers(1, 2), "kv heads"), draw(st.sampled_from([1, 2, 4]), "group")
    per_row = st.lists(st.integers(0, slots), min_size=batch, max_size=batch)
    slot = st.lists(st.integers(0, slots - queries), min_size=batch, max_size=batch)  # a block anywhere inside
    shape = (
        *(batch, queries, kv_heads * group, kv_heads, draw(st.sampled_from([16, 24, 32, 64]), "head dim"), slots),
        *(draw(per_row, "start"), draw(per_row, "end"), draw(slot, "slot")),
        draw(st.none() | st.integers(0, slots), "window"),
    )
    check(shape, draw(st.sampled_from([BF16, FP32]), "dtype"), device, seed=draw(st.integers(0, 99), "seed"))


@pytest.mark.parametrize("empty", ["batch", "queries", "slots"])
def test_empty(empty, device):
    batch, queries, slots = (0 if empty == name else 2 for name in ("batch", "queries", "slots"))
    buffer = torch.randn(batch, slots, 1, 16, device=device)
    rows = torch.zeros(batch, dtype=torch.int64, device=device)
    out = attention(torch.randn(batch, queries, 2, 16, device=device), buffer, buffer, rows, rows + slots, rows)
    assert out.shape == (batch, queries, 2, 16)
    assert (out == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 4, 2, 16, dtype=torch.float64)}, "q is torch.float64"),
        ({"q": torch.zeros(2, 4, 16)}, r"q is torch.float32 \[2, 4, 16\]"),
        ({"q": torch.zeros(2, 4, 2, 32)[..., ::2]}, r"q is .* strides \(256, 64, 32, 2\) .*last dimension contiguous"),
        ({"q": torch.zeros(2, 4, 2, 257)}, "257.*head dim"),
        ({"keys": torch.zeros(2, 9, 2, 16).bfloat16()}, "keys is torch.bfloat16"),
        ({"keys": torch.zeros(2, 9, 3, 16)}, r"keys is \[2, 9, 3, 16\].* q, \[2, 4, 2, 16\]"),
        ({"keys": torch.zeros(2, 9, 2, 15)}, r"keys is torch.float32 \[2, 9, 2, 15\] .*expected .*\[2, any, any, 16\]"),
        ({"values": torch.zeros(2, 8, 2, 16)}, r"values is torch.float32 \[2, 8, 2, 16\]"),
        ({"start": torch.zeros(3, dtype=torch.int64)}, r"start is torch.int64 \[3\]"),
        ({"end": torch.zeros(2)}, "end is torch.float32"),
        ({"slot": torch.zeros(4, dtype=torch.int64)[::2]}, r"slot is .* strides \(2,\) .*contiguous"),
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
        attention(**(good | change))


def test_opcheck(device):
    poisoned, _ = inputs(SHAPES["block-at-the-end-of-a-window"], BF16, device)
    torch.library.opcheck(attention, poisoned)


def test_compiles_whole(device):
    poisoned, _ = inputs(SHAPES["gqa-2"], BF16, device)
    compiled = torch.compile(lambda q, *rest: attention(q * 2, *rest) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*poisoned), attention(poisoned[0] * 2, *poisoned[1:]) + 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="one device only")
def test_refuses_two_devices():
    q, buffer = torch.zeros(2, 4, 2, 16, device="cuda"), torch.zeros(2, 9, 2, 16, device="cuda")
    rows = torch.zeros(2, dtype=torch.int64, device="cuda")
    with pytest.raises(ValueError, match=r"slot is .* on cpu"):
        attention(q, buffer, buffer, rows, rows, rows.cpu())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_graph_replays_with_other_ranges():
    q, keys, values, start, end, slot, window = inputs(SHAPES["block-mha"], BF16, "cuda")[0]
    attention(q, keys, values, start, end, slot, window)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(q, keys, values, start, end, slot, window)
    start.fill_(40)
    end.fill_(77)
    graph.replay()
    assert torch.equal(out, attention(q, keys, values, start, end, slot, window))
