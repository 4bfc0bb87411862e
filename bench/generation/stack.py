"""Where the milliseconds of a forward go: attention, matmul, predict (LM head and selection), commit, norms, host.

On a CPU each call of a function of `dllm_fast.ops` and each matmul is timed, at a cost of a microsecond. The rest of
the wall time is the host's: embedding, indices, Python. On CUDA the kernels' own times are sorted by their names
(`bench.generation.breakdown`), and the host's time is the rest of the wall time.
"""

import contextlib
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import torch.nn.functional as F

from bench.common import clock
from bench.generation.breakdown import SCOPES, break_down
from dllm_fast import ops

PARTS = ("attention", "matmul", "predict", "commit", "norm, rope, gate", "host")
SHORT = 1.0  # seconds
# `bench.generation.breakdown`'s names.
PART = {"matmuls": "matmul", "LM head": "predict", "selection": "predict", "LM head, selection": "predict",
        "other": "host"}  # fmt: skip


def stacked(run: Callable[[], object], device: torch.device, seconds: float) -> dict[str, float]:
    """Milliseconds of each of `PARTS` in a run that takes ``seconds`` when not watched; for a short run, the median of
    three."""
    found = [_parts(run, device, seconds) for _ in range(3 if seconds < SHORT else 1)]
    return sorted(found, key=lambda parts: sum(parts.values()))[len(found) // 2]


def _parts(run: Callable[[], object], device: torch.device, seconds: float) -> dict[str, float]:
    if device.type == "cuda":
        found = Counter()
        for name, ms in break_down(run, device, seconds).items():
            # Kernels without a name of ours run between the ops: gathers, copies, masks.
            found[PART.get(name, name)] += ms
    else:
        with _timers() as found:
            wall = 1e3 * clock(run, device)
        found["host"] = max(0.0, wall - sum(found.values()))
    return {part: found[part] for part in PARTS}


@contextlib.contextmanager
def _timers() -> Iterator[Counter]:
    """Milliseconds by part. Only the outermost timed call counts: a matmul inside predict belongs to predict."""
    found, inside = Counter(), [False]

    def timed(function: Callable, part: str) -> Callable:
        @functools.wraps(function)
        def call(*args, **kwargs):
            if inside[0]:
                return function(*args, **kwargs)
            inside[0], begin = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                found[part] += 1e3 * (time.perf_counter() - begin)
                inside[0] = False

        return call

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(F, "linear", timed(F.linear, "matmul")))
        for name, scope in SCOPES.items():
            if hasattr(ops, name):
                function = timed(getattr(ops, name), PART.get(scope, scope))
                stack.enter_context(mock.patch.object(ops, name, function))
        yield found
