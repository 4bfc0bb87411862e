"""Bidirectional attention of T query rows against a K/V buffer of S slots, without the score matrix.

Query i of a (row, head) sees the slots j of its range [start, end), with |slot + i - j| <= window if there is one:

    out_i = sum_j exp(c q_i.k_j) v_j / sum_j exp(c q_i.k_j)

Packed queries are the rows' one after the other: T then differs from row to row, and each query has its own slot. Keys
and values in e4m3 are read as such and widened, exactly, a tile at a time.

Slots are read a tile at a time. A row keeps the running maximum m of its scores s = c log2(e) q.k, the running sum
l = sum 2^(s - m) and the running numerator a = sum 2^(s - m) v. When a tile raises m to m', l and a are multiplied
by 2^(m - m') (arXiv:2205.14135; base 2 because the hardware computes 2^x).

The loop visits only the tiles that the program's rows can see. Its bounds are read from device memory, so a CUDA graph
can be replayed with other ranges. It starts at the first visible slot, so without a window only the last tile needs a
mask.

The H/G query heads that share a K/V head are rows of one tile, in the order (t, head), so each slot is read once for
all of them. A few rows do not fill a GPU. The visible slots are then divided between ``splits`` programs: each writes
out_s and L_s = m + log2 l, and the last one to finish computes sum_s 2^L_s out_s / sum_s 2^L_s, in the order of s, so
that replays give the same bits.
"""

import math

import torch
import triton
import triton.language as tl

from dllm_fast.kernels.chain import chained, start_next, wait_for_inputs
from dllm_fast.kernels.checks import FLOATS, INTEGERS, check_tensors, one_device
from dllm_fast.kernels.reference_rounded import E4M3
from dllm_fast.kernels.tiles import is_last, zero_counts

# (BM query rows, BN slots, warps, stages, mask every tile): first for few rows or a window, then for many rows. The key
# is (bytes an element, padded head dim, whether a block may use 227 KB of shared memory). These compile without spills
# on every such chip; they were not searched for.
# - 64 rows and 4 warps are the smallest shape of Hopper's matrix instructions. Few rows are limited by memory, so
#   neither padded rows nor masks in every tile cost time; a second loop body without masks spills on sm_80.
# - A window of 64 makes every tile a boundary tile, and 128 rows would read 256 slots to use 129.
# - fp32 dots are unrolled over the head dim without matrix instructions: larger tiles spill kilobytes.
CONFIGS = {
    (2, 64, True): ((64, 64, 4, 3, True), (128, 128, 8, 3, False)),
    (2, 128, True): ((64, 64, 4, 3, True), (128, 128, 8, 3, False)),
    (2, 256, True): ((64, 64, 8, 2, True), (64, 64, 8, 2, True)),
    (2, 64, False): ((64, 64, 4, 3, True), (128, 64, 8, 3, False)),
    (2, 128, False): ((64, 32, 4, 3, True), (128, 32, 8, 3, False)),
    (2, 256, False): ((64, 32, 8, 2, True), (64, 32, 8, 2, True)),
    **{(4, d, big): ((16, 32, 8, 1, True),) * 2 for d in (64, 128) for big in (True, False)},
    **{(4, 256, big): ((16, 16, 8, 1, True),) * 2 for big in (True, False)},  # 16 x 32 spills with Triton 3.6 on sm_100
}
# Of 16-bit queries against e4m3, by (padded head dim, big): many rows. What is widened takes registers, and the tiles
# above would spill.
WIDENED = {(128, True): (128, 64, 8, 3, False), (128, False): (128, 32, 8, 3, True)}
FEW_QUERIES = 64
THREADS = 132 * 256  # enough to fill 132 multiprocessors; a launch with fewer splits the slots
MERGED = tl.constexpr(32)  # query rows merged at once: a block's, with half the registers of a tile
SPLIT_SLOTS = 128  # with fewer slots a program spends its time on starting and on writing its part


