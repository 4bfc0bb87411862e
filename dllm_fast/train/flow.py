"""Flow language models: clean tokens from noisy ones, without [MASK].

With V tokens, x the one-hot of a token and g standard normal [V], a row of noise weight n and c = 1 - n has

    w = c x + n g        and the input softmax(w / tau) E, with E the embedding

At tau = 0 that is E[argmax w]: some tokens are flipped. The loss of a position is ``s [KL(p || q) + KL(q || p)]``: p is
the model's softmax, q the one-hot of the clean token smoothed by eps, ``s = n / (V c + n)``. Unsmoothed, KL(p || q)
would be infinite. A row's loss is the mean over its positions.

No tensor here is [B, L, V]. At tau = 0 tokens are flipped by `decoding.flips`; above it, noise is drawn for a part of
the vocabulary at a time, from a counter, and drawn again in the backward pass. Logits are computed for some rows at a
time, in both passes.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dllm_fast.decoding.flips import flipped
from dllm_fast.decoding.values import Checked, checked, real, require
from dllm_fast.kernels import reference
from dllm_fast.train import losses
from dllm_fast.train.data import Corruption
from dllm_fast.train.trainer import DiffusionTrainer

PART = 1 << 20  # noise in memory at once
LOGITS = 1 << 25  # logits in memory at once: 130 MB in fp32


def noise_weights(
    seed: int, step: int, rows: Sequence[int], batch: int, low: float, high: float
) -> torch.Tensor:  # fmt: skip
    """Noise weights [B] fp32 of ``rows`` of a step's ``batch``: uniform from ``low`` to ``high``, and evenly spaced
    over the batch as `losses.times` are."""
    first = torch.rand(1, generator=losses.generator(seed, step, "noise"), dtype=torch.float64, device="cpu")
    t = (first + torch.tensor(rows, dtype=torch.float64, device="cpu") / batch) % 1.0
    return (low + (high - low) * t).float()


def loss_scale(noise_weight: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """``s = n / (V c + n)`` of noise weights [B]."""
    return noise_weight / (vocabulary * (1 - noise_weight) + noise_weight)


def normals(
    seed: int, step: int, row: torch.Tensor, position: torch.Tensor, first: int, count: int
) -> torch.Tensor:  # fmt: skip
    """Standard normals [N, count] fp32 of the vocabulary indices from ``first``, which is even, on.

    A function of (seed, step, row [N], position [N], index): a pair of indices shares a Philox call, whose 128 bits the
    method of Box and Muller makes two normals of.
    """
    pairs = torch.arange(first // 2, (first + count + 1) // 2, device=row.device)
    words = reference.philox(seed, pairs, position[:, None], row[:, None], step)  # [N, pairs] each
    u, v = ((high.double() + (low.double() + 0.5) * 2.0**-32) * 2.0**-32 for high, low in (words[:2], words[2:]))
    radius = torch.sqrt(-2 * torch.log(u)).float()
    angle = (2 * math.pi * v).float()
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), -1).flatten(1)[:, :count]


class _SoftEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight, token, noise_weight, tau, key, columns):
        best = torch.full_like(noise_weight, float("-inf"))  # [N]: the largest of w so far
        total = torch.zeros_like(best)
        mixed = torch.zeros(len(token), weight.shape[1], dtype=best.dtype, device=weight.device)
        for first in range(0, len(weight), columns):
            part = weight[first : first + columns]
            w = _noisy(token, noise_weight, key, first, len(part))
            larger = torch.maximum(best, w.amax(1))
            shrunk = torch.exp((best - larger) / tau)
            p = torch.exp((w - larger[:, None]) / tau)
            total = total * shrunk + p.sum(1)
            mixed = mixed * shrunk[:, None] + p @ part.to(p.dtype)
            best = larger
        ctx.save_for_backward(token, noise_weight, best, total)
        ctx.rest = (tau, key, columns, weight.shape, weight.dtype)
        return (mixed / total[:, None]).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grads):
        token, noise_weight, best, total = ctx.saved_tensors
        tau, key, columns, shape, dtype = ctx.rest
        grad = (grads[0].to(best.dtype) / total[:, None]).contiguous()
        found = torch.empty(shape, dtype=dtype, device=grad.device)
        for first in range(0, shape[0], columns):
            part = found[first : first + columns]
            w = _noisy(token, noise_weight, key, first, len(part))
            part.copy_(torch.exp((w - best[:, None]) / tau).T @ grad)
        return found, None, None, None, None, None


def _noisy(token, noise_weight, key: tuple, first: int, count: int) -> torch.Tensor:
    """``c onehot(token) + n g`` [N, count] of the vocabulary indices from ``first`` on."""
    seed, step, row, position = key
    w = normals(seed, step, row, position, first, count).to(noise_weight.dtype) * noise_weight[:, None]
    inside = (token >= first) & (token < first + count)
    index = (token - first).clamp(0, count - 1)[:, None]
    return w.scatter_add(1, index, (inside * (1 - noise_weight))[:, None])


def soft_embedding(
    weight: torch.Tensor,  # [V, d]
    token: torch.Tensor,  # [N] int64
    noise_weight: torch.Tensor,  # [N] fp32
    tau: float,
    seed: int,
    step: int,
    row: torch.Tensor,  # [N] int
    position: torch.Tensor,  # [N] int
    part: int = PART,
) -> torch.Tensor:
    """``softmax((c onehot(token) + n g) / tau) @ weight`` [N, d], g = `normals`; at most ``part`` normals at once, but
    two a row. Its gradient with regard to ``weight`` is exact."""
    columns = max(2, part // max(1, len(token)) // 2 * 2)
    with torch.autocast(weight.device.type, enabled=False):  # noise is not rounded to 16 bits
        return _SoftEmbedding.apply(weight, token, noise_weight, tau, (seed, step, row, position), columns)  # type: ignore[no-any-return]


class _SymmetricKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits, target, smoothing):
        z = reference.widened(logits)
        on, off = _smoothed(smoothing, z.shape[1])
        lse = torch.logsumexp(z, 1)
        log_p = z - lse[:, None]
        of_target = log_p.gather(1, target[:, None])[:, 0]
        p = torch.exp(of_target)
        forward = (torch.exp(log_p) * log_p).sum(1) - p * math.log(on) - (1 - p) * math.log(off)  # KL(p || q)
        constant = on * math.log(on) + (z.shape[1] - 1) * off * math.log(off)
        backward = constant - (on - off) * of_target - off * log_p.sum(1)  # KL(q || p)
        ctx.save_for_backward(logits, target, lse, forward)
        ctx.smoothing = smoothing
        return forward + backward

    @staticmethod
    def backward(ctx: Any, *grads):
        logits, target, lse, forward = ctx.saved_tensors
        on, off = _smoothed(ctx.smoothing, logits.shape[1])
        log_p = logits.to(lse.dtype) - lse[:, None]
        p = torch.exp(log_p)
        index, p_k = target[:, None], p.gather(1, target[:, None])
        of_target = p_k * (log_p.gather(1, index) + (1 - math.log(on) - forward)[:, None]) - on
        grad = log_p.add_((1 - math.log(off) - forward)[:, None]).mul_(p).sub_(off)
        grad = grad.scatter_(1, index, of_target).mul_(grads[0][:, None])
        return grad.to(logits.dtype), None, None


def _smoothed(smoothing: float, vocabulary: int) -> tuple[float, float]:
    """q's probability of the clean token, and of each other one."""
    return 1 - smoothing + smoothing / vocabulary, smoothing / vocabulary


