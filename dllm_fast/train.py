"""Training: ``python -m dllm_fast.train pretrain --help``, and ``sft``.

transformers' `Trainer` does the work (optimiser, schedule, checkpoints, many GPUs through Accelerate); this file adds
the masked-diffusion losses and the record of how weights came to be.
"""

import argparse
import csv
import hashlib
import json
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    ModernBertConfig,
    ModernBertForMaskedLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from dllm_fast import diffusion
from dllm_fast.data import PackedText, PromptAnswers, collate, documents, pairs, save_tokenizer, train_tokenizer
from dllm_fast.families import FAMILIES
from dllm_fast.llada import LLaDAConfig, LLaDAModelLM

CUT = 0.01  # share of batches cut to a random length, as LLaDA's pre-training does


class DiffusionTrainer(Trainer):
    """`Trainer` with a masked-diffusion loss: LLaDA's fine-tuning one where a batch says how long its prompts are.

    Corruption is a pure function of (seed, step, micro-batch, process), not of a generator's state: a resumed run
    draws what the uninterrupted one would have drawn, however far the data loader had read ahead.
    """

    def __init__(self, *args, mask_id: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False
        self.mask_id = mask_id
        self._micro = (-1, 0)

    def _generator(self, training: bool) -> torch.Generator:
        step, micro = self._micro
        micro = micro + 1 if step == (self.state.global_step, training) else 0
        self._micro = ((self.state.global_step, training), micro)
        # Evaluation corrupts alike at every step, so that its losses can be compared.
        key = (self.args.seed, self.state.global_step if training else -1, micro, self.args.process_index)
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
        return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest, "little") >> 1)

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        ids, generator = inputs["input_ids"], self._generator(model.training)
        prompt_length = inputs.get("prompt_length")
        host = {"generator": generator, "device": "cpu"}
        if prompt_length is None and model.training and torch.rand(1, dtype=torch.float32, **host) < CUT:
            ids = ids[:, : int(torch.randint(1, ids.shape[1] + 1, (1,), **host))]
        bare = self.accelerator.unwrap_model(model)
        family = FAMILIES[bare.config.model_type](bare, "torch")
        if prompt_length is None:
            loss = diffusion.pretrain_loss(family, ids, self.mask_id, generator)
        else:
            loss = diffusion.sft_loss(family, ids, prompt_length, self.mask_id, generator)
        return (loss, {"loss": loss.detach()[None]}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None


class LossRecord(TrainerCallback):
    """Keeps ``loss.csv`` and ``loss.png`` in the run's folder up to date at every save."""

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
    """Training and held-out loss, in nats a token, against the step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for key, label in (("loss", "training"), ("eval_loss", "held out")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if key == "eval_loss" else None, markersize=3)
    axes.set(xlabel="step", ylabel="masked-diffusion loss, nats a token")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def build_model(args, tokenizer) -> transformers.PreTrainedModel:
    """A freshly initialised model of ``--family`` and the given sizes."""
    ids = {name: getattr(tokenizer, name) for name in ("eos_token_id", "pad_token_id")}
    if args.family == "llada":
        config = LLaDAConfig(
            d_model=args.width, n_heads=args.heads, n_kv_heads=args.kv_heads, n_layers=args.layers,
            mlp_hidden_size=args.ffn, vocab_size=len(tokenizer), max_sequence_length=args.positions,
            rope_theta=10000.0, weight_tying=args.tie, mask_token_id=tokenizer.mask_token_id, **ids,
        )  # fmt: skip
        return LLaDAModelLM(config)
    config = ModernBertConfig(
        hidden_size=args.width, num_attention_heads=args.heads, num_hidden_layers=args.layers,
        intermediate_size=args.ffn, vocab_size=len(tokenizer), max_position_embeddings=args.positions,
        bos_token_id=ids["eos_token_id"], cls_token_id=ids["eos_token_id"], sep_token_id=ids["eos_token_id"],
        mask_token_id=tokenizer.mask_token_id,
        # At its default of 0.02 a narrow model sits for a thousand steps where it knows only word frequencies.
        initializer_range=args.width**-0.5, **ids,
    )  # fmt: skip
    return ModernBertForMaskedLM(config)


def read(args: argparse.Namespace, paths: list[Path]) -> list:
    """What the files hold: documents, or for ``sft`` pairs of prompt and answer."""
    if args.command == "sft":
        return [pair for path in paths for pair in pairs(path)]
    return [text for path in paths for text in documents(path, args.template, args.drop)]


def train(args: argparse.Namespace) -> Path:
    """Train from scratch, or on from ``--model``; returns the folder with model, tokenizer and recipe."""
    if args.threads:
        torch.set_num_threads(args.threads)
    transformers.set_seed(args.seed)
    out = args.out
    sft = args.command == "sft"
    found, held_out = read(args, args.data), read(args, args.eval_data)
    kept = out / "tokenizer"  # made once: a resumed run reads the one that its checkpoints were trained with
    if args.model:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForMaskedLM.from_pretrained(args.model, dtype=torch.float32)
    else:
        if args.resume and kept.is_dir():
            tokenizer = AutoTokenizer.from_pretrained(kept)
        else:
            texts = [text for pair in found for text in pair] if sft else found
            tokenizer = train_tokenizer(texts, args.vocab_size, args.positions)
        model = build_model(args, tokenizer)
    if model.config.model_type not in FAMILIES:
        raise ValueError(f"--model: {model.config.model_type!r} is not one of {', '.join(FAMILIES)}")
    settings = TrainingArguments(
        output_dir=str(out), max_steps=args.steps, per_device_train_batch_size=args.batch,
        per_device_eval_batch_size=args.batch, gradient_accumulation_steps=args.accumulate,
        learning_rate=args.lr, weight_decay=0.1, adam_beta2=0.95, max_grad_norm=1.0,
        lr_scheduler_type="warmup_stable_decay", warmup_steps=args.warmup,
        lr_scheduler_kwargs={"num_decay_steps": round(args.decay * args.steps)},
        logging_steps=args.log_every, save_steps=args.save_every, save_total_limit=2,
        eval_strategy="steps" if held_out else "no", eval_steps=args.save_every,
        seed=args.seed, data_seed=args.seed, use_cpu=args.cpu, remove_unused_columns=False, report_to=[],
        dataloader_pin_memory=torch.cuda.is_available() and not args.cpu,
    )  # fmt: skip
    kind = PromptAnswers if sft else PackedText
    trainer = DiffusionTrainer(
        model=model, args=settings, mask_id=tokenizer.mask_token_id, callbacks=[LossRecord()],
        train_dataset=kind(found, tokenizer, args.length),
        eval_dataset=kind(held_out, tokenizer, args.length) if held_out else None,
        data_collator=collate if sft else None,
    )  # fmt: skip
    checkpoint = get_last_checkpoint(str(out)) if out.is_dir() else None
    if checkpoint and not args.resume:
        raise ValueError(f"--out: {out} already holds {Path(checkpoint).name}; add --resume or choose another folder")
    save_tokenizer(tokenizer, kept)
    began = time.time()
    trainer.train(resume_from_checkpoint=checkpoint)
    final = out / "final"
    model.to(getattr(torch, args.save_dtype)).save_pretrained(final)
    save_tokenizer(tokenizer, final)
    (final / "recipe.json").write_text(json.dumps(recipe(args, trainer, time.time() - began), indent=2) + "\n")
    plot_loss(trainer.state.log_history, final / "loss.png")
    return final


def recipe(args: argparse.Namespace, trainer: Trainer, seconds: float) -> dict:
    """What made the weights: command (file names without their folders), data hashes, seed, losses, versions."""
    history = trainer.state.log_history
    rows = trainer.state.global_step * args.batch * args.accumulate
    losses = {key: [entry[key] for entry in history if key in entry] for key in ("loss", "eval_loss")}
    names = {str(path): path.name for path in (*args.data, *args.eval_data, args.out)}
    names |= {args.model: Path(args.model).name} if args.model else {}
    earlier = Path(args.model or "") / "recipe.json"
    return {
        "command": ["python", "-m", "dllm_fast.train", *(names.get(word, word) for word in sys.argv[1:])],
        "data": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (*args.data, *args.eval_data)},
        "seed": args.seed,
        "steps": trainer.state.global_step,
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
    add_options(p, ".txt (a document a paragraph) or .jsonl (one a line)", "tokens a training row")
    p.add_argument("--template", default="{text}", help="how a .jsonl line becomes text")
    p.add_argument("--drop", help="a regular expression to remove from every document")
    p = commands.add_parser("sft", help="LLaDA's fine-tuning: answers are masked, prompts stay visible")
    add_options(p, '.jsonl, a {"prompt": ..., "answer": ...} a line', "most tokens of a prompt and its answer")
    return top


def add_options(p: argparse.ArgumentParser, data: str, length: str) -> None:
    """The options that both commands take."""
    add = p.add_argument
    add("--data", type=Path, nargs="+", required=True, help=data)
    add("--eval-data", type=Path, nargs="*", default=[], help="held-out files of the same kind")
    add("--out", type=Path, required=True, help="folder for checkpoints, loss.csv, loss.png and final/")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")
    add("--model", help="train on from this model and its tokenizer instead of from scratch")
    add("--family", choices=("llada", "modernbert"), default="llada")
    add("--vocab-size", type=int, default=2048)
    add("--width", type=int, default=192)
    add("--layers", type=int, default=6)
    add("--heads", type=int, default=3)
    add("--kv-heads", type=int, default=None)
    add("--ffn", type=int, default=512)
    add("--tie", action="store_true", help="tie the LM head to the embedding (ModernBERT always does)")
    add("--positions", type=int, default=1024, help="longest sequence that the model accepts")
    add("--length", type=int, default=256, help=length)
    add("--batch", type=int, default=16, help="rows a device and micro-batch")
    add("--accumulate", type=int, default=1)
    add("--steps", type=int, default=1000)
    add("--lr", type=float, default=2e-3)
    add("--warmup", type=int, default=100)
    add("--decay", type=float, default=0.3, help="share of the steps over which the rate falls to 0")
    add("--log-every", type=int, default=25)
    add("--save-every", type=int, default=500)
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=None, help="CPU threads")
    add("--cpu", action="store_true", help="train on the CPU though there is a GPU")
    add("--save-dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    missing = [str(path) for path in (*args.data, *args.eval_data) if not path.is_file()]
    if missing:
        print(f"error: no such file: {', '.join(missing)}", file=sys.stderr)
        return 2
    try:
        print(train(args))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nstopped; go on with --resume (checkpoints are in {args.out})", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
