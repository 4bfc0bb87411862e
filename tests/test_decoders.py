"""SDAR, LLaDA-MoE and LLaDA2: published names, the published forwards' logits, their samplers' tokens, and loading."""

import functools
import json
import re

import plain_blocks
import plain_decoders
import plain_loop
import pytest
import torch
import transformers
from needs import missing, needs_backend, needs_triton
from test_skip_committed import check_plain_loop
from tiny import EOS, MASK, SEED, VOCAB

import dllm_fast
from dllm_fast import Threshold
from dllm_fast.families import decoders, linears
from dllm_fast.families.native_decoders import (
    LLaDA2MoeConfig,
    LLaDA2MoeModelLM,
    LLaDAMoEConfig,
    LLaDAMoEModelLM,
    SDARConfig,
    SDARForCausalLM,
)
from dllm_fast.patch import bound_family

BLOCK = 4
SIZES = {"vocab_size": VOCAB, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 16}
SIZES |= {"max_position_embeddings": 512, "initializer_range": 0.25, "mask_token_id": MASK}
SIZES |= {"eos_token_id": EOS, "pad_token_id": EOS}
GROUPED = {**SIZES, "num_key_value_heads": 2, "block_causal": BLOCK}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3}
LLADA2 = {**GROUPED, **EXPERTS, "intermediate_size": 80, "moe_intermediate_size": 24, "n_group": 4, "topk_group": 2}
MOE = {**SIZES, **EXPERTS, "expert_intermediate_size": 24, "dense_intermediate_size": 80}
MODELS = {
    "sdar": (SDARForCausalLM, SDARConfig, {**GROUPED, "intermediate_size": 80}),
    "sdar-tied": (SDARForCausalLM, SDARConfig, {**GROUPED, "intermediate_size": 80, "tie_word_embeddings": True}),
    "lladamoe": (LLaDAMoEModelLM, LLaDAMoEConfig, MOE),
    "lladamoe-bias-shared": (
        LLaDAMoEModelLM, LLaDAMoEConfig,
        {**MOE, "moe_router_enable_expert_bias": True, "shared_expert_intermediate_size": 40, "qk_layernorm": False,
         "moe_layer_freq": [0, 1, 1], "partial_rotary_factor": 0.5, "num_key_value_heads": 2},
    ),
    "llada2": (LLaDA2MoeModelLM, LLaDA2MoeConfig, LLADA2),
    "llada2-biases": (
        LLaDA2MoeModelLM, LLaDA2MoeConfig,
        {**LLADA2, "use_bias": True, "use_qkv_bias": True, "num_shared_experts": None, "use_qk_norm": False,
         "partial_rotary_factor": 0.25, "num_experts_per_tok": 1},
    ),
}  # fmt: skip
CAUSAL = [name for name in MODELS if not name.startswith("lladamoe")]
IMPLS = ["torch", *([] if missing("cpp") else ["cpp"])]


def make(name: str):
    cls, config, fields = MODELS[name]
    torch.manual_seed(SEED)
    model = cls(config(**fields)).eval()
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "norm" in path:
            torch.nn.init.normal_(tensor, 1.0, 0.2)
        elif path.endswith("bias"):
            torch.nn.init.normal_(tensor, std=0.2)
    return model


def plain_logits(model):
    weights = dict(model.state_dict())
    return functools.partial(plain_decoders.logits, model.config, weights)


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, EOS, (length,), generator=torch.Generator().manual_seed(100 * seed + length))


NORMS = "input_layernorm", "post_attention_layernorm"
GATED = "gate_proj", "up_proj", "down_proj"


def names_of(layer_of, embedding: str) -> set[str]:
    found = {f"model.{embedding}.weight", "model.norm.weight", "lm_head.weight"}
    for number in range(3):
        found |= {f"model.layers.{number}.{name}" for name in layer_of(number)}
    return found


def split_attention(number: int) -> set[str]:
    return {f"self_attn.{n}.weight" for n in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")} | {
        f"{norm}.weight" for norm in NORMS
    }


def llada2_layer(number: int) -> set[str]:
    names = {f"attention.{n}.weight" for n in ("query_key_value", "dense", "query_layernorm", "key_layernorm")}
    names |= {f"{norm}.weight" for norm in NORMS}
    if number == 0:
        return names | {f"mlp.{n}.weight" for n in GATED}
    parts = [*(f"experts.{e}" for e in range(8)), "shared_experts"]
    return names | {f"mlp.{p}.{n}.weight" for p in parts for n in GATED} | {"mlp.gate.weight", "mlp.gate.expert_bias"}


def lladamoe_layer(number: int) -> set[str]:
    names = {f"mlp.experts.{e}.{n}.weight" for e in range(8) for n in GATED}
    return names | split_attention(number) | {"mlp.gate.weight"}