def symmetric_kl(logits: torch.Tensor, target: torch.Tensor, smoothing: float) -> torch.Tensor:
    """``KL(p || q) + KL(q || p)`` [N] for logits [N, V], in fp32 or fp64: p their softmax, and q
    ``(1 - smoothing) onehot(target) + smoothing / V``, for target [N] int64.

    With k the target and o any other token, ``KL(p || q) = sum p ln p - p_k ln q_k - (1 - p_k) ln q_o`` and
    ``KL(q || p) = sum q ln q - (q_k - q_o) ln p_k - q_o sum ln p``. The gradient with regard to logit j is
    ``p_j (1 + ln p_j - ln q_j - KL(p || q)) - q_j``.
    """
    return _SymmetricKL.apply(logits, target, smoothing)  # type: ignore[no-any-return]


def head_loss(
    hidden: torch.Tensor,  # [N, d]
    head,  # hidden [n, d] -> logits [n, V]
    target: torch.Tensor,  # [N] int64
    smoothing: float,
    rows: int,
) -> torch.Tensor:
    """`symmetric_kl` of ``head(hidden)`` [N]. The logits of ``rows`` rows are in memory at once, in both passes."""

    def part(h, t):
        return symmetric_kl(head(h), t, smoothing)

    pairs = zip(hidden.split(rows), target.split(rows), strict=True)
    found = [cast(torch.Tensor, checkpoint(part, h, t, use_reentrant=False)) for h, t in pairs]
    return torch.cat(found) if found else hidden.sum(-1)


