"""Training on two processes gives the model of a single process with the same total batch."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_sft import TALKS
from test_train import PAIRS, SMALL, TEXT, tensors
from tiny import make_llada
from train_processes import loop, run

from dllm_fast.train.losses import DiffusionLoss

ROOT = Path(__file__).parent.parent
STEPS = ["--steps", "20", "--save-every", "20", "--lr", "5e-3"]
CUT = ["--steps", "8", "--save-every", "4"]
KINDS = {
    "pretrain": ["pretrain", "--data", "{text}", "--eval-data", "{held}", "--family", "llada"],
    "sft": ["sft", "--data", "{asked}", "--eval-data", "{asked}", "--family", "llada"],
    "chats": ["sft", "--data", "{talks}", "--eval-data", "{talks}", "--family", "llada"],
    "flow": ["flow", "--data", "{asked}", "--eval-data", "{asked}", "--pairs", "--tau", "1e-2", "1e-3"],
    "modernbert": ["pretrain", "--data", "{text}", "--family", "modernbert"],
}


def split(batch: int, accumulate: int) -> list[str]:
    return [*SMALL, "--batch", str(batch), "--accumulate", str(accumulate)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The data of KINDS. The held-out text fills 19 rows, a number that two processes cannot share evenly."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text(TEXT)
    (folder / "held.txt").write_text(TEXT[: 2 * len(TEXT) // 5])
    (folder / "asked.jsonl").write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in PAIRS))
    (folder / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in TALKS))
    names = {"text": "text.txt", "held": "held.txt", "asked": "asked.jsonl", "talks": "talks.jsonl"}
    return {name: str(folder / file) for name, file in names.items()}


def arguments(kind, files):
    return [word.format(**files) for word in KINDS[kind]]


@pytest.fixture(scope="module")
def pair(files, tmp_path_factory):
    """A folder with the files of each run on two processes."""
    out = tmp_path_factory.mktemp("pair")
    # Without --cpu, as on a machine without a GPU, where processes must not train separately.
    halves = [word for word in split(2, 2) if word != "--cpu"]
    runs = {kind: ([*arguments(kind, files), *halves, *STEPS], None) for kind in KINDS}
    plain = [*arguments("pretrain", files), *split(2, 1), *CUT]
    runs |= {"whole": (plain, None), "cut": (plain, 5), "cut.on": ([*plain, "--resume"], None)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "tests" / "train_processes.py"), str(out), json.dumps(runs)]
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]
    return out


@pytest.mark.parametrize("kind", [*KINDS, "whole", "cut"])
def test_ranks_hold_one_model_bit_for_bit(pair, kind):
    first, second = (torch.load(pair / kind / f"rank{rank}.pt") for rank in (0, 1))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    saved = tensors(pair / kind / "final")
    assert saved and all(torch.equal(saved[name], first[name]) for name in saved)


def logged(folder, key):
    return [entry[key] for entry in json.loads((folder / "log0.json").read_text()) if key in entry]


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_model_of_one_process_with_the_same_batch(pair, files, tmp_path, kind):
    """Rows x micro-batches x processes of 8 x 1, 4 x 2 and 2 x 2 x 2 give the same rows and draws, so results are equal
    up to rounding; losses are true means."""
    expected = torch.load(pair / kind / "rank0.pt")
    for batch, accumulate in ((8, 1), (4, 2)):
        out = tmp_path / str(batch)
        out.mkdir()
        assert run(out, [*arguments(kind, files), *split(batch, accumulate), *STEPS], None) == 0
        found = torch.load(out / "rank0.pt")
        for name, values in expected.items():
            # Adam divides by the gradient's size, so a gradient that is only rounding error gives such a step.
            torch.testing.assert_close(found[name], values, atol=2e-3, rtol=1e-3)
        for key in ("loss", "eval_loss"):
            assert logged(out, key) == pytest.approx(logged(pair / kind, key), rel=2e-3)
        assert len(logged(out, "loss")) == 20 and bool(logged(out, "eval_loss")) == (kind != "modernbert")
        recipe = json.loads((pair / kind / "final" / "recipe.json").read_text())
        assert recipe["rows"] == json.loads((out / "final" / "recipe.json").read_text())["rows"] == 160
        assert recipe["processes"] == 2


def test_a_resumed_run_of_two_is_the_uninterrupted_one(pair):
    whole, cut = (torch.load(pair / name / "rank1.pt") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_a_loop_of_ones_own_goes_through_its_wrapper(pair, wrap):
    first, second = (torch.load(pair / f"{wrap}{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    if wrap == "fsdp" and torch.__version__.startswith("2.8."):
        pytest.skip("FSDP2 of PyTorch 2.8 adds gradients over gloo instead of averaging them")
    expected = loop(DiffusionLoss(make_llada()))
    assert expected.keys() == first.keys()
    for name, values in expected.items():
        torch.testing.assert_close(first[name], values, atol=1e-5, rtol=1e-5)


@pytest.mark.long
def test_accelerate_launches_it_on_two_processes(files, tmp_path):
    """The command that docs/training.md gives, on the CPU: one run of two processes, not two of one."""
    options = [*arguments("pretrain", files), *split(2, 1), "--steps", "2", "--save-every", "2", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command += ["--num_cpu_threads_per_process", "1", "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "-m", "dllm_fast.train"]
    done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]
    recipe = json.loads((tmp_path / "final" / "recipe.json").read_text())
    assert (recipe["processes"], recipe["rows"]) == (2, 8)
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in (tmp_path / "checkpoint-2").iterdir()}


@pytest.mark.long  # three launches of two processes
def test_a_sharded_run_is_the_unsharded_one_and_resumes(files, tmp_path):
    """The shipped FSDP2 configuration, through Accelerate and Trainer, on the CPU and without bf16."""
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_multi_gpu_env

    given = ["--config_file", str(ROOT / "dllm_fast" / "train" / "fsdp2.yaml"), "script.py"]
    args, _, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(given))
    sharding = {name: value for name, value in prepare_multi_gpu_env(args).items() if "FSDP" in name}
    assert sharding["ACCELERATE_USE_FSDP"] == "true" and sharding["FSDP_VERSION"] == "2" and args.num_processes == 8
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    options = [*arguments("pretrain", files), *split(2, 1), *CUT]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = str(ROOT / "tests" / "train_sharded.py")

    def launched(out, script, *more, **variables):
        words = [*command, *script, *options, "--out", str(out), *more]
        done = subprocess.run(words, env=environment | variables, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-6000:]
        return done.stdout, tensors(out / "final")

    _, expected = launched(tmp_path / "whole", ["-m", "dllm_fast.train"])
    printed, found = launched(tmp_path / "sharded", [script], **sharding)
    assert "sharded 21 of 21" in printed and found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, atol=1e-5, rtol=1e-5)
    for gone in ("final", "checkpoint-8"):
        shutil.rmtree(tmp_path / "sharded" / gone)
    _, again = launched(tmp_path / "sharded", [script], "--resume", **sharding)
    assert all(torch.equal(again[name], found[name]) for name in found)
