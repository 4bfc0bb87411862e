"""The definition of the options that evaluate fewer positions, and of ``cache_dtype``: one sequence, the keys and
values of its positions, no padding and no packing.

A step evaluates the positions of its block; with ``skip_committed`` those that are masked, and those that the step
before it committed, now with their tokens. What they attend to is every position's keys and values as they were last
computed, rounded to ``cache_dtype``.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from e4m3 import nearest

from dllm_fast.decoding.options import Options
from dllm_fast.decoding.remask import STAYS, Committed
from dllm_fast.decoding.request import plan_blocks
from dllm_fast.families.family import Family
from dllm_fast.kernels import reference


class Memory:
    """A model, and the keys and values [L, G, D] of each layer, as they were last computed and ``rounded``."""

    def __init__(self, family: Family, length: int, rounded: bool):
        self.family = family
        self.rounded = rounded
        shape = family.layers, length, family.kv_heads, family.head_dim
        self.keys, self.values = torch.full(shape, torch.nan).double(), torch.full(shape, torch.nan).double()

    def logits(self, ids: torch.Tensor, positions: list[int], seen: list[int]) -> torch.Tensor:
        """Evaluate ``ids`` [L] at ``positions``, which see the positions ``seen``: their logits [N, V]."""
        family, at = self.family, torch.tensor(positions)
        x, delta = family._embed(ids[at][None]), None
        for layer, block in enumerate(family.blocks):
            y, x = family._norm(x, delta, block.attn_norm)
            heads = family.heads, family.kv_heads, family.kv_heads
            projected = torch.cat([F.linear(y, part.weight, part.bias) for part in family._qkv(block)], -1)
            q, k, v = projected[0].unflatten(-1, (-1, family.head_dim)).split(heads, 1)  # [N, heads, D]
            q, k = self.normed(block, q, k)
            cos, sin = reference.rope_table(len(ids), family.head_dim, family.thetas[layer])
            cos, sin = (table.double()[at][:, None] for table in (cos, sin))
            q = reference.rotate(q, cos, sin)
            k = reference.rotate(k, cos, sin)
            self.keys[layer, at], self.values[layer, at] = (nearest(k), nearest(v)) if self.rounded else (k, v)
            attended = self.attend(layer, q, at, torch.tensor(seen))
            delta, x = family._after_attention(block, attended.flatten(1)[None], x, "torch")
        weight, bias = family.head()
        return F.linear(family._finish(x, delta)[0], weight, bias)

    def normed(self, block, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """q and k [N, heads, D] before they are rotated."""
        return q, k

    def attend(self, layer: int, q: torch.Tensor, at: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        window, group = self.family.windows[layer], self.family.heads // self.family.kv_heads
        keys, values = (x[layer].repeat_interleave(group, 1) for x in (self.keys[:, seen], self.values[:, seen]))
        weight = torch.einsum("nhd,lhd->nhl", q, keys) * q.shape[-1] ** -0.5
        if window is not None:
            far = (at[:, None] - seen).abs() > window
            weight = weight.masked_fill(far[:, None], -torch.inf)
        return torch.einsum("nhl,lhd->nhd", weight.softmax(-1), values)


@dataclass
class Found:
    ids: torch.Tensor
    nfe: int = 0
    positions: int = 0
    logprobs: dict[int, float] = field(default_factory=dict)  # of each token, when it was committed last
    steps: dict[int, tuple[int, int]] = field(default_factory=dict)  # by which block and step


@torch.no_grad()
def run(family: Family, prompt: torch.Tensor, options: Options, row: int = 0, memory: type[Memory] = Memory) -> Found:
    """Tokens of ``prompt`` [P] with the noise of ``row``; ``options`` are resolved.

    Of a shifted model a position is predicted by its left neighbour, which a step evaluates too. No ``eos_id`` ends it.
    """
    mask_id, size = options.mask_id, options.block_length
    found = Found(torch.cat((prompt, prompt.new_full((options.gen_length,), mask_id))))
    open_ = found.ids == mask_id
    memories = [memory(family, len(open_), options.cache_dtype == "e4m3") for _ in range(options.passes)]
    blocks = plan_blocks(open_, size)
    suppressed = list(options.suppress_tokens)
    near = 0

    def known(logits):
        """Log-probabilities of all tokens but those that are suppressed."""
        return logits.index_fill(0, torch.tensor(suppressed, dtype=torch.int64), -torch.inf).log_softmax(-1)

    for number, (first, masked) in enumerate(blocks):
        block = range(max(0, first), max(0, first) + min(size, len(open_)))
        reached, near = near, len(open_)
        if options.suffix_length is not None:
            near = min(near, block.stop + options.suffix_length)
        far = _sample(options, row, near, len(open_))
        seen = [*range(near), *far]
        plan = options.schedule.counts(torch.tensor([masked]), torch.tensor([len(blocks)]), None)
        fresh, when, now = [], {}, {}
        budget, step = options.block_length, 0
        while any(open_[i] and found.ids[i] == mask_id for i in block):
            candidates = [i for i in block if open_[i] and found.ids[i] == mask_id]
            # 1. What is evaluated.
            if step:
                suffix = (*range(block.stop, near), *far) if options.runs_suffix else ()
                live = {*candidates, *fresh} if options.skip_committed else block
                if family.shifted and block.start:
                    live = {block.start - 1, *live}
                positions = sorted({*live, *suffix})
            elif options.refresh.full(number):
                positions = seen
            else:
                window = _window(options, block, len(open_), near, int(family.shifted))
                positions = sorted({*window, *range(reached, near), *far})
            found.nfe += options.passes
            found.positions += options.passes * len(positions)
            prompts = found.ids, found.ids.masked_fill(~open_, mask_id)
            each = [one.logits(ids, positions, seen) for one, ids in zip(memories, prompts)]
            z = each[0] if len(each) == 1 else each[1] + (options.cfg_scale + 1) * (each[0] - each[1])
            z = dict(zip(positions, z))
            if family.shifted:
                z = {i: z[max(0, i - 1)] for i in block}
            # 2. What is predicted, and committed.
            at = torch.tensor(candidates)
            token, score, _ = reference.select(
                torch.stack([z[i] for i in candidates]), mask_id,
                confidence=options.schedule.confidence or options.confidence, temperature=options.temperature,
                seed=options.seed, step=plan[step][0] if plan else step, row=torch.full_like(at, row), position=at,
                top_k=options.top_k or 0, top_p=options.top_p, banned=options.suppress_tokens,
                deferred=options.defer_tokens,
            )  # fmt: skip
            score = options.schedule.ranked_by(score, at)
            quota = plan and plan[step][1]
            chosen = _commit(found.ids, candidates, token, score, options.schedule.rule or {"count": quota})
            # 3. What is masked again.
            if options.remask:
                predicted = {i: int(t) for i, t in zip(candidates, token)}
                now |= {i: float(known(z[i]).exp()[predicted.get(i, int(found.ids[i]))]) for i in block if i in z}
                now |= {i: 0.0 for i, one in zip(candidates, score.tolist()) if one == -math.inf}  # it is held back
                bound = len(candidates) - len(chosen) if plan else budget
                again = _again(options, block, open_, candidates, chosen, now, when, bound)
                found.ids[again] = mask_id
                budget -= len(again)
                if plan:
                    rest = [n for n, i in enumerate(candidates) if i not in chosen]
                    count = {"count": torch.tensor([len(again)])}
                    chosen += _commit(found.ids, [candidates[n] for n in rest], token[rest], score[rest], count)
                when |= {i: now[i] for i in chosen}
            for i in chosen:
                found.logprobs[i] = float(known(z[i])[found.ids[i]])
                found.steps[i] = number, step
            fresh, step = chosen, step + 1
    return found


def _sample(options: Options, row: int, near: int, length: int) -> list[int]:
    """``suffix_sample`` of the positions from ``near`` on. By Gumbel noise: each is drawn next with a probability that
    falls as 1 / distance, until there are enough."""
    at = torch.arange(near, length)
    draws = reference.uniform(options.seed, (1 << 32) - 2, torch.full_like(at, row), at)
    keys = [-math.log(i - near + 1) - math.log(-math.log(u)) for i, u in zip(at.tolist(), draws.tolist())]
    return sorted(sorted(at.tolist(), key=lambda i: -keys[i - near])[: options.suffix_sample])


def _window(options: Options, block: range, length: int, end: int, left: int) -> list[int]:
    before, after = options.refresh.span(options.block_length)
    before = min(max(before, left), length - len(block))
    if options.suffix_length is not None:
        after = min(after, options.suffix_length)
    if options.runs_suffix:
        return list(range(max(0, block.start - before), end))
    size = min(before + len(block) + after, length)
    begin = min(max(0, block.start - before), length - size)
    return list(range(begin, min(begin + size, end)))


def _commit(ids: torch.Tensor, candidates: list[int], token, score, rule: dict) -> list[int]:
    if not candidates:
        return []
    line = torch.full((1, len(candidates)), -1)
    every = torch.ones_like(line, dtype=torch.bool)
    chosen = reference.commit(line, token[None], score[None], every, torch.zeros(1, dtype=torch.int64), **rule)[0]
    for n in chosen.nonzero()[:, 0].tolist():
        ids[candidates[n]] = token[n]
    return [candidates[n] for n in chosen.nonzero()[:, 0].tolist()]


def _again(options, block, open_, candidates, chosen, now, when, bound) -> list[int]:
    def of_block(value, dtype):
        return torch.tensor([[value(i) for i in block]], dtype=dtype)

    seen = Committed(
        of_block(lambda i: bool(open_[i]) and i not in candidates, torch.bool),
        of_block(lambda i: now.get(i, 0.0), torch.float32),
        of_block(lambda i: when.get(i, 0.0), torch.float32),
        of_block(lambda i: i in candidates, torch.bool),
        torch.tensor([len(chosen)]),
    )
    urgency = options.remask.urgency(seen)[0]
    order = urgency.argsort(descending=True, stable=True).tolist()
    return [block[n] for n in order[:bound] if urgency[n] > STAYS]
