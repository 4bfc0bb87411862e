"""LLaDA: the published remote-code class and the native one, which name their modules alike."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast, MaskedLMOutput, ModelOutput

from dllm_fast.families.bypass import Calls, class_name
from dllm_fast.families.layered import Trained
from dllm_fast.families.native import LLaDAConfig, LLaDAModelLM, kv_heads
from dllm_fast.families.ranks import SharedEmbedding, SharedHead, SummedLinear, ranks_of
from dllm_fast.families.remote import published_classes

CALLED = frozenset(("wte", "q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"))
SHARED = (nn.Linear, SummedLinear, SharedEmbedding, SharedHead)  # what they are in a model that processes share


class LLaDA(Trained):
    """RMSNorm, SwiGLU, every layer attends to all slots; keys may be grouped and embeddings tied."""

    model_class = LLaDAModelLM
    shared = True
    remote_code = staticmethod(published_classes)
    # The head of a tied model is an embedding whose weight is read. So is that of a shared head.
    files = (LLaDAModelLM.__module__, nn.Embedding.__module__, SharedHead.__module__)

    @staticmethod
    def matches(model: nn.Module) -> bool:
        return hasattr(getattr(model, "model", None), "transformer")

    @staticmethod
    def output_type(model: nn.Module) -> type[ModelOutput]:
        return MaskedLMOutput if isinstance(model, LLaDAModelLM) else CausalLMOutputWithPast

    @staticmethod
    def linears(model: Any) -> Iterator[tuple[nn.Module, ...]]:
        for block in model.model.transformer.blocks:
            yield from (LLaDA._qkv(block), (block.attn_out,), _gate_up(block), (block.ff_out,))

    @staticmethod
    def labelled(
        model: Any, input_ids: torch.Tensor | None, chosen: torch.Tensor, embeds: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, nn.Module]:
        return model.model(input_ids, inputs_embeds=embeds, head=False)[chosen], model.model.transformer.ff_out

    @staticmethod
    def new(width, heads, kv_heads, layers, ffn, positions, tie, **tokens):
        config = LLaDAConfig(
            d_model=width, n_heads=heads, n_kv_heads=kv_heads, n_layers=layers, mlp_hidden_size=ffn,
            max_sequence_length=positions, rope_theta=10000.0, weight_tying=tie, **tokens,
        )  # fmt: skip
        return LLaDAModelLM(config)

    def _read_config(self, config: PretrainedConfig) -> None:
        for name, supported in LLaDAConfig.architecture.items():
            asked = getattr(config, name, supported)
            if asked is not None and asked != supported:
                raise ValueError(f"model.config.{name}={asked!r} is not supported, only {supported!r}")
        self.ranks = ranks_of(self.model)
        ranks = 1 if self.ranks is None else self.ranks.size
        self.positions = config.max_sequence_length
        self.heads = config.n_heads // ranks
        self.kv_heads = kv_heads(config) // ranks
        self.head_dim = config.d_model // config.n_heads
        self.layers = config.n_layers
        self.ffn_width = (config.mlp_hidden_size or config.mlp_ratio * config.d_model) // ranks
        self._read_blocks(config)
        self.eps = config.rms_norm_eps
        self.windows = [None] * self.layers
        self.thetas = [config.rope_theta] * self.layers

    def require_whole(self) -> None:
        super().require_whole()
        if self.ranks is None:
            return
        for path, module in self.transformer.named_modules():
            if path.rpartition(".")[2] in CALLED and type(module) not in SHARED:
                raise ValueError(
                    f"model: {self.ranks.size} processes share it, and model.transformer.{path} is a "
                    f"{class_name(module)}; adapters and other weights cannot be shared"
                )

    def _read_modules(self) -> Iterator[tuple[str, nn.Module]]:
        for name, module in self.transformer.named_modules():
            if name.endswith(("attn_norm", "ff_norm", "ln_f")) or name == "ff_out":
                yield f"model.transformer.{name}", module

    @property
    def transformer(self) -> Any:
        return self.model.model.transformer

    @property
    def blocks(self) -> nn.ModuleList:
        return self.transformer.blocks

    @property
    def calls(self) -> Calls:
        head = self.transformer.ff_out
        return Calls(CALLED, None if head is self.transformer.wte else head)

    def head(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        head = self.transformer.ff_out
        return head.weight, head._parameters.get("bias")

    def _embed(self, input_ids):
        return self.transformer.wte(input_ids)

    @staticmethod
    def _qkv(block):
        return block.q_proj, block.k_proj, block.v_proj

    def _after_attention(self, block, attended, x, impl):
        (delta,) = self.matmuls(attended, block.attn_out, impl=impl)
        y, x = self._norm(x, delta, block.ff_norm)
        (gated,) = self.matmuls(y, *_gate_up(block), gated=True, impl=impl)
        (delta,) = self.matmuls(gated, block.ff_out, impl=impl)
        return delta, x

    def _finish(self, x, delta):
        return self._norm(x, delta, self.transformer.ln_f)[0]


def _gate_up(block: Any) -> tuple[nn.Module, ...]:
    return block.ff_proj, block.up_proj
