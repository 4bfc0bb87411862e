"""Copies between host and device, and steps that no script's autocast or choice of the current GPU changes."""

import contextlib
import time
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def as_written(device: torch.device) -> Iterator[None]:
    """Within it, ops on ``device`` compute in the dtypes of their arguments, and a kernel is launched where these are.

    Autocast would cast some of a step's tensors and not others, on the host too, where schedules are planned. Triton
    launches on the current GPU, whatever holds the tensors.
    """
    with contextlib.ExitStack() as stack:
        for kind in {device.type, "cpu"}:
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        yield


def on_host(values: list, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """A tensor on the host, whatever default device a script has set."""
    return torch.tensor(values, dtype=dtype, device="cpu")


def upload(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy ``values`` from the host to ``device`` without waiting for it: from ordinary memory, the call would return
    only when the GPU has finished everything that was launched before."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def download(values: torch.Tensor) -> torch.Tensor:
    """A copy of the device's ``values`` on the host, through memory that the device writes to itself."""
    if not values.is_cuda:
        return values.to("cpu", copy=True)
    copy = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
    copy.copy_(values, non_blocking=True)
    torch.cuda.current_stream(values.device).synchronize()
    return copy


def now(device: torch.device) -> float:
    """Seconds, when the device has done what was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
