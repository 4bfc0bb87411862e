"""The layers of `native_decoders`: attention with a norm of each head, dense and routed feed-forward parts.

Layers of all models answer to the same names (`attn_norm`, `linears`, `out`, ...), however their parameters are called.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dllm_fast.families.native import LLaDARMSNorm as RMSNorm
from dllm_fast.kernels.reference import rotate


class Attention(nn.Module):
    """Grouped heads; q and k may be normalised head by head, and are rotated in their first channels."""

    def __init__(self, config: Any):
        super().__init__()
        self.head_dim, self.rotated = config.head_dim, config.rotated
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads

    @property
    def linears(self) -> tuple[nn.Module, ...]:
        """Those of q, k and v: three, or one that has q's rows, then k's, then v's."""
        raise NotImplementedError

    @property
    def out(self) -> nn.Module:
        raise NotImplementedError

    @property
    def head_norms(self) -> tuple[nn.Module, nn.Module] | None:
        """q's and k's."""
        raise NotImplementedError

    def forward(self, y: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor | None):
        """y [B, L, d]; cos and sin [L, R/2] of the R channels that are rotated; mask [B, 1, L or 1, L] bool."""
        parts = torch.cat([linear(y) for linear in self.linears], -1).unflatten(-1, (-1, self.head_dim))
        q, k, v = parts.split((self.heads, self.kv_heads, self.kv_heads), 2)
        if self.head_norms is not None:
            q, k = (norm(x) for norm, x in zip(self.head_norms, (q, k)))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        q, k = (torch.cat((rotate(x[..., : self.rotated], cos, sin), x[..., self.rotated :]), -1) for x in (q, k))
        k, v = (x.repeat_interleave(self.heads // self.kv_heads, 1) for x in (k, v))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(attended.transpose(1, 2).flatten(2))


class SplitAttention(Attention):
    """As Qwen3, SDAR and LLaDA-MoE name its parameters."""

    def __init__(self, config: Any, normed: bool):
        super().__init__(config)
        width, inner = config.hidden_size, self.heads * self.head_dim
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.k_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(inner, width, bias=False)
        if normed:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    @property
    def linears(self):
        return self.q_proj, self.k_proj, self.v_proj

    @property
    def out(self):
        return self.o_proj

    @property
    def head_norms(self):
        return (self.q_norm, self.k_norm) if hasattr(self, "q_norm") else None


class LLaDA2Attention(Attention):
    def __init__(self, config: Any):
        super().__init__(config)
        inner, rest = self.heads * self.head_dim, 2 * self.kv_heads * self.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, inner + rest, bias=config.use_qkv_bias)
        self.dense = nn.Linear(inner, config.hidden_size, bias=config.use_bias)
        if config.use_qk_norm:
            self.query_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.key_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps)

    @property
    def linears(self):
        return (self.query_key_value,)

    @property
    def out(self):
        return self.dense

    @property
    def head_norms(self):
        return (self.query_layernorm, self.key_layernorm) if hasattr(self, "query_layernorm") else None


class GatedMLP(nn.Module):
    """SwiGLU; an expert too."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Routed(nn.Module):
    """A few of many experts for each token."""

    def __init__(self, config: Any, inner: int):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.experts = nn.ModuleList(GatedMLP(config.hidden_size, inner) for _ in range(config.num_experts))

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each of x [N, d], its experts [N, k] int64 and their weights [N, k] fp32."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, -2)
        return one_by_one(flat, *self.route(flat), self.experts).view(x.shape)


def one_by_one(
    x: torch.Tensor,  # [N, d]
    chosen: torch.Tensor,  # [N, k] int64
    weight: torch.Tensor,  # [N, k]
    experts: Any,  # a sequence of callables, [n, d] to [n, d]
) -> torch.Tensor:
    """The weighted sum of the outputs of each token's experts, [N, d]: an expert after the other."""
    parts = x.new_zeros(*chosen.shape, x.shape[1])
    for number in chosen.unique().tolist():
        token, place = (chosen == number).nonzero(as_tuple=True)
        parts = parts.index_put((token, place), experts[number](x[token]))
    return weighted(parts, weight)


