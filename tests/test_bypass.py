"""Modules that the patched forward does not call: their hooks, forwards, adapters and weights are never ignored."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_module
from needs import needs_triton
from tiny import MASK, make_llada, make_modernbert
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrize, prune

import dllm_fast
from dllm_fast.cpu import compiled, elementwise
from dllm_fast.decoding.published import published_generate
from dllm_fast.patch import bound_family

MAKERS = {"llada": make_llada, "tied": lambda: make_llada(weight_tying=True), "modernbert": make_modernbert}
IMPLS = ["torch", pytest.param("cpp", marks=pytest.mark.skipif(compiled.missing() is not None, reason="not built"))]
IMPLS.append(pytest.param("triton", marks=needs_triton))
PASSED_BY = {
    "llada": [
        "model",
        "model.transformer.blocks.1",
        "model.transformer.blocks.1.attn_norm",
        "model.transformer.blocks.0.ff_norm",
        "model.transformer.ln_f",
        "model.transformer.ff_out",
    ],
    "modernbert": [
        "model",
        "model.embeddings",
        "model.embeddings.norm",
        "model.layers.1",
        "model.layers.1.attn_norm",
        "model.layers.2.mlp_norm",
        "model.layers.1.attn",
        "model.layers.1.mlp",
        "model.layers.1.mlp.act",
        "model.final_norm",
        "head",
        "head.norm",
        "head.act",
        "decoder",
    ],
}
CALLED = {
    "llada": ["model.transformer.wte", "model.transformer.blocks.1.k_proj", "model.transformer.blocks.2.ff_out"],
    "modernbert": [
        "model.embeddings.tok_embeddings",
        "model.layers.1.attn.Wqkv",
        "model.layers.1.mlp.Wo",
        "head.dense",
    ],
}
PLACES = [(family, name) for family, names in PASSED_BY.items() for name in names]
CALLS = [(family, name) for family, names in CALLED.items() for name in names]


def generate(model, ids, **options):
    options = {"gen_length": 8, "block_length": 8, "schedule": dllm_fast.Uniform(8), **options}
    return dllm_fast.generate(model, ids, **options).sequences


@torch.no_grad()
def own_logits(model, ids):
    return model.__dict__["_dllm_fast"].forward(ids).logits


def published_tokens(model, ids):
    logits_of = lambda ids, mask: model(ids, attention_mask=mask).logits  # noqa: E731
    return published_generate(logits_of, ids, gen_length=8, block_length=8, steps=8, mask_id=MASK)[0]


def changed(out):
    """A hook's or forward's change to a module's output: a tensor, a tuple, or transformers' output of tensors."""
    if isinstance(out, torch.Tensor):
        return out.roll(1, -1)
    if isinstance(out, tuple):
        return (changed(out[0]), *out[1:])
    out.last_hidden_state = changed(out.last_hidden_state)
    return out


def hook(module):
    return module.register_forward_hook(lambda module, args, out: changed(out)).remove


def hook_with_kwargs(module):
    return module.register_forward_hook(lambda module, args, kwargs, out: changed(out), with_kwargs=True).remove


def always_hook(module):
    return module.register_forward_hook(lambda module, args, out: changed(out), always_call=True).remove


def own_forward(module):
    own = module.forward
    module.forward = lambda *args, **kwargs: changed(own(*args, **kwargs))
    return lambda: module.__dict__.pop("forward")


def wrapped(module):
    class Wrapped(type(module)):
        def forward(self, *args, **kwargs):
            return changed(super().forward(*args, **kwargs))

    before, module.__class__ = type(module), Wrapped
    return lambda: setattr(module, "__class__", before)


@torch.no_grad()
@pytest.mark.parametrize(
    "attach", [hook, hook_with_kwargs, always_hook, own_forward, wrapped], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("family,name", PLACES)
def test_what_is_attached_to_a_module_that_is_passed_by_acts(family, name, attach, ids):
    """The model's own forward runs, `generate` names the module, and removing the change restores both."""
    model = dllm_fast.patch(MAKERS[family]())
    before, tokens = model(ids).logits, generate(model, ids)
    module = model.get_submodule(name)
    remove = attach(module)
    got = model(ids).logits
    assert not torch.allclose(got, before, atol=1e-3)
    assert torch.equal(got, own_logits(model, ids))
    with pytest.raises(ValueError, match=f"model: {name} "):
        generate(model, ids)
    with pytest.raises(ValueError, match=f"model: {name} "):
        list(dllm_fast.generate_many(model, [ids[0]], gen_length=8, block_length=8))
    remove()
    assert torch.equal(model(ids).logits, before) and torch.equal(generate(model, ids), tokens)


