"""`patch`, `unpatch`, `patched`: the same logits, this instance only, restored exactly even after an error."""

import copy

import pytest
import torch
from tiny import MAKERS, make_llada, make_modernbert
from transformers import T5Config, T5ForConditionalGeneration

import dllm_fast
from dllm_fast.families.modernbert import fresh_rotary


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def state_of(model):
    """Everything about a model that a patch could change, by identity."""
    own = {id(module): dict(module.__dict__) for module in model.modules()}
    return own, {name: id(t) for name, t in [*model.named_parameters(), *model.named_buffers()]}


def unchanged(model, before):
    (own, tensors), (now, now_tensors) = before, state_of(model)
    assert tensors == now_tensors
    for key, attributes in own.items():
        assert attributes.keys() == now[key].keys()
        for name, value in attributes.items():
            assert now[key][name] is value or now[key][name] == value, name


@torch.no_grad()
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("family", MAKERS)
def test_patched_logits_are_the_models_own(family, masked, dtype, tolerance, ids, padded, device):
    """Relative to the largest logit; in bf16, another order of operations changes a few ulp."""
    model = MAKERS[family]().to(device)
    fp32 = copy.deepcopy(model).double()
    model = model.to(dtype)
    for module, name, fresh in fresh_rotary(model) if "modernbert" in family else ():
        module._buffers[name] = fresh  # so that the model's own forward is right too
    mask = padded if masked else None
    own = model(ids, attention_mask=mask).logits
    with dllm_fast.patched(model):
        ours = model(ids, attention_mask=mask).logits
    assert ours.dtype == own.dtype and ours.shape == own.shape
    scale = own.float().abs().max()
    assert (ours - own).float().abs().max() <= tolerance * scale
    if "llada" in family:  # ModernBERT's rotary tables are at most fp32, so its fp64 forward is not the truth
        truth = fp32(ids, attention_mask=mask).logits
        error = (ours.double() - truth).abs().max()
        assert error <= 2 * (own.double() - truth).abs().max() + 1e-6 * scale


@torch.no_grad()
def test_long_windows_and_batches_match(device):
    model = make_modernbert(local_attention=32).to(device)
    ids = torch.randint(0, 99, (2, 150), generator=torch.Generator().manual_seed(0)).to(device)
    own = model(ids).logits
    torch.testing.assert_close(dllm_fast.patch(model)(ids).logits, own, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_unpatch_restores_the_same_objects_and_bits(model, ids):
    before, own = state_of(model), model(ids).logits
    assert dllm_fast.patch(model) is model
    assert dllm_fast.unpatch(model) is model
    unchanged(model, before)
    assert torch.equal(model(ids).logits, own)
    dllm_fast.unpatch(model)  # on an unpatched model this does nothing
    unchanged(model, before)


def test_patch_is_idempotent_and_touches_no_other_instance(either, ids):
    other = copy.deepcopy(either)
    before = state_of(other)
    dllm_fast.patch(either)
    forward = either.forward
    dllm_fast.patch(either)
    assert either.forward == forward
    unchanged(other, before)
    assert type(either).forward is type(other).forward


@torch.no_grad()
def test_an_instances_own_forward_is_wrapped_and_put_back(llada, ids):
    calls = []
    published = llada.forward

    def hook(*args, **kwargs):
        calls.append(1)
        return published(*args, **kwargs)

    llada.forward = hook
    dllm_fast.patch(llada)
    dllm_fast.unpatch(llada)
    assert llada.forward is hook


def test_patched_restores_after_an_error_and_keeps_an_outer_patch(either):
    before = state_of(either)
    with pytest.raises(RuntimeError, match="inside"), dllm_fast.patched(either):
        raise RuntimeError("inside")
    unchanged(either, before)
    dllm_fast.patch(either)
    forward = either.forward
    with dllm_fast.patched(either):
        pass
    assert either.forward == forward


@pytest.mark.parametrize("broken", ["nan", "inf", "meta", "impl"])
def test_a_refused_patch_changes_nothing(either, broken):
    match, impl = {"nan": "NaN", "inf": "NaN", "meta": "meta device", "impl": "impl='fast'"}[broken], "auto"
    name, parameter = list(either.named_parameters())[-1]
    if broken in ("nan", "inf"):
        parameter.data.view(-1)[3] = float(broken)
        match = f"{name} holds {match}"
    elif broken == "meta":
        either.to("meta")
    else:
        impl = "fast"
    before = state_of(either)
    with pytest.raises(ValueError, match=match):
        dllm_fast.patch(either, impl=impl)
    unchanged(either, before)


def test_large_finite_weights_are_not_taken_for_infinite(llada):
    llada.model.transformer.wte.weight.data.fill_(3e38)
    dllm_fast.patch(llada)


def test_unknown_models_are_refused_by_name():
    t5 = T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=11))
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration of model_type 't5'.*llada, modernbert"):
        dllm_fast.patch(t5)
    with pytest.raises(ValueError, match="Linear of model_type None"):
        dllm_fast.patch(torch.nn.Linear(2, 2))
    llada = make_llada()
    llada.config.layer_norm_type = "default"
    with pytest.raises(ValueError, match="layer_norm_type='default'"):
        dllm_fast.patch(llada)


