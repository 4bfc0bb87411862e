"""Tasks with exactly one right answer a problem, to measure accuracy. ``python -m bench.task train --out runs/task``

`bench/tasks` has the problems: chains of sums and products (`steps`), and sentences rewritten by rules (`sentences`).

``write`` makes a file for ``python -m dllm_fast.train sft``; ``train`` makes files, trains and scores a small LLaDA;
``distill`` does the same for a model that answers `steps` in fewer forwards; ``score`` scores a model at several NFE. A
hash of the problem decides whether it is for training or held out, so no problem is both.
"""

import argparse
import hashlib
import itertools
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from transformers import AutoTokenizer

import dllm_fast
from bench.tasks import sentences, steps

VERSION = 1  # of the generators: a seed's problems change only with this number
HELD_OUT = 16  # one problem in this many is held out
TRAINING = 200_000  # problems in the training file
# For `dllm_fast.train sft`.
COMMON = (
    *("--positions", "256", "--tie", "--width", "128", "--heads", "4", "--layers", "4", "--ffn", "256"),
    *("--batch", "64", "--lr", "3e-3", "--warmup", "100", "--seed", "0", "--threads", "1", "--cpu"),
    *("--log-every", "20", "--save-every", "250"),
)  # fmt: skip
# Goes on from llada-steps, to answer by Uniform(8).
DISTILLED = (
    *("--model", "llada-steps", "--schedule", "uniform=8", "--length", "128"),
    *("--batch", "8", "--steps", "200", "--lr", "1e-3", "--warmup", "20", "--threads", "1", "--cpu"),
    *("--log-every", "10", "--save-every", "100"),
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A function that draws a problem: prompt and answer; the most tokens in an answer; how its model is trained."""

    problem: Callable[[random.Random], tuple[str, str]]
    tokens: int
    recipe: tuple[str, ...]

    def problems(self, count: int, seed: int, held_out: bool) -> list[tuple[str, str]]:
        """``count`` training or held-out problems; the same for the same arguments."""

        def endless() -> Iterator[tuple[str, str]]:
            draw = random.Random(f"{VERSION} {seed}")
            while True:
                yield self.problem(draw)

        kept = (pair for pair in endless() if is_held_out(pair[0]) == held_out)
        return [next(kept) for _ in range(count)]


# In `steps`, a vocabulary of 259, all bytes and three special tokens, makes each character a token. In `sentences`,
# every word has one.
STEPS = Task(steps.problem, steps.TOKENS, ("--vocab-size", "259", "--length", "128", "--steps", "1250", *COMMON))
SENTENCES = Task(
    sentences.problem, sentences.TOKENS, ("--vocab-size", "1024", "--length", "84", "--steps", "3500", *COMMON)
)
TASKS = {"steps": STEPS, "sentences": SENTENCES}


def is_held_out(prompt: str) -> bool:
    return hashlib.blake2b(prompt.encode()).digest()[0] % HELD_OUT == 0


def write(path: Path, found: list[tuple[str, str]]) -> None:
    """Write a JSON object with prompt and answer on each line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in found))


@dataclass
class Score:
    """Lists and ``tokens`` [N, T] have an entry for each problem, in order.

    right: whether the answer has no error. characters: the share of right ones. nfe: the forwards that it takes alone.
    positions: those of all forwards for all problems.
    """

    right: list[bool]
    characters: list[float]
    nfe: list[int]
    positions: int
    tokens: torch.Tensor

    def facts(self) -> dict:
        return {
            "exact": fmean(self.right), "token": fmean(self.characters), "nfe": fmean(self.nfe),
            "problems": len(self.right),
        }  # fmt: skip


def score(
    model,
    tokenizer,
    problems: list[tuple[str, str]],
    batch: int,
    generate: Callable[..., dllm_fast.Output] = dllm_fast.generate,
    seeds: Iterable[int] = itertools.repeat(0),
    **options,
) -> Score:
    """The score of ``generate`` with ``options``. Each batch has the noise of the next of ``seeds``."""
    right, characters, nfe, positions, tokens = [], [], [], 0, []
    for at, seed in zip(range(0, len(problems), batch), seeds):
        prompts, expected = zip(*problems[at : at + batch], strict=True)
        rows = tokenizer(list(prompts), return_tensors="pt", padding=True).to(model.device)
        out = generate(model, rows["input_ids"], rows["attention_mask"], seed=seed, **options)
        tokens.append(out.sequences[:, rows["input_ids"].shape[1] :])
        nfe += out.row_nfe
        positions += out.positions
        for mine, its in zip(tokenizer.batch_decode(tokens[-1], skip_special_tokens=True), expected, strict=True):
            right.append(mine == its)
            characters.append(sum(a == b for a, b in zip(mine, its)) / len(its))
    return Score(right, characters, nfe, positions, torch.cat(tokens))


