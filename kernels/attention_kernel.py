"""Bidirectional attention of T query rows against a K/V buffer of S slots, without the score matrix.

Query i of a (row, head) sees the slots j of its range [start, end), with |slot + i - j| <= window if there is one:

    out_i = sum_j exp(c q_i.k_j) v_j / sum_j exp(c q_i.k_j)

With blocks it sees no slot behind its own block's. They are counted from origin, and the slots before it are one block.
A program then reads as far as the last of its rows sees, and the others' scores there are -inf.

Packed queries are the rows' one after the other: T then differs from row to row, and each query has its own slot.
Those of states (`reference_states`) read the row's slots but for a hole once for all of them, then their own. Keys and
values in e4m3 are read as such and widened, exactly, a tile at a time.

Slots are read a tile at a time. A row keeps the running maximum m of its scores s = c log2(e) q.k, the running sum
l = sum 2^(s - m) and the running numerator a = sum 2^(s - m) v. When a tile raises m to m', l and a are multiplied
by 2^(m - m') (arXiv:2205.14135; base 2 because the hardware computes 2^x).

The loop visits only the tiles that the program's rows can see. Its bounds are read from device memory, so a CUDA graph
can be replayed with other ranges. It starts at the first visible slot, so without a window only the last tile needs a
mask.

The H/G query heads that share a K/V head are rows of one tile, in the order (t, head), so each slot is read once for
all of them. A few rows do not fill a GPU. The visible slots are then divided between ``splits`` programs: each writes
out_s and L_s = m + log2 l, and a second kernel computes sum_s 2^L_s out_s / sum_s 2^L_s. The last program to finish
could do so too, but that is slower: 15.6 us a layer against 9.4 and 2.7 (H200, LLaDA-8B, 1,024 slots), since one
program then reads what many can.
"""

import triton
import triton.language as tl

from dllm_fast.kernels.chain import start_next, wait_for_inputs


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
    place,  # [BN] int32: the slots that they stand for
    shown,  # [1 or BM, BN] bool, with MASKED: whether a row may see them, but for a window
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
        if WINDOW:
            shown = shown & (tl.abs(i[:, None] - place[None, :]) <= window)
        score = tl.where(shown, score, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(score, 1) * scale)
    # A row that has not seen a slot yet has -inf here, and -inf - -inf is NaN.
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak) if MASKED else new_peak
    weight = tl.exp2(score * scale - base[:, None])  # [BM, BN]
    shrink = tl.exp2(peak - base)
    total = total * shrink + tl.sum(weight, 1)
    v = _load(v_at, j, d, hi, D, MASKED).to(q.dtype)  # [BN, BD]
    acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, total, new_peak


