"""Training: ``python -m dllm_fast.train pretrain --help``, ``sft``, ``flow`` and ``distill``.

transformers' `Trainer` does the work (optimiser, schedule, checkpoints, several GPUs through Accelerate). This room
adds the masked-diffusion losses and a record of how the weights were made.
"""

import argparse
import functools
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from transformers import Trainer, TrainingArguments, default_data_collator
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_utils import get_last_checkpoint

from dllm_fast.errors import exit_code
from dllm_fast.loading import model_path
from dllm_fast.plain import positions_of
from dllm_fast.train import saving
from dllm_fast.train.chat import CHAT_RATIO, Chats, ChatTrainer, chats, is_chat
from dllm_fast.train.data import BadData, PackedText, PromptAnswers, Run, collate, documents, pairs, save_tokenizer
from dllm_fast.train.distill import DistillTrainer
from dllm_fast.train.flow import Flow, FlowTrainer
from dllm_fast.train.masking import Masking
from dllm_fast.train.models import start, with_adapters
from dllm_fast.train.options import parser
from dllm_fast.train.trainer import DiffusionTrainer, LossRecord, plot_loss


def read(args: argparse.Namespace, option: str) -> list:
    """The contents of an option's files: chats, (prompt, answer) with ``args.pairs``, or documents.

    Raises ValueError.
    """
    paths = getattr(args, option.replace("-", "_"))
    try:
        if args.chat:
            return [chat for path in paths for chat in chats(path)]
        if args.pairs:
            return [pair for path in paths for pair in pairs(path)]
        whole = args.tokenizer == "char"
        return [text for path in paths for text in documents(path, args.template, args.drop, whole)]
    except BadData as error:
        raise ValueError(f"--{option}: {error}") from error


def holds_chats(path: Path) -> bool:
    try:
        return is_chat(path)
    except BadData as error:
        raise ValueError(f"--data: {error}") from error


def strings(args: argparse.Namespace, texts: list) -> list[str]:
    """The text in what `read` returns."""
    if args.chat:
        return [message["content"] for chat in texts for message in chat]
    return [text for pair in texts for text in pair] if args.pairs else texts


def trainer_of(args: argparse.Namespace) -> Callable[..., DiffusionTrainer]:
    """The trainer of ``args.command``. Raises ValueError for options of its objective."""
    if args.command == "flow":
        return functools.partial(FlowTrainer, objective=Flow(tuple(args.noise), tuple(args.tau), args.smoothing))
    if args.command == "distill":
        if not args.model:
            raise ValueError("--model: distill needs a trained model")
        return functools.partial(DistillTrainer, schedule=args.schedule, runs=args.runs, hold=args.hold)
    ratio = args.mask_ratio and tuple(args.mask_ratio)
    ratio, weighting = (ratio or CHAT_RATIO, "none") if args.chat else (ratio, "elbo")
    try:
        masking = Masking(args.noise, ratio, args.masking, args.weighting or weighting)
    except ValueError as error:
        raise ValueError(f"--mask-ratio: {error}") from None
    return functools.partial(ChatTrainer if args.chat else DiffusionTrainer, masking=masking)


def train(args: argparse.Namespace) -> Path:
    """Train a new model, or continue training ``--model``. Returns the folder with model, tokenizer and recipe.

    Under ``torchrun`` every process runs this, and the first one writes the files.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    transformers.set_seed(args.seed)
    out = args.out
    args.chat = args.command == "sft" and holds_chats(args.data[0])
    trainer_class = trainer_of(args)
    texts = read(args, "data")
    eval_texts = read(args, "eval-data")
    if args.lora and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise ValueError("--lora: adapters are not gathered from FSDP's shards; launch without FSDP")
    checkpoint = get_last_checkpoint(str(out)) if out.is_dir() else None
    if checkpoint and not args.resume:
        raise ValueError(f"--out: {out} already holds {Path(checkpoint).name}; add --resume or choose another folder")
    reporters = ["none", *get_available_reporting_integrations()]
    if args.report_to not in reporters:
        raise ValueError(f"--report-to: {args.report_to} is unknown or not installed; here are {', '.join(reporters)}")
    gpu = torch.accelerator.is_available() and not args.cpu
    settings = TrainingArguments(
        output_dir=str(out), max_steps=args.steps, per_device_train_batch_size=args.batch,
        per_device_eval_batch_size=args.batch, gradient_accumulation_steps=args.accumulate,
        learning_rate=args.lr, weight_decay=0.1, adam_beta2=0.95, max_grad_norm=1.0,
        lr_scheduler_type="warmup_stable_decay", warmup_steps=args.warmup,
        lr_scheduler_kwargs={"num_decay_steps": round(args.decay * args.steps)},
        logging_steps=args.log_every, save_steps=args.save_every, save_total_limit=2,
        eval_strategy="steps" if eval_texts else "no", eval_steps=args.save_every,
        seed=args.seed, data_seed=args.seed, use_cpu=not gpu, remove_unused_columns=False, report_to=args.report_to,
        bf16=args.bf16, gradient_checkpointing=args.gradient_checkpointing,
        dataloader_pin_memory=gpu and torch.cuda.is_available(),
    )  # fmt: skip
    model, tokenizer = start(args, strings(args, texts))
    kind = Chats if args.chat else PromptAnswers if args.pairs else PackedText
    rows = kind(texts, tokenizer, args.length)
    eval_rows = kind(eval_texts, tokenizer, args.length) if eval_texts else None
    positions = positions_of(model.config)
    if args.length > positions:
        raise ValueError(f"--length: {args.length} exceeds the model's {positions} positions")
    adapted: Any = with_adapters(model, args.lora) if args.lora else model
    trainer = trainer_class(
        model=adapted, args=settings, mask_id=model.config.mask_token_id, callbacks=[LossRecord()],
        train_dataset=rows, eval_dataset=eval_rows,
        data_collator=collate if args.pairs else default_data_collator,
    )  # fmt: skip
    began = time.time()
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        for callback in trainer.callback_handler.callbacks:  # an error has a line of its own, below the progress bar
            if getattr(callback, "training_bar", None) is not None:
                callback.training_bar.close()
    final = out / "final"
    # Sharded weights are gathered by all processes together.
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if trainer.is_fsdp_enabled else None
    if trainer.is_world_process_zero():
        with saving.writing("final", out):
            made = saving.stage(out) / "final"
            if args.lora:
                adapted.save_pretrained(str(out / "adapter"))
                adapted.merge_and_unload()  # into ``model``
            dtype = getattr(torch, args.save_dtype)
            if state is not None:
                state = {name: value.to(dtype) for name, value in state.items()}
            model.to(dtype).save_pretrained(made, state_dict=state)
            save_tokenizer(tokenizer, made)
            (made / "recipe.json").write_text(json.dumps(recipe(args, trainer, time.time() - began), indent=2) + "\n")
            plot_loss(trainer.state.log_history, made / "loss.png")
            saving.publish(made, final)
            shutil.rmtree(made.parent)
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
