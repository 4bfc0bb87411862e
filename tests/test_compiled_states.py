"""Queries of states in the compiled attention, on every instruction set that this CPU has, against the fp64
definition."""

import itertools

import packs
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_compiled import assert_as_exact, assert_as_exact_on_average, judged

from dllm_fast import ops
from dllm_fast.cpu import compiled
from dllm_fast.families.rows import Packed, States
from dllm_fast.kernels import reference, reference_states
from dllm_fast.kernels.reference_rounded import E4M3

BF16, FP32 = torch.bfloat16, torch.float32

every_level = pytest.mark.parametrize("level", () if compiled.missing() else compiled.levels())
every_dtype = pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
every_kept = pytest.mark.parametrize("kept", [None, E4M3], ids=["", "e4m3"])
pytestmark = [
    pytest.mark.skipif(bool(compiled.missing()), reason=str(compiled.missing())),
    pytest.mark.usefixtures("poisoned_outputs"),
]

# As packs.STATES: heads, kv heads, head dim, slots, [start], [end], [hole], length of a state, states, window
SHAPES = packs.STATES | {
    "hole-at-the-start": (2, 2, 64, 150, [0, 9], [150, 150], [0, 9], 16, 3, None),
    "hole-at-the-end": (2, 2, 64, 150, [0, 9], [150, 140], [134, 124], 16, 3, None),
    "hole-is-all": (2, 1, 32, 24, [0], [24], [0], 24, 2, None),
    "hole-out-of-the-range": (2, 2, 32, 90, [30, 0], [90, 50], [10, 60], 8, 2, None),
    "hole-past-the-slots": (1, 1, 16, 60, [0, 0], [60, 60], [56, 60], 8, 3, None),
    "gqa-3": (6, 2, 32, 70, [3], [66], [40], 5, 4, None),
    "states-of-one-slot": (2, 1, 16, 40, [0], [40], [11], 1, 9, None),
    "dim-33": (2, 1, 33, 75, [0, 5], [75, 75], [60, 20], 7, 3, None),
    "dim-1": (2, 2, 1, 20, [0], [20], [6], 4, 2, None),
    "dim-300": (1, 1, 300, 140, [5], [140], [66], 18, 2, None),
    "states-longer-than-a-tile": (1, 1, 8, 400, [0], [400], [60], 300, 2, None),
    "window-0": (2, 1, 16, 30, [0], [30], [9], 5, 3, 0),
    "window-past-everything": (2, 1, 16, 33, [2], [30], [11], 6, 3, 2**40),
    "window-in-long-states": (2, 1, 8, 400, [0, 20], [400, 350], [60, 9], 300, 2, 30),
    "window-outside-the-range": (1, 1, 16, 200, [100], [200], [20], 32, 2, 60),
}


def inputs(shape, dtype, kept=None, seed=0):
    """Arguments of `reference_states.attention`, with NaN in every slot that no query sees; the same with 0; and how
    many queries a row has."""
    _, clean, queries = packs.states_inputs(shape, dtype, seed=seed)
    q, keys, values, start, end, slot, window, first, hole, length, *own = clean
    j, k = torch.arange(keys.shape[1]), torch.arange(queries)
    place = hole[:, None] + k % length
    outside = (j < start[:, None]) | (j >= end[:, None]) | ((j >= hole[:, None]) & (j < hole[:, None] + length))
    unseen = (outside, (place < start[:, None]) | (place >= end[:, None]))
    sets = []
    for value in (float("nan"), 0.0):
        shared, mine = (
            [x.masked_fill(at[..., None, None], value).to(kept or dtype) for x in pair]
            for pair, at in zip(((keys, values), own), unseen, strict=True)
        )
        sets.append((q, *shared, start, end, slot, window, first, hole, length, *mine))
    return *sets, queries


def run(arguments, most):
    q, keys, values, start, end, slot, window, first, *states = arguments
    return compiled.attention(q, keys, values, start, end, slot, window, None, first, most, *states)


