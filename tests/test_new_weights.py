"""Weights that are replaced in place, in any way, between two calls: the second generates with the new ones."""

import copy
import functools

import pytest
import torch
import torch.distributed as dist
from needs import needs_triton
from recording import Recorder, launchers_of_pytorch
from tiny import make_llada, make_modernbert
from torch import nn

import dllm_fast
from dllm_fast.families.rounded import row_sums

MAKERS = {
    "llada": make_llada,
    "tied": functools.partial(make_llada, weight_tying=True),
    "modernbert": make_modernbert,
}
FORMS = [
    ("llada", torch.float32, {}),
    ("llada", torch.bfloat16, {}),  # fused on a CPU too
    ("llada", torch.float32, {"weights": "fp8"}),
    ("modernbert", torch.float32, {"weights": "int4"}),
    ("tied", torch.bfloat16, {"head": "fp8"}),
    ("modernbert", torch.float32, {"weights": "fp8", "head": "fp8"}),
]
OPTIONS = {"gen_length": 16, "block_length": 8, "schedule": dllm_fast.Uniform(8), "seed": 3}


def tokens(model, ids):
    return dllm_fast.generate(model, ids, logprobs=True, **OPTIONS)


def load(model, new):
    model.load_state_dict(new.state_dict())


def assign(model, new):
    model.load_state_dict(new.state_dict(), assign=True)


@torch.no_grad()
def copy_(model, new):
    for parameter, other in zip(model.parameters(), new.parameters(), strict=True):
        parameter.copy_(other)


def copy_data(model, new):
    """As PEFT merges adapters, and as many a trainer hands over weights: no version of a parameter changes."""
    before = [parameter._version for parameter in model.parameters()]
    for parameter, other in zip(model.parameters(), new.parameters(), strict=True):
        parameter.data.copy_(other.data)
    assert before == [parameter._version for parameter in model.parameters()]


def set_data(model, new):
    for parameter, other in zip(model.parameters(), new.parameters(), strict=True):
        parameter.data = other.data.clone()


def one_weight(model, new):
    """Of one layer alone, in one row."""
    new.load_state_dict(model.state_dict())
    for one in (model, new):
        weight = next(x for name, x in one.named_parameters() if ".1." in name and x.dim() == 2)
        weight.data[3].mul_(-30)


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def of_another(name, dtype):
    return MAKERS[name](seed=9).to(dtype)


@pytest.mark.parametrize("change", [load, assign, copy_, copy_data, set_data, one_weight])
@pytest.mark.parametrize(("name", "dtype", "how"), FORMS, ids=str)
def test_the_next_call_uses_them(name, dtype, how, change, ids):
    model, new = dllm_fast.patch(MAKERS[name]().to(dtype), **how), of_another(name, dtype)
    before = tokens(model, ids)
    change(model, new)
    found, expected = tokens(model, ids), tokens(dllm_fast.patch(new, **how), ids)
    assert torch.equal(found.sequences, expected.sequences) and torch.equal(found.logprobs, expected.logprobs)
    assert not torch.equal(found.logprobs, before.logprobs)
    many = dllm_fast.generate_many(model, list(ids), batch_size=3, **OPTIONS)
    assert torch.equal(torch.stack([one.sequence for one in many]), expected.sequences)


@pytest.mark.usefixtures("process_group")
def test_what_a_collective_has_written(llada, ids):
    """Of one process. A broadcast would leave its values as they are; what it gathers is its own."""
    dllm_fast.patch(llada, weights="fp8")
    tokens(llada, ids)
    new = of_another("llada", torch.float32)
    for parameter, other in zip(llada.parameters(), new.parameters(), strict=True):
        dist.all_gather([parameter.data], other.data)
    assert torch.equal(tokens(llada, ids).logprobs, tokens(dllm_fast.patch(new, weights="fp8"), ids).logprobs)


def test_only_what_changed_is_rounded_again(llada, ids, monkeypatch):
    dllm_fast.patch(llada, weights="fp8")
    rounded = []
    copies = llada.__dict__["_dllm_fast"].family.matmuls
    monkeypatch.setattr(copies, "refresh", lambda groups: rounded.extend(groups))
    tokens(llada, ids)
    assert not rounded
    linear = llada.model.transformer.blocks[1].up_proj
    linear.weight.data[5, 7] += 1
    tokens(llada, ids)
    assert [linear in group for group in rounded] == [True]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [1, 7, 8, 96])
def test_any_written_number_shows_in_its_rows_sum(dtype, width):
    weight = torch.randn(11, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = row_sums([weight, weight.T])
    for row in range(11):
        for column in range(width):
            written = weight.clone()
            written[row, column] = torch.nextafter(written[row, column].float(), torch.tensor(9.0)).to(dtype) + 1
            changed = row_sums([written, written.T]) != before
            assert changed.nonzero()[:, 0].tolist() == [row, 11 + column]


# Recorded steps

small = functools.partial(make_llada, n_layers=2, d_model=32, n_heads=2, mlp_hidden_size=32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's own recordings are tried there")
@needs_triton
@pytest.mark.parametrize("how", [{}, {"weights": "fp8"}, {"head": "fp8"}], ids=str)
@pytest.mark.parametrize("change", [pytest.param(load, marks=pytest.mark.long), copy_data])
def test_recordings_stay_and_replay_with_new_weights(monkeypatch, how, change, ids):
    recorder = Recorder(monkeypatch)
    launchers_of_pytorch(monkeypatch, recorder)
    model, new = dllm_fast.patch(small(), "triton", **how), small(seed=9)
    tokens(model, ids)
    recorded = recorder.recorded
    assert recorded > 0
    change(model, new)
    found = tokens(model, ids)
    assert recorder.recorded == recorded, "nothing is recorded again"
    expected = tokens(dllm_fast.patch(new, "triton", **how), ids)
    assert torch.equal(found.sequences, expected.sequences) and torch.equal(found.logprobs, expected.logprobs)


class Adapter(nn.Module):
    """Like PEFT's: what it adds has a scale, a number, and can be switched off."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.scaling, self.active = base, {"default": 1.0}, ["default"]
        self.more = nn.Parameter(torch.randn(base.out_features, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        y = self.base_layer(x)
        return y + self.more * self.scaling["default"] if self.active else y


def scaled(adapter):
    adapter.scaling["default"] = -2.0


def switched_off(adapter):
    adapter.active = []


def trained(adapter):
    adapter.more.data.mul_(-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's own recordings are tried there")
@needs_triton
@pytest.mark.parametrize("change", [pytest.param(scaled, marks=pytest.mark.long), switched_off, trained])
def test_a_recorded_step_follows_an_adapters_settings(monkeypatch, change, ids):
    recorder = Recorder(monkeypatch)
    launchers_of_pytorch(monkeypatch, recorder)
    model = small()
    block = model.model.transformer.blocks[1]
    block.up_proj = Adapter(block.up_proj)
    other = copy.deepcopy(model)
    dllm_fast.patch(model, "triton")
    before = tokens(model, ids)
    change(block.up_proj)
    change(other.model.transformer.blocks[1].up_proj)
    found, expected = tokens(model, ids), tokens(dllm_fast.patch(other, "triton"), ids)
    assert torch.equal(found.logprobs, expected.logprobs) and not torch.equal(found.logprobs, before.logprobs)
    assert recorder.recorded > 0
