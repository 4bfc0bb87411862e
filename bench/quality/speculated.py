"""How many forwards drafts save: ``python -m bench.quality.speculated``

`llada-steps` and `llada-sentences` answer held-out problems without drafts, with chains of 1, 3 and 7, and with the 3
and 7 likeliest drafts of the models' own graphs: in blocks with the dual cache, in one block without a cache, and in
blocks that begin with a window over the block before, in batches and alone, where drafts look ahead to the next block.
Forwards and states are the means of a problem's; at depth d is the share of forwards that took the schedule's next d
steps and one more; answers that differ from those without drafts are counted, in fp32, and of 200 problems in bf16.
Tokens/s are this machine's: on a CPU more states take longer. Ends with one JSON line.

``--calibrate 300`` finds these graphs instead, by so many problems of the training's, and writes them.
"""

import argparse
import contextlib
import datetime
import itertools
import json
import os
import time
from collections import Counter
from dataclasses import asdict, dataclass
from statistics import fmean

import torch

import dllm_fast
from bench import checkout, task
from bench.quality.evaluated import MODELS, options_of
from dllm_fast.cli.view import print_table
from dllm_fast.decoding.drafts import key_of, write
from dllm_fast.decoding.engine import Engine

SCHEDULES = ("uniform 1", "uniform 2", "uniform 3", "uniform 4", "threshold=0.9", "factor=1")  # uniform: tokens a step
FEW = ("uniform 1", "uniform 2")  # in bf16
CACHES = ("dual", "none")
WINDOWS = ("window", "window, alone")
DRAFTS = {
    "none": None,
    **{f"chain {n}": dllm_fast.DraftGraph.chain(n) for n in (1, 3, 7)},
    **{f"graph {n}": n for n in (3, 7)},
}

AHEAD = ("none", "chain 1", "graph 3", "graph 7")  # under windows


@dataclass
class Row:
    """forwards, states: the means of a problem's. taken: how many forwards took 1, 2, ... steps. differ: answers that
    are not those without drafts."""

    model: str
    dtype: str
    cache: str
    schedule: str
    drafts: str
    forwards: float
    states: float
    taken: list[int]
    differ: int
    speed: float  # tokens/s


@contextlib.contextmanager
def counting():
    """A count of rows' forwards by the steps that they took and their states, of what runs inside with drafts."""
    count: Counter[tuple[int, int]] = Counter()

    @contextlib.contextmanager
    def watch(engine, step):
        if not engine.options.drafts:
            yield
            return
        before = engine.taken.clone()
        yield
        states = 1 if step is None else step.states + (step.ahead > 0)
        count.update((steps, states) for steps in (engine.taken - before).tolist() if steps)

    with Engine.watched(watch):
        yield count


def settings(about, block: int, cache: str, schedule: str) -> dict:
    """`dllm_fast.generate`'s arguments, but for the drafts."""
    given = options_of("all", schedule, "block", about.tokens, about.tokens if cache == "none" else block)
    kept = {name: given[name] for name in ("gen_length", "block_length", "schedule")}
    if cache in WINDOWS:
        return {**kept, "cache": "dual", "refresh": dllm_fast.Window(block, 0)}
    return {**kept, "cache": cache}


def run(
    name: str, count: int, batch: int, schedules=SCHEDULES, drafts=tuple(DRAFTS), dtype=torch.float32, caches=CACHES,
    seed: int = 7,
) -> list[Row]:  # fmt: skip
    about, block = MODELS[name]
    model, tokenizer = task.load(name)
    model.to(dtype)
    kept = str(dtype).removeprefix("torch.")
    found, rows = about.problems(count, seed, held_out=True), []
    for cache, schedule in itertools.product(caches, schedules):
        given, plain = settings(about, block, cache, schedule), None
        for kind in drafts:
            with counting() as taken:
                rows_at_once = 1 if cache == "window, alone" else batch
                began = time.perf_counter()
                score = task.score(model, tokenizer, found, rows_at_once, speculate=DRAFTS[kind], **given)
            speed = count * about.tokens / (time.perf_counter() - began)
            plain = score.tokens if plain is None else plain
            differ = int((score.tokens != plain).any(1).sum())
            forwards = fmean(score.nfe)
            steps = [0] * max((steps for steps, _ in taken), default=0)
            for (own, _), times in taken.items():
                steps[own - 1] += times
            states = sum(each * times for (_, each), times in taken.items()) / count if taken else forwards
            rows.append(Row(name, kept, cache, schedule, kind, forwards, states, steps, differ, speed))
    return rows


def calibrate(name: str, count: int, schedules=SCHEDULES, seed: int = 11) -> dict[str, dllm_fast.DraftGraph]:
    """The model's graphs by name, of answers in one block without a cache."""
    about, block = MODELS[name]
    model, tokenizer = task.load(name)
    prompts = [tokenizer(prompt)["input_ids"] for prompt, _ in about.problems(count, seed, held_out=False)]
    graphs = {}
    for schedule in schedules:
        given = settings(about, block, "none", schedule)
        key = key_of(given["schedule"], given["gen_length"], given["block_length"])
        graphs[key] = dllm_fast.calibrate(model, prompts, batch_size=50, **given)
    return graphs


def table(rows: list[Row]) -> list[list[str]]:
    plain = {(row.cache, row.schedule): row.forwards for row in rows if row.drafts == "none"}
    lines = []
    for row in rows:
        shares = [sum(row.taken[d:]) / sum(row.taken) for d in range(1, len(row.taken))]
        lines.append([
            row.cache, row.schedule, row.drafts, f"{row.forwards:.1f}",
            f"{plain[row.cache, row.schedule] / row.forwards:.2f}", f"{row.states:.1f}",
            " ".join(f"{share:.0%}" for share in shares), str(row.differ),
            f"{row.speed:.0f}",
        ])  # fmt: skip
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0].split(":")[0])
    parser.add_argument("--count", type=int, default=100, help="problems of each task")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--calibrate", type=int, metavar="COUNT", help="find the models' graphs, and write them")
    options = parser.parse_args()
    print(f"{os.cpu_count()} CPU cores, {datetime.date.today()}, torch {torch.__version__}, commit {checkout.commit()}")
    if options.calibrate:
        for name in MODELS:
            for key, graph in calibrate(name, options.calibrate).items():
                print(f"{name}: {key}: {graph.drafts}")
                write(dllm_fast.model_path(name), key, graph)
        return
    rows: list[Row] = []
    for name, (about, block) in MODELS.items():
        for count, given in (
            (options.count, {}),
            (options.count // 2, {"drafts": AHEAD, "caches": WINDOWS}),
            (2 * options.count, {"schedules": FEW, "drafts": ("none", "graph 7"), "dtype": torch.bfloat16}),
        ):
            mine = run(name, count, options.batch, **given)
            head = [
                "cache", "schedule", "drafts", "forwards", "times fewer", "states", "at depth 1, 2, ...", "differ",
                "tokens/s",
            ]  # fmt: skip
            title = f"{name} in {mine[0].dtype}, {count} problems of {about.tokens} tokens; dual: in blocks of {block}"
            print_table(head, table(mine), title)
            rows += mine
    print(json.dumps({"bench": "speculated", "count": options.count, "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
