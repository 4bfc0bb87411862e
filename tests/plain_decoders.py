"""The published forwards of SDAR, LLaDA-MoE and LLaDA2, written out over a state dict: one sequence, no fast paths."""

import torch
import torch.nn.functional as F


def logits(config, weights: dict[str, torch.Tensor], ids: torch.Tensor, seen: torch.Tensor | None = None):
    """Logits [L, V] of ids [L]; ``seen`` [L, L] bool says which positions each sees, None: all."""
    two = config.model_type == "llada2_moe"
    x = weights["model.word_embeddings.weight" if two else "model.embed_tokens.weight"][ids]
    for number in range(config.num_hidden_layers):
        own = {name.split(".", 3)[3]: w for name, w in weights.items() if name.startswith(f"model.layers.{number}.")}
        x = x + attention(config, own, norm(config, x, own["input_layernorm.weight"]), seen)
        y = norm(config, x, own["post_attention_layernorm.weight"])
        x = x + (routed(config, own, y) if "mlp.experts.0.up_proj.weight" in own else gated(own, "mlp.", y))
        for shared in ("shared_expert.", "mlp.shared_experts."):
            if f"{shared}up_proj.weight" in own:
                x = x + gated(own, shared, y)
    return norm(config, x, weights["model.norm.weight"]) @ weights["lm_head.weight"].T


def norm(config, x, weight):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + config.rms_norm_eps) * weight


def gated(own, prefix, y):
    gate, up, down = (own[f"{prefix}{name}_proj.weight"] for name in ("gate", "up", "down"))
    return (F.silu(y @ gate.T) * (y @ up.T)) @ down.T


def attention(config, own, y, seen):
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    if "attention.query_key_value.weight" in own:
        both = y @ own["attention.query_key_value.weight"].T + own.get("attention.query_key_value.bias", 0)
        q, k, v = both.view(len(y), -1, size).split((heads, groups, groups), 1)
        names, out, bias = "attention.{}_layernorm.weight", "attention.dense.weight", own.get("attention.dense.bias", 0)
        norms = names.format("query"), names.format("key")
    else:
        q, k, v = ((y @ own[f"self_attn.{name}_proj.weight"].T).view(len(y), -1, size) for name in "qkv")
        norms, out, bias = ("self_attn.q_norm.weight", "self_attn.k_norm.weight"), "self_attn.o_proj.weight", 0
    if norms[0] in own:
        q, k = (norm(config, x, own[name]) for x, name in zip((q, k), norms))
    q, k = rotated(config, q), rotated(config, k)
    attended = []
    for head in range(heads):
        group = head // (heads // groups)
        score = q[:, head] @ k[:, group].T * size**-0.5
        score = score if seen is None else score.masked_fill(~seen, float("-inf"))
        attended.append(score.softmax(-1) @ v[:, group])
    return torch.cat(attended, -1) @ own[out].T + bias


def rotated(config, x):
    """The first channels of each head in pairs half of them apart; the others stay."""
    many = int(config.head_dim * config.partial_rotary_factor)
    angle = torch.arange(len(x)).float()[:, None] / config.rope_theta ** (torch.arange(0, many, 2).float() / many)
    cos, sin = (table.to(x.dtype)[:, None] for table in (angle.cos(), angle.sin()))
    first, second, rest = x[..., : many // 2], x[..., many // 2 : many], x[..., many:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)


def routed(config, own, y):
    out = []
    for token in y:
        shares = (
            llada2_shares(config, own, token) if "mlp.gate.expert_bias" in own else softmax_shares(config, own, token)
        )
        out.append(sum(share * gated(own, f"mlp.experts.{number}.", token) for number, share in shares))
    return torch.stack(out)


def softmax_shares(config, own, token):
    share = (own["mlp.gate.weight"] @ token).softmax(-1) + own.get("mlp.expert_bias", 0)
    best = share.topk(config.num_experts_per_tok)
    return list(zip(best.indices.tolist(), best.values))


def llada2_shares(config, own, token):
    score = torch.sigmoid(own["mlp.gate.weight"] @ token)
    biased = score + own["mlp.gate.expert_bias"]
    size = config.num_experts // config.n_group
    groups = [range(first, first + size) for first in range(0, config.num_experts, size)]
    value = [float(biased[list(group)].topk(2).values.sum()) for group in groups]
    kept = sorted(range(config.n_group), key=lambda n: -value[n])[: config.topk_group]
    allowed = [number for n in kept for number in groups[n]]
    best = sorted(allowed, key=lambda number: -float(biased[number]))[: config.num_experts_per_tok]
    total = sum(score[number] for number in best) if len(best) > 1 else 1.0
    return [(number, score[number] / total * config.routed_scaling_factor) for number in best]