def test_state_dicts_have_the_published_names():
    dense = lambda number: split_attention(number) | {f"mlp.{n}.weight" for n in GATED}  # noqa: E731
    assert set(make("sdar").state_dict()) == names_of(dense, "embed_tokens")
    assert set(make("lladamoe").state_dict()) == names_of(lladamoe_layer, "embed_tokens")
    assert set(make("llada2").state_dict()) == names_of(llada2_layer, "word_embeddings")


@pytest.mark.parametrize(
    ("cls", "config", "billions"),
    [
        (SDARForCausalLM, SDARConfig, 8.19),
        (LLaDAMoEModelLM, LLaDAMoEConfig, 7.36),
        (LLaDA2MoeModelLM, LLaDA2MoeConfig, 16.26),
    ],
    ids=["SDAR-8B", "LLaDA-MoE-7B", "LLaDA2-mini"],
)
def test_defaults_are_a_published_models(cls, config, billions):
    with torch.device("meta"):
        model = cls(config())
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 2) == billions


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_the_published_forward(name, dtype):
    model, ids = make(name).to(dtype), prompt(19)
    block = model.config.block_causal
    seen = None if block is None else plain_blocks.causal_blocks(19, block)
    expected = plain_decoders.logits(
        model.config, {name: tensor.double() for name, tensor in model.state_dict().items()}, ids, seen
    )
    # Norms and LLaDA2's router are in fp32 in any dtype, as published.
    allowed = 2e-5 * expected.abs().max()
    assert (model(ids[None]).logits[0] - expected).abs().max() <= allowed
    for impl in IMPLS if dtype == torch.float32 else IMPLS[:1]:
        with dllm_fast.patched(model, impl=impl):
            assert (model(ids[None]).logits[0] - expected).abs().max() <= allowed


@torch.no_grad()
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", MODELS)
def test_a_padded_row_has_its_own_logits(name, impl, ids, padded):
    model = make(name)
    expected = [model(row[mask.bool()][None]).logits[0] for row, mask in zip(ids, padded)]
    own = model(ids, attention_mask=padded).logits
    found = dllm_fast.patch(model, impl=impl)(ids, attention_mask=padded).logits
    for row, mask in enumerate(padded.bool()):
        for logits in (own, found):
            torch.testing.assert_close(logits[row, mask], expected[row], atol=5e-5, rtol=1e-4)


@needs_backend
@torch.no_grad()
def test_sdar_is_qwen3_under_its_mask():
    model, ids = make("sdar"), prompt(19)
    fields = {**GROUPED, "intermediate_size": 80, "rope_theta": 1e6}
    own = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**fields)).eval()
    own.load_state_dict(model.state_dict())
    mask = plain_blocks.causal_blocks(19, BLOCK)[None, None]
    torch.testing.assert_close(model(ids[None]).logits, own(ids[None], attention_mask=mask).logits)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CAUSAL)
def test_tokens_of_the_published_sampler(name, impl):
    model = make(name) if impl == "cpp" else make(name).double()
    prompts = [prompt(n) for n in (2, 8, 13)]
    plain = plain_logits(model)
    expected = [plain_blocks.run(plain, ids, 10, BLOCK, MASK, plain_blocks.dynamic(0.1)) for ids in prompts]
    dllm_fast.patch(model, impl=impl)
    found = dllm_fast.generate_many(model, prompts, batch_size=2, gen_length=10, schedule=Threshold(0.1))
    for one, plain in zip(found, expected, strict=True):
        assert torch.equal(one.sequence, plain.ids) and one.nfe == plain.steps


class Normed(plain_loop.Memory):
    """With a norm of each head, and part of it rotated."""

    def normed(self, block, q, k):
        if (norms := block.attention_part.head_norms) is not None:
            q, k = (norm(x) for norm, x in zip(norms, (q, k)))
        return q, k


@pytest.mark.parametrize("seed", [pytest.param(n, marks=() if n < 3 else pytest.mark.long) for n in range(6)])
def test_bidirectional_experts_with_every_option(seed):
    """LLaDA-MoE's tokens by the plain loop: caches, refreshes, schedules, batches."""
    check_plain_loop("lladamoe", seed, functools.partial(make, "lladamoe"), Normed)


@pytest.fixture
def fusing(monkeypatch):
    """Weights in one buffer on a CPU in fp32 too, for what grouped matmuls read."""
    monkeypatch.setattr(linears, "pays", lambda weight: True)


@needs_triton
@pytest.mark.usefixtures("fusing", "strict_interpreter")
@pytest.mark.parametrize("name", ["lladamoe", "llada2"])
def test_triton_gives_the_tokens_of_pytorch(name, monkeypatch):
    ids = prompt(4)[None]
    options = {"gen_length": 8, "block_length": BLOCK, "schedule": Threshold(0.05)}
    expected = dllm_fast.generate(dllm_fast.patch(make(name), impl="torch"), ids, **options).sequences
    calls = []
    experts = decoders.ops.experts
    monkeypatch.setattr(decoders.ops, "experts", lambda *args, **more: calls.append(1) or experts(*args, **more))
    assert torch.equal(
        dllm_fast.generate(dllm_fast.patch(make(name), impl="triton"), ids, **options).sequences, expected
    )
    assert calls


