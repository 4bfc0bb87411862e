"""Accuracy under parallelism, one block at a time and several: ``python -m bench.quality.parallel``

`llada-steps` and its distilled successor answer held-out problems of the task `steps` in blocks of 16, over a range of
thresholds, by each of these ways: one block after the other (with the entropy as confidence that is dParallel's way),
D2F's pipeline, and d3LLM's multi-block decoding, the only one with the cache ``"prefix"``. A row stops at its end of
text, and tokens a forward are those up to it. AUP is d3LLM's (see `aup`), over a way's thresholds and one token a
forward; its best accuracy is that of all ways and models here. Ends with one JSON line.
"""

import argparse
import datetime
import itertools
import json
import math
import os
from dataclasses import asdict, dataclass
from statistics import fmean

import torch

import dllm_fast
from bench import checkout, task
from bench.quality.accuracy import wilson
from dllm_fast.cli.view import print_table
from dllm_fast.decoding.spelling import pipeline_of

MODELS = ("llada-steps", "llada-steps-8")
BLOCK = 16
THRESHOLDS = {
    "probability": (0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999),
    "entropy": (-1.0, -0.5, -0.3, -0.15, -0.05, -0.01, -0.001),  # of the negative entropy, in nats
}
PIPELINES = ("one block", "d2f=0.1,0.95", "d2f=0.7,0.95", "multi-block=0.1")
DELAYED = ("multi-block=0.1,,1", "multi-block=0.1,,2,3")  # those of d3LLM's scripts for MATH and GSM8K
CACHES = ("none", "dual", "prefix")
ALPHA, OFFSET = 3.0, 5.0  # d3LLM's


def aup(points: list[tuple[float, float]], best: float, alpha: float = ALPHA, offset: float = OFFSET) -> float:
    """Accuracy under parallelism of (tokens a forward, accuracy in percent) ``points`` (d3LLM, arXiv:2601.07568).

    The area under the curve from the least parallel point (x_1, y_1) on, by trapezoids, of
    ``y min(1, exp(-alpha (1 - y / best)))``, and ``x_1 y_1`` before it. Points below ``y_1 - offset`` are left out.
    ``best``: the highest accuracy of all that are compared. d3LLM's code refuses a curve whose last point is below;
    here the curve ends before it.
    """
    points = sorted(points, key=lambda point: point[0])
    (first, accuracy), floor = points[0], points[0][1] - offset
    kept = [point for point in points if point[1] >= floor]

    def weighted(y: float) -> float:
        return y * min(1.0, math.exp(-alpha * (1 - y / best)))

    return first * accuracy + sum(
        (x1 - x0) * (weighted(y0) + weighted(y1)) / 2 for (x0, y0), (x1, y1) in itertools.pairwise(kept)
    )


@dataclass
class Row:
    """right: of each problem. parallelism: tokens a forward, over all problems. forwards: of a problem, the mean."""

    model: str
    way: str
    confidence: str
    cache: str
    threshold: float | None  # None: one token a forward
    right: list[bool]
    parallelism: float
    forwards: float

    @property
    def accuracy(self) -> float:
        return 100 * sum(self.right) / len(self.right)

    @property
    def curve(self) -> tuple[str, str, str]:
        return self.way, self.confidence, self.cache


def answer(loaded, problems, batch: int, **options) -> tuple[list[bool], float, float]:
    """Which are right, tokens a forward, forwards of a problem."""
    model, tokenizer = loaded
    tokens: list[int] = []

    def generate(*args, **rest):
        out = dllm_fast.generate(*args, **rest)
        tokens.extend(out.row_tokens)
        return out

    given = {"gen_length": task.STEPS.tokens, "block_length": BLOCK, "eos_id": tokenizer.eos_token_id, **options}
    got = task.score(model, tokenizer, problems, batch, generate, **given)
    return got.right, sum(tokens) / sum(got.nfe), fmean(got.nfe)


def run(name: str, count: int, batch: int, caches=CACHES, pipelines=PIPELINES, thresholds=THRESHOLDS) -> list[Row]:
    loaded, problems = task.load(name), task.STEPS.problems(count, 7, held_out=True)
    rows = []
    for cache in caches:
        one = answer(loaded, problems, batch, cache=cache, schedule=dllm_fast.Static(1))
        ways = DELAYED if cache == "prefix" else pipelines
        for way, (confidence, limits) in itertools.product(ways, thresholds.items()):
            pipeline = None if way == "one block" else pipeline_of(way)
            rows.append(Row(name, way, confidence, cache, None, *one))
            for threshold in limits:
                options = {"cache": cache, "confidence": confidence, "pipeline": pipeline}
                found = answer(loaded, problems, batch, schedule=dllm_fast.Threshold(threshold), **options)
                rows.append(Row(name, way, confidence, cache, threshold, *found))
    return rows


def areas(rows: list[Row], best: float) -> dict[tuple[str, str, str], float]:
    """The AUP of each way of one model."""
    curves: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for row in rows:
        curves.setdefault(row.curve, []).append((row.parallelism, row.accuracy))
    return {curve: aup(points, best) for curve, points in curves.items()}


def table(rows: list[Row]) -> list[list[str]]:
    lines = []
    for row in rows:
        low, high = wilson(sum(row.right), len(row.right))
        share = f"{row.accuracy:.1f}% ({low:.1%} to {high:.1%})"
        threshold = "" if row.threshold is None else f"{row.threshold:g}"
        lines.append([*row.curve, threshold, share, f"{row.forwards:.2f}", f"{row.parallelism:.2f}"])
    return lines


def summary(rows: list[Row], best: float) -> list[list[str]]:
    """Of each way its AUP, and the most tokens a forward within a point of the best accuracy."""
    lines = []
    for curve, area in areas(rows, best).items():
        fine = [row.parallelism for row in rows if row.curve == curve and row.accuracy >= best - 1]
        lines.append([*curve, f"{area:.0f}", f"{max(fine):.2f}" if fine else ""])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0].split(":")[0])
    parser.add_argument("--models", nargs="+", default=MODELS, help="names or folders")
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=CACHES)
    parser.add_argument("--count", type=int, default=300, help="problems")
    parser.add_argument("--batch", type=int, default=50)
    options = parser.parse_args()
    print(f"{os.cpu_count()} CPU cores, {datetime.date.today()}, torch {torch.__version__}, commit {checkout.commit()}")
    found = {name: run(name, options.count, options.batch, options.caches) for name in options.models}
    best = max(row.accuracy for rows in found.values() for row in rows)
    about = f"{options.count} problems of {task.STEPS.tokens} tokens in blocks of {BLOCK}"
    for name, rows in found.items():
        head = ["way", "confidence", "cache", "threshold", "right", "forwards", "tokens each"]
        print_table(head, table(rows), f"{name}, {about}")
    for name, rows in found.items():
        head = ["way", "confidence", "cache", "AUP", "tokens each, a point from the best"]
        print_table(head, summary(rows, best), f"{name}: accuracy under parallelism, best {best:.1f}%")
    print(json.dumps({"bench": "parallel", "count": options.count, "best": best, "rows": [
        asdict(row) | {"right": "".join("01"[x] for x in row.right)} for rows in found.values() for row in rows
    ], "aup": [[name, *curve, area] for name, rows in found.items() for curve, area in areas(rows, best).items()],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
