"""Where a run's time goes, from torch.profiler in a run of its own that is not timed otherwise.

On a CPU: each function of `dllm_fast.ops` is a scope, and what runs outside of them is told apart by its name. On CUDA:
by the names of the kernels, as a recorded graph has no scopes; what is left of the wall is the host's.
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
    "linear": "products",
    "predict": "selection",
    "commit": "commit",
}
BOTH = "LM head, selection"  # of a kernel that also multiplies by the LM head
# The first that matches.
KERNELS = (
    ("attention", ("flash", "fmha", "attention")),
    (BOTH, ("predict", "select", "_compact", "_combine", "argmax", "logsumexp")),
    ("commit", ("commit",)),
    ("norm, rope, gate", ("norm", "rope", "_glu")),
    ("products", ("gemm", "nvjet", "cutlass", "cublas", "splitk", "_linear", "_round_rows", "_widen")),
)


def break_down(run: Callable[[], object], device: torch.device, seconds: float) -> dict[str, float]:
    """Milliseconds of ``run`` by what they were spent on.

    "host" is what no operation accounts for: on CUDA of the ``seconds`` that the run takes unwatched, as the kernels
    keep their speed under the profiler; on a CPU of those that it takes under it, which slows every call.
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
    """Every function of `ops` that has a category, as a scope of the profiler."""

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
    scope, parent = "products" if product else "other", event
    while parent is not None:
        if parent.name.startswith("ops."):  # the outermost counts: `predict` calls `linear`
            scope = SCOPES[parent.name.removeprefix("ops.")]
        parent = parent.cpu_parent
    return "LM head" if product and scope == "selection" else scope


def kernel_group(name: str) -> str:
    """What a kernel of that name in a CUDA profile belongs to."""
    name = name.lower()
    return next((category for category, parts in KERNELS if any(part in name for part in parts)), "other")
