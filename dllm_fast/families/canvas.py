"""A canvas denoised once, from hidden states, without its logits in memory: in tiles of the vocabulary, in one pass.

With h a position's hidden state, W the head [V, d], E the embedding [V, d], c the softcap and T the temperature:

    z = c tanh(W h / c) / T        p = softmax(z)
    token ~ p        best = argmax z        entropy = -sum p log p        soft = p E

A tile is what all N positions have of some consecutive vocabulary entries, [N, w] fp32. Sums are kept relative to the
largest z so far, as in online softmax. The token is drawn by inverse CDF, with one uniform number u for each tile and
position: with M the mass of all tiles so far and m that of this tile, u M < m makes the token one of this tile, the one
at mass u M. Masses are added in fp64, so tokens of any probability are drawn as often as they should be.

The work is 4 N V d FLOPs (2 N V d for z, as much for soft) and reads W once; a tied E is read again while the tile's
rows are still in the processor's cache. State: N (4 d + 52) bytes. A tile of `TILE` elements and its temporaries take
five times its bytes. The floor is that of two matmuls of [N, d] with [d, V]; logits alone would be 4 N V bytes, 268 MB
at N = 256 and V = 262,144, and transformers' step makes several tensors of this size.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F

# Elements of a tile. On a CPU temporaries should stay near the cache; a GPU should get few, large kernels.
TILE = {"cpu": 1 << 21, "cuda": 1 << 23}
GROUP = 64  # entries whose mass is added first; a tile's width is a multiple


class Denoised(NamedTuple):
    token: torch.Tensor  # [N] int64, a sample
    best: torch.Tensor  # [N] int64, the first entry with the largest logit
    entropy: torch.Tensor  # [N] fp32, in nats
    soft: torch.Tensor | None  # [N, d] fp32, the expected embedding


def tile_width(rows: int, vocabulary: int, device: torch.device) -> int:
    """How many vocabulary entries a tile has."""
    width = TILE["cuda" if device.type == "cuda" else "cpu"] // rows
    return min(max(width, 8 * GROUP), vocabulary + GROUP - 1) // GROUP * GROUP


def denoise(
    hidden: torch.Tensor,  # [N, d], fp32 or bf16
    weight: torch.Tensor,  # [V, d], the head
    embedding: torch.Tensor | None,  # [V, d]; None: no expected embedding
    softcap: float,
    process: Callable[[torch.Tensor], torch.Tensor],  # logits [N, w] fp32 to processed ones, element by element
    uniform: torch.Tensor,  # [tiles, N] fp64, in [0, 1)
    width: int,  # of a tile, a multiple of `GROUP`
) -> Denoised:
    """Token, argmax, entropy and expected embedding of every position.

    Logits, and those that weigh the embedding, are rounded where transformers' step rounds them: the former to the
    dtype of the head, the latter to that of the embedding.
    """
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    top = hidden.new_full((rows,), -math.inf, dtype=torch.float32)
    best, token = (torch.zeros(rows, dtype=torch.int64, device=hidden.device) for _ in range(2))
    mass, moment = (torch.zeros(rows, dtype=torch.float64, device=hidden.device) for _ in range(2))
    expected = None if embedding is None else Expected(embedding, rows, hidden.device)
    for n, first in enumerate(range(0, vocabulary, width)):
        part = slice(first, first + width)
        logits = F.linear(hidden, weight[part]).float()
        logits = process(logits.div_(softcap).tanh_().mul_(softcap))
        # 1. The largest so far; of equal ones the first.
        highest, where = logits.max(-1)
        best = torch.where(highest > top, where + first, best)
        higher = torch.maximum(top, highest)
        coarse = None if expected is None else expected.weights(logits, higher)
        # 2. Masses, and the sum of p log p, relative to the largest.
        fall = (top - higher).double()
        logits = logits.sub_(higher[:, None])
        weights = logits.exp()
        sums = grouped(weights).sum(-1)
        running = sums.double().cumsum(-1)
        if n > 0:
            moment = fall.exp() * (moment + fall * mass)
            mass = fall.exp() * mass
        moment = moment + logits.mul_(weights).sum(-1).double()
        mass = mass + running[:, -1]
        # 3. The sample so far, and the embedding's.
        target = uniform[n] * mass
        token = torch.where(target < running[:, -1], first + entry_at(target, weights, sums, running), token)
        if expected is not None:
            expected.add(weights if coarse is None else coarse, top, higher, part)
        top = higher
    entropy = (mass.log() - moment / mass).float()
    return Denoised(token, best, entropy, None if expected is None else expected.mean())


def grouped(weights: torch.Tensor) -> torch.Tensor:
    """[N, w] as [N, groups, `GROUP`], the last filled up with zeros."""
    missing = -weights.shape[1] % GROUP
    weights = F.pad(weights, (0, missing)) if missing else weights
    return weights.view(weights.shape[0], -1, GROUP)


def entry_at(
    target: torch.Tensor,  # [N] fp64
    weights: torch.Tensor,  # [N, w] fp32
    sums: torch.Tensor,  # [N, groups] fp32
    running: torch.Tensor,  # [N, groups] fp64: ``sums`` and all before
) -> torch.Tensor:
    """The first entry of each row up to which the weights exceed ``target``, [N] int64; any, if it is out of reach."""
    group = torch.searchsorted(running, target[:, None], right=True).clamp_(max=sums.shape[1] - 1)
    chosen = group * GROUP + torch.arange(GROUP, device=group.device, dtype=group.dtype)
    inside = weights.gather(1, chosen.clamp(max=weights.shape[1] - 1)) * (chosen < weights.shape[1])
    inside = inside.double().cumsum(-1)
    # The group's sum in fp32 is not exactly the last of these: a share of one is a share of the other.
    total = sums.gather(1, group).double()
    share = (target[:, None] - running.gather(1, group) + total) / total
    entry = torch.searchsorted(inside, share * inside[:, -1:], right=True)
    last = torch.searchsorted(inside, inside[:, -1:].contiguous())  # the last that weighs something
    return (group * GROUP + torch.minimum(entry, last)).squeeze(1)


class Expected:
    """The expected embedding, accumulated over tiles: of the softmax of logits in the embedding's dtype."""

    def __init__(self, embedding: torch.Tensor, rows: int, device: torch.device):
        self.embedding = embedding  # [V, d]
        self.total = torch.zeros(rows, embedding.shape[1], dtype=torch.float32, device=device)
        self.mass = torch.zeros(rows, 1, dtype=torch.float32, device=device)

    def weights(self, logits: torch.Tensor, higher: torch.Tensor) -> torch.Tensor | None:
        """What a tile's rounded logits weigh, [N, w] fp32; None if nothing is rounded.

        Rounding keeps order, so the largest rounded logit is the rounded largest, ``higher`` [N].
        """
        dtype = self.embedding.dtype
        if dtype == torch.float32:
            return None
        return logits.to(dtype).float().sub_(higher.to(dtype).float()[:, None]).exp_()

    def add(self, weights: torch.Tensor, top: torch.Tensor, higher: torch.Tensor, part: slice) -> None:
        """Add a tile's. ``top`` and ``higher`` are the largest logits [N] before and after it."""
        dtype = self.embedding.dtype
        fall = (top.to(dtype).float() - higher.to(dtype).float()).exp_()[:, None]
        self.mass.mul_(fall).add_(weights.sum(-1, keepdim=True))
        self.total.mul_(fall)
        if dtype == torch.float32:
            self.total.addmm_(weights, self.embedding[part])
        else:
            self.total.add_(weights.to(dtype) @ self.embedding[part])

    def mean(self) -> torch.Tensor:
        return self.total / self.mass
