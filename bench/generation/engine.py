"""The engine's speed, compared with its bare matmuls and attentions and with other generators on the same weights.

    python -m bench.generation.engine --shape cpu-768 --peer fast-dllm=PATH --peer llada=PATH
    python -m bench.generation.engine --shape llada-8b --device cuda --refresh window=32,0 --weights fp8 int4
    python -m bench.generation.engine --shape llada-8b --device cuda --batch 1 8 32 128

Random weights (`common.build_model`), random prompts, greedy. Everything first runs once, untimed, to compare tokens,
then in interleaved rounds on an idle machine. Ends with one JSON line. Exits with 1 if the same algorithm gives other
tokens in fp32. In half precision, rounding may swap two candidates: the number of equal tokens is printed.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable

import torch

import dllm_fast
from bench import floors
from bench.common import SHAPES, Job, Timed, build_model, interleave, machine, make_job, require_idle, spread
from bench.generation.bare import Bare
from bench.generation.breakdown import break_down
from bench.generation.cost import Card, Cost, by_group, print_beside, step_kernels
from bench.peers import find_peers, twin
from dllm_fast.cli.view import print_table
from dllm_fast.decoding.graphs import Graphs
from dllm_fast.decoding.spelling import policy_of, refresh_of
from dllm_fast.families.rounded import KINDS

OURS = ("none", "prefix", "dual")
WHOLE = "ours, whole steps only"  # one step per block: times a whole forward and its selection
ROUNDED = tuple(f", {kind}" for kind in KINDS)  # suffixes of a run's name, if on rounded weights
BARE = {"bare, linear and SDPA": False, "bare, fastest forms": True}


def our_runs(model, rounded: dict, job: Job, refresh: str) -> dict[str, Callable[[], dllm_fast.Output]]:
    """`generate` with each cache, with the dual cache at one step per block, and with it on each ``rounded`` model."""

    def runner(schedule, cache: str, policy, model=model) -> Callable[[], dllm_fast.Output]:
        return lambda: dllm_fast.generate(
            model, job.ids, gen_length=job.gen_length, block_length=job.block_length, schedule=schedule, cache=cache,
            refresh=policy, mask_id=job.mask_id, seed=0,
        )  # fmt: skip

    whole = dllm_fast.Uniform(job.gen_length // job.block_length)
    runs = {f"ours {cache}": runner(job.schedule, cache, "block") for cache in OURS}
    duals = {"ours dual": "block"} | ({f"ours dual, {refresh}": refresh_of(refresh)} if refresh != "block" else {})
    for name, policy in duals.items():
        runs[name] = runner(job.schedule, "dual", policy)
        for kind, other in rounded.items():
            runs[f"{name}, {kind}"] = runner(job.schedule, "dual", policy, other)
    return {**runs, WHOLE: runner(whole, "dual", "block")}


def first_runs(runs: dict[str, Callable]) -> tuple[dict[str, object], list[str]]:
    """Run each once and return the results. Removes other people's runs that fail from ``runs``, printing why."""
    returned, lines = {}, []
    for name in list(runs):
        try:
            returned[name] = runs[name]()
        except Exception as error:
            # Ours may fail only for lack of memory: not every generator fits the same batch.
            if name.startswith("ours") and not isinstance(error, MemoryError | torch.OutOfMemoryError):
                raise
            del runs[name]
            lines.append(f"{name}: not run: {type(error).__name__}: {str(error)[:150]}")
    return returned, lines


def compare(returned: dict, caches: dict[str, str | None], job: Job) -> dict[str, dict]:
    """For each generator: its NFE, and how many of its tokens ours with the same cache has too.

    For ours with rounded weights, how many tokens the model's own weights give too: these need not be all of them.
    """
    ours = {cache: returned[f"ours {cache}"] for cache in OURS if f"ours {cache}" in returned}
    found = {}
    for name, value in returned.items():
        if isinstance(value, dllm_fast.Output):
            found[name] = {"nfe": value.nfe, "nfe_full": value.nfe_full, "nfe_block": value.nfe_block}
            own = returned.get(name.rpartition(", ")[0])
            if name.endswith(ROUNDED) and own is not None:
                same = (value.sequences == own.sequences)[:, -job.gen_length :]
                found[name] |= {"unrounded_tokens": int(same.sum()), "of": same.numel()}
        elif name in caches:
            tokens, nfe = value
            found[name] = {"nfe": nfe}
            if caches[name] in ours:
                mine = ours[caches[name]].sequences[:, -job.gen_length :]
                found[name] |= {"same_tokens": int((mine == tokens).sum()), "of": tokens.numel()}
    return found