@torch.no_grad()
def test_a_cast_modernbert_gets_its_rotary_tables_back(device):
    """`.to(bfloat16)` rounds inv_freq, which shows at far positions."""
    model = make_modernbert(max_position_embeddings=4096, num_hidden_layers=4, initializer_range=0.3).to(device)
    ids = torch.randint(0, 99, (1, 1500), generator=torch.Generator().manual_seed(0)).to(device)
    holes = torch.ones_like(ids)
    holes[0, 5] = 0  # runs the model's own forward, which must be right too
    right = copy.deepcopy(model).to(torch.bfloat16)
    for module, name, fresh in fresh_rotary(right):
        module._buffers[name] = fresh
    model = model.to(torch.bfloat16)
    before = state_of(model)
    spoiled = (model(ids).logits - right(ids).logits).float().abs().mean()
    dllm_fast.patch(model)
    assert not fresh_rotary(model)
    assert torch.equal(model(ids, attention_mask=holes).logits, right(ids, attention_mask=holes).logits)
    assert (model(ids).logits - right(ids).logits).float().abs().mean() < spoiled / 3
    dllm_fast.unpatch(model)
    unchanged(model, before)


def test_calls_that_want_more_go_to_the_models_own_forward(either, ids):
    labels = ids.clone()
    dllm_fast.patch(either)
    logits = either(ids).logits
    assert logits.requires_grad  # gradients are never silently lost
    with torch.no_grad():
        assert isinstance(either(ids, return_dict=False), tuple)
        holes = torch.ones_like(ids)
        holes[1, 4] = 0
        with_holes = either(ids, attention_mask=holes).logits
        if either.config.model_type == "modernbert":
            assert either(ids, labels=labels).loss is not None
            assert len(either(ids, output_hidden_states=True).hidden_states) > 1
        dllm_fast.unpatch(either)
        assert torch.equal(either(ids, attention_mask=holes).logits, with_holes)


def test_training_through_a_patched_model_updates_its_weights(llada, ids):
    dllm_fast.patch(llada).train()
    optimizer = torch.optim.SGD(llada.parameters(), lr=0.1)
    with torch.no_grad():
        before = llada.eval()(ids).logits
    llada.train()(ids).logits.float().logsumexp(-1).mean().backward()
    optimizer.step()
    with torch.no_grad():
        after = llada.eval()(ids).logits
        assert not torch.allclose(before, after)
        dllm_fast.unpatch(llada)
        torch.testing.assert_close(llada(ids).logits, after, atol=1e-5, rtol=1e-4)
