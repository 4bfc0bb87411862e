"""``attn_implementation="dllm_fast"`` in transformers' own models: their results, from this package's attention."""

import functools

import pytest
import torch
import transformers
from needs import needs_backend, needs_cpp, needs_triton

from dllm_fast import backend, ops

pytestmark = needs_backend
SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 60}
SIZES |= {"max_position_embeddings": 128, "pad_token_id": 0}
DROP = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MODELS = {
    "bert": ("BertForMaskedLM", transformers.BertConfig, {**SIZES, **DROP}),
    "roberta": ("RobertaForTokenClassification", transformers.RobertaConfig, {**SIZES, **DROP}),
    "modernbert": (
        "ModernBertForSequenceClassification", transformers.ModernBertConfig,
        {**SIZES, "local_attention": 8, "global_attn_every_n_layers": 2, "eos_token_id": 1, "bos_token_id": 1,
         "cls_token_id": 1, "sep_token_id": 1},
    ),
}  # fmt: skip
if backend.is_available():
    MODELS["eurobert"] = ("EuroBertForMaskedLM", transformers.EuroBertConfig, {**SIZES, "num_key_value_heads": 2})
CAUSAL = ("LlamaForCausalLM", transformers.LlamaConfig, {**SIZES, "num_key_value_heads": 2})


def make(name: str, implementation: str, dtype=torch.float64):
    cls, config, fields = MODELS.get(name, CAUSAL)
    torch.manual_seed(0)
    model = getattr(transformers, cls)(config(**fields)).eval().to(dtype)
    model.set_attn_implementation(implementation)
    return model


