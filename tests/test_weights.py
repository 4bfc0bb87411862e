"""Fused weights: the same parameters and the same results, whatever is done to the model while it is patched."""

import copy
import importlib
import inspect
import threading

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file, save_model
from tiny import make_llada
from torch import nn
from torch.nn.utils import prune

import dllm_fast
from dllm_fast.families import FAMILIES, linears
from dllm_fast.patch import bound_family, bound_pool


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Fuse in every dtype and on every device, so that fp32's tight tolerances test the fused matmuls."""
    monkeypatch.setattr(linears, "pays", lambda weight: True)


def groups_of(model):
    blocks = model.model.transformer.blocks
    return [group for b in blocks for group in ((b.q_proj, b.k_proj, b.v_proj), (b.ff_proj, b.up_proj))]


def storages(model):
    """Bytes of every storage of the parameters, by address."""
    return {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}


def values_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_values(model, values):
    now = model.state_dict()
    return now.keys() == values.keys() and all(torch.equal(now[name], values[name]) for name in values)


def is_fused(model):
    """For every group, in eval mode without gradients."""
    with torch.no_grad():
        found = {linears.fused(group) is not None for group in groups_of(model)}
    assert len(found) == 1
    return found.pop()


@torch.no_grad()
def own_logits(model, ids):
    return model.__dict__["_dllm_fast"].forward(ids).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@torch.no_grad()
def test_products_are_each_linears_product(dtype):
    """At most twice the error of separate linears against fp64, with sizes that share no factor."""
    torch.manual_seed(0)
    group = [nn.Linear(37, rows, bias=False, dtype=dtype) for rows in (5, 1, 23)]
    x = torch.randn(2, 7, 37).to(dtype)
    truth = [x.double() @ linear.weight.double().T for linear in group]
    apart = linears.matmuls(x, *group)
    assert linears.fused(group) is None
    moved = linears.fuse(group)
    assert all(a is linear.weight for a, linear in zip(moved.weights, group, strict=True))
    together = linears.matmuls(x, *group)
    assert len({part.untyped_storage().data_ptr() for part in together}) == 1
    for one, other, exact in zip(apart, together, truth, strict=True):
        assert other.dtype == dtype and other.shape == exact.shape and other.stride(-1) == 1
        error = (other.double() - exact).abs().max()
        assert error <= 2 * (one.double() - exact).abs().max() + torch.finfo(dtype).eps
    assert linears.fuse(group) is None  # already together
    moved.separate()
    assert linears.fused(group) is None
    assert all(torch.equal(a, b) for a, b in zip(apart, linears.matmuls(x, *group), strict=True))


@torch.no_grad()
def test_neighbouring_storages_are_not_taken_for_one():
    """Allocators put equal blocks next to each other, but no view may span two blocks."""
    memory = torch.randn(3, 4, 8)
    group = [nn.Linear(8, 4, bias=False) for _ in range(3)]
    for linear, part in zip(group, memory, strict=True):
        # A separate storage over part of the same memory.
        linear.weight.data = torch.from_numpy(part.numpy())
    assert group[1].weight.data_ptr() == group[0].weight.data_ptr() + group[0].weight.nbytes
    assert linears.fused(group) is None


def adapter(linear):
    wrapped = nn.Sequential(linear)
    wrapped.forward = lambda x: linear(x) + 1
    return wrapped


def hooked(linear):
    linear.register_forward_hook(lambda module, args, out: out + 1)
    return linear


def offloaded(linear):
    own = linear.forward
    linear.forward = lambda x: own(x) + 1
    return linear


