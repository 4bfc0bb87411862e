"""`show_config`: what a bug report needs to say of the machine, and which code runs on it and why."""

import importlib.metadata
import os
import platform
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from dllm_fast import attentions, ops
from dllm_fast.cpu import compiled, matmuls
from dllm_fast.decoding.memory import available
from dllm_fast.families.forward import patch_of
from dllm_fast.families.rounded import loaded_kind
from dllm_fast.kernels.checks import FLOATS, dtype_name

PACKAGES = ("dllm_fast", "torch", "triton", "transformers", "numpy")
NAMES = {"triton": "Triton kernels", "cpp": "the compiled extension", "torch": "PyTorch"}
# The implementations that have an op of their own, with where it serves if not everywhere; else PyTorch serves it.
FEW = "few rows of 16 bits on Hopper"
SERVED = {
    "linear": {"triton": FEW, "cpp": "up to the rows below"},
    "swiglu_linear": {"triton": FEW},
    "scaled_linear": {"triton": FEW},
    "int4_linear": {"triton": "few rows of 16 bits"},
    "widen_int4": {"triton": ""},
    "round_rows": {"triton": ""},
    "attention": {"triton": "but whole sequences as below", "cpp": ""},
    "rope": {"triton": "", "cpp": ""},
    "rms_norm": {"triton": "", "cpp": ""},
    "layer_norm": {"triton": ""},
    "swiglu": {"triton": "", "cpp": ""},
    "geglu": {"triton": ""},
    "predict": {"triton": "", "cpp": ""},
    "commit": {"triton": ""},
    "masked_loss": {"triton": ""},
}
# What is set of these changes which code runs, or how fast.
VARIABLES = ("OMP_", "MKL_", "KMP_", "GOMP_", "ONEDNN_", "DNNL_", "ATEN_", "DLLM_", "TRITON_", "CUDA_", "HIP_", "ROCR_")
VARIABLES += ("PYTORCH_", "TORCH_", "TORCHINDUCTOR_", "TORCHDYNAMO_", "NVIDIA_TF32_", "ACCELERATE_")


def show_config(model: torch.nn.Module | None = None) -> None:
    """Print versions, devices, the implementation that ``impl="auto"`` takes for each op on each device and why, the
    CPU's instruction set, what was built, threads, and environment variables; of a ``model``, how it is patched.

    ``python -m dllm_fast`` prints it too. Put it into a bug report.

    Raises:
        ValueError: ``model`` is no ``torch.nn.Module``.
    """
    if model is not None and not isinstance(model, torch.nn.Module):
        raise ValueError(f"model: a {type(model).__name__} is not a torch.nn.Module")
    print("\n".join(_report(model)))


def _report(model: torch.nn.Module | None) -> Iterator[str]:
    parts = [("versions", _versions()), ("devices", _devices()), ("compiled extension", _extension())]
    parts += [("impl='auto' takes", _implementations()), ("ops", _ops()), ("settings", _settings())]
    parts += [("model", _model(model))] if model is not None else []
    for title, lines in parts:
        yield f"{title}:"
        yield from (f"  {line}" for line in lines)


def _versions() -> Iterator[str]:
    for name in PACKAGES:
        try:
            # A wheel's file may leave out of torch's version what it was built for (+cpu, +cu130).
            version = torch.__version__ if name == "torch" else importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        yield f"{name} {version}"
    yield f"python {platform.python_version()} on {platform.platform()}"
    yield f"torch is built for CUDA {torch.version.cuda}, ROCm {torch.version.hip}"
    yield f"dllm_fast is at {Path(__file__).parent}"


def _devices() -> Iterator[str]:
    cpu, free = torch.device("cpu"), available(torch.device("cpu"))
    memory = "" if free is None else f", {free / 2**30:.1f} GiB free"
    mine = f"{len(os.sched_getaffinity(0))} of " if hasattr(os, "sched_getaffinity") else ""
    yield f"{cpu}: {_processor()}, {mine}{os.cpu_count()} cores{memory}"
    capability = torch.backends.cpu.get_cpu_capability()
    yield f"PyTorch runs {torch.get_num_threads()} threads there, at CPU capability {capability}"
    for device in _gpus():
        shape = torch.cuda.get_device_properties(device)
        yield (
            f"{device}: {shape.name}, compute capability {shape.major}.{shape.minor}, {shape.multi_processor_count} "
            f"multiprocessors, {available(device) / 2**30:.1f} of {shape.total_memory / 2**30:.1f} GiB free"
        )
    if not torch.cuda.is_available():
        yield "no CUDA device"


