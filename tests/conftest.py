"""Fixtures: small models, new for each test, and prompts for them."""

import importlib.util
import os

import torch

if not torch.cuda.is_available():
    # Without a GPU, kernels run in Triton's interpreter, which must be chosen before transformers imports Triton.
    os.environ["TRITON_INTERPRET"] = "1"
# Fixed, so that no test depends on timings of a busy machine. Both matmuls serve: PyTorch's from this many rows.
os.environ.setdefault("DLLM_FAST_MATMUL", "float32:never,bfloat16:97")

# As a context, `torch.device` looks up the functions that it redirects on first use and keeps them. If it kept a
# poisoned `torch.empty`, a later test's model on the meta device would be made in memory: 32 GB of it.
with torch.device("meta"):
    torch.empty(1)

import pytest
from interpreter import poison, strict
from tiny import EOS, MAKERS, SEED, make_llada, make_modernbert

from dllm_fast.cpu import compiled


@pytest.fixture
def device() -> str:
    """The device of models and prompts. Modules that also run on a GPU override this fixture."""
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
    """Three prompts of 24 ids, without special ids."""
    return torch.randint(0, EOS, (3, 24), generator=torch.Generator().manual_seed(1)).to(device)


@pytest.fixture
def padded(device):
    """A mask over `ids`: one row without padding, one with 7 on the left, one with 5 on the right."""
    mask = torch.ones(3, 24, dtype=torch.int64)
    mask[1, :7] = 0
    mask[2, -5:] = 0
    return mask.to(device)


@pytest.fixture
def use(monkeypatch):
    """A function that limits the extension to a level."""
    return lambda level: monkeypatch.setattr(compiled, "_level", compiled.LEVELS.index(level))


@pytest.fixture
def poisoned_outputs(monkeypatch):
    """Fill new memory with NaN, -1 and the largest numbers, so that an unwritten result cannot be right by luck."""

    def poisoned(make):
        return lambda *args, **options: poison(make(*args, **options))

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def strict_interpreter(request, monkeypatch):
    """Run kernels with `interpreter.strict`, in an order that depends on the test's name and DLLM_TEST_SEED."""
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        strict(monkeypatch, f"{SEED} {request.node.nodeid}")
