"""Which matmul serves a model's linears on a CPU: the compiled extension's, or PyTorch's from some number of rows on.

Which of them is faster depends on the processor and on how well MKL, oneDNN and the extension support it. So it is
measured, once in a process for each dtype, when a model is first patched on a CPU. The extension's serves unless
PyTorch's is clearly faster, because in the extension a row's result does not depend on the number of rows. The
environment variable DLLM_FAST_MATMUL fixes the table, so that all processes compute alike:
``DLLM_FAST_MATMUL=float32:never,bfloat16:256`` means PyTorch's from 256 rows on in bf16, and never in fp32. `table`
returns the table in that form.
"""

import time

import torch
import torch.nn.functional as F

from dllm_fast import environment
from dllm_fast.cpu import compiled
from dllm_fast.environment import NEVER

VARIABLE = "DLLM_FAST_MATMUL"
FASTER = 0.9  # PyTorch's serves if it takes less than this share of the extension's time
ROWS = (1024, 512, 256, 128, 64, 32, 16)
OUTPUTS, INPUTS = 1536, 768  # of the weight in the measurement
ROUNDS = 3

# The number of rows from which PyTorch's serves, by dtype. Without an entry the extension's always serves.
pytorch_from: dict[torch.dtype, int] = {}


def settle(dtype: torch.dtype) -> None:
    """Fix the table once for ``dtype``, one of `compiled.FLOATS`: from the environment, or else by a measurement.

    Raises:
        ValueError: DLLM_FAST_MATMUL is not in the form that the module describes.
    """
    if dtype in pytorch_from:
        return
    rows = environment.read(VARIABLE, "DTYPE:ROWS", compiled.FLOATS).get((dtype,)) or _measured(dtype)
    pytorch_from.setdefault(dtype, rows)  # if two threads measure, the first decides for both


def table() -> str:
    """The table, as text for DLLM_FAST_MATMUL. Settles every dtype first, and raises as `settle` does."""
    for dtype in compiled.FLOATS:
        settle(dtype)
    return environment.spell({(dtype,): pytorch_from[dtype] for dtype in compiled.FLOATS})


def _measured(dtype: torch.dtype) -> int:
    """The smallest of `ROWS` from which on PyTorch's is always clearly faster; `NEVER` if there is none."""
    generator = torch.Generator(device="cpu").manual_seed(0)  # the caller's random numbers stay as they are
    first = NEVER
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        weight = torch.randn(OUTPUTS, INPUTS, generator=generator, dtype=torch.float32, device="cpu").to(dtype)
        for rows in ROWS:
            x = torch.randn(rows, INPUTS, generator=generator, dtype=torch.float32, device="cpu").to(dtype)
            ours, theirs = _times(lambda x=x: compiled.linear(x, weight), lambda x=x: F.linear(x, weight))
            if theirs >= FASTER * ours:
                break
            first = rows
    return first


def _times(ours, theirs) -> tuple[float, float]:
    """The least seconds of each, in turns after a round of warming up; if that round differs fourfold, its seconds."""
    best_ours, best_theirs = _seconds(ours), _seconds(theirs)
    if best_theirs > 4 * best_ours:
        return best_ours, best_theirs
    for _ in range(ROUNDS):
        best_ours = min(best_ours, _seconds(ours))
        best_theirs = min(best_theirs, _seconds(theirs))
    return best_ours, best_theirs


def _seconds(run) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
