"""Small random models of transformers that run their own forward, and that forward as `plain_loop` wants it."""

import plain_loop
import pytest
import torch
import transformers
from e4m3 import nearest
from needs import NO_BACKEND
from tiny import EOS, MAKERS, MASK, SEED, VOCAB
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from dllm_fast import backend
from dllm_fast.families import gpt

SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
SIZES |= {"vocab_size": VOCAB, "max_position_embeddings": 512, "pad_token_id": EOS, "initializer_range": 0.25}
SIZES |= {"bos_token_id": EOS, "eos_token_id": EOS}
DROP = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
GROUPED = {**SIZES, "num_key_value_heads": 2}
GPT2 = {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 512, "vocab_size": VOCAB, "initializer_range": 0.25}
GPT2 |= {"bos_token_id": EOS, "eos_token_id": EOS}
MODELS = {
    "bert": ("BertForMaskedLM", "BertConfig", {**SIZES, **DROP}),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", {**SIZES, **DROP, "pad_token_id": 1, "type_vocab_size": 1}),
    "eurobert": ("EuroBertForMaskedLM", "EuroBertConfig", {**GROUPED, "mask_token_id": MASK}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 16}),
    "qwen2-shifted": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),  # Dream's architecture
    "gemma2": (
        "Gemma2ForCausalLM", "Gemma2Config",
        {**GROUPED, "head_dim": 16, "sliding_window": 9, "query_pre_attn_scalar": 40, "attn_logit_softcapping": None,
         "final_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "Gemma3ForCausalLM", "Gemma3TextConfig",
        {**GROUPED, "head_dim": 16, "sliding_window": 9, "query_pre_attn_scalar": 40,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
}  # fmt: skip
CAUSAL = {"gpt2", "llama", "qwen3", "qwen2-shifted", "gemma2", "gemma3"}
SHIFTED = {"qwen2-shifted", "gpt2-shifted"}
OTHERS = [*MODELS, "gpt2-shifted"]
REMEMBERING = "remembering"


def make(name: str, bidirectional: bool = True):
    torch.manual_seed(SEED)
    if name == "gpt2-shifted":
        ids = {"vocab_size": VOCAB, "eos_token_id": EOS, "mask_token_id": MASK}
        model = gpt.new(48, 4, 3, 64, 512, True, **ids)
        model.config.shifted = True
    else:
        cls, config, fields = MODELS[name]
        model = getattr(transformers, cls)(getattr(transformers, config)(**fields))
    for name_, parameter in model.named_parameters():
        if name_.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    model.config.mask_token_id = MASK
    if bidirectional and name in CAUSAL:
        model.config.is_causal = False
    if name in SHIFTED:
        model.config.shifted = True
    return model.eval()


def made(name: str):
    """One of these, or of `tiny`."""
    if name in MAKERS:
        return MAKERS[name]()
    if not backend.is_available():
        pytest.skip(NO_BACKEND)
    return make(name)


def moved(logits: torch.Tensor) -> torch.Tensor:
    """[..., L, V] of a shifted model: each from its left neighbour, the first from itself."""
    return torch.cat((logits[..., :1, :], logits[..., :-1, :]), -2)


class OwnMemory(plain_loop.Memory):
    """The model's own forward of some positions. Its attention is ours to define: it remembers keys and values."""

    now: tuple | None = None  # the memory, the positions, and those seen, while a forward runs

    def logits(self, ids: torch.Tensor, positions: list[int], seen: list[int]) -> torch.Tensor:
        model, at = self.family.model, torch.tensor(positions)
        config = model.config
        before, config._attn_implementation_internal = config._attn_implementation, REMEMBERING
        OwnMemory.now, self.layer = (self, at, torch.tensor(seen)), 0
        try:
            own = model(input_ids=ids[at][None], position_ids=at[None] + self.family.offset).logits[0]
        finally:
            config._attn_implementation_internal, OwnMemory.now = before, None
        if type(model).__name__ == "BidirectionalGPT2LMHeadModel":  # it moves its logits: back again
            own = torch.cat((own[1:], own[-1:])) if self.family.shifted else own
        return own


def remember(module, query, key, value, attention_mask, scaling=None, **kwargs):
    memory, at, seen = OwnMemory.now
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [N, heads, D]
    memory.keys[memory.layer, at], memory.values[memory.layer, at] = (
        (nearest(k), nearest(v)) if memory.rounded else (k, v)
    )
    q = q if scaling is None else q * scaling * q.shape[-1] ** 0.5
    out = memory.attend(memory.layer, q, at, seen)
    memory.layer += 1
    return out[None], None


AttentionInterface.register(REMEMBERING, remember)
AttentionMaskInterface.register(REMEMBERING, lambda **kwargs: None)
