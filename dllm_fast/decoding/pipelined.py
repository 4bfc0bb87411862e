"""The engine of a `pipeline`: rows with several live blocks, each row at its own pace.

A row's *front* is its first block that is not filled, and its live blocks follow it without a gap. A step evaluates the
live blocks of every row in one packed forward, against the cache. When blocks at the front are filled, the row's next
step brings the cache up to date: a bidirectional model's whole row is evaluated, as at the beginning of a block
elsewhere; of a block-causal model, whose cache is exact, the blocks just filled and the live ones. With
``cache="prefix"`` filled blocks wait before they are cached, and a step evaluates everything behind the cache: see
`MultiBlock`. Rows differ in what they evaluate, are evaluated beside each other, and none waits for another.

Which blocks are live is kept on the device. The host reads, once a step, how many there are of each row, for the size
of the next forward, and plans what that evaluates.
"""

import contextlib
from dataclasses import replace

import torch
import torch.nn.functional as F

from dllm_fast import ops
from dllm_fast.decoding.device import download, on_host, upload
from dllm_fast.decoding.engine import PADDING, Engine
from dllm_fast.decoding.live import Live, pack, sizes
from dllm_fast.decoding.options import Options
from dllm_fast.decoding.request import Row
from dllm_fast.decoding.steps import Step, Steps


