"""Programmatic dependent launch: a kernel may start while the one before it is still running.

Kernels of a chain are launched with ``**chained(device, programs)`` and call two functions:

- `start_next` lets the next kernel start where the chip has room, and do what needs no input, such as loading weights;
- `wait_for_inputs` waits until the previous kernel has ended and its writes are visible. That kernel has waited too, so
  all earlier ones have ended. Before it has waited, a kernel of a chain writes nothing and reads nothing that another
  kernel writes.

This is for Hopper and later. Elsewhere, in Triton's interpreter and with Triton 3.4, CHAINED is False and each kernel
starts when the previous one has ended.
"""

import functools
import inspect

import torch
import triton
import triton.language as tl

PROGRAMS = 1024  # a larger launch is not chained
# Triton 3.4's gdc_wait refuses the argument that its own compiler hands it.
WAITS = "_semantic" in inspect.signature(tl.extra.cuda.gdc_wait).parameters


@functools.cache
def chained(device: torch.device, programs: int) -> dict:
    """Launch options for a kernel with a CHAINED constexpr, of this many ``programs``, on ``device``.

    Large launches are not chained: waiting programs of the next kernel would occupy the chip. A whole step of LLaDA-8B
    took 5 to 10 % longer (H200).
    """
    if programs > PROGRAMS or not WAITS:
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
def prefetch(pointers):
    """Load the 128 bytes around each pointer into L2."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
