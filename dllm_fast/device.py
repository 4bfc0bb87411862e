"""What a script has set for its thread, and would change what a model's ops do: autocast, and which GPU is current."""

import contextlib
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
