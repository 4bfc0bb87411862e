"""RMSNorm and LayerNorm of the last dimension, with the residual add that precedes them.

    h = round(x + residual)
    rms_norm     y = round(round(h / sqrt(mean(h^2) + eps)) * weight)              (arXiv:1910.07467)
    layer_norm   y = round((h - mean) / sqrt(var + eps) * weight + bias)           (arXiv:1607.06450, biased variance)

Means and multiplications are in fp32. RMSNorm rounds the normalised value before it multiplies by the weight, as LLaDA
does; LayerNorm rounds once. A program holds whole rows in registers, several if they are short, so that x is read once
and the variance is taken around the exact mean.
"""

import torch
import triton
import triton.language as tl

from dllm_fast.kernels.chain import chained, start_next, wait_for_inputs
from dllm_fast.kernels.checks import FLOATS, check_tensors, one_device

WARPS = {1024: 4, 4096: 8, 16384: 16}  # by the longest padded row they are for
ELEMENTS = 1024  # of a program with several rows


@triton.jit(do_not_specialize=["rows"])
def _norm_kernel(
    x_ptr,  # [rows, d], rows x_stride apart
    residual_ptr,  # [rows, d], rows residual_stride apart, with RESIDUAL
    weight_ptr,  # [d]
    bias_ptr,  # [d], with BIAS
    y_ptr,  # [rows, d]
    h_ptr,  # [rows, d], with RESIDUAL
    x_stride,
    residual_stride,
    rows,
    d,
    eps,
    CENTRED: tl.constexpr,  # LayerNorm, else RMSNorm
    RESIDUAL: tl.constexpr,
    BIAS: tl.constexpr,
    CHAINED: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    if CHAINED:
        start_next()
        wait_for_inputs()
    row = (tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR))[:, None]  # [BR, 1]
    col = tl.arange(0, BD)[None, :]  # [1, BD]
    mask = (row < rows) & (col < d)  # [BR, BD]
    h = tl.load(x_ptr + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)  # [BR, BD]
    if RESIDUAL:
        h += tl.load(residual_ptr + row * residual_stride + col, mask=mask, other=0.0).to(tl.float32)
        rounded = h.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + row * d + col, rounded, mask=mask)
        h = rounded.to(tl.float32)
    if CENTRED:
        # Exact division: a constant row's mean must be its value, or eps magnifies the difference by 300.
        h = tl.where(mask, h - tl.div_rn(tl.sum(h, 1), tl.cast(d, tl.float32))[:, None], 0.0)
    y = h * tl.rsqrt(tl.sum(h * h, 1) / d + eps)[:, None]  # [BR, BD]
    if not CENTRED:
        y = y.to(x_ptr.dtype.element_ty).to(tl.float32)
    y *= tl.load(weight_ptr + col, mask=col < d, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias_ptr + col, mask=col < d, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * d + col, y.to(y_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("dllm_fast::norm", mutates_args=())
def _norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    centred: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y and h. A custom op may not return its input: without a residual h is empty, and the callers return x."""
    if x.dim() == 0 or not 1 <= x.shape[-1] <= max(WARPS):
        raise ValueError(f"x is {list(x.shape)}: the last dimension must be in 1..{max(WARPS)}")
    d = x.shape[-1]
    check_tensors(x.device, contiguous=False, x=(x, x.shape, FLOATS), residual=(residual, x.shape, (x.dtype,)))
    check_tensors(x.device, weight=(weight, [d], FLOATS), bias=(bias, [d], FLOATS))
    y = torch.empty(x.shape, dtype=_result_dtype(x, weight, centred), device=x.device)
    h = torch.empty(0 if residual is None else x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y, h
    padded = triton.next_power_of_2(d)
    warps = next(warps for longest, warps in WARPS.items() if padded <= longest)
    block_rows = max(1, ELEMENTS // padded)
    x, other = (m.reshape(-1, d) for m in (x, x if residual is None else residual))
    programs = triton.cdiv(x.shape[0], block_rows)
    with torch.cuda.device_of(x):
        _norm_kernel[(programs,)](
            x, other, weight, bias, y, h, x.stride(0), other.stride(0), x.shape[0], d, eps,
            CENTRED=centred, RESIDUAL=residual is not None, BIAS=bias is not None,
            BR=block_rows, BD=padded, num_warps=warps, **chained(x.device, programs),
        )  # fmt: skip
    return y, h


@_norm.register_fake
@one_device
def _(x, weight, bias, eps, residual, centred):
    y = x.new_empty(x.shape, dtype=_result_dtype(x, weight, centred))
    return y, x.new_empty(0 if residual is None else x.shape)


def _result_dtype(x, weight, centred):
    """RMSNorm ends with a multiplication by the weight, which may widen the dtype; LayerNorm ends with a rounding."""
    return x.dtype if centred else torch.promote_types(x.dtype, weight.dtype)


def rms_norm(
    x: torch.Tensor,  # [..., d]
    weight: torch.Tensor,  # [d]
    eps: float,
    residual: torch.Tensor | None = None,  # [..., d]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.rms_norm`."""
    y, h = _norm(x, weight, None, eps, residual, centred=False)
    return y, x if residual is None else h


def layer_norm(
    x: torch.Tensor,  # [..., d]
    weight: torch.Tensor,  # [d]
    bias: torch.Tensor | None,  # [d]
    eps: float,
    residual: torch.Tensor | None = None,  # [..., d]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.layer_norm`."""
    y, h = _norm(x, weight, bias, eps, residual, centred=True)
    return y, x if residual is None else h
