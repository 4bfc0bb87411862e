"""The published loops that decode several blocks at once, written out for one sequence: D2F's
(`_generate_block_single` of zhijie-group/Discrete-Diffusion-Forcing) and d3LLM's (`generate_multi_block` and
`generate_multi_block_kv_cache` of hao-ai-lab/d3LLM).

Both ask ``evaluate`` for the logits of some positions, and say which: from the first block that is not filled to the
last that is live, and which blocks were filled by the step before. What it evaluates besides, and against what, is the
cache's affair. Tokens and confidences are this package's (`reference.select`): [MASK] is never predicted, and a
threshold includes what reaches it. D2F stops adding blocks when an end of text is there; here nothing looks for one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dllm_fast.kernels import reference


@dataclass
class Asked:
    """What a step has to evaluate."""

    first: int  # the first position of the first block that is not filled
    stop: int  # one past the last of the last live block
    filled: int | None  # the first position of the blocks that the last step has filled; None: it has filled none
    step: int


@dataclass
class Found:
    ids: torch.Tensor
    nfe: int = 0


class Answer:
    """A prompt and its answer in blocks, and what the model predicts for them."""

    def __init__(self, evaluate: Callable, prompt, gen_length: int, block: int, mask_id: int, grid: bool, **select):
        total = len(prompt) + gen_length
        if grid:  # a block-causal model's blocks, the last of which is filled up
            total = -(-total // block) * block
        self.ids = torch.cat((prompt, prompt.new_full((total - len(prompt),), mask_id)))
        begin = len(prompt) // block * block if grid else len(prompt)
        self.blocks = [range(i, i + block) for i in range(begin, total, block)]
        self.open = self.ids == mask_id
        self.evaluate, self.mask_id, self.select = evaluate, mask_id, select

    def masked(self, block: range) -> list[int]:
        return [i for i in block if self.ids[i] == self.mask_id]

    def share(self, block: range) -> float:
        """Of a block's tokens, those that are there."""
        total = int(self.open[block.start : block.stop].sum())
        return (total - len(self.masked(block))) / total

    def predict(self, asked: Asked) -> tuple[dict[int, int], dict[int, float]]:
        """A token and a confidence for each masked position from ``asked.first`` to ``asked.stop``."""
        at = torch.tensor(self.masked(range(asked.first, asked.stop)))
        logits = self.evaluate(self.ids, self.open, asked)[at]
        token, score, _ = reference.select(logits, self.mask_id, step=asked.step, position=at, **self.select)
        at = at.tolist()
        return dict(zip(at, token.tolist(), strict=True)), dict(zip(at, score.tolist(), strict=True))


def d2f(answer: Answer, threshold: float, add: float, activate: float, blocks: int | None = None) -> Found:
    """D2F's. ``blocks``: how many are active at most, which the published loop does not bound."""
    state: list[str] = []  # of each block that was added: "active", "to cache" or "in cache"
    complete: list[bool] = []
    found, all_blocks = Found(answer.ids), answer.blocks
    while True:
        # 1. A block is added; blocks after one that is done enough may no longer wait.
        active = [n for n, one in enumerate(state) if one == "active"]
        progress = answer.share(all_blocks[len(state) - 1]) if state else 1.0
        room = blocks is None or len(active) < blocks
        if len(state) < len(all_blocks) and progress >= add and room:
            state.append("active")
            complete.append(len(state) == 1)
            active.append(len(state) - 1)
        for n in range(len(state) - 1):
            if answer.share(all_blocks[n]) >= activate:
                complete[n + 1] = True
        if not active:
            break
        # 2. A forward of what the cache lacks, and of the active blocks.
        cached = [n for n, one in enumerate(state) if one == "to cache"]
        filled = all_blocks[cached[0]].start if cached else None
        asked = Asked(all_blocks[active[0]].start, all_blocks[active[-1]].stop, filled, found.nfe)
        token, score = answer.predict(asked)
        found.nfe += 1
        for n in cached:
            state[n] = "in cache"
        # 3. Each active block takes what is sure enough, or its best if it may not wait.
        for n in active:
            left = answer.masked(all_blocks[n])
            chosen = [i for i in left if score[i] >= threshold]
            if complete[n] and left and not chosen:
                chosen = [max(left, key=lambda i: (score[i], -i))]
            for i in chosen:
                answer.ids[i] = token[i]
        # 4. Blocks that are filled leave, but none before those ahead of it.
        for n in active:
            if answer.masked(all_blocks[n]):
                break
            state[n] = "to cache"
    return found