def _gpus() -> list[torch.device]:
    return [torch.device("cuda", i) for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _extension() -> Iterator[str]:
    if (missing := compiled.missing()) is not None:
        yield missing
        return
    try:
        levels = compiled.levels()
    except ValueError as error:
        yield str(error)
        return
    level = levels[-1] if compiled._level is None else compiled.LEVELS[compiled._level]
    yield f"built, for {', '.join(compiled.LEVELS)}; runs {level}, the best that this CPU and the environment allow"
    try:
        table = matmuls.table()
    except ValueError as error:
        yield str(error)
        return
    how = "set" if os.environ.get("DLLM_FAST_MATMUL") else "measured"
    yield f"linears are PyTorch's from so many rows on, the extension's below ({how}): DLLM_FAST_MATMUL={table}"


def _implementations() -> Iterator[str]:
    for device in [torch.device("cpu"), *_gpus()]:
        for dtype in (*FLOATS, torch.float64):
            taken, obstacle = ops.auto(device, dtype)
            reason = f": {obstacle}" if obstacle else ""
            yield f"{device}, {dtype_name(dtype)}: {NAMES[taken]}{reason}"


def _ops() -> Iterator[str]:
    for impl in ("triton", "cpp"):
        own = {op: where[impl] for op, where in SERVED.items() if impl in where}
        named = [op + (f" ({where})" if where else "") for op, where in own.items()]
        yield f"with {NAMES[impl]}, its own: {', '.join(named)}"
        other = [op for op in SERVED if op not in own]
        yield f"with {NAMES[impl]}, PyTorch's: {', '.join(other) or 'none'}"
    for device in _gpus():
        yield _whole_attention(device)


def _whole_attention(device: torch.device) -> str:
    try:
        table = attentions.table(device)
    except ValueError as error:
        return str(error)
    why = "set" if os.environ.get("DLLM_FAST_ATTENTION") else "measured"
    if table == attentions.NEVER and why == "measured":
        why = "not measured on this card"
    return (
        f"{device}, attention of whole sequences is PyTorch's for a dtype, a head dim and from so many queries on, "
        f"else Triton's ({why}): DLLM_FAST_ATTENTION={table}"
    )


def _settings() -> Iterator[str]:
    found = {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)}
    yield from (f"{name}={value}" for name, value in found.items())
    if not found:
        yield "no environment variable that holds anything down"
    yield f"default dtype {torch.get_default_dtype()}, default device {torch.get_default_device()}"
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # PyTorch refuses to say once it was set in the other of its two ways
        precision = torch.backends.fp32_precision
    yield f"oneDNN {'on' if torch.backends.mkldnn.enabled else 'off'}, fp32 products in precision {precision!r}"
    cast = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    yield f"autocast on {', '.join(cast)}" if cast else "no autocast"


def _model(model: torch.nn.Module) -> Iterator[str]:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    yield f"{type(model).__name__} of model_type {kind!r}, {'training' if model.training else 'eval'} mode"
    lots = Counter((dtype_name(x.dtype), str(x.device)) for x in model.parameters())
    yield "parameters: " + ", ".join(f"{n} of {dtype} on {device}" for (dtype, device), n in lots.items())
    patched = [(name, state) for name, module in model.named_modules() if (state := patch_of(module)) is not None]
    for name, state in patched:  # a wrapper, PEFT's say, holds the model that is patched
        inside = f"{name} " if name else ""
        weights = "its own weights" if state.weights is None else f"{state.weights} copies of its weights"
        if (kind := loaded_kind(state.model)) is not None:
            weights = f"{kind} weights, which it was loaded with"
        head = "" if state.head is None else f", and an {state.head} copy of its LM head's"
        yield f"{inside}patched with impl={state.impl!r}, here {NAMES[state.family.impl]}; multiplies {weights}{head}"
        if state.pool.failure is not None:
            yield f"its steps go on without CUDA graphs where recording failed, last by {state.pool.failure}"
        elif len(state.pool):
            yield f"keeps the CUDA graphs of {len(state.pool)} shapes of batches"
    if not patched:
        yield "not patched"
