"""Fast-dLLM's two caches (arXiv:2505.22618) written out plainly, over models written out plainly: what the tests and
`dllm-fast verify` hold `generate(cache="prefix")` and `generate(cache="dual")` to.

The plain models borrow the modules of a LLaDA (the native class or the published one) or a ModernBERT, and nothing that
`dllm_fast` computes: rotation, attention and caching are spelled out here for one sequence. A cache is a list of
layers, each ``(at, keys, values)``: positions [S], keys after their rotation [S, G, D], values [S, G, D]. Fast-dLLM
keeps keys as they were before it and rotates them all at each step, which gives the same numbers.

The loop is that of `llada/generate.py` in NVlabs/Fast-dLLM (batch 1, greedy), with these differences, all of them this
package's semantics:

- [MASK] is never predicted. Theirs takes the argmax over the whole vocabulary; where it is [MASK], the position counts
  as committed and stays masked: a fixed number of steps then runs past its last share, and a threshold may loop for
  ever.
- Candidates lie in the block. In a block's first step theirs also takes [MASK]s of the prompt for candidates, against
  the block's share.
- A block whose first step fills it takes no second. Theirs asks whether it is full only after another evaluation,
  which counts in its NFE, and for which a fixed number of steps has no share: one step a block is an IndexError.
- The factor rule keeps the largest k with (k + 1) (1 - c_k) < factor. Theirs (in later revisions) takes <=, and also
  keeps the last candidate when it is the only one to fail.

What is the same: the first step of a block is a whole forward whose candidates are committed like any other's; the
share of a step is n // s of the block's n positions, one more in the first n % s steps; confidences are fp64 softmaxes
here as there, where `generate` takes fp32's, which orders candidates alike unless they agree to 7 digits; a threshold
includes what reaches it, and always the best.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from dllm_fast.families.modernbert import rope_theta, sliding_layers
from dllm_fast.kernels.reference import widened


def rotate(x, at, theta):  # [T, H, D], [T]
    """Half-split rotary embedding: pair (x[i], x[i + D/2]) as a complex number, turned by ``at * theta^(-2i/D)``."""
    exponent = torch.arange(0, x.shape[-1], 2, dtype=torch.float32, device=x.device) / x.shape[-1]
    angle = at.float()[:, None, None] * (1.0 / theta**exponent)  # [T, 1, D/2]
    turned = torch.complex(*widened(x).chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), -1).to(x.dtype)


def attend(q, at, layer, window=None):  # [T, H, D], [T]
    """Softmax attention of queries at positions ``at`` over a layer of the cache, [T, H * D]."""
    places, keys, values = layer
    group = q.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    score = torch.einsum("thd,shd->hts", widened(q), widened(keys)) / q.shape[-1] ** 0.5
    if window is not None:
        score = score.masked_fill((at[:, None] - places).abs() > window, float("-inf"))
    return torch.einsum("hts,shd->thd", score.softmax(-1), widened(values)).flatten(1).to(q.dtype)


def remember(layer, at, keys, values):
    """A layer of the cache with the keys and values at positions ``at`` put in their places."""
    if layer is None:
        return at, keys, values
    old = ~torch.isin(layer[0], at)
    fresh = (at, keys, values)
    return tuple(torch.cat((was[old], now)) for was, now in zip(layer, fresh, strict=True))


class PlainLLaDA:
    """Logits [T, V] of ids [T] at positions ``at`` [T], and the cache with theirs in it."""

    def __init__(self, model):
        self.parts, self.config = model.model.transformer, model.config
        self.head_dim = model.config.d_model // model.config.n_heads
        # The published class has no head of its own where it is tied.
        self.head = self.parts.wte if model.config.weight_tying else self.parts.ff_out

    def __call__(self, ids, at, cache=None):
        cache = list(cache or [None] * self.config.n_layers)
        x = self.parts.wte(ids)
        for n, block in enumerate(self.parts.blocks):
            y = block.attn_norm(x)
            q, k, v = (proj(y).view(len(ids), -1, self.head_dim) for proj in (block.q_proj, block.k_proj, block.v_proj))
            q, k = rotate(q, at, self.config.rope_theta), rotate(k, at, self.config.rope_theta)
            cache[n] = remember(cache[n], at, k, v)
            x = x + block.attn_out(attend(q, at, cache[n]))
            y = block.ff_norm(x)
            x = x + block.ff_out(F.silu(block.ff_proj(y)) * block.up_proj(y))
        return F.linear(self.parts.ln_f(x), self.head.weight), cache


class PlainModernBert:
    """The same of a ModernBERT, some of whose layers see no further than half of ``local_attention``."""

    def __init__(self, model):
        self.model, self.config = model, model.config

    def __call__(self, ids, at, cache=None):
        model, config = self.model.model, self.config
        cache = list(cache or [None] * config.num_hidden_layers)
        x = model.embeddings.norm(model.embeddings.tok_embeddings(ids))
        for n, (layer, sliding) in enumerate(zip(model.layers, sliding_layers(config))):
            theta = rope_theta(config, sliding)
            qkv = layer.attn.Wqkv(layer.attn_norm(x)).view(len(ids), 3, config.num_attention_heads, -1)
            q, k, v = qkv.unbind(1)
            q, k = rotate(q, at, theta), rotate(k, at, theta)
            cache[n] = remember(cache[n], at, k, v)
            x = x + layer.attn.Wo(attend(q, at, cache[n], config.local_attention // 2 if sliding else None))
            value, gate = layer.mlp.Wi(layer.mlp_norm(x)).chunk(2, -1)
            x = x + layer.mlp.Wo(F.gelu(value) * gate)
        x = self.model.head.norm(F.gelu(self.model.head.dense(model.final_norm(x))))
        return self.model.decoder(x), cache


PLAIN = {"llada": PlainLLaDA, "modernbert": PlainModernBert}  # by a config's model_type


@torch.no_grad()
def fast_dllm(
    forward,  # one of `PLAIN`
    prompt: torch.Tensor,  # [P] int64
    *,
    gen_length: int,
    block_length: int,
    mask_id: int,
    cache: str,  # "prefix" | "dual"
    steps: int | None = None,
    threshold: float | None = None,
    factor: float | None = None,
    watch: Callable[[torch.Tensor, slice, torch.Tensor], None] = lambda *step: None,
) -> tuple[torch.Tensor, int, int]:
    """Sequence [P + gen_length], whole forwards, cached forwards; by ``steps`` in all, ``threshold`` or ``factor``.

    ``watch`` is given each step before it commits: the sequence, the live block, and the block's logits [T, V].
    """
    x = torch.cat((prompt, prompt.new_full((gen_length,), mask_id)))
    everywhere, blocks = torch.arange(len(x), device=x.device), gen_length // block_length
    whole = cached = 0
    for start in range(len(prompt), len(x), block_length):
        live = slice(start, start + block_length)
        step = 0
        while (x[live] == mask_id).any():
            if step == 0:
                logits, kept = forward(x, everywhere)
                logits = logits[live]
                whole += 1
                if cache == "prefix":  # what follows the block's start is computed anew at every step
                    kept = [tuple(part[:start] for part in layer) for layer in kept]
            else:
                at = everywhere[live] if cache == "dual" else everywhere[start:]
                logits, merged = forward(x[at], at, kept)
                logits = logits[:block_length]
                cached += 1
                kept = merged if cache == "dual" else kept
            share = None
            if steps is not None:
                base, extra = divmod(block_length, steps // blocks)
                share = base + (step < extra)
            watch(x, live, logits)
            x[live] = commit(x[live], logits, mask_id, share, threshold, factor)
            step += 1
    return x, whole, cached


def commit(block, logits, mask_id, share, threshold, factor):  # [T], [T, V]
    """The block with a step's choice of tokens in it, taken one by one in order of confidence."""
    probability = logits.double().softmax(-1)
    logits = logits.clone()
    logits[:, mask_id] = float("-inf")
    token = logits.argmax(-1)
    confidence = probability.gather(1, token[:, None])[:, 0].tolist()
    masked = [i for i in range(len(block)) if block[i] == mask_id]
    block = block.clone()
    for taken, i in enumerate(sorted(masked, key=lambda i: -confidence[i])):
        if share is not None:
            keep = taken < share
        elif threshold is not None:
            keep = confidence[i] >= threshold
        else:
            # The bound rises with each candidate while confidences fall, so the first that fails ends them all.
            keep = (taken + 2) * (1 - confidence[i]) < factor
        if taken > 0 and not keep:
            break
        block[i] = token[i]
    return block
