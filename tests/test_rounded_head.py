"""`patch(head="fp8")`: logits from an e4m3 copy of the current LM head's weight, with nothing else rounded."""

import copy
import pickle

import pytest
import torch
from needs import needs_triton
from test_rounded import load, train
from tiny import MAKERS, make_llada, make_modernbert
from torch import nn

import dllm_fast
from dllm_fast.cpu import compiled
from dllm_fast.evaluate.likelihood import log_likelihood
from dllm_fast.kernels import reference_rounded
from dllm_fast.patch import bound_family

IMPLS = [
    "torch",
    pytest.param("cpp", marks=pytest.mark.skipif(bool(compiled.missing()), reason=str(compiled.missing()))),
]


def widened(weight):
    """The weight rounded as `tests/test_rounded.py` defines it, and widened."""
    rounded, scale = reference_rounded.round_rows(weight)
    return (rounded.float() * scale).to(weight.dtype)


def rounded_twin(model):
    """A copy whose head is a separate weight, rounded and widened; its embedding is the model's."""
    twin = copy.deepcopy(model)
    if hasattr(twin, "decoder"):
        twin.decoder.weight = nn.Parameter(widened(twin.decoder.weight.detach()))
    else:
        weight = twin.model.transformer.ff_out.weight.detach()
        twin.model.transformer.ff_out = nn.Linear(*weight.shape[::-1], bias=False)
        twin.model.transformer.ff_out.weight = nn.Parameter(widened(weight))
        twin.config.weight_tying = False
    return twin


@torch.no_grad()
@pytest.mark.parametrize("impl", IMPLS)
def test_logits_are_those_of_the_rounded_head(model, impl, ids, padded):
    embedding = model.get_input_embeddings().weight
    before, own = embedding.clone(), model(ids, attention_mask=padded).logits
    expected = dllm_fast.patch(rounded_twin(model), impl)(ids, attention_mask=padded).logits
    dllm_fast.patch(model, impl, head="fp8")
    got = model(ids, attention_mask=padded).logits
    torch.testing.assert_close(got, expected, atol=2e-6 * float(expected.abs().max()), rtol=0)
    assert (got - own).abs().max() > 1e3 * (got - expected).abs().max()
    assert torch.equal(embedding, before) and model.get_input_embeddings().weight is embedding
    assert torch.equal(dllm_fast.unpatch(model)(ids, attention_mask=padded).logits, own)