def step_times(times: dict[str, Timed], output: dllm_fast.Output, bare: Bare, copied: float, rate: float) -> dict:
    """Milliseconds of whole and block steps, and their floors: FLOPs at ``rate``, weights at ``copied`` bytes/s."""
    blocks = output.nfe_full
    whole = [seconds / blocks for seconds in times[WHOLE].seconds]
    found = {"whole_ms": [1e3 * s for s in whole]}
    found["whole_floor_ms"] = 1e3 * bare.flops(bare.slots, bare.masked[0]) / rate
    if output.nfe_block:
        rest = zip(times["ours dual"].seconds, times[WHOLE].seconds, strict=True)
        found["block_ms"] = [1e3 * (all_ - first) / output.nfe_block for all_, first in rest]
        found["block_floor_ms"] = 1e3 * bare.weight_bytes() / copied
        found["block_flops_ms"] = 1e3 * bare.flops(bare.live, sum(bare.masked[1:]) // len(bare.masked[1:])) / rate
    return found


def print_steps(steps: dict) -> None:
    rows = [["whole", spread(steps["whole_ms"]), f"{steps['whole_floor_ms']:.2f} at the measured matrix rate",
             spread([ms / steps["whole_floor_ms"] for ms in steps["whole_ms"]])]]  # fmt: skip
    if "block_ms" in steps:
        floors = (("block_floor_ms", "of weights at the copy bandwidth"), ("block_flops_ms", "at the matrix rate"))
        for floor, label in floors:
            over = spread([ms / steps[floor] for ms in steps["block_ms"]])
            rows.append(["block", spread(steps["block_ms"]), f"{steps[floor]:.2f} {label}", over])
    print_table(["step", "ms", "floor, ms", "times the floor"], rows, "steps of ours dual, selection included")


def print_runs(times: dict[str, Timed], found: dict[str, dict], tokens: int) -> None:
    base, rows = times.get("ours dual"), []
    for name, timed in times.items():
        facts = found.get(name, {})
        nfe = facts.get("nfe")
        if nfe is not None and "nfe_full" in facts:
            nfe = f"{facts['nfe_full']} + {facts['nfe_block']}"
        same = facts.get("same_tokens", facts.get("unrounded_tokens"))
        same = "" if same is None else f"{same} of {facts['of']}"
        speed = "" if name == WHOLE or name in BARE else f"{tokens / timed.median:.1f}"
        over = spread(timed.over(base)) if base else ""
        rows.append([name, spread(timed.seconds, 3), over, speed, "" if nfe is None else str(nfe), same])
    columns = ["", "s", "times ours dual", "tokens/s", "NFE", "tokens as ours"]
    print_table(columns, rows, "median (least-most) of interleaved rounds; NFE whole + block")


def print_duals(times: dict[str, Timed], others: list[str]) -> None:
    """Print how many times as long as ours the others with a dual cache take."""
    for other in (name for name in others if name in times):
        for ours in (name for name in times if name.startswith("ours dual")):
            print(f"{other} takes {spread(times[other].over(times[ours]))} times {ours}")


def print_shares(shares: dict[str, float]) -> None:
    rows = [[name, f"{ms:.1f}", f"{ms / sum(shares.values()):.1%}"] for name, ms in shares.items()]
    print_table(["", "ms", "share"], rows, "where a run of ours dual goes")


def predicted_shares(model, bare: Bare, output: dllm_fast.Output, card: Card) -> dict[str, float]:
    """Milliseconds that `cost` predicts for a run of ours dual, without the host and PyTorch's small kernels."""
    cost, found = Cost.of(model), Counter()
    for steps, positions, masked in (
        (output.nfe_full, bare.slots, bare.masked[0]),
        (output.nfe_block, bare.live, sum(bare.masked[1:]) // max(1, len(bare.masked[1:]))),
    ):
        kernels = step_kernels(cost, card, bare.batch, bare.slots, positions, bare.live, masked)
        for group, us in by_group(kernels, card).items():
            found[group] += steps * us / 1e3
    return found


def measure(options, model, rounded: dict, batch: int, device: torch.device) -> dict:
    """Measure and print one batch size; return its part of the JSON line. ``model`` and ``rounded`` are patched."""
    shape = SHAPES[options.shape]
    job = make_job(shape, model, options.schedule or shape.schedule, batch)
    peers, lines = find_peers(["published", *options.peer], twin(model), job)
    runs = our_runs(model, rounded, job, options.refresh) | {peer.name: peer.run for peer in peers}
    steps = job.schedule.steps if isinstance(job.schedule, dllm_fast.Uniform) else runs["ours dual"]().nfe
    bares = {name: Bare(model, job, steps, fastest) for name, fastest in BARE.items()}
    runs |= {name: bare.run for name, bare in bares.items()}
    if options.only:
        runs = {name: run for name, run in runs.items() if name in ("ours dual", WHOLE, *BARE, *options.only)}
    returned, failed = first_runs(runs)
    if "ours dual" not in returned:
        print("\n".join(lines + failed))
        return {"batch": batch, "not_run": lines + failed}
    found = compare(returned, {peer.name: peer.cache for peer in peers}, job)
    print(f"\nbatch {batch}, prompt {shape.prompt}, {job.gen_length} new tokens, blocks of {job.block_length}, "
          f"{job.schedule}, refresh {options.refresh}")  # fmt: skip
    for line in lines + failed:
        print(line)
    if device.type == "cuda":
        interleave(runs, 1, device)  # the second run of a step records its graph
    before = Graphs.recordings
    times = interleave(runs, options.rounds, device)
    recordings = Graphs.recordings - before
    print(f"CUDA graphs: {before} recorded beforehand, {recordings} in runs that were therefore timed again")
    print_runs(times, found, batch * job.gen_length)
    for name in BARE:
        print(f"ours dual takes {spread(times['ours dual'].over(times[name]))} times {name}")
    print_duals(times, [peer.name for peer in peers if peer.cache == "dual"])
    print(f"fastest forms: {bares['bare, fastest forms'].chosen()}")
    output, bare = returned["ours dual"], bares["bare, fastest forms"]
    floor = floors.measure(device.type, quick=options.quick)
    rate = (floor.fp32 if options.dtype == "float32" else floor.bf16).median
    taken = step_times(times, output, bare, floor.copy_bandwidth, rate)
    print_steps(taken)
    shares = break_down(runs["ours dual"], device, times["ours dual"].median)
    print_shares(shares)
    if device.type == "cuda" and options.dtype == "bfloat16":
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        card = Card(floor.copy_bandwidth, floor.matrix_rate, floors.launch_seconds(device.type), multiprocessors)
        print_beside(shares, predicted_shares(model, bare, output, card), "ms")
    return {
        "batch": batch, "prompt": shape.prompt, "gen_length": job.gen_length, "schedule": str(job.schedule),
        "seconds": {name: timed.seconds for name, timed in times.items()}, "found": found, "not_run": lines + failed,
        "steps": taken, "shares_ms": shares, "recordings": recordings,
    }  # fmt: skip


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="cpu-768")
    parser.add_argument("--quick", action="store_true", help="a tiny shape in fp32, one round, even on a busy machine")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--schedule", help="uniform=32, threshold=0.9, ...; default: the shape's")
    parser.add_argument("--refresh", default="block", help="of ours alone: block, every=2, window=32,0 or drift=0.2")
    parser.add_argument(
        "--weights", choices=list(KINDS), nargs="+", default=[], help="also run ours dual with these rounded weights"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH", help="see bench/peers.py")
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="run only this, ours dual and the bare operations"
    )
    parser.add_argument("--force", action="store_true", help="measure even on a busy machine")
    options = parser.parse_args(arguments)
    if options.quick:
        options.shape, options.dtype, options.rounds, options.force = "quick", "float32", 1, True
    try:
        policy_of("schedule", options.schedule or SHAPES[options.shape].schedule)
        policy_of("refresh", options.refresh)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    load = require_idle(options.force)
    where = machine(device, dtype)
    print(where)
    model = dllm_fast.patch(build_model(SHAPES[options.shape], dtype, device))
    rounded = {kind: dllm_fast.patch(twin(model), weights=kind) for kind in options.weights}
    results = [measure(options, model, rounded, batch, device) for batch in options.batch]
    facts = [fact for result in results for fact in result.get("found", {}).values() if "same_tokens" in fact]
    equal = all(fact["same_tokens"] == fact["of"] for fact in facts)
    print(json.dumps({"bench": "engine", "shape": options.shape, "machine": where, "load": load, "results": results}))
    if dtype == torch.float32 and not equal:
        print("the same algorithm gave other tokens", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
