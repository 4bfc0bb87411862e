"""Adapters and quantised modules, added before or after patching, take effect, or an error names the module."""

import copy

import pytest
import torch
from tiny import make_llada, make_modernbert
from torch import nn

import dllm_fast
from dllm_fast.evaluate.likelihood import log_likelihood
from dllm_fast.families.forward import patch_of
from dllm_fast.patch import bound_family

MAKERS = {"llada": make_llada, "tied": lambda: make_llada(weight_tying=True), "modernbert": make_modernbert}
LAYERS = {
    "llada": ["model.transformer.blocks.1.q_proj", "model.transformer.blocks.2.ff_out", "model.transformer.wte"],
    "modernbert": [
        "model.layers.1.attn.Wqkv",
        "model.layers.2.mlp.Wo",
        "head.dense",
        "model.embeddings.tok_embeddings",
    ],
}
READ = {
    "llada": ["model.transformer.ff_out", "model.transformer.ln_f", "model.transformer.blocks.1.attn_norm"],
    "modernbert": ["decoder", "model.final_norm", "model.embeddings.norm", "model.layers.1.mlp_norm", "head.norm"],
}


class Adapted(nn.Module):
    """Like PEFT's layers: the base's weight can be read through it, but a call does more."""

    def __init__(self, base, width):
        super().__init__()
        self.base_layer = base
        self.more = nn.Parameter(torch.randn(width, generator=torch.Generator().manual_seed(0)) / 4)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, *args, **kwargs):
        out = self.base_layer(*args, **kwargs)
        return out + self.more * out.roll(1, -1)


class Wrapper(nn.Module):
    """Like a PeftModel: wraps the adapted model and forwards its config."""

    def __init__(self, model):
        super().__init__()
        self.base_model, self.config = model, model.config

    def get_base_model(self):
        return self.base_model

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None, **kwargs):
        return self.base_model(input_ids, attention_mask=attention_mask, labels=labels, **kwargs)


def put(model, name, make):
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(name)
    width = model(torch.zeros(1, 1, dtype=torch.int64)).logits.shape[-1] if leaf in ("decoder",) else None
    if width is None:
        weight = module.weight
        width = weight.shape[-1] if weight.dim() == 1 or isinstance(module, nn.Embedding) else weight.shape[0]
    setattr(model.get_submodule(owner), leaf, make(module, width))


def tokens(model, ids):
    return dllm_fast.generate(model, ids, gen_length=8, block_length=8).sequences


def cases(names):
    return [(family, name) for family, of in names.items() for name in of]


@torch.no_grad()
@pytest.mark.parametrize("after", [False, True], ids=["adapted-first", "patched-first"])
@pytest.mark.parametrize("family,name", cases(LAYERS))
def test_an_adapter_on_a_linear_or_an_embedding_acts_everywhere(family, name, after, ids):
    model = MAKERS[family]()
    before = model(ids).logits
    if after:
        dllm_fast.patch(model)
    put(model, name, Adapted)
    dllm_fast.patch(model)
    got, own = model(ids).logits, patch_of(model).forward(ids).logits
    assert not torch.allclose(own, before, atol=1e-3)
    torch.testing.assert_close(got, own, atol=1e-5, rtol=1e-4)
    assert tokens(model, ids).shape == (3, 32)


@torch.no_grad()
@pytest.mark.parametrize("family,name", cases(READ))
def test_an_adapter_on_a_norm_or_the_head_acts_or_is_named(family, name, ids):
    model = dllm_fast.patch(MAKERS[family]())
    before = model(ids).logits
    put(model, name, Adapted)
    got, own = model(ids).logits, patch_of(model).forward(ids).logits
    assert not torch.allclose(own, before, atol=1e-3) and torch.equal(got, own)
    for call in (tokens, lambda model, ids: log_likelihood(model, ids[0], ids[1])):
        with pytest.raises(ValueError, match=rf"model: {name} is a test_adapters\.Adapted"):
            call(model, ids)
    dllm_fast.unpatch(model)
    with pytest.raises(ValueError, match=rf"model: {name} is a test_adapters\.Adapted without a plain weight"):
        dllm_fast.patch(model)


@torch.no_grad()
@pytest.mark.parametrize("wrap", [Wrapper, lambda model: Wrapper(Wrapper(model)), nn.DataParallel, "compile"])
def test_a_wrapper_may_be_handed_in(either, ids, wrap):
    """The wrapped model is patched; the wrapper is returned."""
    expected = tokens(dllm_fast.patch(copy.deepcopy(either)), ids)
    wrapped = torch.compile(either, backend="eager") if wrap == "compile" else wrap(either)
    assert dllm_fast.patch(wrapped) is wrapped and patch_of(either) is not None and patch_of(wrapped) is None
    assert "forward" not in wrapped.__dict__ or wrap == "compile"
    assert torch.equal(tokens(wrapped, ids), expected)
    many = dllm_fast.generate_many(wrapped, list(ids), gen_length=8, block_length=8)
    assert torch.equal(torch.stack([one.sequence for one in many]), expected)
    pair = ids[0, :4], ids[1, :4]
    assert log_likelihood(wrapped, *pair, seed=0) == log_likelihood(either, *pair, seed=0)
    assert dllm_fast.unpatch(wrapped) is wrapped and patch_of(either) is None
    with pytest.raises(ValueError, match="is not patched"):
        tokens(wrapped, ids)
    with dllm_fast.patched(wrapped) as same:
        assert same is wrapped and bound_family(wrapped) is bound_family(either)
    assert patch_of(either) is None


