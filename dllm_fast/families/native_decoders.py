"""SDAR, LLaDA-MoE and LLaDA2 as native transformers models, with the parameter names of the published checkpoints.

JetLM's SDAR (arXiv:2510.06303), inclusionAI's LLaDA-MoE (arXiv:2509.24389) and LLaDA2.0 and 2.1 (arXiv:2512.15745) load
into them without remote code. SDAR and LLaDA2 are block-causal: a position sees all blocks up to its own. The forward
is the plain one, with all logits at all positions; `dllm_fast.patch` makes it fast.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from dllm_fast.families.decoder_layers import DecoderLayer, LLaDA2Layer, LLaDAMoELayer, RMSNorm
from dllm_fast.families.mixin import DiffusionGenerationMixin, generation_config_of
from dllm_fast.families.native import TRANSFORMERS_5, through_layers
from dllm_fast.kernels.reference import rope_table, visible_slots


class DecoderConfig(PretrainedConfig):
    """The fields that the three share, under the published names. Unknown fields are kept, as in any config.

    block_causal: the length of the blocks in which the model is causal; None: every position sees every other.
    partial_rotary_factor: the share of a head that is rotated.
    """

    # Fields that name an architecture, and the only value that each may have here.
    architecture: ClassVar[dict[str, Any]] = {"hidden_act": "silu", "rope_scaling": None, "attention_bias": False}

    def __init__(
        self,
        vocab_size: int = 157184,
        hidden_size: int = 2048,
        num_hidden_layers: int = 16,
        num_attention_heads: int = 16,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        max_position_embeddings: int = 8192,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 10000.0,
        partial_rotary_factor: float = 1.0,
        initializer_range: float = 0.02,
        block_causal: int | None = None,
        mask_token_id: int | None = None,
        **kwargs,
    ):
        kwargs.pop("model_type", None)  # LLaDA-MoE's published files have the dense model's
        rope = kwargs.pop("rope_parameters", None) or {}  # where transformers 5 has saved a config of an older one
        for name, supported in self.architecture.items():
            asked = kwargs.pop(name, supported)
            if asked is not None and asked != supported:
                raise ValueError(f"{type(self).__name__}: {name}={asked!r} is not supported, only {supported!r}")
        if rope.get("rope_type", "default") != "default":
            raise ValueError(f"{type(self).__name__}: rope_parameters={rope!r}: only rope_type 'default' is supported")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope.get("rope_theta", rope_theta)
        self.partial_rotary_factor = rope.get("partial_rotary_factor", partial_rotary_factor)
        self.initializer_range = initializer_range
        self.block_causal = block_causal
        self.mask_token_id = mask_token_id
        super().__init__(**kwargs)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{type(self).__name__}: num_attention_heads={num_attention_heads} is not a multiple of "
                f"num_key_value_heads={num_key_value_heads}"
            )

    @property
    def rotated(self) -> int:
        """How many channels of a head are rotated: the first ones."""
        return int(self.head_dim * self.partial_rotary_factor)


class SDARConfig(DecoderConfig):
    """SDAR's; the defaults are those of SDAR-8B-Chat. Its layers are Qwen3's."""

    model_type = "sdar"
    architecture: ClassVar = {**DecoderConfig.architecture, "use_sliding_window": False}

    def __init__(
        self,
        vocab_size: int = 151936,
        hidden_size: int = 4096,
        intermediate_size: int = 12288,
        num_hidden_layers: int = 36,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = 8,
        head_dim: int | None = 128,
        max_position_embeddings: int = 32768,
        rope_theta: float = 1000000.0,
        block_causal: int | None = None,  # None: block_size, or 4, the published script's default
        block_size: int | None = None,
        mask_token_id: int | None = 151669,
        **kwargs,
    ):
        self.intermediate_size = intermediate_size
        self.block_size = block_size
        kwargs = {"eos_token_id": 151643, "pad_token_id": 151643, "tie_word_embeddings": False, **kwargs}
        super().__init__(
            vocab_size, hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim,
            max_position_embeddings, rope_theta=rope_theta, block_causal=block_causal or block_size or 4,
            mask_token_id=mask_token_id, **kwargs,
        )  # fmt: skip


class LLaDAMoEConfig(DecoderConfig):
    """LLaDA-MoE's; the defaults are those of LLaDA-MoE-7B-A1B. Every position sees every other."""

    model_type = "lladamoe"
    architecture: ClassVar = {
        **DecoderConfig.architecture, "moe_router_score_function": "softmax", "clip_qkv": None,
        "routed_scaling_factor": 1,
    }  # fmt: skip

    def __init__(
        self,
        dense_intermediate_size: int | None = 8192,
        expert_intermediate_size: int = 1024,
        shared_expert_intermediate_size: int | None = None,
        num_experts: int = 64,
        num_experts_per_tok: int = 8,
        moe_layer_freq: list[int] | None = None,  # 1: a layer with experts; None: all
        moe_router_enable_expert_bias: bool | None = None,
        qk_layernorm: bool | None = True,
        rope_theta: float = 50000.0,
        rms_norm_eps: float = 1e-5,
        mask_token_id: int | None = 156895,
        **kwargs,
    ):
        self.dense_intermediate_size = dense_intermediate_size
        self.expert_intermediate_size = expert_intermediate_size
        self.shared_expert_intermediate_size = shared_expert_intermediate_size
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_router_enable_expert_bias = bool(moe_router_enable_expert_bias)
        self.qk_layernorm = bool(qk_layernorm)
        kwargs = {"eos_token_id": 156892, "pad_token_id": 156892, "tie_word_embeddings": False, **kwargs}
        super().__init__(rope_theta=rope_theta, rms_norm_eps=rms_norm_eps, mask_token_id=mask_token_id, **kwargs)
        self.moe_layer_freq = [1] * self.num_hidden_layers if moe_layer_freq is None else moe_layer_freq


