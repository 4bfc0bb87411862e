"""`show_config`: what a bug report should say about the machine, and which code runs on it and why."""

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
# Prefixes of environment variables that change which code runs, or how fast.
VARIABLES = (
    "OMP_", "MKL_", "KMP_", "GOMP_", "ONEDNN_", "DNNL_", "ATEN_", "DLLM_", "TRITON_", "CUDA_", "HIP_", "ROCR_",
    "PYTORCH_", "TORCH_", "TORCHINDUCTOR_", "TORCHDYNAMO_", "NVIDIA_TF32_", "ACCELERATE_",
)  # fmt: skip


def show_config(model: torch.nn.Module | None = None) -> None:
    """Print what a bug report should contain: versions, devices, the implementation that ``impl="auto"`` takes for each
    op on each device and why, the CPU's instruction set, what was built, threads, and environment variables; and how
    ``model``, if given, is patched.

    ``python -m dllm_fast`` prints the same.

    Raises:
        ValueError: ``model`` is not a ``torch.nn.Module``.
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
            # A wheel's metadata may lack the part of torch's version that says what it was built for (+cpu, +cu130).
            version = torch.__version__ if name == "torch" else importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        yield f"{name} {version}"
    yield f"python {platform.python_version()} on {platform.platform()}"
    yield f"torch is built for CUDA {torch.version.cuda}, ROCm {torch.version.hip}"
    yield f"dllm_fast is at {Path(__file__).parent}"


def _devices() -> Iterator[str]:
    usable = f"{len(os.sched_getaffinity(0))} of " if hasattr(os, "sched_getaffinity") else ""
    yield f"cpu: {_processor()}, {usable}{os.cpu_count()} cores, {_free(torch.device('cpu'))} GiB free"
    capability = torch.backends.cpu.get_cpu_capability()
    yield f"PyTorch runs {torch.get_num_threads()} threads there, at CPU capability {capability}"
    for device in _gpus():
        shape = torch.cuda.get_device_properties(device)
        yield (
            f"{device}: {shape.name}, compute capability {shape.major}.{shape.minor}, {shape.multi_processor_count} "
            f"multiprocessors, {_free(device)} of {shape.total_memory / 2**30:.1f} GiB free"
        )
    if not torch.cuda.is_available():
        yield "no CUDA device"


def _free(device: torch.device) -> str:
    size = available(device)
    return "an unknown number of" if size is None else f"{size / 2**30:.1f}"


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
    yield f"linears run in PyTorch from these numbers of rows, in the extension below ({how}): DLLM_FAST_MATMUL={table}"


def _implementations() -> Iterator[str]:
    for device in [torch.device("cpu"), *_gpus()]:
        for dtype in (*FLOATS, torch.float64):
            taken, obstacle = ops.auto(device, dtype)
            reason = f": {obstacle}" if obstacle else ""
            yield f"{device}, {dtype_name(dtype)}: {NAMES[taken]}{reason}"


def _ops() -> Iterator[str]:
    for impl in ("triton", "cpp"):
        own = {op: where[impl] for op, where in ops.SERVED.items() if impl in where}
        named = [op + (f" ({where})" if where else "") for op, where in own.items()]
        yield f"{NAMES[impl]}: {', '.join(named)}"
        other = [op for op in ops.SERVED if op not in own]
        yield f"PyTorch beside {NAMES[impl]}: {', '.join(other) or 'nothing'}"
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
        f"{device}: attention over whole sequences runs in PyTorch for these dtypes and head dims, from these numbers "
        f"of queries, else in Triton ({why}): DLLM_FAST_ATTENTION={table}"
    )


def _settings() -> Iterator[str]:
    variables = {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)}
    yield from (f"{name}={value}" for name, value in variables.items())
    if not variables:
        yield "no environment variable that changes speed"
    yield f"default dtype {torch.get_default_dtype()}, default device {torch.get_default_device()}"
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # raised if it was set through torch.backends
        precision = torch.backends.fp32_precision  # type: ignore[attr-defined]  # exists at run time only
    yield f"oneDNN {'on' if torch.backends.mkldnn.enabled else 'off'}, fp32 matmuls in precision {precision!r}"
    cast = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    yield f"autocast on {', '.join(cast)}" if cast else "no autocast"


def _model(model: torch.nn.Module) -> Iterator[str]:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    yield f"{type(model).__name__} of model_type {kind!r}, {'training' if model.training else 'eval'} mode"
    counts = Counter((dtype_name(x.dtype), str(x.device)) for x in model.parameters())
    yield "parameters: " + ", ".join(f"{n} of {dtype} on {device}" for (dtype, device), n in counts.items())
    patched = [(name, state) for name, module in model.named_modules() if (state := patch_of(module)) is not None]
    for name, state in patched:  # not model itself if that is a wrapper, PEFT's for example
        inside = f"{name} " if name else ""
        weights = "its own weights" if state.weights is None else f"{state.weights} copies of its weights"
        if (kind := loaded_kind(state.model)) is not None:
            weights = f"{kind} weights, which it was loaded with"
        head = "" if state.head is None else f", and an {state.head} copy of its LM head's"
        yield f"{inside}patched with impl={state.impl!r}, here {NAMES[state.family.impl]}; multiplies {weights}{head}"
        if state.pool.failure is not None:
            yield f"runs steps without CUDA graphs where recording failed, last with {state.pool.failure}"
        elif len(state.pool):
            yield f"keeps the CUDA graphs of {len(state.pool)} shapes of batches"
    if not patched:
        yield "not patched"
