"""LLaDA (arXiv:2502.09992) as a native transformers model, with the parameter names of the published checkpoints.

`GSAI-ML/LLaDA-8B-Base`, `-Instruct`, LLaDA-1.5 and iLLaDA-8B (grouped keys, tied embeddings) load into it without
remote code. The forward is the plain one, with all logits at all positions; `dllm_fast.patch` makes it fast.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import MaskedLMOutput

from dllm_fast.families.mixin import DiffusionGenerationMixin, generation_config_of
from dllm_fast.kernels.reference import rope_table, rotate

TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5


class LLaDAConfig(PretrainedConfig):
    """The published configuration; the defaults are LLaDA-8B's. Unknown fields are kept, as in any config.

    Two fields are this package's. ``block_causal``: a patched model generates under a mask that is causal in blocks of
    that length. ``block_causal_origin``: ``"prompt"`` counts them from the end of the prompt, as D2F does
    (arXiv:2508.09192), ``"start"`` from the first position. The model's own forward has no blocks.

    Only the published architecture is implemented: RMSNorm, SwiGLU, RoPE, no biases. A config that asks for another one
    raises a ValueError that names the field. The published fields for drawing new weights (``init_fn``, ``init_std``,
    ...) and for choosing an attention kernel (``flash_attention``) have no effect.
    """

    model_type = "llada"
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "num_hidden_layers": "n_layers",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
    }
    # Fields of the published file that name an architecture, and the only value each may have here.
    architecture = {
        "block_type": "llama",
        "layer_norm_type": "rms",
        "activation_type": "silu",
        "rope": True,
        "alibi": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "attention_layer_norm": False,
        "input_emb_norm": False,
        "scale_logits": False,
        "rope_full_precision": True,
        "bias_for_layer_norm": False,
        "layer_norm_with_affine": True,
        "block_group_size": 1,
    }

    def __init__(
        self,
        d_model: int = 4096,
        n_heads: int = 32,
        n_kv_heads: int | None = None,
        n_layers: int = 32,
        mlp_hidden_size: int | None = 12288,
        vocab_size: int = 126464,
        embedding_size: int | None = None,
        max_sequence_length: int = 4096,
        rope_theta: float = 500000.0,
        rms_norm_eps: float = 1e-5,
        weight_tying: bool = False,
        mask_token_id: int | None = 126336,
        eos_token_id: int | None = 126081,
        pad_token_id: int | None = 126081,
        use_cache: bool = False,
        mlp_ratio: int = 4,  # times d_model, where mlp_hidden_size is None
        multi_query_attention: bool | None = None,
        attention_dropout: float = 0.0,
        residual_dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        **kwargs,
    ):
        for name, supported in self.architecture.items():
            asked = kwargs.setdefault(name, supported)
            if asked is not None and asked != supported:
                raise ValueError(f"LLaDAConfig: {name}={asked!r} is not supported, only {supported!r}")
        if d_model % n_heads:
            raise ValueError(f"LLaDAConfig: d_model={d_model} is not a multiple of n_heads={n_heads}")
        self.d_model = d_model
        self.n_heads = n_heads
        self.n_kv_heads = n_kv_heads
        self.multi_query_attention = multi_query_attention
        self.n_kv_heads = kv_heads(self)
        self.n_layers = n_layers
        self.mlp_hidden_size = mlp_ratio * d_model if mlp_hidden_size is None else mlp_hidden_size
        self.mlp_ratio = mlp_ratio
        self.vocab_size = vocab_size
        self.embedding_size = embedding_size or vocab_size
        self.max_sequence_length = max_sequence_length
        self.rope_theta = rope_theta
        self.rms_norm_eps = rms_norm_eps
        self.weight_tying = weight_tying
        self.mask_token_id = mask_token_id
        self.use_cache = use_cache
        self.attention_dropout = attention_dropout
        self.residual_dropout = residual_dropout
        self.embedding_dropout = embedding_dropout
        kwargs |= {"tie_word_embeddings": weight_tying, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
        super().__init__(**kwargs)


def kv_heads(config: PretrainedConfig) -> int:
    """The number of K/V heads of a published or native config.

    The older ``multi_query_attention`` means 1 head or all; ValueError if ``n_kv_heads`` contradicts it.
    """
    given = getattr(config, "n_kv_heads", None)
    multi_query = getattr(config, "multi_query_attention", None)
    implied = {None: None, True: 1, False: config.n_heads}[multi_query]
    if given is not None and implied is not None and given != implied:
        raise ValueError(f"model.config: n_kv_heads={given} contradicts multi_query_attention={multi_query}")
    heads = given or implied or config.n_heads
    if config.n_heads % heads:
        raise ValueError(f"model.config: n_heads={config.n_heads} is not a multiple of n_kv_heads={heads}")
    return heads


class LLaDARMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class LLaDABlock(nn.Module):
    def __init__(self, config: LLaDAConfig):
        super().__init__()
        width = config.d_model
        head_dim = config.d_model // config.n_heads
        self.head_dim = head_dim
        self.config = config
        self.attn_norm = LLaDARMSNorm(width, config.rms_norm_eps)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, config.n_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, config.n_kv_heads * head_dim, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_norm = LLaDARMSNorm(width, config.rms_norm_eps)
        self.ff_proj = nn.Linear(width, config.mlp_hidden_size, bias=False)
        self.up_proj = nn.Linear(width, config.mlp_hidden_size, bias=False)
        self.ff_out = nn.Linear(config.mlp_hidden_size, width, bias=False)
        # For _init_weights: in a deeper model, additions to the residual stream start smaller.
        self.attn_out.init_scale = self.ff_out.init_scale = (2 * config.n_layers) ** -0.5

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor | None):
        y = self.attn_norm(x)
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (proj(y).view(heads).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        group = q.shape[1] // k.shape[1]
        if group > 1:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        dropout = self.config.attention_dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        x = x + self._drop(self.attn_out(attended.transpose(1, 2).flatten(2)))
        y = self.ff_norm(x)
        return x + self._drop(self.ff_out(F.silu(self.ff_proj(y)) * self.up_proj(y)))

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.config.residual_dropout, self.training)


def through_layers(model: Any, layers: nn.ModuleList, norm: nn.Module, x, cos, sin, mask, states) -> torch.Tensor:
    """x after the ``layers`` and the last ``norm``; ``states`` collects the input of each layer, and the result."""
    for layer in layers:
        if states is not None:
            states.append(x)
        if model.gradient_checkpointing and model.training:
            x = model._gradient_checkpointing_func(layer.__call__, x, cos, sin, mask)
        else:
            x = layer(x, cos, sin, mask)
    x = norm(x)
    if states is not None:
        states.append(x)
    return x


class LLaDAModel(nn.Module):
    _gradient_checkpointing_func: Callable  # set with `gradient_checkpointing` by `gradient_checkpointing_enable`

    def __init__(self, config: LLaDAConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        wte = nn.Embedding(config.embedding_size, config.d_model)
        self.transformer = nn.ModuleDict(
            {
                "wte": wte,
                "blocks": nn.ModuleList(LLaDABlock(config) for _ in range(config.n_layers)),
                "ln_f": LLaDARMSNorm(config.d_model, config.rms_norm_eps),
                # If tied, the published head is the embedding module itself, so a file may use either name.
                "ff_out": wte if config.weight_tying else nn.Linear(config.d_model, config.embedding_size, bias=False),
            }
        )

    def forward(
        self,
        input_ids: torch.Tensor | None,  # [B, L] int64
        attention_mask: torch.Tensor | None = None,  # [B, L], 0 = padding
        inputs_embeds: torch.Tensor | None = None,  # [B, L, d], in place of the ids
        states: list[torch.Tensor] | None = None,  # collects the input of each layer, and of the head
        head: bool = True,
    ) -> torch.Tensor:
        """Logits [B, L, V]; without ``head``, the input of the head, [B, L, d]."""
        config = self.config
        transformer: Any = self.transformer
        x = transformer.wte(input_ids) if inputs_embeds is None else inputs_embeds
        x = F.dropout(x, config.embedding_dropout, self.training)
        cos, sin = rope_table(x.shape[1], config.d_model // config.n_heads, config.rope_theta, x.device)
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None]
        x = through_layers(self, transformer.blocks, transformer.ln_f, x, cos, sin, mask, states)
        return self.logits(x) if head else x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The head's logits [..., V] of hidden states [..., d]."""
        head: Any = self.transformer.ff_out
        # A tied head is the embedding itself; any other head is called, so that adapters and hooks on it act.
        return F.linear(hidden, head.weight) if isinstance(head, nn.Embedding) else head(hidden)