class Quantised(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def quantised(linear):
    linear.__class__ = Quantised
    return linear


def pruned(linear):
    """`torch.nn.utils.prune` replaces a parameter by a plain tensor, and computes it again before each call."""
    prune.l1_unstructured(linear, "weight", amount=0.5)
    return linear


def biased(linear):
    linear.bias = nn.Parameter(torch.ones(linear.out_features))
    return linear


@torch.no_grad()
@pytest.mark.parametrize("change", [adapter, hooked, offloaded, quantised, pruned, biased])
@pytest.mark.parametrize("after", [False, True], ids=["before-patch", "while-patched"])
def test_what_is_no_plain_linear_is_called(llada, ids, change, after):
    """In one layer, before or after patching; the others stay fused."""
    own = copy.deepcopy(llada)
    plain = own(ids).logits
    own.model.transformer.blocks[1].k_proj = change(own.model.transformer.blocks[1].k_proj)
    if after:
        dllm_fast.patch(llada)
    block = llada.model.transformer.blocks[1]
    block.k_proj = change(block.k_proj)
    dllm_fast.patch(llada)
    expected = own(ids).logits
    assert not torch.allclose(expected, plain, atol=1e-4)
    torch.testing.assert_close(llada(ids).logits, expected, atol=1e-5, rtol=1e-4)
    fused = [linears.fused(group) is not None for group in groups_of(llada)]
    assert fused == [True, True, False, True, True, True]


def test_patching_moves_weights_without_a_second_copy(llada):
    before, parameters = storages(llada), dict(llada.named_parameters())
    values = values_of(llada)
    dllm_fast.patch(llada)
    assert is_fused(llada)
    now = storages(llada)
    assert len(now) == len(before) - 3 * (2 + 1) and sum(now.values()) == sum(before.values())
    assert all(parameter is parameters[name] for name, parameter in llada.named_parameters())
    assert same_values(llada, values)
    dllm_fast.unpatch(llada)
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in llada.parameters())
    assert len(storages(llada)) == len(before) and same_values(llada, values)


def test_training_goes_to_the_parameters_and_is_seen_by_the_product(llada, ids):
    dllm_fast.patch(llada)
    optimizer = torch.optim.AdamW(llada.parameters(), lr=1e-2)  # made while the weights are fused
    weight = llada.model.transformer.blocks[0].k_proj.weight
    other = copy.deepcopy(llada.model.transformer.blocks[0].v_proj.weight.data)
    for _ in range(2):
        llada.train()(ids).logits.float().logsumexp(-1).mean().backward()
        assert weight.grad is not None and weight.grad.shape == weight.shape
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(other, llada.model.transformer.blocks[0].v_proj.weight)
    assert is_fused(llada.eval())
    with torch.no_grad():
        torch.testing.assert_close(llada(ids).logits, own_logits(llada, ids), atol=1e-5, rtol=1e-4)
    values = values_of(llada)
    dllm_fast.unpatch(llada)
    assert same_values(llada, values)


def test_gradients_through_the_family_are_the_unfused_ones(llada, ids):
    apart = copy.deepcopy(llada)
    FAMILIES["llada"](apart, "torch").hidden(ids).square().mean().backward()
    bound_family(dllm_fast.patch(llada, impl="torch")).hidden(ids).square().mean().backward()
    for (name, fused), own in zip(llada.named_parameters(), apart.parameters(), strict=True):
        assert fused.is_leaf and (own.grad is None) == (fused.grad is None), name
        assert own.grad is None or torch.equal(fused.grad, own.grad), name