def test_a_learned_prompt_is_refused(llada, ids):
    """With PEFT's prompt tuning, the wrapped model does not see the learned tokens."""
    wrapped = Wrapper(dllm_fast.patch(llada))
    wrapped.peft_config = {"default": type("Config", (), {"is_prompt_learning": True})()}
    with pytest.raises(ValueError, match="the learned prompt of adapter 'default' would be left out"):
        tokens(wrapped, ids)
    tokens(wrapped.get_base_model(), ids)


class Packed(nn.Module):
    """Like GPTQ's and HQQ's linears: integers and scales, without a weight."""

    def __init__(self, linear, width):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("packed", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.packed * self.scale, self.bias)


class Int8Weight(nn.Parameter):
    """Like bitsandbytes' weights: another Parameter class."""


class EightBit(nn.Linear):
    """Like bitsandbytes' linears: a subclass whose weight holds integers."""

    def __init__(self, linear, width):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        packed = Packed(linear, width)
        self.weight = Int8Weight(packed.packed, requires_grad=False)
        self.scale, self.bias = packed.scale, linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


def quantise(model, kind, head):
    name = "decoder" if hasattr(model, "decoder") else "model.transformer.ff_out"
    names = [n for n, module in model.named_modules() if isinstance(module, nn.Linear) and (head or n != name)]
    if kind == "dynamic":
        qconfig = torch.ao.quantization.default_dynamic_qconfig
        torch.ao.quantization.quantize_dynamic(model, dict.fromkeys(names, qconfig), inplace=True)
    elif kind == "torchao":
        torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        config = torchao.Int8WeightOnlyConfig()
        torchao.quantize_(model, config, filter_fn=lambda module, name: name in names)
    else:
        for name in names:
            put(model, name, kind)
    return model


KINDS = [Packed, EightBit, "dynamic", "torchao"]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("after", [False, True], ids=["quantised-first", "patched-first"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind if isinstance(kind, str) else kind.__name__)
def test_quantised_linears_are_called(either, ids, kind, after):
    if after:
        dllm_fast.patch(either)
    plain = either(ids).logits
    dllm_fast.patch(quantise(either, kind, head=False))
    got, own = either(ids).logits, patch_of(either).forward(ids).logits
    # Dynamic quantisation rounds x too, so a last bit may become a whole step: this is the tolerance.
    tolerance = float((own - plain).abs().max()) if kind == "dynamic" else 1e-5
    torch.testing.assert_close(got, own, atol=tolerance, rtol=1e-4)
    assert not torch.allclose(got, plain, atol=1e-6, rtol=0)
    assert tokens(either, ids).shape == (3, 32)
    assert torch.equal(dllm_fast.unpatch(either)(ids).logits, own)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind if isinstance(kind, str) else kind.__name__)
def test_a_quantised_head_is_refused_by_name(either, ids, kind):
    dllm_fast.patch(either)
    quantise(either, kind, head=True)
    assert torch.equal(either(ids).logits, patch_of(either).forward(ids).logits)
    with pytest.raises(ValueError, match=r"(decoder|ff_out) .*do not quantise it"):
        tokens(either, ids)
    dllm_fast.unpatch(either)
    with pytest.raises(ValueError, match=r"(decoder|ff_out) is a .* without a plain weight .*do not quantise it"):
        dllm_fast.patch(either)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("after", [False, True], ids=["quantised-first", "patched-first"])
@pytest.mark.parametrize("weights", ["fp8", "int4"])
def test_quantised_linears_have_no_rounded_copies(either, ids, weights, after):
    """Dynamic quantisation's class is also called Linear, so the message has its module's name."""
    if after:
        dllm_fast.patch(either, weights=weights)
    quantise(either, "dynamic", head=False)
    with pytest.raises(ValueError, match=rf"weights='{weights}': .* torch\.ao\.nn\.quantized\.dynamic"):
        tokens(either, ids) if after else dllm_fast.patch(either, weights=weights)


TARGETS = {"llada": (["q_proj", "ff_proj", "wte"], ["ln_f", "ff_out"]), "modernbert": (["Wqkv", "Wo"], ["decoder"])}


@torch.no_grad()
@pytest.mark.parametrize("after", [False, True], ids=["adapted-first", "patched-first"])
@pytest.mark.parametrize("family", TARGETS)
def test_peft_itself(family, after, ids):
    """LoRA on the layers always acts. On the head it acts in forwards; `generate` refuses it until it is merged."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    layers, heads = TARGETS[family]
    for targets in (layers, heads[-1:]):
        model = MAKERS[family]()
        if after:
            dllm_fast.patch(model)
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, r=4)).eval()
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.1)
        if targets is layers:
            assert dllm_fast.patch(adapted) is adapted
            expected = adapted(input_ids=ids).logits
            own = patch_of(model).forward(ids).logits
            torch.testing.assert_close(expected, own, atol=1e-4, rtol=1e-4)
            drawn = tokens(adapted, ids)
        elif after:
            expected = adapted(input_ids=ids).logits
            assert torch.equal(expected, patch_of(model).forward(ids).logits)
            with pytest.raises(ValueError, match=r"is a peft\.tuners\.lora\.layer\.Linear"):
                tokens(adapted, ids)
        else:
            with pytest.raises(ValueError, match=r"is a peft\.tuners\.lora\.layer\.Linear without a plain weight"):
                dllm_fast.patch(adapted)
            expected = adapted(input_ids=ids).logits
        assert not torch.allclose(expected, MAKERS[family]()(ids).logits, atol=1e-3)
        if targets is not layers and family == "modernbert":
            continue  # its head is tied, so merging would change the embedding too
        merged = dllm_fast.patch(adapted.merge_and_unload())
        torch.testing.assert_close(merged(ids).logits, expected, atol=1e-4, rtol=1e-3)
        assert tokens(merged, ids).shape == (3, 32)
        assert targets is not layers or torch.equal(drawn[:, :24], ids)
