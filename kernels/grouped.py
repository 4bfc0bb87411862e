"""Rows times the weight of their group, for routed experts: a group's rows follow one another, and so do groups.

    out_m = x_m W_g^T    for the rows m from ends[g - 1] to ends[g]

A program computes some rows of one group for some outputs. How many tiles of rows a group has is known on the device
alone, so each program counts them: its tile is in the first group that brings the sum of tiles above the program's
number. There may be no more tiles than M / BM, and one for each group that has rows; programs beyond them do nothing.
"""

import torch
import triton
import triton.language as tl

from dllm_fast.kernels.checks import FLOATS, INTEGERS, check_tensors, one_device

# (BM, BN, BK, warps, stages) by bytes an element, for few and for many rows a group: of a block's tokens a group gets a
# few, and reading the weights is what counts. These compile without spills for every GPU (with
# four stages Triton 3.8 spills on sm_80); they were not searched for.
CONFIGS = {
    2: ((16, 64, 128, 4, 3), (64, 128, 64, 4, 3)),
    4: ((16, 32, 32, 4, 2), (16, 32, 32, 4, 2)),
}
MANY = 32  # rows a group, on average


@triton.jit(do_not_specialize=["rows", "groups"])
def _grouped_kernel(
    x_ptr,  # [M, K]
    weight_ptr,  # [E, N, K]
    ends_ptr,  # [E] int: one past each group's last row
    out_ptr,  # [M, N]
    x_stride,
    group_stride,
    rows,  # M
    groups,  # E
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BE: tl.constexpr,  # at least E
):
    # 1. This program's group, and its rows of it.
    tile = tl.program_id(0)
    e = tl.arange(0, BE)  # [BE]
    end = tl.load(ends_ptr + e, mask=e < groups, other=0).to(tl.int32)
    begin = tl.load(ends_ptr + e - 1, mask=(e > 0) & (e < groups), other=0).to(tl.int32)
    tiles = tl.where(e < groups, tl.cdiv(end - begin, BM), 0)
    before = tl.cumsum(tiles, 0) - tiles  # tiles of the groups before each
    mine = (before <= tile) & (tile < before + tiles)
    group = tl.max(tl.where(mine, e, -1), 0)
    if group >= 0:
        first = tl.sum(tl.where(mine, begin + (tile - before) * BM, 0), 0)
        last = tl.sum(tl.where(mine, end, 0), 0)
        m = first + tl.arange(0, BM)  # [BM]
        n = tl.program_id(1) * BN + tl.arange(0, BN)  # [BN]
        k = tl.arange(0, BK)  # [BK]
        # 2. The product.
        x_at = x_ptr + m.to(tl.int64)[:, None] * x_stride + k[None, :]  # [BM, BK]
        weight_at = (
            weight_ptr + group.to(tl.int64) * group_stride + n.to(tl.int64)[:, None] * K + k[None, :]
        )  # [BN, BK]
        acc = tl.zeros([BM, BN], tl.float32)
        for start in range(0, K, BK):
            inside = k < K - start
            x = tl.load(x_at, mask=(m < last)[:, None] & inside[None, :], other=0.0)  # [BM, BK]
            weight = tl.load(weight_at, mask=(n < N)[:, None] & inside[None, :], other=0.0)  # [BN, BK]
            acc = tl.dot(x, tl.trans(weight), acc, input_precision="ieee")
            x_at += BK
            weight_at += BK
        out_at = out_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=(m < last)[:, None] & (n < N)[None, :])


@torch.library.custom_op("dllm_fast::grouped_linear", mutates_args=())
def grouped_linear(
    x: torch.Tensor,  # [M, K], its last dimension contiguous
    weight: torch.Tensor,  # [E, N, K] of x's dtype, the last two contiguous
    ends: torch.Tensor,  # [E] int: ascending; the last is M
) -> torch.Tensor:
    """`reference.grouped_linear`."""
    check_tensors(x.device, contiguous=False, x=(x, [None, None], FLOATS))
    check_tensors(x.device, contiguous=False, weight=(weight, [None, None, x.shape[1]], (x.dtype,)))
    groups, outputs, inputs = weight.shape
    check_tensors(x.device, ends=(ends, [groups], INTEGERS))
    if weight.stride(1) != inputs and outputs > 1:
        raise ValueError(f"weight has strides {weight.stride()}: the rows of a group must lie together")
    rows = x.shape[0]
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    bm, bn, bk, warps, stages = CONFIGS[x.element_size()][rows >= MANY * groups]
    grid = min(groups, rows) + rows // bm, triton.cdiv(outputs, bn)
    with torch.cuda.device_of(x):
        _grouped_kernel[grid](
            x, weight, ends, out, x.stride(0), weight.stride(0), rows, groups, outputs, inputs,
            BM=bm, BN=bn, BK=bk, BE=triton.next_power_of_2(groups), num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out


@grouped_linear.register_fake
@one_device
def _(x, weight, ends):
    return x.new_empty(x.shape[0], weight.shape[1])
