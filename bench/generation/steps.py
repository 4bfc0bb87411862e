"""Times a block step of LLaDA-8B's shape as a CUDA graph in several variants: which matmuls and tiles, rotation in the
matmul of q, k and v or after it, in how many parts attention is divided, and launches chained or not.

    python -m bench.generation.steps [--batch 1] [--weights fp8] [--head fp8] [--quick]

Each variant is recorded on the same buffers and replayed; milliseconds are medians of interleaved replays. The floor is
the bytes of weights, keys and values at the copy bandwidth measured in the same run.
"""

import argparse
import contextlib
import dataclasses
import statistics
import sys
from collections import Counter
from unittest import mock

import torch

import dllm_fast
from bench import floors
from bench.common import SHAPES, build_model, machine
from bench.generation.breakdown import kernel_group
from bench.generation.cost import BYTES, Card, Cost, by_group, print_beside, step_kernels
from dllm_fast.decoding.engine import Engine
from dllm_fast.decoding.steps import Step
from dllm_fast.kernels import attention, glu, linear, linear_int4, linear_rope, norm, rope, round_rows
from dllm_fast.kernels.tiles import multiprocessors
from dllm_fast.patch import bound_family

CHAINS = (attention, glu, linear, linear_int4, norm, rope, round_rows)
TILES = {  # by `patch`'s weights; the shipped ones come first
    None: ({}, {"rope": False}, {"BK": 64, "num_stages": 5, "AHEAD": 4}, {"BN": 64, "BK": 256}),
    "fp8": ({}, {"rope": True}, {"AHEAD": 0}, {"num_warps": 8}, {"BN": 64, "programs": 4}),
    "int4": (
        {}, {"rope": False}, {"num_warps": 4, "maxnreg": 255}, {"num_stages": 2}, {"programs": 1, "maxnreg": 255},
        {"BN": 64, "num_warps": 4, "programs": 4},
    ),
}  # fmt: skip
# Weights whose matmul rotates, by a variant's "rope"; None: those that are shipped.
ROPE = {None: linear_rope.ROPE, False: (), True: (*linear_rope.ROPE, torch.float8_e4m3fn)}
SIZES = {None: 2, **BYTES}  # bytes of a weight
DEVICE = "cuda"


def unchained(device, programs) -> dict:
    return {"CHAINED": False}


@contextlib.contextmanager
def way(tiles: dict, chained: bool, rows: int, weights: str | None):
    """Replace what ``tiles`` names. "own": False takes PyTorch's matmul (for int4, on widened weights)."""
    tiles = dict(tiles)
    with contextlib.ExitStack() as stack:

        def put(module, name: str, value) -> None:
            stack.enter_context(mock.patch.object(module, name, value))

        if not chained:
            for module in CHAINS:
                put(module, "chained", unchained)
        put(attention, "THREADS", tiles.pop("threads", attention.THREADS))
        put(linear_rope, "ROPE", ROPE[tiles.pop("rope", None)])
        own = tiles.pop("own", True)
        if weights == "int4":
            module, configs = linear_int4, linear_int4.CONFIGS
            put(module, "ROWS", module.ROWS if own else 0)
            put(module, "PROGRAMS", tiles.pop("programs", module.PROGRAMS))
        else:
            size = SIZES[weights]
            module, configs = linear, linear.CONFIGS[size]
            put(module, "AHEAD", (size,) if own else ())
            put(module, "PROGRAMS", module.PROGRAMS | {size: tiles.pop("programs", module.PROGRAMS[size])})
        key = next(n for n in configs if rows <= n)
        stack.enter_context(mock.patch.dict(configs, {key: configs[key] | tiles}))
        yield


