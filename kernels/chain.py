"""Programmatic dependent launch: a kernel that begins while the one before it is still at work.

Kernels of a chain are launched with ``**chained(device)`` and say two things:

- `start_next`: the next kernel may take what room is left on the chip. It can then do what depends on nothing, such as
  ask for its weights;
- `wait_for_inputs`: until the kernel before has ended and its writes are seen. Since that one has waited too, so have
  all before it. No kernel of a chain reads what others write, or writes at all, before it has waited.

Hopper and later. Elsewhere, and in Triton's interpreter, CHAINED is False and kernels follow one another as ever.
"""

import functools

import torch
import triton
import triton.language as tl

PROGRAMS = 1024


@functools.cache
def chained(device: torch.device, programs: int) -> dict:
    """Launch options of a kernel with a CHAINED constexpr on ``device``, of so many ``programs``.

    Large launches are left out: the next kernel's programs would wait on the chip in place of theirs. A whole step of
    LLaDA-8B took 5 to 10 % longer (H200).
    """
    if programs > PROGRAMS:
        return {"CHAINED": False}
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device)[0] < 9:
        return {"CHAINED": False}
    return {"CHAINED": True, "launch_pdl": True}


@triton.jit
def start_next():
    tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_inputs():
    tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch(at):
    """Bring the 128 bytes around each pointer into L2."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )
