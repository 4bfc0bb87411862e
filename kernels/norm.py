"""RMSNorm and LayerNorm of the last dimension, with the residual add that precedes them.

    h = round(x + residual)
    rms_norm     y = round(round(h / sqrt(mean(h^2) + eps)) * weight)              (arXiv:1910.07467)
    layer_norm   y = round((h - mean) / sqrt(var + eps) * weight + bias)           (arXiv:1607.06450, biased variance)

Means and products are in fp32. RMSNorm rounds the normalised value before the weight, as LLaDA does; LayerNorm
rounds once. A program holds whole rows in registers, so that x is read once and the variance is taken around the
true mean; several rows where they are short.
"""

import torch
import triton
import triton.language as tl

WARPS = {1024: 4, 4096: 8, 16384: 16}  # by the padded row length up to which it holds
ELEMENTS = 1024  # of a program's rows, where several are that short


@triton.jit
def _residual_add(
    x_ptr,  # [rows, d], rows x_stride apart
    residual_ptr,  # [rows, d], rows residual_stride apart
    h_ptr,  # [rows, d]
    row,  # [BR, 1] int64
    col,  # [1, BD] int32
    mask,  # [BR, BD]
    x_stride,
    residual_stride,
    d,
    RESIDUAL: tl.constexpr,
):
    """h as fp32 [BR, BD], rounded as it was stored, 0 outside the mask."""
    h = tl.load(x_ptr + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL:
        h += tl.load(residual_ptr + row * residual_stride + col, mask=mask, other=0.0).to(tl.float32)
        rounded = h.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + row * d + col, rounded, mask=mask)
        h = rounded.to(tl.float32)
    return h


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_kernel(
    x_ptr,  # [rows, d], rows x_stride apart
    residual_ptr,  # [rows, d], rows residual_stride apart
    weight_ptr,  # [d]
    y_ptr,  # [rows, d]
    h_ptr,  # [rows, d]
    x_stride,
    residual_stride,
    rows,
    d,
    eps,
    RESIDUAL: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR))[:, None]  # [BR, 1]
    col = tl.arange(0, BD)[None, :]  # [1, BD]
    mask = (row < rows) & (col < d)  # [BR, BD]
    h = _residual_add(x_ptr, residual_ptr, h_ptr, row, col, mask, x_stride, residual_stride, d, RESIDUAL)  # [BR, BD]
    scale = tl.rsqrt(tl.sum(h * h, 1) / d + eps)[:, None]  # [BR, 1]
    normed = (h * scale).to(x_ptr.dtype.element_ty).to(tl.float32)
    y = normed * tl.load(weight_ptr + col, mask=col < d, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * d + col, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _layer_norm_kernel(
    x_ptr,  # [rows, d], rows x_stride apart
    residual_ptr,  # [rows, d], rows residual_stride apart
    weight_ptr,  # [d]
    bias_ptr,  # [d]
    y_ptr,  # [rows, d]
    h_ptr,  # [rows, d]
    x_stride,
    residual_stride,
    rows,
    d,
    eps,
    RESIDUAL: tl.constexpr,
    BIAS: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR))[:, None]  # [BR, 1]
    col = tl.arange(0, BD)[None, :]  # [1, BD]
    mask = (row < rows) & (col < d)  # [BR, BD]
    h = _residual_add(x_ptr, residual_ptr, h_ptr, row, col, mask, x_stride, residual_stride, d, RESIDUAL)  # [BR, BD]
    mean = (tl.sum(h, 1) / d)[:, None]  # [BR, 1]
    centred = tl.where(mask, h - mean, 0.0)
    y = centred * tl.rsqrt(tl.sum(centred * centred, 1) / d + eps)[:, None]
    y *= tl.load(weight_ptr + col, mask=col < d, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias_ptr + col, mask=col < d, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * d + col, y.to(y_ptr.dtype.element_ty), mask=mask)