class LLaDA2MoeConfig(DecoderConfig):
    """LLaDA2.0's and 2.1's; the defaults are those of the mini models. The published configs do not say the length of
    a block; their sampler's default is 32."""

    model_type = "llada2_moe"
    architecture: ClassVar = {
        **DecoderConfig.architecture, "use_sliding_window": False, "score_function": "sigmoid",
        "norm_topk_prob": True, "norm_head": False, "norm_softmax": False,
    }  # fmt: skip

    def __init__(
        self,
        intermediate_size: int = 5120,
        num_hidden_layers: int = 20,
        num_key_value_heads: int | None = 4,
        head_dim: int | None = 128,
        use_bias: bool = False,  # of attention's output
        use_qkv_bias: bool = False,
        use_qk_norm: bool = True,
        num_experts: int | None = 256,
        num_shared_experts: int | None = 1,
        num_experts_per_tok: int = 8,
        n_group: int = 8,
        topk_group: int = 4,
        routed_scaling_factor: float = 2.5,
        moe_intermediate_size: int = 512,
        first_k_dense_replace: int = 1,
        max_position_embeddings: int = 32768,
        rope_theta: float = 600000.0,
        partial_rotary_factor: float = 0.5,
        block_causal: int | None = 32,
        mask_token_id: int | None = 156895,
        **kwargs,
    ):
        self.intermediate_size = intermediate_size
        self.use_bias = use_bias
        self.use_qkv_bias = use_qkv_bias
        self.use_qk_norm = use_qk_norm
        self.num_experts = num_experts
        self.num_shared_experts = num_shared_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.n_group = n_group
        self.topk_group = topk_group
        self.routed_scaling_factor = routed_scaling_factor
        self.moe_intermediate_size = moe_intermediate_size
        self.first_k_dense_replace = first_k_dense_replace
        kwargs = {"eos_token_id": 156892, "pad_token_id": 156892, "tie_word_embeddings": False, **kwargs}
        super().__init__(
            num_hidden_layers=num_hidden_layers, num_key_value_heads=num_key_value_heads, head_dim=head_dim,
            max_position_embeddings=max_position_embeddings, rope_theta=rope_theta,
            partial_rotary_factor=partial_rotary_factor, block_causal=block_causal, mask_token_id=mask_token_id,
            **kwargs,
        )  # fmt: skip


