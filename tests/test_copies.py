"""Copies of a patched model: shallow ones share its modules, deep ones are patched, pickled ones are not."""

import copy
import functools
import io
import pickle

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

import dllm_fast
from dllm_fast.families.forward import patch_of
from dllm_fast.patch import bound_family


def tokens(model, ids):
    return dllm_fast.generate(model, ids, gen_length=8, block_length=8).sequences


def attributes(model):
    return {name for name in model.__dict__ if name not in ("forward", "_dllm_fast")}


@torch.no_grad()
@pytest.mark.parametrize("first", ["original", "copy", "neither"])
def test_a_shallow_copy_answers_whoever_is_unpatched(either, ids, first):
    own, names = either(ids).logits, attributes(either)
    dllm_fast.patch(either)
    fast, expected = either(ids).logits, tokens(either, ids)
    twin = copy.copy(either)
    assert twin.forward.__self__ is twin and patch_of(twin) is None
    assert attributes(twin) == names
    if first != "neither":
        dllm_fast.unpatch(either if first == "original" else twin)
    for model in (twin, either):
        torch.testing.assert_close(model(ids).logits, own, atol=1e-5, rtol=1e-4)
    assert torch.equal(tokens(twin, ids) if first != "copy" else tokens(dllm_fast.patch(twin), ids), expected)
    assert patch_of(twin).model is twin and torch.equal(twin(ids).logits, fast)
    dllm_fast.unpatch(either)
    assert torch.equal(tokens(twin, ids), expected)
    dllm_fast.unpatch(twin)
    for model in (twin, either):
        assert attributes(model) == names and "_dllm_fast" not in model.__dict__
        assert torch.equal(model(ids).logits, own)
    with pytest.raises(ValueError, match="is not patched"):
        bound_family(either)


@torch.no_grad()
def test_a_shallow_copy_has_a_mode_of_its_own(llada, ids):
    """Changes that a copied bound forward would not see."""
    llada.config.attention_dropout = 0.5
    twin = copy.copy(dllm_fast.patch(llada))
    before = llada(ids).logits
    twin.train()
    assert not llada.training and twin.training
    llada.eval()
    assert torch.equal(llada(ids).logits, before)


@torch.no_grad()
@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy], ids=["copy", "deepcopy"])
def test_copies_of_copies(either, ids, clone):
    own = either(ids).logits
    twin = clone(dllm_fast.patch(either))
    for again in (copy.copy(twin), copy.deepcopy(twin), clone(copy.copy(copy.copy(twin)))):
        dllm_fast.unpatch(twin)
        assert again.forward.__self__ is again
        torch.testing.assert_close(again(ids).logits, own, atol=1e-5, rtol=1e-4)
        assert torch.equal(tokens(again, ids), tokens(dllm_fast.patch(twin), ids))
        torch.testing.assert_close(dllm_fast.unpatch(again)(ids).logits, own, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_a_deep_copy_is_its_own_when_the_original_is_unpatched(either, ids):
    twin = copy.deepcopy(dllm_fast.patch(either))
    fast, expected = either(ids).logits, tokens(either, ids)
    dllm_fast.unpatch(either)
    assert patch_of(twin).model is twin and twin.forward.__self__ is twin
    assert torch.equal(twin(ids).logits, fast) and torch.equal(tokens(twin, ids), expected)
    assert "_dllm_fast" not in dllm_fast.unpatch(twin).__dict__ and "forward" not in twin.__dict__


@torch.no_grad()
@pytest.mark.parametrize("shallow", [False, True], ids=["itself", "shallow-copy"])
def test_what_comes_from_a_pickle_is_not_patched(either, ids, shallow):
    own, names = either(ids).logits, attributes(either)
    dllm_fast.patch(either)
    model = copy.copy(either) if shallow else either
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for whole in (pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert "forward" not in whole.__dict__ and attributes(whole) == names
        assert torch.equal(whole(ids).logits, own)
        with pytest.raises(ValueError, match="is not patched"):
            tokens(whole, ids)
        assert torch.equal(tokens(dllm_fast.patch(whole), ids), tokens(either, ids))


@torch.no_grad()
def test_a_wrapper_round_a_patched_forward_survives_unpatching(either, ids):
    """Accelerate and others save the forward that they replace, and restore it later."""
    own = either(ids).logits
    dllm_fast.patch(either)
    add_hook_to_module(either, ModelHook())
    torch.testing.assert_close(either(ids).logits, own, atol=1e-5, rtol=1e-4)
    wrapper = either.__dict__["forward"]
    dllm_fast.unpatch(either)
    assert either.__dict__["forward"] is wrapper and torch.equal(either(ids).logits, own)
    dllm_fast.patch(either)  # the wrapper is the model's own forward now
    assert torch.equal(either(ids).logits, own)
    tokens(either, ids)
    dllm_fast.unpatch(either)
    remove_hook_from_module(either)
    assert torch.equal(either(ids).logits, own)


@torch.no_grad()
def test_a_wrapper_stays_when_a_model_is_patched_again(llada, ids):
    dllm_fast.patch(llada)
    inner, calls = llada.forward, []

    @functools.wraps(inner)
    def wrapper(*args, **kwargs):
        calls.append(1)
        return inner(*args, **kwargs)

    llada.forward = wrapper
    dllm_fast.patch(llada, weights="fp8")
    rounded = llada(ids).logits
    assert len(calls) == 1
    llada.forward = inner
    assert torch.equal(llada(ids).logits, rounded)
    dllm_fast.patch(llada)
    assert not torch.allclose(llada(ids).logits, rounded, atol=1e-4)