@torch.no_grad()
@pytest.mark.parametrize("attach", [hook, hook_with_kwargs, own_forward, wrapped])
@pytest.mark.parametrize("family,name", CALLS)
def test_what_is_attached_to_a_module_that_is_called_acts_in_generate_too(family, name, attach, ids):
    model = dllm_fast.patch(MAKERS[family]())
    before = model(ids).logits
    attach(model.get_submodule(name))
    got, tokens = model(ids).logits, generate(model, ids, cache="none")
    dllm_fast.unpatch(model)
    own = model(ids).logits
    torch.testing.assert_close(got, own, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(got, before, atol=1e-3)
    assert torch.equal(tokens, published_tokens(model, ids))


@torch.no_grad()
def test_pre_hooks_act(either, ids):
    model = dllm_fast.patch(either)
    before = model(ids).logits
    block = (model.model.transformer.blocks if "LLaDA" in type(model).__name__ else model.model.layers)[1]
    handle = block.register_forward_pre_hook(lambda module, args: (args[0] * 1.5, *args[1:]))
    got = model(ids).logits
    assert not torch.allclose(got, before, atol=1e-3)
    with pytest.raises(ValueError, match=r"\.1 has a forward pre-hook"):
        bound_family(model)
    assert torch.equal(dllm_fast.unpatch(model)(ids).logits, got)
    handle.remove()


@torch.no_grad()
@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
def test_hooks_on_every_module_act_and_generate_warns(either, ids, register):
    dllm_fast.patch(either)
    seen = []
    handle = register(lambda module, *rest: seen.append(module))
    try:
        either(ids)
        assert set(seen) >= set(either.modules()) - {
            m for m in either.modules() if isinstance(m, nn.ModuleList | nn.ModuleDict)
        }
        with pytest.warns(UserWarning, match="does not call the hooks of register_module_forward_hook"):
            bound_family(either)
    finally:
        handle.remove()
    bound_family(either)


@torch.no_grad()
def test_a_hook_on_the_model_itself_acts_and_is_named_by_generate(either, ids):
    dllm_fast.patch(either)
    before = either(ids).logits
    handle = either.register_forward_hook(lambda module, args, out: out.logits.add_(1))
    torch.testing.assert_close(either(ids), before + 1)
    with pytest.raises(ValueError, match="the model has a forward hook"):
        generate(either, ids)
    handle.remove()
    assert torch.equal(either(ids).logits, before)


def test_gradient_hooks_act_and_leave_generate_alone(either, ids):
    dllm_fast.patch(either)
    block = (either.model.transformer.blocks if "LLaDA" in type(either).__name__ else either.model.layers)[1]
    seen = []
    block.register_full_backward_hook(lambda module, grads, outs: seen.append(outs))
    either(ids).logits.sum().backward()
    assert len(seen) == 1
    generate(either, ids)


@torch.no_grad()
def test_hooks_that_transformers_leaves_behind_are_no_obstacle(modernbert, ids):
    """After hidden states were asked for once, transformers' hooks stay on the layers."""
    dllm_fast.patch(modernbert)
    before = generate(modernbert, ids)
    assert len(modernbert(ids, output_hidden_states=True).hidden_states) == 6
    assert torch.equal(generate(modernbert, ids), before)


@torch.no_grad()
@pytest.mark.parametrize("change", ["prune", "parametrize", "subclass"])
def test_weights_that_are_made_anew_before_each_call_are_not_read(llada, ids, change):
    dllm_fast.patch(llada)
    before, norm = llada(ids).logits, llada.model.transformer.ln_f
    if change == "prune":
        prune.l1_unstructured(norm, "weight", amount=0.5)
    elif change == "parametrize":
        parametrize.register_parametrization(norm, "weight", torch.nn.Tanh())
    else:
        norm.weight = nn.Parameter(norm.weight.as_subclass(type("Packed", (torch.Tensor,), {})) * 0.5)
    got = llada(ids).logits
    assert not torch.allclose(got, before, atol=1e-3)
    with pytest.raises(ValueError, match=r"model\.transformer\.ln_f "):
        bound_family(llada)
    assert torch.equal(own_logits(llada, ids), got)


@torch.no_grad()
def test_dropout_that_is_switched_on_alone_drops(ids):
    model = make_modernbert(mlp_dropout=0.5)
    dllm_fast.patch(model)
    before = model(ids).logits
    assert torch.equal(model(ids).logits, before)
    model.model.layers[1].mlp.drop.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


@torch.no_grad()
def test_an_attn_norm_that_does_nothing(modernbert, ids):
    """Any layer may lack the norm, as the first one does."""
    modernbert.model.layers[2].attn_norm = nn.Identity()
    own = modernbert(ids).logits
    torch.testing.assert_close(dllm_fast.patch(modernbert)(ids).logits, own, atol=1e-5, rtol=1e-4)
    modernbert.model.layers[3].attn_norm = nn.Identity()
    got = modernbert(ids).logits
    torch.testing.assert_close(dllm_fast.unpatch(modernbert)(ids).logits, got, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("family", MAKERS)
def test_a_weight_on_the_meta_device_is_an_error(family, impl, ids):
    """For each weight of one layer and outside the layers, moved after patching: every call names it."""
    model = dllm_fast.patch(MAKERS[family](), impl=impl)
    names = [name for name, _ in model.named_parameters() if not any(f".{layer}." in name for layer in (0, 2, 3, 4))]
    assert len(names) > 8
    for name in names:
        owner, leaf = name.rsplit(".", 1)
        module = model.get_submodule(owner)
        weight = module._parameters[leaf]
        module._parameters[leaf] = nn.Parameter(torch.empty_like(weight, device="meta"))
        with pytest.raises(ValueError, match=f"the weights of {owner} are on the meta device"):
            model(ids)
        for call in (generate, lambda model, ids: list(dllm_fast.generate_many(model, ids))):
            with pytest.raises(ValueError, match=f"the weights of {owner} are on the meta device"):
                call(model, ids)
        module._parameters[leaf] = weight
    model.to("meta")
    with pytest.raises(ValueError, match="on the meta device"):
        model(ids)
    with pytest.raises(ValueError, match="on the meta device"):
        generate(model, ids)


@pytest.mark.skipif(compiled.missing() is not None, reason=f"no compiled extension: {compiled.missing()}")
def test_a_compiled_op_does_not_take_its_fake_for_an_answer():
    """For each op, every argument in turn is on the meta device."""
    x, weight, head = torch.randn(2, 3, 8), torch.randn(8), torch.randn(2, 3, 2, 4)
    cos, at = torch.randn(16, 2), torch.zeros(2, dtype=torch.int64)
    buffer = torch.zeros(2, 8, 2, 4)
    cases = [
        (compiled.linear, (x, torch.randn(5, 8), torch.randn(5))),
        (compiled.attention, (head, buffer, buffer, at, at + 3, at)),
        (elementwise.rms_norm, (x, weight, 1e-5, x)),
        (elementwise.swiglu, (x, x)),
        (elementwise.rope, (head, head, head, cos, cos, at, at, buffer, buffer)),
        (lambda *args: compiled.predict(*args, mask_id=0), (x[0], torch.randn(5, 8), torch.randn(5))),
    ]
    for op, arguments in cases:
        for i, argument in enumerate(arguments):
            if isinstance(argument, torch.Tensor):
                with pytest.raises(RuntimeError, match="is not on the expected device"):
                    op(*arguments[:i], argument.to("meta"), *arguments[i + 1 :])


@torch.no_grad()
@pytest.mark.parametrize("offload", ["disk", "cpu", "some"])
def test_offloaded_weights_are_loaded_or_refused(either, ids, tmp_path, offload):
    """Accelerate's hooks load weights from disk or memory at each module's call: the model's own forward runs."""
    own = either(ids).logits
    dllm_fast.patch(either)
    if offload == "disk":
        disk_offload(either, tmp_path, execution_device="cpu", offload_buffers=False)
    elif offload == "cpu":
        cpu_offload(either, execution_device="cpu")
    else:
        leaves = [name for name, module in either.named_modules() if not module._modules]
        parts = {name: "disk" if ".1." in name else "cpu" for name in leaves}
        dispatch_model(either, parts, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert any(parameter.is_meta for parameter in either.parameters())
    torch.testing.assert_close(either(ids).logits, own, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="has a forward of its own"):
        generate(either, ids)
    remove_hook_from_module(either, recurse=True)
    torch.testing.assert_close(either(ids).logits, own, atol=1e-5, rtol=1e-4)
    generate(either, ids)


@torch.no_grad()
def test_what_stands_in_a_modules_place_is_refused_by_patch(llada, modernbert, ids):
    """If it was put on later, the model's own forward runs."""

    class Twice(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block, self.attention_type = block, getattr(block, "attention_type", None)

        def forward(self, x, *rest, **options):
            return self.block(x, *rest, **options) * 2

    for model, name in ((llada, "model.transformer.blocks"), (modernbert, "model.layers")):
        dllm_fast.patch(model)
        blocks = model.get_submodule(name)
        blocks[1] = Twice(blocks[1])
        got = model(ids).logits
        with pytest.raises(ValueError, match=rf"{name}\.1 is a .*Twice"):
            generate(model, ids)
        dllm_fast.unpatch(model)
        assert torch.equal(model(ids).logits, got)
        with pytest.raises(ValueError, match=rf"{name}\.1 is a .*Twice"):
            dllm_fast.patch(model)
