"""A user sees an error as one line, with exit code 2; Ctrl-C gives 130."""

import io
import os
import subprocess
import sys

import pytest
import torch
from tiny import make_llada

import dllm_fast
from dllm_fast.cli import main as cli
from dllm_fast.errors import exit_code, one_line
from dllm_fast.families.native import TRANSFORMERS_5
from dllm_fast.loading import load_tokenizer, require_device

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
QUICK = ["generate", "--model", "modernbert-kjv", "--gen-length", "0", "--block-length", "2", "--quiet"]
GAP = "And the LORD [MASK][MASK] unto Moses"


def start(*arguments, **options):
    command = [sys.executable, "-m", "dllm_fast", *arguments]
    return subprocess.run(command, capture_output=True, cwd=ROOT, timeout=600, **options)


def last_line(error: str) -> str:
    """What a command ends with, and no traceback before it. Installed packages (torchao) may have said other things."""
    assert "Traceback" not in error, error
    return error.splitlines()[-1]


def fails(capsys, arguments) -> str:
    """The last line that a command prints."""
    assert cli.main(arguments) == 2
    out, error = capsys.readouterr()
    assert not out and error.startswith("error: ") and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize("locale", [{}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}], ids=["", "C"])
@pytest.mark.parametrize("text", [b"\xff\xfe\x00 [MASK]", b"[MASK] \xe9t\xe9"], ids=["utf-16", "latin-1"])
def test_standard_input_that_is_not_utf8(text, locale):
    if locale and not TRANSFORMERS_5:
        pytest.skip("transformers 4 imports Inductor, which reads a file of its own in the locale's encoding")
    done = start(*QUICK, input=text, env={**os.environ, **locale})
    error = done.stderr.decode()
    assert done.returncode == 2 and last_line(error).startswith("error: standard input is not"), error


def test_a_prompt_of_broken_bytes(capsys):
    assert "--prompt is not valid UTF-8" in fails(
        capsys, [*QUICK, "--prompt", b"\xff".decode("utf-8", "surrogateescape")]
    )


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "mps", "nonsense", "xpu"])
def test_a_device_that_is_not_there(device, capsys, monkeypatch):
    if device.startswith("cuda") and torch.cuda.is_available():
        device = f"cuda:{torch.cuda.device_count()}"
    assert f"device={device!r} is not available" in fails(capsys, [*QUICK, "--prompt", GAP, "--device", device])
    with pytest.raises(ValueError, match=f"device='{device}' is not available"):
        dllm_fast.from_pretrained("llada-gsm8k", device=device)


def test_devices_that_are_there():
    for device in (None, "cpu", torch.device("cpu")):
        require_device(device)


@pytest.fixture
def folder(tmp_path):
    """A model without a tokenizer."""
    make_llada().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_without_a_tokenizer(folder, capsys):
    assert "tokenizer cannot be loaded" in fails(capsys, ["generate", "--model", str(folder), "--prompt", "x"])


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"version": "1.0"}'])
def test_a_broken_tokenizer(folder, text, capsys):
    (folder / "tokenizer.json").write_text(text)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ValueError, match="tokenizer cannot be loaded"):
        load_tokenizer(str(folder))


def test_a_model_that_is_a_file(folder, capsys):
    for path in (str(folder / "config.json"), os.path.relpath(folder / "config.json")):
        assert "is a file" in fails(capsys, ["generate", "--model", path, "--prompt", "x"])


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"{}", b"\xff\xfe", b"\x02\0\0\0\0\0\0\0[]"])
def test_files_that_hold_something_else(folder, file, content, capsys):
    (folder / file).write_bytes(content)
    assert str(folder) in fails(capsys, ["generate", "--model", str(folder), "--prompt", "x"])


def test_a_file_that_cannot_be_read(folder, capsys, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(folder / "model.safetensors"))

    monkeypatch.setattr("dllm_fast.loading.safetensors_size", refuse)
    error = fails(capsys, ["generate", "--model", str(folder), "--prompt", "x"])
    assert "Permission denied" in error and "model.safetensors" in error


@pytest.mark.parametrize(
    "error",
    [
        ValueError("two\n  lines"),
        MemoryError(),
        MemoryError("20 GB"),
        torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"),
        OSError(28, "No space left on device"),
        ModuleNotFoundError("No module named 'rich'"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_of_the_user_and_the_machine_are_a_line(error, capsys):
    def run():
        raise error

    assert exit_code(run) == 2
    printed = capsys.readouterr().err
    assert printed == f"error: {one_line(error)}\n" and printed.count("\n") == 1 and len(printed) > len("error: \n")


def test_errors_of_the_program_keep_their_traceback():
    for error in (KeyError("x"), RuntimeError("shapes"), AssertionError()):
        with pytest.raises(type(error)):
            exit_code(lambda error=error: (_ for _ in ()).throw(error))


def test_control_c_and_codes(capsys):
    def stop():
        raise KeyboardInterrupt

    assert exit_code(stop) == 130 and exit_code(lambda: None) == 0 and exit_code(lambda: 3) == 3


def test_a_reader_that_leaves_is_no_error():
    script = f"import sys; from dllm_fast.cli.main import main; sys.exit(main({[*QUICK, '--prompt', GAP]!r}))"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", script], stdout=write, stderr=subprocess.PIPE, cwd=ROOT, timeout=600)
    os.close(write)
    assert done.returncode == 0 and b"Traceback" not in done.stderr and b"BrokenPipe" not in done.stderr, done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_that_shows_few_characters(encoding, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", out)
    assert exit_code(lambda: print("三 ░ a")) == 0
    assert out.buffer.getvalue() == b"? ? a\n"


def test_live_view_on_such_a_terminal():
    done = start(*QUICK[:-1], "--plain", "--prompt", GAP, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and b"unto Moses" in done.stdout, done.stderr


def test_humaneval_ends_alike():
    command = [sys.executable, "-m", "bench.quality.humaneval", "--model", "llada-gsm8k", "--device", "nonsense"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 2 and last_line(done.stderr).startswith("error: device='nonsense' is not available")


def test_lm_evals_launcher_ends_alike():
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    model = ["--model", "dllm_fast", "--model_args", "pretrained=/no/such/folder", "--tasks", "arc_easy"]
    done = subprocess.run(
        [sys.executable, "-m", "dllm_fast.evaluate", *model],
        capture_output=True, text=True, cwd=ROOT, timeout=600, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 2 and last_line(done.stderr).startswith("error: "), done.stderr
