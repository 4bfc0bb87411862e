"""Times one call of each of several implementations on the device.

On CUDA, a graph of many calls is captured once and its replays are timed with events, because a launch costs the host
several microseconds, more than many of these kernels run. The calls rotate among input sets that together are several
times the size of the L2, and all outputs of a rotation are alive at once, so that data comes from memory. What cannot
be captured is launched call by call and marked so. Implementations take turns, one replay each, so that clock drift
affects all alike.
"""

import collections
import contextlib
import dataclasses
import functools
import gc
import math
import time
from collections.abc import Callable

import torch

from bench.floors import cache_bytes, percentile

MAX_SETS = 64
REPLAY_SECONDS = 2e-3  # a replay's target: far above the 0.5 us resolution of events
BUDGET_SECONDS = 0.6  # for one implementation's replays
ROUNDS, FEWEST_ROUNDS = 20, 5
MAX_LAUNCHES = 1024


class WrongResult(Exception):
    pass


@dataclasses.dataclass
class Result:
    times: list[float]  # seconds per call, for each round
    how: str = ""  # "graph", "stream" (with launch overhead) or "host"
    relative: float = math.nan  # |out - truth| / |truth|
    error: str = ""  # one line on why there are no times

    @property
    def median(self) -> float:
        return percentile(self.times, 0.5) if self.times and not self.error else math.inf


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"


def set_count(size: int, device: str) -> int:
    """How many input sets of ``size`` bytes make four times the last-level cache."""
    return max(1, min(MAX_SETS, math.ceil(4 * cache_bytes(device) / max(size, 1))))


class Timer:
    """Calls ``function`` with each of ``sets`` in turn; ``timer()`` returns the seconds per call."""

    def __init__(self, function: Callable, sets: list[tuple], device: str, pool=None):
        self.function, self.sets, self.launches, self.graph = function, sets, len(sets), None
        self.cuda = torch.device(device).type == "cuda"
        self.how = "stream" if self.cuda else "host"
        if not self.cuda:
            return
        for inputs in (*sets[:1] * 3, *sets[1:]):  # compiles, tunes, allocates workspaces
            function(*inputs)
        first = min(self() for _ in range(2))
        rotations = math.ceil(REPLAY_SECONDS / max(first * len(sets), 1e-9))
        self.launches = len(sets) * max(1, min(rotations, MAX_LAUNCHES // len(sets)))
        with contextlib.suppress(Exception):
            torch.cuda.empty_cache()  # a capture cannot reuse memory in PyTorch's cache
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._run()
            graph.replay()
            torch.cuda.synchronize()
            self.graph, self.how = graph, "graph"

    def _run(self) -> None:
        alive = collections.deque(maxlen=len(self.sets))
        for i in range(self.launches):
            alive.append(self.function(*self.sets[i % len(self.sets)]))

    def __call__(self) -> float:
        run = self._run if self.graph is None else self.graph.replay
        if not self.cuda:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) / self.launches
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / self.launches


def in_turns(timers: dict[str, Timer], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Each timer's seconds, measured in turns: a, b, c, a, b, c, ..."""
    times: dict[str, list[float]] = {name: [] for name in timers}
    wanted = dict.fromkeys(timers, rounds)
    for turn in range(rounds):
        for name, timer in timers.items():
            if turn < wanted[name]:
                times[name].append(timer())
                spent = times[name][-1] * timer.launches
                wanted[name] = min(rounds, max(FEWEST_ROUNDS, int(BUDGET_SECONDS / spent)))
    return times


@functools.cache
def spare_the_collector() -> None:
    """A capture starts with a garbage collection: exempt everything that torch and its compilers have loaded."""
    gc.collect()
    gc.freeze()


def measure(case, device: str, quick: bool = False) -> dict[str, Result]:
    """Check every implementation of a `bench.ops.cases.case.Case` against the truth, then time the right ones.

    An error in "ours" is raised; a peer's error becomes its result. ``quick`` does the same in as few calls as
    possible.
    """
    spare_the_collector()
    count = 2 if quick else set_count(case.bytes, device)
    sets = [case.inputs(torch.Generator(device).manual_seed(i)) for i in range(count)]
    check = case.check(sets[0])
    results, timers = {}, {}
    pool = torch.cuda.graph_pool_handle() if torch.device(device).type == "cuda" else None
    for name, function in case.run.items():
        result = results[name] = Result([])
        try:
            # Cloned because some peers work in place.
            out = function(*(x.clone() if isinstance(x, torch.Tensor) else x for x in sets[0]))
            if name not in case.unchecked:
                excess, result.relative = check(out)
                if complaint := case.complaint(name, excess, result.relative):
                    raise WrongResult(complaint)
            del out
            timers[name] = Timer(function, sets, device, pool)
            result.how = timers[name].how
        except Exception as error:
            if name == "ours":
                raise
            result.error = one_line(error)
    for name, times in in_turns(timers, 2 if quick else ROUNDS).items():
        results[name].times = times
    timers.clear()
    del sets, check
    if pool is not None:
        torch.cuda.empty_cache()
    return results
