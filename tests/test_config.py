"""What `show_config` prints, and that it is true."""

import importlib.metadata
import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from needs import needs_triton

import dllm_fast
from dllm_fast import config, launchers, ops
from dllm_fast.cpu import compiled

ROOT = Path(__file__).parent.parent


def shown(capsys, *arguments) -> str:
    assert dllm_fast.show_config(*arguments) is None
    return capsys.readouterr().out


def test_it_names_versions_devices_threads_and_what_was_built(capsys):
    out = shown(capsys)
    for text in (f"torch {torch.__version__}", "transformers ", "numpy ", "python ", f"{os.cpu_count()} cores"):
        assert text in out
    assert f"PyTorch runs {torch.get_num_threads()} threads" in out
    missing = compiled.missing()
    assert (f"runs {compiled.levels()[-1]}," if missing is None else missing) in out
    taken = config.NAMES[ops.resolve("auto", torch.device("cpu"), torch.float32)]
    assert f"cpu, float32: {taken}" in out
    assert "cpu, float64: PyTorch: the model's dtype is torch.float64" in out


def test_what_is_held_down_is_named(capsys, monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setenv("UNRELATED", "7")
    if compiled.missing() is None:
        monkeypatch.setattr(compiled, "_level", 0)
    out = shown(capsys)
    assert "ONEDNN_MAX_CPU_ISA=AVX2" in out and "UNRELATED" not in out
    assert compiled.missing() is not None or "runs plain," in out


def test_an_extension_that_was_not_built_is_said_with_its_reason(capsys, monkeypatch):
    monkeypatch.setattr(compiled, "missing", lambda: "there was no compiler")
    out = shown(capsys)
    assert "compiled extension:\n  there was no compiler" in out
    assert "cpu, bfloat16: PyTorch: there was no compiler" in out


@pytest.mark.parametrize(
    "name, capability, taken",
    [
        ("Tesla T4", (7, 5), "PyTorch"),
        pytest.param("L4", (8, 9), "Triton kernels", marks=needs_triton),
    ],
)
def test_a_gpus_implementation_comes_with_its_reason(capsys, monkeypatch, name, capability, taken):
    """A stand-in for the device."""
    major, minor = capability
    shape = SimpleNamespace(name=name, major=major, minor=minor, multi_processor_count=40, total_memory=15 << 30)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for attribute, value in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_properties": lambda device: shape,
        "get_device_capability": lambda device: capability,
        "get_device_name": lambda device: name,
    }.items():
        monkeypatch.setattr(torch.cuda, attribute, value)
    monkeypatch.setattr(config, "available", lambda device: 14 << 30)
    out = shown(capsys)
    assert f"cuda:0: {name}, compute capability {major}.{minor}, 40 multiprocessors, 14.0 of 15.0 GiB free" in out
    assert f"cuda:0, bfloat16: {taken}" in out
    assert (f"cuda:0 is a {name} of compute capability {major}.{minor}" in out) == (taken == "PyTorch")


def test_a_models_patch_is_described(llada, capsys):
    assert "not patched" in shown(capsys, llada)
    dllm_fast.patch(llada, impl="torch")
    out = shown(capsys, llada)
    assert "patched with impl='torch', here PyTorch; multiplies its own weights" in out
    assert "LLaDAModelLM of model_type 'llada'" in out and "float32 on cpu" in out
    wrapped = torch.nn.Sequential(llada)
    assert "0 patched with impl='torch'" in shown(capsys, wrapped)
    dllm_fast.patch(llada, impl="torch", weights="fp8")
    assert "multiplies fp8 copies of its weights" in shown(capsys, llada)
    dllm_fast.unpatch(llada)
    assert "not patched" in shown(capsys, llada)
    with pytest.raises(ValueError, match="model: a str is not a torch"):
        dllm_fast.show_config("llada-gsm8k")


def test_which_ops_an_implementation_has_of_its_own():
    """By what each op's dispatch compares ``impl`` with."""
    found = {}
    for name, op in inspect.getmembers(ops, inspect.isfunction):
        if op.__module__ == ops.__name__ and "impl" in inspect.signature(op).parameters and not name.startswith("_"):
            found[name] = {impl for impl in ("triton", "cpp") if impl in op.__code__.co_consts}
    # The choice itself; `linear` of the head; two `grouped_linear`.
    for name in ("resolve", "logits", "experts"):
        del found[name]
    assert found == {name: set(impls) for name, impls in ops.SERVED.items()}


def test_the_command_prints_it():
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for command in (
        ["-m", "dllm_fast"],
        ["-c", "import sys; from dllm_fast.cli.main import main; sys.exit(main(['config']))"],
    ):
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("versions:\n") and "impl='auto' takes:" in done.stdout


@needs_triton
def test_an_old_triton_is_refused_where_its_kernels_do_not_fit(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "B200")
    b200 = torch.device("cuda:0")
    for version, capability, refused in (("3.4.0", (10, 0), True), ("3.4.0", (9, 0), False), ("3.6.0", (10, 0), False)):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, version=version: version)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert ("needs Triton 3.6" in str(launchers.obstacle(b200, torch.bfloat16))) == refused
