"""Every op of the package in plain PyTorch: the definition that each kernel is tested against.

It needs only torch, and runs on any device in any float dtype. Half-precision inputs are computed in fp32 and rounded
where the published models round. fp64 inputs are computed in fp64 throughout: that is the truth of the tests. Nothing
here is written for speed.

Letters: B batch rows, T query positions, S slots of a K/V buffer, H query heads, G key/value heads, D head dim,
d model width, V vocabulary, N gathered positions.
"""

import torch

from dllm_fast.kernels.checks import ranges_of
from dllm_fast.kernels.reference_noise import gumbel, philox, uniform  # noqa: F401
from dllm_fast.kernels.reference_nucleus import filters, kept, winner
from dllm_fast.kernels.reference_rounded import as_bytes, rounded


def widened(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


# Matmuls, norms and gates


def linear(
    x: torch.Tensor,  # [..., K]
    weight: torch.Tensor,  # [N, K]
    scale: torch.Tensor | None = None,  # [N]: of e4m3 weights
    gated: bool = False,
) -> torch.Tensor:
    """``x W^T``, with ``scale[n] W[n]`` in place of W where there is a scale; [..., N], rounded once.

    ``gated``: the first half of W's rows are a gate, the second half an up projection. Returns `swiglu` of the two
    outputs, each rounded, [..., N / 2].
    """
    wide = widened(weight)
    y = (widened(x) @ (wide if scale is None else wide * scale.to(wide.dtype)[:, None]).T).to(x.dtype)
    return swiglu(*y.chunk(2, -1)) if gated else y


def grouped_linear(
    x: torch.Tensor,  # [M, K]
    weight: torch.Tensor,  # [E, N, K]
    ends: torch.Tensor,  # [E] int: one past the last row of each group, ascending; the last is M
) -> torch.Tensor:
    """``x_m W_g^T`` of the rows m of each group g, which follow one another; [M, N], rounded once."""
    group = torch.searchsorted(ends.long(), torch.arange(len(x), device=x.device), right=True)
    return torch.einsum("mk,mnk->mn", widened(x), widened(weight)[group]).to(x.dtype)


def experts(
    x: torch.Tensor,  # [N, d]
    gate_up: torch.Tensor,  # [E, 2 f, d]: an expert's gate, then its up projection
    down: torch.Tensor,  # [E, d, f]
    chosen: torch.Tensor,  # [N, k] int64: experts of each token
    weight: torch.Tensor,  # [N, k]: theirs
) -> torch.Tensor:
    """``sum_j weight_j down(swiglu(gate(x), up(x)))`` over a token's experts, [N, d]. Gate and up, their `swiglu` and
    down are rounded each, and the sum once."""
    both = torch.einsum("nd,nkfd->nkf", widened(x), widened(gate_up)[chosen]).to(x.dtype)
    gated = swiglu(*both.chunk(2, -1))
    out = torch.einsum("nkf,nkdf->nkd", widened(gated), widened(down)[chosen]).to(x.dtype)
    return (widened(out) * weight[..., None]).sum(1).to(x.dtype)


def rms_norm(
    x: torch.Tensor,  # [..., d]
    weight: torch.Tensor,  # [d]
    eps: float,
    residual: torch.Tensor | None = None,  # [..., d]
) -> tuple[torch.Tensor, torch.Tensor]:
    """``h = x + residual``, ``y = round(h / sqrt(mean(h^2) + eps)) * weight``; returns ``(y, h)``.

    The normalised value is rounded to ``x.dtype`` before the weight multiplies it, as LLaDA does (arXiv:1910.07467
    for the norm). Without a residual ``h`` is ``x`` itself.
    """
    h = x if residual is None else x + residual
    wide = widened(h)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(h.dtype) * weight, h


def layer_norm(
    x: torch.Tensor,  # [..., d]
    weight: torch.Tensor,  # [d]
    bias: torch.Tensor | None,  # [d]
    eps: float,
    residual: torch.Tensor | None = None,  # [..., d]
) -> tuple[torch.Tensor, torch.Tensor]:
    """``h = x + residual``, ``y = (h - mean) / sqrt(var + eps) * weight + bias``; returns ``(y, h)``.

    The variance is the biased one (arXiv:1607.06450); one rounding, at the end, as in ``torch.nn.LayerNorm``.
    """
    h = x if residual is None else x + residual
    wide = widened(h)
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight
    return (y if bias is None else y + bias).to(h.dtype), h


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` (arXiv:2002.05202); both [..., f]. One rounding."""
    wide = widened(gate)
    return (wide * torch.sigmoid(wide) * up).to(gate.dtype)


def geglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``gelu(gate) * up`` with the exact, erf-based GELU (arXiv:2002.05202); both [..., f]. One rounding."""
    wide = widened(gate)
    return (0.5 * wide * (1 + torch.erf(wide * 0.5**0.5)) * up).to(gate.dtype)


# Rotary position embedding and attention over a K/V buffer


def rope_table(positions: int, head_dim: int, theta: float, device=None) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of ``p * theta^(-2i/D)``, each [positions, D/2] fp32 (arXiv:2104.09864).

    Angles are computed in fp32 on purpose, as both model families do.
    """
    inv_freq = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angle = torch.outer(torch.arange(positions, dtype=torch.float32, device=device), inv_freq)
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Half-split rotation ``(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)`` in the dtype of cos, rounded once."""
    x1, x2 = x.to(cos.dtype).chunk(2, -1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1).to(x.dtype)


def rope(
    q: torch.Tensor,  # [B, T, H, D]
    k: torch.Tensor,  # [B, T, G, D]
    v: torch.Tensor,  # [B, T, G, D]
    cos: torch.Tensor,  # [P, D/2] fp32
    sin: torch.Tensor,  # [P, D/2] fp32
    position: torch.Tensor,  # [B] int: position of each row's first query
    slot: torch.Tensor,  # [B] int: buffer slot of each row's first query
    keys: torch.Tensor,  # [R, S, G, D], written in place: of q's dtype or e4m3, as values
    values: torch.Tensor,  # [R, S, G, D], written in place
    row: torch.Tensor | None = None,  # [B] int: which of the buffers' R rows; None: each its own, R = B
) -> torch.Tensor:
    """Rotate q and k, write k and v at ``slot + t`` of the buffers, return the rotated q [B, T, H, D].

    `rotate` at position ``max(position + t, 0)`` (negative positions are padding), in fp32, `rounded` once to what the
    buffers hold. Rows whose slot falls outside [0, S) are not written.
    """
    offset = torch.arange(q.shape[1], device=q.device)
    angle = (position[:, None] + offset).clamp(0, cos.shape[0] - 1)
    c, s = (table.to(widened(q).dtype)[angle][:, :, None] for table in (cos, sin))

    slots = slot[:, None] + offset
    inside = (slots >= 0) & (slots < keys.shape[1])
    row = (torch.arange(q.shape[0], device=q.device) if row is None else row)[:, None].expand_as(slots)
    at = row[inside], slots[inside]
    as_bytes(keys)[at] = as_bytes(rounded(rotate(widened(k), c, s), keys.dtype))[inside]
    as_bytes(values)[at] = as_bytes(rounded(v, values.dtype))[inside]
    return rotate(q, c, s)


def attention(
    q: torch.Tensor,  # [B, T, H, D]
    keys: torch.Tensor,  # [B, S, G, D] of q's dtype or e4m3, as values
    values: torch.Tensor,  # [B, S, G, D]
    start: torch.Tensor,  # [B] int: first valid slot
    end: torch.Tensor,  # [B] int: one past the last valid slot
    slot: torch.Tensor,  # [B] int: buffer slot of each row's first query
    window: int | None = None,
    scale: float | None = None,
    first: torch.Tensor | None = None,  # [B + 1] int: packed queries, q [N, 1, H, D] and slot [N]
    block: int | None = None,
    origin: torch.Tensor | None = None,  # [B] int, with a block; None: start
) -> torch.Tensor:
    """Softmax attention, [B, T, H, D].

    Query t of row b sees slots j with ``start[b] <= j < end[b]`` and, given a window, ``|slot[b] + t - j| <= window``.
    Given a ``block``, it sees no slot behind its own block's; blocks of that many slots are counted from ``origin[b]``,
    and the slots before it are one block.
    Query head h reads key/value head ``h // (H/G)``. ``scale`` defaults to ``D^-0.5``. Without a slot to see, it is 0.

    Packed queries are each at a slot of its own: those from ``first[b]`` to ``first[b + 1]`` are row b's, in the order
    of their slots. Queries from ``first[B]`` on are of no row, and their results have no meaning.
    """
    wide_q = widened(q)
    keys, values = keys.to(wide_q.dtype), values.to(wide_q.dtype)
    if first is not None:
        row = row_of(first, q.shape[0])
        each = start[row], end[row], slot, window, scale, None, block, None if origin is None else origin[row]
        return attention(q, keys[row], values[row], *each)
    group = q.shape[2] // keys.shape[2]
    wide_k, wide_v = (x.repeat_interleave(group, 2) for x in (keys, values))
    score = torch.einsum("bthd,bshd->bhts", wide_q, wide_k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    visible = visible_slots(q.shape[1], keys.shape[1], start, end, slot, window, block, origin)[:, None]
    score = score.masked_fill(~visible, float("-inf"))
    weight = torch.softmax(score, -1).masked_fill(~visible.any(-1, keepdim=True), 0.0)
    return torch.einsum("bhts,bshd->bthd", weight, wide_v).to(q.dtype)


def row_of(first: torch.Tensor, queries: int) -> torch.Tensor:
    """The row of each packed query, [N] int64; of one that has no row the last."""
    index = torch.arange(queries, device=first.device)
    return (index[:, None] >= first[None, 1:-1]).sum(1)


def visible_slots(queries: int, slots: int, start, end, slot, window=None, block=None, origin=None) -> torch.Tensor:
    """Which slots each query sees: [B, T, S] bool, from arguments as in `attention`; or from each query's ``slot``
    [B, T]."""
    j = torch.arange(slots, device=start.device)
    visible = ((j >= start[:, None]) & (j < end[:, None]))[:, None].expand(-1, queries, -1)
    if window is not None or block is not None:
        i = (slot if slot.dim() == 2 else slot[:, None] + torch.arange(queries, device=slot.device))[:, :, None]
    if window is not None:
        visible = visible & ((i - j).abs() <= window)
    if block is not None:
        first = (start if origin is None else origin)[:, None, None]
        number = (i - first).div(block, rounding_mode="floor").clamp(min=-1)
        visible = visible & (j < first + (number + 1) * block)
    return visible


# Prediction, commitment, loss


def predict(
    hidden: torch.Tensor,  # [N, d]
    weight: torch.Tensor,  # [V, d], or e4m3 with scale
    bias: torch.Tensor | None = None,  # [V]
    scale: torch.Tensor | None = None,  # [V]
    *,
    mask_id: int,
    candidate: torch.Tensor | None = None,  # [N] bool; None: all
    confidence: str = "probability",
    temperature: float = 0.0,
    seed: int | torch.Tensor = 0,  # int, or [1] or [N] int64
    step: int | torch.Tensor = 0,  # int, or [1] or [N] int64
    row: torch.Tensor | None = None,  # [N] int, for the noise
    position: torch.Tensor | None = None,  # [N] int, for the noise
    uncond: torch.Tensor | None = None,  # [N, d]
    cfg_scale: float = 0.0,
    banned: tuple[int, ...] = (),
    deferred: tuple[int, ...] = (),
    softcap: float | None = None,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token [N] int64, confidence [N] and log-sum-exp [N] (fp32, or fp64 for fp64 inputs) of each candidate.

    ``z = hidden W^T + b``, each row of W times its ``scale``, `capped` if there is a ``softcap``, and `guided` if there
    is an ``uncond``: each of the two is capped before. The logits of ``banned`` ids are -inf. The token is
    ``argmax(z + temperature * gumbel)`` over the vocabulary without ``mask_id``, ties to the lowest id; above
    temperature 0 over what ``top_k`` and ``top_p`` keep of it (`reference_nucleus`). Then the logits of ``deferred``
    ids are -inf as well (arXiv:2502.09992, appendix B.4), and the log-sum-exp and the confidence come from the logits
    that are left, without the noise. With p = softmax(z) the confidence is p[token] (``probability``); p1 - p2 of the
    two most probable tokens but ``mask_id`` (``margin``); sum p ln p (``entropy``); or a uniform draw (``random``). It
    is -inf where the token is a deferred one. A position that is no candidate gets token ``mask_id``, confidence -inf
    and log-sum-exp 0.
    """
    wide = widened(weight) if scale is None else weight.to(scale.dtype) * scale[:, None]
    passes = [widened(x) @ wide.T for x in (hidden, uncond) if x is not None]
    if softcap is not None:
        passes = [capped(z if bias is None else z + bias, softcap) for z in passes]
        bias = None
    logits = passes[0] if uncond is None else guided(passes[0], passes[1], cfg_scale)
    if bias is not None:
        logits = logits + bias
    keys = seed, step, row, position
    return select(logits, mask_id, candidate, confidence, temperature, *keys, banned, deferred, top_k, top_p)


def capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Logits as Gemma's models cap them, ``softcap tanh(logits / softcap)``; None: as they are."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def guided(logits: torch.Tensor, uncond: torch.Tensor, cfg_scale: float) -> torch.Tensor:
    """Classifier-free guidance (arXiv:2207.12598), from logits with the prompt and ``uncond`` without it."""
    return uncond + (cfg_scale + 1) * (logits - uncond)


def select(
    logits: torch.Tensor,  # [N, V]
    mask_id: int,
    candidate: torch.Tensor | None = None,
    confidence: str = "probability",
    temperature: float = 0.0,
    seed: int | torch.Tensor = 0,
    step: int | torch.Tensor = 0,
    row: torch.Tensor | None = None,
    position: torch.Tensor | None = None,
    banned: tuple[int, ...] = (),
    deferred: tuple[int, ...] = (),
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The part of `predict` that follows the logits; same arguments and results."""
    scored = without(logits, (mask_id, *banned))
    filtered = filters(temperature, top_k, top_p)
    columns = torch.arange(logits.shape[1], device=logits.device)
    if filtered:
        scored, columns = kept(scored, temperature, top_k, top_p)
    if temperature > 0:
        assert row is not None and position is not None
        scored = scored + temperature * gumbel(seed, step, row, position, columns)
    token = winner(scored, columns) if filtered else scored.argmax(-1)
    logits = without(logits, (*banned, *deferred))
    lse = torch.logsumexp(logits, -1)
    if confidence == "probability":
        score = torch.exp(logits.gather(1, token[:, None])[:, 0] - lse)
    elif confidence == "margin":
        best = torch.exp(without(logits, (mask_id,)).topk(2, -1).values - lse[:, None])
        score = best[:, 0] - best[:, 1]
    elif confidence == "entropy":
        score = -torch.special.entr(torch.exp(logits - lse[:, None])).sum(-1)
    elif row is not None and position is not None:
        score = uniform(seed, step, row, position).to(lse.dtype)
    for i in deferred:
        score = score.masked_fill(token == i, float("-inf"))
    if candidate is None:
        return token, score, lse
    return token.where(candidate, mask_id), score.where(candidate, float("-inf")), lse.where(candidate, 0.0)


def without(logits: torch.Tensor, ids: tuple[int, ...]) -> torch.Tensor:
    """``logits`` [N, V] with -inf for ``ids``, a copy if there are any. Nothing goes from the host to the device, which
    a CUDA graph could not record."""
    ranges = ranges_of(ids)
    logits = logits.clone() if ranges else logits
    for low, high in zip(ranges[::2], ranges[1::2]):
        logits[:, low:high].fill_(float("-inf"))
    return logits


def commit(
    sequence: torch.Tensor,  # [B, S] int64, written in place
    token: torch.Tensor,  # [B, T] int64
    confidence: torch.Tensor,  # [B, T] float
    candidate: torch.Tensor,  # [B, T] bool
    slot: torch.Tensor,  # [B] int: sequence index of each row's first candidate position
    *,
    count: torch.Tensor | None = None,  # [B] int
    threshold: float | None = None,
    factor: float | None = None,
    bound: float | None = None,
    least: int = 1,
) -> torch.Tensor:
    """Write the chosen candidates of each row at ``slot + t`` of ``sequence``; return which those are, [B, T] bool.

    A row keeps its k most confident candidates, or all if it has fewer; ties go to the lowest position. With the
    confidences c in descending order, k is one of:

    - ``count``, exactly: 0 keeps nothing;
    - the number of confidences that reach ``threshold``;
    - the largest k with ``(k + 1) (1 - c_k) < factor`` (arXiv:2505.22618);
    - the largest k with ``-(c_1 + ... + c_{k-1}) <= bound``, c the negative entropy: the error of keeping k tokens
      together is at most the sum of all their entropies but the largest (EB-Sampler, arXiv:2505.24857).

    All but ``count`` keep at least ``least``. A confidence that is not finite counts as -inf.
    """
    score = confidence.masked_fill(~candidate | ~confidence.isfinite(), float("-inf"))
    order = score.argsort(dim=-1, descending=True, stable=True)
    # Candidates at -inf rank ahead of non-candidates, or a row might never progress.
    order = order.gather(1, candidate.gather(1, order).int().argsort(dim=-1, descending=True, stable=True))
    best = score.gather(1, order)
    rank = order.argsort(-1)
    if count is not None:
        k = count
    elif threshold is not None:
        k = (best >= threshold).sum(-1).clamp(min=least)
    elif factor is not None:
        nth = torch.arange(1, best.shape[1] + 1, device=best.device)
        k = (nth * ((nth + 1) * (1 - best) < factor)).amax(-1).clamp(min=least)
    elif bound is not None:
        before = torch.nn.functional.pad(-best, (1, 0))[:, :-1].cumsum(-1)
        k = (before <= bound).sum(-1).clamp(min=least)
    chosen = candidate & (rank < k[:, None])
    index = slot[:, None] + torch.arange(token.shape[1], device=token.device)
    row = torch.arange(sequence.shape[0], device=token.device)[:, None]
    sequence[row, index] = torch.where(chosen, token, sequence[row, index])
    return chosen


def masked_loss(
    hidden: torch.Tensor,  # [N, d]
    weight: torch.Tensor,  # [V, d]
    bias: torch.Tensor | None,  # [V]
    target: torch.Tensor,  # [N] int64
    loss_weight: torch.Tensor | None,  # [N] float
) -> torch.Tensor:
    """``sum_n loss_weight[n] * (logsumexp(z[n]) - z[n, target[n]])``, z = hidden W^T + b; a scalar, fp32 or fp64.

    Without ``loss_weight`` it is the terms themselves, [N]. With ``loss_weight = 1 / (p_mask * B * L)`` on masked
    positions it is LLaDA's training loss (arXiv:2502.09992, eq. 3).
    """
    logits = widened(torch.nn.functional.linear(hidden, weight, bias))
    nll = torch.logsumexp(logits, -1) - logits.gather(1, target[:, None])[:, 0]
    return nll if loss_weight is None else (nll * loss_weight).sum()
