"""Which attention serves whole sequences on a GPU: the Triton kernel, or PyTorch's from some number of queries.

Queries that see only a range of slots (because of padding, a window, or a block against a cache) always use the Triton
kernel. For queries that see all slots, PyTorch's attention is faster on the cards and shapes in `MEASURED`; anything
unmeasured uses the kernel. The environment variable DLLM_FAST_ATTENTION replaces that table, so that all cards and
processes compute the same bits: ``DLLM_FAST_ATTENTION=bfloat16:128:1024`` means PyTorch's attention in bf16 with heads
of 128 from 1,024 queries, and ``never`` means the kernel always. `table` returns the table in this form.

PyTorch's attention takes no e4m3. Keys and values in it are widened to a temporary, which moves 3 bytes an element: for
LLaDA-8B's 1,024 positions on an H200, by arithmetic, 25 MB or 6 us a layer, beside 17 GFLOP or 22 us of attention. The
first grows with the length, the second with its square.
"""

import os

import torch

from dllm_fast import environment
from dllm_fast.kernels.checks import FLOATS

VARIABLE = "DLLM_FAST_ATTENTION"
FORM = "'never' or DTYPE:HEAD_DIM:QUERIES"
NEVER = "never"

# For each card, (dtype, head dim) -> the least number of queries from which PyTorch's attention was the faster one at
# every size tried, each head with its own keys. `python -m bench.ops.tune whole-attention` measures an entry.
MEASURED: dict[str, dict[tuple[torch.dtype, int], int]] = {
    "NVIDIA H200": {(torch.bfloat16, 128): 1024},  # tried: 1,024, 4,096 and 16,384 queries
}

# The settled tables, by device.
pytorch_from: dict[torch.device, dict[tuple[torch.dtype, int], int]] = {}


def settle(device: torch.device) -> None:
    """Fix the table for ``device`` once, from the environment or else by the card's name, which no trace can ask for.

    Raises:
        ValueError: DLLM_FAST_ATTENTION is not in the form that the module describes.
    """
    if device in pytorch_from:
        return
    text = os.environ.get(VARIABLE)
    if text:
        pytorch_from[device] = {} if text == NEVER else environment.read(VARIABLE, FORM, FLOATS)
    else:
        pytorch_from[device] = MEASURED.get(_card(device), {})


def serves(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, queries: int) -> bool:
    """Whether PyTorch's attention serves a whole sequence of ``queries``.

    Never if heads share keys: that was not measured.
    """
    least = pytorch_from.get(device, {}).get((dtype, head_dim))
    return heads == kv_heads and least is not None and queries >= least


def table(device: torch.device) -> str:
    """The table of ``device``, as text for DLLM_FAST_ATTENTION. Settles it first, and raises as `settle` does."""
    settle(device)
    return environment.spell(pytorch_from[device]) or NEVER


def _card(device: torch.device) -> str:
    """Its name; empty for a CPU, and for a GPU that is not in this machine."""
    try:
        return torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    except (AssertionError, RuntimeError):
        return ""
