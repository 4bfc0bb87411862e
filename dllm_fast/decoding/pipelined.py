"""The engine of a `pipeline`: rows with several live blocks, each row at its own pace.

A row's *front* is its first block that is not filled, and its live blocks follow it without a gap. A step evaluates the
live blocks of every row in one packed forward, against the cache. When blocks at the front are filled, the row's next
step brings the cache up to date: a bidirectional model's whole row is evaluated, as at the beginning of a block
elsewhere; of a block-causal model, whose cache is exact, the blocks just filled and the live ones. Rows that do so are
evaluated beside rows that do not, and none waits for another.

Which blocks are live is kept on the device. The host reads, once a step, how many there are of each row, for the size
of the next forward.
"""

import contextlib

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
        zeros = torch.zeros_like(self.slot)
        self.front = zeros.clone()  # the slot of each row's front
        self.live_blocks = zeros.clone()  # how many blocks are live, from the front on
        self.left = zeros.clone()  # how many the row has from the front on
        self.filled = zeros.clone()  # how many blocks at the front the last step has filled
        self.begins = zeros.clone()  # the first slot that the step evaluates
        self.wholly = zeros.bool()  # whether that is all of the row
        self.none = torch.zeros(rows * self.blocks, dtype=torch.int64, device=self.device)

    def stage(self, rows: list[Row], draft=None) -> list[tuple[int, int]]:
        """Take steps until one fills the front of some row. Returns, of each row, how many blocks it has filled and
        how many are live behind them. ``draft``: called after each step."""
        # 1. Where each row is.
        self.tally.zero_()
        front, ahead, filled, whole = self._begin(rows)
        pad = self.slots - self.lengths
        going = ~self.idle
        begins = torch.where(whole, pad, front - filled * self.length)
        while True:
            # 2. A step over what each row evaluates.
            stop = front + ahead * self.length
            if self.family.block is None:
                stop = torch.where(whole, self.slots, stop)
            own = torch.where(going, stop - begins, 0)
            step = self._step(whole, going, own)
            with contextlib.ExitStack() as stack:
                for watch in self.watchers:
                    stack.enter_context(watch(self, step))
                self.take(step)
            self.step.add_(1)
            self.tally[:, 0] += self.passes * (going & whole)
            self.tally[:, 1] += self.passes * (going & ~whole)
            self.tally[:, 2] += self.passes * own
            self.tally[:, 3:] += going[:, None]
            if draft is not None:
                draft()
            # 3. What it has filled and added: all that the host reads of a step.
            ahead, filled = download(torch.stack((self.live_blocks, self.filled)))
            if bool((filled * going).any()):
                return list(zip((filled * going).tolist(), ahead.tolist(), strict=True))
            if self.cache is not None:
                whole = torch.zeros_like(whole)
                begins = front
                self.wholly.zero_()
                self.begins.copy_(self.front)

    def _begin(self, rows: list[Row]) -> tuple[torch.Tensor, ...]:
        """Put the state of each row's pipeline on the device. Returns, on the host, fronts, live blocks and blocks that
        the last step has filled, [B] int64, and which rows are evaluated as a whole, [B] bool."""
        done = [row.done for row in rows]
        numbers = [
            (self.slots - self.length, 1, 1, 0, 0, 0)
            if row.done
            else (row.slot(self.slots, row.next), row.ahead, len(row.blocks) - row.next, row.behind, row.counts.steps,
                  row.next)
            for row in rows
        ]  # fmt: skip
        front, ahead, left, filled, taken, number = on_host(numbers).T
        whole = taken == 0
        if self.cache is None:
            whole = torch.ones_like(whole)
        elif self.family.block is None:
            whole = whole | (filled > 0)
        whole = whole & ~on_host(done, torch.bool)
        begins = torch.where(whole, self.slots - self.lengths, front - filled * self.length)
        self._place(front, ahead, left, taken, number, begins, whole)
        return front, ahead, filled, whole

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
        block = full if self.cache is None else Step(self.block_size)
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
        most = self.rows * self.passes * self.block_size
        return [Step(self.block_size, packed=size, most=self.block_size) for size in sizes(most)]

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
            length = self.slots if some else self.block_size
            return Step(length, whole=some, refreshes=some, packed=size, most=most)
        fitting = [one for one in self.recorded(Step(self.block_size)) if one.packed >= size and one.most >= most]
        # With blocks that were just filled, a row of a block-causal model evaluates more than a window.
        return fitting[0] if fitting else Step(self.slots, packed=self.rows * self.passes * self.slots, most=self.slots)

    def find(self, step: Step, going: torch.Tensor | None) -> Live:
        at = torch.arange(self.slots, device=self.device).expand(self.rows, -1)
        stop = self.front + self.live_blocks * self.length
        if self.family.block is None:
            stop = torch.where(self.wholly, self.slots, stop)
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
        last = (after - 1).clamp(max=self.blocks - 1)
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