@triton.jit
def _load(
    pointers,  # [BN, BD]
    j,  # [BN] int32
    d,  # [BD] int32
    hi,
    D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Slots j of K or V, [BN, BD]. Slots from ``hi`` on are not read: they may hold NaN, and 0 x NaN is NaN."""
    if MASKED:
        return tl.load(pointers, mask=(j < hi)[:, None] & (d < D)[None, :], other=0.0)
    elif pointers.shape[1] > D:
        return tl.load(pointers, mask=(d < D)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _absorb(
    acc,  # [BM, BD] fp32
    total,  # [BM] fp32
    peak,  # [BM] fp32
    q,  # [BM, BD]
    k_at,  # [BN, BD] pointers
    v_at,  # [BN, BD] pointers
    j,  # [BN] int32: the tile's slots
    i,  # [BM] int32: the rows' own slots
    d,  # [BD] int32
    hi,
    window,
    scale,
    D: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Add one tile of slots to the running softmax."""
    k = _load(k_at, j, d, hi, D, MASKED).to(q.dtype)  # [BN, BD]
    score = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BM, BN]
    if MASKED:
        visible = (j < hi)[None, :]
        if WINDOW:
            visible = visible & (tl.abs(i[:, None] - j[None, :]) <= window)
        score = tl.where(visible, score, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(score, 1) * scale)
    # A row that has not seen a slot yet has -inf here, and -inf - -inf is NaN.
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak) if MASKED else new_peak
    weight = tl.exp2(score * scale - base[:, None])  # [BM, BN]
    shrink = tl.exp2(peak - base)
    total = total * shrink + tl.sum(weight, 1)
    v = _load(v_at, j, d, hi, D, MASKED).to(q.dtype)  # [BN, BD]
    acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, total, new_peak


