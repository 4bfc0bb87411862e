"""The native LLaDA: every published config field is honoured or refused by name; the vocabulary can be resized."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import MASK, VOCAB, make_llada, make_modernbert
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PretrainedConfig

import dllm_fast
from dllm_fast import LLaDAConfig, LLaDAModelLM
from dllm_fast.patch import bound_family

MAKERS = {
    "llada": make_llada,
    "tied": lambda: make_llada(weight_tying=True),
    "modernbert": make_modernbert,
}
REFUSED = {
    "block_type": "sequential",
    "layer_norm_type": "gemma_rms",
    "activation_type": "swiglu",
    "rope": False,
    "alibi": True,
    "include_bias": True,
    "include_qkv_bias": True,
    "attention_layer_norm": True,
    "input_emb_norm": True,
    "scale_logits": True,
    "rope_full_precision": False,
    "bias_for_layer_norm": True,
    "layer_norm_with_affine": False,
    "block_group_size": 2,
}


def rewrite(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("field", REFUSED)
def test_an_architecture_that_was_never_published_is_refused(tmp_path, llada, field):
    value = REFUSED[field]
    with pytest.raises(ValueError, match=f"{field}={value!r} is not supported"):
        LLaDAConfig(**{field: value})
    llada.save_pretrained(tmp_path)
    rewrite(tmp_path, **{field: value})
    for load in (dllm_fast.from_pretrained, LLaDAModelLM.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(ValueError, match=f"{field}={value!r} is not supported"):
            load(tmp_path)
    setattr(llada.config, field, value)
    with pytest.raises(ValueError, match=f"{field}={value!r} is not supported"):
        dllm_fast.patch(llada)


def test_none_stands_for_the_published_default():
    config = LLaDAConfig(**dict.fromkeys(["bias_for_layer_norm", "include_qkv_bias", "n_kv_heads", "embedding_size"]))
    assert (config.n_kv_heads, config.embedding_size) == (32, 126464)


@torch.no_grad()
def test_the_mlps_width_may_be_a_ratio(tmp_path, ids):
    model = make_llada(mlp_hidden_size=None, mlp_ratio=3)
    assert model.model.transformer.blocks[0].ff_proj.weight.shape == (192, 64)
    model.save_pretrained(tmp_path)
    own = model(ids).logits
    rewrite(tmp_path, mlp_hidden_size=None)
    torch.testing.assert_close(dllm_fast.from_pretrained(tmp_path)(ids).logits, own, atol=1e-5, rtol=1e-4)
    rewrite(tmp_path, mlp_ratio=4)
    with pytest.raises((ValueError, RuntimeError), match=r"mismatch|size"):
        dllm_fast.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "given,multi,heads", [(None, True, 1), (None, False, 4), (None, None, 4), (2, None, 2), (1, True, 1)]
)
def test_the_older_name_of_grouped_heads(ids, given, multi, heads):
    model = make_llada(n_kv_heads=given, multi_query_attention=multi)
    assert model.config.n_kv_heads == heads and bound_family(dllm_fast.patch(model)).kv_heads == heads
    assert model.model.transformer.blocks[0].k_proj.weight.shape == (16 * heads, 64)
    with pytest.raises(ValueError, match="n_kv_heads=2 contradicts multi_query_attention=True"):
        make_llada(n_kv_heads=2, multi_query_attention=True)


@pytest.mark.parametrize("field", ["attention_dropout", "residual_dropout", "embedding_dropout"])
def test_dropout_acts_in_training_alone(ids, field):
    model, without = make_llada(**{field: 0.5}), make_llada()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, without(ids).logits)
        model.train()
        torch.manual_seed(0)
        first = model(ids).logits
        assert not torch.allclose(first, model(ids).logits, atol=1e-3)
        torch.manual_seed(0)
        assert torch.equal(dllm_fast.patch(model)(ids).logits, first)


@pytest.mark.parametrize("name", ["attn_norm.bias", "q_proj.bias", "rotary_emb.scale"])
def test_a_tensor_that_the_config_has_no_place_for_is_an_error(tmp_path, llada, name):
    llada.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = f"model.transformer.blocks.1.{name}"
    tensors[name] = torch.ones(64)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=f"1 tensors that do not belong to config.json's model, the first of them {name}"
    ):
        dllm_fast.from_pretrained(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
@pytest.mark.parametrize("words", [VOCAB + 3, 128, 90])
@pytest.mark.parametrize("family", MAKERS)
def test_a_resized_vocabulary_is_followed(tmp_path, ids, family, words, patched):
    """Larger and smaller: logits, `generate`, and what is saved."""
    model, ids = MAKERS[family](), ids % 80
    before = model(ids).logits
    if patched:
        dllm_fast.patch(model)
    model.resize_token_embeddings(words, mean_resizing=False)
    logits = model(ids).logits
    kept = min(words, VOCAB)
    assert logits.shape[-1] == model.config.vocab_size == words
    torch.testing.assert_close(logits[..., :kept], before[..., :kept], atol=1e-5, rtol=1e-4)
    dllm_fast.patch(model)
    assert bound_family(model).vocab_size == words
    options = {"gen_length": 8, "block_length": 8, "cache": "none"}
    if words > MASK:
        tokens = dllm_fast.generate(model, ids, **options).sequences
        dllm_fast.generate(model, torch.full_like(ids, words - 1), **options)
        with pytest.raises(ValueError, match=f"id {words} is outside the vocabulary of {words}"):
            dllm_fast.generate(model, torch.full_like(ids, words), **options)
    else:
        with pytest.raises(ValueError, match=f"mask_id={MASK} is not an id of the vocabulary of {words}"):
            dllm_fast.generate(model, ids, **options)
        model.config.pad_token_id = 0  # ModernBERT cannot be built with an id outside the vocabulary
        tokens = dllm_fast.generate(model, ids, mask_id=words - 1, **options).sequences
    model.save_pretrained(tmp_path)
    loaded = dllm_fast.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(ids).logits, logits, atol=1e-5, rtol=1e-4)
    assert torch.equal(dllm_fast.generate(loaded, ids, mask_id=min(MASK, words - 1), **options).sequences, tokens)
    if family != "modernbert":
        assert loaded.config.embedding_size == words
        assert (loaded.get_output_embeddings() is loaded.get_input_embeddings()) == (family == "tied")


@torch.no_grad()
def test_a_vocabulary_padded_to_a_multiple(tmp_path, ids):
    model = make_llada()
    model.resize_token_embeddings(VOCAB, pad_to_multiple_of=64)
    assert model.config.embedding_size == model(ids).logits.shape[-1] == 128
    model.save_pretrained(tmp_path)
    assert LLaDAModelLM.from_pretrained(tmp_path)(ids).logits.shape[-1] == 128


class Published(PretrainedConfig):
    """Like LLaDA's published file: accepts any field, and registers the name on import."""

    model_type = "llada"


@pytest.fixture
def taken():
    AutoConfig.register("llada", Published, exist_ok=True)
    yield
    dllm_fast.families.native.register()


@pytest.mark.usefixtures("taken")
def test_a_native_load_is_native_whoever_has_the_name(tmp_path, llada, ids):
    assert AutoConfig.for_model("llada").__class__ is Published
    llada.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["n_kv_heads"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    for name in (tmp_path, "llada-steps"):
        model = dllm_fast.from_pretrained(name)
        assert type(model) is LLaDAModelLM and type(model.config) is LLaDAConfig
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["n_kv_heads"] == 4
    assert type(dllm_fast.from_pretrained(tmp_path / "again").config) is LLaDAConfig


def test_the_names_are_ours_after_a_remote_load(tmp_path, llada, taken):
    """`from_pretrained` restores the names; so does `register`."""
    dllm_fast.families.native.register()
    llada.save_pretrained(tmp_path)
    for auto in (AutoModel, AutoModelForMaskedLM):
        assert type(auto.from_pretrained(tmp_path)) is LLaDAModelLM
    assert type(AutoConfig.from_pretrained(tmp_path)) is LLaDAConfig
