"""ModernBERT (arXiv:2412.13663): transformers' own `ModernBertForMaskedLM`, 4.57 or 5.x."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import ModernBertConfig, ModernBertForMaskedLM, PretrainedConfig

from dllm_fast import ops
from dllm_fast.families.bypass import Calls
from dllm_fast.families.layered import Trained


class ModernBert(Trained):
    """LayerNorm, GeGLU, most layers attend within a window; a head of its own before the tied decoder."""

    model_class = ModernBertForMaskedLM
    files = (ModernBertForMaskedLM.__module__, "torch.nn.modules.normalization", "transformers.activations")
    calls = Calls(frozenset(("tok_embeddings", "Wqkv", "Wo", "Wi", "dense")), None)

    @staticmethod
    def matches(model: nn.Module) -> bool:
        return hasattr(model, "decoder")

    @staticmethod
    def repaired_buffers(model: nn.Module) -> list[tuple[nn.Module, str, torch.Tensor]]:
        return fresh_rotary(model)

    @staticmethod
    def linears(model: Any) -> Iterator[tuple[nn.Module, ...]]:
        # Each alone: `Wqkv` and `Wi` are one matrix as they come.
        for block in model.model.layers:
            for linear in (block.attn.Wqkv, block.attn.Wo, block.mlp.Wi, block.mlp.Wo):
                yield (linear,)

    @staticmethod
    def labelled(
        model: Any, input_ids: torch.Tensor | None, chosen: torch.Tensor, embeds: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, nn.Module]:
        hidden = model.model(input_ids=input_ids, inputs_embeds=embeds).last_hidden_state
        return model.head(hidden[chosen]), model.decoder

    @staticmethod
    def new(width, heads, kv_heads, layers, ffn, positions, tie, **tokens):
        ends = dict.fromkeys(("bos_token_id", "cls_token_id", "sep_token_id"), tokens["eos_token_id"])
        config = ModernBertConfig(
            hidden_size=width, num_attention_heads=heads, num_hidden_layers=layers, intermediate_size=ffn,
            max_position_embeddings=positions, **tokens, **ends,
            # At its default of 0.02 a narrow model sits for a thousand steps where it knows only word frequencies.
            initializer_range=width**-0.5,
        )  # fmt: skip
        return ModernBertForMaskedLM(config)

    def _read_config(self, config: PretrainedConfig) -> None:
        for name in ("hidden_activation", "classifier_activation"):
            if getattr(config, name) != "gelu":
                raise ValueError(f"model.config.{name}={getattr(config, name)!r} is not supported, only 'gelu'")
        self.positions = config.max_position_embeddings
        self.heads = self.kv_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.layers = config.num_hidden_layers
        self.ffn_width = config.intermediate_size
        self.eps = config.norm_eps
        # A sliding layer sees |i - j| <= local_attention // 2, whatever number its attention function is handed.
        self.windows = [config.local_attention // 2 if sliding else None for sliding in sliding_layers(config)]
        self.thetas = [rope_theta(config, window is not None) for window in self.windows]

    def _read_modules(self) -> Iterator[tuple[str, nn.Module]]:
        for name, module in self.model.named_modules():
            if (name.endswith("norm") and not isinstance(module, nn.Identity)) or name == "decoder":
                yield name, module

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.model.layers

    def head(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.model.decoder.weight, self.model.decoder.bias

    def _embed(self, input_ids):
        embeddings = self.model.model.embeddings
        return self._norm(embeddings.tok_embeddings(input_ids), None, embeddings.norm)[0]

    def _norm(self, x, delta, norm):
        if isinstance(norm, nn.Identity):  # the first layer's attn_norm
            x = x if delta is None else x + delta
            return x, x
        if delta is None:
            return ops.layer_norm(x, norm.weight, norm.bias, self.eps, impl=self.impl)
        return ops.layer_norm(delta, norm.weight, norm.bias, self.eps, residual=x, impl=self.impl)

    @staticmethod
    def _qkv(block):
        return (block.attn.Wqkv,)

    def _after_attention(self, block, attended, x, impl):
        (delta,) = self.matmuls(attended, block.attn.Wo, impl=impl)
        y, x = self._norm(x, delta, block.mlp_norm)
        (gate_up,) = self.matmuls(y, block.mlp.Wi, impl=impl)
        (delta,) = self.matmuls(ops.geglu(*gate_up.chunk(2, -1), impl=impl), block.mlp.Wo, impl=impl)
        return delta, x

    def _finish(self, x, delta):
        x = self._norm(x, delta, self.model.model.final_norm)[0]
        return self._norm(F.gelu(self.model.head.dense(x)), None, self.model.head.norm)[0]


def sliding_layers(config) -> list[bool]:
    """Which layers attend within the window; in transformers 4.57 the config says that every n-th layer is global."""
    if getattr(config, "layer_types", None):
        return [kind == "sliding_attention" for kind in config.layer_types]
    return [layer % config.global_attn_every_n_layers != 0 for layer in range(config.num_hidden_layers)]


def rope_theta(config, sliding: bool) -> float:
    """The rotary base of a layer. Raises ValueError for a scaled RoPE, which no published ModernBERT has."""
    parameters = getattr(config, "rope_parameters", None)
    if parameters is None:
        local = config.local_rope_theta
        return local if sliding and local is not None else config.global_rope_theta
    parameters = parameters["sliding_attention" if sliding else "full_attention"]
    if parameters["rope_type"] != "default":
        raise ValueError(f"model.config.rope_parameters: rope_type={parameters['rope_type']!r} is not supported")
    return parameters["rope_theta"]


def fresh_rotary(model: Any) -> list[tuple[nn.Module, str, torch.Tensor]]:
    """(module, buffer name, fp32 values) of every rotary buffer that differs from the config's.

    ``.to(torch.bfloat16)`` rounds them with the weights: cos is then off by 0.36 at position 8000.
    """
    config = model.config
    stale = []
    head_dim = config.hidden_size // config.num_attention_heads
    sliding_of = sliding_layers(config)
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is None or not name.endswith("inv_freq"):
                continue
            if name.startswith(("full_attention", "sliding_attention")):
                sliding = name.startswith("sliding_attention")
            else:  # transformers 4.57: one buffer a layer, at model.layers.N.attn.rotary_emb
                sliding = sliding_of[int(path.split("layers.")[1].split(".")[0])]
            # On the host, as transformers makes them: a GPU's powers differ in the last bit.
            exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
            exact = (1.0 / rope_theta(config, sliding) ** exponent).to(buffer.device)
            if buffer.dtype != torch.float32 or not torch.equal(buffer, exact):
                stale.append((module, name, exact))
    return stale