def weighted(parts: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The sum of parts [N, k, d] by weight [N, k], in fp32 or better and rounded once: [N, d]."""
    wide = parts.to(torch.promote_types(parts.dtype, weight.dtype))
    return (wide * weight[..., None]).sum(1).to(parts.dtype)


class LLaDAMoERouted(Routed):
    """The k experts of largest probability, weighted by it."""

    def __init__(self, config: Any):
        super().__init__(config, config.expert_intermediate_size)
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        if config.moe_router_enable_expert_bias:
            self.register_buffer("expert_bias", torch.zeros(config.num_experts, dtype=torch.float32))

    def route(self, x):
        score = F.linear(x, self.gate.weight).softmax(1, dtype=torch.float32)
        bias = self._buffers.get("expert_bias")
        weight, chosen = (score if bias is None else score + bias).topk(self.top_k, -1)
        return chosen, weight


class LLaDA2Gate(nn.Module):
    """The router's parameters, under their published names."""

    expert_bias: torch.Tensor

    def __init__(self, config: Any):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("expert_bias", torch.zeros(config.num_experts, dtype=torch.float32))


class LLaDA2Routed(Routed):
    """The k experts of highest score in the groups whose two best experts score highest. The bias counts for that; the
    weights are the scores without it, as shares of their sum."""

    def __init__(self, config: Any):
        super().__init__(config, config.moe_intermediate_size)
        self.groups, self.kept_groups = config.n_group, config.topk_group
        self.scaling = config.routed_scaling_factor
        self.gate = LLaDA2Gate(config)
        if config.num_shared_experts:
            self.shared_experts = GatedMLP(config.hidden_size, config.moe_intermediate_size * config.num_shared_experts)

    def route(self, x):
        score = F.linear(x.float(), self.gate.weight.float()).sigmoid()  # [N, E]
        ranked = (score + self.gate.expert_bias).unflatten(1, (self.groups, -1))  # [N, groups, E / groups]
        best = ranked.topk(2, -1).values.sum(-1).topk(self.kept_groups, -1, sorted=False).indices
        kept = torch.zeros_like(ranked[..., 0]).scatter(1, best, 1.0) > 0
        chosen = ranked.masked_fill(~kept[..., None], float("-inf")).flatten(1).topk(self.top_k, -1).indices
        weight = score.gather(1, chosen)
        if self.top_k > 1:
            weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
        return chosen, weight * self.scaling


class DecoderLayer(nn.Module):
    """One of SDAR's: attention, then a dense feed-forward part, each after a norm."""

    mlp: GatedMLP | Routed

    def __init__(self, config: Any, number: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._make(config, number)

    def _make(self, config: Any, number: int) -> None:
        self.self_attn = SplitAttention(config, normed=True)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)

    @property
    def attn_norm(self) -> nn.Module:
        return self.input_layernorm

    @property
    def attention_part(self) -> Any:
        return self.self_attn

    @property
    def shared(self) -> Any:
        """The expert of all tokens, a `GatedMLP`; None if there is none."""
        return None

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor | None):
        x = x + self.attention_part(self.attn_norm(x), cos, sin, mask)
        y = self.post_attention_layernorm(x)
        delta = self.mlp(y)
        return x + (delta if self.shared is None else delta + self.shared(y))


class LLaDAMoELayer(DecoderLayer):
    def _make(self, config: Any, number: int) -> None:
        self.self_attn = SplitAttention(config, config.qk_layernorm)
        routed = config.moe_layer_freq[number] != 0
        self.mlp = LLaDAMoERouted(config) if routed else GatedMLP(config.hidden_size, config.dense_intermediate_size)
        if routed and config.shared_expert_intermediate_size is not None:
            self.shared_expert = GatedMLP(config.hidden_size, config.shared_expert_intermediate_size)

    @property
    def shared(self):
        return self._modules.get("shared_expert")


class LLaDA2Layer(DecoderLayer):
    def _make(self, config: Any, number: int) -> None:
        self.attention = LLaDA2Attention(config)
        routed = config.num_experts is not None and number >= config.first_k_dense_replace
        self.mlp = LLaDA2Routed(config) if routed else GatedMLP(config.hidden_size, config.intermediate_size)

    @property
    def attention_part(self):
        return self.attention

    @property
    def shared(self):
        return self.mlp._modules.get("shared_experts")
