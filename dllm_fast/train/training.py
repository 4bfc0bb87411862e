"""Training: ``python -m dllm_fast.train pretrain --help``, ``sft``, ``flow`` and ``distill``.

transformers' `Trainer` does the work (optimiser, schedule, checkpoints, several GPUs through Accelerate). This room
adds the masked-diffusion losses and a record of how the weights were made.
"""

import argparse
import functools
import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from transformers import AutoTokenizer, Trainer, TrainingArguments, default_data_collator
from transformers.trainer_utils import get_last_checkpoint

from dllm_fast.errors import exit_code
from dllm_fast.families import FAMILIES
from dllm_fast.loading import from_pretrained, model_path
from dllm_fast.patch import unpatch
from dllm_fast.train.data import (
    BadData,
    PackedText,
    PromptAnswers,
    Run,
    collate,
    documents,
    pairs,
    save_tokenizer,
    train_tokenizer,
)
from dllm_fast.train.distill import DistillTrainer
from dllm_fast.train.flow import Flow, FlowTrainer
from dllm_fast.train.masking import Masking
from dllm_fast.train.options import parser
from dllm_fast.train.trainer import DiffusionTrainer, LossRecord, plot_loss


def build_model(args, tokenizer) -> transformers.PreTrainedModel:
    """A newly initialised model with the family and sizes that the options give."""
    ids = {name: getattr(tokenizer, name) for name in ("eos_token_id", "pad_token_id", "mask_token_id")}
    return FAMILIES[args.family].new(
        args.width, args.heads, args.kv_heads, args.layers, args.ffn, args.positions, args.tie,
        vocab_size=len(tokenizer), **ids,
    )  # fmt: skip


def read(args: argparse.Namespace, option: str) -> list:
    """The contents of an option's files: documents, or (prompt, answer) with ``args.pairs``. Raises ValueError."""
    paths = getattr(args, option.replace("-", "_"))
    try:
        if args.pairs:
            return [pair for path in paths for pair in pairs(path)]
        return [text for path in paths for text in documents(path, args.template, args.drop)]
    except BadData as error:
        raise ValueError(f"--{option}: {error}") from error


