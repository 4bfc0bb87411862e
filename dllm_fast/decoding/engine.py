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
import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import ClassVar

import torch

from dllm_fast import attentions, ops
from dllm_fast.decoding.decider import GOOD, Decider
from dllm_fast.decoding.device import download, on_host, upload
from dllm_fast.decoding.graphs import Graphs, records
from dllm_fast.decoding.live import Live, pack, sizes
from dllm_fast.decoding.options import Options
from dllm_fast.decoding.steps import Counts, Rows, Step, Steps
from dllm_fast.families.cache import BlockCache

WHOLE = 64  # a recorded full forward ends at a multiple of it
ARRIVALS = 4096  # tiles of 128 output channels: as wide as a layer's linears get


class Engine(Decider):
    """Buffers for a batch of ``rows`` sequences of up to ``slots`` positions, and the steps over them."""

    # Called with the engine and the step, None where rows differ; each step of any engine is taken in what they return.
    watchers: ClassVar[list[Callable[["Engine", Step | None], contextlib.AbstractContextManager]]] = []

    def __init__(self, family, options: Options, rows: int, slots: int, spare: int, padded: bool):
        super().__init__(family, options, rows, slots)
        device = self.device
        # Of each row, on the host.
        self.lengths = on_host([slots] * rows)  # of its sequence, which ends at the last slot
        self.tally = torch.zeros(rows, 3, dtype=torch.float64, device="cpu")  # of the last block, as in `Counts`
        self.idle = torch.zeros(rows, dtype=torch.bool, device="cpu")  # whether nobody waits for it
        self.ends = self.reached = on_host([slots] * rows)  # one past the last slot that it sees, and saw before
        self.own: dict[str, torch.Tensor] = {}  # positions that a row computes at a step of each kind, [B]
        # Without padding there is no range to pass, and attention takes its unmasked path.
        self.start = self.pad if padded else None
        self.unpadded = False  # no row is padded, and PyTorch's attention serves that: full steps then pass no range
        # Rows at different slots are computed to a common length; what overruns lands in the spare slots.
        self.end = torch.full_like(self.pad, slots) if spare or options.suffix_length is not None else None
        self.seen = torch.full_like(self.pad, slots)  # where `end` was in the block before
        self.cache = None
        if options.has_cache:
            width = self.weight.shape[1] if options.refresh.layerwise else 0
            shape = (family.layers, rows * self.passes, slots + spare, family.kv_heads, family.head_dim)
            self.cache = BlockCache(*shape, self.weight.dtype, device, width, options.cache_dtype is not None)
        # What the few-row matmuls count in: a step has it to itself.
        kept = family.impl == "triton"
        self.arrivals = torch.zeros(ARRIVALS, dtype=torch.int32, device=device) if kept else None
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
        self.lengths = on_host([len(row.ids) for row in rows])
        self.idle = on_host([row.done for row in rows], torch.bool)
        attention_shape = self.family.heads, self.family.kv_heads, self.family.head_dim, self.slots
        filled = self.end is None and int(self.lengths.min()) == self.slots
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
            self.ends = other.ends[stayed] - (other.slots - self.slots)

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
        self.tally.zero_()
        steps = self.prepare(slot, number)
        if planned is not None:
            plan = upload(torch.stack([count for _, count in planned]), self.device)  # [steps, B]
            numbers: Iterable[int] = [step for step, _ in planned]
        else:
            numbers = range(self.block_size + (self.options.block_length if self.options.remask else 0))
        going = ~self.idle  # [B]
        begun = torch.zeros_like(full_rows)
        live = left = torch.zeros_like(slot) if planned is None else torch.stack([n for _, n in planned]).sum(0)
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
                    self.take_mixed_step(steps, going, begins, full_rows, live)
                else:
                    self.take_step(step, going, live)
            if draft is not None:
                draft()
            # 4. Which rows go on, and how much of them: planned beforehand, or read from the device, once a step.
            if planned is None or (self.options.skip_committed and self.options.remask):
                live = download(self.live)
            else:
                quota = planned[n][1]
                live = torch.where(going, left, live)  # what the step committed is evaluated once more
                left = left - quota
            if planned is None:
                going = live > 0
                if not bool(going.any()):
                    break

    def steps(self, first: int, last: int) -> Steps:
        """The steps of blocks that begin at slots from ``first`` to ``last``."""
        if self.graphs.enabled:  # rows of other lengths share a recording
            return Steps.of(self.options, self.slots, first, last, 0, WHOLE)
        return Steps.of(self.options, self.slots, first, last, min(first, self.slots - int(self.lengths.max())))

    def prepare(self, slot: torch.Tensor, number: torch.Tensor) -> Steps:
        """Begin block ``number`` [B] of each row at its ``slot`` [B], both on the host. Returns its steps."""
        self.slot.copy_(upload(slot, self.device))
        self.number.copy_(upload(number, self.device))
        self.budget.fill_(self.options.block_length)
        if self.options.suffix_length is not None:
            self.reached = self.ends
            self.ends = (slot + self.block_size + self.options.suffix_length).clamp(max=self.slots)
            self.seen.copy_(upload(self.reached, self.device))
            self.end.copy_(upload(self.ends, self.device))
        self.committed_probability.zero_()
        self.live.copy_(upload(torch.where(self.idle, 0, self.block_size), self.device))
        steps = self.steps(int(slot.min()), int(slot.max()))
        self.own = self._positions(steps, slot)
        return steps

    @property
    def counts(self) -> list[Counts]:
        """The forwards of each row in the last block."""
        return [Counts(int(full), int(part), positions) for full, part, positions in self.tally.tolist()]

    def _positions(self, steps: Steps, slot: torch.Tensor) -> dict[str, torch.Tensor]:
        """By kind of step, how many positions each row would compute alone, [B]; of a block that begins at ``slot``."""
        pad = self.slots - self.lengths
        block = self.block_size - (pad - slot).clamp(min=0)  # a row shorter than a block has it begin in the padding
        begin = torch.maximum(slot - steps.window.before, pad)
        if self.options.runs_suffix:
            suffix = self.ends - slot - self.block_size
            return {"full": self.ends - pad, "window": self.ends - begin, "block": block + suffix, "live": suffix}
        begin = begin.clamp(max=self.slots - steps.window.length)
        stop = torch.minimum(begin + steps.window.length, self.ends)
        window = stop - torch.maximum(begin, pad)
        if self.options.suffix_length is not None:
            window += (self.ends - torch.maximum(self.reached, stop)).clamp(min=0) + (begin - self.reached).clamp(min=0)
        return {"full": self.ends - pad, "window": window, "block": block, "live": torch.zeros_like(pad)}

    # The kinds of step

    def _common_step(self, steps: Steps, begins: torch.Tensor, full_rows: torch.Tensor) -> Step | None:
        """The step that all rows take, or None where they differ: those of ``begins`` [B] begin a block, of which
        ``full_rows`` do so by a full forward and others by the refresh's window."""
        if self.cache is None:
            return steps.full
        if not bool(begins.any()):
            return steps.block
        if bool((begins & full_rows | self.idle).all()):
            return steps.full
        alike = bool((begins & ~full_rows | self.idle).all()) and not self.options.refresh.layerwise
        return steps.window if alike else None

    def take_step(self, step: Step, going: torch.Tensor, live: torch.Tensor) -> None:
        """Take a step, through its graph where it is recorded; it counts for the rows ``going`` [B], of which ``live``
        [B] positions of the block can still change."""
        own = self._tally(step, going, live)
        self.take(self._packed(step, own))

    def take(self, step: Step) -> None:
        """Take a step that counts for nobody."""
        self.graphs.run((step, step.whole and self.unpadded), functools.partial(self.run_step, step))

    def recorded(self, step: Step) -> list[Step]:
        """The steps that are recorded for ``step``: where positions are packed, one for each number of them."""
        if not self._packs(step):
            return [step]
        length = step.length + self.block_size * step.refreshes  # with what a block sees for the first time
        most = min(length, self.slots)
        return [dataclasses.replace(step, packed=size, most=most) for size in sizes(self.rows * self.passes * most)]

    def _packs(self, step: Step) -> bool:
        """Whether the step evaluates some positions of each row: those that can still change; or a window, and what is
        seen for the first time."""
        if step.refreshes:
            return self.options.suffix_length is not None and not step.whole and not self.options.runs_suffix
        return self.options.skip_committed

    def _tally(self, step: Step, going: torch.Tensor, live: torch.Tensor, share: float = 1.0) -> torch.Tensor:
        """Add a step through a ``share`` of the layers to the counts of the rows ``going``. Returns how many positions
        each would have computed alone, [B]."""
        packed = self.options.skip_committed and not step.refreshes
        own = torch.where(going, self.own["live"] + live if packed else self.own[step.kind], 0)
        self.tally[:, 0 if step.whole else 1] += self.passes * going
        self.tally[:, 2] += self.passes * share * own
        return own

    def _packed(self, step: Step, own: torch.Tensor) -> Step:
        """The packed step that evaluates ``own`` [B] positions of each row, if there is one."""
        if not self._packs(step):
            return step
        size, most = int(own.sum()) * self.passes, int(own.max())
        if not self.graphs.enabled:
            return dataclasses.replace(step, packed=size, most=most)
        fitting = [one for one in self.recorded(step) if one.packed >= size and one.most >= most]
        if fitting:
            return fitting[0]
        # A block far behind the one before sees more for the first time than others do.
        return dataclasses.replace(step, packed=self.rows * self.passes * self.slots, most=self.slots)

    def run_step(self, step: Step) -> None:
        """One forward of all rows, and what is kept of it."""
        if not step.packed:
            return self._decide(self.hidden(step))
        live = self._live(step, self._going())
        self._decide(self._live_hidden(live), live)

    def take_mixed_step(
        self, steps: Steps, going: torch.Tensor, begins: torch.Tensor, full_rows: torch.Tensor, live: torch.Tensor
    ) -> None:
        """A step at which rows differ, [B] bool each: one forward a group, then one decision for all."""
        layers = self.family.layers
        hidden = self.weight.new_zeros(self.rows * self.passes, self.block_size, self.weight.shape[1])
        evaluated = torch.ones_like(self.fresh)  # [B, T]: the positions whose hidden states are new
        # 1. Rows in the middle of a block, then rows that begin one with a window. Of these, which layers drifted?
        from_layer = torch.full_like(begins, layers, dtype=torch.int64)  # of each row's full forward; ``layers``: none
        from_layer[begins & full_rows] = 0
        for step, group in ((steps.block, going & ~begins), (steps.window, begins & ~full_rows)):
            if not bool(group.any()):
                continue
            step = self._packed(step, self._tally(step, group, live))
            index = self._doubled(upload(group.nonzero()[:, 0], self.device))
            drifts = step.refreshes and self.options.refresh.layerwise
            old = self.cache.rows(index) if drifts else None
            if step.packed:
                on_device = upload(group, self.device)
                own = self._live(step, on_device)
                hidden = own.spread(self._live_hidden(own), hidden)
                places = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=self.device)
                places = own.spread(torch.ones_like(own.place, dtype=torch.bool), places)[: self.rows]
                evaluated = torch.where(on_device[:, None], places, evaluated)
            else:
                hidden[index] = self.hidden(step, index)
            if drifts:
                from_layer[group] = self._drifted(step, old, index)
        # 2. Full forwards, from the first layer on or from the first that drifted.
        for layer in from_layer[from_layer < layers].unique().tolist():
            group = (from_layer == layer).nonzero()[:, 0]
            index = self._doubled(upload(group, self.device))
            hidden[index] = self.hidden(steps.full, index, layer)
            self._tally(steps.full, from_layer == layer, live, (layers - layer) / layers)
        # 3. The tokens of all.
        self._decide(hidden, evaluated=evaluated)

    def _doubled(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat((rows, rows + self.rows)) if self.passes == 2 else rows

    def _drifted(self, step: Step, old: BlockCache, index: torch.Tensor) -> torch.Tensor:
        """Of each row, the first layer whose value vectors changed by more than tau, or the number of layers; [N]."""
        begin = self._begin(step).repeat(self.passes)[index]
        at = begin[:, None] + torch.arange(step.length, device=self.device)  # [N, W]
        last = torch.full_like(self.slot, self.slots)
        if self.options.suffix_length is not None:  # what a block sees for the first time has no old values
            last = self.slot + self.block_size
        seen = (at < last.repeat(self.passes)[index][:, None]) & (
            at >= self.pad.repeat(self.passes)[index][:, None]
        )  # [N, W]
        layers = []
        for layer in range(self.family.layers):
            old_values = old.values(layer, at)  # [N, W, G*D]
            change = self.cache.values(layer, at, index) - old_values
            drift = change.norm(dim=2) / old_values.norm(dim=2).clamp(min=1e-12)
            layers.append((drift * seen).sum(1) / seen.sum(1))
        drift = torch.stack(layers).unflatten(1, (self.passes, -1)).amax(1)  # [L, rows]
        past = torch.cat((drift > self.options.refresh.tau, torch.ones_like(drift[:1], dtype=torch.bool)))
        return past.int().argmax(0).cpu()

    # Forward

    def _begin(self, step: Step) -> torch.Tensor:
        """The first slot that a step computes, [B]."""
        if step.whole:
            return torch.full_like(self.slot, step.begin)
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
        ids = canvas[:, step.begin : step.begin + step.length]
        if not step.whole:
            at = rows.begin[:, None] + torch.arange(step.length, device=self.device)
            ids = canvas.gather(1, at.clamp(max=self.slots - 1))
        block = None if step.length == self.block_size else (rows.slot - rows.begin)[:, None] + self.offsets
        # 3. The forward, which writes to the cache.
        begin, start, end = rows.begin, rows.start, rows.end
        if cache is None:  # the ids are the whole sequence
            begin = None
            start, end = (None if x is None else x - step.begin for x in (start, end))
        with ops.counting(self.arrivals):
            hidden = self.family.hidden(ids, start, end, cache, begin, block, from_layer, rows.kept)
        if index is not None:
            self.cache.put(index, cache)
        return hidden

    def _live(self, step: Step, going: torch.Tensor | None) -> Live:
        """The positions that the packed ``step`` evaluates, of the rows ``going`` [B] bool."""
        end = (torch.full_like(self.pad, self.slots) if self.end is None else self.end)[:, None]
        if step.refreshes:  # the window, and what is seen for the first time
            at = torch.arange(self.slots, device=self.device).expand(self.rows, -1)
            begin = self._begin(step)[:, None]
            inside = (at >= torch.maximum(begin, self.pad[:, None])) & (at < begin + step.length)
            wanted = (inside | (at >= self.seen[:, None])) & (at < end)
        else:
            at = self.slot[:, None] + torch.arange(step.length, device=self.device)
            block = at[:, : self.block_size]
            masked = (self.canvas.gather(1, block) == self.options.mask_id) & self.open.gather(1, block)
            wanted = torch.cat((masked | self.fresh, at[:, self.block_size :] < end), 1)
        if going is not None:
            wanted = wanted & going[:, None]
        offset = (at - self.slot[:, None]).repeat(self.passes, 1)  # in the block
        wanted, at = wanted.repeat(self.passes, 1), at.repeat(self.passes, 1)
        return pack(wanted, at, offset, self.block_size, step.packed, step.most, self.cache.buffers.shape[3])

    def _live_hidden(self, live: Live) -> torch.Tensor:
        """What the LM head multiplies for the positions ``live``, [N, d]."""
        (row, _, _), slot, _ = live
        at = row % self.rows, slot.clamp(max=self.slots - 1)
        ids = self.canvas[at]
        if self.passes == 2:
            prompt = ~self.open[at] & (row >= self.rows)
            ids = ids.masked_fill(prompt, self.options.mask_id)
        start, end = (None if x is None else x.repeat(self.passes) for x in (self.start, self.end))
        with ops.counting(self.arrivals):
            return self.family.hidden(ids[:, None], start, end, self.cache, slot, packed=live.packed)[:, 0]
