"""Training: ``python -m dllm_fast.train pretrain --help``, and ``sft``.

transformers' `Trainer` does the work (optimiser, schedule, checkpoints, several GPUs through Accelerate). This file
adds the masked-diffusion losses and a record of how the weights were made.
"""

import argparse
import copy
import csv
import functools
import hashlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Sized
from pathlib import Path

import numpy
import torch
import transformers
from accelerate import PartialState
from torch.utils.data import SequentialSampler
from transformers import (
    AutoTokenizer,
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_utils import get_last_checkpoint

from dllm_fast.errors import exit_code
from dllm_fast.families import FAMILIES
from dllm_fast.loading import from_pretrained, model_path
from dllm_fast.patch import unpatch
from dllm_fast.train import losses
from dllm_fast.train.data import (
    BadData,
    Corruption,
    PackedText,
    PromptAnswers,
    Run,
    collate,
    documents,
    pairs,
    save_tokenizer,
    train_tokenizer,
)


class DiffusionTrainer(Trainer):
    """`Trainer` with a masked-diffusion loss: LLaDA's fine-tuning loss if batches have a ``prompt_length``, else its
    pre-training loss.

    The model's forward computes the loss (`losses.bind_loss`), because every wrapper calls the forward. Rows and their
    noise are a function of seed, step and the row's number in the step's whole batch (`data.Run`). So a resumed run
    continues exactly as an uninterrupted one would, for any number of processes and micro-batches.

    Args:
        model: a LLaDA or ModernBERT, or a PEFT model of one.
        train_dataset, eval_dataset: datasets with a length. ``data_collator`` makes their examples into batches of
            ``input_ids`` and, for fine-tuning, ``prompt_length``.
        kwargs: passed on to `Trainer`.
    """

    def __init__(
        self, model, args: TrainingArguments, *, mask_id: int, train_dataset=None, eval_dataset=None,
        data_collator=default_data_collator, **kwargs,
    ):  # fmt: skip
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if processes != args.world_size:
            # Without a GPU and without use_cpu, Accelerate silently lets each process train alone.
            raise ValueError(f"args: {processes} processes would each train alone; without a GPU, give use_cpu=True")
        losses.bind_loss(model)
        self.mask_id = mask_id
        args = copy.copy(args)
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if train_dataset is not None:
            _require_rows(train_dataset, "train_dataset")
            if args.max_steps <= 0:
                args.max_steps = math.ceil(args.num_train_epochs * max(1, len(train_dataset) // batch))
            train_dataset = Run(train_dataset, batch, args.max_steps, args.seed)
        if args.gradient_checkpointing and args.gradient_checkpointing_kwargs is None:
            # Reentrant checkpointing gives no gradients at all if the embedding is frozen, as it is with adapters.
            args.gradient_checkpointing_kwargs = {"use_reentrant": False}
        super().__init__(
            model, args, train_dataset=train_dataset, eval_dataset=self._rows_of(eval_dataset, args.seed),
            data_collator=Corruption(data_collator, mask_id, args.seed), compute_metrics=_mean_loss, **kwargs,
        )  # fmt: skip
        self.model_accepts_loss_kwargs = False
        sharded = args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
        if sharded and not self.is_fsdp_enabled:
            raise ValueError(f"fsdp: on {args.device}, Accelerate would run DistributedDataParallel instead")

    def _rows_of(self, dataset, seed: int):
        if dataset is None or isinstance(dataset, Run | str):
            return dataset
        if isinstance(dataset, dict):
            return {name: self._rows_of(part, seed) for name, part in dataset.items()}
        _require_rows(dataset, "eval_dataset")
        return Run(dataset, len(dataset), 1, seed, evaluation=True)

    def _get_train_sampler(self, *args) -> SequentialSampler:
        assert isinstance(self.train_dataset, Run)  # which shuffles
        return SequentialSampler(self.train_dataset)

    def get_eval_dataloader(self, eval_dataset=None):
        return super().get_eval_dataloader(self._rows_of(eval_dataset, self.args.seed))

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None or self.args.device.type != "cpu" or self.is_fsdp_enabled:
            return super()._load_optimizer_and_scheduler(checkpoint)
        # With several processes Accelerate names the device "cpu:0", which Trainer's own call of `torch.load` refuses.
        assert self.optimizer is not None and self.lr_scheduler is not None
        for part, file in ((self.optimizer, "optimizer.pt"), (self.lr_scheduler, "scheduler.pt")):
            part.load_state_dict(torch.load(Path(checkpoint) / file, map_location="cpu", weights_only=True))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        row_loss = self._row_loss(model, inputs)
        return (row_loss.mean(), {"loss": row_loss}) if return_outputs else row_loss.mean()

    def _row_loss(self, model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(input_ids=inputs["input_ids"], masked_labels=inputs["masked_labels"]) * inputs["weight"]

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Each row's loss, as both prediction and label: the mean over rows is right whatever the batches are."""
        with torch.no_grad():
            row_loss = self._row_loss(model, self._prepare_inputs(inputs))
        return None, row_loss, row_loss


def _require_rows(dataset, name: str) -> None:
    if not isinstance(dataset, Sized) or not len(dataset):
        raise ValueError(f"{name}: a {type(dataset).__name__} has no rows or no length")


def _mean_loss(prediction: EvalPrediction) -> dict[str, float]:
    return {"loss": float(numpy.mean(prediction.predictions, dtype="float64"))}


class LossRecord(TrainerCallback):
    """Writes ``loss.csv`` and ``loss.png`` into the run's folder at every save."""

    def on_save(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        with open(folder / "loss.csv", "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(("step", "loss", "eval_loss"))
            for entry in state.log_history:
                if "loss" in entry or "eval_loss" in entry:
                    table.writerow((entry["step"], entry.get("loss", ""), entry.get("eval_loss", "")))
        plot_loss(state.log_history, folder / "loss.png")


def plot_loss(history: list[dict], path: Path) -> None:
    """Plot training and held-out loss, in nats per token, against the step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for key, label in (("loss", "training"), ("eval_loss", "held out")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if key == "eval_loss" else None, markersize=3)
    axes.set(xlabel="step", ylabel="masked-diffusion loss, nats per token")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def build_model(args, tokenizer) -> transformers.PreTrainedModel:
    """A newly initialised model with the family and sizes that the options give."""
    ids = {name: getattr(tokenizer, name) for name in ("eos_token_id", "pad_token_id", "mask_token_id")}
    return FAMILIES[args.family].new(
        args.width, args.heads, args.kv_heads, args.layers, args.ffn, args.positions, args.tie,
        vocab_size=len(tokenizer), **ids,
    )  # fmt: skip


def read(args: argparse.Namespace, option: str) -> list:
    """The contents of an option's files: documents, or (prompt, answer) pairs for ``sft``. Raises ValueError."""
    paths = getattr(args, option.replace("-", "_"))
    try:
        if args.command == "sft":
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
                strings = [text for pair in texts for text in pair] if args.command == "sft" else texts
                save_tokenizer(train_tokenizer(strings, args.vocab_size, args.positions), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return build_model(args, tokenizer), tokenizer


def train(args: argparse.Namespace) -> Path:
    """Train a new model, or continue training ``--model``. Returns the folder with model, tokenizer and recipe.

    Under ``torchrun`` every process runs this, and the first one writes the files.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    transformers.set_seed(args.seed)
    out = args.out
    sft = args.command == "sft"
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
    kind = PromptAnswers if sft else PackedText
    rows = kind(texts, tokenizer, args.length)
    eval_rows = kind(eval_texts, tokenizer, args.length) if eval_texts else None
    positions = model.config.max_position_embeddings
    if args.length > positions:
        raise ValueError(f"--length: {args.length} exceeds the model's {positions} positions")
    trainer = DiffusionTrainer(
        model=model, args=settings, mask_id=mask_id, callbacks=[LossRecord()],
        train_dataset=rows, eval_dataset=eval_rows,
        data_collator=collate if sft else default_data_collator,
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
        **({"tokens": rows * args.length} if args.command == "pretrain" else {}),
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "final_loss": {key: values[-1] if values else None for key, values in losses.items()},
        "mean_loss_of_last_10_logs": sum(losses["loss"][-10:]) / max(1, len(losses["loss"][-10:])),
        "seconds_since_start_or_resume": round(seconds),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "started_from": json.loads(earlier.read_text()) if args.model and earlier.is_file() else None,
    }


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m dllm_fast.train", description=__doc__.splitlines()[0])
    commands = top.add_subparsers(dest="command", required=True)
    p = commands.add_parser("pretrain", help="masked-diffusion pre-training on plain text")
    add_options(p, ".txt (each paragraph is a document) or .jsonl (each line is one)", "tokens per training row")
    p.add_argument("--template", default="{text}", help="how to make text of a .jsonl line")
    p.add_argument("--drop", type=pattern, help="a regular expression to remove from every document")
    p = commands.add_parser("sft", help="LLaDA's fine-tuning: answers are masked, prompts stay visible")
    add_options(p, '.jsonl with {"prompt": ..., "answer": ...} on each line', "most tokens in a prompt with its answer")
    return top


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
    """The options that both commands take."""
    add = p.add_argument
    add("--data", type=Path, nargs="+", required=True, help=data)
    add("--eval-data", type=Path, nargs="*", default=[], help="held-out files of the same kind")
    add("--out", type=Path, required=True, help="folder for checkpoints, loss.csv, loss.png and final/")
    add("--resume", action="store_true", help="continue from the last checkpoint in --out")
    add("--model", help="continue training this model: a folder, a hub name or a shipped model")
    add("--family", choices=tuple(FAMILIES), default="llada")
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
    add("--log-every", type=count, default=25)
    add("--save-every", type=count, default=500)
    add("--seed", type=int, default=0)
    add("--threads", type=count, default=None, help="CPU threads")
    add("--cpu", action="store_true", help="train on the CPU even if there is a GPU")
    add("--save-dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))


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
