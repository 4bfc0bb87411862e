"""What it costs to evaluate fewer positions: ``python -m bench.quality.evaluated --plot evaluated.svg``

`llada-steps` and `llada-sentences` answer held-out problems with ``skip_committed``, with ``suffix_length`` of a block
or of half a block and ``suffix_sample`` of the other half, with a cache in e4m3, with the first two or with those and
e4m3, and with none, under several schedules and refreshes. The problems are the same each time, so answers are compared
problem by problem. Positions are those that all forwards evaluate, prompts included. Ends with one JSON line.
"""

import argparse
import datetime
import itertools
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt
import torch

import dllm_fast
from bench import checkout, task
from bench.quality.accuracy import wilson
from bench.quality.claims import paired, points
from bench.report import plots
from dllm_fast.cli.view import print_table
from dllm_fast.decoding.spelling import refresh_of, schedule_of

MODELS = {"llada-steps": (task.STEPS, 16), "llada-sentences": (task.SENTENCES, 13)}  # and the length of a block
SCHEDULES = ("uniform 2", "uniform 4", "factor=1", "threshold=0.9", "first-hitting")  # uniform: tokens a step
REFRESHES = ("block", "window", "drift=0.2")  # window: the block before
WAYS = ("all", "skip", "suffix", "sample", "both", "e4m3", "three")


@dataclass
class Row:
    """right: of each problem. positions: of a problem, over all its forwards. forwards: the mean."""

    model: str
    schedule: str
    refresh: str
    way: str
    right: list[bool]
    positions: float
    forwards: float


def options_of(way: str, schedule: str, refresh: str, tokens: int, block: int) -> dict:
    """`dllm_fast.generate`'s arguments."""
    given = {"gen_length": tokens, "block_length": block, "cache": "dual"}
    if schedule.startswith("uniform "):
        given["schedule"] = dllm_fast.Uniform(tokens // block * -(-block // int(schedule[-1])))
    else:
        given["schedule"] = schedule_of(schedule)
    given["refresh"] = dllm_fast.Window(block) if refresh == "window" else refresh_of(refresh)
    given["temperature"] = float(schedule == "first-hitting")
    given["skip_committed"] = way in ("skip", "both", "three")
    given["cache_dtype"] = "e4m3" if way in ("e4m3", "three") else None
    if way in ("suffix", "both", "three"):
        given["suffix_length"] = block
    if way == "sample":
        given |= {"suffix_length": block // 2, "suffix_sample": block - block // 2}
    return given


def run(name: str, count: int, batch: int, schedules, refreshes, ways=WAYS, seed: int = 7) -> list[Row]:
    about, block = MODELS[name]
    model, tokenizer = task.load(name)
    found = about.problems(count, seed, held_out=True)
    rows = []
    for schedule, refresh, way in itertools.product(schedules, refreshes, ways):
        if way == "sample" and refresh.startswith("drift"):
            continue  # not to be had
        options = options_of(way, schedule, refresh, about.tokens, block)
        got = task.score(model, tokenizer, found, batch, **options)
        rows.append(Row(name, schedule, refresh, way, got.right, got.positions / count, fmean(got.nfe)))
    return rows


def table(rows: list[Row]) -> list[list[str]]:
    base = {(row.schedule, row.refresh): row for row in rows if row.way == "all"}
    lines = []
    for row in rows:
        own = base[row.schedule, row.refresh]
        low, high = wilson(sum(row.right), len(row.right))
        outcomes = (torch.tensor(x, dtype=torch.float64) for x in (row.right, own.right))
        lines.append([
            row.schedule, row.refresh, row.way, f"{sum(row.right) / len(row.right):.1%} ({low:.1%} to {high:.1%})",
            "" if row is own else points(paired(*outcomes)), f"{row.positions / own.positions:.0%}",
            f"{row.forwards:.1f}",
        ])  # fmt: skip
    return lines


def draw(rows: list[Row], path: Path) -> None:
    """Right answers against positions: one panel a model, one colour a way."""
    with plt.rc_context(plots.style()):
        names = list(dict.fromkeys(row.model for row in rows))
        figure, panels = plt.subplots(1, len(names), figsize=(9, 3.6), sharey=True, squeeze=False)
        for axes, name in zip(panels[0], names, strict=True):
            for way in WAYS:
                if not (own := [row for row in rows if (row.model, row.way) == (name, way)]):
                    continue
                axes.scatter(
                    [row.positions for row in own], [sum(r.right) / len(r.right) for r in own], label=way, s=18
                )
            axes.set(title=name, xlabel="positions evaluated for an answer")
            axes.set_xlim(left=0)
            axes.grid(True)
        panels[0, 0].set_ylabel("problems answered right")
        panels[0, 0].legend()
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0].split(":")[0])
    parser.add_argument("--count", type=int, default=400, help="problems of each task")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--schedules", nargs="+", default=SCHEDULES)
    parser.add_argument("--refreshes", nargs="+", default=REFRESHES)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="all among them: what others are against")
    parser.add_argument("--plot", type=Path, help="write the curves to this file")
    options = parser.parse_args()
    print(f"{os.cpu_count()} CPU cores, {datetime.date.today()}, torch {torch.__version__}, commit {checkout.commit()}")
    rows = []
    for name, (about, block) in MODELS.items():
        mine = run(name, options.count, options.batch, options.schedules, options.refreshes, options.ways)
        head = ["schedule", "refresh", "evaluated", "right", "against all", "positions", "forwards"]
        print_table(
            head, table(mine), f"{name}, {options.count} problems of {about.tokens} tokens in blocks of {block}"
        )
        rows += mine
    if options.plot:
        draw(rows, options.plot)
    print(json.dumps({"bench": "evaluated", "count": options.count, "rows": [
        asdict(row) | {"right": "".join("01"[x] for x in row.right)} for row in rows
    ]}))  # fmt: skip


if __name__ == "__main__":
    main()
