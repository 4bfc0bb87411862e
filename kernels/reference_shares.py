"""`reference.predict` where several processes hold a share of the vocabulary each: the definitions.

A share reduces its logits z to an id and six numbers a row, those of a tile in `select`. With the maxima and sums over
the share's own ids:

    m = max z_v,  s = sum e^(z_v - m)                                of the ids that count in the softmax
    b = max (z_v + temperature G_v), its v, its z_v                  of those that may be chosen
    sum e^(z_v - m) (z_v - m), or the two largest z_v                for the entropy, or the margin

`combine` merges the shares i. Noise is a function of the id in the whole vocabulary, so nothing is lost:

    M = max m_i,  S = sum s_i e^(m_i - M),  lse = M + ln S,  token = the v of the largest b_i, ties to the lowest

One merge of the shares' shares is the same merge, so `condense` may come before.
"""

import torch

from dllm_fast.kernels.reference import widened
from dllm_fast.kernels.reference_noise import gumbel, uniform

FIELDS = 6  # peak, mass, best score, its logit, and two for the confidence, as in `select`
LOWEST = float("-inf")


def reduce(
    logits: torch.Tensor,  # [N, C]: of the ids from ``first`` on
    first: int,
    mask_id: int,
    confidence: str = "probability",
    temperature: float = 0.0,
    seed: int | torch.Tensor = 0,
    step: int | torch.Tensor = 0,
    row: torch.Tensor | None = None,  # [N] int
    position: torch.Tensor | None = None,  # [N] int
    banned: tuple[int, ...] = (),
    deferred: tuple[int, ...] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a share tells: six numbers [FIELDS, N, 1] (fp32, or fp64 for fp64 logits) and the best id [N, 1] int64.

    Ids are those of the whole vocabulary, also ``mask_id``, ``banned`` and ``deferred``.
    """
    z = without(widened(logits), banned, first)
    counted = without(z, deferred, first)
    peak = counted.amax(1)
    shift = finite(peak)
    apart = counted - shift[:, None]
    weight = torch.exp(apart)
    scored = without(z, (mask_id,), first)
    if temperature > 0:
        assert row is not None and position is not None
        columns = first + torch.arange(z.shape[1], device=z.device)
        scored = scored + temperature * gumbel(seed, step, row, position, columns)
    best, index = scored.max(1)
    one = two = torch.zeros_like(peak)
    if confidence == "entropy":
        one = torch.where(weight > 0, weight * apart, 0.0).sum(1)
    elif confidence == "margin":
        admissible = without(counted, (mask_id,), first)
        one, leader = admissible.max(1)
        two = admissible.scatter(1, leader[:, None], LOWEST).amax(1)
    logit = z.gather(1, index[:, None])[:, 0]
    fields = torch.stack([peak, weight.sum(1), best.to(z.dtype), logit, one, two])
    return fields[..., None], (first + index)[:, None]


def without(z: torch.Tensor, ids: tuple[int, ...], first: int) -> torch.Tensor:
    """z [N, C] of the ids from ``first`` on, -inf for those of ``ids`` that are among them."""
    own = [i - first for i in ids if first <= i < first + z.shape[1]]
    if own:
        z = z.clone()
    for i in own:
        z[:, i] = LOWEST
    return z


def finite(peak: torch.Tensor) -> torch.Tensor:
    """``peak``, and 0 where all is -inf: -inf - -inf would be NaN."""
    return peak.masked_fill(peak == LOWEST, 0.0)


def condense(part: torch.Tensor, best: torch.Tensor, confidence: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Several shares [FIELDS, N, S] and their ids [N, S] as one, [FIELDS, N, 1] and [N, 1]."""
    peaks, masses, scores, logits, ones, twos = part
    peak = peaks.amax(1, keepdim=True)
    scale = torch.exp(peaks - finite(peak))
    token, at = winner(scores, best)
    one, two = ones[:, :1], twos[:, :1]
    if confidence == "entropy":
        # Where the scale is 0, the difference of the peaks may be -inf.
        moved = torch.where(scale > 0, scale * (ones + (peaks - finite(peak)) * masses), 0.0)
        one = moved.sum(1, keepdim=True)
    elif confidence == "margin":
        one, leader = ones.max(1, keepdim=True)
        two = ones.scatter(1, leader, twos.gather(1, leader)).amax(1, keepdim=True)
    mass = (masses * scale).sum(1, keepdim=True)
    return torch.stack([peak, mass, scores.gather(1, at), logits.gather(1, at), one, two]), token


def winner(scores: torch.Tensor, best: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The lowest of the ids [N, S] that have the largest score [N, S], and which share's it is, [N, 1] each. A NaN
    equals no score; then it is one of the ids."""
    largest = best.amax(1, keepdim=True)
    token = torch.where(scores == scores.amax(1, keepdim=True), best, largest).amin(1, keepdim=True)
    return token, (best == token).int().argmax(1, keepdim=True)


def combine(
    part: torch.Tensor,  # [FIELDS, N, S]
    best: torch.Tensor,  # [N, S] int64
    confidence: str = "probability",
    seed: int | torch.Tensor = 0,
    step: int | torch.Tensor = 0,
    row: torch.Tensor | None = None,
    position: torch.Tensor | None = None,
    deferred: tuple[int, ...] = (),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token [N] int64, confidence [N] and log-sum-exp [N] of the shares together, as `reference.select`."""
    part, best = condense(part, best, confidence)
    (peak, mass, _, logit, one, two), token = part[..., 0], best[:, 0]
    shift = finite(peak)
    if confidence == "probability":
        score = torch.exp(logit - shift) / mass
    elif confidence == "margin":
        score = (torch.exp(one - shift) - torch.exp(two - shift)) / mass
    elif confidence == "entropy":
        score = one / mass - mass.log()
    else:
        assert row is not None and position is not None
        score = uniform(seed, step, row, position).to(mass.dtype)
    for i in deferred:
        score = score.masked_fill(token == i, LOWEST)
    return token, score, shift + mass.log()


def select(logits: torch.Tensor, ranks, mask_id: int, **options) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`reference.select` from this process's share of the logits, [N, C]; the same on every process.

    ``ranks`` has ``first``, the share's first id, and ``exchange``, from a share [FIELDS, N, 1] and its ids [N, 1] to
    those of all, [FIELDS, N, S] and [N, S].
    """
    part, best = ranks.exchange(*reduce(logits, ranks.first, mask_id, **options))
    merged = {name: x for name, x in options.items() if name not in ("temperature", "banned")}
    return combine(part, best, **merged)
