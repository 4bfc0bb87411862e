"""`graphs.Graphs` with a stand-in for CUDA's recording."""

import gc
import weakref

import pytest
import torch

from dllm_fast.decoding.graphs import Graphs


class Recorder:
    """Keeps recordings. A garbage collection while recording is an error, since on CUDA it may free graphs."""

    def __init__(self, monkeypatch):
        self.recording, self.streams = False, []
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(self))
        monkeypatch.setattr(torch.cuda, "graph", self.graph)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: ("stream", device))
        monkeypatch.setattr(gc, "collect", self._collect)

    def graph(self, graph, pool, stream, capture_error_mode):
        self.pools = [*getattr(self, "pools", []), pool]
        self.streams.append(stream)
        return self

    def __enter__(self):
        self.recording = True

    def __exit__(self, kind, error, trace):
        self.recording = False
        if error is not None:
            raise RuntimeError("operation failed due to a previous error during capture")

    def _collect(self):
        assert not self.recording


class Graph:
    def __init__(self, recorder):
        self.recorder, self.replays = recorder, 0

    def pool(self):
        return "pool"

    def replay(self):
        self.replays += 1


@pytest.fixture
def recorder(monkeypatch):
    return Recorder(monkeypatch)


def test_the_second_run_is_recorded_and_later_ones_replay(recorder):
    graphs, taken = Graphs(True, torch.device("cpu")), []
    for _ in range(4):
        graphs.run("step", lambda: taken.append(recorder.recording))
    assert taken == [False, True]
    assert graphs._graphs["step"].replays == 3
    graphs.run("other", lambda: taken.append(recorder.recording))
    graphs.run("other", lambda: taken.append(recorder.recording))
    assert recorder.pools == [None, "pool"], "graphs of one engine share their memory"


def test_nothing_is_collected_while_recording(recorder):
    """Reference cycles made by a step are only collected after recording."""
    graphs, seen = Graphs(True, torch.device("cpu")), []

    class Cycle:
        pass

    def step():
        assert gc.isenabled() != recorder.recording
        cycle = Cycle()
        cycle.itself = cycle
        seen.append(weakref.ref(cycle))
        del cycle
        for _ in range(3 * gc.get_threshold()[0]):
            [].append([])

    graphs.run("step", step)
    graphs.run("step", step)
    assert gc.isenabled()
    gc.disable()
    try:
        graphs.run("other", lambda: None)
        graphs.run("other", lambda: None)
        assert not gc.isenabled(), "left as it was found"
    finally:
        gc.enable()


def test_a_recording_that_fails_goes_on_eagerly_and_says_what_failed_first(recorder):
    graphs, taken = Graphs(True, torch.device("cpu")), []

    def step():
        if recorder.recording:
            raise ValueError("no such kernel")
        taken.append(1)

    graphs.run("step", step)
    with pytest.warns(UserWarning, match="steps go on without CUDA graphs.*ValueError: no such kernel"):
        graphs.run("step", step)
    graphs.run("step", step)
    assert len(taken) == 3
    assert graphs.failure == "ValueError: no such kernel"
    assert not graphs.enabled and gc.isenabled()


def test_release_frees_graphs_at_once(recorder):
    graphs = Graphs(True, torch.device("cpu"))
    graphs.run("step", lambda: None)
    graphs.run("step", lambda: None)
    graph = weakref.ref(graphs._graphs["step"])
    graphs.release()
    assert graph() is None


def test_steps_are_recorded_on_a_stream_of_their_own_device(recorder):
    """If another device is current, PyTorch's default stream would be on it, and would record nothing of the step."""
    for index in (1, 0):
        graphs = Graphs(True, torch.device("cuda", index))
        for key in ("full", "full", "block", "block"):
            graphs.run(key, lambda: None)
    assert recorder.streams == [("stream", torch.device("cuda", index)) for index in (1, 1, 0, 0)]