class Pipelined(Engine):
    """Buffers for a batch of rows, and stages: the steps until some row has filled the block at its front.

    The *window* of a row, `slot` to `slot + block_size`, holds its live blocks and as many as may be added: it begins
    at the front, or earlier where it would overrun the sequence.
    """

    def __init__(self, family, options: Options, rows: int, slots: int, spare: int, padded: bool):
        super().__init__(family, options, rows, slots, spare, padded)
        assert options.pipeline is not None
        self.pipeline = options.pipeline
        self.length = options.block_length  # of a block, [T]
        self.blocks = self.block_size // self.length  # K, in a window
        # The most positions that a row evaluates against the cache; but for those of blocks that it lacks.
        self.reach = slots if options.runs_suffix else min(self.block_size + family.shifted, slots)
        zeros = torch.zeros_like(self.slot)
        self.front = zeros.clone()  # the slot of each row's front
        self.live_blocks = zeros.clone()  # how many blocks are live, from the front on
        self.left = zeros.clone()  # how many the row has from the front on
        self.filled = zeros.clone()  # how many blocks at the front the last step has filled
        self.begins = zeros.clone()  # the first slot that the step evaluates
        self.wholly = zeros.bool()  # whether that is all of the row
        self.none = torch.zeros(rows * self.blocks, dtype=torch.int64, device=self.device)

    def stage(self, rows: list[Row], draft=None) -> torch.Tensor:
        """Take steps until one fills the front of some row. ``draft``: called after each step.

        Returns [4, B] int64, on the host: of each row, how many blocks it has filled, how many are live behind them,
        and its `Row.behind` and `Row.waited`.
        """
        # 1. Where each row is.
        self.tally.zero_()
        state = [
            (self.slots - self.length, 1, 1, 0, 0, 0, 0)
            if row.done
            else (row.slot(self.slots, row.next), row.ahead, len(row.blocks) - row.next, row.behind, row.waited,
                  row.counts.steps, row.next)
            for row in rows
        ]  # fmt: skip
        front, ahead, left, behind, waited, taken, number = on_host(state).T
        # The prompt counts as a filled block that the cache lacks. It has waited since before the first step.
        behind, waited = behind.where(taken > 0, 1), waited.where(taken > 0, 1)
        pad = self.slots - self.lengths
        going = ~self.idle
        while True:
            # 2. What each row evaluates, and how many of the blocks that the cache lacks it then has.
            whole, kept = self._plan(behind, waited, taken, number)
            whole = whole & going
            begins = front - behind * self.length
            if self.family.shifted:  # the front's first position is predicted by its left neighbour
                begins = torch.maximum(begins - (behind == 0).long(), pad)
            begins = begins.where(~whole, pad)
            stop = front + ahead * self.length
            if self.family.block is None:
                stop = stop.where(~(whole | self.options.runs_suffix), self.slots)
            own = torch.where(going, stop - begins, 0)
            # 3. The step.
            self._place(front, ahead, left, taken, number, begins, whole)
            step = self._step(whole, going, own)
            with contextlib.ExitStack() as stack:
                for watch in self.watchers:
                    stack.enter_context(watch(self, step))
                self.take(step)
            taken = taken + 1
            self.tally[:, 0] += self.passes * (going & whole)
            self.tally[:, 1] += self.passes * (going & ~whole)
            self.tally[:, 2] += self.passes * own
            self.tally[:, 3:] += going[:, None]
            if draft is not None:
                draft()
            # 4. What it has filled and added: all that the host reads of a step.
            ahead, filled = download(torch.stack((self.live_blocks, self.filled)))
            filled = filled * going
            waited = torch.where(kept > 0, 1, waited + 1) * (behind > kept)
            behind = behind - kept + filled
            if bool(filled.any()):
                return torch.stack((filled, ahead, behind, waited))

    def _plan(
        self, behind: torch.Tensor, waited: torch.Tensor, taken: torch.Tensor, number: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Which rows the next step evaluates as a whole, [B] bool, and how many of the blocks ``behind`` it caches,
        [B]. All on the host: `Row.behind`, `Row.waited`, the steps taken, and the front's number, [B] each."""
        whole = behind > number  # the prompt is among them
        if self.cache is None:
            return torch.ones_like(whole), behind
        if not self.options.runs_suffix:
            return whole | (behind > 0) if self.family.block is None else whole, behind
        delay = 1 if self.pipeline.delay is None else self.pipeline.delay
        ripe = (behind > 0) & (waited >= delay)
        refreshed = behind > 0
        if self.pipeline.refresh is not None:
            refreshed = refreshed | ((taken + 1) % self.pipeline.refresh == 0)
        # Each of several blocks waits for itself, from the step on that caches the one before it.
        kept = torch.where(ripe, behind if delay == 0 else 1, 0)
        return whole | (refreshed & ~ripe), kept

    def _place(self, front, ahead, left, taken, number, begins, whole) -> None:
        """Copy the state of each row, [B] each, from the host to the device."""
        slot = front.clamp(max=self.slots - self.block_size)
        state = torch.stack((front, ahead, left, taken, number, begins, whole.long(), slot, (~self.idle).long()))
        buffers = (
            self.front, self.live_blocks, self.left, self.step, self.number, self.begins, self.wholly, self.slot,
            self.live,
        )  # fmt: skip
        for buffer, value in zip(buffers, upload(state, self.device), strict=True):
            buffer.copy_(value)

    def prepare(self, slot: torch.Tensor, number: torch.Tensor) -> Steps:
        """Stand at block ``number`` [B] of each row, at its ``slot`` [B], both on the host, with one live block.
        Returns the steps."""
        one, none = torch.ones_like(slot), torch.zeros_like(slot)
        left = (self.slots - slot) // self.length
        self._place(slot, one, left, none, number, slot, none)
        full = Step(self.slots, whole=True, refreshes=True)
        block = full if self.cache is None else Step(self.reach)
        return Steps(full, block, block)

    def take_over(self, other: Engine, stayed: list[int]) -> None:
        """Continue with the rows ``stayed`` of another engine, wherever they are in their blocks: copy the last slots
        of its cache."""
        if self.cache is not None:
            index = other._doubled(upload(on_host(stayed), self.device))
            self.cache.take_over(other.cache, index, other.slots - self.slots, min(self.slots, other.slots))

    def recorded(self, step: Step) -> list[Step]:
        if step.whole:
            return [step]
        # Of all that follows the cache, the LM head multiplies the window alone, as where a block begins.
        each = Step(self.reach, refreshes=self.options.runs_suffix, most=self.reach)
        return [replace(each, packed=size) for size in sizes(self.rows * self.passes * self.reach)]

    def _step(self, whole: torch.Tensor, going: torch.Tensor, own: torch.Tensor) -> Step:
        """The step at which the rows ``going`` [B] evaluate ``own`` [B] positions each, those that are ``whole`` [B]
        all of theirs."""
        size, most = int(own.sum()), int(own.max())
        some = bool(whole.any())
        if some and bool((whole | ~going).all()) and self.family.block is None:
            allowed = PADDING if self.graphs.enabled else 0.0
            if self.cache is None or self.rows == 1 or size >= (1 - allowed) * self.rows * self.slots:
                return Step(self.slots, whole=True, refreshes=True)
        size *= self.passes
        if some or not self.graphs.enabled:
            length = self.slots if some else self.reach
            refreshes = some or self.options.runs_suffix
            return Step(length, whole=some, refreshes=refreshes, packed=size, most=most)
        fitting = [one for one in self.recorded(Step(self.reach)) if one.packed >= size and one.most >= most]
        # With blocks that were just filled, a row of a block-causal model evaluates more than a window.
        return fitting[0] if fitting else Step(self.slots, packed=self.rows * self.passes * self.slots, most=self.slots)

    def find(self, step: Step, going: torch.Tensor | None) -> Live:
        at = torch.arange(self.slots, device=self.device).expand(self.rows, -1)
        stop = self.front + self.live_blocks * self.length
        if self.family.block is None:
            stop = stop.where(~(self.wholly | self.options.runs_suffix), self.slots)
        wanted = (at >= self.begins[:, None]) & (at < stop[:, None])
        if going is not None:
            wanted = wanted & going[:, None]
        offset = (at - self.slot[:, None]).repeat(self.passes, 1)  # in the window
        wanted, at = wanted.repeat(self.passes, 1), at.repeat(self.passes, 1)
        return pack(wanted, at, offset, self.block_size, step.packed, step.most, self.cache.buffers.shape[3])

    def _decide(self, hidden: torch.Tensor, live: Live | None = None, evaluated: torch.Tensor | None = None) -> None:
        """From hidden states, as in `Decider`, to tokens, and to the blocks that are live at the next step."""
        live, heads = self._heads(hidden, live)
        at = self.slot[:, None] + self.offsets  # [B, K T]
        window, ours = self.canvas.gather(1, at), self.open.gather(1, at)
        number = self.offsets[:: self.length] // self.length  # [K]
        first = ((self.front - self.slot) // self.length)[:, None]  # [B, 1]
        is_live = (number >= first) & (number < first + self.live_blocks[:, None])  # [B, K]
        candidate = (window == self.options.mask_id) & ours & is_live.repeat_interleave(self.length, 1)
        # 1. Predict the masked positions of the live blocks.
        step = self.step[:, None].expand_as(at)
        token, score, _ = self._predict(heads, candidate, self._keys(at, step), live)
        # 2. Commit what the rule chooses.
        filled = self._shares(window, ours)
        self._choose(window, token, score, candidate, number == first, filled)
        self.canvas.scatter_(1, at, window)
        # 3. Which blocks are filled now, and whether the next one is added.
        open_ = self._of_blocks(ours)
        masked = self._of_blocks((window == self.options.mask_id) & ours)  # [B, K]
        after = first + self.live_blocks[:, None]
        unfilled = torch.where(is_live & (masked > 0), number, after)
        done = unfilled.amin(1) - first[:, 0]
        last = (after - 1).clamp(min=0, max=self.blocks - 1)  # a row that is done has none
        reached = (open_ - masked).gather(1, last).double() / open_.gather(1, last).clamp(min=1).double()
        grown = self.live_blocks - done + (reached[:, 0] >= self.pipeline.add)
        most = torch.minimum(self.left - done, torch.full_like(done, self.blocks))
        self.filled.copy_(done)
        self.live_blocks.copy_(torch.minimum(grown, most))

    def _of_blocks(self, x: torch.Tensor) -> torch.Tensor:
        """How many of each block's x [B, K T] bool are True, [B, K]."""
        return x.unflatten(1, (self.blocks, self.length)).sum(2)

    def _shares(self, window: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
        """The share of each block's tokens that are there, [B, K] fp64, of those that were to be filled."""
        open_ = self._of_blocks(ours)
        return (open_ - self._of_blocks((window == self.options.mask_id) & ours)).double() / open_.clamp(min=1).double()

    def _choose(
        self,
        window: torch.Tensor,  # [B, K T] int64, written in place
        token: torch.Tensor,  # [B, K T]
        score: torch.Tensor,  # [B, K T]
        candidate: torch.Tensor,  # [B, K T] bool
        at_front: torch.Tensor,  # [B, K] bool
        filled: torch.Tensor,  # [B, K] fp64
    ) -> None:
        """Write the tokens that the step commits."""
        threshold, impl = self.options.schedule.rule["threshold"], self.family.impl
        must = at_front  # blocks that commit at least one
        activate = self.pipeline.activate
        if activate is None:  # the best of all is committed in any case
            ops.commit(window, token, score, candidate, self.none[: self.rows], threshold=threshold, impl=impl)
        else:
            must = must | F.pad(filled[:, :-1] >= activate, (1, 0))
        # Of the other blocks only what reaches the threshold may be chosen, so that nothing is where none does.
        choice = candidate & (must.repeat_interleave(self.length, 1) | (score >= threshold))
        blocks = window.view(-1, self.length)  # the same memory
        token, score, choice = (x.reshape(blocks.shape) for x in (token, score, choice))
        ops.commit(blocks, token, score, choice, self.none, threshold=threshold, impl=impl)
