import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from truth import assert_as_exact, far_apart

from dllm_fast.kernels import reference
from dllm_fast.kernels.rope import rope

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# batch, rows, heads, kv heads, head dim, positions, slots, [position], [slot]
SHAPES = {
    "one-row": (1, 1, 1, 1, 16, 3, 2, [2], [1]),
    "block": (1, 8, 4, 4, 128, 40, 40, [20], [20]),
    "left-padded": (2, 7, 2, 2, 64, 30, 20, [-3, 5], [0, 13]),
    "gqa": (2, 3, 8, 2, 32, 9, 12, [0, 4], [9, 0]),
    "more-kv-heads-than-a-tile": (1, 2, 1, 17, 64, 9, 12, [0], [3]),
    "dim-40": (1, 5, 3, 1, 40, 9, 12, [1], [3]),
    "dim-2": (1, 5, 2, 1, 2, 9, 12, [1], [3]),
    "past-the-table": (1, 6, 2, 2, 16, 4, 12, [1], [3]),
    "slots-before-the-buffer": (2, 6, 2, 2, 16, 40, 12, [1, 0], [-4, -10]),
    "slots-past-the-buffer": (2, 6, 2, 2, 16, 40, 12, [1, 0], [9, 100]),
    "whole-sequence": (1, 33, 2, 1, 16, 40, 33, [0], [0]),
}


def inputs(shape, dtype, device, seed=0):
    """q, k and v, unbound from one projection if the head counts allow; the tables; random buffers."""
    batch, rows, heads, kv_heads, dim, positions, slots, position, slot = shape
    make = torch.Generator().manual_seed(seed)
    packed = torch.randn(batch, rows, heads + 2 * kv_heads, dim, generator=make).to(dtype).to(device)
    buffers = torch.randn(2, batch, slots, kv_heads, dim, generator=make).to(dtype).to(device)
    at = [torch.tensor(x, dtype=torch.int64, device=device) for x in (position, slot)]
    tables = reference.rope_table(positions, dim, 1e4, device)
    return (*packed.split((heads, kv_heads, kv_heads), 2), *tables, *at, *buffers)


def wide(arguments):
    return [x.double() if x.is_floating_point() else x for x in arguments]


def check(shape, dtype, device, seed=0):
    mine, eager = inputs(shape, dtype, device, seed), inputs(shape, dtype, device, seed)
    exact = wide(mine)
    truth, expected = reference.rope(*exact), reference.rope(*eager)
    out = rope(*mine)
    assert out.is_contiguous()
    assert_as_exact(out, expected, truth, ulps=2)
    assert_as_exact(mine[7], eager[7], exact[7], ulps=2)
    assert torch.equal(mine[8], eager[8])
    first, j = mine[6][:, None], torch.arange(shape[6], device=device)
    untouched = (j < first) | (j >= first + shape[1])
    assert torch.equal(mine[7][untouched], inputs(shape, dtype, device, seed)[7][untouched])


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_reference(name, dtype, device):
    check(SHAPES[name], dtype, device)


def test_fp16(device):
    check(SHAPES["gqa"], FP16, device)


def test_int32_rows(device):
    *tensors, position, slot, keys, values = inputs(SHAPES["gqa"], BF16, device)
    keys32, values32 = keys.clone(), values.clone()
    out = rope(*tensors, position, slot, keys, values)
    assert torch.equal(out, rope(*tensors, position.int(), slot.int(), keys32, values32))
    assert torch.equal(keys, keys32)
    assert torch.equal(values, values32)


def test_permuted_buffers(device):
    """Head-major buffers, and slices of one allocation for all layers, are written through their strides."""
    *tensors, keys, values = inputs(SHAPES["gqa"], BF16, device)
    permuted = torch.stack((keys, values), 3).permute(3, 0, 2, 1, 4).contiguous().transpose(2, 3)
    out = rope(*tensors, keys, values)
    assert torch.equal(out, rope(*tensors, *permuted))
    assert torch.equal(keys, permuted[0])
    assert torch.equal(values, permuted[1])


