"""Tokens a second with fewer positions evaluated, and of others: ``python -m bench.generation.throughput --batch 1 8``

Each way answers the same random prompts with the same schedule, three tokens a step, in interleaved rounds: all
positions, ``skip_committed``, ``suffix_length``, and both, under a whole step at each block and under a window, or the
``--ways`` that are asked for, among them drafts and a cache in e4m3; and each ``--peer`` of bench/peers.py. A way's
ratios are to all positions under its refresh, a peer's to all positions under a whole step at each block; both times of
a ratio are of one round. Ours also show which share of their time their FLOPs alone would take, at the matmul rate that
bench/floors.py measures. ``--batch auto`` takes the rows that
``batch_size="auto"`` takes. Random weights: the times hold, the tokens mean nothing. Ends with one JSON line.
"""

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median

import torch

import dllm_fast
from bench import floors
from bench.common import SHAPES, Job, Shape, build_model, interleave, machine, make_job, require_idle, spread
from bench.generation.cost import Cost
from bench.generation.sweep import Rates
from bench.generation.watch import watching
from bench.peers import find_peers, read_spec, twin
from dllm_fast.cli.view import print_table
from dllm_fast.decoding import memory
from dllm_fast.decoding.options import Options
from dllm_fast.decoding.request import plan_row
from dllm_fast.decoding.server import Server
from dllm_fast.families.rounded import KINDS
from dllm_fast.patch import bound_family, bound_pool

WAYS = {
    "all": {}, "skip": {"skip_committed": True}, "suffix": {"suffix_length": 32},
    "both": {"skip_committed": True, "suffix_length": 32}, "e4m3": {"cache_dtype": "e4m3"},
    "all three": {"skip_committed": True, "suffix_length": 32, "cache_dtype": "e4m3"},
    **{f"drafts-{n}": {"speculate": n} for n in (1, 3, 7, "auto")},
}  # fmt: skip
FEWER = ("all", "skip", "suffix", "both")  # positions
BASE = ("block", "all")  # refresh and way that peers are compared with
TOKENS = 3  # a step


@dataclass
class Row:
    """A peer's ``way`` is its name, and it has no ``refresh``. None: unknown.

    ratios: how many times as fast as all positions, by round. flops: of all steps. same: how many of a peer's tokens
    `BASE` has too, if both have the same cache.
    """

    length: str
    batch: int
    refresh: str
    way: str
    tokens: int
    seconds: list[float]
    ratios: list[float]
    nfe: int | None
    positions: int | None = None
    flops: float | None = None
    same: int | None = None

    def cells(self, rate: float) -> dict[str, str]:
        """The table's, by column. ``rate``: FLOPs a second."""
        seconds = median(self.seconds)
        return {
            "refresh": self.refresh, "way": self.way, "tokens/s": f"{self.tokens / seconds:.1f}",
            "times as fast": spread(self.ratios, 2 if self.refresh else 3), "NFE": str(self.nfe or ""),
            "ms/forward": f"{1e3 * seconds / self.nfe:.1f}" if self.nfe else "",
            "positions/token": "" if self.positions is None else f"{self.positions / self.tokens:.0f}",
            "FLOPs alone": "" if self.flops is None else f"{self.flops / rate / seconds:.0%}",
            "same tokens": "" if self.same is None else f"{self.same / self.tokens:.1%}",
        }  # fmt: skip


def prepare(shape: Shape, model, length: str, batch: int | str) -> Job:
    """``batch`` "auto": as many rows as `dllm_fast.generate_many` would take of `memory.ROWS`."""
    prompt, gen_length = map(int, length.split("+"))
    steps = gen_length // shape.block_length * -(-shape.block_length // TOKENS)
    shape = dataclasses.replace(shape, prompt=prompt, gen_length=gen_length)
    job = make_job(shape, model, f"uniform={steps}", memory.ROWS if batch == "auto" else int(batch))
    if batch != "auto":
        return job
    family = bound_family(model)
    options = Options(**settings(job, 0)[BASE]).resolved(model, family)
    rows = [plan_row(options, family, n, ids) for n, ids in enumerate(job.ids)]
    seats = Server(model, family, bound_pool(model), options, rows, seats=None).seats
    return dataclasses.replace(job, ids=job.ids[:seats])


def settings(job: Job, suffix: int) -> dict[tuple[str, str], dict]:
    """`dllm_fast.generate`'s arguments by refresh and way."""
    block = job.block_length
    common = {"gen_length": job.gen_length, "block_length": block, "schedule": job.schedule, "seed": 0}
    refreshes = {"block": "block", f"window={block}": dllm_fast.Window(block)}
    return {
        (name, way): {
            **common, "refresh": refresh, **given, **({"suffix_length": suffix} if "suffix_length" in given else {}),
        }
        for name, refresh in refreshes.items() for way, given in WAYS.items()
    }  # fmt: skip


@dataclass
class Trial:
    """What is timed, and what its first, untimed run told: tokens [B, gen_length] and fields of its row."""

    run: Callable[[], object]
    tokens: torch.Tensor
    facts: dict


