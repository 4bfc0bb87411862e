"""transformers' `Trainer` with a masked-diffusion loss, and its record of losses."""

import copy
import csv
import math
import os
import shutil
from collections.abc import Sized
from pathlib import Path

import numpy
import torch
from torch.utils.data import SequentialSampler
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from dllm_fast.train import losses, saving
from dllm_fast.train.data import Corruption, Masked, Run
from dllm_fast.train.masking import Masking


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
        masking: which positions are masked, and what they weigh.
        kwargs: passed on to `Trainer`.
    """

    def __init__(
        self, model, args: TrainingArguments, *, mask_id: int, train_dataset=None, eval_dataset=None,
        data_collator=default_data_collator, masking: Masking = losses.LLADA, **kwargs,
    ):  # fmt: skip
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if processes != args.world_size:
            # Without a GPU and without use_cpu, Accelerate silently lets each process train alone.
            raise ValueError(f"args: {processes} processes would each train alone; without a GPU, give use_cpu=True")
        self.bind_loss(model)
        self.mask_id = mask_id
        self.masking = masking
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
            data_collator=self.corruption(data_collator, args), compute_metrics=_mean_loss, **kwargs,
        )  # fmt: skip
        self.model_accepts_loss_kwargs = False
        self._staging = False
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

    def _get_output_dir(self, trial):
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, saving.STAGE) if self._staging else folder

    def _save_checkpoint(self, model, trial):
        """`Trainer`'s, but a checkpoint has its name only once it is whole and on the disk. Older ones are deleted only
        then. So whenever a run is killed, its last checkpoint is whole."""
        out, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        with saving.writing(name, out):
            if self.args.should_save:
                saving.stage(out)
            self.accelerator.wait_for_everyone()
            self._staging = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = False
            made = out / saving.STAGE / name
            best = self.state.best_model_checkpoint
            if best is not None and Path(best) == made:
                self.state.best_model_checkpoint = str(out / name)
                if self.args.should_save:
                    self.state.save_to_json(str(made / "trainer_state.json"))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                saving.publish(made, out / name)
                saving.rotate(out, self.args.save_total_limit, self.state.best_model_checkpoint)
                shutil.rmtree(out / saving.STAGE)
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None or self.args.device.type != "cpu" or self.is_fsdp_enabled:
            return super()._load_optimizer_and_scheduler(checkpoint)
        # With several processes Accelerate names the device "cpu:0", which Trainer's own call of `torch.load` refuses.
        assert self.optimizer is not None and self.lr_scheduler is not None
        for part, file in ((self.optimizer, "optimizer.pt"), (self.lr_scheduler, "scheduler.pt")):
            part.load_state_dict(torch.load(Path(checkpoint) / file, map_location="cpu", weights_only=True))

    def bind_loss(self, model) -> None:
        """Make the model's forward compute the loss."""
        losses.bind_loss(model)

    def corruption(self, collate, args: TrainingArguments) -> Corruption:
        """What makes batches of a `Run`'s rows; ``args.max_steps`` is the number of steps."""
        return Masked(collate, self.mask_id, args.seed, self.masking)

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
    """Writes ``loss.csv`` and ``loss.png`` into the run's folder at every save. A reader never finds half a file."""

    def on_save(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        out = Path(args.output_dir)
        with saving.writing("loss.csv", out):
            folder = saving.stage(out)
            with open(folder / "loss.csv", "w", newline="") as file:
                table = csv.writer(file)
                table.writerow(("step", "loss", "eval_loss"))
                for entry in state.log_history:
                    if "loss" in entry or "eval_loss" in entry:
                        table.writerow((entry["step"], entry.get("loss", ""), entry.get("eval_loss", "")))
            plot_loss(state.log_history, folder / "loss.png")
            for name in ("loss.csv", "loss.png"):
                saving.publish(folder / name, out / name)
            folder.rmdir()


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
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)
