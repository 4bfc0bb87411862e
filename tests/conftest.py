"""Fixtures: small models, made anew for each test, and prompts for them."""

import importlib.util
import os

import torch

if not torch.cuda.is_available():
    # Without a GPU kernels run in Triton's interpreter. It is chosen when Triton is imported, as transformers does.
    os.environ["TRITON_INTERPRET"] = "1"
# No test hangs on which matmul a busy machine finds faster. Both serve: with these rows, and with fewer.
os.environ.setdefault("DLLM_FAST_MATMUL", "float32:never,bfloat16:97")

# `torch.device` as a context remembers, on first use, which functions it redirects. It must not remember a poisoned
# `torch.empty`: a model that a later test makes on the meta device would then be made in memory, 32 GB of it.
with torch.device("meta"):
    torch.empty(1)

import pytest
from interpreter import poison, strict
from tiny import EOS, MAKERS, SEED, make_llada, make_modernbert


@pytest.fixture
def device() -> str:
    """Where models and prompts are. A module whose tests the GPU round runs has a fixture of this name of its own."""
    return "cpu"


@pytest.fixture(params=list(MAKERS))
def model(request, device):
    return MAKERS[request.param]().to(device)


@pytest.fixture(params=["llada", "modernbert"])
def either(request, device):
    return MAKERS[request.param]().to(device)


@pytest.fixture
def llada(device):
    return make_llada().to(device)


@pytest.fixture
def modernbert(device):
    return make_modernbert().to(device)


@pytest.fixture
def ids(device):
    """Three prompts of 24 ids, none of them special."""
    return torch.randint(0, EOS, (3, 24), generator=torch.Generator().manual_seed(1)).to(device)


@pytest.fixture
def padded(device):
    """A mask over `ids`: whole, 7 padded on the left, 5 on the right."""
    mask = torch.ones(3, 24, dtype=torch.int64)
    mask[1, :7] = 0
    mask[2, -5:] = 0
    return mask.to(device)


@pytest.fixture
def poisoned_outputs(monkeypatch):
    """What a kernel does not write, it does not get by luck: new memory holds NaN, -1 and the largest numbers."""

    def poisoned(make):
        return lambda *args, **options: poison(make(*args, **options))

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def strict_interpreter(request, monkeypatch):
    """Kernels run by `interpreter.strict`, in an order that the test's name and DLLM_TEST_SEED decide."""
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        strict(monkeypatch, f"{SEED} {request.node.nodeid}")
