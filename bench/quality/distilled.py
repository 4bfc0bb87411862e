"""Few-step distillation, before and after: ``python -m bench.quality.distilled --after llada-steps-8 [FOLDER ...]``

Every model answers the same held-out problems of the task `steps`, with all of the answer in one block, by `Uniform` of
fewer and fewer steps. Prints a table with 95 % intervals and draws the curves. Ends with one JSON line.
"""

import argparse
import datetime
import json
import os
from pathlib import Path

import torch

import dllm_fast
from bench import checkout, task
from bench.quality.accuracy import wilson
from bench.report import plots
from bench.report.plots import BLUE, RED, plt
from dllm_fast.cli.view import print_table

STEPS = (32, 16, 12, 10, 8, 6, 4)


def score(name: str, problems: list[tuple[str, str]], batch: int) -> list[int]:
    """How many problems the model answers at each of `STEPS`."""
    model, tokenizer = task.load(name)
    found = []
    for steps in STEPS:
        length = task.STEPS.tokens
        options = {"gen_length": length, "block_length": length, "schedule": dllm_fast.Uniform(steps), "cache": "none"}
        found.append(sum(task.score(model, tokenizer, problems, batch, **options).right))
    return found


def draw(found: dict[str, list[int]], before: str, count: int, path: Path) -> None:
    with plt.rc_context(plots.style()):
        figure, axes = plt.subplots()
        for name, right in found.items():
            low, high = zip(*(wilson(n, count) for n in right))
            colour = BLUE if name == before else RED
            axes.plot(STEPS, [n / count for n in right], marker="o", color=colour, label=name)
            axes.fill_between(STEPS, low, high, color=colour, alpha=0.15)
        axes.set_xscale("log", base=2)
        axes.set_xticks(STEPS, [str(steps) for steps in STEPS])
        axes.minorticks_off()
        axes.set(xlabel="forwards for 64 tokens", ylabel="problems answered right", ylim=(0, 1.02))
        axes.legend()
        axes.grid(True)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0].split(":")[0])
    parser.add_argument("--before", default="llada-steps")
    parser.add_argument("--after", nargs="+", default=["llada-steps-8"], help="names or folders")
    parser.add_argument("--count", type=int, default=400, help="problems")
    parser.add_argument("--plot", type=Path, help="write the curves to this file")
    options = parser.parse_args()
    print(f"{os.cpu_count()} CPU cores, {datetime.date.today()}, torch {torch.__version__}, commit {checkout.commit()}")
    problems = task.STEPS.problems(options.count, 7, held_out=True)
    found, rows = {}, []
    for name in (options.before, *options.after):
        recipe = json.loads((Path(dllm_fast.model_path(name)) / "recipe.json").read_text())
        label = name if name == options.before else f"distilled, seed {recipe['seed']}"
        found[label] = score(name, problems, 64)
        for steps, right in zip(STEPS, found[label]):
            low, high = wilson(right, options.count)
            rows.append([label, str(steps), f"{right / options.count:.1%}", f"{low:.1%} to {high:.1%}"])
    print_table(["model", "forwards", "right", "95 % interval"], rows, f"{options.count} problems")
    if options.plot:
        draw(found, options.before, options.count, options.plot)
    print(json.dumps({"bench": "distilled", "problems": options.count, "steps": STEPS, "right": found}))


if __name__ == "__main__":
    main()
