"""Training: ``python -m dllm_fast.train pretrain --help``.

transformers' `Trainer` does the work (optimiser, schedule, checkpoints, many GPUs through Accelerate); this file adds
the masked-diffusion loss, a packed-text data set, a byte-level BPE tokenizer, and the record of how weights came to be.
"""

import argparse
import csv
import hashlib
import json
import re
import sys
import time
from pathlib import Path

import torch
import transformers
from torch.utils.data import Dataset
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from dllm_fast import diffusion
from dllm_fast.families import FAMILIES
from dllm_fast.llada import LLaDAConfig, LLaDAModelLM

CUT = 0.01  # share of batches cut to a random length, as LLaDA's pre-training does


def documents(path: Path, template: str, drop: str | None) -> list[str]:
    """The texts of a file: each line of a ``.jsonl`` through ``template``, else each paragraph.

    What matches the regular expression ``drop`` is removed. Raises ValueError for a file without text.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        found = [template.format(**json.loads(line)) for line in text.splitlines() if line.strip()]
    else:
        found = [paragraph.strip() for paragraph in text.split("\n\n")]
    found = [re.sub(drop, "", document) if drop else document for document in found]
    if not any(found):
        raise ValueError(f"--data: {path} holds no text")
    return [document for document in found if document]


def train_tokenizer(texts: list[str], vocab_size: int, length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with single digits and [MASK], <|endoftext|> and [PAD] as its last three ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = ["<|endoftext|>", "[PAD]", "[MASK]"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size - len(special), initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=special[0],
        pad_token=special[1],
        mask_token=special[2],
        model_max_length=length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Save it so that transformers 4 loads it too: version 5 writes a class name that only version 5 has."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = path.read_text().replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"')
    path.write_text(config)


class PackedText(Dataset):
    """Documents tokenized, joined with end-of-text, and cut into rows of ``length`` tokens."""

    def __init__(self, texts: list[str], tokenizer, length: int):
        eos = tokenizer.eos_token_id
        ids = [i for encoded in tokenizer(texts, verbose=False)["input_ids"] for i in [*encoded, eos]]
        rows = len(ids) // length
        if rows == 0:
            raise ValueError(f"--data: {len(ids)} tokens do not fill one row of --length {length}")
        self.rows = torch.tensor(ids[: rows * length]).view(rows, length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[i]}


class DiffusionTrainer(Trainer):
    """`Trainer` with the masked-diffusion loss.

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
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        ids, generator = inputs["input_ids"], self._generator(model.training)
        if model.training and torch.rand(1, generator=generator) < CUT:
            ids = ids[:, : int(torch.randint(1, ids.shape[1] + 1, (1,), generator=generator))]
        bare = self.accelerator.unwrap_model(model)
        family = FAMILIES[bare.config.model_type](bare, "torch")
        loss = diffusion.pretrain_loss(family, ids, self.mask_id, generator)
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


def pretrain(args: argparse.Namespace) -> Path:
    """Train from scratch, or on from ``--model``; returns the folder with model, tokenizer and recipe."""
    if args.threads:
        torch.set_num_threads(args.threads)
    transformers.set_seed(args.seed)
    out = args.out
    texts = [text for path in args.data for text in documents(path, args.template, args.drop)]
    held_out = [text for path in args.eval_data for text in documents(path, args.template, args.drop)]
    kept = out / "tokenizer"  # made once: a resumed run reads the one that its checkpoints were trained with
    if args.model:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForMaskedLM.from_pretrained(args.model, dtype=torch.float32)
    else:
        if args.resume and kept.is_dir():
            tokenizer = AutoTokenizer.from_pretrained(kept)
        else:
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
    trainer = DiffusionTrainer(
        model=model, args=settings, mask_id=tokenizer.mask_token_id, callbacks=[LossRecord()],
        train_dataset=PackedText(texts, tokenizer, args.length),
        eval_dataset=PackedText(held_out, tokenizer, args.length) if held_out else None,
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
    losses = {key: [entry[key] for entry in history if key in entry] for key in ("loss", "eval_loss")}
    names = {str(path): path.name for path in (*args.data, *args.eval_data, args.out)}
    names |= {args.model: Path(args.model).name} if args.model else {}
    earlier = Path(args.model or "") / "recipe.json"
    return {
        "command": ["python", "-m", "dllm_fast.train", *(names.get(word, word) for word in sys.argv[1:])],
        "data": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (*args.data, *args.eval_data)},
        "seed": args.seed,
        "steps": trainer.state.global_step,
        "tokens": trainer.state.global_step * args.batch * args.accumulate * args.length,
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
    add = p.add_argument
    add("--data", type=Path, nargs="+", required=True, help=".txt (a document a paragraph) or .jsonl (one a line)")
    add("--eval-data", type=Path, nargs="*", default=[], help="held-out files of the same kind")
    add("--template", default="{text}", help="how a .jsonl line becomes text")
    add("--drop", help="a regular expression to remove from every document")
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
    add("--length", type=int, default=256, help="tokens a training row")
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
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    missing = [str(path) for path in (*args.data, *args.eval_data) if not path.is_file()]
    if missing:
        print(f"error: no such file: {', '.join(missing)}", file=sys.stderr)
        return 2
    try:
        print(pretrain(args))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nstopped; go on with --resume (checkpoints are in {args.out})", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
