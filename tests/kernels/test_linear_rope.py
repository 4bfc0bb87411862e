"""`kernels.linear_rope`: the bits of a matmul and a rotation, in one kernel."""

import pytest
import torch
from truth import assert_as_exact

from dllm_fast.kernels import linear_rope as fused
from dllm_fast.kernels import reference, reference_rounded
from dllm_fast.kernels.linear import linear
from dllm_fast.kernels.linear_int4 import linear_int4
from dllm_fast.kernels.linear_rope import fits_rope, linear_int4_rope, linear_rope
from dllm_fast.kernels.rope import rope
from dllm_fast.kernels.tiles import counters

BF16, FP16 = torch.bfloat16, torch.float16
# batch, rows, heads, kv heads, head dim, width, positions, slots, [position], [slot]. The interpreter has 4 programs:
# tiles of one program, of two, of all.
SHAPES = {
    "one-row": (1, 1, 1, 1, 128, 256, 3, 2, [2], [1]),
    "block": (1, 7, 2, 2, 128, 128, 40, 40, [20], [20]),
    "left-padded": (2, 5, 2, 2, 64, 640, 30, 20, [-3, 5], [0, 13]),
    "gqa": (3, 3, 4, 1, 128, 128, 9, 12, [0, 4, 6], [9, 0, 5]),
    "gqa-of-short-heads": (2, 17, 6, 2, 64, 256, 40, 40, [3, 1], [9, 23]),
    "dim-32": (1, 3, 8, 4, 32, 128, 9, 12, [1], [3]),
    "past-the-table": (1, 6, 2, 2, 64, 128, 4, 12, [1], [3]),
    "outside": (3, 6, 2, 2, 64, 128, 40, 12, [1, 0, 2], [-4, 9, 12]),
    "most-rows": (2, 32, 2, 2, 64, 128, 40, 40, [0, 8], [0, 8]),
}
CASES = [(name, kind) for name in SHAPES for kind in ("bf16", "e4m3", "int4")]
CASES += [("gqa-of-short-heads", f"{kind}fp16") for kind in ("", "e4m3-", "int4-")]


def inputs(name, dtype, device):
    """x, a weight in fp32, and what is rotated by and into: tables, positions, slots, random buffers."""
    batch, rows, heads, kv_heads, dim, width, positions, slots, position, slot = SHAPES[name]
    make = torch.Generator().manual_seed(0)
    x = torch.randn(batch, rows, width, generator=make).to(dtype).to(device)
    weight = torch.randn((heads + 2 * kv_heads) * dim, width, generator=make) * width**-0.5
    buffers = torch.randn(2, batch, slots, kv_heads, dim, generator=make).to(dtype).to(device)
    at = [torch.tensor(start, dtype=torch.int64, device=device) for start in (position, slot)]
    return x, weight, [*reference.rope_table(positions, dim, 1e4, device), *at, *buffers]


def weights(kind, weight, dtype, device):
    """One kernel's arguments, the two others', what they are in fp64, and whether they are in four bits."""
    if kind.startswith("int4"):
        four_bits = [part.to(device) for part in reference_rounded.round_int4(weight)]
        return four_bits, (reference_rounded.widen_int4(*four_bits, weight.shape[1]), None), True
    if kind.startswith("e4m3"):
        copy, scale = (part.to(device) for part in reference_rounded.round_rows(weight))
        return [copy, scale[:, 0].contiguous()], (copy, scale[:, 0]), False
    weight = weight.to(dtype).to(device)
    return [weight, None], (weight, None), False


def apart(y, rotate, rope_inputs):
    """q, from what a matmul made and ``rotate`` after it; the buffers are written."""
    kv_heads, head_dim = rope_inputs[4].shape[2:]
    heads = y.unflatten(-1, (-1, head_dim))
    return rotate(*heads.split((heads.shape[2] - 2 * kv_heads, kv_heads, kv_heads), 2), *rope_inputs)


def copied(rope_inputs, wide=False):
    """With buffers of their own; in fp64 if ``wide``."""
    return [*rope_inputs[:4], *(part.double() if wide else part.clone() for part in rope_inputs[4:])]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_bits_of_two_kernels(name, kind, device):
    dtype = FP16 if "fp16" in kind else BF16
    x, weight, mine = inputs(name, dtype, device)
    given, exact, four_bits = weights(kind, weight, dtype, device)
    others, truths, eager = copied(mine), copied(mine, wide=True), copied(mine)

    q = (linear_int4_rope if four_bits else linear_rope)(x, *given, *mine)
    expected = apart((linear_int4 if four_bits else linear)(x, *given), rope, others)
    assert q.is_contiguous() and torch.equal(q, expected)
    assert torch.equal(mine[4], others[4])
    assert torch.equal(mine[5], others[5])

    scale = None if exact[1] is None else exact[1].double()
    truth = apart(reference.linear(x.double(), exact[0].double(), scale), reference.rope, truths)
    eagerly = apart(reference.linear(x, *exact), reference.rope, eager)
    assert_as_exact(q, eagerly, truth, ulps=2)
    assert_as_exact(mine[4], eager[4], truths[4], ulps=2)
    assert_as_exact(mine[5], eager[5], truths[5], ulps=2)


