"""Tokens a second with fewer positions evaluated, at several batch sizes: ``python -m bench.generation.throughput``

Each way answers the same random prompts with the same schedule, three tokens a step, in interleaved rounds: all
positions, ``skip_committed``, ``suffix_length``, and both, under a whole step at each block and under a window. Ratios
are those of a round. Random weights: the times hold, the tokens mean nothing. Ends with one JSON line.
"""

import argparse
import dataclasses
import json
from dataclasses import asdict, dataclass

import torch

import dllm_fast
from bench.common import SHAPES, Timed, build_model, interleave, machine, make_job, require_idle, spread
from dllm_fast.cli.view import print_table

WAYS = {"all": (False, False), "skip": (True, False), "suffix": (False, True), "both": (True, True)}
TOKENS = 3  # a step


@dataclass
class Row:
    length: str
    batch: int
    refresh: str
    way: str
    tokens: int
    seconds: list[float]
    ratios: list[float]  # how many times as fast as all positions
    nfe: int
    positions: int


def settings(gen_length: int, block: int, suffix: int) -> dict[tuple[str, str], dict]:
    """`dllm_fast.generate`'s arguments by refresh and way."""
    steps = gen_length // block * -(-block // TOKENS)
    common = {"gen_length": gen_length, "block_length": block, "schedule": dllm_fast.Uniform(steps), "seed": 0}
    refreshes = {"block": "block", f"window={block}": dllm_fast.Window(block)}
    return {
        (name, way): {
            **common, "refresh": refresh, "skip_committed": skips, "suffix_length": suffix if bounded else None,
        }
        for name, refresh in refreshes.items() for way, (skips, bounded) in WAYS.items()
    }  # fmt: skip


def measure(model, shape, length: str, batch: int, suffix: int, rounds: int, ways: list[str]) -> list[Row]:
    prompt, gen_length = map(int, length.split("+"))
    job = make_job(dataclasses.replace(shape, prompt=prompt, gen_length=gen_length), model, shape.schedule, batch)
    chosen = {key: one for key, one in settings(gen_length, shape.block_length, suffix).items() if key[1] in ways}
    runs = {key: lambda one=one: dllm_fast.generate(model, job.ids, **one) for key, one in chosen.items()}
    found = {key: run() for key, run in runs.items()}  # the first run of each is not timed
    times: dict[tuple[str, str], Timed] = interleave(runs, rounds, job.ids.device)
    return [
        Row(
            length, batch, refresh, way, batch * gen_length, timed.seconds,
            times[refresh, "all"].over(timed), found[refresh, way].nfe, found[refresh, way].positions,
        )
        for (refresh, way), timed in times.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0].split(":")[0])
    parser.add_argument("--model", choices=SHAPES, default="cpu-768")
    parser.add_argument("--lengths", nargs="+", default=["768+256"], metavar="PROMPT+ANSWER")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--suffix", type=int, default=32, help="suffix_length, where it is bounded")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--force", action="store_true", help="measure on a busy machine too")
    options = parser.parse_args()
    load = require_idle(options.force)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    shape = SHAPES[options.model]
    longest = max(sum(map(int, length.split("+"))) for length in options.lengths)
    limit = max(longest, shape.config.get("max_sequence_length", 0))
    model = build_model(dataclasses.replace(shape, config=shape.config | {"max_sequence_length": limit}), dtype, device)
    dllm_fast.patch(model)
    ways = list(dict.fromkeys(["all", *options.ways]))
    print(machine(device, dtype))
    rows: list[Row] = []
    for length in options.lengths:
        for batch in options.batch:
            mine = measure(model, shape, length, batch, options.suffix, options.rounds, ways)
            cells = [
                [
                    row.refresh, row.way, f"{row.tokens / Timed(row.seconds).median:.1f}", spread(row.ratios),
                    str(row.nfe), f"{row.positions / row.tokens:.0f}",
                ]
                for row in mine
            ]  # fmt: skip
            head = ["refresh", "evaluated", "tokens/s", "times as fast", "NFE", "positions a token"]
            print_table(head, cells, f"{options.model}, {length} tokens, batch {batch}, suffix {options.suffix}")
            rows += mine
    print(json.dumps({"bench": "throughput", "model": options.model, "machine": machine(device, dtype), "load": load,
                      "suffix": options.suffix, "rows": [asdict(row) for row in rows]}))  # fmt: skip


if __name__ == "__main__":
    main()
