"""Rows rounded to e4m3, each with its own scale, for matmuls with both operands in e4m3 (arXiv:2209.05433).

    scale = max_k |x[k]| / 448        x8[k] = round(x[k] / scale)

A program holds a row in registers, so that x is read once.
"""

import torch
import triton
import triton.language as tl

from dllm_fast.kernels.chain import chained, start_next, wait_for_inputs
from dllm_fast.kernels.checks import FLOATS, check_tensors, one_device
from dllm_fast.kernels.norm import WARPS

TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _round_rows_kernel(
    x_ptr,  # [rows, d], rows x_stride apart
    out_ptr,  # [rows, d] e4m3
    scale_ptr,  # [rows] fp32
    x_stride,
    d,
    CHAINED: tl.constexpr,
    BD: tl.constexpr,
):
    if CHAINED:
        start_next()
        wait_for_inputs()
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BD)  # [BD]
    x = tl.load(x_ptr + row * x_stride + col, mask=col < d, other=0.0).to(tl.float32)  # [BD]
    scale = tl.maximum(tl.div_rn(tl.max(tl.abs(x), 0), 448.0), TINY)
    tl.store(scale_ptr + row, scale)
    # Exact division: an error in the last place would round some ties the other way.
    tl.store(out_ptr + row * d + col, tl.div_rn(x, scale).to(tl.float8e4nv), mask=col < d)


@torch.library.custom_op("dllm_fast::round_rows", mutates_args=())
def round_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference_rounded.round_rows` of x [M, K], K up to 16,384: x8 [M, K] e4m3, scale [M, 1] fp32."""
    check_tensors(x.device, contiguous=False, x=(x, [None, None], FLOATS))
    rows, d = x.shape
    out = torch.empty(rows, d, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    if not 1 <= d <= max(WARPS):
        raise ValueError(f"x is {list(x.shape)}: the last dimension must be in 1..{max(WARPS)}")
    if rows:
        padded = triton.next_power_of_2(d)
        warps = next(warps for longest, warps in WARPS.items() if padded <= longest)
        with torch.cuda.device_of(x):
            _round_rows_kernel[(rows,)](
                x, out, scale, x.stride(0), d, BD=padded, num_warps=warps, **chained(x.device, rows)
            )
    return out, scale


@round_rows.register_fake
@one_device
def _(x):
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[0], 1, dtype=torch.float32)
