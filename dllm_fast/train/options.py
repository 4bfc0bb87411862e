"""The command line of `python -m dllm_fast.train`."""

import argparse
import re
from pathlib import Path

from dllm_fast.decoding.noise import NOISES
from dllm_fast.decoding.schedules import Schedule
from dllm_fast.decoding.spelling import schedule_of
from dllm_fast.train.masking import FORMS, WEIGHTINGS
from dllm_fast.train.models import NEW


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m dllm_fast.train", description="Train a masked-diffusion model.")
    commands = top.add_subparsers(dest="command", required=True)
    p = commands.add_parser("pretrain", help="masked-diffusion pre-training on plain text")
    add_options(p, ".txt (each paragraph is a document) or .jsonl (each line is one)", "tokens per training row")
    p.add_argument("--template", default="{text}", help="how to make text of a .jsonl line")
    p.add_argument("--drop", type=pattern, help="a regular expression to remove from every document")
    add_masking(p)
    p.set_defaults(pairs=False)
    p = commands.add_parser("flow", help="a flow language model: tokens are flipped or mixed, none is masked")
    add_options(p, "as pretrain's, or with --pairs as sft's", "tokens per training row, or most in a prompt and answer")
    p.add_argument("--template", default="{text}", help="how to make text of a .jsonl line")
    p.add_argument("--drop", type=pattern, help="a regular expression to remove from every document")
    p.add_argument("--pairs", action="store_true", help="the data are prompts, which have no noise, and answers")
    p.add_argument("--noise", type=float, nargs=2, default=(0.0, 0.999), metavar=("LOW", "HIGH"),
                   help="range of a row's noise weight")  # fmt: skip
    p.add_argument("--tau", type=float, nargs=2, default=(1e-3, 1e-8), metavar=("FIRST", "LAST"),
                   help="the noisy softmax's temperature, first and at the end; 0 0 flips tokens")  # fmt: skip
    p.add_argument("--smoothing", type=float, default=1e-4, help="of the one-hot targets")
    p = commands.add_parser("sft", help="fine-tuning: answers are masked, prompts and what users say stay visible")
    add_options(p, '.jsonl with {"prompt": ..., "answer": ...} or {"messages": [{"role": ..., "content": ...}]} a line',
                "most tokens in a prompt with its answer, or in a chat")  # fmt: skip
    add_masking(p)
    p.set_defaults(pairs=True)
    p = commands.add_parser("distill", help="teach a model to answer in fewer forwards")
    add_options(p, '.jsonl with {"prompt": ..., "answer": ...} on each line', "most tokens in a prompt with its answer")
    p.add_argument("--schedule", type=schedule, required=True, help="what it shall answer by, such as uniform=8")
    p.add_argument("--runs", type=count, default=4, help="orders that are tried for each answer")
    p.add_argument("--hold", type=float, default=0.1, help="certainty kept from what a step does not commit")
    p.set_defaults(pairs=True)
    return top


def add_masking(p: argparse.ArgumentParser) -> None:
    """The fields of `Masking`."""
    p.add_argument("--noise", choices=NOISES, default="linear", help="how the share of masked tokens grows with time")
    p.add_argument("--mask-ratio", type=float, nargs=2, metavar=("LOW", "HIGH"),
                   help="range of that share; default: 0.001 1, for chats 0.15 0.99")  # fmt: skip
    p.add_argument("--masking", choices=FORMS, default="time", help="mask each token by itself, or a number of them")
    p.add_argument("--weighting", choices=WEIGHTINGS,
                   help="none: the mean over masked tokens; default: elbo, for chats none")  # fmt: skip


def schedule(text: str) -> Schedule:
    """A schedule, spelled as in `dllm-fast generate`."""
    try:
        return schedule_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def pattern(text: str) -> re.Pattern:
    """A regular expression."""
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a regular expression: {error}") from error


def count(text: str) -> int:
    """A positive whole number."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def add_options(p: argparse.ArgumentParser, data: str, length: str) -> None:
    """The options that all commands take."""
    add = p.add_argument
    add("--data", type=Path, nargs="+", required=True, help=data)
    add("--eval-data", type=Path, nargs="*", default=[], help="held-out files of the same kind")
    add("--out", type=Path, required=True, help="folder for checkpoints, loss.csv, loss.png and final/")
    add("--resume", action="store_true", help="continue from the last checkpoint in --out")
    add(
        "--model",
        help="continue training this model: a folder, a hub name or a shipped model; also a folder with a "
        "BERT, a RoBERTa or another masked language model, or an autoregressive GPT-2, whose causal mask is taken off",
    )
    add("--shifted", action="store_true", help="that GPT-2 goes on predicting token i + 1 at position i; else token i")
    add(
        "--lora",
        type=count,
        metavar="RANK",
        help="train LoRA adapters of this rank (PEFT): they are saved in adapter/, and merged into final/",
    )
    add("--tokenizer", choices=("bpe", "char"), default="bpe", help="of a new model; with char a .txt is one document")
    add("--family", choices=NEW, default="llada", help="of a new model; gpt: a GPT-2 without its causal mask")
    add("--vocab-size", type=count, default=2048)
    add("--width", type=count, default=192)
    add("--layers", type=count, default=6)
    add("--heads", type=count, default=3)
    add("--kv-heads", type=count, default=None)
    add("--ffn", type=count, default=512)
    add("--tie", action="store_true", help="tie the LM head to the embedding (ModernBERT always does)")
    add("--positions", type=count, default=1024, help="longest sequence that the model accepts")
    add("--length", type=count, default=256, help=length)
    add("--batch", type=count, default=16, help="rows per device and micro-batch")
    add("--accumulate", type=count, default=1)
    add("--steps", type=count, default=1000)
    add("--lr", type=float, default=2e-3)
    add("--warmup", type=int, default=100)
    add("--decay", type=float, default=0.3, help="share of the steps, at the end, in which the rate falls to 0")
    add("--bf16", action="store_true", help="compute in bfloat16; the weights and the optimizer stay in float32")
    add("--gradient-checkpointing", action="store_true", help="less memory: activations are computed again")
    add("--report-to", default="none", help="tensorboard, wandb or another of Trainer's; a package of that name")
    add("--log-every", type=count, default=25)
    add("--save-every", type=count, default=500)
    add("--seed", type=int, default=0)
    add("--threads", type=count, default=None, help="CPU threads")
    add("--cpu", action="store_true", help="train on the CPU even if there is a GPU")
    add("--save-dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