class LLaDAModelLM(PreTrainedModel, DiffusionGenerationMixin):
    """The mask predictor: logits of all positions, each attending to all, without a causal mask."""

    config_class = LLaDAConfig
    base_model_prefix = "model"
    _no_split_modules = ["LLaDABlock"]
    _supports_sdpa = True
    supports_gradient_checkpointing = True

    def __init__(self, config: LLaDAConfig):
        super().__init__(config)
        if config.weight_tying:
            head, embedding = "model.transformer.ff_out.weight", "model.transformer.wte.weight"
            tied: Any = {head: embedding} if TRANSFORMERS_5 else [head]
            self._tied_weights_keys = tied
        self.generation_config = generation_config_of(self)
        self.model = LLaDAModel(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Truncated normals of standard deviation 1/sqrt(fan in), after LLaDA's ``init_fn: mitchell``."""
        if isinstance(module, nn.Embedding | nn.Linear):
            std = getattr(module, "init_scale", 1.0) / math.sqrt(module.weight.shape[1])
            nn.init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std)
        elif isinstance(module, LLaDARMSNorm):
            nn.init.ones_(module.weight)

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
        and of the head. Losses are in `train.losses`; ``labels`` raise a ValueError."""
        if self.config.output_attentions:
            kwargs["output_attentions"] = True
        if unknown := [name for name, value in kwargs.items() if value is not None and value is not False]:
            raise ValueError(f"LLaDAModelLM.forward does not take {', '.join(sorted(unknown))}")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("LLaDAModelLM.forward takes either input_ids or inputs_embeds")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states: list[Any] | None = [] if output_hidden_states else None
        logits = self.model(input_ids, attention_mask, inputs_embeds, states)
        if not (self.config.return_dict if return_dict is None else return_dict):
            return (logits, tuple(states)) if output_hidden_states else (logits,)
        return MaskedLMOutput(logits=logits, hidden_states=tuple(states) if output_hidden_states else None)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.transformer.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.transformer["wte"] = value
        if self.config.weight_tying:
            self.model.transformer["ff_out"] = value

    def get_output_embeddings(self) -> nn.Module:
        return self.model.transformer.ff_out

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.model.transformer["ff_out"] = value

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Embedding:
        """transformers' own; also sets ``config.embedding_size``, from which a saved model is built again."""
        embedding = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        self.config.embedding_size = self.model.transformer.wte.weight.shape[0]
        return embedding

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs) -> dict:
        return {"input_ids": input_ids, "attention_mask": kwargs.get("attention_mask")}


def register() -> None:
    """Register these classes as ``llada`` in transformers, in place of any others.

    LLaDA's published code registers itself under that name when it is imported; later loads would get its config.
    """
    AutoConfig.register("llada", LLaDAConfig, exist_ok=True)
    for auto in (AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM):
        auto.register(LLaDAConfig, LLaDAModelLM, exist_ok=True)


register()
