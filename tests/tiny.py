"""Small random models of both families.

DLLM_TEST_SEED changes the weights: a test that passes with only one seed passes by luck.
"""

import os

import torch
from transformers import ModernBertConfig, ModernBertForMaskedLM

from dllm_fast import LLaDAConfig, LLaDAModelLM

VOCAB, MASK, EOS = 101, 100, 99
SEED = int(os.environ.get("DLLM_TEST_SEED", "0"))


def make_llada(seed: int = 0, **changes) -> LLaDAModelLM:
    torch.manual_seed(SEED + seed)
    sizes = {"d_model": 64, "n_heads": 4, "n_layers": 3, "mlp_hidden_size": 96, "max_sequence_length": 512}
    ids = {"vocab_size": VOCAB, "mask_token_id": MASK, "eos_token_id": EOS, "pad_token_id": EOS}
    return LLaDAModelLM(LLaDAConfig(**{**sizes, **ids, **changes})).eval()


def make_modernbert(seed: int = 0, **changes) -> ModernBertForMaskedLM:
    torch.manual_seed(SEED + seed)
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 5, "intermediate_size": 96}
    ids = {name: EOS for name in ("pad_token_id", "eos_token_id", "bos_token_id", "cls_token_id", "sep_token_id")}
    more = {"vocab_size": VOCAB, "local_attention": 16, "max_position_embeddings": 512, "initializer_range": 0.15}
    model = ModernBertForMaskedLM(ModernBertConfig(**{**sizes, **ids, **more, **changes})).eval()
    model.config.mask_token_id = MASK
    torch.nn.init.normal_(model.decoder.bias)
    return model


MAKERS = {
    "llada": make_llada,
    "llada-gqa": lambda: make_llada(n_kv_heads=2),
    "llada-tied": lambda: make_llada(weight_tying=True, n_kv_heads=1),
    "modernbert": make_modernbert,
    "modernbert-bias": lambda: make_modernbert(
        attention_bias=True, mlp_bias=True, norm_bias=True, classifier_bias=True
    ),
}