@torch.no_grad()
def test_one_weight_that_was_moved_is_not_read_from_its_old_place(llada, ids):
    dllm_fast.patch(llada)
    for number, name in enumerate(("q_proj", "k_proj", "v_proj")):
        weight = getattr(llada.model.transformer.blocks[number], name).weight
        weight.data = weight.data * 3
    assert [linears.fused(group) is not None for group in groups_of(llada)] == [False, True] * 3
    torch.testing.assert_close(llada(ids).logits, own_logits(llada, ids), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_patched_model_is_saved_and_loaded_bit_for_bit(tmp_path, llada, ids):
    """For everyone who finds tied weights by their storage."""
    values = values_of(llada)
    dllm_fast.patch(llada)
    llada.save_pretrained(tmp_path / "hf", max_shard_size="40KB")
    save_model(llada, tmp_path / "st.safetensors")
    save_file(llada.state_dict(), tmp_path / "file.safetensors")
    Accelerator().save_model(llada, tmp_path / "accelerate")
    torch.save(llada.state_dict(), tmp_path / "state.pt")
    assert is_fused(llada)  # saving did not change it
    assert same_values(dllm_fast.LLaDAModelLM.from_pretrained(tmp_path / "hf"), values)
    for file in ("st.safetensors", "file.safetensors", "accelerate/model.safetensors", "state.pt"):
        file = tmp_path / file
        state = torch.load(file) if file.suffix == ".pt" else load_file(file)
        for assign in (False, True):
            other = make_llada()
            other.load_state_dict(state, assign=assign)
            assert same_values(other, values)


@torch.no_grad()
def test_a_state_dict_is_the_weights_themselves(llada):
    dllm_fast.patch(llada)
    state = llada.state_dict()
    for name, parameter in llada.named_parameters():
        assert (
            state[name].data_ptr() == parameter.data_ptr()
            and state[name].untyped_storage().nbytes() == state[name].nbytes
        )
    assert all(type(tensor) is nn.Parameter for tensor in llada.state_dict(keep_vars=True).values())
    del llada
    assert all(tensor.isfinite().all() for tensor in state.values())  # the memory lives as long as they do


@torch.no_grad()
def test_a_pickled_model_comes_back_unpatched(tmp_path, llada, ids):
    values = values_of(llada)
    torch.save(dllm_fast.patch(llada), tmp_path / "model.pt")
    whole = torch.load(tmp_path / "model.pt", weights_only=False)
    assert same_values(whole, values) and torch.equal(whole(ids).logits, own_logits(llada, ids))
    with pytest.raises(ValueError, match="is not patched"):
        bound_family(whole)
    torch.testing.assert_close(dllm_fast.patch(whole)(ids).logits, llada(ids).logits, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_a_copy_of_a_patched_model_is_patched_and_its_own(llada, ids):
    dllm_fast.patch(llada)
    twin = copy.deepcopy(llada)
    assert bound_pool(twin).lock is not bound_pool(llada).lock
    assert not storages(twin).keys() & storages(llada).keys()
    assert twin.forward.__self__ is twin and bound_family(twin).transformer is twin.model.transformer
    before = llada(ids).logits
    for parameter in twin.parameters():
        parameter.add_(0.01)
    torch.testing.assert_close(twin(ids).logits, own_logits(twin, ids), atol=1e-5, rtol=1e-4)
    assert torch.equal(llada(ids).logits, before) and not torch.allclose(twin(ids).logits, before, atol=1e-3)
    dllm_fast.unpatch(twin)
    assert not any(module._state_dict_hooks for module in twin.modules())
    assert is_fused(llada) and all(p.untyped_storage().nbytes() == p.nbytes for p in twin.parameters())


def cast(model):
    model.to(torch.bfloat16)


def reload(model):
    torch.manual_seed(9)
    model.load_state_dict({name: torch.randn_like(t) / 8 for name, t in model.state_dict().items()}, assign=True)


def reassign(model):
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5


@torch.no_grad()
@pytest.mark.parametrize("move", [cast, reload, reassign])
def test_weights_that_were_moved_apart_are_right_and_fused_again(llada, ids, move):
    """By `.to()`, an assigning load, or new data: forwards call the modules, and `generate` fuses them again."""
    dllm_fast.patch(llada, impl="torch")
    move(llada)
    assert not is_fused(llada)
    tolerance = {"atol": 4e-2 * float(own_logits(llada, ids).abs().max()), "rtol": 0}
    tolerance = tolerance if move is cast else {"atol": 1e-5, "rtol": 1e-4}
    apart = llada(ids).logits
    torch.testing.assert_close(apart, own_logits(llada, ids), **tolerance)
    values = values_of(llada)
    with torch.inference_mode():  # must not make parameters that can never be trained again
        dllm_fast.generate(llada, ids, gen_length=4, block_length=4)
    assert is_fused(llada) and same_values(llada, values)
    assert not any(parameter.is_inference() for parameter in llada.parameters())
    torch.testing.assert_close(llada(ids).logits, apart, **tolerance)
    dllm_fast.unpatch(llada)
    assert same_values(llada, values) and all(p.untyped_storage().nbytes() == p.nbytes for p in llada.parameters())


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
def test_a_failure_half_way_leaves_the_model_as_it_was(llada, ids, monkeypatch, patched):
    """No memory for the fourth group: those before it are moved back."""
    if patched:
        dllm_fast.patch(llada)
        llada.double()  # apart again
    values, before, attributes = values_of(llada), storages(llada), dict(llada.__dict__)
    real, calls = linears.fuse, []

    def fuse(group):
        calls.append(group)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("injected")
        return real(group)

    monkeypatch.setattr(importlib.import_module("dllm_fast.patch"), "fuse", fuse)
    with pytest.raises(torch.OutOfMemoryError, match="injected"):
        dllm_fast.patch(llada)
    assert len(calls) == 4 and same_values(llada, values) and llada.__dict__ == attributes
    assert len(storages(llada)) == len(before) and sum(storages(llada).values()) == sum(before.values())
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in llada.parameters())


def test_shared_memory_and_shared_parameters_are_left_where_they_are():
    """Other processes read shared memory; a weight of two layers could be next to only one layer's others."""
    shared = [nn.Linear(8, 4, bias=False).share_memory() for _ in range(2)]
    assert linears.fuse(shared) is None
    twice = [nn.Linear(8, 4, bias=False)] * 2
    assert linears.fuse(twice) is None
    mixed = [nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False, dtype=torch.float64)]
    assert linears.fuse(mixed) is None
    with torch.inference_mode():
        untrainable = [nn.Linear(8, 4, bias=False) for _ in range(2)]
    assert linears.fuse(untrainable) is None


