"""Rotary position embedding of q and k, and the writing of k and v into their buffers, in one pass.

Row t of batch row b is at position p = clamp(position[b] + t, 0, P - 1). Each head's two halves turn by p's angles
(arXiv:2104.09864, half-split as in both model families):

    (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)

in fp32, rounded once. q becomes a new tensor; k and v go to slot[b] + t of a row of the buffers, b or row[b], or
nowhere if that lies outside [0, S). Buffers may be e4m3, which k and v are then rounded to. Every element is read once
and written once: the kernel is bound by memory.

A program takes one row's heads, some at a time: of q in the first programs of a row, of k and v in the others.
"""

import torch
import triton
import triton.language as tl

from dllm_fast.kernels.chain import chained, start_next, wait_for_inputs
from dllm_fast.kernels.checks import FLOATS, INTEGERS, check_tensors, one_device
from dllm_fast.kernels.reference_rounded import E4M3

PAIRS = 512  # elements of one half in a program: with 2 warps, 8 a thread, 16 bytes of bf16
WARPS = 2


@triton.jit
def _kept(x, kind: tl.constexpr):
    """x as `reference_rounded.rounded` makes it: a cast to e4m3 alone may give NaN for what is beyond 448."""
    if kind == tl.float8e4nv:
        x = tl.clamp(x.to(tl.float32), -448.0, 448.0, tl.PropagateNan.ALL)
    return x.to(kind)


@triton.jit
def _turn(x1, x2, cos, sin):
    """The rotated pair. Which product is fused is written out, so that both callers round alike."""
    return tl.fma(x1, cos, -(x2 * sin)), tl.fma(x2, cos, x1 * sin)


