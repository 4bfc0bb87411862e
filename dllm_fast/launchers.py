"""Triton's kernels: their launchers, imported when first asked for, and what keeps them from running somewhere."""

import functools
import importlib
import importlib.metadata
import os
from types import SimpleNamespace

import torch
from torch.torch_version import TorchVersion

from dllm_fast.kernels.checks import FLOATS

# By file of kernels/, what `ops` calls of it.
KERNELS = {
    "tiles": ("counters",),
    "linear": ("linear", "fits"),
    "linear_int4": ("linear_int4", "widen_int4", "fits_int4"),
    "round_rows": ("round_rows",),
    "attention": ("attention",),
    "rope": ("rope",),
    "norm": ("rms_norm", "layer_norm"),
    "glu": ("swiglu", "geglu"),
    "predict": ("predict",),
    "commit": ("commit",),
    "masked_loss": ("masked_loss",),
}
# NVIDIA GPUs for which the tests compile every kernel and find that it fits (tests/kernels/test_resources.py). On 7.5
# attention takes more shared memory than a block may have, half the kernels spill, and bf16 is emulated.
CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))


def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run, or None where they can."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return f"the model is on {device}; it needs CUDA, or TRITON_INTERPRET=1"
    if dtype not in FLOATS:
        return f"the model's dtype is {dtype}; it needs {', '.join(map(str, FLOATS))}"
    if interpreted and dtype == torch.bfloat16:
        return f"the model's dtype is {dtype}, and Triton's interpreter multiplies its bit patterns as integers"
    if not interpreted and (untried := _untried(device)):
        return untried
    try:
        triton()
    except ImportError as error:
        return str(error)
    return _broken_interpreter() if interpreted else None


def _broken_interpreter() -> str | None:
    """Triton's interpreter up to 3.6 makes ints of arrays of one element, which NumPy refuses from 2.4 on."""
    triton, numpy = (importlib.metadata.version(name) for name in ("triton", "numpy"))
    if TorchVersion(triton) >= (3, 7) or TorchVersion(numpy) < (2, 4):
        return None
    return f"the interpreter of Triton {triton} needs NumPy below 2.4, and this is {numpy}"


def _untried(device: torch.device) -> str | None:
    """Why the kernels are not for the GPU ``device``, or None. Of a device that is not here there is no telling."""
    if torch.version.hip is not None:
        # An MI300 calls itself 9.4, and would be given Hopper's tiles, three times the memory that its blocks have.
        return f"this PyTorch is built for ROCm {torch.version.hip}, on which the kernels have not been tried"
    try:
        capability, name = torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)
    except (AssertionError, RuntimeError):
        return None
    if capability in CAPABILITIES:
        return None
    tested = ", ".join(f"{major}.{minor}" for major, minor in CAPABILITIES)
    return (
        f"{device} is a {name} of compute capability {capability[0]}.{capability[1]}; the kernels are compiled and "
        f"checked for {tested}"
    )


@functools.cache
def triton() -> SimpleNamespace:
    """The launchers, imported when first asked for: the package works where Triton does not."""
    modules = {file: importlib.import_module(f"dllm_fast.kernels.{file}") for file in KERNELS}
    return SimpleNamespace(**{name: getattr(modules[file], name) for file, names in KERNELS.items() for name in names})