def load(name: str):
    model = dllm_fast.from_pretrained(name, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(dllm_fast.model_path(name))


def scores(task: Task, name: str, count: int, seed: int, batch: int) -> list[dict]:
    """A model's scores with `Uniform`, from NFE = tokens down, in one block without a cache."""
    model, tokenizer = load(name)
    found, rows = task.problems(count, seed, held_out=True), []
    for divisor in (1, 2, 4, 8):
        length, schedule = task.tokens, dllm_fast.Uniform(task.tokens // divisor)
        options = {"gen_length": length, "block_length": length, "schedule": schedule, "cache": "none"}
        rows.append(score(model, tokenizer, found, batch, **options).facts())
        print("NFE {nfe:g}: {exact:.1%} of {problems} right, {token:.2%} of their characters".format(**rows[-1]))
    return rows


def train(command: str, name: str, out: Path, extra: list[str]) -> Path:
    """Write a task's files, ``train`` or ``distill``, and add the command and the scores to the recipe."""
    task = TASKS[name]
    way, options = ("sft", task.recipe) if command == "train" else ("distill", DISTILLED)
    held_out = task.problems(512 if command == "train" else 64, 1, held_out=True)
    files = {"train.jsonl": task.problems(TRAINING, seed=0, held_out=False), "eval.jsonl": held_out}
    for file, found in files.items():
        write(out / file, found)
    words = [sys.executable, "-m", "dllm_fast.train", way, "--data", out / "train.jsonl", "--eval-data"]
    words += [out / "eval.jsonl", "--out", out, *options, *extra]
    subprocess.run([str(word) for word in words], check=True)
    final = out / "final"
    recipe = json.loads((final / "recipe.json").read_text())
    made = ["python", "-m", "bench.task", command, *(("--task", name) if command == "train" else ())]
    recipe["task"] = {"name": name, "command": made, "generator_version": VERSION}
    recipe["scores"] = scores(task, str(final), 512, seed=2, batch=64)
    (final / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
    return final


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__.splitlines()[0].split(".")[0])
    commands = top.add_subparsers(dest="command", required=True)
    p = commands.add_parser("write", help="write a .jsonl of problems")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--count", type=int, default=1000)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--held-out", action="store_true", help="write held-out problems")
    p.add_argument("--task", choices=TASKS, default="steps")
    p = commands.add_parser("train", help="train and score a small LLaDA; all other options go to dllm_fast.train")
    p.add_argument("--task", choices=TASKS, default="steps")
    p.add_argument("--out", type=Path, required=True, help="folder for data, checkpoints and final/")
    p = commands.add_parser("distill", help="teach llada-steps to answer in 8 forwards, as train does")
    p.add_argument("--out", type=Path, required=True, help="folder for data, checkpoints and final/")
    p.set_defaults(task="steps")
    p = commands.add_parser("score", help="score a model, from NFE = tokens down")
    p.add_argument("--task", choices=TASKS, default="steps")
    p.add_argument("--model", help="default: llada- and the task's name")
    p.add_argument("--count", type=int, default=512)
    p.add_argument("--seed", type=int, default=2)
    p.add_argument("--batch", type=int, default=64)
    return top


def main() -> None:
    args, extra = parser().parse_known_args()
    if extra and args.command not in ("train", "distill"):
        parser().error(f"unrecognized arguments: {' '.join(extra)}")
    if args.command == "write":
        write(args.out, TASKS[args.task].problems(args.count, args.seed, args.held_out))
    elif args.command in ("train", "distill"):
        print(train(args.command, args.task, args.out, extra))
    else:
        model = args.model or f"llada-{args.task}"
        rows = scores(TASKS[args.task], model, args.count, args.seed, args.batch)
        print(json.dumps({"bench": "task", "task": args.task, "model": model, "seed": args.seed, "scores": rows}))


if __name__ == "__main__":
    main()
