"""Accuracy against NFE on a task with exactly one right answer, for each setting on several sets of problems.

A seed determines the problems and a sampler's noise. Problems run in batches, but a problem's NFE is its own row's: the
number of forwards in which some of its positions were masked, as if it ran alone.
"""

import math
from dataclasses import replace
from statistics import mean

import dllm_fast
from bench.generation.settings import Setting
from bench.generation.subjects import Subject
from bench.generation.watch import own_forwards, watching
from bench.task import Task

Z = 1.959964  # standard errors on either side of a 95 % interval


def on_task(subject: Subject, task: Task, batch: int) -> tuple[Subject, list[str]]:
    """(the subject with the task's lengths, ``batch`` prompts). Raises ValueError for random weights."""
    if not subject.trained:
        raise ValueError(f"--task: {subject.name} has random weights, which cannot do a task")
    prompts = [prompt for prompt, _ in task.problems(batch, 0, held_out=True)]
    length = max(len(ids) for ids in subject.tokenizer(prompts)["input_ids"])
    return replace(subject, shape=replace(subject.shape, prompt=length, gen_length=task.tokens)), prompts


def score(subject: Subject, setting: Setting, task: Task, seeds: list[int], count: int, batch: int) -> dict:
    """Score ``count`` problems for each seed; "right" has a 1 for each problem answered without a mistake."""
    found = []
    for seed in seeds:
        problems = task.problems(count, seed, held_out=True)
        right, characters, nfe = [], [], []
        for at in range(0, count, batch):
            prompts, expected = zip(*problems[at : at + batch], strict=True)
            got, forwards = answer(subject, setting, list(prompts), task.tokens, seed * count + at)
            right += [mine == its for mine, its in zip(got, expected, strict=True)]
            characters += [agreement(mine, its) for mine, its in zip(got, expected, strict=True)]
            nfe += forwards
        found.append({"seed": seed, "right": "".join("01"[r] for r in right), "nfe": nfe, "token": mean(characters)})
    right = [bit == "1" for one in found for bit in one["right"]]
    return {
        "setting": setting.facts(), "problems": len(right), "exact": mean(right),
        "interval": list(wilson(sum(right), len(right))), "token": mean(one["token"] for one in found),
        "nfe": mean(n for one in found for n in one["nfe"]), "seeds": found,
    }  # fmt: skip


def answer(subject: Subject, setting: Setting, prompts: list[str], tokens: int, seed: int):
    """(answers, each row's own NFE)."""
    rows = subject.tokenizer(prompts, return_tensors="pt", padding=True).to(subject.model.device)
    ids, options = rows["input_ids"], {"gen_length": tokens, "seed": seed, **setting.options()}
    with watching(look=True) as taken:
        out = dllm_fast.generate(subject.model, ids, attention_mask=rows["attention_mask"], **options)
    texts = subject.tokenizer.batch_decode(out.sequences[:, ids.shape[1] :], skip_special_tokens=True)
    return texts, own_forwards(taken, len(prompts))


def agreement(mine: str, its: str) -> float:
    """The share of the characters of ``its`` that ``mine`` has at the same index."""
    return sum(a == b for a, b in zip(mine, its)) / len(its)


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927)."""
    share, z2 = right / count, Z * Z
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    # Rounding must not move an end past the share.
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))