SMALL = {
    "llada": lambda: make_llada(n_layers=1, d_model=32, n_heads=2, mlp_hidden_size=32),
    "llada-tied": lambda: make_llada(n_layers=1, d_model=32, n_heads=2, mlp_hidden_size=32, weight_tying=True),
    "modernbert": lambda: make_modernbert(num_hidden_layers=1, hidden_size=32, intermediate_size=32),
}
RUNS = {
    "plain": {},
    "remask": {"remask": dllm_fast.Verify(0.3), "defer_tokens": 7},
    "guided": {"temperature": 0.8, "cfg_scale": 1.5, "seed": 3, "confidence": "margin"},
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("run", list(RUNS))
@pytest.mark.parametrize("name", list(SMALL))
def test_tokens_are_those_of_the_rounded_head(name, run, impl, ids):
    model = SMALL[name]()
    twin = dllm_fast.patch(rounded_twin(model), impl)
    options = {"gen_length": 8, "block_length": 4, "schedule": dllm_fast.Uniform(4), **RUNS[run]}
    expected = dllm_fast.generate(twin, ids[:2, :6], **options).sequences
    dllm_fast.patch(model, impl, head="fp8")
    assert torch.equal(dllm_fast.generate(model, ids[:2, :6], **options).sequences, expected)


@needs_triton
def test_tokens_of_the_kernels_are_pytorchs():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = SMALL["llada-tied"]().to(device)
    ids = torch.arange(4, device=device)[None]
    options = {"gen_length": 2, "block_length": 2, "schedule": dllm_fast.Uniform(2), **RUNS["guided"]}
    expected = dllm_fast.generate(dllm_fast.patch(model, "torch", head="fp8"), ids, **options).sequences
    dllm_fast.patch(model, "triton", head="fp8")
    assert torch.equal(dllm_fast.generate(model, ids, **options).sequences, expected)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(either, dtype, ids):
    """Equal to a model whose head is the widened copy, rounded to the model's dtype."""
    model = either.to(dtype)
    expected = dllm_fast.patch(rounded_twin(model), "torch")(ids).logits
    got = dllm_fast.patch(model, "torch", head="fp8")(ids).logits
    assert got.dtype == dtype
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(got, expected, atol=4 * eps * float(expected.abs().max()), rtol=4 * eps)
    out = dllm_fast.generate(model, ids, gen_length=8, block_length=4)
    assert not (out.sequences == model.config.mask_token_id).any()


def test_likelihoods_are_those_of_the_rounded_head(either, ids):
    twin = dllm_fast.patch(rounded_twin(either))
    pair = ids[0, :6], ids[1, :4]
    own = log_likelihood(dllm_fast.patch(either), *pair, samples=4, seed=0)
    got = log_likelihood(dllm_fast.patch(either, head="fp8"), *pair, samples=4, seed=0)
    assert got == pytest.approx(log_likelihood(twin, *pair, samples=4, seed=0), rel=1e-5) and got != pytest.approx(own)


def write_data(model, ids):
    """Through ``.data``, which PyTorch's version counters miss: patching again notices it."""
    model.get_output_embeddings().weight.data.mul_(1.25)
    dllm_fast.patch(model, head="fp8")


@torch.no_grad()
@pytest.mark.parametrize("change", [train, load, write_data, lambda model, ids: model.double()])
def test_the_copy_follows_the_weight_where_it_lies(model, change, ids):
    """A CUDA graph recorded on it keeps reading the same memory."""
    with torch.inference_mode():
        dllm_fast.patch(model, head="fp8")
    before = model(ids).logits
    place = [x.data_ptr() for x in bound_family(model).head_operands() if x is not None]
    change(model, ids)
    got = model(ids).logits
    assert got.dtype == torch.float64 or not torch.allclose(got, before, atol=1e-4)
    expected = dllm_fast.patch(rounded_twin(dllm_fast.unpatch(copy.deepcopy(model))))(ids).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    matrix, bias, scale = bound_family(model).head_operands()
    assert bias is not None or place == [matrix.data_ptr(), scale.data_ptr()]


@torch.no_grad()
def test_it_comes_and_goes_with_patching(model, ids):
    own = model(ids).logits
    plain = dllm_fast.patch(model)(ids).logits
    with dllm_fast.patched(model, head="fp8"):
        rounded = model(ids).logits
        twin, pickled = copy.deepcopy(model), pickle.dumps(model)
        shallow = copy.copy(model)
    assert not torch.allclose(rounded, plain, atol=1e-4)
    assert torch.equal(model(ids).logits, plain) and torch.equal(twin(ids).logits, rounded)
    assert torch.equal(pickle.loads(pickled)(ids).logits, own)
    dllm_fast.generate(shallow, ids, gen_length=4, block_length=4)  # patches the copy like its original
    assert torch.equal(shallow(ids).logits, rounded)
    with dllm_fast.patched(twin, weights="int4"):
        assert not torch.allclose(twin(ids).logits, rounded, atol=1e-4)
    assert torch.equal(twin(ids).logits, rounded)
    dllm_fast.patch(model, weights="fp8", head="fp8")
    both = model(ids).logits
    with dllm_fast.patched(model, weights="fp8"):
        assert not torch.allclose(model(ids).logits, both, atol=1e-4)
    assert torch.equal(model(ids).logits, both)
    assert torch.equal(dllm_fast.unpatch(model)(ids).logits, own)


@torch.no_grad()
@pytest.mark.parametrize("weights", [None, "fp8", "int4"])
def test_loading_with_it_is_patching_with_it(weights, ids):
    options = {"weights": weights, "head": "fp8"}
    loaded = dllm_fast.from_pretrained("llada-gsm8k", **options)
    patched = dllm_fast.patch(dllm_fast.from_pretrained("llada-gsm8k"), **options)
    assert torch.equal(loaded(ids).logits, patched(ids).logits)


def test_what_it_takes(llada):
    """A byte per weight and four per vocabulary entry; the parameter stays in place."""
    weight = llada.get_output_embeddings().weight
    place = weight.data_ptr()
    matrix, _, scale = bound_family(dllm_fast.patch(llada, head="fp8")).head_operands()
    assert (matrix.dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert matrix.untyped_storage().nbytes() == weight.numel() and scale.untyped_storage().nbytes() == 4 * len(weight)
    assert llada.get_output_embeddings().weight is weight and weight.data_ptr() == place


def test_what_cannot_be_had_is_refused_by_name(llada, monkeypatch):
    for call in (dllm_fast.patch, dllm_fast.from_pretrained):
        with pytest.raises(ValueError, match="head='int4' is not one of None, 'fp8'"):
            call(llada if call is dllm_fast.patch else "/nowhere", head="int4")
    with pytest.raises(ValueError, match="head='int4'"), dllm_fast.patched(llada, head="int4"):
        pass
    monkeypatch.delattr(torch, "float8_e4m3fn")
    with pytest.raises(ValueError, match=r"head='fp8': PyTorch .* has no float8_e4m3fn on cpu"):
        dllm_fast.patch(llada, head="fp8")
    assert "_dllm_fast" not in llada.__dict__


def test_show_config_tells(llada, capsys):
    dllm_fast.show_config(dllm_fast.patch(llada, head="fp8"))
    assert "multiplies its own weights, and an fp8 copy of its LM head's" in capsys.readouterr().out


def test_makers_cover_ties_and_biases():
    heads = [bound_family(dllm_fast.patch(make())).head() for make in MAKERS.values()]
    assert any(bias is not None for _, bias in heads) and MAKERS["llada-tied"]().config.weight_tying
