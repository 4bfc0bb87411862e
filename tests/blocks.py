"""Queries in blocks, each of which sees no slot behind its block's: for the tests of every implementation."""

import torch

# queries, heads, kv heads, head dim, slots, [start], [end], [slot], window, block, and [origin] if it is not the start
SHAPES = {
    "one-block": (4, 2, 2, 16, 30, [0], [24], [20], None, 4),
    "two-blocks": (8, 4, 2, 32, 60, [0, 12], [60, 60], [16, 20], None, 4),
    "from-inside-a-block": (7, 2, 1, 16, 50, [3, 0], [50, 41], [8, 30], None, 5),
    "prefill": (70, 2, 2, 16, 70, [0], [70], [0], None, 8),
    "prefill-padded": (140, 4, 1, 16, 140, [36, 0], [140, 140], [0, 0], None, 32),
    "the-range-ends-in-a-block": (12, 2, 1, 40, 40, [0], [17], [8], None, 8),
    "single-slots": (33, 1, 1, 16, 33, [0], [33], [0], None, 1),
    "longer-than-the-buffer": (9, 2, 2, 16, 20, [4], [20], [6], None, 2**40),
    "window": (20, 2, 1, 16, 60, [2, 0], [60, 55], [30, 12], 9, 4),
    "window-past-tiles": (130, 2, 1, 16, 260, [5], [260], [120], 70, 48),
    "after-a-prompt": (70, 2, 1, 16, 75, [0, 5], [75, 70], [0, 5], None, 8, [13, 70]),
    "after-a-prompt-window": (20, 2, 2, 40, 60, [3, 0], [60, 50], [3, 12], 9, 4, [11, 0]),
}


def inputs(name, dtype, device="cpu", seed=0):
    """Arguments of `reference.attention` from q to the window, and those of its blocks by name. Slots outside their
    row's range are NaN in the first set and 0 in the second."""
    queries, heads, kv_heads, dim, slots, start, end, slot, window, block, *origin = SHAPES[name]
    make = torch.Generator().manual_seed(seed)
    q = torch.randn(len(start), queries, heads + 1, dim, generator=make).to(dtype)[:, :, 1:]
    buffers = torch.randn(2, len(start), slots, kv_heads, dim, generator=make).to(dtype)
    rows = [torch.tensor(row, device=device) for row in (start, end, slot)]
    j = torch.arange(slots)
    outside = ~((j >= torch.tensor(start)[:, None]) & (j < torch.tensor(end)[:, None]))[None, :, :, None, None]
    poisoned, clean = (buffers.masked_fill(outside, value).to(device) for value in (float("nan"), 0.0))
    q = q.to(device)
    options = {"block": block, "origin": torch.tensor(origin[0], device=device) if origin else None}
    return (q, *poisoned, *rows, window), (q, *clean, *rows, window), options


def packed(arguments):
    """The same queries, every third of them, packed: the arguments, ``first``, and the most of a row."""
    q, keys, values, start, end, slot, window = arguments
    rows, queries = q.shape[:2]
    kept = [[t for t in range(queries) if (t + row) % 3] for row in range(rows)]
    row = torch.tensor([b for b, each in enumerate(kept) for _ in each], device=q.device)
    place = torch.tensor([t for each in kept for t in each], device=q.device)
    first = torch.tensor([0, *map(len, kept)], device=q.device).cumsum(0)
    given = q[row, place][:, None], keys, values, start, end, slot[row] + place, window
    return given, first, max(map(len, kept))
