"""How many wrong tokens of an answer are repaired, by a flow language model and by masked decoding.

    python -m bench.quality.repair train --out runs/flow-steps  # 15 minutes on a core
    python -m bench.quality.repair score --model runs/flow-steps/final

Answers to chains of sums (the task `steps`) have a share of their tokens replaced: by any token of the vocabulary, or a
digit by another digit, which looks as right as what it replaces. Nobody says which. Beside each other, with as many
forwards:

- flow: `generate_flow` from the replaced answer, with a model that ``train`` makes out of ``llada-steps``;
- masked decoding with ``llada-steps`` itself, of the same size. Without remasking it changes no token that is there.
  With `Verify`, each step masks every token whose probability is below a threshold, and fills what is masked: those of
  at least 0.9, and as many of the most probable others as the forwards that are left ask for;
- the same, told which tokens are wrong, and from nothing but the prompt.

Shares are of the replaced tokens that are right in the end, and of the others that are wrong, with 95 % intervals
(Wilson). Both commands end with one JSON line.
"""

import argparse
import datetime
import itertools
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

import dllm_fast
from bench import checkout, task
from bench.quality.accuracy import wilson
from dllm_fast import Verify
from dllm_fast.cli.view import print_table
from dllm_fast.decoding.remask import STAYS, Committed, ranks

MASKED = "llada-steps"
FORWARDS = 8
SHARES = (0.05, 0.1, 0.2, 0.4)
PROBLEMS, BATCH = 200, 100
SURE = 0.9
RECIPE = (
    *("--pairs", "--model", MASKED, "--noise", "0", "0.7", "--tau", "0", "0", "--length", "128"),
    *("--batch", "64", "--steps", "1000", "--lr", "2e-3", "--warmup", "50", "--decay", "0.5", "--seed", "0"),
    *("--threads", "1", "--cpu", "--log-every", "10", "--save-every", "250"),
)  # fmt: skip


def train(out: Path) -> None:
    """Write the problems, train for a quarter of an hour, and print the folder of the model."""
    for name, problems in {
        "train.jsonl": task.STEPS.problems(100_000, 0, held_out=False),
        "eval.jsonl": task.STEPS.problems(128, 1, held_out=True),
    }.items():
        task.write(out / name, problems)
    command = [sys.executable, "-m", "dllm_fast.train", "flow", "--data", out / "train.jsonl"]
    command += ["--eval-data", out / "eval.jsonl", "--out", out, *RECIPE]
    subprocess.run([str(word) for word in command], check=True)
    print(json.dumps({"bench": "repair", "model": str(out / "final")}))


def replaced(answers: torch.Tensor, share: float, among: torch.Tensor, source: torch.Generator) -> torch.Tensor:
    """``answers`` [N, T] with a ``share`` of the tokens that are ``among`` [K] replaced by another of these."""
    at = torch.rand(answers.shape, generator=source) < share
    index = torch.searchsorted(among, answers).clamp(max=len(among) - 1)
    other = (index + torch.randint(1, len(among), answers.shape, generator=source)) % len(among)
    return torch.where(at & torch.isin(answers, among), among[other], answers)


