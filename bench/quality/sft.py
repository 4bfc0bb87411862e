"""Makes a dLLM of a pretrained masked language model, and shows what that changes. ``python -m bench.quality.sft``

The model is fine-tuned on chats by ``python -m dllm_fast.train sft``. Before and after: the share of right tokens among
the masked ones of held-out answers, at three ratios, with a 95 % interval over answers; then answers to held-out
questions, one token at a time, the most confident first, and by fewer forwards. The same positions are masked before
and after. Chats are made of a .jsonl file of questions and answers, those that are short enough.
Ends with one JSON line.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

import dllm_fast
from bench import checkout
from dllm_fast.cli.view import print_table
from dllm_fast.train import training
from dllm_fast.train.chat import Chats
from dllm_fast.train.models import pretrained

RATIOS = (0.15, 0.5, 0.9)
HELD_OUT = 300  # answers that the accuracy is measured on
SHOWN = 3  # questions that are answered in words
ANSWER = 48  # tokens of such an answer


def write_chats(source: Path, target: Path, tokenizer, length: int) -> list[list[dict[str, str]]]:
    """Chats of the questions and answers of ``source`` that take at most ``length`` tokens; also as ``target``."""
    kept = []
    for line in source.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        talk = [{"role": "user", "content": entry["question"]}, {"role": "assistant", "content": entry["answer"]}]
        if len(tokenizer("".join(message["content"] for message in talk))["input_ids"]) + 8 <= length:
            kept.append(talk)
    target.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in kept), encoding="utf-8")
    return kept


@torch.no_grad()
def accuracy(model, rows: Chats, ratio: float) -> tuple[float, float]:
    """The share of right tokens among masked ones of the assistant's, and half a 95 % interval over rows."""
    source = torch.Generator().manual_seed(0)
    mask_id = model.config.mask_token_id
    right, total = [], []
    for ids, own in rows.rows:
        clean = torch.tensor(ids)
        masked = torch.tensor(own) & (torch.rand(len(ids), generator=source) < ratio)
        logits = model(input_ids=clean.masked_fill(masked, mask_id)[None]).logits[0, masked]
        logits[:, mask_id] = float("-inf")
        right.append(int((logits.argmax(-1) == clean[masked]).sum()))
        total.append(int(masked.sum()))
    share = sum(right) / sum(total)
    # A ratio of sums: its variance is that of the rows' residuals (the delta method).
    residual = torch.tensor([r - share * t for r, t in zip(right, total, strict=True)], dtype=torch.float64)
    return share, 1.96 * float(residual.square().sum().sqrt()) / sum(total)


def answers(model, tokenizer, talks: list) -> list[tuple[str, str]]:
    """(schedule, answer) for each question and schedule."""
    shown = []
    for talk in talks:
        prompt = tokenizer.apply_chat_template(
            talk[:1], add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        shown.append(("question", talk[0]["content"]))
        for steps in (ANSWER, ANSWER // 4):
            schedule = dllm_fast.Uniform(steps)
            out = dllm_fast.generate_plain(
                model, prompt, gen_length=ANSWER, block_length=ANSWER, schedule=schedule, eos_id=tokenizer.eos_token_id
            )
            text = tokenizer.decode(out.sequences[0, prompt.shape[1] :], skip_special_tokens=True)
            shown.append((f"{out.nfe} NFE", text))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="the folder of a masked language model")
    add("--data", type=Path, required=True, help="a .jsonl file with question and answer on each line, to train on")
    add("--eval-data", type=Path, required=True, help="a held-out one")
    add("--length", type=int, default=160)
    add("--steps", default="1000")
    add("--batch", default="16")
    add("--lr", default="1e-3")
    options = parser.parse_args()
    began = time.time()
    model, tokenizer = pretrained(options.model)
    with tempfile.TemporaryDirectory() as folder:
        chats, held = Path(folder) / "chats.jsonl", Path(folder) / "held.jsonl"
        write_chats(options.data, chats, tokenizer, options.length)
        talks = write_chats(options.eval_data, held, tokenizer, options.length)
        rows = Chats(talks[:HELD_OUT], tokenizer, options.length)
        before = [accuracy(model.eval(), rows, ratio) for ratio in RATIOS]
        texts = answers(model, tokenizer, talks[:SHOWN])
        command = ["sft", "--model", options.model, "--data", str(chats), "--out", f"{folder}/run", "--cpu"]
        command += ["--length", str(options.length), "--batch", options.batch, "--steps", options.steps]
        command += ["--lr", options.lr, "--save-every", options.steps, "--save-dtype", "float32", "--threads", "1"]
        with contextlib.redirect_stdout(sys.stderr):
            code = training.main(command)
        if code:
            raise SystemExit("training failed")
        trained = dllm_fast.load_plain(f"{folder}/run/final")
        recipe = json.loads(Path(f"{folder}/run/final/recipe.json").read_text())
    after = [accuracy(trained, rows, ratio) for ratio in RATIOS]
    day = datetime.date.today()
    print(f"{day}, commit {checkout.commit()}, {platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}, "
          f"transformers {transformers.__version__}")  # fmt: skip
    print(f"{type(trained).__name__}, {recipe['parameters']:,} parameters; {options.steps} steps of {options.batch} "
          f"chats, {recipe['seconds_since_start_or_resume']} s; held out: {len(rows)} answers")  # fmt: skip
    print_table(
        ["masked", "before", "after"],
        [
            [f"{ratio:.0%}", *(f"{100 * share:.1f} ± {100 * half:.1f} %" for share, half in (old, new))]
            for ratio, old, new in zip(RATIOS, before, after, strict=True)
        ],
        "right tokens among the masked ones",
    )
    for title, shown in (("before", texts), ("after", answers(trained, tokenizer, talks[:SHOWN]))):
        print(f"\n{title}")
        for name, text in shown:
            print(f"  {name:>8} | {' '.join(text.split())}")
    print(json.dumps({
        "date": str(day), "ratios": RATIOS, "before": before, "after": after, "seconds": round(time.time() - began),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