@triton.jit
def _merge_rows(
    part_ptr,  # [splits, B T H, D] fp32
    lse_ptr,  # [splits, B T H] fp32
    out_ptr,  # [B T H, D]
    first_row,  # of this batch row and K/V head, among all rows of out
    m,  # [BR] int32: which of its query rows
    queries,
    heads,
    splits,
    rows,  # B T H
    D: tl.constexpr,
    GROUP: tl.constexpr,
    BD: tl.constexpr,
):
    """``out = sum_s 2^L_s out_s / sum_s 2^L_s`` for some rows, in the order of s."""
    d = tl.arange(0, BD)  # [BD]
    row = first_row + (m // GROUP).to(tl.int64) * heads + m % GROUP  # [BR]
    real = m // GROUP < queries  # [BR]
    inside = real[:, None] & (d < D)[None, :]  # [BR, BD]
    acc = tl.zeros(inside.shape, tl.float32)
    total = tl.zeros(row.shape, tl.float32)
    peak = tl.full(row.shape, float("-inf"), tl.float32)
    for s in tl.range(0, splits, num_stages=3):  # the next parts are loaded while one is added
        part_row = row + s * tl.cast(rows, tl.int64)
        lse = tl.load(lse_ptr + part_row, mask=real, other=float("-inf"), cache_modifier=".cg")  # [BR]
        part = tl.load(part_ptr + part_row[:, None] * D + d[None, :], mask=inside, other=0.0, cache_modifier=".cg")
        new_peak = tl.maximum(peak, lse)
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        shrink = tl.exp2(peak - base)
        weight = tl.exp2(lse - base)
        acc = acc * shrink[:, None] + part * weight[:, None]
        total = total * shrink + weight
        peak = new_peak
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out_ptr + row[:, None] * D + d[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["queries", "slots", "kv_heads", "splits", "rows", "window"])
def _attention_kernel(
    q_ptr,  # [B, T, H, D], or [N, H, D] with PACKED
    k_ptr,  # [B, S, G, D]
    v_ptr,  # [B, S, G, D]
    start_ptr,  # [B] int
    end_ptr,  # [B] int
    slot_ptr,  # [B] int, or [N] with PACKED
    first_ptr,  # [B + 1] int, with PACKED
    out_ptr,  # [B, T, H, D]
    part_ptr,  # [splits, B, T, H, D] fp32, with SPLIT
    lse_ptr,  # [splits, B, T, H] fp32, with SPLIT
    count_ptr,  # [B G ceil(T H / G / BM)] int32, with SPLIT: 0 before and after
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_g,
    v_stride_b,
    v_stride_s,
    v_stride_g,
    queries,  # T, or with PACKED the most of a row
    slots,  # S
    kv_heads,  # G
    splits,
    rows,  # B T H
    window,
    scale,  # times log2(e)
    D: tl.constexpr,
    GROUP: tl.constexpr,  # H / G
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,  # every tile, not only the last; always with WINDOW
    SPLIT: tl.constexpr,
    PACKED: tl.constexpr,
    CHAINED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    if CHAINED:
        start_next()
        wait_for_inputs()
    # 1. This program's rows. Neighbouring programs share K and V: tiles of one (row, head) come first.
    tiles = tl.cdiv(queries * GROUP, BM)
    tile = tl.program_id(0) % tiles
    rest = tl.program_id(0) // tiles
    split = rest % splits
    rest = rest // splits
    head = rest % kv_heads
    b = (rest // kv_heads).to(tl.int64)

    m = tile * BM + tl.arange(0, BM)  # [BM]
    n = tl.arange(0, BN)  # [BN]
    d = tl.arange(0, BD)  # [BD]
    t = m // GROUP  # [BM]
    h = head * GROUP + m % GROUP  # [BM]
    first = b * queries  # its first query, among all
    q_row = q_ptr + b * q_stride_b
    if PACKED:
        first = tl.load(first_ptr + b).to(tl.int64)
        queries = (tl.load(first_ptr + b + 1).to(tl.int64) - first).to(tl.int32)
        q_row = q_ptr + first * q_stride_t
    real = (t < queries)[:, None] & (d < D)[None, :]  # [BM, BD]

    # 2. The slots [lo, hi) that some of its rows may see, and the rows' own.
    lo = tl.maximum(tl.load(start_ptr + b).to(tl.int64), 0)
    hi = tl.minimum(tl.load(end_ptr + b).to(tl.int64), slots)
    last = tl.minimum((tile * BM + BM - 1) // GROUP, queries - 1)  # its last query
    if PACKED:
        if tile * BM >= queries * GROUP:  # the row has no query in this tile
            hi = lo
        i = tl.load(slot_ptr + first + t, mask=t < queries, other=0).to(tl.int32)  # [BM]: the queries' slots
    else:
        i = (tl.load(slot_ptr + b).to(tl.int64) + t).to(tl.int32)
    if WINDOW:
        if PACKED:
            from_slot = tl.load(slot_ptr + first + tl.minimum(tile * BM // GROUP, last), mask=last >= 0, other=0)
            to_slot = tl.load(slot_ptr + first + last, mask=last >= 0, other=0)
        else:
            slot = tl.load(slot_ptr + b).to(tl.int64)
            from_slot = slot + tile * BM // GROUP
            to_slot = slot + last
        lo = tl.maximum(lo, from_slot.to(tl.int64) - window)
        hi = tl.minimum(hi, to_slot.to(tl.int64) + window + 1)
    if SPLIT:
        # Shares are whole tiles, so that a range without a window has only one ragged tile in all.
        share = tl.cdiv(tl.cdiv(tl.maximum(hi - lo, 0), splits), BN) * BN
        lo = lo + split * share
        hi = tl.minimum(hi, lo + share)
    lo = tl.minimum(lo, slots).to(tl.int32)
    hi = tl.maximum(hi, lo).to(tl.int32)

    # 3. Tile by tile through the running softmax.
    q_at = t.to(tl.int64)[:, None] * q_stride_t + h.to(tl.int64)[:, None] * q_stride_h
    q = tl.load(q_row + q_at + d[None, :], mask=real, other=0.0)  # [BM, BD]
    first_slots = (lo + n).to(tl.int64)[:, None]
    k_at = k_ptr + b * k_stride_b + head.to(tl.int64) * k_stride_g + first_slots * k_stride_s + d[None, :]  # [BN, BD]
    v_at = v_ptr + b * v_stride_b + head.to(tl.int64) * v_stride_g + first_slots * v_stride_s + d[None, :]  # [BN, BD]
    k_step = tl.cast(k_stride_s, tl.int64) * BN
    v_step = tl.cast(v_stride_s, tl.int64) * BN

    acc = tl.zeros([BM, BD], tl.float32)
    total = tl.zeros([BM], tl.float32)
    peak = tl.full([BM], float("-inf"), tl.float32)
    if MASKED:
        for begin in tl.range(lo, hi, BN):
            acc, total, peak = _absorb(
                acc, total, peak, q, k_at, v_at, begin + n, i, d, hi, window, scale, D, MASKED=True, WINDOW=WINDOW
            )
            k_at += k_step
            v_at += v_step
    else:
        whole = lo + (hi - lo) // BN * BN
        for begin in tl.range(lo, whole, BN):
            acc, total, peak = _absorb(
                acc, total, peak, q, k_at, v_at, begin + n, i, d, hi, window, scale, D, MASKED=False, WINDOW=False
            )
            k_at += k_step
            v_at += v_step
        if whole < hi:
            acc, total, peak = _absorb(
                acc, total, peak, q, k_at, v_at, whole + n, i, d, hi, window, scale, D, MASKED=True, WINDOW=False
            )

    # 4. Store the rows; or, with SPLIT, this program's part, and the last program to finish merges them.
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    row = (first + t) * (kv_heads * GROUP) + h  # [BM]
    if SPLIT:
        row += split * tl.cast(rows, tl.int64)
        lse = tl.where(total == 0.0, float("-inf"), peak + tl.log2(tl.where(total == 0.0, 1.0, total)))
        tl.store(lse_ptr + row, lse, mask=t < queries)
        tl.store(part_ptr + row[:, None] * D + d[None, :], acc, mask=real)
        if is_last(count_ptr + (b * kv_heads + head) * tiles + tile, splits):
            heads = kv_heads * GROUP
            first_row = first * heads + head * GROUP
            BR: tl.constexpr = BM if BM < MERGED else MERGED
            for begin in range(tile * BM, tl.minimum(tile * BM + BM, queries * GROUP), BR):
                _merge_rows(
                    part_ptr, lse_ptr, out_ptr, first_row, begin + tl.arange(0, BR), queries, heads, splits, rows,
                    D, GROUP, BD,
                )  # fmt: skip
    else:
        tl.store(out_ptr + row[:, None] * D + d[None, :], acc.to(out_ptr.dtype.element_ty), mask=real)


def _plan(batch, queries, kv_heads, group, head_dim, slots, window, itemsize, big, widened=False):
    """(config, padded head dim, splits), from shapes alone: a CUDA graph must stay valid whatever the device holds."""
    padded = max(16, triton.next_power_of_2(head_dim))
    tile = max(64, padded), big
    few, many = CONFIGS[(itemsize, *tile)]
    if widened and itemsize == 2:
        many = WIDENED.get(tile, many)
    config = few if queries <= FEW_QUERIES or window is not None else many
    threads = batch * kv_heads * triton.cdiv(queries * group, config[0]) * config[2] * 32
    visible = slots if window is None else min(slots, queries + 2 * window)
    return config, padded, max(1, min(THREADS // threads, visible // SPLIT_SLOTS))


@torch.library.custom_op("dllm_fast::attention", mutates_args=())
def attention(
    q: torch.Tensor,  # [B, T, H, D]
    keys: torch.Tensor,  # [B, S, G, D] of q's dtype or e4m3, as values
    values: torch.Tensor,  # [B, S, G, D]
    start: torch.Tensor,  # [B] int: first valid slot
    end: torch.Tensor,  # [B] int: one past the last valid slot
    slot: torch.Tensor,  # [B] int: buffer slot of each row's first query
    window: int | None = None,
    scale: float | None = None,
    first: torch.Tensor | None = None,  # [B + 1] int: packed queries, q [N, 1, H, D] and slot [N]
    most: int = 0,  # packed queries of a row at most
) -> torch.Tensor:
    """`reference.attention`, for scales above 0 and head dims up to 256."""
    _check(q, keys, values, start, end, slot, window, scale, first)
    heads, head_dim = q.shape[2:]
    batch, slots, kv_heads = keys.shape[:3]
    queries = q.shape[1] if first is None else most
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    rows = q.shape[0] * q.shape[1] * heads
    if rows * queries == 0:
        return out
    group = heads // kv_heads
    big = not q.is_cuda or torch.cuda.get_device_capability(q.device)[0] in (9, 10)
    shape = batch, queries, kv_heads, group, head_dim, slots, window, q.element_size(), big
    config, padded, splits = _plan(*shape, keys.dtype == E4M3)
    bm, bn, warps, stages, masked = config
    tiles = triton.cdiv(queries * group, bm) * kv_heads * batch
    part = lse = count = None
    if splits > 1:
        part = torch.empty((splits, *q.shape), dtype=torch.float32, device=q.device)
        lse = torch.empty((splits, rows), dtype=torch.float32, device=q.device)
        count = zero_counts(tiles, q.device)
    grid = (tiles * splits,)
    q_strides = q.stride()[:3] if first is None else (0, q.stride(0), q.stride(2))
    with torch.cuda.device_of(q):
        _attention_kernel[grid](
            q, keys, values, start, end, slot, first, out, part, lse, count,
            *q_strides, *keys.stride()[:3], *values.stride()[:3],
            queries, slots, kv_heads, splits, rows, min(window or 0, 1 << 30),
            (head_dim**-0.5 if scale is None else scale) * math.log2(math.e),
            D=head_dim, GROUP=group, WINDOW=window is not None, MASKED=masked,
            SPLIT=splits > 1, PACKED=first is not None, BM=bm, BN=bn, BD=padded, num_warps=warps, num_stages=stages,
            **chained(q.device, grid[0]),
        )  # fmt: skip
    return out


@attention.register_fake
@one_device
def _(q, keys, values, start, end, slot, window=None, scale=None, first=None, most=0):
    return q.new_empty(q.shape)


def _check(q, keys, values, start, end, slot, window, scale, first):
    check_tensors(q.device, contiguous=False, q=(q, [None, None if first is None else 1, None, None], FLOATS))
    queries, _, heads, head_dim = q.shape
    batch = queries if first is None else keys.shape[0]
    if not 1 <= head_dim <= 256:
        raise ValueError(f"q is {list(q.shape)}: the head dim must be in 1..256")
    check_tensors(q.device, contiguous=False, keys=(keys, [batch, None, None, head_dim], (q.dtype, E4M3)))
    if keys.shape[2] == 0 or heads % keys.shape[2]:
        raise ValueError(f"keys is {list(keys.shape)}: its heads do not divide those of q, {list(q.shape)}")
    check_tensors(q.device, contiguous=False, values=(values, keys.shape, (keys.dtype,)))
    each = [batch], INTEGERS
    check_tensors(q.device, start=(start, *each), end=(end, *each), slot=(slot, [queries], INTEGERS))
    check_tensors(q.device, first=(first, [batch + 1], INTEGERS))
    if window is not None and window < 0:
        raise ValueError(f"window={window} is negative")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale={scale} is not above 0")
