"""A Trainer's settings take effect (bf16, torch.compile, gradient checkpointing, adapters) or are refused."""

import copy

import pytest
import torch
from test_train import SMALL, asked, text  # noqa: F401
from tiny import EOS, MASK, make_llada, make_modernbert
from transformers import TrainingArguments

from dllm_fast.train import training
from dllm_fast.train.training import DiffusionTrainer

ROWS = [{"input_ids": row} for row in torch.randint(0, EOS, (16, 24), generator=torch.Generator().manual_seed(2))]


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """transformers 4 leaves a run's precision in the environment, for those that follow."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


def trained(tmp_path, model, **settings) -> list[float]:
    """The losses of three steps on four rows each."""
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=5e-3, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=True, dataloader_pin_memory=False, disable_tqdm=True, **settings,
    )  # fmt: skip
    trainer = DiffusionTrainer(model, args, mask_id=MASK, train_dataset=ROWS)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def layer(model) -> torch.nn.Module:
    """The second layer."""
    return next(module for name, module in model.named_modules() if name.endswith((".layers.1", ".blocks.1")))


def test_bf16_multiplies_in_bf16(tmp_path, either):
    plain = trained(tmp_path, copy.deepcopy(either))
    linear, dtypes = next(m for m in layer(either).modules() if isinstance(m, torch.nn.Linear)), set()
    linear.register_forward_hook(lambda module, inputs, out: dtypes.add(out.dtype))
    losses = trained(tmp_path, either, bf16=True)
    assert dtypes == {torch.bfloat16} and linear.weight.dtype == torch.float32
    assert losses != plain and losses == pytest.approx(plain, rel=0.03)


def test_gradient_checkpointing_runs_each_layer_twice(tmp_path, either):
    plain, calls = trained(tmp_path, copy.deepcopy(either)), []
    linear = next(m for m in layer(either).modules() if isinstance(m, torch.nn.Linear))
    linear.register_forward_hook(lambda *_: calls.append(1))
    losses = trained(tmp_path, either, gradient_checkpointing=True)
    assert len(calls) == 6 and losses == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("make", [make_llada, pytest.param(make_modernbert, marks=pytest.mark.long)])
def test_torch_compile_compiles_the_loss(tmp_path, make):
    plain = trained(tmp_path, make())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    losses = trained(tmp_path, make(), torch_compile=True, torch_compile_backend="eager")
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] > 20
    assert losses == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("head", [False, True], ids=["layers", "head too"])
@pytest.mark.parametrize("make", [make_llada, make_modernbert])
def test_adapters_are_trained_and_nothing_else(tmp_path, make, head):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    names = ["q_proj", "ff_proj"] if make is make_llada else ["Wqkv", "Wi"]
    names += ["transformer.ff_out" if make is make_llada else "decoder"] if head else []
    model = peft.get_peft_model(make(), peft.LoraConfig(r=4, target_modules=names))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = trained(tmp_path, model, gradient_checkpointing=True)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "lora_" in name} and all(0 < loss < 20 for loss in plain)


def test_sharding_that_would_not_act_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="fsdp: on cpu, Accelerate would run DistributedDataParallel instead"):
        trained(tmp_path, make_llada())


def test_processes_that_would_train_alone_are_refused(tmp_path, monkeypatch):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes would each train alone; without a GPU, give use_cpu=True"):
        DiffusionTrainer(make_llada(), args, mask_id=MASK, train_dataset=ROWS)


@pytest.mark.parametrize("command", ["pretrain", "sft", "flow"])
def test_every_commands_options_are_settings(tmp_path, text, asked, command, monkeypatch, capsys):  # noqa: F811
    """That the settings take effect is tested above."""
    found = []

    def stopped(*args, **kwargs):
        found.append(kwargs["args"])
        raise ValueError("stopped here")

    monkeypatch.setattr(training, "FlowTrainer" if command == "flow" else "DiffusionTrainer", stopped)
    data = asked if command == "sft" else text
    options = [command, "--data", str(data), *SMALL, "--out"]
    assert training.main([*options, str(tmp_path / "a"), "--bf16", "--gradient-checkpointing"]) == 2
    assert training.main([*options, str(tmp_path / "b")]) == 2
    settings = [(args.bf16, args.gradient_checkpointing, list(args.report_to)) for args in found]
    assert settings == [(True, True, []), (False, False, [])]
    capsys.readouterr()
    assert training.main([*options, str(tmp_path / "c"), "--report-to", "nobody"]) == 2
    assert capsys.readouterr().err.startswith("error: --report-to: nobody is unknown or not installed; here are none")


def test_tensorboard_gets_the_losses(tmp_path, text):  # noqa: F811
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = ["--steps", "3", "--save-every", "3", "--report-to", "tensorboard", "--out", str(tmp_path / "run")]
    assert training.main(["pretrain", "--data", str(text), *SMALL, *options]) == 0
    (folder,) = {path.parent for path in (tmp_path / "run").rglob("events.out.*")}
    log = events.EventAccumulator(str(folder)).Reload()
    assert [event.step for event in log.Scalars("train/loss")] == [1, 2, 3]
