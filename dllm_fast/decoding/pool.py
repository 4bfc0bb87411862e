"""What a patched model keeps between calls, and what its threads share."""

import threading
from collections.abc import Hashable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from dllm_fast.decoding.engine import Engine


def total_memory(device: torch.device) -> float:
    """Bytes that the device has, where graphs are recorded: on a GPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else float("inf")


class Pool:
    """A lock, and the last engines that hold CUDA graphs, to be replayed by a call of the same shapes.

    A copy of a model starts with an empty pool: graphs belong to the weights they were recorded on.
    """

    SHARE = 0.125  # of the device's memory that kept engines and their graphs may take, beside the newest one

    def __init__(self):
        self.lock = threading.RLock()
        self.failure: str | None = None  # of the last recording that failed
        self._engines: dict[Hashable, Engine] = {}

    def __deepcopy__(self, memo) -> "Pool":
        return Pool()

    def __reduce__(self):
        return Pool, ()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._engines

    def __len__(self) -> int:
        return len(self._engines)

    @property
    def recorded(self) -> int:
        """Bytes of graphs' own memory, which PyTorch counts as free and no one else can have."""
        return sum(engine.graphs.nbytes for engine in self._engines.values())

    def take(self, key: Hashable):
        """The engine of that key, which is then the caller's alone; None if there is none."""
        return self._engines.pop(key, None)

    def give(self, key: Hashable, engine) -> None:
        """Keep an engine, if it holds graphs. Those given longest ago go until the rest are within `SHARE`."""
        self.failure = engine.graphs.failure or self.failure
        if not engine.graphs.enabled:
            return
        with self.lock:
            self._drop(key)
            self._engines[key] = engine
            limit = self.SHARE * total_memory(engine.device)
            while len(self._engines) > 1 and sum(kept.nbytes for kept in self._engines.values()) > limit:
                self._drop(next(iter(self._engines)))

    def clear(self) -> None:
        """Let go of every engine, where a batch needs their memory."""
        with self.lock:
            for key in list(self._engines):
                self._drop(key)

    def _drop(self, key: Hashable) -> None:
        engine = self._engines.pop(key, None)
        if engine is not None:
            engine.graphs.release()