@torch.no_grad()
@pytest.mark.usefixtures("fusing")
def test_fused_experts_stay_parameters():
    """Moved into one buffer, and back."""
    model, twin = make("llada2"), make("llada2")
    dllm_fast.patch(model, impl="torch")
    gate_up, down = map(linears.fused, decoders.experts_of(model.model.layers[1].mlp))
    assert gate_up.shape == (8 * 48, 48) and down.shape == (8 * 48, 24)
    dllm_fast.unpatch(model)
    for (name, tensor), other in zip(model.state_dict().items(), twin.state_dict().values()):
        assert torch.equal(tensor, other), name


def test_a_hook_on_a_router_is_not_left_out():
    model = make("llada2")
    model.model.layers[1].mlp.gate.register_forward_hook(lambda *args: None)
    dllm_fast.patch(model)
    with pytest.raises(ValueError, match=re.escape("model: model.layers.1.mlp.gate has a forward hook")):
        dllm_fast.generate(model, prompt(4)[None], gen_length=4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["sdar", "sdar-tied", "lladamoe-bias-shared", "llada2"])
def test_folders_load_without_remote_code(name, tmp_path):
    model, ids = make(name), prompt(9)[None]
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    if name.startswith("lladamoe"):  # as published
        fields |= {"model_type": "llada", "architectures": ["LLaDAMoEModelLM"]}
    fields["auto_map"] = {"AutoModel": "modeling.Other", "AutoModelForCausalLM": "modeling.Other"}
    file.write_text(json.dumps(fields))
    loaded = dllm_fast.from_pretrained(tmp_path)
    assert type(loaded) is type(model) and bound_family(loaded).block == model.config.block_causal
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=5e-5, rtol=1e-4)
    assert loaded.generate(ids, max_new_tokens=4, block_length=BLOCK).sequences.shape == (1, 13)
    if name.startswith("sdar"):
        assert dllm_fast.from_pretrained(tmp_path, weights="int4")(ids).logits.isfinite().all()
    else:
        with pytest.raises(ValueError, match="weights='fp8': the model's experts are not rounded"):
            dllm_fast.from_pretrained(tmp_path, weights="fp8")
        with pytest.raises(ValueError, match="weights='int4': the model's experts are not rounded"):
            dllm_fast.patch(model, weights="int4")


def test_likelihoods_and_training_are_not_for_block_causal_models(tmp_path):
    from transformers import AutoTokenizer

    from dllm_fast.evaluate.likelihood import log_likelihoods

    pytest.importorskip("accelerate", reason="training needs it")
    from dllm_fast.train.models import pretrained

    model = make("sdar")
    with pytest.raises(ValueError, match="model: it is block-causal"):
        list(log_likelihoods(dllm_fast.patch(model), [([1, 2], [3])]))
    dllm_fast.unpatch(model).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(dllm_fast.model_path("llada-steps")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is block-causal, and only bidirectional models are trained here"):
        pretrained(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (SDARConfig, {"attention_bias": True}, "attention_bias=True is not supported, only False"),
        (SDARConfig, {"num_key_value_heads": 3}, "num_attention_heads=32 is not a multiple of num_key_value_heads=3"),
        (LLaDAMoEConfig, {"moe_router_score_function": "sigmoid"}, "moe_router_score_function='sigmoid'"),
        (LLaDA2MoeConfig, {"score_function": "softmax"}, "score_function='softmax' is not supported, only 'sigmoid'"),
        (LLaDA2MoeConfig, {"rope_scaling": {"type": "yarn"}}, "rope_scaling={'type': 'yarn'}"),
        (LLaDA2MoeConfig, {"rope_parameters": {"rope_type": "yarn"}}, "only rope_type 'default'"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_was_never_published_is_refused(config, fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(**fields)


def test_block_lengths_of_published_configs():
    assert SDARConfig().block_causal == 4 and SDARConfig(block_size=16).block_causal == 16
    assert LLaDA2MoeConfig().block_causal == 32 and LLaDAMoEConfig().block_causal is None


def test_a_forward_refuses_what_it_does_not_have():
    model, ids = make("llada2"), prompt(4)[None]
    with pytest.raises(ValueError, match=r"LLaDA2MoeModelLM.forward does not take labels"):
        model(ids, labels=ids)
    with pytest.raises(ValueError, match=re.escape("attention_mask: [1, 1, 4, 4] is not [B, L]")):
        model(ids, attention_mask=torch.ones(1, 1, 4, 4))
