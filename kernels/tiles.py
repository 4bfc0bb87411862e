"""Tiles that several programs share: each program writes its part, and the last one to finish adds the parts up.

A matmul of few rows (`linear.py`, `linear_int4.py`) divides the steps of all tiles, in order, equally between programs.
A program that has all steps of a tile stores it; any other writes its part of the tile. Parts are added in the order of
the programs, not in the order in which they finish, so that replays give the same bits.
"""

import contextlib
import functools
import threading

import torch
import triton
import triton.language as tl

from dllm_fast.kernels.rope import store_rotated


@triton.jit
def is_last(count_ptr, parts):
    """Report that this program's part is written. True for the last of ``parts`` programs, which may read all of them.

    Read them with ``cache_modifier=".cg"``: this multiprocessor's own cache may hold older values. The count is 0
    before and after.
    """
    tl.debug_barrier()  # all threads must have written before one of them reports
    last = tl.atomic_add(count_ptr, 1, sem="acq_rel") == parts - 1
    tl.debug_barrier()
    if last:
        tl.store(count_ptr, 0)
    return last


@triton.jit
def source_rows(N, GATED: tl.constexpr, HALF: tl.constexpr, BN: tl.constexpr):
    """[BN] int64: the rows of W in the first tile. With GATED, rows of gate and up alternate; where HALF is not 0, rows
    of the two halves of each head do.
    """
    n = tl.arange(0, BN)
    if GATED:
        n = (n % 2) * (N // 2) + n // 2
    elif HALF:
        n = n // (2 * HALF) * (2 * HALF) + (n % 2) * HALF + n // 2 % HALF
    return n.to(tl.int64)


@triton.jit
def _pairs(y, kind, BM: tl.constexpr, BN: tl.constexpr):
    """A tile [BN, BM] of alternating rows as two of [BN / 2, BM] fp32, rounded to ``kind`` as a matmul's result is."""
    first, second = tl.split(tl.permute(tl.reshape(y, [BN // 2, 2, BM]), (0, 2, 1)))
    return first.to(kind).to(tl.float32), second.to(kind).to(tl.float32)


@triton.jit
def _store(
    y,  # [BN, BM] fp32
    to,  # see `end_tile`
    tile,
    rows,  # M
    N,
    GATED: tl.constexpr,
    HALF: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    out_ptr, scale_ptr, rope = to
    kind = out_ptr.dtype.element_ty
    m = tl.arange(0, BM).to(tl.int64)  # [BM]
    PER: tl.constexpr = BN // 2 if GATED else BN  # output columns of a tile
    n = tile * PER + tl.arange(0, PER)  # [PER]
    if scale_ptr is not None:
        y *= tl.load(scale_ptr + tile * PER + source_rows(N, GATED, HALF, BN))[:, None]
    if HALF:
        y1, y2 = _pairs(y, kind, BM, BN)
        store_rotated(y1, y2, out_ptr, rope, tile, rows, N, HALF, BM, BN)
    else:
        if GATED:
            gate, up = _pairs(y, kind, BM, BN)
            y = gate / (1 + tl.exp(-gate)) * up
        width = N // BN * PER
        tl.store(out_ptr + m[None, :] * width + n[:, None], y.to(kind), mask=(m < rows)[None, :])


@triton.jit
def end_tile(
    y,  # [BN, BM] fp32: this program's part of a tile
    part_ptr,  # [programs, 2, BN, BM] fp32: a program's parts of its first and its last tile
    to,  # out, the scale of W or None, and ``rope`` of `rope.store_rotated`
    tile,
    first,  # this program's first step
    done,  # one past its last step in the tile
    steps,  # of a tile
    rows,
    N,
    GATED: tl.constexpr,
    HALF: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Store a tile that this program computed alone; else write its part, for `sum_parts`."""
    begin = tile * steps
    if (first <= begin) & (done == begin + steps):
        _store(y, to, tile, rows, N, GATED, HALF, BM, BN)
    else:
        part = tl.program_id(0) * 2 + (first < begin).to(tl.int32)
        place = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]  # [BN, BM]
        tl.store(part_ptr + tl.cast(part, tl.int64) * (BN * BM) + place, y)


@triton.jit
def _sum(
    part_ptr,
    count_ptr,
    to,
    tile,
    steps,
    total,
    rows,
    N,
    GATED: tl.constexpr,
    HALF: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Report this program's part of a tile; the last program to do so adds the parts up."""
    programs = tl.num_programs(0)
    begin = tile * steps
    lowest = ((begin + 1) * programs - 1) // total
    highest = ((begin + steps) * programs - 1) // total
    if is_last(count_ptr + tile, highest - lowest + 1):
        place = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]  # [BN, BM]
        y = tl.zeros([BN, BM], tl.float32)
        for program in range(lowest, highest + 1):
            part = program * 2 + (program * total // programs < begin).to(tl.int32)
            y += tl.load(part_ptr + tl.cast(part, tl.int64) * (BN * BM) + place, cache_modifier=".cg")
        _store(y, to, tile, rows, N, GATED, HALF, BM, BN)


@triton.jit
def sum_parts(
    part_ptr,
    count_ptr,  # [N / BN] int32
    to,
    first,
    last,  # one past this program's last step
    steps,
    total,  # steps of all tiles
    rows,
    N,
    GATED: tl.constexpr,
    HALF: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Finish the tiles in which this program begins and ends, if it shares them.

    Call it after the loop over the steps: Triton pipelines only innermost loops.
    """
    tile = first // steps
    if (first > tile * steps) | (last < (tile + 1) * steps):
        _sum(part_ptr, count_ptr, to, tile, steps, total, rows, N, GATED, HALF, BM, BN)
    final = (last - 1) // steps
    if (final > tile) & (last < (final + 1) * steps):
        _sum(part_ptr, count_ptr, to, final, steps, total, rows, N, GATED, HALF, BM, BN)


_kept = threading.local()


@contextlib.contextmanager
def counters(kept: torch.Tensor):
    """Inside this context, launches of this thread count finished programs in ``kept``: int32 zeros that only one
    stream uses. Outside it each launch allocates its own zeros, which costs one more launch and breaks the chain.
    """
    before = getattr(_kept, "counters", None)
    _kept.counters = kept
    try:
        yield
    finally:
        _kept.counters = before


def zero_counts(tiles: int, device: torch.device) -> torch.Tensor:
    """At least ``tiles`` int32 zeros, for a launch that leaves them zero."""
    kept = getattr(_kept, "counters", None)
    if kept is not None and kept.device == device and len(kept) >= tiles:
        return kept
    return torch.zeros(tiles, dtype=torch.int32, device=device)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