def test_int32_rows(device):
    x, weight, mine = inputs("gqa", BF16, device)
    weight = weight.to(BF16).to(device)
    others = copied(mine)
    others[2:4] = [start.int() for start in others[2:4]]
    assert torch.equal(linear_rope(x, weight, None, *mine), linear_rope(x, weight, None, *others))
    assert torch.equal(mine[4], others[4]) and torch.equal(mine[5], others[5])


def test_infinity_stays_what_it_is(device):
    """Of v, which is not turned: by an angle of 0 it would become NaN."""
    x, weight, mine = inputs("left-padded", BF16, device)
    weight = weight.to(BF16).to(device)
    others = copied(mine)
    x[1, 2, 0] = float("inf")
    q, expected = linear_rope(x, weight, None, *mine), apart(linear(x, weight), rope, others)
    for found, other in ((q, expected), (mine[4], others[4]), (mine[5], others[5])):
        assert torch.equal(found.nan_to_num(7), other.nan_to_num(7))
    assert mine[5][1, 15].isinf().all() and not mine[5].isnan().any()


def test_rows_that_are_apart(device):
    """x as one layer's slice of something wider, and counts that are kept."""
    x, weight, mine = inputs("left-padded", BF16, device)
    weight, others = weight.to(BF16).to(device), copied(mine)
    wide = torch.full((2, 5, 2, 640), float("nan"), dtype=BF16, device=device)
    wide[:, :, 1] = x
    kept = torch.zeros(8, dtype=torch.int32, device=device)
    with counters(kept):
        for _ in range(2):
            q = linear_rope(wide[:, :, 1], weight, None, *mine)
            assert not kept.any()
    assert torch.equal(q, linear_rope(x, weight, None, *others))
    assert torch.equal(mine[4], others[4]) and torch.equal(mine[5], others[5])


def test_what_fits(device, monkeypatch):
    def fits(name, four_bits=False, **changed):
        x, weight, given = inputs(name, BF16, device)
        names = ("cos", "sin", "position", "slot", "keys", "values")
        given = dict(zip(names, given, strict=True)) | changed
        return fits_rope(x, weight.byte() if four_bits else weight.to(BF16), **given)

    assert all(fits(name) and fits(name, four_bits=True) for name in SHAPES)
    assert not fits("block", keys=None, values=None)  # nothing to write to
    assert not fits("block", slot=None) and not fits("block", position=None)
    strided = torch.zeros(1, 40, 4, 128, dtype=BF16, device=device)[:, :, ::2]
    assert not fits("block", values=strided)
    for heads, dim in ((3, 64), (1, 96), (1, 256), (2, 40)):  # tiles that hold k and v, or no whole head
        kept = torch.zeros(1, 40, heads, dim, dtype=BF16, device=device)
        assert not fits("block", keys=kept, values=kept)
    wide = torch.zeros(2, 40, 2, 128, dtype=BF16, device=device)
    assert fits("most-rows", keys=wide, values=wide)
    assert not fits("most-rows", four_bits=True, keys=wide, values=wide)  # its tiles are half a head
    monkeypatch.setattr(fused, "ROPE", ())
    assert not fits("block")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(5, 640, dtype=BF16), r"x is torch.bfloat16 \[5, 640\]"),
        ("x", torch.zeros(2, 33, 640, dtype=BF16), r"x is \[2, 33, 640\].*up to 64 rows"),
        ("x", torch.zeros(2, 5, 512, dtype=BF16), r"weight is torch.bfloat16 \[384, 640\]"),
        ("weight", torch.zeros(256, 640, dtype=BF16), r"keys \[2, 20, 2, 64\]"),
        ("cos", torch.zeros(30, 16), r"cos is torch.float32 \[30, 16\]"),
        ("sin", torch.zeros(29, 32), r"sin is torch.float32 \[29, 32\]"),
        ("position", torch.zeros(2), "position is torch.float32"),
        ("slot", torch.zeros(1, dtype=torch.int64), r"slot is torch.int64 \[1\]"),
        ("keys", torch.zeros(2, 20, 2, 64, dtype=FP16), "keys is torch.float16"),
        ("values", torch.zeros(2, 19, 2, 64, dtype=BF16), r"values is torch.bfloat16 \[2, 19, 2, 64\]"),
    ],
)
def test_refused(name, value, message):
    x, weight, mine = inputs("left-padded", BF16, "cpu")
    names = ("x", "weight", "scale", "cos", "sin", "position", "slot", "keys", "values")
    good = dict(zip(names, (x, weight.to(BF16), None, *mine), strict=True))
    with pytest.raises(ValueError, match=message):
        linear_rope(**(good | {name: value}))


def test_a_table_without_positions():
    x, weight, mine = inputs("left-padded", BF16, "cpu")
    with pytest.raises(ValueError, match=r"cos \[0, 32\].*a position"):
        linear_rope(x, weight.to(BF16), None, mine[0][:0], mine[1][:0], *mine[2:])


def test_ops(device):
    x, weight, mine = inputs("left-padded", BF16, device)
    torch.library.opcheck(linear_rope, (x, weight.to(BF16).to(device), None, *mine))
    torch.library.opcheck(linear_int4_rope, (x, *weights("int4", weight, BF16, device)[0], *mine))
