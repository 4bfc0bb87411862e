"""Under autocast, with another GPU as the current one, and with weights on several devices."""

import contextlib

import pytest
import torch
from test_defaults import FEW, MAKERS, plain_run, prompts, run, same
from torch import nn

import dllm_fast
from dllm_fast.decoding import server
from dllm_fast.decoding.device import as_written
from dllm_fast.evaluate import likelihood
from dllm_fast.evaluate.likelihood import are_greedy, log_likelihoods
from dllm_fast.patch import bound_family


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.long)])
@pytest.mark.parametrize("family, impl", [("llada", "auto"), ("llada", "torch"), ("modernbert", "torch")])
def test_generation_and_likelihoods_are_the_same_under_autocast(family, impl, dtype):
    expected, model = plain_run(family, impl, None, FEW)
    with torch.autocast("cpu", dtype):
        found = run(model, impl, None, FEW)
    same(*({name: x for name, x in results.items() if name != "forward"} for results in (found, expected)))


@pytest.mark.parametrize("family", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_patched_forward_under_autocast_is_the_models_own(family, dtype):
    model, (ids, mask) = MAKERS[family](), prompts()
    for parameter in model.parameters():  # rotary buffers stay fp32, because `patch` repairs rounded ones
        parameter.data = parameter.data.to(dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(ids).logits, model(ids, attention_mask=mask).logits
    dllm_fast.patch(model)
    with torch.no_grad():
        outside = model(ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            found = model(ids).logits, model(ids, attention_mask=mask).logits
            with torch.autocast("cpu", enabled=False):
                inside = model(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert torch.equal(inside, outside)


class Current:
    """A stand-in for the current GPU."""

    def __init__(self, monkeypatch):
        self.device = torch.device("cuda", 0)
        monkeypatch.setattr(torch.cuda, "device", self.switched)

    @contextlib.contextmanager
    def switched(self, device):
        before, self.device = self.device, device
        yield
        self.device = before


@pytest.fixture
def current(monkeypatch):
    return Current(monkeypatch)


def test_work_is_done_on_the_models_own_device(current):
    device = torch.device("cuda", 1)
    with torch.autocast("cuda", torch.bfloat16, enabled=False), as_written(device):
        assert current.device == device
        assert not torch.is_autocast_enabled("cuda") and not torch.is_autocast_enabled("cpu")
    assert current.device.index == 0
    with pytest.raises(KeyError), as_written(torch.device("cpu")):
        raise KeyError
    with as_written(torch.device("cpu")):
        assert current.device.index == 0


def test_every_block_and_evaluation_is_within_it(either, monkeypatch):
    where, seen = [], []

    @contextlib.contextmanager
    def noted(device):
        where.append(device)
        yield
        where.pop()

    for module in (server, likelihood):
        monkeypatch.setattr(module, "as_written", noted)
    model = dllm_fast.patch(either)
    family = type(bound_family(model))
    hidden = family.hidden

    def evaluated(*args, **options):
        seen.append(list(where))
        return hidden(*args, **options)

    monkeypatch.setattr(family, "hidden", evaluated)
    ids, mask = prompts()
    dllm_fast.generate(model, ids, mask, gen_length=8, block_length=4)
    list(dllm_fast.generate_many(model, list(ids), gen_length=8, block_length=4))
    list(log_likelihoods(model, [(ids[0], ids[1])], 2))
    list(are_greedy(model, [(ids[0], ids[1])]))
    assert len(seen) > 8 and all(devices == [torch.device("cpu")] for devices in seen)


class Elsewhere(nn.Parameter):
    """A weight that claims to be on another GPU."""

    device = torch.device("cuda", 1)
    is_meta = False


def test_weights_on_several_devices_are_refused_by_name(either):
    name = "blocks.1.ff_norm" if either.config.model_type == "llada" else "layers.1.mlp_norm"
    module = next(module for path, module in either.named_modules() if path.endswith(name))
    kept = module._parameters["weight"]
    module._parameters["weight"] = Elsewhere(kept.detach())
    error = r"model: its weights are on several devices, .* on cpu and .*norm.weight on cuda:1"
    with pytest.raises(ValueError, match=error):
        dllm_fast.patch(either)
    assert "forward" not in either.__dict__
    module._parameters["weight"] = kept
    model, (ids, _) = dllm_fast.patch(either), prompts()
    with torch.no_grad():
        expected = model(ids).logits
    module._parameters["weight"] = Elsewhere(kept.detach())
    with pytest.raises(ValueError, match=f"{name} is on cuda:1, and others are on cpu; move them to one device"):
        dllm_fast.generate(model, ids, gen_length=8, block_length=4)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected)  # the model's own forward, since there are hooks
    module._parameters["weight"] = kept
