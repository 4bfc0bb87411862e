"""Packed queries: some of each row's slots, one row's after the other's, with some of no row at the end."""

import torch

# heads, kv heads, head dim, slots, [start], [end], [the slots of each row], window
SHAPES = {
    "one": (1, 1, 16, 5, [0], [5], [[3]], None),
    "rows-apart": (2, 2, 32, 70, [0, 12, 3], [70, 70, 60], [[1, 5, 6, 40], [20], [4, 9, 59]], None),
    "a-row-without-any": (4, 2, 16, 40, [0, 0, 5], [40, 33, 40], [[7, 8, 30], [], [6]], None),
    "none-in-the-last-row": (2, 1, 16, 20, [0, 0], [20, 20], [[0, 19], []], None),
    "more-than-a-tile": (4, 1, 16, 200, [0, 30], [200, 190], [list(range(3, 180, 2)), list(range(40, 60))], None),
    "window-3": (2, 1, 16, 64, [0, 5], [64, 60], [[0, 1, 2, 9, 40, 63], [6, 30, 31, 58]], 3),
    "window-past-tiles": (4, 1, 16, 220, [0, 10], [220, 220], [list(range(0, 220, 3)), [11, 100, 219]], 20),
    "window-0": (1, 1, 8, 12, [0], [12], [[2, 3, 11]], 0),
}


def inputs(shape, dtype, device="cpu", spare=3, seed=0):
    """Arguments of `reference.attention` from q to the window, ``first``, the most queries of a row, and how many
    there are; buffers have NaN in slots outside their row's range."""
    heads, kv_heads, dim, slots, start, end, each, window = shape
    make = torch.Generator().manual_seed(seed)
    total = sum(map(len, each))
    q = torch.randn(total + spare, 1, heads + 1, dim, generator=make).to(dtype)[:, :, 1:]
    buffers = torch.randn(2, len(each), slots, kv_heads, dim, generator=make).to(dtype)
    start, end = torch.tensor(start), torch.tensor(end)
    j = torch.arange(slots)
    outside = ~((j >= start[:, None]) & (j < end[:, None]))[None, :, :, None, None]
    slot = torch.tensor([slot for row in each for slot in row] + [slots] * spare)
    first = torch.tensor([0, *map(len, each)]).cumsum(0)
    poisoned, clean = buffers.masked_fill(outside, float("nan")), buffers.masked_fill(outside, 0.0)
    on = [x.to(device) for x in (q, poisoned[0], poisoned[1], start, end, slot)]
    zeros = [x.to(device) for x in (q, clean[0], clean[1], start, end, slot)]
    return (*on, window), (*zeros, window), first.to(device), max(map(len, each)), total


def rope_inputs(shape, dtype, device="cpu", spare=3, seed=0):
    """Arguments of `reference.rope`, the buffers' rows among them, and how many positions have a row."""
    heads, kv_heads, dim, slots, start, _, each, _ = shape
    make = torch.Generator().manual_seed(seed)
    row = torch.tensor([number for number, row in enumerate(each) for _ in row] + [0] * spare)
    slot = torch.tensor([slot for row in each for slot in row] + [slots] * spare)
    parts = torch.randn(len(row), 1, heads + 2 * kv_heads, dim, generator=make).to(dtype).to(device)
    buffers = torch.randn(2, len(each), slots, kv_heads, dim, generator=make).to(dtype).to(device)
    angle = torch.outer(torch.arange(slots).float(), 10 ** -torch.arange(dim // 2).float()).to(device)
    at = [x.to(device) for x in (slot - torch.tensor(start)[row], slot)]
    return [*parts.split((heads, kv_heads, kv_heads), 2), angle.cos(), angle.sin(), *at, *buffers, row.to(device)]


# heads, kv heads, head dim, slots, [start], [end], [hole], length of a state, states, window
STATES = {
    "one-state": (1, 1, 16, 12, [0], [12], [4], 4, 1, None),
    "two": (2, 2, 32, 40, [0, 7], [40, 40], [30, 12], 8, 2, None),
    "past-the-end": (4, 2, 16, 50, [0, 5], [40, 38], [34, 33], 9, 3, None),
    "before-the-start": (2, 1, 16, 30, [0, 11], [30, 30], [4, 8], 8, 2, None),
    "more-than-a-tile": (4, 1, 16, 200, [3], [190], [100], 32, 5, None),
    "window": (2, 1, 16, 90, [0, 5], [90, 90], [40, 20], 8, 4, 6),
    "window-past-tiles": (4, 1, 16, 220, [0], [220], [80], 40, 3, 70),
}


def states_inputs(shape, dtype, device="cpu", seed=0):
    """Arguments of `reference_states.attention`; what no query sees is NaN in the first set and 0 in the second. And
    how many queries a row has."""
    heads, kv_heads, dim, slots, start, end, hole, length, states, window = shape
    make = torch.Generator().manual_seed(seed)
    rows, queries = len(start), length * states
    q = torch.randn(rows * queries, 1, heads + 1, dim, generator=make).to(dtype)[:, :, 1:]
    buffers = torch.randn(2, rows, slots, kv_heads, dim, generator=make).to(dtype)
    own = torch.randn(2, rows, queries, kv_heads, dim, generator=make).to(dtype)
    start, end, hole = (torch.tensor(x) for x in (start, end, hole))
    slot = torch.arange(queries).repeat(rows)
    first = queries * torch.arange(rows + 1)
    j = torch.arange(slots)
    outside = ~((j >= start[:, None]) & (j < end[:, None]))[None, :, :, None, None]
    sets = []
    for kept in (buffers.masked_fill(outside, float("nan")), buffers.masked_fill(outside, 0.0)):
        parts = q, *kept, start, end, slot, window, first, hole, length, *own
        sets.append([x.to(device) if isinstance(x, torch.Tensor) else x for x in parts])
    return *sets, queries
