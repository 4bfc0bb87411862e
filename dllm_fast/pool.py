"""What a patched model keeps between calls, and what its threads share."""

import threading
from collections.abc import Hashable


class Pool:
    """A lock, and the last engines that hold CUDA graphs, to be replayed by a call of the same shapes.

    A copy of a model starts with an empty pool: graphs belong to the weights they were recorded on.
    """

    SIZE = 16  # engines at most: each holds a cache and its graphs' memory

    def __init__(self):
        self.lock = threading.RLock()
        self._engines: dict[Hashable, object] = {}

    def __deepcopy__(self, memo) -> "Pool":
        return Pool()

    def __reduce__(self):
        return Pool, ()

    def take(self, key: Hashable):
        """The engine of that key, which is then the caller's alone; None if there is none."""
        return self._engines.pop(key, None)

    def give(self, key: Hashable, engine) -> None:
        """Keep an engine, if it holds graphs, in place of the one that was given longest ago."""
        if engine.graphs.enabled:
            with self.lock:
                self._engines.pop(key, None)
                self._engines[key] = engine
                while len(self._engines) > self.SIZE:
                    self._engines.pop(next(iter(self._engines))).graphs.release()