def flow_loss(
    model: nn.Module,
    input_ids: torch.Tensor,  # [B, L] int64: flipped; with ``soft``, clean
    labels: torch.Tensor,  # [B, L] int64: clean ids, -100 where a position does not count and has no noise
    smoothing: float,
    soft: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,  # n [B], tau [B], (seed, step, row) [B, 3]
) -> torch.Tensor:
    """Each row's sum of `symmetric_kl` over its labelled positions, [B] fp32. Rows of one call have one tau, seed and
    step."""
    labelled = labels != losses.IGNORED
    target = labels[labelled]  # [N]
    row, position = labelled.nonzero(as_tuple=True)
    embeds = None
    if soft is not None:
        noise_weight, tau, key = soft
        seed, step = key[0, :2].tolist()
        table = cast(Any, model).get_input_embeddings()
        mixed = soft_embedding(
            table.weight, target, noise_weight[row], float(tau[0]), seed, step, key[row, 2], position
        )  # fmt: skip
        clean = table(input_ids)
        embeds = clean.index_put((row, position), mixed.to(clean.dtype))
    ids = input_ids if embeds is None else None
    states = losses.head_inputs(model, ids, labelled, embeds)
    if states is None:
        found = symmetric_kl(model(input_ids=ids, inputs_embeds=embeds).logits[labelled], target, smoothing)
    else:
        hidden, head = states
        logits_of: Callable[[torch.Tensor], torch.Tensor] = head  # called, so that an adapter takes effect
        if isinstance(head, nn.Embedding):  # tied
            logits_of = functools.partial(F.linear, weight=head.weight)
        vocabulary = cast(Any, model).get_input_embeddings().weight.shape[0]
        found = head_loss(hidden, logits_of, target, smoothing, max(1, LOGITS // vocabulary))
    return found.new_zeros(len(labels)).index_add(0, row, found)


def bind_flow(model: nn.Module, smoothing: float) -> None:
    """Make ``model(input_ids=, flow_labels=, noise_weight=, tau=, noise_key=)`` return `flow_loss`'s [B], through any
    wrapper; the last three are given together or not at all."""

    def loss(base, input_ids, flow_labels, noise_weight=None, tau=None, noise_key=None):
        soft = None if tau is None else (noise_weight, tau, noise_key)
        return flow_loss(base, input_ids, flow_labels, smoothing, soft)

    losses.bind(model, "flow_labels", loss)


def _between(name: str, value: Any, low: float, high: float) -> tuple[float, float]:
    require(isinstance(value, list | tuple) and len(value) == 2, f"{name}={value!r} is not two numbers")
    first, last = (real(name, v, f"from {low:g} to {high:g}", lambda x: low <= x <= high) for v in value)
    return first, last


@dataclass(frozen=True)
class Flow(Checked):
    """The objective. Raises ValueError for a value that it does not explain.

    noise: the range of a row's noise weight, from 0 to 1.
    tau: the softmax's temperature at the first step and at the last, falling by an equal factor a step; ``(0, 0)``
        flips tokens from the beginning, which costs nothing.
    smoothing: of the one-hot target, above 0 and below 1.
    """

    noise: tuple[float, float] = checked(_between, 0.0, 1.0, default=(0.0, 0.999))
    tau: tuple[float, float] = checked(_between, 0.0, math.inf, default=(1e-3, 1e-8))
    smoothing: float = checked(real, "above 0 and below 1", lambda x: 0 < x < 1, default=1e-4)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.noise[0] < self.noise[1], f"Flow: noise={self.noise!r} is not a range")
        falls = self.tau[0] >= self.tau[1] and (self.tau[1] > 0 or self.tau[0] == 0)
        require(falls, f"Flow: tau={self.tau!r} neither falls between two positive numbers nor is (0, 0)")

    def tau_at(self, step: int, steps: int) -> float:
        """Of a step from 0 to ``steps - 1``; evaluations, whose step is -1, have 0."""
        first, last = self.tau
        if step < 0 or first == 0:
            return 0.0
        return first * (last / first) ** (step / max(1, steps - 1))


@dataclass
class FlowCorruption(Corruption):
    """`Corruption` with `Flow`'s noise: input_ids and flow_labels [B, L], weight [B], and for tau above 0 what
    `flow_loss` asks for as ``soft``."""

    objective: Flow
    steps: int
    vocabulary: int

    def corrupt(self, ids, prompt, step, rows, batch):
        n = noise_weights(self.seed, step, rows, batch, *self.objective.noise)  # [B]
        position = torch.arange(ids.shape[1], device="cpu").expand_as(ids)
        kept = torch.zeros_like(ids, dtype=torch.bool) if prompt is None else position < prompt[:, None]
        answer = (~kept).sum(1).clamp(min=1)
        found = {"flow_labels": ids.masked_fill(kept, losses.IGNORED)}
        found["weight"] = loss_scale(n, self.vocabulary) / answer
        number = torch.tensor(rows, dtype=torch.int64, device="cpu")
        tau = self.objective.tau_at(step, self.steps)
        if tau > 0:
            key = torch.stack((torch.full_like(number, self.seed), torch.full_like(number, step), number), 1)
            return found | {"input_ids": ids, "noise_weight": n, "tau": torch.full_like(n, tau), "noise_key": key}
        per_token = (x[:, None].expand_as(ids).flatten() for x in (n, number))
        noise_weight, row = per_token
        noisy = flipped(
            ids.flatten(), noise_weight, self.vocabulary, self.seed, step, row, position.flatten()
        ).view_as(ids)  # fmt: skip
        return found | {"input_ids": torch.where(kept, ids, noisy)}


class FlowTrainer(DiffusionTrainer):
    """`DiffusionTrainer` with the loss of a flow language model, of which all else that it says is true.

    Args:
        model, args, mask_id, train_dataset, eval_dataset, data_collator, kwargs: `DiffusionTrainer`'s.
        objective: the noise, its temperature and the smoothing.
    """

    objective: Flow
    vocabulary: int

    def __init__(self, model, args, *, objective: Flow, **kwargs):
        self.objective = objective
        super().__init__(model, args, **kwargs)

    def bind_loss(self, model) -> None:
        bind_flow(model, self.objective.smoothing)
        self.vocabulary = cast(Any, losses.base_model(model)).get_input_embeddings().weight.shape[0]

    def corruption(self, collate, args):
        return FlowCorruption(collate, self.mask_id, args.seed, self.objective, args.max_steps, self.vocabulary)

    def _row_loss(self, model, inputs):
        inputs = dict(inputs)
        weight = inputs.pop("weight")
        return model(**inputs) * weight