class Decoder(nn.Module):
    """Embeddings, under the ``name`` that the checkpoints give them, layers and the last norm."""

    _gradient_checkpointing_func: Callable  # set with `gradient_checkpointing` by `gradient_checkpointing_enable`

    def __init__(self, config: Any, layer: type[DecoderLayer], name: str):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.name = name
        self.add_module(name, nn.Embedding(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(layer(config, number) for number in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        input_ids: torch.Tensor | None,  # [B, L] int64
        attention_mask: torch.Tensor | None = None,  # [B, L], 0 = padding
        inputs_embeds: torch.Tensor | None = None,  # [B, L, d], in place of the ids
        states: list[torch.Tensor] | None = None,  # collects the input of each layer, and of the head
    ) -> torch.Tensor:
        """The input of the head, [B, L, d]. Blocks are counted from a row's first position that is no padding."""
        config = self.config
        x = self.get_submodule(self.name)(input_ids) if inputs_embeds is None else inputs_embeds
        cos, sin = rope_table(x.shape[1], config.rotated, config.rope_theta, x.device)
        mask = visible(x.shape[:2], attention_mask, config.block_causal, x.device)
        return through_layers(self, self.layers, self.norm, x, cos, sin, mask, states)


def visible(shape, attention_mask: torch.Tensor | None, block: int | None, device) -> torch.Tensor | None:
    """Which positions each sees, [B, 1, L or 1, L] bool; None: all see all."""
    seen = None if attention_mask is None else attention_mask.bool()[:, None]  # [B, 1, L]
    if block is not None:
        batch, length = shape
        zero = torch.zeros(batch, dtype=torch.int64, device=device)
        first = zero if attention_mask is None else attention_mask.bool().long().argmax(1)
        causal = visible_slots(length, length, first, zero + length, zero, None, block)
        seen = causal if seen is None else seen & causal
    return None if seen is None else seen[:, None]


class DecoderLM(PreTrainedModel, DiffusionGenerationMixin):
    """Logits of all positions."""

    layer: ClassVar[type[DecoderLayer]] = DecoderLayer
    embedding: ClassVar[str] = "embed_tokens"
    base_model_prefix = "model"
    _supports_sdpa = True
    supports_gradient_checkpointing = True

    def __init__(self, config: Any):
        super().__init__(config)
        self._no_split_modules = [self.layer.__name__]
        if config.tie_word_embeddings:
            head, embedding = "lm_head.weight", f"model.{self.embedding}.weight"
            tied: Any = {head: embedding} if TRANSFORMERS_5 else [head]
            self._tied_weights_keys = tied
        self.generation_config = generation_config_of(self)
        self.model = Decoder(config, self.layer, self.embedding)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Normals of standard deviation ``initializer_range``; norms of 1, biases of 0."""
        weight = module._parameters.get("weight")
        if isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif weight is not None:  # of linears, embeddings and routers
            nn.init.normal_(weight, std=self.config.initializer_range)
        for tensor in (module._parameters.get("bias"), module._buffers.get("expert_bias")):
            if tensor is not None:
                nn.init.zeros_(tensor)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,  # [B, L] int64
        attention_mask: torch.Tensor | None = None,  # [B, L], 0 = padding
        inputs_embeds: torch.Tensor | None = None,  # [B, L, d], in place of the ids
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> MaskedLMOutput | tuple:
        """Logits [B, L, V] in the model's dtype; if asked for, also hidden states [B, L, d]: the input of each layer
        and of the head."""
        name = f"{type(self).__name__}.forward"
        if self.config.output_attentions:
            kwargs["output_attentions"] = True
        if unknown := [key for key, value in kwargs.items() if value is not None and value is not False]:
            raise ValueError(f"{name} does not take {', '.join(sorted(unknown))}")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(f"{name} takes either input_ids or inputs_embeds")
        if attention_mask is not None and attention_mask.dim() != 2:
            shape = list(attention_mask.shape)
            raise ValueError(f"attention_mask: {shape} is not [B, L]; the model masks what lies behind a block itself")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states: list[Any] | None = [] if output_hidden_states else None
        logits = self.lm_head(self.model(input_ids, attention_mask, inputs_embeds, states))
        if not (self.config.return_dict if return_dict is None else return_dict):
            return (logits, tuple(states)) if states is not None else (logits,)
        return MaskedLMOutput(logits=logits, hidden_states=None if states is None else tuple(states))

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_submodule(self.embedding)

    def set_input_embeddings(self, value: nn.Module) -> None:
        setattr(self.model, self.embedding, value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs) -> dict:
        return {"input_ids": input_ids, "attention_mask": kwargs.get("attention_mask")}


class SDARForCausalLM(DecoderLM):
    """SDAR (arXiv:2510.06303): Qwen3's layers, causal in blocks."""

    config_class = SDARConfig


class LLaDAMoEModelLM(DecoderLM):
    """LLaDA-MoE (arXiv:2509.24389): experts, and every position sees every other."""

    config_class = LLaDAMoEConfig
    layer = LLaDAMoELayer


class LLaDA2MoeModelLM(DecoderLM):
    """LLaDA2 (arXiv:2512.15745): experts in groups, one expert that all tokens share, causal in blocks."""

    config_class = LLaDA2MoeConfig
    layer = LLaDA2Layer
    embedding = "word_embeddings"


def register() -> None:
    """Register these classes in transformers, by their configs' model types."""
    for cls in (SDARForCausalLM, LLaDAMoEModelLM, LLaDA2MoeModelLM):
        AutoConfig.register(cls.config_class.model_type, cls.config_class, exist_ok=True)
        for auto in (AutoModel, AutoModelForCausalLM):
            auto.register(cls.config_class, cls, exist_ok=True)


register()
