"""The gates of SwiGLU and GeGLU (arXiv:2002.05202), elementwise.

    swiglu   g / (1 + exp(-g)) * u
    geglu    g (1 + erf(g / sqrt(2))) / 2 * u

in fp32, rounded once. gate and up are often the two halves of one matrix product, so their rows may lie further
apart than they are long; only the last dimension must be contiguous. The kernels are bound by memory.
"""

import torch
import triton
import triton.language as tl

BLOCK = 1024  # with 4 warps, 8 elements a thread: 16 bytes of bf16
WARPS = 4


@triton.jit
def _load(
    gate_ptr,  # [rows, f], rows gate_stride apart
    up_ptr,  # [rows, f], rows up_stride apart
    gate_stride,
    up_stride,
    f,
    BLOCK: tl.constexpr,
):
    """gate and up as fp32 [BLOCK], where the result goes, and which are real."""
    tiles = tl.cdiv(f, BLOCK)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    col = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    gate = tl.load(gate_ptr + row * gate_stride + col, mask=col < f, other=0.0).to(tl.float32)  # [BLOCK]
    up = tl.load(up_ptr + row * up_stride + col, mask=col < f, other=0.0).to(tl.float32)  # [BLOCK]
    return gate, up, row * f + col, col < f


@triton.jit
def _swiglu_kernel(
    gate_ptr,  # [rows, f]
    up_ptr,  # [rows, f]
    out_ptr,  # [rows, f]
    gate_stride,
    up_stride,
    f,
    BLOCK: tl.constexpr,
):
    gate, up, at, mask = _load(gate_ptr, up_ptr, gate_stride, up_stride, f, BLOCK)
    out = gate / (1 + tl.exp(-gate)) * up  # [BLOCK]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _geglu_kernel(
    gate_ptr,  # [rows, f]
    up_ptr,  # [rows, f]
    out_ptr,  # [rows, f]
    gate_stride,
    up_stride,
    f,
    BLOCK: tl.constexpr,
):
    gate, up, at, mask = _load(gate_ptr, up_ptr, gate_stride, up_stride, f, BLOCK)
    out = 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476)) * up  # [BLOCK]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("dllm_fast::swiglu", mutates_args=())
def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`reference.swiglu`; gate and up [..., f]."""
    return _launch(_swiglu_kernel, gate, up)


@torch.library.custom_op("dllm_fast::geglu", mutates_args=())
def geglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`reference.geglu`; gate and up [..., f]."""
    return _launch(_geglu_kernel, gate, up)


@swiglu.register_fake
@geglu.register_fake
def _(gate, up):
    return gate.new_empty(gate.shape)


def _launch(kernel, gate, up):
    if gate.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"gate.dtype={gate.dtype} is not bfloat16, float16 or float32")
    if gate.dim() == 0 or up.shape != gate.shape:
        raise ValueError(f"up.shape={tuple(up.shape)} must be gate.shape={tuple(gate.shape)}, of a dimension or more")
    if up.dtype != gate.dtype:
        raise ValueError(f"up.dtype={up.dtype} differs from gate.dtype={gate.dtype}")
    if up.device != gate.device:
        raise ValueError(f"up.device={up.device} differs from gate.device={gate.device}")
    for name, x in (("gate", gate), ("up", up)):
        if x.stride(-1) != 1:
            raise ValueError(f"{name}.stride()={x.stride()}: the last dimension must be contiguous")
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if gate.numel() == 0:
        return out
    f = gate.shape[-1]
    gate, up = gate.reshape(-1, f), up.reshape(-1, f)
    block = min(BLOCK, triton.next_power_of_2(f))
    with torch.cuda.device_of(gate):
        kernel[(gate.shape[0] * triton.cdiv(f, block),)](
            gate, up, out, gate.stride(0), up.stride(0), f, BLOCK=block, num_warps=WARPS
        )
    return out
