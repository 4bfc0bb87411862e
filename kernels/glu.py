"""The gates of SwiGLU and GeGLU (arXiv:2002.05202), elementwise.

    swiglu   g / (1 + exp(-g)) * u
    geglu    g (1 + erf(g / sqrt(2))) / 2 * u

in fp32, rounded once. gate and up are often the two halves of one matmul's output, so a row's stride may be larger than
its length; only the last dimension must be contiguous. The kernel is bound by memory.
"""

import torch
import triton
import triton.language as tl

from dllm_fast.kernels.chain import chained, start_next, wait_for_inputs
from dllm_fast.kernels.checks import FLOATS, check_tensors, one_device

BLOCK = 1024  # with 4 warps, 8 elements a thread: 16 bytes of bf16
WARPS = 4


@triton.jit
def _glu_kernel(
    gate_ptr,  # [rows, f], rows gate_stride apart
    up_ptr,  # [rows, f], rows up_stride apart
    out_ptr,  # [rows, f]
    gate_stride,
    up_stride,
    f,
    GELU: tl.constexpr,  # GeGLU, else SwiGLU
    CHAINED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if CHAINED:
        start_next()
        wait_for_inputs()
    tiles = tl.cdiv(f, BLOCK)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    col = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    gate = tl.load(gate_ptr + row * gate_stride + col, mask=col < f, other=0.0).to(tl.float32)  # [BLOCK]
    up = tl.load(up_ptr + row * up_stride + col, mask=col < f, other=0.0).to(tl.float32)  # [BLOCK]
    if GELU:
        gate = 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476))
    else:
        gate = gate / (1 + tl.exp(-gate))
    tl.store(out_ptr + row * f + col, (gate * up).to(out_ptr.dtype.element_ty), mask=col < f)


@torch.library.custom_op("dllm_fast::glu", mutates_args=())
def _glu(gate: torch.Tensor, up: torch.Tensor, gelu: bool) -> torch.Tensor:
    if gate.dim() == 0:
        raise ValueError("gate is []: it must have at least one dimension")
    shape, f = gate.shape, gate.shape[-1]
    check_tensors(gate.device, contiguous=False, gate=(gate, shape, FLOATS), up=(up, shape, (gate.dtype,)))
    out = torch.empty(shape, dtype=gate.dtype, device=gate.device)
    if gate.numel() == 0:
        return out
    gate = gate.reshape(-1, f)
    up = up.reshape(-1, f)
    block = min(BLOCK, triton.next_power_of_2(f))
    programs = gate.shape[0] * triton.cdiv(f, block)
    with torch.cuda.device_of(gate):
        _glu_kernel[(programs,)](
            gate, up, out, gate.stride(0), up.stride(0), f,
            GELU=gelu, BLOCK=block, num_warps=WARPS, **chained(gate.device, programs),
        )  # fmt: skip
    return out


@_glu.register_fake
@one_device
def _(gate, up, gelu):
    return gate.new_empty(gate.shape)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`reference.swiglu`; gate and up [..., f]."""
    return _glu(gate, up, gelu=False)


def geglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`reference.geglu`; gate and up [..., f]."""
    return _glu(gate, up, gelu=True)
