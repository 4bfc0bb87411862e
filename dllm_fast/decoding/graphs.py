"""CUDA graphs of a step: recorded once, replayed for as long as the buffers they were recorded on are used."""

import gc
import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch


def records(device: torch.device, impl: str) -> bool:
    """Whether an engine's steps are recorded: on a GPU whose ops are all kernels."""
    return device.type == "cuda" and impl == "triton"


class Graphs:
    """Runs functions that read and write only static buffers and never wait for the device.

    On CUDA the first run of a key is eager, which lets kernels compile and libraries make their handles; the second
    is recorded, and from then on it is one launch. Elsewhere every run is eager.
    """

    recordings = 0  # of this process

    def __init__(self, enabled: bool, device: torch.device):
        self.enabled = enabled
        self.device = device
        self.failure: str | None = None  # why recording was given up
        self.nbytes = 0  # of the device's memory that the graphs hold for themselves
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}  # None: the key has run once
        self._pool: Any = None  # the memory that all of them share
        self._stream: torch.cuda.Stream | None = None

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        if not self.enabled:
            step()
            return
        if key not in self._graphs:
            self._graphs[key] = None
            step()
            return
        graph = self._graphs[key]
        if graph is None:
            try:
                graph = self._graphs[key] = self._record(step)
            except Exception as error:
                # Nothing that was recorded has run, so the step can still be taken.
                self.release()
                self.enabled = False
                self.failure = f"{type(error).__name__}: {error}"
                warnings.warn(f"steps go on without CUDA graphs; recording one failed: {self.failure}", stacklevel=2)
                step()
                return
        graph.replay()

    def _record(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        failure: Exception | None = None
        # PyTorch keeps one stream for recording, made once a process on the GPU that is current then. Of another GPU
        # it sees no step, and replays would change nothing. Within a stream its GPU is current.
        self._stream = self._stream or torch.cuda.Stream(self.device)
        # A collection may free another engine's graphs, which CUDA forbids while it records.
        collects, before = gc.isenabled(), torch.cuda.memory_reserved(self.device)
        gc.disable()
        try:
            # thread_local: another thread may allocate on the device while this one records.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                try:
                    step()
                except Exception as error:
                    failure = error
                    raise
        except Exception as error:
            # Ending the recording fails too, for reasons that follow from the first.
            raise failure or error from None
        finally:
            if collects:
                gc.enable()
        self._pool = graph.pool()
        self.nbytes += max(0, torch.cuda.memory_reserved(self.device) - before)
        Graphs.recordings += 1
        return graph

    def release(self) -> None:
        """Free the graphs now, not when a collection comes by."""
        self._graphs.clear()
        self._pool = None
        self.nbytes = 0
