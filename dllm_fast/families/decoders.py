"""SDAR, LLaDA-MoE and LLaDA2 over `ops`: one forward for the native classes of all three."""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from dllm_fast import ops
from dllm_fast.families import decoder_layers, native, native_decoders
from dllm_fast.families.bypass import Calls
from dllm_fast.families.decoder_layers import GatedMLP, Routed, one_by_one
from dllm_fast.families.layered import Layered
from dllm_fast.families.linears import fused

LINEARS = "query_key_value", "dense", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"


class Decoders(Layered):
    """RMSNorm, also of each head of q and k, SwiGLU, routed experts; every layer attends to all blocks up to its own,
    or to all slots."""

    own_blocks = True
    files = (native_decoders.__name__, decoder_layers.__name__, native.__name__)
    calls = Calls(frozenset((*LINEARS, "word_embeddings", "embed_tokens")), None)

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return isinstance(model, cls.model_class)

    @staticmethod
    def linears(model: Any) -> Iterator[tuple[nn.Module, ...]]:
        for layer in model.model.layers:
            part = layer.attention_part
            yield from (part.linears, (part.out,))
            for mlp in filter(None, (layer.mlp, layer.shared)):
                yield from experts_of(mlp) if isinstance(mlp, Routed) else gated_of(mlp)

    def _read_config(self, config: PretrainedConfig) -> None:
        self.positions = config.max_position_embeddings
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.rotated = config.rotated
        self.layers = config.num_hidden_layers
        self._read_blocks(config)
        self.eps = config.rms_norm_eps
        self.windows = [None] * self.layers
        self.thetas = [config.rope_theta] * self.layers
        self.ffn_width = max(width_of(layer.mlp) + width_of(layer.shared) for layer in self.blocks)

    def _read_modules(self) -> Iterator[tuple[str, nn.Module]]:
        for name, module in self.model.named_modules():
            if isinstance(module, decoder_layers.RMSNorm) or name.endswith((".mlp.gate", "lm_head")):
                yield name, module

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.model.layers

    def head(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        head = self.model.lm_head
        return head.weight, head._parameters.get("bias")

    def _embed(self, input_ids):
        return self.model.get_input_embeddings()(input_ids)

    @staticmethod
    def _qkv(block):
        return block.attention_part.linears

    def _rotated(self, block, y, rope, outside, impl):
        norms = block.attention_part.head_norms
        if norms is None and self.rotated == self.head_dim:
            return super()._rotated(block, y, rope, outside, impl)
        q, k, v = self._projected(block, y, impl)
        if norms is not None:
            q, k = (ops.rms_norm(x, norm.weight, self.eps, impl=impl)[0] for x, norm in zip((q, k), norms))
        q, k = map(self._tables.ordered, (q, k))
        return ops.rope(q, k, v, *rope, outside=outside, impl=impl)

    def _after_attention(self, block, attended, x, impl):
        (delta,) = self.matmuls(attended, block.attention_part.out, impl=impl)
        y, x = self._norm(x, delta, block.post_attention_layernorm)
        delta = self._routed(block.mlp, y, impl) if isinstance(block.mlp, Routed) else self._gated(block.mlp, y, impl)
        return (delta if block.shared is None else delta + self._gated(block.shared, y, impl)), x

    def _gated(self, mlp, y, impl):
        """The output of a `GatedMLP` for y [..., d]."""
        (gated,) = self.matmuls(y, mlp.gate_proj, mlp.up_proj, gated=True, impl=impl)
        (delta,) = self.matmuls(gated, mlp.down_proj, impl=impl)
        return delta

    def _routed(self, mlp: Routed, y: torch.Tensor, impl: str) -> torch.Tensor:
        """The experts' part: on a GPU grouped matmuls, if their weights are in one buffer. On a CPU, where launches
        cost little, one expert after the other."""
        flat = y.flatten(0, -2)
        chosen, weight = mlp.route(flat)
        gate_up = down = None
        if (impl == "triton" or y.is_cuda) and not torch.compiler.is_compiling():
            gate_up, down = map(fused, experts_of(mlp))
        if gate_up is None or down is None:
            each = [functools.partial(self._gated, expert, impl=impl) for expert in mlp.experts]
            return one_by_one(flat, chosen, weight, each).view(y.shape)
        gate_up, down = (matrix.unflatten(0, (len(mlp.experts), -1)) for matrix in (gate_up, down))
        return ops.experts(flat, gate_up, down, chosen, weight, impl=impl).view(y.shape)

    def _finish(self, x, delta):
        return self._norm(x, delta, self.model.model.norm)[0]


class SDAR(Decoders):
    model_class = native_decoders.SDARForCausalLM


class LLaDAMoE(Decoders):
    model_class = native_decoders.LLaDAMoEModelLM
    keeps_weights = "the model's experts are not rounded"


class LLaDA2Moe(Decoders):
    model_class = native_decoders.LLaDA2MoeModelLM
    keeps_weights = "the model's experts are not rounded"


def gated_of(mlp: GatedMLP) -> Iterator[tuple[nn.Module, ...]]:
    yield from ((mlp.gate_proj, mlp.up_proj), (mlp.down_proj,))


def experts_of(mlp: Routed) -> Iterator[tuple[nn.Module, ...]]:
    """Those of all experts that grouped matmuls run: gate and up of each in turn; and down."""
    experts: Any = mlp.experts
    yield tuple(linear for expert in experts for linear in (expert.gate_proj, expert.up_proj))
    yield tuple(expert.down_proj for expert in experts)


def width_of(mlp: Any) -> int:
    """How many values gate and up have for a token."""
    if isinstance(mlp, Routed):
        return mlp.top_k * width_of(mlp.experts[0])
    return 0 if mlp is None else mlp.gate_proj.out_features