@triton.jit(do_not_specialize=["splits", "rows"])
def _merge_kernel(
    part_ptr,  # [splits, B T H, D] fp32
    lse_ptr,  # [splits, B T H] fp32
    out_ptr,  # [B T H, D]
    splits,
    rows,  # B T H
    D: tl.constexpr,
    CHAINED: tl.constexpr,
    BS: tl.constexpr,
    BD: tl.constexpr,
):
    """``out = sum_s 2^L_s out_s / sum_s 2^L_s``, a row a program."""
    if CHAINED:
        start_next()
        wait_for_inputs()
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BS).to(tl.int64)  # [BS]
    d = tl.arange(0, BD)  # [BD]
    lse = tl.load(lse_ptr + s * rows + row, mask=s < splits, other=float("-inf"))  # [BS]
    peak = tl.max(lse, 0)
    weight = tl.exp2(lse - tl.where(peak == float("-inf"), 0.0, peak))  # [BS]
    total = tl.sum(weight, 0)
    at = (s * rows + row)[:, None] * D + d[None, :]
    part = tl.load(part_ptr + at, mask=(s < splits)[:, None] & (d < D)[None, :], other=0.0)  # [BS, BD]
    out = tl.sum(part * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + row * D + d, out.to(out_ptr.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["queries", "slots", "kv_heads", "splits", "rows", "window", "length", "block"])
def _attention_kernel(
    q_ptr,  # [B, T, H, D], or [N, H, D] with PACKED
    k_ptr,  # [B, S, G, D]
    v_ptr,  # [B, S, G, D]
    start_ptr,  # [B] int
    end_ptr,  # [B] int
    slot_ptr,  # [B] int, or [N] with PACKED
    origin_ptr,  # [B] int, with BLOCK
    first_ptr,  # [B + 1] int, with PACKED
    hole_ptr,  # [B] int, with STATES, which are PACKED
    own_k_ptr,  # [B, K, G, D], with STATES
    own_v_ptr,  # [B, K, G, D], with STATES
    out_ptr,  # [B, T, H, D], or with SPLIT the parts [splits, B, T, H, D] fp32
    lse_ptr,  # [splits, B, T, H] fp32, with SPLIT
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_g,
    v_stride_b,
    v_stride_s,
    v_stride_g,
    own_stride_b,
    own_stride_s,
    own_stride_g,
    queries,  # T, or with PACKED the most of a row
    slots,  # S
    kv_heads,  # G
    splits,
    rows,  # B T H
    window,
    length,  # of a state
    block,  # slots of one
    scale,  # times log2(e)
    D: tl.constexpr,
    GROUP: tl.constexpr,  # H / G
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,  # every tile, not only the last; always with WINDOW and with BLOCK
    SPLIT: tl.constexpr,
    PACKED: tl.constexpr,
    STATES: tl.constexpr,
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
    hole, hole_end, own_lo, own_hi, state = 0, 0, 0, 0, i
    if STATES:
        # The tile's states are next to each other; i is now what a query's slot stands for.
        own_lo = tl.min(tl.where(t < queries, i, 0x7FFFFFFF), 0) // length * length
        own_hi = (tl.max(tl.where(t < queries, i, -1), 0) // length + 1) * length
        hole = tl.load(hole_ptr + b).to(tl.int32)
        hole_end = hole + length
        state = i // length
        i = hole + i % length
        if tile * BM >= queries * GROUP:
            own_hi = own_lo
        own_first = tl.cast(tl.maximum(lo, 0), tl.int32)  # what the row sees, for the states' own slots
        own_last = tl.cast(tl.minimum(hi, slots), tl.int32)
    if WINDOW:
        if STATES:
            from_slot = hole
            to_slot = hole_end - 1
        elif PACKED:
            from_slot = tl.load(slot_ptr + first + tl.minimum(tile * BM // GROUP, last), mask=last >= 0, other=0)
            to_slot = tl.load(slot_ptr + first + last, mask=last >= 0, other=0)
        else:
            slot = tl.load(slot_ptr + b).to(tl.int64)
            from_slot = slot + tile * BM // GROUP
            to_slot = slot + last
        lo = tl.maximum(lo, tl.cast(from_slot, tl.int64) - window)
        hi = tl.minimum(hi, tl.cast(to_slot, tl.int64) + window + 1)
    seen_end = i  # [BM]: with BLOCK, one past the last slot that a row sees
    if BLOCK:
        origin = tl.load(origin_ptr + b).to(tl.int32)
        seen_end = origin + tl.maximum(i - origin + block, 0) // block * block
        hi = tl.minimum(hi, tl.max(tl.where(t < queries, seen_end, 0), 0))
    if SPLIT:
        # Shares are whole tiles, so that a range without a window has only one ragged tile in all.
        share = tl.cdiv(tl.cdiv(tl.maximum(hi - lo, 0), splits), BN) * BN
        lo = lo + split * share
        hi = tl.minimum(hi, lo + share)
        if split < splits - 1:  # the last share's program reads the states' own
            own_hi = own_lo
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
            j = begin + n
            shown = (j < hi)[None, :]
            if STATES:
                shown = shown & ((j < hole) | (j >= hole_end))[None, :]
            if BLOCK:
                shown = shown & (j[None, :] < seen_end[:, None])
            acc, total, peak = _absorb(
                acc, total, peak, q, k_at, v_at, j, j, shown, i, d, hi, window, scale, D, MASKED=True, WINDOW=WINDOW
            )
            k_at += k_step
            v_at += v_step
        if STATES:
            own_at = b * own_stride_b + head.to(tl.int64) * own_stride_g
            for begin in tl.range(own_lo, own_hi, BN):
                j = begin + n
                place = hole + j % length
                shown = ((place >= own_first) & (place < own_last))[None, :] & (j // length == state[:, None])
                tile_at = own_at + j.to(tl.int64)[:, None] * own_stride_s + d[None, :]
                acc, total, peak = _absorb(
                    acc, total, peak, q, own_k_ptr + tile_at, own_v_ptr + tile_at, j, place, shown, i, d, own_hi,
                    window, scale, D, MASKED=True, WINDOW=WINDOW,
                )  # fmt: skip
    else:
        whole = lo + (hi - lo) // BN * BN
        for begin in tl.range(lo, whole, BN):
            j = begin + n
            acc, total, peak = _absorb(
                acc, total, peak, q, k_at, v_at, j, j, None, i, d, hi, window, scale, D, MASKED=False, WINDOW=False
            )
            k_at += k_step
            v_at += v_step
        if whole < hi:
            j = whole + n
            shown = (j < hi)[None, :]
            acc, total, peak = _absorb(
                acc, total, peak, q, k_at, v_at, j, j, shown, i, d, hi, window, scale, D, MASKED=True, WINDOW=False
            )

    # 4. Store the rows, or with SPLIT this program's part of them.
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    row = (first + t) * (kv_heads * GROUP) + h  # [BM]
    if SPLIT:
        row += split * tl.cast(rows, tl.int64)
        lse = tl.where(total == 0.0, float("-inf"), peak + tl.log2(tl.where(total == 0.0, 1.0, total)))
        tl.store(lse_ptr + row, lse, mask=t < queries)
    tl.store(out_ptr + row[:, None] * D + d[None, :], acc.to(out_ptr.dtype.element_ty), mask=real)