def by_pytorch(arguments, queries):
    """Through the mask that PyTorch's attention takes."""
    q, keys, values, start, end, slot, window, first, hole, length, *own = arguments
    keys, values, *own = (x.to(q.dtype) for x in (keys, values, *own))
    packed = Packed(reference.row_of(first, len(q)), first, queries, states=States(hole, length, queries // length))
    return ops.attention(q, keys, values, ops.visible(q, keys.shape[1], start, end, slot, window, packed), own)


def by_definition(arguments):
    return reference_states.attention(
        *(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments)
    )


def check(shape, dtype, kept=None, seeds=(0,), judge=assert_as_exact):
    outs, eagers, truths = [], [], []
    for seed in seeds:
        poisoned, clean, queries = inputs(shape, dtype, kept, seed)
        truths.append(by_definition(clean))
        outs.append(run(poisoned, queries))
        eagers.append(by_pytorch(clean, queries))
    return judged(outs, eagers, truths, judge)


@every_level
@every_dtype
@every_kept
@pytest.mark.parametrize("name", SHAPES)
def test_attention(name, kept, dtype, level, use):
    use(level)
    check(SHAPES[name], dtype, kept)


@every_level
def test_queries_that_see_nothing_get_zero(level, use):
    use(level)
    # Ranges that are empty, reversed and outside the buffer, and between them a full row.
    out = check((2, 1, 32, 70, [0, 30, 0, 90], [0, 10, 70, 95], [5, 20, 8, 30], 8, 3, None), BF16).unflatten(0, (4, -1))
    assert (out[[0, 1, 3]] == 0).all()
    assert (out[2] != 0).any()
    # A window that does not reach the range.
    assert (check((1, 1, 16, 200, [100], [200], [20], 32, 2, 3), FP32) == 0).all()


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(data, use):
    draw = data.draw
    use(draw(st.sampled_from(compiled.levels()), "level"))
    batch, slots = draw(st.integers(1, 3), "batch"), draw(st.integers(1, 200), "slots")
    kv_heads, group = draw(st.integers(1, 2), "kv heads"), draw(st.sampled_from([1, 2, 3]), "group")
    per_row = st.lists(st.integers(0, slots), min_size=batch, max_size=batch)
    shape = (
        *(kv_heads * group, kv_heads, draw(st.integers(1, 40), "head dim"), slots),
        *(draw(per_row, name) for name in ("start", "end", "hole")),
        *(draw(st.integers(1, 24), "length"), draw(st.integers(1, 4), "states")),
        draw(st.none() | st.integers(0, slots), "window"),
    )
    kept = draw(st.sampled_from([None, E4M3]), "kept")
    if draw(st.sampled_from([BF16, FP32]), "dtype") == BF16:
        check(shape, BF16, kept, range(8))
    else:
        numbers = batch * shape[7] * shape[8] * shape[0] * shape[2]
        check(shape, FP32, kept, range(max(8, 1000 // numbers)), assert_as_exact_on_average)


@every_level
@every_dtype
@pytest.mark.parametrize("window", [None, 20])
def test_any_order_and_any_number_of_queries(window, dtype, level, use):
    """Some queries of some states, in any order; a row without any; queries of no row; slots behind the buffers."""
    use(level)
    shape = (4, 2, 16, 90, [0, 5, 0], [90, 80, 90], [40, 20, 3], 9, 4, window)
    poisoned, clean, _ = inputs(shape, dtype)
    make = torch.Generator().manual_seed(3)
    slot = torch.cat((torch.randperm(36, generator=make)[:29], torch.tensor([35, 0, 36, 50])))
    q, first = clean[0][: len(slot) + 2], torch.tensor([0, 29, 29, len(slot)])
    spare = torch.cat((slot, torch.tensor([90, 90])))
    poisoned, clean = ((q, *x[1:5], spare, window, first, *x[8:]) for x in (poisoned, clean))
    total = len(slot)
    truth, eager = by_definition(clean)[:total], reference_states.attention(*clean)[:total]
    assert_as_exact(run(poisoned, 29)[:total].contiguous(), eager, truth)
    assert torch.equal(run(poisoned, 70)[:total], run(poisoned, 29)[:total])


INVARIANT = ["two", "gqa-3", "more-than-a-tile", "window", "window-past-tiles", "window-in-long-states"]


@every_level
@every_dtype
@pytest.mark.parametrize("name", INVARIANT)
def test_nothing_but_the_query_changes_its_result(name, dtype, level, use, monkeypatch):
    """Not how many rows are in a task, not the other rows, and not the other states, even if they hold NaN."""
    use(level)
    *_, length, states, window = SHAPES[name]
    poisoned, _, queries = inputs(SHAPES[name], dtype)
    out = run(poisoned, queries)
    for size in (16, 32, 48, 96):
        monkeypatch.setattr(compiled, "_query_rows", lambda *_, size=size: size)
        assert torch.equal(run(poisoned, queries), out), size
    q, keys, values, start, end, slot, _, _, hole, _, own_keys, own_values = poisoned
    for row, state in itertools.product(range(len(hole)), range(states)):
        one, own = slice(row, row + 1), slice(row * queries + state * length, row * queries + (state + 1) * length)
        others = torch.arange(queries) // length != state
        mine = [x[one].masked_fill(others[:, None, None], float("nan")) for x in (own_keys, own_values)]
        rest = start[one], end[one], slot[own], window, torch.tensor([0, length]), hole[one], length
        assert torch.equal(run((q[own], keys[one], values[one], *rest, *mine), length), out[own])
        in_batch = [torch.cat((x[:row], y, x[row + 1 :])) for x, y in zip((own_keys, own_values), mine, strict=True)]
        assert torch.equal(run((*poisoned[:-2], *in_batch), queries)[own], out[own])


@pytest.mark.parametrize("name", INVARIANT)
def test_threads_change_nothing(name):
    poisoned, _, queries = inputs(SHAPES[name], BF16)
    before = torch.get_num_threads()
    outs = []
    try:
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            outs.append(run(poisoned, queries))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(outs[0], out) for out in outs[1:])


@pytest.mark.parametrize("name", ["two", "dim-33", "gqa-3"])
def test_any_strides_but_the_last(name):
    poisoned, _, queries = inputs(SHAPES[name], BF16)
    permuted = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in poisoned[-2:]]
    odd = [torch.nn.functional.pad(x, (1, 2))[..., 1:-2] for x in poisoned[-2:]]  # rows at odd addresses
    longer = [torch.cat((x, x), 1)[:, :queries] for x in poisoned[-2:]]
    for own in (permuted, odd, longer, [permuted[0], odd[1]]):
        assert torch.equal(run((*poisoned[:-2], *own), queries), run(poisoned, queries))


def test_defaults():
    poisoned, clean, queries = inputs((2, 2, 32, 50, [0], [50], [20], 8, 2, None), FP32)
    q, keys, values, _, _, slot, window, first, *states = poisoned
    out = compiled.attention(q, keys, values, slot=slot, window=window, first=first, most=queries, **named(states))
    assert torch.equal(out, run(poisoned, queries))
    scaled = compiled.attention(q * 2, keys, values, None, None, slot, None, 0.5 * 32**-0.5, first, queries, *states)
    assert_as_exact(scaled, reference_states.attention(*clean), by_definition(clean))


def named(states):
    return dict(zip(("hole", "length", "own_keys", "own_values"), states, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hole": None}, r"^hole: None; states need first, hole, own_keys, own_values"),
        ({"own_keys": None}, r"^own_keys: None"),
        ({"hole": None, "own_values": None}, r"^hole and own_values: None"),
        ({"first": None, "slot": None}, r"^first: None"),
        ({"slot": None}, r"^first: packed queries are q .* with slot"),
        ({"length": 0}, r"length=0"),
        ({"hole": torch.zeros(3, dtype=torch.int64)}, r"hole is torch.int64 \[3\]"),
        ({"hole": torch.zeros(2)}, r"hole is torch.float32 \[2\]"),
        ({"own_keys": torch.zeros(2, 8, 2, 16).bfloat16()}, r"own_keys is torch.bfloat16"),
        ({"own_keys": torch.zeros(2, 8, 2, 16).to(E4M3)}, r"own_keys is torch.float8_e4m3fn"),
        ({"own_keys": torch.zeros(8, 2, 16)}, r"own_keys is torch.float32 \[8, 2, 16\]"),
        ({"own_keys": torch.zeros(2, 8, 1, 16)}, r"own_keys is torch.float32 \[2, 8, 1, 16\]"),
        ({"own_values": torch.zeros(2, 7, 2, 16)}, r"own_values is torch.float32 \[2, 7, 2, 16\]"),
        ({"own_values": torch.zeros(2, 8, 2, 32)[..., ::2]}, r"own_values is .* strides .*last dimension"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_refused(change, message):
    good = {"q": torch.zeros(2, 1, 2, 16), "first": torch.arange(3), "most": 1, "slot": torch.zeros(2).long()}
    good |= {name: torch.zeros(2, 9, 2, 16) for name in ("keys", "values")}
    good |= {name: torch.zeros(2, 8, 2, 16) for name in ("own_keys", "own_values")}
    good |= {"hole": torch.zeros(2, dtype=torch.int64), "length": 4}
    compiled.attention(**good)
    with pytest.raises(ValueError, match=message):
        compiled.attention(**(good | change))


def test_opcheck():
    _, (q, keys, values, start, end, slot, window, first, *states), queries = inputs(SHAPES["two"], FP32)
    arguments = (q, keys, values, start, end, slot, window, None, first, queries, *states)
    torch.library.opcheck(compiled.attention, arguments, test_utils=("test_schema", "test_faketensor"))
