"""The end of work that several programs share: their parts are counted, and the last of them to arrive adds them up.

In a matmul of few rows (`linear.py`, `linear_int4.py`) the steps of all tiles, in order, are shared out equally; a
program whose steps are all of a tile stores it, any other leaves a part of it. Parts are added up in the programs'
order, not in that of their arrival: replays give the same bits.
"""

import contextlib
import functools
import threading

import torch
import triton
import triton.language as tl


@triton.jit
def is_last(count_ptr, parts):
    """Say that this program's part is written. True for the last of ``parts`` programs: it may read all of them.

    Read them by ``cache_modifier=".cg"``: not from this multiprocessor's own cache, which may hold what was there
    before. The count is 0 before and after.
    """
    tl.debug_barrier()  # every thread's part must have been written before one of them says so
    last = tl.atomic_add(count_ptr, 1, sem="acq_rel") == parts - 1
    tl.debug_barrier()
    if last:
        tl.store(count_ptr, 0)
    return last


@triton.jit
def source_rows(N, GATED: tl.constexpr, BN: tl.constexpr):
    """[BN] int64: the rows of W that the first tile has. With GATED those of gate and up in turns."""
    n = tl.arange(0, BN)
    if GATED:
        n = (n % 2) * (N // 2) + n // 2
    return n.to(tl.int64)


@triton.jit
def _store(
    y,  # [BN, BM] fp32
    out_ptr,  # [M, N], or [M, N / 2] with GATED
    scale_ptr,  # [N] fp32, or None
    x_scale_ptr,  # [M] fp32, or None
    tile,
    rows,  # M
    N,
    GATED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    kind = out_ptr.dtype.element_ty
    m = tl.arange(0, BM).to(tl.int64)  # [BM]
    PER: tl.constexpr = BN // 2 if GATED else BN  # a tile's columns of the output
    n = tile * PER + tl.arange(0, PER)  # [PER]
    if scale_ptr is not None:
        y *= tl.load(scale_ptr + tile * PER + source_rows(N, GATED, BN))[:, None]
    if x_scale_ptr is not None:
        y *= tl.load(x_scale_ptr + tl.minimum(m, rows - 1))[None, :]
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(y, [PER, 2, BM]), (0, 2, 1)))  # [PER, BM]
        gate, up = gate.to(kind).to(tl.float32), up.to(kind).to(tl.float32)
        y = gate / (1 + tl.exp(-gate)) * up
    width = N // BN * PER
    tl.store(out_ptr + m[None, :] * width + n[:, None], y.to(kind), mask=(m < rows)[None, :])


@triton.jit
def end_tile(
    y,  # [BN, BM] fp32: this program's part of a tile
    part_ptr,  # [programs, 2, BN, BM] fp32: what a program leaves of its first tile, and of its last
    out_ptr,
    scale_ptr,
    x_scale_ptr,
    tile,
    first,  # this program's first step
    done,  # one past the last step that it made of the tile
    steps,  # of a tile
    rows,
    N,
    GATED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Store a tile that this program made alone, else leave the part of it for `sum_parts`."""
    begin = tile * steps
    if (first <= begin) & (done == begin + steps):
        _store(y, out_ptr, scale_ptr, x_scale_ptr, tile, rows, N, GATED, BM, BN)
    else:
        part = tl.program_id(0) * 2 + (first < begin).to(tl.int32)
        place = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]  # [BN, BM]
        tl.store(part_ptr + tl.cast(part, tl.int64) * (BN * BM) + place, y)


@triton.jit
def _sum(
    part_ptr,
    count_ptr,
    out_ptr,
    scale_ptr,
    x_scale_ptr,
    tile,
    steps,
    total,
    rows,
    N,
    GATED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Say that this program's part of a tile is there; the last program to say so adds them up."""
    programs, begin = tl.num_programs(0), tile * steps
    lowest = ((begin + 1) * programs - 1) // total
    highest = ((begin + steps) * programs - 1) // total
    if is_last(count_ptr + tile, highest - lowest + 1):
        place = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]  # [BN, BM]
        y = tl.zeros([BN, BM], tl.float32)
        for program in range(lowest, highest + 1):
            part = program * 2 + (program * total // programs < begin).to(tl.int32)
            y += tl.load(part_ptr + tl.cast(part, tl.int64) * (BN * BM) + place, cache_modifier=".cg")
        _store(y, out_ptr, scale_ptr, x_scale_ptr, tile, rows, N, GATED, BM, BN)


@triton.jit
def sum_parts(
    part_ptr,
    count_ptr,  # [N / BN] int32
    out_ptr,
    scale_ptr,
    x_scale_ptr,
    first,
    last,  # one past this program's last step
    steps,
    total,  # steps of all tiles
    rows,
    N,
    GATED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """The tiles in which this program begins and ends, if it shares them.

    To be called after the loop over the steps: Triton pipelines innermost loops alone.
    """
    tile = first // steps
    if (first > tile * steps) | (last < (tile + 1) * steps):
        _sum(part_ptr, count_ptr, out_ptr, scale_ptr, x_scale_ptr, tile, steps, total, rows, N, GATED, BM, BN)
    final = (last - 1) // steps
    if (final > tile) & (last < (final + 1) * steps):
        _sum(part_ptr, count_ptr, out_ptr, scale_ptr, x_scale_ptr, final, steps, total, rows, N, GATED, BM, BN)


_kept = threading.local()


@contextlib.contextmanager
def counters(kept: torch.Tensor):
    """Within it, launches of this thread count arrivals in ``kept``, int32 zeros of one stream's use alone.

    Otherwise each launch gets zeros of its own, which costs a launch more and breaks the chain.
    """
    before = getattr(_kept, "counters", None)
    _kept.counters = kept
    try:
        yield
    finally:
        _kept.counters = before


def zero_counts(tiles: int, device: torch.device) -> torch.Tensor:
    """At least ``tiles`` int32 zeros for a launch whose programs leave them so."""
    kept = getattr(_kept, "counters", None)
    if kept is not None and kept.device == device and len(kept) >= tiles:
        return kept
    return torch.zeros(tiles, dtype=torch.int32, device=device)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