def record(engine, step: Step) -> torch.cuda.CUDAGraph:
    engine.run_step(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        engine.run_step(step)
    return graph


def used_engine(model, ids: torch.Tensor, gen_length: int, block: int) -> Engine:
    """The engine that generates from ``ids``, after it has done so twice."""
    engines = []

    def watch(engine, step):
        engines.append(engine)
        return contextlib.nullcontext()

    schedule = dllm_fast.Uniform(2 * gen_length // block)
    with Engine.watched(watch):
        for _ in range(2):
            dllm_fast.generate(model, ids, gen_length=gen_length, block_length=block, schedule=schedule)
    return engines[-1]


def mask_block(engine, mask_id: int) -> None:
    at = engine.slot[:, None] + engine.offsets
    engine.canvas.scatter_(1, at, torch.full_like(at, mask_id))
    engine.live.fill_(engine.block_size)


def replay(graph, engine, mask_id: int) -> float:
    """Milliseconds of one replay, after masking all of the block's positions again."""
    mask_block(engine, mask_id)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def copy_rate(device) -> float:
    """Bytes per second, read plus written."""
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


def floor(family, engine, weights: str | None, head: str | None, rate: float) -> float:
    """Milliseconds for a block step's bytes: layers and head once, plus keys and values."""
    layers = sum(linear.weight.numel() for group in family.groups() for linear in group)
    vocabulary = family.head()[0].numel() * SIZES[head]
    kept = engine.cache.buffers.nbytes
    return 1e3 * (layers * SIZES[weights] + vocabulary + kept) / rate


def profile(graph, engine, mask_id: int, predicted: dict[str, float], top: int = 16) -> None:
    """Print one replay's launches, its kernels by time, and their groups beside ``predicted`` microseconds."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        replay(graph, engine, mask_id)
    spent: dict[str, list[float]] = {}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spent.setdefault(event.name, []).append(event.self_device_time_total)
    print(f"{sum(map(len, spent.values()))} launches")
    for name, times in sorted(spent.items(), key=lambda item: -sum(item[1]))[:top]:
        print(f"{sum(times) / 1e3:8.3f} ms {len(times):5d} x {statistics.median(times):7.1f} us  {name[:80]}")
    measured: Counter = Counter()
    for name, times in spent.items():
        measured[kernel_group(name)] += sum(times)
    print_beside(measured, predicted)


def predict(model, engine, card: Card, positions: int, options) -> dict[str, float]:
    """Microseconds by group that `bench.generation.cost` predicts for a step of the current variant."""
    shape = engine.rows, engine.slots, positions, engine.block_size, engine.rows * engine.block_size
    return by_group(step_kernels(Cost.of(model), card, *shape, options.weights, options.head), card)


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llada-8b")
    parser.add_argument("--layers", type=int, help="of the model; the shape's by default")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--weights", choices=["fp8", "int4"], help="of the layers, as `patch` rounds them")
    parser.add_argument("--head", choices=["fp8"], help="the LM head in e4m3 too")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="only the shipped variant, before and after")
    options = parser.parse_args(arguments)
    if DEVICE == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: this bench times CUDA graphs", file=sys.stderr)
        return 2
    device, shape, weights = torch.device(DEVICE), SHAPES[options.shape], options.weights
    print(machine(device, torch.bfloat16))
    layers = {"n_layers": options.layers} if options.layers else {}
    model = build_model(dataclasses.replace(shape, config=shape.config | layers), torch.bfloat16, device)
    dllm_fast.patch(model, weights=weights, head=options.head)
    mask_id = model.config.mask_token_id
    block, rows = shape.block_length, shape.block_length * options.batch
    ids = torch.randint(0, 900, (options.batch, shape.prompt), device=device)
    with way({"own": False}, False, rows, weights):
        engine = used_engine(model, ids, shape.gen_length, block)
    last_but_one = torch.full((engine.rows,), engine.slots - 2 * block, dtype=torch.int64, device="cpu")
    kinds = engine.prepare(last_but_one, torch.zeros_like(last_but_one))
    engine.quota.fill_(2)
    ways = {"before": ({"own": False}, False), "before, chained": ({"own": False}, True)}
    ways["before, chained, half the parts"] = ({"own": False, "threads": attention.THREADS // 2}, True)
    for tiles in TILES[weights][: 2 if options.quick else None]:
        ways |= {f"ours, not chained {tiles}": (tiles, False), f"ours, chained {tiles}": (tiles, True)}
    graphs, hidden = {}, {}
    for name, (tiles, chained) in ways.items():
        with way(tiles, chained, rows, weights):
            try:
                graphs[name] = record(engine, kinds.block)
                mask_block(engine, mask_id)
                hidden[name] = engine.hidden(kinds.block).float()
            except Exception as error:
                print(f"{name}: {type(error).__name__}: {str(error)[:200]}")
    own = hidden["before"]
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(options.rounds):
        for name, graph in graphs.items():
            times[name].append(replay(graph, engine, mask_id))
    rate = copy_rate(device)
    least = floor(bound_family(model), engine, weights, options.head, rate)
    print(f"copy {rate / 1e12:.2f} TB/s; floor {least:.2f} ms")
    for name, values in times.items():
        middle = statistics.median(values)
        apart = ((hidden[name] - own).norm() / own.norm()).item()
        span = f"{min(values):.3f}-{max(values):.3f}"
        print(f"{middle:7.3f} ms ({span}) {middle / least:5.2f} x, hidden {apart:.1e}  {name}")
    best = min(times, key=lambda name: statistics.median(times[name]))
    matrix, launch = floors.product_rate(DEVICE, 8192, torch.bfloat16).median, floors.launch_seconds(DEVICE)
    card = Card(rate, matrix, launch, multiprocessors(device))
    for name in ("before", best):
        print(f"\n{name}:")
        with way(*ways[name], rows, weights):
            predicted = predict(model, engine, card, engine.block_size, options)
        profile(graphs[name], engine, mask_id, predicted)
    if not options.quick:
        whole = {}
        for name, (tiles, chained) in (("before", ({"own": False}, False)), ("chained", ({}, True))):
            with way(tiles, chained, rows, weights):
                whole[name] = record(engine, kinds.full)
        for name, graph in whole.items():
            values = [replay(graph, engine, mask_id) for _ in range(5)]
            print(f"whole step, {name}: {statistics.median(values):.2f} ms")
        predicted = predict(model, engine, card, engine.slots, options)
        profile(whole["chained"], engine, mask_id, predicted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
