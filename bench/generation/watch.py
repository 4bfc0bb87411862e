"""Records each forward of the engine: its kind, its work and its time."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dllm_fast.decoding.engine import Engine


@dataclass
class Step:
    """kind: "full"; "block", the block's positions against a cache; "window", a refresh's; "mixed", rows that differ.

    positions: how many the forward computes, over all rows. masked: how many were still masked when it began; None
    unless looked at. seen: how many slots a query sees, the mean of the rows. begin, end: seconds on a CPU, events on
    a device.
    """

    kind: str
    positions: float
    masked: int | None
    seen: float
    begin: object
    end: object

    @property
    def seconds(self) -> float:
        if isinstance(self.begin, float):
            return self.end - self.begin
        return self.begin.elapsed_time(self.end) / 1e3


@contextlib.contextmanager
def watching(look: bool = False) -> Iterator[list[Step]]:
    """A list that fills with the steps that run inside. With ``look``, each step waits for the device."""
    steps: list[Step] = []

    @contextlib.contextmanager
    def watch(engine, step):
        masked = _masked(engine) if look else None
        seen = float(engine.alone["full"].double().mean())
        before, begin = _positions(engine), _now(engine.device)
        yield
        kind = "mixed" if step is None else step.kind
        steps.append(Step(kind, _positions(engine) - before, masked, seen, begin, _now(engine.device)))

    with Engine.watched(watch):
        yield steps


def _positions(engine: Engine) -> float:
    return sum(row.positions for row in engine.counts)


def _masked(engine: Engine) -> int:
    at = engine.slot[:, None] + engine.offsets  # [B, T]
    return int(((engine.canvas.gather(1, at) == engine.options.mask_id) & engine.open.gather(1, at)).sum())


def _now(device: torch.device):
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