def our_trials(model, job: Job, suffix: int, ways: list[str]) -> dict[tuple[str, str], Trial]:
    found, cost, (batch, prompt) = {}, Cost.of(model), job.ids.shape
    for key, options in settings(job, suffix).items():
        if key[1] in ways:
            run = functools.partial(dllm_fast.generate, model, job.ids, **options)
            with watching(look=True) as steps:
                out = run()
            live = batch * job.block_length
            flops = sum(cost.flops(s.positions, min(live, s.positions), s.masked, s.seen) for s in steps)
            facts = {"nfe": out.nfe, "positions": out.positions, "flops": flops}
            found[key] = Trial(run, out.sequences[:, prompt:], facts)
    return found


def their_trials(
    model, job: Job, specs: list[str], ours: torch.Tensor
) -> tuple[dict[tuple[str, str], Trial], list[str]]:
    """(the peers ``specs``, a line for each that cannot run). ``ours``: the tokens of `BASE`."""
    peers, lines = find_peers(specs, twin(model), job)
    found = {}
    for peer in peers:
        try:
            tokens, nfe = peer.run()
        except Exception as error:  # anything, since the code is not ours
            lines.append(f"{peer.name}: not run: {type(error).__name__}: {str(error)[:150]}")
        else:
            same = int((tokens == ours).sum()) if peer.cache == "dual" else None
            found["", peer.name] = Trial(peer.run, tokens, {"nfe": nfe, "same": same})
    return found, lines


def measure(
    model, job: Job, suffix: int, rounds: int, ways: list[str], specs: list[str]
) -> tuple[list[Row], list[str]]:
    """(rows, why others are none)."""
    batch, prompt = job.ids.shape
    try:
        trials = our_trials(model, job, suffix, ways)
    except (MemoryError, torch.OutOfMemoryError) as error:
        return [], [f"batch {batch}: not run: {error}"]
    theirs, lines = their_trials(model, job, specs, trials[BASE].tokens)
    trials |= theirs
    times = interleave({key: trial.run for key, trial in trials.items()}, rounds, job.ids.device)
    length, tokens, rows = f"{prompt}+{job.gen_length}", batch * job.gen_length, []
    for (refresh, way), timed in times.items():
        ratios = times[(refresh, "all") if refresh else BASE].over(timed)
        rows.append(Row(length, batch, refresh, way, tokens, timed.seconds, ratios, **trials[refresh, way].facts))
    return rows, lines


def show(rows: list[Row], rate: float, title: str) -> None:
    """Print a table, without the columns that are empty."""
    cells = [row.cells(rate) for row in rows]
    columns = [name for name in cells[0] if any(row[name] for row in cells)]
    print_table(columns, [[row[name] for name in columns] for row in cells], title)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0].split(":")[0])
    parser.add_argument("--model", choices=SHAPES, default="cpu-768")
    parser.add_argument("--lengths", nargs="+", default=["768+256"], metavar="PROMPT+ANSWER")
    parser.add_argument("--batch", nargs="+", default=["1"], metavar="B", help="rows, or auto: as many as fit")
    parser.add_argument("--suffix", type=int, default=32, help="suffix_length, where it is bounded")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(FEWER))
    parser.add_argument("--weights", choices=tuple(KINDS), help="of the layers, as `patch` rounds them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH", help="see bench/peers.py")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--force", action="store_true", help="measure on a busy machine too")
    options = parser.parse_args(arguments)
    try:
        for spec in options.peer:
            read_spec(spec)
        for batch in options.batch:
            batch == "auto" or int(batch)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    load = require_idle(options.force)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    shape = SHAPES[options.model]
    longest = max(sum(map(int, length.split("+"))) for length in options.lengths)
    limit = max(longest, shape.config.get("max_sequence_length", 0))
    model = build_model(dataclasses.replace(shape, config=shape.config | {"max_sequence_length": limit}), dtype, device)
    dllm_fast.patch(model, weights=options.weights)
    ways = list(dict.fromkeys(["all", *options.ways]))
    rate = Rates.of(floors.measure(device.type), dtype).matrix
    where = machine(device, dtype)
    print(f"{where}\nmatmuls {rate / 1e12:.3f} TFLOP/s")
    rows: list[Row] = []
    for length in options.lengths:
        for batch in options.batch:
            job = prepare(shape, model, length, batch)
            mine, lines = measure(model, job, options.suffix, options.rounds, ways, options.peer)
            for line in lines:
                print(line)
            if mine:
                title = f"{options.model}, {length} tokens, batch {len(job.ids)}, suffix {options.suffix}"
                show(mine, rate, title + (f", {options.weights} weights" if options.weights else ""))
            rows += mine
    print(json.dumps({
        "bench": "throughput", "model": options.model, "machine": where, "load": load, "flops_a_second": rate,
        "suffix": options.suffix, "weights": options.weights, "rows": [asdict(row) for row in rows],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
