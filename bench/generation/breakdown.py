"""Where a run's time goes: torch.profiler's view of a separate run.

On a CPU, each function of `dllm_fast.ops` is a scope, and whatever runs outside of them is sorted by name. On CUDA,
kernels are sorted by name, because a recorded graph has no scopes, and the rest of the wall time is the host's.
"""

import contextlib
import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench.common import clock
from dllm_fast import ops

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn::", "mkl::", "dllm_fast::cpu_linear")
SCOPES = {
    "attention": "attention",
    "rms_norm": "norm, rope, gate",
    "layer_norm": "norm, rope, gate",
    "rope": "norm, rope, gate",
    "swiglu": "norm, rope, gate",
    "geglu": "norm, rope, gate",
    "linear": "matmuls",
    "predict": "selection",
    "commit": "commit",
}
BOTH = "LM head, selection"  # kernels that do both at once
# (group, parts of kernel names); the first match counts.
KERNELS = (
    ("attention", ("flash", "fmha", "attention", "_merge_kernel")),
    (BOTH, ("predict", "select", "_compact", "_combine", "argmax", "logsumexp")),
    ("commit", ("commit",)),
    ("norm, rope, gate", ("norm", "rope", "_glu")),
    ("matmuls", ("gemm", "nvjet", "cutlass", "cublas", "splitk", "_linear", "_round_rows", "_widen")),
)


def break_down(run: Callable[[], object], device: torch.device, seconds: float) -> dict[str, float]:
    """Milliseconds of ``run`` by group of operations.

    "host" is the time outside of all operations. On CUDA it is taken from ``seconds``, the run's time without the
    profiler, which does not slow kernels down; on a CPU from the time under the profiler, which slows every call.
    """
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with profile(activities=activities) as profiler, contextlib.nullcontext() if cuda else _scopes():
        watched = clock(run, device)
    spent: Counter[str] = Counter()
    for event in profiler.events():
        if cuda and event.device_type == torch.autograd.DeviceType.CUDA:
            spent[kernel_group(event.name)] += event.self_device_time_total / 1e3
        elif not cuda:
            spent[_category(event)] += event.self_cpu_time_total / 1e3
    spent["host"] = max(0.0, 1e3 * (seconds if cuda else watched) - sum(spent.values()))
    return dict(spent.most_common())


@contextlib.contextmanager
def _scopes() -> Iterator[None]:
    """Make every function of `ops` that has a group a scope of the profiler."""

    def scoped(name: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args, **kwargs):
            with record_function(f"ops.{name}"):
                return function(*args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        for name, function in inspect.getmembers(ops, inspect.isfunction):
            if name in SCOPES:
                stack.enter_context(mock.patch.object(ops, name, scoped(name, function)))
        yield


def _category(event) -> str:
    if event.name == "dllm_fast::cpu_predict":
        return BOTH
    product = event.name.startswith(PRODUCTS)
    scope, parent = "matmuls" if product else "other", event
    while parent is not None:
        if parent.name.startswith("ops."):  # the outermost scope counts: `predict` calls `linear`
            scope = SCOPES[parent.name.removeprefix("ops.")]
        parent = parent.cpu_parent
    return "LM head" if product and scope == "selection" else scope


def kernel_group(name: str) -> str:
    """The group of a CUDA kernel, by its name."""
    name = name.lower()
    return next((category for category, parts in KERNELS if any(part in name for part in parts)), "other")
