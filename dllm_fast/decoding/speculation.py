"""Speculation: the states that a block's next steps may reach are guessed, and evaluated together in one forward.

A state is one setting of a block's tokens. A forward evaluates the state that the schedule has reached, and drafts of
those that follow. Then the schedule takes its step on what was predicted from the first. If the state that it reaches
is the draft that was made for it, its predictions are there too, and the schedule takes the next step at once; and so
on. What a step gives is a function of its state, so the tokens are the schedule's own, in fewer forwards (FreeDave,
arXiv:2510.00294; Spiffy, arXiv:2509.18085).

A draft is what the schedule would do if nothing that is masked were predicted anew.
"""

import torch

from dllm_fast import ops
from dllm_fast.decoding.device import upload
from dllm_fast.decoding.forwards import Forwards
from dllm_fast.decoding.steps import Step
from dllm_fast.families.cache import BlockCache
from dllm_fast.families.rows import Packed, States


class Speculation(Forwards):
    """Drafts, their forward, and how far the schedule gets with what they predict."""

    def __init__(self, family, options, rows: int, slots: int, spare: int, padded: bool):
        super().__init__(family, options, rows, slots, spare, padded)
        if not options.drafts:
            return
        self.drafts = torch.zeros((rows, options.drafts, self.block_size), dtype=torch.int64, device=self.device)
        # Of each row's steps in this block: how many it has taken, and of each the number and what it commits.
        self.taken = torch.zeros_like(self.slot)
        self.plan = torch.zeros((2, rows, self.block_size + 1), dtype=torch.int64, device=self.device)
        self.own = None
        if self.cache is not None:  # the keys and values of states; those of a row follow one another
            length = slots if options.runs_suffix else self.block_size
            width = self.weight.shape[1] if options.refresh.layerwise else 0
            shape = (family.layers, rows * self.passes, (options.drafts + 1) * length, family.kv_heads, family.head_dim)
            self.own = BlockCache(*shape, self.weight.dtype, self.device, width)

    def plan_steps(self, planned: list[tuple[int, torch.Tensor]] | None) -> None:
        """Begin a block, whose steps are `Schedule.counts` of it. A row's steps are those that commit any."""
        self.taken.zero_()
        if planned is None:
            return
        number = torch.tensor([step for step, _ in planned], dtype=torch.int64, device="cpu")
        count = torch.stack([count for _, count in planned], 1)  # [B, steps]
        order = (count == 0).sort(stable=True).indices[:, : self.block_size]  # those that commit any come first
        plan = torch.zeros(self.plan.shape, dtype=torch.int64, device="cpu")
        plan[0, :, : order.shape[1]], plan[1, :, : order.shape[1]] = number[order], count.gather(1, order)
        self.plan.copy_(upload(plan, self.device))

    def take_states(self, step: Step) -> None:
        """A forward of the state that each row has reached, and of its drafts; then the schedule's steps."""
        last, went = self.decide_states(self._states_hidden(step))
        if self.cache is not None:
            self._keep(step, last, went)

    def decide_states(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the schedule's steps, one after the other for as long as the state reached is one that was evaluated:
        hidden [B*passes, states, T, d] is of the row's state, then of its drafts. Returns which was the last that the
        schedule took a step from, [B], and whether it took any, [B] bool."""
        o, states = self.options, hidden.shape[1]
        at = self.slot[:, None] + self.offsets  # [B, T]
        ours = self.open.gather(1, at)[:, None]  # [B, 1, T]
        blocks = torch.cat((self.canvas.gather(1, at)[:, None], self.drafts[:, : states - 1]), 1)  # [B, states, T]
        candidate = (blocks == o.mask_id) & ours
        # 1. Predict all states' candidates, each with the noise of its step.
        index = self.taken[:, None] + torch.arange(states, device=self.device)  # [B, states]
        quota = number = None
        if self.is_planned:
            number, quota = (x.gather(1, index.clamp(max=x.shape[1] - 1)) for x in self.plan)
        step = index if number is None else number
        self.step.copy_(step[:, 0])
        keys = self._keys(at[:, None].expand_as(blocks), step[..., None].expand_as(blocks))
        first, *second = (half.flatten(0, 2) for half in hidden.chunk(self.passes))
        heads = first, second[0] if second else None
        token, score, lse = self._predict(heads, candidate if o.remask is None else ours.expand_as(blocks), keys)
        probability = None
        if o.remask is not None:
            current = torch.where(candidate, token, blocks)
            probability = self._probability(heads, current.flatten(), lse).view_as(blocks)
        # 2. Step by step.
        going = alive = self.live > 0
        count, last = torch.zeros_like(self.slot), torch.zeros_like(self.slot)
        for n in range(states):
            own = None if probability is None else probability[:, n]
            chosen = self._advance(
                token[:, n], score[:, n], own, candidate[:, n] & alive[:, None],
                None if quota is None else quota[:, n] * alive, alive,
            )  # fmt: skip
            last = torch.where(alive, n, last)
            count = torch.where(alive, chosen.sum(1), count)
            self.taken += alive
            block = self.canvas.gather(1, at)
            masked = (block == o.mask_id) & ours[:, 0]
            if n + 1 < states:
                alive = alive & (block == blocks[:, n + 1]).all(1) & masked.any(1)
        self.live.copy_(masked.sum(1) * going)
        # 3. The drafts that follow from the last predictions.
        at_last = last[:, None, None].expand(-1, 1, self.block_size)
        self._draft(block, masked, token.gather(1, at_last)[:, 0], score.gather(1, at_last)[:, 0], count)
        return last, going

    def _draft(self, block, masked, token, score, count) -> None:
        """A chain of states from ``block`` [B, T]: each commits the next most confident of what was predicted."""
        block, zero = block.clone(), torch.zeros_like(self.slot)
        for n in range(self.drafts.shape[1]):
            if self.is_planned:
                count = self.plan[1].gather(1, (self.taken + n).clamp(max=self.plan.shape[2] - 1)[:, None])[:, 0]
            chosen = ops.commit(block, token, score, masked, zero, count=count, impl=self.family.impl)
            masked = masked & ~chosen
            self.drafts[:, n] = block

    def _states_hidden(self, step: Step) -> torch.Tensor:
        """What the LM head multiplies for the states, [B*passes, states, T, d]."""
        states, length, rows = step.states, step.length, self.rows * self.passes
        at = self.slot[:, None] + self.offsets
        blocks = torch.cat((self.canvas.gather(1, at)[:, None], self.drafts), 1)
        if self.cache is None:
            ids = self.canvas[:, None, :length].expand(-1, states, -1)
            ids = ids.scatter(2, at[:, None].expand_as(blocks), blocks)
            opened = self.open[:, None, :length]
            block = at
        else:
            at = self.slot[:, None] + torch.arange(length, device=self.device)
            source = at.clamp(max=self.slots - 1)
            if self.place is not None:
                source = self.place.gather(1, source)
            ids = self.canvas.gather(1, source)[:, None, self.block_size :].expand(-1, states, -1)
            ids, opened = torch.cat((blocks, ids), 2), self.open.gather(1, source)[:, None]
        if self.passes == 2:
            ids = torch.cat((ids, ids.masked_fill(~opened, self.options.mask_id)))
        start, end = (None if x is None else x.repeat(self.passes) for x in (self.start, self.end))
        with ops.counting(self.arrivals):
            if self.cache is None:
                start, end, block = (
                    None if x is None else x.repeat_interleave(states, 0)
                    for x in (start, end, block.repeat(self.passes, 1))
                )
                hidden = self.family.hidden(ids.flatten(0, 1), start, end, rows=block)
                return hidden.unflatten(0, (rows, states))
            each = torch.arange(rows * states * length, device=self.device)
            inside = each % (states * length)
            position = (source - self.pad[:, None])[:, None].expand(-1, states, -1).repeat(self.passes, 1, 1)
            first = states * length * torch.arange(rows + 1, device=self.device)
            packed = Packed(
                each // (states * length), first, states * length, position.flatten(),
                States(self.slot.repeat(self.passes), length, states),
            )  # fmt: skip
            block = None
            if length > self.block_size:
                block = each.view(-1, length)[:, : self.block_size].flatten()
            hidden = self.family.hidden(
                ids.flatten()[:, None], start, end, self.cache, inside, block, packed=packed, own=self._own(step)
            )[:, 0]
        return hidden.unflatten(0, (rows, states, self.block_size))

    def _own(self, step: Step) -> BlockCache:
        """The part of the states' buffers that ``step`` uses."""
        return self.own.first(step.states * step.length)

    def _keep(self, step: Step, last: torch.Tensor, went: torch.Tensor) -> None:
        """Write to the cache the keys and values of the ``last`` state [B] that a step was taken from, of rows that
        ``went`` on [B]."""
        offset = torch.arange(step.length, device=self.device)
        to = (self.slot[:, None] + offset).repeat(self.passes, 1)
        source = (last[:, None] * step.length + offset).repeat(self.passes, 1)
        self.cache.take_slots(to, self._own(step), source, went.repeat(self.passes))
