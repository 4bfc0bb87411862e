"""CUDA graphs of a step: recorded once, replayed for as long as the buffers they were recorded on are used."""

from collections.abc import Callable, Hashable

import torch


class Graphs:
    """Runs functions that read and write static buffers alone and never wait for the device.

    On CUDA the first run of a key is eager, which lets kernels compile and libraries make their handles; the second
    is recorded, and from then on it is one launch. Elsewhere every run is eager.
    """

    def __init__(self, enabled: bool):
        self.enabled, self._graphs, self._pool = enabled, {}, None

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        if not self.enabled:
            step()
            return
        if key not in self._graphs:
            self._graphs[key] = None
            step()
            return
        if self._graphs[key] is None:
            graph = torch.cuda.CUDAGraph()
            # thread_local: another thread may allocate on the device while this one records.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                step()
            self._graphs[key], self._pool = graph, graph.pool()
        self._graphs[key].replay()