def start(
    args: argparse.Namespace, texts: list
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """The model to train and its tokenizer: ``--model``'s, or new ones. The first process makes a new tokenizer, and
    all processes read it."""
    if args.model:
        try:
            tokenizer = AutoTokenizer.from_pretrained(model_path(args.model))
            return unpatch(from_pretrained(args.model, torch.float32, impl="torch")), tokenizer
        except (OSError, ValueError) as error:  # transformers' message has several lines
            raise ValueError(f"--model: {args.model}: {str(error).strip().splitlines()[0]}") from error
    folder = args.out / "tokenizer"  # a resumed run needs the tokenizer that its checkpoints were trained with
    if not (args.resume and folder.is_dir()):
        with PartialState().main_process_first():
            if PartialState().is_main_process:
                strings = [text for pair in texts for text in pair] if args.pairs else texts
                save_tokenizer(train_tokenizer(strings, args.vocab_size, args.positions), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return build_model(args, tokenizer), tokenizer


def trainer_of(args: argparse.Namespace) -> Callable[..., DiffusionTrainer]:
    """The trainer of ``args.command``. Raises ValueError for options of its objective."""
    if args.command == "flow":
        return functools.partial(FlowTrainer, objective=Flow(tuple(args.noise), tuple(args.tau), args.smoothing))
    if args.command == "distill":
        if not args.model:
            raise ValueError("--model: distill needs a trained model")
        return functools.partial(DistillTrainer, schedule=args.schedule, runs=args.runs, hold=args.hold)
    ratio = args.mask_ratio and tuple(args.mask_ratio)
    return functools.partial(DiffusionTrainer, masking=Masking(args.noise, ratio, args.masking, args.weighting))


def train(args: argparse.Namespace) -> Path:
    """Train a new model, or continue training ``--model``. Returns the folder with model, tokenizer and recipe.

    Under ``torchrun`` every process runs this, and the first one writes the files.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    transformers.set_seed(args.seed)
    out = args.out
    trainer_class = trainer_of(args)
    texts = read(args, "data")
    eval_texts = read(args, "eval-data")
    checkpoint = get_last_checkpoint(str(out)) if out.is_dir() else None
    if checkpoint and not args.resume:
        raise ValueError(f"--out: {out} already holds {Path(checkpoint).name}; add --resume or choose another folder")
    gpu = torch.accelerator.is_available() and not args.cpu
    settings = TrainingArguments(
        output_dir=str(out), max_steps=args.steps, per_device_train_batch_size=args.batch,
        per_device_eval_batch_size=args.batch, gradient_accumulation_steps=args.accumulate,
        learning_rate=args.lr, weight_decay=0.1, adam_beta2=0.95, max_grad_norm=1.0,
        lr_scheduler_type="warmup_stable_decay", warmup_steps=args.warmup,
        lr_scheduler_kwargs={"num_decay_steps": round(args.decay * args.steps)},
        logging_steps=args.log_every, save_steps=args.save_every, save_total_limit=2,
        eval_strategy="steps" if eval_texts else "no", eval_steps=args.save_every,
        seed=args.seed, data_seed=args.seed, use_cpu=not gpu, remove_unused_columns=False, report_to=[],
        dataloader_pin_memory=gpu and torch.cuda.is_available(),
    )  # fmt: skip
    model, tokenizer = start(args, texts)
    mask_id = tokenizer.mask_token_id if model.config.mask_token_id is None else model.config.mask_token_id
    if mask_id is None:
        raise ValueError(f"--model: neither the config nor the tokenizer of {args.model} names a mask token")
    kind = PromptAnswers if args.pairs else PackedText
    rows = kind(texts, tokenizer, args.length)
    eval_rows = kind(eval_texts, tokenizer, args.length) if eval_texts else None
    positions = model.config.max_position_embeddings
    if args.length > positions:
        raise ValueError(f"--length: {args.length} exceeds the model's {positions} positions")
    trainer = trainer_class(
        model=model, args=settings, mask_id=mask_id, callbacks=[LossRecord()],
        train_dataset=rows, eval_dataset=eval_rows,
        data_collator=collate if args.pairs else default_data_collator,
    )  # fmt: skip
    began = time.time()
    trainer.train(resume_from_checkpoint=checkpoint)
    final = out / "final"
    if trainer.is_world_process_zero():
        model.to(getattr(torch, args.save_dtype)).save_pretrained(final)
        save_tokenizer(tokenizer, final)
        (final / "recipe.json").write_text(json.dumps(recipe(args, trainer, time.time() - began), indent=2) + "\n")
        plot_loss(trainer.state.log_history, final / "loss.png")
    trainer.accelerator.wait_for_everyone()
    return final


def recipe(args: argparse.Namespace, trainer: Trainer, seconds: float) -> dict:
    """How the weights were made: command (file names without their folders), data hashes, seed, losses, versions."""
    assert isinstance(trainer.train_dataset, Run) and trainer.model is not None
    history = trainer.state.log_history
    rows = trainer.state.global_step * trainer.train_dataset.batch  # of all processes
    losses = {key: [entry[key] for entry in history if key in entry] for key in ("loss", "eval_loss")}
    names = {str(path): path.name for path in (*args.data, *args.eval_data, args.out)}
    names |= {args.model: Path(args.model).name} if args.model else {}
    earlier = Path(model_path(args.model or "")) / "recipe.json"
    return {
        "command": ["python", "-m", "dllm_fast.train", *(names.get(word, word) for word in sys.argv[1:])],
        "data": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (*args.data, *args.eval_data)},
        "seed": args.seed,
        "steps": trainer.state.global_step,
        "processes": trainer.args.world_size,
        "rows": rows,
        **({"tokens": rows * args.length} if not args.pairs else {}),
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "final_loss": {key: values[-1] if values else None for key, values in losses.items()},
        "mean_loss_of_last_10_logs": sum(losses["loss"][-10:]) / max(1, len(losses["loss"][-10:])),
        "seconds_since_start_or_resume": round(seconds),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "started_from": json.loads(earlier.read_text()) if args.model and earlier.is_file() else None,
    }


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return exit_code(functools.partial(run, args))


def run(args: argparse.Namespace) -> int:
    """Train, and print the folder of the finished model."""
    missing = [str(path) for path in (*args.data, *args.eval_data) if not path.is_file()]
    if missing:
        raise ValueError(f"no such file: {', '.join(missing)}")
    try:
        final = train(args)
    except KeyboardInterrupt:
        print(f"\ncontinue with --resume (checkpoints are in {args.out})", file=sys.stderr)
        raise
    if PartialState().is_main_process:
        print(final)
    return 0
