"""Which attention serves whole sequences on a GPU: the Triton kernel, or PyTorch's from some number of queries on.

A range of slots (padding, a window, a block against a cache) is always the kernel's. Without one, PyTorch's is faster
on cards and shapes that `MEASURED` names; whatever was not measured is the kernel's. The environment variable
DLLM_FAST_ATTENTION takes the place of that table, so that all cards and processes compute alike:
``DLLM_FAST_ATTENTION=bfloat16:128:1024`` is PyTorch's in bf16 with heads of 128 from 1,024 queries on, and ``never`` is
the kernel's always. `table` gives it in that form.
"""

import os

import torch

from dllm_fast.kernels.checks import FLOATS, dtype_name

# By the card's name: the dtype, the head dim, and the number of queries from which PyTorch's was ahead at all that were
# tried, each head with keys of its own. `python -m bench.ops.tune whole-attention` measures an entry.
MEASURED: dict[str, dict[tuple[torch.dtype, int], int]] = {
    "NVIDIA H200": {(torch.bfloat16, 128): 1024},  # at 1,024, 4,096 and 16,384 queries; fewer were not tried
}
NEVER = "never"

# (dtype, head dim) -> queries from which PyTorch's serves, by device.
pytorch_from: dict[torch.device, dict[tuple[torch.dtype, int], int]] = {}


def settle(device: torch.device) -> None:
    """Fix the table for ``device``: from the environment, else by its name. Once; no trace could ask for a name.

    Raises:
        ValueError: DLLM_FAST_ATTENTION is not of the form that the module describes.
    """
    if device in pytorch_from:
        return
    fixed = _fixed()
    pytorch_from[device] = MEASURED.get(_name(device), {}) if fixed is None else fixed


def serves(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, queries: int) -> bool:
    """Whether PyTorch's attention serves ``queries`` that see all slots, of which there are as many.

    Not where heads share keys: that was not measured.
    """
    first = pytorch_from.get(device, {}).get((dtype, head_dim))
    return heads == kv_heads and first is not None and queries >= first


def table(device: torch.device) -> str:
    """The table of ``device`` as DLLM_FAST_ATTENTION takes it. Settles it; raises as `settle` does."""
    settle(device)
    entries = (f"{dtype_name(dtype)}:{dim}:{queries}" for (dtype, dim), queries in pytorch_from[device].items())
    return ",".join(entries) or NEVER


def _name(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    try:
        return torch.cuda.get_device_name(device)
    except (AssertionError, RuntimeError):  # of a device that is not here there is no telling
        return None


def _fixed() -> dict[tuple[torch.dtype, int], int] | None:
    text = os.environ.get("DLLM_FAST_ATTENTION", "")
    if text in ("", NEVER):
        return {} if text else None
    dtypes, fixed = {dtype_name(dtype): dtype for dtype in FLOATS}, {}
    for entry in text.split(","):
        dtype, *numbers = entry.strip().split(":")
        whole = [int(number) for number in numbers if number.isascii() and number.isdigit() and int(number) > 0]
        if dtype not in dtypes or len(numbers) != 2 or len(whole) != 2:
            raise ValueError(
                f"DLLM_FAST_ATTENTION={text!r} in the environment; expected 'never' or DTYPE:HEAD_DIM:QUERIES,..., "
                f"DTYPE one of {', '.join(dtypes)} and the others numbers above 0"
            )
        fixed[dtypes[dtype], whole[0]] = whole[1]
    return fixed