@torch.no_grad()
def masked_decoding(model, prompts, answers, masked, verify: Verify | None, forwards: int) -> torch.Tensor:
    """``answers`` [N, T] after ``forwards`` steps of the masked model, where ``masked`` [N, T] are to be filled."""
    mask_id = model.config.mask_token_id
    state = answers.masked_fill(masked, mask_id)
    for left in range(forwards, 0, -1):
        logits = model(torch.cat((prompts, state), 1)).logits[:, prompts.shape[1] :]
        logits[..., mask_id] = STAYS
        probability = torch.softmax(logits, -1)
        token = torch.where(masked, logits.argmax(-1), state)
        now = probability.gather(-1, token[..., None])[..., 0]
        wanted = -(-masked.sum(1, keepdim=True) // left)
        chosen = masked & ((now >= SURE) | (ranks(now.where(masked, STAYS)) < wanted))
        seen = Committed(~masked, now, torch.ones_like(now), masked, chosen.sum(1))
        again = torch.zeros_like(masked) if verify is None or left == 1 else verify.urgency(seen) > STAYS
        state = torch.where(chosen, token, state).masked_fill(again, mask_id)
        masked = (masked & ~chosen) | again
    return state


def ways(flow, masked) -> dict:
    """A way to repair (prompts, answers with wrong tokens, which are wrong) by name."""
    found = {}
    for steps, noise in ((2, 0.0), (FORWARDS, 0.0), (FORWARDS, 0.3)):
        options = {"gen_length": task.STEPS.tokens, "steps": steps, "noise": noise, "seed": 1}
        found[f"flow, {steps} forwards, noise {noise:g}"] = lambda p, a, wrong, options=options: (
            dllm_fast.generate_flow(flow, p, start_ids=a, **options).sequences[:, p.shape[1] :]
        )
    for threshold in (None, 0.1, 0.5, 0.9):
        verify = None if threshold is None else Verify(threshold)
        name = "masked, no remasking" if verify is None else f"masked, {FORWARDS} forwards, Verify({threshold:g})"
        found[name] = lambda p, a, wrong, verify=verify: masked_decoding(
            masked, p, a, torch.zeros_like(wrong), verify, 1 if verify is None else FORWARDS
        )
    found[f"masked, {FORWARDS} forwards, told which"] = lambda p, a, wrong: masked_decoding(
        masked, p, a, wrong, None, FORWARDS
    )
    found[f"masked, {FORWARDS} forwards, prompt alone"] = lambda p, a, wrong: masked_decoding(
        masked, p, a, torch.ones_like(wrong), None, FORWARDS
    )
    return found


def measured(flow, masked, tokenizer, count: int) -> list[dict]:
    prompts, answers = zip(*task.STEPS.problems(count, 3, held_out=True), strict=True)
    prompts = tokenizer(list(prompts), return_tensors="pt")["input_ids"]
    answers = tokenizer(list(answers), return_tensors="pt")["input_ids"]
    answers = torch.cat((answers, answers.new_full((count, 1), tokenizer.eos_token_id)), 1)
    digits = torch.tensor(sorted(tokenizer.convert_tokens_to_ids([str(n) for n in range(10)])))
    rows = []
    for kind, among in (("any token", torch.arange(masked.config.vocab_size)), ("a digit", digits)):
        for share in SHARES:
            given = replaced(answers, share, among, torch.Generator().manual_seed(0))
            wrong = given != answers
            for way, repair in ways(flow, masked).items():
                parts = zip(prompts.split(BATCH), given.split(BATCH), wrong.split(BATCH), strict=True)
                right = torch.cat([repair(*part) for part in parts]) == answers
                row = {"replaced by": kind, "share": share, "way": way, "wrong": int(wrong.sum())}
                row |= {"repaired": int(right[wrong].sum()), "intact": int((~wrong).sum())}
                rows.append(row | {"broken": int((~right)[~wrong].sum()), "whole": int(right.all(1).sum())})
    return rows


def from_noise(flow, masked, tokenizer, count: int) -> list[dict]:
    """Whole answers that are right, from random tokens and from masks, with as many forwards."""
    problems, rows = task.STEPS.problems(count, 3, held_out=True), []
    for steps in (8, 16, 32, 64):
        length = task.STEPS.tokens
        by_flow = {"generate": dllm_fast.generate_flow, "seeds": itertools.repeat(1), "steps": steps}
        by_masks = {"block_length": length, "schedule": dllm_fast.Uniform(steps), "cache": "none"}
        for way, model, options in (("flow", flow, by_flow), ("masked", masked, by_masks)):
            right = task.score(model, tokenizer, problems, BATCH, gen_length=length, **options).right
            rows.append({"way": way, "forwards": steps, "whole": sum(right), "problems": count})
    return rows


def percent(part: int, whole: int) -> str:
    """A share in per cent, and its interval."""
    low, high = wilson(part, whole)
    return f"{100 * part / whole:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def show(result: dict) -> None:
    """Print the tables of ``result``, then all of it on one line."""
    columns = ["replaced", "way", "repaired, %", "others broken, %", "whole answers right, %"]
    count = result["problems"]
    for kind in dict.fromkeys(row["replaced by"] for row in result["rows"]):
        cells = [
            [f"{row['share']:.0%}", row["way"], percent(row["repaired"], row["wrong"]),
             percent(row["broken"], row["intact"]), percent(row["whole"], count)]
            for row in result["rows"] if row["replaced by"] == kind
        ]  # fmt: skip
        title = "replaced by any token" if kind == "any token" else "a digit replaced by another digit"
        print_table(columns, cells, title)
    cells = [[str(row["forwards"]), row["way"], percent(row["whole"], count)] for row in result["fresh"]]
    title = "from the prompt alone: generate_flow, and generate with Uniform"
    print_table(["forwards", "way", "whole answers right, %"], cells, title)
    print(json.dumps(result))


def score(name: str, count: int) -> None:
    flow, (masked, tokenizer) = task.load(name)[0], task.load(MASKED)
    commit = checkout.commit()
    device = f"{platform.machine()}, {os.cpu_count()} cores, {datetime.date.today()}"
    recipe = json.loads((Path(name) / "recipe.json").read_text())
    print(f"{device}, torch {torch.__version__}, commit {commit}; {count} problems, fp32")
    print(f"trained in {recipe['seconds_since_start_or_resume']} s: {' '.join(recipe['command'][2:])}")
    rows = measured(flow, masked, tokenizer, count)
    fresh = from_noise(flow, masked, tokenizer, count)
    show({"bench": "repair", "commit": commit, "problems": count, "rows": rows, "fresh": fresh})


def main() -> None:
    top = argparse.ArgumentParser(description=__doc__.splitlines()[0].split(".")[0])
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser("train").add_argument("--out", type=Path, required=True)
    p = commands.add_parser("score")
    p.add_argument("--model", required=True, help="the folder of what train made")
    p.add_argument("--count", type=int, default=PROBLEMS, help="problems")
    args = top.parse_args()
    train(args.out) if args.command == "train" else score(args.model, args.count)


if __name__ == "__main__":
    main()