def inputs(padding: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 60, (3, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, length in enumerate((40, 23, 7)):
        if padding == "right":
            mask[row, length:] = 0
        elif padding == "left":
            mask[row, : 40 - length] = 0
        elif padding == "holes":
            mask[row, 5:length:7] = 0
    return {"input_ids": ids.where(mask.bool(), 0), **({} if padding == "absent" else {"attention_mask": mask})}


@pytest.fixture
def calls(monkeypatch) -> dict[str, int]:
    """How often attention was the kernels', and sdpa."""
    count = {"ours": 0, "sdpa": 0}

    def counted(name, function, *args, **kwargs):
        count[name] += 1
        return function(*args, **kwargs)

    monkeypatch.setattr(backend.ops, "attention", functools.partial(counted, "ours", ops.attention))
    sdpa = functools.partial(counted, "sdpa", backend.sdpa_attention_forward)
    monkeypatch.setattr(backend, "sdpa_attention_forward", sdpa)
    return count


def agree(found, expected, given: dict) -> None:
    """Where tokens are: what padding gives means nothing."""
    there = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
    if found.dim() == 2:
        there = torch.ones(len(found), dtype=torch.bool)
    scale = expected[there].abs().max()
    assert (found[there].double() - expected[there]).abs().max() <= 1e-5 * scale


@needs_cpp
@pytest.mark.parametrize("padding", ["absent", "none", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_a_models_own_results(name, padding, calls):
    given = inputs(padding)
    with torch.no_grad():
        expected = make(name, "sdpa")(**given).logits
        found = make(name, "dllm_fast", torch.float32)(**given).logits
    agree(found, expected, given)
    assert calls == {"ours": 3, "sdpa": 0}


@needs_triton
@pytest.mark.usefixtures("strict_interpreter")
@pytest.mark.parametrize(("name", "padding"), [("modernbert", "left"), ("eurobert", "none")])
def test_a_models_own_results_in_tritons_kernels(name, padding, calls, monkeypatch):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        monkeypatch.setattr(ops, "auto", lambda device, dtype: ("triton", None))
    given = {key: value.to(device) for key, value in inputs(padding).items()}
    with torch.no_grad():
        expected = make(name, "sdpa").to(device)(**given).logits
        found = make(name, "dllm_fast", torch.float32).to(device)(**given).logits
    agree(found, expected, given)
    assert calls == {"ours": 3, "sdpa": 0}


@needs_cpp
def test_it_is_asked_for_by_name(tmp_path, calls):
    make("bert", "sdpa", torch.float32).save_pretrained(tmp_path)
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path, attn_implementation="dllm_fast").eval()
    given = inputs("right")
    with torch.no_grad():
        agree(model(**given).logits, make("bert", "sdpa")(**given).logits, given)
    assert calls == {"ours": 3, "sdpa": 0}


@pytest.mark.parametrize("name", [*MODELS, "llama"])
@pytest.mark.parametrize("padding", ["absent", "holes", "left"])
def test_what_is_no_range_goes_to_sdpa(name, padding, calls):
    """In fp64, for which there are no kernels, and where the mask is causal or has holes."""
    given = inputs(padding)
    with torch.no_grad():
        expected = make(name, "sdpa")(**given).logits
        found = make(name, "dllm_fast")(**given).logits
    agree(found, expected, given)
    assert calls == {"ours": 0, "sdpa": 3}


@needs_cpp
@pytest.mark.parametrize("padding", ["absent", "left"])
def test_a_causal_model_is_served_by_sdpa_in_fp32_too(padding, calls):
    given = inputs(padding)
    with torch.no_grad():
        found = make("llama", "dllm_fast", torch.float32)(**given, use_cache=False).logits
        agree(found, make("llama", "sdpa")(**given).logits, given)
    assert calls == {"ours": 0, "sdpa": 3}


@pytest.mark.parametrize("name", ["bert", "eurobert"])
def test_gradients_are_those_of_sdpa(name, calls):
    given = inputs("right")
    models = [make(name, implementation, torch.float32).train() for implementation in ("sdpa", "dllm_fast")]
    for model in models:
        model(**given).logits.square().mean().backward()
    assert calls == {"ours": 0, "sdpa": 3}
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-7)


def test_a_window_tells_itself_from_other_masks():
    masks = transformers.masking_utils
    window = masks.sliding_window_bidirectional_mask_function(4)
    assert backend.is_bidirectional(masks.bidirectional_mask_function, None)
    assert backend.is_bidirectional(window, 4) and not backend.is_bidirectional(window, 5)
    assert not backend.is_bidirectional(window, None)
    for other in (masks.causal_mask_function, masks.sliding_window_causal_mask_function(4), None):
        assert not backend.is_bidirectional(other, 4) and not backend.is_bidirectional(other, None)


@pytest.mark.parametrize("overlaid", ["packed", "blocks"])
@pytest.mark.parametrize("length", [3, 12])
def test_a_window_under_something_else_is_no_window(overlaid, length):
    """Neither where an index of the window is past the end, nor where the function agrees with one at each of these."""
    masks = transformers.masking_utils
    first = (torch.arange(length) >= 5).long()[None]
    function = {
        "packed": masks.and_masks(
            masks.sliding_window_bidirectional_mask_function(4), masks.packed_sequence_mask_function(first)
        ),
        "blocks": masks.or_masks(masks.sliding_window_causal_mask_function(4), masks.blockwise_overlay(-first)),
    }[overlaid]
    assert not backend.is_bidirectional(function, 4)
    given = {"batch_size": 1, "q_length": length, "kv_length": length, "local_size": 4, "mask_function": function}
    given |= {"allow_is_causal_skip": False}
    assert torch.equal(backend.mask(**given), masks.sdpa_mask(**given))


@pytest.mark.parametrize("window", [4, 4096])
def test_packed_sequences_under_a_causal_window_go_to_sdpa(window, calls):
    torch.manual_seed(0)
    config = transformers.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=window)
    model = transformers.MistralForCausalLM(config).eval()
    given = {"input_ids": torch.arange(2, 8)[None], "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    with torch.no_grad():
        model.set_attn_implementation("sdpa")
        expected = model(**given, use_cache=False).logits
        model.set_attn_implementation("dllm_fast")
        assert torch.equal(model(**given, use_cache=False).logits, expected)
    assert calls == {"ours": 0, "sdpa": 3}


@pytest.mark.parametrize("window", [None, 0, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_a_dense_mask_is_sdpas(window, padded):
    masks = transformers.masking_utils
    function = masks.bidirectional_mask_function
    if window is not None:
        function = masks.sliding_window_bidirectional_mask_function(window)
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 0]]) if padded else None
    given = {"batch_size": 2, "q_length": 4, "kv_length": 6, "q_offset": 2, "mask_function": function}
    given |= {"attention_mask": mask, "local_size": window, "allow_is_causal_skip": False}
    found, expected = backend.mask(**given), masks.sdpa_mask(**given)
    assert isinstance(found, backend.Ranges)
    dense = found.dense()
    assert torch.equal(torch.ones_like(expected) if dense is None else dense, expected.expand(2, 1, 4, 6))


@needs_cpp
def test_the_bench_compares_the_same_results():
    from bench.generation import backend as bench

    for name in bench.MODELS:
        sizes = [(1, 16, False), (3, 16, True)]
        rows = bench.measure(name, bench.TINY, sizes, 2, torch.float32, torch.device("cpu"))
        assert [(row.batch, row.padded) for row in rows] == [(1, False), (3, True)]
        assert all(row.difference < 1e-5 and len(row.times) == len(row.seconds) == 2 for row in rows)