def test_past_2_to_the_31(device):
    arguments = inputs((2, 3, 2, 1, 16, 9, 5, [0, 4], [0, 2]), BF16, device)
    q, k, v, *tables, keys, values = (far_apart(x) if x.dim() == 4 else x for x in arguments)
    assert torch.equal(rope(q, k, v, *tables, keys, values), rope(*arguments))
    assert torch.equal(keys, arguments[7])
    assert torch.equal(values, arguments[8])


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(device, data):
    draw = data.draw
    batch, rows, slots = (draw(st.integers(1, top), name) for top, name in ((3, "batch"), (6, "rows"), (9, "slots")))
    kv_heads, group = draw(st.integers(1, 3), "kv heads"), draw(st.sampled_from([1, 2, 4]), "group")
    per_row = st.lists(st.integers(-9, 12), min_size=batch, max_size=batch)
    shape = (batch, rows, kv_heads * group, kv_heads, 2 * draw(st.integers(1, 40), "half"))
    shape += (draw(st.integers(1, 12), "positions"), slots, draw(per_row, "position"), draw(per_row, "slot"))
    check(shape, draw(st.sampled_from([BF16, FP32]), "dtype"), device, seed=draw(st.integers(0, 99), "seed"))


@pytest.mark.parametrize("empty", ["batch", "rows", "slots"])
def test_empty(empty, device):
    batch, rows, slots = (0 if empty == name else 2 for name in ("batch", "rows", "slots"))
    q, k, v, *rest = inputs((batch, rows, 2, 1, 16, 4, slots, [0] * batch, [0] * batch), FP32, device)
    assert rope(q, k, v, *rest).shape == q.shape


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("q", torch.zeros(2, 3, 8, 32, dtype=torch.float64), "q is torch.float64"),
        ("q", torch.zeros(2, 3, 32), r"q is torch.float32 \[2, 3, 32\]"),
        ("q", torch.zeros(2, 3, 8, 64)[..., ::2], r"q is .* strides \(1536, 512, 64, 2\) .*last dimension contiguous"),
        ("q", torch.zeros(2, 3, 8, 31), "31.*head dim"),
        ("k", torch.zeros(2, 3, 2, 32).half(), "k is torch.float16"),
        ("k", torch.zeros(2, 4, 2, 32), r"k is torch.float32 \[2, 4, 2, 32\]"),
        ("v", torch.zeros(2, 3, 1, 32), r"v is torch.float32 \[2, 3, 1, 32\]"),
        ("cos", torch.zeros(9, 15), r"cos is torch.float32 \[9, 15\]"),
        ("cos", torch.zeros(0, 16), r"cos is \[0, 16\]: it holds no position"),
        ("sin", torch.zeros(8, 16), r"sin is torch.float32 \[8, 16\]"),
        ("sin", torch.zeros(9, 16).double(), "sin is torch.float64"),
        ("position", torch.zeros(2), "position is torch.float32"),
        ("slot", torch.zeros(1, dtype=torch.int64), r"slot is torch.int64 \[1\]"),
        ("keys", torch.zeros(2, 12, 3, 32), r"keys is torch.float32 \[2, 12, 3, 32\]"),
        ("values", torch.zeros(2, 11, 2, 32), r"values is torch.float32 \[2, 11, 2, 32\]"),
    ],
    ids=lambda x: x if isinstance(x, str) and x.isalpha() else "",
)
def test_refused(name, value, message):
    names = ("q", "k", "v", "cos", "sin", "position", "slot", "keys", "values")
    good = dict(zip(names, inputs(SHAPES["gqa"], FP32, "cpu"), strict=True))
    with pytest.raises(ValueError, match=message):
        rope(**(good | {name: value}))


def test_opcheck(device):
    torch.library.opcheck(rope, inputs(SHAPES["left-padded"], BF16, device))


def test_compiles_whole(device):
    """Later operations of the compiled graph see the buffers' new contents too."""
    mine, eager = inputs(SHAPES["gqa"], BF16, device), inputs(SHAPES["gqa"], BF16, device)

    def step(*arguments):
        return rope(*arguments), arguments[7] + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for out, expected in zip(compiled(*mine), step(*eager), strict=True):
        assert torch.equal(out, expected)
    assert torch.equal(mine[8], eager[8])
