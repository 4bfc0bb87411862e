"""A patched model returns what its own forward returns, for all arguments, however they are given."""

import inspect

import pytest
import torch
import transformers
from tiny import EOS, make_llada, make_modernbert

import dllm_fast
from dllm_fast.patch import bound_family

IDS = torch.randint(0, EOS, (3, 24), generator=torch.Generator().manual_seed(1))
PADDED = torch.ones(3, 24, dtype=torch.int64)
PADDED[1, :7] = 0
PADDED[2, -5:] = 0
HOLES = PADDED.clone()
HOLES[0, 5] = 0
MAKERS = {
    "llada": make_llada,
    "llada-tied": lambda: make_llada(weight_tying=True, n_kv_heads=2),
    "modernbert": make_modernbert,
}
MASKS = {
    "none": None,
    "ones": torch.ones_like(PADDED),
    "padded": PADDED,
    "left": PADDED[[0, 1, 1]],
    "bool": PADDED.bool(),
    "float": PADDED.float(),
    "int32": PADDED.int(),
    "holes": HOLES,
    "4d": PADDED.bool()[:, None, None].expand(3, 1, 24, 24),
}
# Arguments besides ids and a mask, for both families or for the one that takes them.
ASKED = {
    "nothing": {},
    "embeds": {"inputs_embeds": None},
    "hidden": {"output_hidden_states": True},
    "no-hidden": {"output_hidden_states": False},
    "tuple": {"return_dict": False},
    "dict": {"return_dict": True},
    "hidden-tuple": {"output_hidden_states": True, "return_dict": False},
}
MODERNBERT = {
    "labels": {"labels": IDS},
    "positions": {"position_ids": torch.arange(24)[None] + 3},
}
CASES = [(family, name, mask) for family in MAKERS for name in ASKED for mask in MASKS]
CASES += [("modernbert", name, mask) for name in MODERNBERT for mask in ("none", "padded", "holes")]
# LLaDA's masks have two dimensions; in transformers 4, so do ModernBERT's.
FOUR = {"modernbert"} if int(transformers.__version__.split(".")[0]) > 4 else set()
CASES = [case for case in CASES if case[2] != "4d" or case[0] in FOUR]


def close(got, own):
    """Every tensor of an output, including padded positions."""
    assert type(got) is type(own) and len(got) == len(own)
    pairs = zip(got, own) if isinstance(own, tuple) else ((got[name], own[name]) for name in own)
    for ours, theirs in pairs:
        if isinstance(theirs, tuple):
            close(ours, theirs)
        else:
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", MAKERS)
def test_a_patched_forward_is_the_models_own(family):
    """Under `no_grad`, for every argument and mask; plain calls take the patched path."""
    model = MAKERS[family]()
    own = {}
    cases = [(name, mask) for maker, name, mask in CASES if maker == family]
    for name, mask in cases:
        own[name, mask] = model(**arguments(model, name, mask))
    fast = bound_family(dllm_fast.patch(model))
    calls, hidden = [], fast.hidden
    fast.hidden = lambda *args, **options: calls.append(1) or hidden(*args, **options)
    for name, mask in cases:
        calls.clear()
        close(model(**arguments(model, name, mask)), own[name, mask])
        plain = name in ("nothing", "dict", "no-hidden") and mask not in ("holes", "4d")
        assert len(calls) == plain, (name, mask)


def arguments(model, name, mask):
    asked = dict({**ASKED, **MODERNBERT}[name])
    if "inputs_embeds" in asked:
        asked["inputs_embeds"] = model.get_input_embeddings()(IDS)
    else:
        asked["input_ids"] = IDS
    return {**asked, "attention_mask": MASKS[mask]}


@torch.no_grad()
@pytest.mark.parametrize(
    "field,value", [("output_hidden_states", True), ("output_attentions", True), ("return_dict", False)]
)
@pytest.mark.parametrize("family", MAKERS)
def test_what_the_config_asks_for_is_answered(family, field, value):
    """An option set on the config, before or after patching, acts like an argument."""
    changes = {"attn_implementation": "eager"} if family == "modernbert" else {}
    model = MAKERS[family]() if not changes else make_modernbert(**changes)
    dllm_fast.patch(model)
    setattr(model.config, "_output_attentions" if field == "output_attentions" else field, value)
    if field == "output_attentions" and family != "modernbert":
        with pytest.raises(ValueError, match="does not take output_attentions"):
            model(IDS)
        return
    if field == "return_dict" and family == "modernbert":  # transformers' own forward cannot do it, in 5.17
        assert not hasattr(answer(model), "logits")
        return
    got = model(IDS, attention_mask=PADDED)
    dllm_fast.unpatch(model)
    own = model(IDS, attention_mask=PADDED)
    close(got, own)
    assert isinstance(own, tuple) if field == "return_dict" else len(own) == 2
    if field == "output_hidden_states":
        layers = model.config.num_hidden_layers
        assert len(got.hidden_states) == layers + 1 and got.hidden_states[0].shape == (3, 24, 64)


@torch.no_grad()
@pytest.mark.parametrize("family", MAKERS)
def test_arguments_by_position_are_the_models_own(family):
    model = MAKERS[family]()
    names = list(inspect.signature(dllm_fast.patch(model).forward).parameters)
    assert names[:2] == ["input_ids", "attention_mask"]
    close(model(IDS, PADDED, None), model(input_ids=IDS, attention_mask=PADDED))
    with pytest.raises(TypeError):
        model(IDS, PADDED, input_ids=IDS)
    with pytest.raises(TypeError):
        model(*[IDS] * 40)


def answer(model):
    try:
        return model(IDS)
    except AttributeError as error:
        return error


@torch.no_grad()
def test_another_order_of_arguments_is_kept(llada):
    """The published class takes ``inputs_embeds`` before the mask."""

    class Published(type(llada)):
        def forward(self, input_ids=None, inputs_embeds=None, attention_mask=None):
            return super().forward(input_ids, attention_mask, inputs_embeds)

    llada.__class__ = Published
    own = llada(None, llada.get_input_embeddings()(IDS), PADDED).logits
    dllm_fast.patch(llada)
    torch.testing.assert_close(llada(IDS, None, PADDED).logits, own, atol=1e-5, rtol=1e-4)
    assert torch.equal(llada(None, llada.get_input_embeddings()(IDS), PADDED).logits, own)


@torch.no_grad()
def test_hidden_states_are_what_the_layers_saw(llada):
    seen = []
    for block in llada.model.transformer.blocks:
        block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    out = llada(IDS, output_hidden_states=True)
    assert all(torch.equal(state, x) for state, x in zip(out.hidden_states, seen))
    assert torch.equal(llada.model.transformer.ff_out(out.hidden_states[-1]), out.logits)


def test_llada_takes_ids_or_embeddings(llada):
    for both in ({}, {"input_ids": IDS, "inputs_embeds": torch.zeros(3, 24, 64)}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            llada(**both)
