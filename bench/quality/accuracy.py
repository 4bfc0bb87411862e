"""Accuracy against NFE on a task with exactly one right answer, for each setting on several sets of problems.

A seed determines the problems and a sampler's noise. Problems run in batches, but a problem's NFE is its own row's: the
forwards that it takes alone.
"""

import itertools
import math
from dataclasses import replace
from statistics import mean

from bench import task as tasks
from bench.generation.settings import Setting
from bench.generation.subjects import Subject

Z = 1.959964  # standard errors on either side of a 95 % interval


def on_task(subject: Subject, task: tasks.Task, batch: int) -> tuple[Subject, list[str]]:
    """(the subject with the task's lengths, ``batch`` prompts). Raises ValueError for random weights."""
    if not subject.trained:
        raise ValueError(f"--task: {subject.name} has random weights, which cannot do a task")
    prompts = [prompt for prompt, _ in task.problems(batch, 0, held_out=True)]
    length = max(len(ids) for ids in subject.tokenizer(prompts)["input_ids"])
    return replace(subject, shape=replace(subject.shape, prompt=length, gen_length=task.tokens)), prompts


def score(subject: Subject, setting: Setting, task: tasks.Task, seeds: list[int], count: int, batch: int) -> dict:
    """Score ``count`` problems for each seed; "right" has a 1 for each problem answered without a mistake."""
    options, found = {"gen_length": task.tokens, **setting.options()}, []
    for seed in seeds:
        problems, noise = task.problems(count, seed, held_out=True), itertools.count(seed * count, batch)
        one = tasks.score(subject.model, subject.tokenizer, problems, batch, seeds=noise, **options)
        bits = "".join("01"[right] for right in one.right)
        found.append({"seed": seed, "right": bits, "nfe": one.nfe, "token": mean(one.characters)})
    right = [bit == "1" for one in found for bit in one["right"]]
    return {
        "setting": setting.facts(), "problems": len(right), "exact": mean(right),
        "interval": list(wilson(sum(right), len(right))), "token": mean(one["token"] for one in found),
        "nfe": mean(n for one in found for n in one["nfe"]), "seeds": found,
    }  # fmt: skip


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927)."""
    share, z2 = right / count, Z * Z
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    # Rounding must not move an end past the share.
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))
