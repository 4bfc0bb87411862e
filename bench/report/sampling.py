"""docs/sampling.md and its plots, from a result of `bench.quality.sampling`."""

import itertools
import json
import os
from pathlib import Path

import torch

from bench.quality.accuracy import Z
from bench.report import plots
from bench.report.plots import BLUE, GREEN, ORANGE, RED, plt

HEAD = """# What samplers draw

Written by `python -m bench.quality.sampling`: {machine} ([sampling.json]({json})). Intervals are 95 %. A text's
surprise is the model's own bound of its negative log-likelihood, in nats per token; its entropy is that of its token
frequencies, in nats. Texts that repeat themselves have little of both, so a low surprise alone is no merit.
"""
PRECISION = """## fp32, fp64, and noise that is drawn once

The reverse process can be drawn step by step: at each of N steps, each masked position is drawn from a categorical
distribution over the vocabulary and [MASK], as the argmax of `p / -log(u)`. A step un-masks a position with
probability of about 1 / N, so a token wins only if its noise is large. A uniform number in fp32 has 24 bits, and its
noise ends at 16.6. So rare tokens win too seldom, and the temperature is lower than asked for, the more steps the
lower (arXiv:2409.02908). This package draws the time of each position first and its token once, with noise from 64
bits. The vocabulary has 126,464 tokens with Zipf's frequencies; their entropy is {entropy:.4f} nats, which is what
the surprise should be.
"""
TIME = """## First-hitting and a grid of times

`FirstHitting()` un-masks one position a step: as many forwards as tokens. `Ancestral(N)` takes N times and skips the
forwards that un-mask nothing. With few times many positions are drawn at once, each without knowing the others.
"""
SCHEDULE = """## Pyramid and uniform

The pyramid un-masks few positions in its first steps and more in its last ones. Its author tried it with one block
over the whole answer, on free text. Uniform has the same number of steps here.
"""


def save(result: dict, out: Path, page: Path | None) -> list[Path]:
    """Write sampling.json and the plots into ``out``, and the page if asked for; the paths."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / "sampling.json"]
    paths[0].write_text(json.dumps(result, indent=1) + "\n")
    with plt.rc_context(plots.style()):
        figures = {"precision": _precision_plot(result["precision"]), "texts": _texts_plot(result)}
    for name, figure in figures.items():
        paths.append(out / f"sampling-{name}.svg")
        figure.savefig(paths[-1], metadata={"Date": None})
        plt.close(figure)
    if page is not None:
        page.write_text(text(result, Path(os.path.relpath(out, page.parent))))
        paths.append(page)
    return paths


def text(result: dict, folder: Path) -> str:
    """The page; ``folder`` is where its plots are, from the page."""
    parts = [
        HEAD.format(machine=result["machine"], json=folder / "sampling.json"),
        PRECISION.format(entropy=result["precision"][0]["entropy"]),
        _precision_table(result["precision"]),
        f"![effective temperature against steps]({folder}/sampling-precision.svg)\n",
        TIME, _texts_table(result["time"]),
        SCHEDULE, _texts_table(result["schedule"]), _pairs(result["schedule"]),
        f"![surprise and entropy of texts]({folder}/sampling-texts.svg)\n",
        _sums(result["sums"]),
    ]  # fmt: skip
    return "\n".join(parts)


def interval(values: list[float], digits: int = 2) -> str:
    """The mean, with its interval."""
    x = torch.tensor(values, dtype=torch.float64)
    half = Z * float(x.std()) / len(values) ** 0.5
    return f"{float(x.mean()):.{digits}f} ± {half:.{digits}f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _precision_table(rows: list[dict]) -> str:
    cells = [
        [
            row["sampler"], str(row["steps"] or ""),
            f"{row['temperature']:.4f} ± {Z * row['temperature_error']:.4f}",
            f"{row['surprise']:.3f} ± {Z * row['surprise_error']:.3f}",
        ]
        for row in rows
    ]  # fmt: skip
    return _table(["sampler", "steps", "effective temperature", "surprise, nats"], cells)


def _texts_table(rows: list[dict]) -> str:
    cells = [
        [row["model"], row["way"], f"{row['nfe']:.1f}", interval(row["surprise"]), interval(row["entropy"])]
        for row in rows
    ]
    return _table(["model", "schedule", "NFE", "surprise", "entropy"], cells)


def pairs(rows: list[dict]) -> list[tuple[dict, dict]]:
    """Each pyramid with the uniform that follows it."""
    return [(a, b) for a, b in itertools.pairwise(rows) if a["schedule"].startswith("pyramid")]


def _pairs(rows: list[dict]) -> str:
    lines = ["Pyramid minus uniform, text by text:\n"]
    for a, b in pairs(rows):
        surprise, entropy = (
            interval([x - y for x, y in zip(a[key], b[key], strict=True)]) for key in ("surprise", "entropy")
        )
        lines.append(f"- {a['model']}, {a['way']}, NFE {a['nfe']:.0f}: surprise {surprise}, entropy {entropy}")
    return "\n".join(lines) + "\n"


def _sums(rows: list[dict]) -> str:
    lines = ["On the task `steps` of `bench/task.py`, with `llada-steps`, greedy, one block, problem by problem:\n"]
    for row in rows:
        middle, low, high = (100 * x for x in row["difference"])
        first, second = (100 * x for x in row["right"])
        lines.append(
            f"- {row['pyramid']} answers {first:.1f} % of {row['problems']}, {row['uniform']} {second:.1f} %: "
            f"{middle:+.1f} points ({low:+.1f} to {high:+.1f})"
        )
    return "\n".join(lines) + "\n"


def _precision_plot(rows: list[dict]):
    figure, axes = plt.subplots()
    for sampler, colour in (("step by step, float32", RED), ("step by step, float64", BLUE)):
        mine = [row for row in rows if row["sampler"] == sampler]
        axes.errorbar(
            [row["steps"] for row in mine], [row["temperature"] for row in mine],
            [Z * row["temperature_error"] for row in mine], label=sampler, color=colour, marker="o",
        )  # fmt: skip
    once = next(row for row in rows if row["steps"] is None)
    axes.axhline(once["temperature"], color=GREEN, label=once["sampler"])
    axes.set_xscale("log", base=2)
    axes.set(xlabel="steps of the reverse process", ylabel="effective temperature")
    axes.legend()
    axes.grid(True)
    return figure


def _texts_plot(result: dict):
    rows = result["time"] + result["schedule"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = plt.subplots(1, len(models), squeeze=False, figsize=(6 * len(models), 4.2))
    kinds = {"pyramid": (RED, "^"), "uniform": (BLUE, "o"), "ancestral": (ORANGE, "s"), "first-hitting": (GREEN, "D")}
    for axes, model in zip(panels[0], models):
        for kind, (colour, marker) in kinds.items():
            mine = [row for row in rows if row["model"] == model and row["schedule"].startswith(kind)]
            if not mine:
                continue
            points = [[sum(row[key]) / len(row[key]) for key in ("entropy", "surprise")] for row in mine]
            axes.scatter(*zip(*points), color=colour, marker=marker, label=kind)
            for row, point in zip(mine, points):
                axes.annotate(f"{row['nfe']:.0f}", point, fontsize=8, xytext=(4, 3), textcoords="offset points")
        axes.set(title=f"{model}; numbers are NFE", xlabel="entropy, nats", ylabel="surprise, nats per token")
        axes.legend()
        axes.grid(True)
    return figure