@triton.jit
def _rotate(
    from_ptr,
    to_ptr,
    from_at,  # [BH, BHALF]
    to_at,  # [BH, BHALF]
    mask,  # [BH, BHALF]
    cos,  # [BHALF] fp32
    sin,  # [BHALF] fp32
    HALF: tl.constexpr,
):
    x1 = tl.load(from_ptr + from_at, mask=mask, other=0.0).to(tl.float32)  # [BH, BHALF]
    x2 = tl.load(from_ptr + from_at + HALF, mask=mask, other=0.0).to(tl.float32)  # [BH, BHALF]
    y1, y2 = _turn(x1, x2, tl.broadcast_to(cos[None, :], x1.shape), tl.broadcast_to(sin[None, :], x1.shape))
    tl.store(to_ptr + to_at, _kept(y1, to_ptr.dtype.element_ty), mask=mask)
    tl.store(to_ptr + to_at + HALF, _kept(y2, to_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["queries", "slots", "positions", "heads", "kv_heads"])
def _rope_kernel(
    q_ptr,  # [B, T, H, D]
    k_ptr,  # [B, T, G, D]
    v_ptr,  # [B, T, G, D]
    cos_ptr,  # [P, D/2] fp32
    sin_ptr,  # [P, D/2] fp32
    position_ptr,  # [B] int
    slot_ptr,  # [B] int
    row_ptr,  # [B] int, or None
    out_ptr,  # [B, T, H, D]
    keys_ptr,  # [R, S, G, D]
    values_ptr,  # [R, S, G, D]
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_t,
    k_stride_g,
    v_stride_b,
    v_stride_t,
    v_stride_g,
    keys_stride_b,
    keys_stride_s,
    keys_stride_g,
    values_stride_b,
    values_stride_s,
    values_stride_g,
    queries,  # T
    slots,  # S
    positions,  # P
    heads,  # H
    kv_heads,  # G
    HALF: tl.constexpr,  # D / 2
    CHAINED: tl.constexpr,
    BH: tl.constexpr,
    BHALF: tl.constexpr,
):
    if CHAINED:
        start_next()
        wait_for_inputs()
    q_tiles = tl.cdiv(heads, BH)
    tiles = q_tiles + tl.cdiv(kv_heads, BH)
    tile = tl.program_id(0) % tiles
    query = (tl.program_id(0) // tiles).to(tl.int64)
    b = query // queries
    t = query % queries
    d = tl.arange(0, BHALF)  # [BHALF]

    at = tl.load(position_ptr + b).to(tl.int64) + t
    at = tl.minimum(tl.maximum(at, 0), positions - 1)
    cos = tl.load(cos_ptr + at * HALF + d, mask=d < HALF, other=0.0)  # [BHALF]
    sin = tl.load(sin_ptr + at * HALF + d, mask=d < HALF, other=0.0)  # [BHALF]

    if tile < q_tiles:
        h = (tile * BH + tl.arange(0, BH)).to(tl.int64)[:, None]
        mask = (h < heads) & (d < HALF)[None, :]  # [BH, BHALF]
        q_at = b * q_stride_b + t * q_stride_t + h * q_stride_h + d[None, :]
        out_at = (query * heads + h) * (2 * HALF) + d[None, :]
        _rotate(q_ptr, out_ptr, q_at, out_at, mask, cos, sin, HALF)
    else:
        g = ((tile - q_tiles) * BH + tl.arange(0, BH)).to(tl.int64)[:, None]
        to = tl.load(slot_ptr + b).to(tl.int64) + t
        mask = (g < kv_heads) & (d < HALF)[None, :] & (to >= 0) & (to < slots)  # [BH, BHALF]
        row = b if row_ptr is None else tl.load(row_ptr + b).to(tl.int64)
        k_at = b * k_stride_b + t * k_stride_t + g * k_stride_g + d[None, :]
        keys_at = row * keys_stride_b + to * keys_stride_s + g * keys_stride_g + d[None, :]
        _rotate(k_ptr, keys_ptr, k_at, keys_at, mask, cos, sin, HALF)
        v_at = b * v_stride_b + t * v_stride_t + g * v_stride_g + d[None, :]
        values_at = row * values_stride_b + to * values_stride_s + g * values_stride_g + d[None, :]
        v1 = tl.load(v_ptr + v_at, mask=mask)  # [BH, BHALF]
        v2 = tl.load(v_ptr + v_at + HALF, mask=mask)  # [BH, BHALF]
        tl.store(values_ptr + values_at, _kept(v1, values_ptr.dtype.element_ty), mask=mask)
        tl.store(values_ptr + values_at + HALF, _kept(v2, values_ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_rotated(
    y1,  # [BN / 2, BM] fp32: the first halves of whole heads of q, of k or of v, by row of x
    y2,  # [BN / 2, BM] fp32: the second ones
    out_ptr,  # [B, T, H, D]
    rope,  # cos, sin, position, slot, row, keys and values as `_rope_kernel` has them, contiguous; T, S, P and H
    tile,
    rows,  # B T
    N,  # (H + 2 G) D
    HALF: tl.constexpr,  # D / 2
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """The same for a tile of the matmul that makes q, k and v: q to out, k and v to their slots."""
    cos_ptr, sin_ptr, position_ptr, slot_ptr, row_ptr, keys_ptr, values_ptr, queries, slots, positions, heads = rope
    kv_heads = (N // (2 * HALF) - heads) // 2
    pair = tl.arange(0, BN // 2)
    d = (pair % HALF)[:, None]  # [BN / 2, 1]
    begin = tile * (BN // (2 * HALF))  # the tile's first head, of q's, k's and v's
    head = (begin + pair // HALF)[:, None]  # [BN / 2, 1]
    m = tl.arange(0, BM)  # [BM]
    query = tl.minimum(m, rows - 1)
    b, t = query // queries, query % queries
    if begin < heads + kv_heads:
        at = tl.load(position_ptr + b).to(tl.int64) + t
        at = tl.minimum(tl.maximum(at, 0), positions - 1)[None, :] * HALF + d  # [BN / 2, BM]
        y1, y2 = _turn(y1, y2, tl.load(cos_ptr + at), tl.load(sin_ptr + at))
    if begin < heads:
        _put(y1, y2, out_ptr, m.to(tl.int64)[None, :] * heads + head, d, (m < rows)[None, :], HALF)
    else:
        to = tl.load(slot_ptr + b).to(tl.int64) + t
        inside = ((m < rows) & (to >= 0) & (to < slots))[None, :]
        row = b.to(tl.int64) if row_ptr is None else tl.load(row_ptr + b).to(tl.int64)
        to = (row * slots + to)[None, :] * kv_heads  # [1, BM]: the slot's first head in the buffers
        if begin < heads + kv_heads:
            _put(y1, y2, keys_ptr, to + (head - heads), d, inside, HALF)
        else:
            _put(y1, y2, values_ptr, to + (head - heads - kv_heads), d, inside, HALF)


@triton.jit
def _put(
    y1,  # [BN / 2, BM] fp32
    y2,  # [BN / 2, BM] fp32
    ptr,
    head,  # [BN / 2, BM]: which of the heads from ptr on
    d,  # [BN / 2, 1]
    mask,  # [1, BM]
    HALF: tl.constexpr,
):
    at = ptr + head * (2 * HALF) + d
    tl.store(at, _kept(y1, ptr.dtype.element_ty), mask=mask)
    tl.store(at + HALF, _kept(y2, ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("dllm_fast::rope", mutates_args=("keys", "values"))
def rope(
    q: torch.Tensor,  # [B, T, H, D]
    k: torch.Tensor,  # [B, T, G, D]
    v: torch.Tensor,  # [B, T, G, D]
    cos: torch.Tensor,  # [P, D/2] fp32
    sin: torch.Tensor,  # [P, D/2] fp32
    position: torch.Tensor,  # [B] int: position of each row's first query
    slot: torch.Tensor,  # [B] int: buffer slot of each row's first query
    keys: torch.Tensor,  # [R, S, G, D] of q's dtype or e4m3, as values; written in place
    values: torch.Tensor,  # [R, S, G, D], written in place
    row: torch.Tensor | None = None,  # [B] int: which of the buffers' rows; None: each its own
) -> torch.Tensor:
    """`reference.rope`."""
    _check(q, k, v, cos, sin, position, slot, keys, values, row)
    batch, queries, heads, head_dim = q.shape
    slots, kv_heads = keys.shape[1:3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if batch * queries == 0:
        return out
    half = head_dim // 2
    bhalf = triton.next_power_of_2(half)
    bh = max(1, min(triton.next_power_of_2(max(heads, kv_heads)), PAIRS // bhalf))
    tiles = triton.cdiv(heads, bh) + triton.cdiv(kv_heads, bh)
    programs = batch * queries * tiles
    with torch.cuda.device_of(q):
        _rope_kernel[(programs,)](
            q, k, v, cos, sin, position, slot, row, out, keys, values,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
            queries, slots, cos.shape[0], heads, kv_heads,
            HALF=half, BH=bh, BHALF=bhalf, num_warps=WARPS, **chained(q.device, programs),
        )  # fmt: skip
    return out


@rope.register_fake
@one_device
def _(q, k, v, cos, sin, position, slot, keys, values, row=None):
    return q.new_empty(q.shape)


def _check(q, k, v, cos, sin, position, slot, keys, values, row):
    check_tensors(q.device, contiguous=False, q=(q, [None] * 4, FLOATS))
    batch, queries, _, head_dim = q.shape
    if head_dim % 2 or not 2 <= head_dim <= 2 * PAIRS:
        raise ValueError(f"q is {list(q.shape)}: the head dim must be even and in 2..{2 * PAIRS}")
    check_tensors(q.device, contiguous=False, k=(k, [batch, queries, None, head_dim], (q.dtype,)))
    kv_heads = k.shape[2]
    buffer_rows = batch if row is None else None
    check_tensors(q.device, contiguous=False, keys=(keys, [buffer_rows, None, kv_heads, head_dim], (q.dtype, E4M3)))
    check_tensors(q.device, contiguous=False, v=(v, k.shape, (q.dtype,)), values=(values, keys.shape, (keys.dtype,)))
    check_tensors(q.device, cos=(cos, [None, head_dim // 2], (torch.float32,)))
    if cos.shape[0] == 0:
        raise ValueError(f"cos is {list(cos.shape)}: it holds no position")
    check_tensors(q.device, sin=(sin, cos.shape, (torch.float32,)))
    each = [batch], INTEGERS
    check_tensors(q.device, position=(position, *each), slot=(slot, *each), row=(row, *each))
