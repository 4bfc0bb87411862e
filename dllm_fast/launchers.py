"""The launchers of the Triton kernels, imported when they are first needed, and reasons why they cannot run."""

import functools
import importlib
import importlib.metadata
import os
from types import SimpleNamespace

import torch
from torch.torch_version import TorchVersion

from dllm_fast.kernels.checks import FLOATS

# What `ops` calls, by file of kernels/.
KERNELS = {
    "tiles": ("counters",),
    "linear": ("linear", "fits"),
    "linear_int4": ("linear_int4", "widen_int4", "fits_int4"),
    "linear_rope": ("linear_rope", "linear_int4_rope", "fits_rope"),
    "grouped": ("grouped_linear",),
    "round_rows": ("round_rows",),
    "attention": ("attention",),
    "rope": ("rope",),
    "norm": ("rms_norm", "layer_norm"),
    "glu": ("swiglu", "geglu"),
    "predict": ("predict",),
    "predict_share": ("predict_share", "fits_share"),
    "commit": ("commit",),
    "masked_loss": ("masked_loss",),
}
# The NVIDIA GPUs for which the tests compile every kernel and check that it fits (tests/kernels/test_resources.py). On
# 7.5 attention needs more shared memory than a block may have, half of the kernels spill, and bf16 is emulated.
CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))


def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run for weights of ``dtype`` on ``device``; None if they can."""
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
    return _broken_interpreter() if interpreted else _too_large(device)


def _broken_interpreter() -> str | None:
    """Triton's interpreter up to 3.6 converts arrays of one element to int, which NumPy from 2.4 on refuses."""
    triton, numpy = (importlib.metadata.version(name) for name in ("triton", "numpy"))
    if TorchVersion(triton) >= "3.7" or TorchVersion(numpy) < "2.4":
        return None
    return f"the interpreter of Triton {triton} needs NumPy below 2.4, and this is {numpy}"


def _untried(device: torch.device) -> str | None:
    """Why the kernels are not for the GPU ``device``; None if they are, or if it is not in this machine."""
    if torch.version.hip is not None:
        # An MI300 reports 9.4, and would get Hopper's tiles, which need three times the memory of its blocks.
        return f"this PyTorch is built for ROCm {torch.version.hip}, on which the kernels have not been tried"
    try:
        capability = torch.cuda.get_device_capability(device)
        name = torch.cuda.get_device_name(device)
    except (AssertionError, RuntimeError):
        return None
    if capability in CAPABILITIES:
        return None
    tested = ", ".join(f"{major}.{minor}" for major, minor in CAPABILITIES)
    return (
        f"{device} is a {name} of compute capability {capability[0]}.{capability[1]}; the kernels are compiled and "
        f"checked for {tested}"
    )


def _too_large(device: torch.device) -> str | None:
    """Triton 3.4 gives attention on a B200 264 KB of shared memory, of which it has 227; 3.6 does not."""
    version = importlib.metadata.version("triton")
    try:
        blackwell = torch.cuda.get_device_capability(device) == (10, 0)
    except (AssertionError, RuntimeError):
        return None
    if blackwell and TorchVersion(version) < "3.6":
        return f"Triton {version} gives kernels more shared memory than {device} has; it needs Triton 3.6"
    return None


def no_e4m3(device: torch.device) -> str | None:
    """Why the kernels cannot keep keys and values in e4m3 on ``device``; None if they can."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "Triton's interpreter rounds small numbers to 0 in e4m3, and NaN to 384"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        return f"{device} has compute capability {major}.{minor}; Triton has e4m3 from 8.9 on"
    return None


@functools.cache
def triton() -> SimpleNamespace:
    """The launchers, imported at the first call: the package also works without Triton."""
    modules = {file: importlib.import_module(f"dllm_fast.kernels.{file}") for file in KERNELS}
    return SimpleNamespace(**{name: getattr(modules[file], name) for file, names in KERNELS.items() for name in names})
