"""A model that two processes share gives the tokens and logits of a whole one, and sends no more than it must."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from needs import needs_triton
from tensor_parallel_processes import LONG, MODELS, QUICK
from tiny import make_llada

from dllm_fast.families.tensor_parallel import check_sizes

ROOT = Path(__file__).parent.parent
RANKS = 2


def processes(folder: Path, name: str) -> list[dict]:
    """What each process found."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    script = str(ROOT / "tests" / "tensor_parallel_processes.py")
    commands = [[sys.executable, script, str(folder), str(rank), str(RANKS), name] for rank in range(RANKS)]
    running = [subprocess.Popen(c, env=environment, stderr=subprocess.PIPE, text=True) for c in commands]
    errors = [process.communicate(timeout=1500)[1] for process in running]
    assert all(process.returncode == 0 for process in running), "\n".join(error[-3000:] for error in errors)
    return [torch.load(folder / f"{name}-{rank}.pt") for rank in range(RANKS)]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return processes(tmp_path_factory.mktemp("quick"), "quick")


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    return processes(tmp_path_factory.mktemp("long"), "long")


def same(found: list[dict], case: str) -> None:
    """Both processes have the tokens, forwards, steps and log-probabilities of the whole model."""
    tokens, row_nfe, steps, *more = next(one["whole"][case] for one in found if case in one["whole"])
    for one in found:
        own, own_nfe, own_steps, *own_more = one["shared"][case]
        assert torch.equal(own, tokens)
        assert (own_nfe, own_steps) == (row_nfe, steps)
        assert own_more[:1] == more[:1]
        torch.testing.assert_close(own_more[1:], more[1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", QUICK)
def test_tokens_are_a_whole_models(quick, case):
    same(quick, case)


@pytest.mark.long
@pytest.mark.parametrize("case", LONG)
def test_all_schedules_and_caches(long, case):
    same(long, case)


@pytest.mark.long
@needs_triton
def test_tokens_in_triton_are_a_whole_models(long):
    for one in long:
        whole, shared = one["triton"]
        assert torch.equal(whole, shared)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_a_whole_models(quick, name):
    """Those of the model's own forward too, and on both processes bit for bit."""
    for one, other in zip(quick[0]["forwards"][name], quick[1]["forwards"][name], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))
    whole, shared = quick[0]["forwards"][name]
    for expected, found in zip(whole, shared, strict=True):
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_processes_agree_in_half_precision_and_on_a_drawn_seed(quick):
    first, second = quick
    for name in ("half", "copied"):
        assert torch.equal(first[name][0], second[name][0])
    assert torch.equal(first["half"][0], first["copied"][0])
    assert torch.equal(first["drawn"], second["drawn"])
    assert all(torch.equal(x, y) for x, y in zip(first["many"], second["many"], strict=True))


def test_a_step_sends_the_floor(quick):
    """The embedding's all-reduce and two a layer, of the positions evaluated; in the last layer, of the block alone;
    and seven numbers for each masked position."""
    width, layers, block, size = 64, 3, 8, 4
    masked = 8 + 6 + 4 + 2
    for one in quick:
        sent = one["sent"]
        assert sent["nfe"] == 4 and sent["positions"] == 20 + 3 * block
        assert sent["calls"] == {"reduce": 4 * (1 + 2 * layers), "gather": 4}
        evaluated = (1 + 2 * (layers - 1)) * sent["positions"] + 2 * 4 * block
        assert sent["bytes"] == {"reduce": evaluated * width * size, "gather": masked * 7 * size}


def test_a_share_is_loaded(quick):
    for one in quick:
        assert all(one["loaded"].values()), one["loaded"]


REFUSED = {
    "sizes": r"2 processes cannot share n_heads=1, n_kv_heads=1, mlp_hidden_size=97, embedding_size=101 evenly",
    "class": r"model: a Linear cannot be shared",
    "mesh": r"device_mesh: a builtins\.str is not",
    "again": r"processes share it already",
    "patched": r"it is patched; share it first",
    "weights": r"weights='fp8', head=None: 2 processes share",
    "head": r"weights=None, head='fp8': 2 processes share",
    "load": r"device_mesh: cannot be combined with weights='int4'",
    "save": r"share [12] of 2 of its weights, which cannot be saved",
    "gradient": r"2 processes, and then has no gradients",
    "adapter": r"model\.transformer\.blocks\.1\.q_proj is a container\.Sequential|q_proj is a Sequential",
    "drift": r"refresh=Drift\(tau=0\.1.*2 processes share the model",
    "speculate": r"speculate='auto': 2 processes share",
    "top_p": r"top_k=None, top_p=0\.9: 2 processes share",
    "batch_size": r"batch_size='auto': 2 processes share",
    "likelihood": r"processes share it, and likelihoods",
    "flow": r"processes share it, and generate_flow",
}
# What one process would refuse, or wait for the other with.
APART = (
    "prompts", "later", "vocabulary", "dtype", "seed", "gen_length", "option", "many", "warmup", "method", "config",
)  # fmt: skip
REFUSED |= dict.fromkeys(APART, r"2 processes, which were called with different prompts or options")


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_shared_is_refused(quick, name):
    for one in quick:
        assert re.search(REFUSED[name], one["refusals"][name]), one["refusals"][name]
    assert quick[0]["refusals"].keys() == REFUSED.keys()


def test_sizes_that_do_not_divide_are_named():
    check_sizes(make_llada(vocab_size=104).config, 4)
    with pytest.raises(ValueError, match="8 processes cannot share n_heads=4, n_kv_heads=2 evenly"):
        check_sizes(make_llada(vocab_size=104, n_kv_heads=2).config, 8)
    with pytest.raises(ValueError, match="at most 2\\^24"):
        config = make_llada(vocab_size=104).config
        config.embedding_size = 1 << 25
        check_sizes(config, 4)
