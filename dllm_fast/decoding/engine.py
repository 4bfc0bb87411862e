"""The denoising step on static buffers, and the blocks made of such steps.

The canvas holds prompts and [MASK]s, padded on the left: every row ends at the last slot. A step runs the model on some
slots, predicts a token for each masked position of the current block, and commits the schedule's choice of them.

A step depends on no value that the host would have to read, so it can be recorded in a CUDA graph. Between steps the
host reads one flag a row, or none if the schedule knows its counts; then it runs ahead of the device, over as many
blocks as its caller likes. What it writes for a block goes through `device.upload`, which does not wait.

The flag is read when its step has ended, not one step later. Reading it later would add a cached step to every block,
which takes a hundred times as long as the device waits for a flag and a launch.

A row's tokens do not depend on its batch. A row is *going* at the steps that it would take alone. At the others, where
its block is filled or nothing of it is committed, the forward computes it along with its neighbours and keeps nothing.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable
from typing import ClassVar

import torch

from dllm_fast import attentions, ops
from dllm_fast.decoding.device import download, on_host, upload
from dllm_fast.decoding.graphs import Graphs, records
from dllm_fast.decoding.options import Options
from dllm_fast.decoding.remask import STAYS, Committed, ranks
from dllm_fast.decoding.steps import Counts, Rows, Step, Steps
from dllm_fast.families.cache import BlockCache

ARRIVALS = 4096  # tiles of 128 output channels: as wide as a layer's linears get
GOOD = 1 << 62  # in `Engine.bad`: no step of any block


class Engine:
    """Buffers for a batch of ``rows`` sequences of up to ``slots`` positions, and the steps over them."""

    # Called with the engine and the step, None where rows differ; each step of any engine is taken in what they return.
    watchers: ClassVar[list[Callable[["Engine", Step | None], contextlib.AbstractContextManager]]] = []

    def __init__(self, family, options: Options, rows: int, slots: int, spare: int, padded: bool):
        self.family, self.options, self.rows, self.slots = family, options, rows, slots
        self.weight = family.head()[0]
        device = self.device = self.weight.device
        self.block_size = min(options.block_length, slots)
        self.passes = options.passes
        self.is_planned = not options.schedule.rule  # the schedule says beforehand how many a step commits
        self.counts = [Counts() for _ in range(rows)]  # of each row in the last block
        self.lengths = [slots] * rows  # of each row's sequence, which ends at the last slot
        self.firsts = [0] * rows  # each row's position at which its live block begins
        self.idle = [False] * rows  # rows that nobody waits for
        long = functools.partial(torch.zeros, dtype=torch.int64, device=device)
        self.canvas = long((rows, slots))
        self.open = torch.zeros((rows, slots), dtype=torch.bool, device=device)  # to be filled, or filled by us
        self.pad, self.row, self.slot, self.quota = (long(rows) for _ in range(4))
        self.number = long(rows)  # of each row's live block, among its blocks
        self.budget = long(rows)  # positions of this block that may still be masked again
        self.step, self.seed = long(1), long(1)
        self.any_masked = torch.zeros(rows, dtype=torch.bool, device=device)  # whether the row's block holds a [MASK]
        self.bad = long(rows)  # number << 32 | step at which a candidate's logits first were NaN or infinite, or GOOD
        # Of each of the block's tokens, when it was committed.
        self.committed_probability = torch.zeros((rows, self.block_size), dtype=torch.float32, device=device)
        self.offsets = torch.arange(self.block_size, device=device)
        # Without padding there is no range to pass, and attention takes its unmasked path.
        self.start = self.pad if padded else None
        self.unpadded = False  # no row is padded, and PyTorch's attention serves that: full steps then pass no range
        # Rows at different slots are computed to a common length; what overruns lands in the spare slots.
        self.end = torch.full_like(self.pad, slots) if spare else None
        self.cache = None
        if options.has_cache:
            width = self.weight.shape[1] if options.refresh.layerwise else 0
            shape = (family.layers, rows * self.passes, slots + spare, family.kv_heads, family.head_dim)
            self.cache = BlockCache(*shape, self.weight.dtype, device, width)
        # What the few-row matmuls count in: a step has it to itself.
        self.arrivals = long(ARRIVALS, dtype=torch.int32) if family.impl == "triton" else None
        self.graphs = Graphs(records(device, family.impl), device)

    @property
    def nbytes(self) -> int:
        """Bytes of its cache and its graphs. The other buffers are small."""
        return self.graphs.nbytes + (0 if self.cache is None else self.cache.nbytes)

    def load(self, rows: list) -> None:
        """Write the sequences of ``rows`` (`request.Row`) into the canvas. Rows that are done are idle."""
        shape = (len(rows), self.slots)
        canvas, open_ = (torch.zeros(shape, dtype=dtype, device="cpu") for dtype in (torch.int64, torch.bool))
        for b, row in enumerate(rows):
            canvas[b, row.pad(self.slots) :] = row.ids
            open_[b, row.pad(self.slots) :] = row.open
        self.canvas.copy_(upload(canvas, self.device))
        self.open.copy_(upload(open_, self.device))
        self.lengths = [len(row.ids) for row in rows]
        self.idle = [row.done for row in rows]
        attention_shape = self.family.heads, self.family.kv_heads, self.family.head_dim, self.slots
        filled = self.end is None and min(self.lengths) == self.slots
        self.unpadded = filled and attentions.serves(self.device, self.weight.dtype, *attention_shape)
        self.pad.copy_(upload(on_host([row.pad(self.slots) for row in rows]), self.device))
        self.row.copy_(upload(on_host([row.noise for row in rows]), self.device))
        self.bad.fill_(GOOD)

    def read(self) -> tuple[torch.Tensor, list[tuple[int, int] | None]]:
        """The canvas [B, S] on the host, and the block and step at which a row's logits first were NaN or infinite."""
        read = download(torch.cat((self.canvas, self.bad[:, None]), 1))  # in one wait for the device
        return read[:, :-1], [None if bad == GOOD else divmod(bad, 1 << 32) for bad in read[:, -1].tolist()]

    def take_over(self, other: "Engine", stayed: list[int]) -> None:
        """Continue with the rows ``stayed`` of a larger engine: copy the last slots of its cache."""
        if self.cache is not None and not self.options.refresh.full(1):
            index = other._doubled(upload(on_host(stayed), self.device))
            self.cache.take_over(other.cache, index, other.slots - self.slots, self.slots)

    def block(
        self,
        slot: torch.Tensor,  # [B] int64, on the host as all arguments are: the live block's first slot
        number: torch.Tensor,  # [B]: of the block, among the row's own
        planned: list[tuple[int, torch.Tensor]] | None,  # `Schedule.counts` of it
        full_rows: torch.Tensor,  # [B] bool: rows whose first step is a full forward
        draft=None,  # called after each step
    ) -> None:
        """Fill one block of every row."""
        # 1. The block's buffers, counts and steps.
        self.counts = [Counts() for _ in range(self.rows)]
        # A row shorter than a block has its block begin in the padding.
        self.firsts = [max(0, s - self.slots + n) for s, n in zip(slot.tolist(), self.lengths, strict=True)]
        self.prepare(slot, number)
        steps = self.steps(int(slot.min()))
        if planned is not None:
            plan = upload(torch.stack([count for _, count in planned]), self.device)  # [steps, B]
            numbers: Iterable[int] = [step for step, _ in planned]
        else:
            numbers = range(self.block_size + (self.options.block_length if self.options.remask else 0))
        going = ~on_host(self.idle, torch.bool)  # [B]
        begun = torch.zeros_like(full_rows)
        for n, step_number in enumerate(numbers):
            # 2. Which rows go at this step, and which of them begin the block with it.
            self.step.fill_(step_number)
            if planned is not None:
                self.quota.copy_(plan[n])
                going = planned[n][1] > 0
            begins = going & ~begun
            begun |= going
            # 3. The step.
            step = self._common_step(steps, begins, full_rows)
            with contextlib.ExitStack() as stack:
                for watch in self.watchers:
                    stack.enter_context(watch(self, step))
                if step is None:
                    self.take_mixed_step(steps, going, begins, full_rows)
                else:
                    self.take_step(step, going)
            if draft is not None:
                draft()
            # 4. Which rows go on: planned beforehand, or read from the device, once a step.
            if planned is None:
                going = download(self.any_masked)
                if not bool(going.any()):
                    break

    def steps(self, first: int) -> Steps:
        """The steps of a block that begins at slot ``first`` or, in some rows, after it."""
        return Steps.of(self.options, self.slots, first)

    def prepare(self, slot: torch.Tensor, number: torch.Tensor) -> None:
        """Begin block ``number`` [B] of each row at its ``slot`` [B], both on the host."""
        self.slot.copy_(upload(slot, self.device))
        self.number.copy_(upload(number, self.device))
        self.budget.fill_(self.options.block_length)
        self.committed_probability.zero_()
        self.any_masked.fill_(True)

    # The kinds of step

    def _common_step(self, steps: Steps, begins: torch.Tensor, full_rows: torch.Tensor) -> Step | None:
        """The step that all rows take, or None where they differ: those of ``begins`` [B] begin a block, of which
        ``full_rows`` do so by a full forward and others by the refresh's window."""
        if self.cache is None:
            return steps.full
        if not bool(begins.any()):
            return steps.block
        idle = on_host(self.idle, torch.bool)
        if bool((begins & full_rows | idle).all()):
            return steps.full
        alike = bool((begins & ~full_rows | idle).all()) and not self.options.refresh.layerwise
        return steps.window if alike else None

    def take_step(self, step: Step, going: torch.Tensor) -> None:
        """Take a step, through its graph where it is recorded; it counts for the rows ``going`` [B]."""
        self.graphs.run((step, step.whole and self.unpadded), functools.partial(self.run_step, step))
        self._tally(step, going.nonzero()[:, 0].tolist())

    def _tally(self, step: Step, rows: list[int], share: float = 1.0) -> None:
        """Add a step through a ``share`` of the layers to the counts of ``rows``: the positions that each would have
        computed alone."""
        full = self.passes if step.whole else 0
        for row in rows:
            length = self.lengths[row]
            own = min(step.length, length)
            if self.options.runs_suffix and not step.whole:
                own = length - max(0, self.firsts[row] - step.before)
            self.counts[row].add(Counts(full, self.passes - full, self.passes * own * share))

    def run_step(self, step: Step) -> None:
        """One forward of all rows, and what is kept of it."""
        self._decide(self.hidden(step))

    def _going(self) -> torch.Tensor | None:
        """The rows that take part in the step, [B] bool; None: there is one row, which takes part in every step."""
        if self.rows == 1:
            return None
        return self.quota > 0 if self.is_planned else self.any_masked

    def take_mixed_step(self, steps: Steps, going: torch.Tensor, begins: torch.Tensor, full_rows: torch.Tensor) -> None:
        """A step at which rows differ, [B] bool each: one forward a group, then one decision for all."""
        layers = self.family.layers
        hidden = self.weight.new_zeros(self.rows * self.passes, self.block_size, self.weight.shape[1])
        # 1. Rows in the middle of a block, then rows that begin one with a window. Of these, which layers drifted?
        from_layer = torch.full_like(begins, layers, dtype=torch.int64)  # of each row's full forward; ``layers``: none
        from_layer[begins & full_rows] = 0
        for step, group in ((steps.block, going & ~begins), (steps.window, begins & ~full_rows)):
            if not bool(group.any()):
                continue
            index = self._doubled(upload(group.nonzero()[:, 0], self.device))
            drifts = step.refreshes and self.options.refresh.layerwise
            old = self.cache.rows(index) if drifts else None
            hidden[index] = self.hidden(step, index)
            self._tally(step, group.nonzero()[:, 0].tolist())
            if drifts:
                from_layer[group] = self._drifted(step, old, index)
        # 2. Full forwards, from the first layer on or from the first that drifted.
        for layer in from_layer[from_layer < layers].unique().tolist():
            group = (from_layer == layer).nonzero()[:, 0]
            index = self._doubled(upload(group, self.device))
            hidden[index] = self.hidden(steps.full, index, layer)
            self._tally(steps.full, group.tolist(), (layers - layer) / layers)
        # 3. The tokens of all.
        self._decide(hidden)

    def _doubled(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat((rows, rows + self.rows)) if self.passes == 2 else rows

    def _drifted(self, step: Step, old: BlockCache, index: torch.Tensor) -> torch.Tensor:
        """Of each row, the first layer whose value vectors changed by more than tau, or the number of layers; [N]."""
        begin = self._begin(step).repeat(self.passes)[index]
        at = begin[:, None] + torch.arange(step.length, device=self.device)  # [N, W]
        row = torch.arange(len(index), device=self.device)[:, None]
        seen = (at < self.slots) & (at >= self.pad.repeat(self.passes)[index][:, None])  # [N, W]
        layers = []
        for layer in range(self.family.layers):
            old_values = old.buffers[layer, 1][row, at].flatten(2).float()  # [N, W, G*D]
            change = self.cache.buffers[layer, 1][index[:, None], at].flatten(2).float() - old_values
            drift = change.norm(dim=2) / old_values.norm(dim=2).clamp(min=1e-12)
            layers.append((drift * seen).sum(1) / seen.sum(1))
        drift = torch.stack(layers).unflatten(1, (self.passes, -1)).amax(1)  # [L, rows]
        past = torch.cat((drift > self.options.refresh.tau, torch.ones_like(drift[:1], dtype=torch.bool)))
        return past.int().argmax(0).cpu()

    # Forward

    def _begin(self, step: Step) -> torch.Tensor:
        """The first slot that a step computes, [B]."""
        if step.whole:
            return torch.zeros_like(self.slot)
        if not step.refreshes:
            return self.slot
        # Where a row begins, not where its padding does: a window that would reach beyond is moved to the right.
        begin = torch.maximum(self.slot - step.before, self.pad)
        return begin if self.options.runs_suffix else begin.clamp(max=self.slots - step.length)

    def hidden(self, step: Step, index: torch.Tensor | None = None, from_layer: int = 0) -> torch.Tensor:
        """What the LM head multiplies for the block, [B*passes, T, d]; where ``index`` [N] is given, of these rows
        alone, [N, T, d]. Guidance's second half sees the prompt masked.

        From layer ``from_layer`` on: from the cache's hidden states of that layer.
        """
        # 1. The rows: all of them, twice with guidance, or ``index`` of these.
        start = None if step.whole and self.unpadded else self.start
        kept = None if step.refreshes or index is not None else self._going()
        rows = Rows(self.slot, self._begin(step), start, self.end, kept)
        canvas, cache = self.canvas, self.cache
        if self.passes == 2:
            canvas = torch.cat((canvas, canvas.masked_fill(~self.open, self.options.mask_id)))
            rows = rows.repeat(2)
        if index is not None:
            canvas, cache, rows = canvas[index], cache.rows(index), rows.select(index)
        # 2. The slots: which ids are computed, and which of them are the block.
        ids = canvas
        if not step.whole:
            at = rows.begin[:, None] + torch.arange(step.length, device=self.device)
            ids = canvas.gather(1, at.clamp(max=self.slots - 1))
        block = None if step.length == self.block_size else (rows.slot - rows.begin)[:, None] + self.offsets
        # 3. The forward, which writes to the cache.
        begin = None if cache is None else rows.begin
        with ops.counting(self.arrivals):
            hidden = self.family.hidden(ids, rows.start, rows.end, cache, begin, block, from_layer, rows.kept)
        if index is not None:
            self.cache.put(index, cache)
        return hidden

    # Decision

    def _decide(self, hidden: torch.Tensor) -> None:
        """From hidden states to tokens: predict, commit, remask."""
        mask_id, remask = self.options.mask_id, self.options.remask
        hidden, uncond = hidden.chunk(2) if self.passes == 2 else (hidden, None)
        heads = hidden.flatten(0, 1), None if uncond is None else uncond.flatten(0, 1)
        at = self.slot[:, None] + self.offsets  # [B, T]
        block, ours = self.canvas.gather(1, at), self.open.gather(1, at)
        candidate = (block == mask_id) & ours
        # 1. Predict the candidates; a remask asks for the committed positions too.
        token, score, lse = self._predict(heads, at, candidate if remask is None else ours)
        # 2. Commit the schedule's choice of them.
        chosen = self._commit(token, score, candidate, self.quota)
        # 3. Mask committed ones again. A planned step commits as many others in their place.
        if remask is not None:
            current = torch.where(candidate, token, block)
            probability = self._probability(heads, current, lse)
            if self.options.defer_tokens:  # a prediction that is held back takes no committed token's place
                probability = probability.masked_fill(candidate & (score == float("-inf")), 0.0)
            committed = ours & ~candidate
            seen = Committed(committed, probability, self.committed_probability, candidate, chosen.sum(1))
            masked_again = self._remask(seen, at)
            if self.is_planned:
                chosen = chosen | self._commit(token, score, candidate & ~chosen, masked_again)
            self.committed_probability.copy_(torch.where(chosen, probability, self.committed_probability))
        # 4. The flag that the host reads where nothing is planned.
        self.any_masked.copy_(((self.canvas.gather(1, at) == mask_id) & ours).any(1))

    def _predict(
        self, heads: tuple[torch.Tensor, torch.Tensor | None], at: torch.Tensor, wanted: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token and confidence [B, T] and log-sum-exp [B*T] of the positions ``wanted`` [B, T], which lie at slots
        ``at``. Records the step at which logits first were NaN or infinite."""
        o, (hidden, uncond) = self.options, heads
        token, score, lse = ops.predict(
            hidden,
            *self.family.head_operands(),
            candidate=wanted.flatten(),
            mask_id=o.mask_id,
            confidence=o.schedule.confidence or o.confidence,
            temperature=o.temperature,
            seed=self.seed,
            step=self.step,
            row=self.row[:, None].expand_as(at).flatten().contiguous(),  # of one row it is a view without strides
            position=(at - self.pad[:, None]).flatten(),
            uncond=uncond,
            cfg_scale=o.cfg_scale,
            banned=o.suppress_tokens,
            deferred=o.defer_tokens,
            impl=self.family.impl,
        )
        # lse - lse is 0, or NaN where lse is NaN or infinite; a position that is no candidate has lse 0.
        fine = (lse - lse == 0).view_as(at).all(1)
        self.bad.copy_(torch.minimum(self.bad, torch.where(fine, GOOD, (self.number << 32) + self.step)))
        return token.view_as(at), score.view_as(at), lse

    def _commit(self, token, score, candidate: torch.Tensor, quota: torch.Tensor) -> torch.Tensor:
        """Write the candidates [B, T] that the schedule chooses, ``quota`` [B] of them if planned. Returns which."""
        rule = {"count": quota} if self.is_planned else self.options.schedule.rule
        return ops.commit(self.canvas, token, score, candidate, self.slot, **rule, impl=self.family.impl)

    def _probability(self, heads: tuple, token: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        """The probabilities that the model now gives to ``token`` [B, T]."""
        o, (hidden, uncond) = self.options, heads
        return ops.token_probability(
            hidden, *self.family.head_operands(), token=token.flatten(), lse=lse, uncond=uncond,
            cfg_scale=o.cfg_scale, deferred=[i for i in o.defer_tokens if i not in o.suppress_tokens],
        ).view_as(token)  # fmt: skip

    def _remask(self, seen: Committed, at: torch.Tensor) -> torch.Tensor:
        """Mask the most urgent of the committed positions, within the bound that ends the block; how many, [B]."""
        urgency = self.options.remask.urgency(seen)  # [B, T]
        bound = seen.masked.sum(1) - seen.kept if self.is_planned else self.budget
        if (going := self._going()) is not None:
            bound = bound * going
        again = (urgency > STAYS) & (ranks(urgency) < bound[:, None])
        self.canvas.scatter_(1, at, self.canvas.gather(1, at).masked_fill(again, self.options.mask_id))
        masked_again = again.sum(1)
        if not self.is_planned:
            self.budget.sub_(masked_again)
        return masked_again