def d3llm(answer: Answer, threshold: float, add: float, blocks: int | None = None, activate: float = 0.95) -> Found:
    """d3LLM's; the threshold is one of the negative entropy. ``blocks``: how many are live at most, which the published
    loop does not bound."""
    found, all_blocks = Found(answer.ids), answer.blocks
    masks = [len(answer.masked(all_blocks[0]))]  # of each block that was added
    activated = [True]
    front = 0
    while any(masks) or len(masks) < len(all_blocks):
        # 1. States of the blocks, and a new one.
        for n in range(1, len(masks)):
            activated[n] = activated[n] or answer.share(all_blocks[n - 1]) >= activate
        live = len(masks) - next((n for n, left in enumerate(masks) if left), len(masks))
        room = len(masks) < len(all_blocks) and (blocks is None or live < blocks)
        if room and answer.share(all_blocks[len(masks) - 1]) >= add:
            masks.append(len(answer.masked(all_blocks[len(masks)])))
            activated.append(answer.share(all_blocks[len(masks) - 2]) >= activate)
        # 2. A forward.
        before, front = front, next(n for n, left in enumerate(masks) if left)
        filled = all_blocks[before].start if front > before else None
        asked = Asked(all_blocks[front].start, all_blocks[len(masks) - 1].stop, filled, found.nfe)
        token, score = answer.predict(asked)
        found.nfe += 1
        # 3. Everything that is sure enough, and the surest.
        order = sorted(token, key=lambda i: (-score[i], i))
        chosen = [i for rank, i in enumerate(order) if rank == 0 or score[i] >= threshold]
        # 4. And one of the first block that was activated and is not filled.
        first = next(n for n, left in enumerate(masks) if left and activated[n])
        own = [i for i in order if i in all_blocks[first]]
        if not set(own) & set(chosen):
            chosen.append(own[0])
        for i in chosen:
            answer.ids[i] = token[i]
        masks = [len(answer.masked(block)) for block in all_blocks[: len(masks)]]
    return found


class Delayed:
    """The cache of d3LLM's `generate_multi_block_kv_cache`, for LLaDA: what each forward evaluates, and what is kept.

    ``forward(ids, open_, start, cache, asked)`` evaluates all positions from ``start`` on against the ``cache`` of
    those before, and returns the logits of all [L, V], and keys and values of all [..., L, G, D]. Several blocks never
    wait at a time, so the cache always ends where the next forward begins. (d3LLM's code for Dream has them wait side
    by side, and may keep keys twice.) Of a shifted model a forward that caches nothing evaluates one position more.
    """

    def __init__(self, forward: Callable, blocks: list[range], mask_id: int, delay: int, refresh: int):
        self.forward, self.mask_id, self.delay, self.refresh = forward, mask_id, delay, refresh
        self.blocks = blocks  # the prompt is the first
        self.complete_since = {0: 0}  # of blocks: the number of a forward, counted from 1
        self.is_cached: set[int] = set()
        self.cache, self.cached = None, 0  # keys and values, and how many positions are done with

    def __call__(self, ids, open_, asked: Asked):
        nfe = asked.step + 1
        # 1. Blocks that have waited long enough.
        to_cache = []
        for n, block in enumerate(self.blocks):
            if block.start >= asked.stop or bool((ids[block.start : block.stop] == self.mask_id).any()):
                break
            if block.stop <= self.cached:
                continue
            self.complete_since.setdefault(n, nfe)
            if nfe - self.complete_since[n] < self.delay:
                break
            to_cache.append(n)
            self.is_cached.add(n)
        waiting = [n for n in self.complete_since if n not in self.is_cached]
        # 2. A forward of everything behind the cache, or of everything.
        if to_cache:
            logits, new = self.forward(ids, open_, self.cached, self.cache, asked)
            self.cached = self.blocks[to_cache[-1]].stop
            self.cache = new[..., : self.cached, :, :]
        elif self.cache is not None and not waiting and nfe % self.refresh:
            logits, new = self.forward(ids, open_, self.cached, self.cache, asked)
            self.cache = new[..., : self.cached, :, :]
        else:
            logits, new = self.forward(ids, open_, 0, None, asked)
            if self.cache is not None:
                self.cache = new[..., : self.blocks[waiting[-1]].start if waiting else self.cached, :, :]
        return logits
