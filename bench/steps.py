"""A block step of LLaDA-8B's shape as a CUDA graph, in several ways: which matmuls, chained or not, which tiles.

    python -m bench.steps [--layers 32] [--rows 32] [--fp8] [--quick]

Every way is recorded anew on the same buffers and replayed; milliseconds are medians, in turns. The floor is the
weights, keys and values at the copy bandwidth measured in the same run.
"""

import argparse
import contextlib
import statistics
import sys
from unittest import mock

import torch

import dllm_fast
from bench.harness import SHAPES, build_model, machine
from dllm_fast.kernels import attention, glu, linear, norm, rope, round_rows
from dllm_fast.patch import bound_family, bound_pool

CHAINS = (attention, glu, linear, norm, rope, round_rows)
TILES = {  # by bytes of a weight; the first are those that ship
    2: ({}, {"BK": 64, "num_stages": 5, "AHEAD": 4}, {"BN": 64, "BK": 256}),
    1: ({}, {"AHEAD": 0}, {"programs": 1}, {"num_warps": 8}),
}


def unchained(device, programs) -> dict:
    return {"CHAINED": False}


@contextlib.contextmanager
def way(tiles: dict | None, chained: bool, rows: int, size: int):
    """The matmul with ``tiles`` in place of those that ship; None: the one that served before."""
    with contextlib.ExitStack() as stack:
        if not chained:
            for module in CHAINS:
                stack.enter_context(mock.patch.object(module, "chained", unchained))
        if tiles is None:
            stack.enter_context(mock.patch.object(linear, "AHEAD", ()))
        else:
            tiles = dict(tiles)
            stack.enter_context(mock.patch.object(linear, "AHEAD", (size,)))
            programs = {size: tiles.pop("programs", linear.PROGRAMS[size])}
            stack.enter_context(mock.patch.dict(linear.PROGRAMS, programs))
            configs = linear.CONFIGS[size]
            key = next(n for n in configs if rows <= n)
            stack.enter_context(mock.patch.dict(configs, {key: configs[key] | tiles}))
        yield


def record(engine, kind: str) -> torch.cuda.CUDAGraph:
    engine._step(kind, 0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        engine._step(kind, 0)
    return graph


def replay(graph, engine, mask_id: int) -> float:
    """Milliseconds of one replay, all of the block's positions masked again beforehand."""
    at = engine.slot[:, None] + engine.offsets
    engine.canvas.scatter_(1, at, torch.full_like(at, mask_id))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def copy_rate(device) -> float:
    """Bytes a second, read and written."""
    x = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    y, times = torch.empty_like(x), []
    for _ in range(10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        y.copy_(x)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return 2 * x.numel() / statistics.median(times)


def floor(family, engine, fp8: bool, rate: float) -> float:
    """Milliseconds of a block step's bytes: layers and head once, and keys and values."""
    layers = sum(linear.weight.numel() for group in family.groups() for linear in group)
    head = family.head()[0].numel()
    kept = engine.cache.buffers.nbytes
    return 1e3 * (layers * (1 if fp8 else 2) + 2 * head + kept) / rate


def profile(graph, engine, mask_id: int, top: int = 16) -> None:
    """Kernels of one replay by their time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        replay(graph, engine, mask_id)
    spent: dict[str, list[float]] = {}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spent.setdefault(event.name, []).append(event.self_device_time_total)
    for name, times in sorted(spent.items(), key=lambda item: -sum(item[1]))[:top]:
        print(f"{sum(times) / 1e3:8.3f} ms {len(times):5d} x {statistics.median(times):7.1f} us  {name[:80]}")


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--fp8", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="the ways that ship, before and after, alone")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA device: graphs are what is timed", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    print(machine(device, torch.bfloat16))
    shape = SHAPES["llada-8b"]
    model = build_model(
        type(shape)({**shape.config, "n_layers": options.layers}, *list(vars(shape).values())[1:]),
        torch.bfloat16, device,
    )  # fmt: skip
    dllm_fast.patch(model, weights="fp8" if options.fp8 else None)
    mask_id = model.config.mask_token_id
    ids = torch.randint(0, 1000, (options.batch, 768), device=device)
    with way(None, False, 32, 2):
        for _ in range(2):
            dllm_fast.generate(model, ids, gen_length=256, block_length=32, schedule=dllm_fast.Uniform(16))
    engine = next(iter(bound_pool(model)._engines.values()))
    engine.slot.fill_(engine.slots - 64)
    engine.count.fill_(2)
    rows, size = 32 * options.batch, 1 if options.fp8 else 2
    ways = {"before": (None, False), "before, chained": (None, True), "ours, not chained": ({}, False)}
    for tiles in TILES[size][: 1 if options.quick else None]:
        ways |= {f"ours, not chained {tiles}": (tiles, False), f"ours, chained {tiles}": (tiles, True)}
    graphs, hidden = {}, {}
    for name, (tiles, chained) in ways.items():
        with way(tiles, chained, rows, size):
            try:
                graphs[name] = record(engine, "block")
                at = engine.slot[:, None] + engine.offsets
                engine.canvas.scatter_(1, at, torch.full_like(at, mask_id))
                hidden[name] = engine._evaluate("block", 0).float()
            except Exception as error:
                print(f"{name}: {type(error).__name__}: {str(error)[:200]}")
    own = hidden["before"]
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(options.rounds):
        for name, graph in graphs.items():
            times[name].append(replay(graph, engine, mask_id))
    rate = copy_rate(device)
    least = floor(bound_family(model), engine, options.fp8, rate)
    print(f"copy {rate / 1e12:.2f} TB/s; floor {least:.2f} ms")
    for name, values in times.items():
        middle = statistics.median(values)
        apart = ((hidden[name] - own).norm() / own.norm()).item()
        span = f"{min(values):.3f}-{max(values):.3f}"
        print(f"{middle:7.3f} ms ({span}) {middle / least:5.2f} x, hidden {apart:.1e}  {name}")
    best = min(times, key=lambda name: statistics.median(times[name]))
    for name in ("before", best):
        print(f"\n{name}:")
        profile(graphs[name], engine, mask_id)
    if not options.quick:
        whole = {}
        for name, (tiles, chained) in (("before", (None, False)), ("chained", ({}, True))):
            with way(tiles, chained, rows, size):
                whole[name] = record(engine, "full")
        for name, graph in whole.items():
            values = [replay(graph, engine, mask_id) for _ in range(5)]
            print(f"whole step, {name}: {statistics.median(values):.2f} ms")
        profile(whole["chained"], engine, mask_id)
    return 0


if __name__ == "__main__":
    sys.exit(main())