@torch.no_grad()
def test_layers_that_share_their_weights_stay_right(ids):
    """Fusing the second layer takes the shared weights out of the first one's buffer, which then runs separately."""
    model = make_llada()
    blocks = model.model.transformer.blocks
    blocks[2].k_proj.weight = blocks[0].k_proj.weight
    own = model(ids).logits
    torch.testing.assert_close(dllm_fast.patch(model)(ids).logits, own, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(dllm_fast.patch(model)(ids).logits, own, atol=1e-5, rtol=1e-4)
    assert torch.equal(dllm_fast.unpatch(model)(ids).logits, own)


def test_adapters_in_place_of_what_is_read_are_refused_by_name(llada, modernbert):
    llada.model.transformer.ff_out = nn.Sequential(llada.model.transformer.ff_out)
    with pytest.raises(ValueError, match=r"model\.transformer\.ff_out is a Sequential without a plain weight"):
        dllm_fast.patch(llada)
    modernbert.model.layers[1].mlp_norm = nn.Sequential(modernbert.model.layers[1].mlp_norm)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp_norm is a Sequential"):
        dllm_fast.patch(modernbert)
    assert "_dllm_fast" not in llada.__dict__ and "_dllm_fast" not in modernbert.__dict__


def test_a_patched_forward_has_the_models_signature(either, llada):
    own = inspect.signature(either.forward)
    assert inspect.signature(dllm_fast.patch(either).forward) == own
    dllm_fast.patch(llada)  # of another model, in between
    assert inspect.signature(either.forward) == own and either.forward.__name__ == "forward"


def test_unpatching_waits_for_who_holds_the_lock(llada):
    lock = bound_pool(dllm_fast.patch(llada)).lock
    with lock:
        thread = threading.Thread(target=dllm_fast.unpatch, args=(llada,))
        thread.start()
        thread.join(0.2)
        assert thread.is_alive() and bound_family(llada)
    thread.join(30)
    with pytest.raises(ValueError, match="is not patched"):
        bound_pool(llada)


def test_fusing_is_left_where_it_costs(llada, monkeypatch):
    """In fp32 on a CPU, neither `patch` nor `generate` fuses."""
    monkeypatch.undo()
    before = storages(llada)
    bound_family(dllm_fast.patch(llada))
    assert storages(llada) == before and not is_fused(llada)
    bound_family(llada.bfloat16())
    assert is_fused(llada)
