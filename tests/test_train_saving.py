"""A run that is killed, interrupted or out of disk loses the steps since its last checkpoint, and nothing else."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_train import SMALL, TEXT, run, tensors, text  # noqa: F401
from tiny import MASK, make_llada
from transformers import Trainer, TrainingArguments

from dllm_fast.train import saving, training
from dllm_fast.train.trainer import DiffusionTrainer

ROOT = Path(__file__).parent.parent
CHECKPOINT = {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}


def environment():
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.long)])
def test_a_run_killed_while_it_saves_goes_on_bit_for_bit(tmp_path, text, kills):  # noqa: F811
    """kill -9 at random moments of a save. What has a checkpoint's name is a whole one; two of them are kept; and the
    model in the end is that of a run that nothing interrupted."""
    steps = ["--steps", str(2 + kills), "--save-every", "1", "--width", "128"]
    arguments = ["pretrain", "--data", str(text), *SMALL, *steps, "--out", str(tmp_path)]
    command = [sys.executable, str(ROOT / "tests" / "train_kills.py"), str(kills), str(kills), *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(report["kills"]) == kills and any(kill["writing"] for kill in report["kills"])
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    a, b = tensors(whole / "final"), tensors(killed / "final")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert (whole / "loss.csv").read_text() == (killed / "loss.csv").read_text()
    assert {path.name for path in killed.iterdir()} == {path.name for path in whole.iterdir()}
    for path in killed.glob("checkpoint-*"):
        assert {file.name for file in path.iterdir()} >= CHECKPOINT
    assert len(list(killed.glob("checkpoint-*"))) == 2


@pytest.fixture
def limited():
    """A function that forbids files above a size, as a full disk would; the limit ends with the test."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


# The model has 0.7 MB and the optimizer 1.4.
@pytest.mark.parametrize("size, at", [(100_000, 5), (1_000_000, 5), (100_000, 8)], ids=["model", "optimizer", "final"])
def test_a_full_disk_is_one_line_and_the_run_goes_on(tmp_path, text, monkeypatch, capfd, limited, size, at):  # noqa: F811
    options = ["--steps", "8", "--save-every", "4", "--width", "128"]
    whole = run(tmp_path / "whole", text, *options)
    record = training.LossRecord

    class Full(record):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == at == 5:
                limited(size)

        def on_train_end(self, args, state, control, **kwargs):
            if at == 8:
                limited(size)

    monkeypatch.setattr(training, "LossRecord", Full)
    out = tmp_path / "full"
    capfd.readouterr()
    assert training.main(["pretrain", "--data", str(text), "--out", str(out), *SMALL, *options]) == 2
    limited(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    (error,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    name = "final" if at == 8 else "checkpoint-8"
    assert error.startswith(f"error: {name} could not be written to {out}, which has ") and "--resume" in error
    assert not (out / saving.STAGE).exists() and not (out / name).exists()
    assert (out / "checkpoint-4").is_dir()
    monkeypatch.undo()
    resumed = run(out, text, *options, "--resume")
    a, b = tensors(whole), tensors(resumed)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("where", ["tokenizing", "first step", "saving", "final"])
def test_ctrl_c_leaves_nothing_half_written(tmp_path, text, monkeypatch, capsys, where):  # noqa: F811
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    def second(self, *args):
        return interrupt() if self.state.global_step == 4 else Trainer._save_rng_state(self, *args)

    if where == "tokenizing":
        monkeypatch.setattr(training, "PackedText", interrupt)
    elif where == "first step":
        monkeypatch.setattr(DiffusionTrainer, "training_step", interrupt)
    elif where == "saving":
        monkeypatch.setattr(DiffusionTrainer, "_save_rng_state", second)
    else:
        monkeypatch.setattr(training, "recipe", interrupt)
    options, out = ["--steps", "4", "--save-every", "2"], tmp_path / "run"
    assert training.main(["pretrain", "--data", str(text), "--out", str(out), *SMALL, *options]) == 130
    assert "continue with --resume" in capsys.readouterr().err
    kept = {"tokenizing": [], "first step": [], "saving": [2], "final": [2, 4]}[where]
    assert sorted(path.name for path in out.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in kept]
    assert not (out / "final").exists()
    monkeypatch.undo()
    final = run(out, text, *options, "--resume")
    assert json.loads((final / "recipe.json").read_text())["steps"] == 4
    assert not (out / saving.STAGE).exists()


def test_the_best_checkpoint_is_kept_and_named(tmp_path):
    rows = [{"input_ids": torch.arange(16) % 50} for _ in range(8)]
    args = TrainingArguments(
        str(tmp_path), max_steps=5, per_device_train_batch_size=2, save_steps=1, eval_steps=1, eval_strategy="steps",
        save_total_limit=2, load_best_model_at_end=True, learning_rate=0.0, use_cpu=True, report_to=[],
    )  # fmt: skip
    trainer = DiffusionTrainer(make_llada(), args, mask_id=MASK, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    best = tmp_path / "checkpoint-1"  # nothing is learned, so that no later one is better
    assert trainer.state.best_model_checkpoint == str(best)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-4", "checkpoint-5"}
    assert json.loads((best / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)


def test_what_is_published_replaces_the_earlier(tmp_path):
    for word in ("first", "second"):
        made = saving.stage(tmp_path) / "final"
        made.mkdir()
        (made / "file").write_text(word)
        saving.publish(made, tmp_path / "final")
        assert (tmp_path / "final" / "file").read_text() == word
