"""How many forwards drafts save: ``python -m bench.quality.speculated``

`llada-steps` and `llada-sentences` answer held-out problems with a chain of 1, 3 and 7 drafts and without, in blocks
with the dual cache and in one block without a cache. Forwards are the mean of a problem's; answers that differ from
those without drafts are counted. Ends with one JSON line.
"""

import argparse
import datetime
import itertools
import json
import os
from dataclasses import asdict, dataclass
from statistics import fmean

import torch

from bench import checkout, task
from bench.quality.evaluated import MODELS, options_of
from dllm_fast.cli.view import print_table

SCHEDULES = ("uniform 1", "uniform 2", "uniform 3", "uniform 4", "threshold=0.9", "factor=1")  # uniform: tokens a step
DRAFTS = (0, 1, 3, 7)


@dataclass
class Row:
    """forwards: the mean of a problem's. differ: answers that are not those without drafts."""

    model: str
    cache: str
    schedule: str
    drafts: int
    forwards: float
    differ: int


def run(name: str, count: int, batch: int, schedules=SCHEDULES, drafts=DRAFTS, seed: int = 7) -> list[Row]:
    about, block = MODELS[name]
    model, tokenizer = task.load(name)
    found, rows = about.problems(count, seed, held_out=True), []
    for cache, schedule in itertools.product(("dual", "none"), schedules):
        given = options_of("all", schedule, "block", about.tokens, block if cache == "dual" else about.tokens)
        given = {name: value for name, value in given.items() if name in ("gen_length", "block_length", "schedule")}
        scores = {
            number: task.score(model, tokenizer, found, batch, cache=cache, speculate=number, **given)
            for number in drafts
        }
        plain = scores[0].tokens
        rows += [
            Row(name, cache, schedule, number, fmean(score.nfe), int((score.tokens != plain).any(1).sum()))
            for number, score in scores.items()
        ]
    return rows


def table(rows: list[Row]) -> list[list[str]]:
    plain = {(row.cache, row.schedule): row.forwards for row in rows if row.drafts == 0}
    return [
        [
            row.cache, row.schedule, str(row.drafts), f"{row.forwards:.1f}",
            f"{plain[row.cache, row.schedule] / row.forwards:.2f}", str(row.differ),
        ]
        for row in rows
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0].split(":")[0])
    parser.add_argument("--count", type=int, default=200, help="problems of each task")
    parser.add_argument("--batch", type=int, default=50)
    options = parser.parse_args()
    print(f"{os.cpu_count()} CPU cores, {datetime.date.today()}, torch {torch.__version__}, commit {checkout.commit()}")
    rows: list[Row] = []
    for name, (about, block) in MODELS.items():
        mine = run(name, options.count, options.batch)
        head = ["cache", "schedule", "drafts", "forwards", "times fewer", "answers that differ"]
        title = f"{name}, {options.count} problems of {about.tokens} tokens; dual: in blocks of {block}"
        print_table(head, table(mine), title)
        rows += mine
    print(json.dumps({"bench": "speculated", "count": options.count, "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