def rms_norm(
    x: torch.Tensor,  # [..., d]
    weight: torch.Tensor,  # [d]
    eps: float,
    residual: torch.Tensor | None = None,  # [..., d]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.rms_norm`."""
    y, h = _rms_norm(x, weight, eps, residual)
    return y, x if residual is None else h


def layer_norm(
    x: torch.Tensor,  # [..., d]
    weight: torch.Tensor,  # [d]
    bias: torch.Tensor | None,  # [d]
    eps: float,
    residual: torch.Tensor | None = None,  # [..., d]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.layer_norm`."""
    y, h = _layer_norm(x, weight, bias, eps, residual)
    return y, x if residual is None else h


# An op may not return its input: without a residual h is empty, and the functions above put x in its place.


@torch.library.custom_op("dllm_fast::rms_norm", mutates_args=())
def _rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(x, {"weight": weight}, residual)
    y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    h = torch.empty(0 if residual is None else x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        rows, strides, grid, options = _plan(x, residual)
        with torch.cuda.device_of(x):
            _rms_norm_kernel[grid](
                rows[0], rows[1], weight, y, h, *strides, rows[0].shape[0], x.shape[-1], eps,
                RESIDUAL=residual is not None, **options,
            )  # fmt: skip
    return y, h


@_rms_norm.register_fake
def _(x, weight, eps, residual):
    y = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))
    return y, x.new_empty(0 if residual is None else x.shape)


@torch.library.custom_op("dllm_fast::layer_norm", mutates_args=())
def _layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(x, {"weight": weight} if bias is None else {"weight": weight, "bias": bias}, residual)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    h = torch.empty(0 if residual is None else x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        rows, strides, grid, options = _plan(x, residual)
        with torch.cuda.device_of(x):
            _layer_norm_kernel[grid](
                rows[0], rows[1], weight, weight if bias is None else bias, y, h, *strides, rows[0].shape[0],
                x.shape[-1], eps, RESIDUAL=residual is not None, BIAS=bias is not None, **options,
            )  # fmt: skip
    return y, h


@_layer_norm.register_fake
def _(x, weight, bias, eps, residual):
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape)


def _plan(x, residual):
    """x and residual (or x again) as matrices, their row strides, the grid, and the kernel's options."""
    d = x.shape[-1]
    matrices = [m.reshape(-1, d) for m in (x, x if residual is None else residual)]
    padded = triton.next_power_of_2(d)
    warps = next(warps for longest, warps in WARPS.items() if padded <= longest)
    block_rows = max(1, ELEMENTS // padded)
    grid = (triton.cdiv(matrices[0].shape[0], block_rows),)
    options = {"BR": block_rows, "BD": padded, "num_warps": warps}
    return matrices, [m.stride(0) for m in matrices], grid, options


def _check(x, vectors, residual):
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"x.dtype={x.dtype} is not bfloat16, float16 or float32")
    if x.dim() == 0 or not 1 <= x.shape[-1] <= max(WARPS):
        raise ValueError(f"x.shape={tuple(x.shape)}: the last dimension must be in 1..{max(WARPS)}")
    named = {"x": x, **vectors}
    if residual is not None:
        named["residual"] = residual
        if residual.shape != x.shape or residual.dtype != x.dtype:
            raise ValueError(
                f"residual.shape={tuple(residual.shape)}, dtype={residual.dtype} differ from "
                f"x.shape={tuple(x.shape)}, dtype={x.dtype}"
            )
    for name, vector in vectors.items():
        if vector.shape != x.shape[-1:]:
            raise ValueError(f"{name}.shape={tuple(vector.shape)} is not ({x.shape[-1]},)")
        if not vector.is_floating_point() or vector.dtype == torch.float64:
            raise ValueError(f"{name}.dtype={vector.dtype} is not bfloat16, float16 or float32")
    for name, tensor in named.items():
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name}.stride()={tensor.stride()}: the last dimension must be contiguous")
        if tensor.device != x.device:
            raise ValueError(f"{name}.device={tensor.device} differs from x.device={x.device}")
