"""The denoising step on static buffers, and the blocks made of such steps.

The canvas holds prompts and [MASK]s, padded on the left: every row ends at the last slot. A step runs the model on some
slots, predicts a token for each masked position of the current block, and commits the schedule's choice of them.

A step depends on no value that the host would have to read, so it can be recorded in a CUDA graph. Between steps the
host reads one flag a row, or none if the schedule knows its counts; then it runs ahead of the device, over as many
blocks as its caller likes. With drafts it runs ahead over the forwards that rows take even if every draft is right.
What it writes for a block goes through `device.upload`, which does not wait.

The flag is read when its step has ended, not one step later. Reading it later would add a cached step to every block,
which takes a hundred times as long as the device waits for a flag and a launch.

A row's tokens do not depend on its batch. A row is *going* at the steps that it would take alone. At the others, where
its block is filled or nothing of it is committed, the forward computes it along with its neighbours and keeps nothing.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import ClassVar

import torch

from dllm_fast import attentions
from dllm_fast.decoding.decider import GOOD
from dllm_fast.decoding.device import download, now, on_host, upload
from dllm_fast.decoding.graphs import Graphs, records
from dllm_fast.decoding.live import Live, sizes
from dllm_fast.decoding.options import Options
from dllm_fast.decoding.speculation import Speculation
from dllm_fast.decoding.steps import Counts, Step, Steps

WHOLE = 64  # a recorded full forward ends at a multiple of it
TIMES = 5  # a forward is timed; the first compiles, the second is recorded
RESUME = ("resume", True, False)  # the graph of `Speculation.resume`
PADDING = 1 / 32  # the share of a recorded full forward up to which rows of different lengths take it, padded


class Engine(Speculation):
    """Buffers for a batch of ``rows`` sequences of up to ``slots`` positions, and the steps over them."""

    watchers: ClassVar[list[Callable[["Engine", Step | None], contextlib.AbstractContextManager]]] = []

    @classmethod
    @contextlib.contextmanager
    def watched(cls, watch: Callable[["Engine", Step | None], contextlib.AbstractContextManager]) -> Iterator[None]:
        """Within it, each step of any engine is taken in ``watch(engine, step)``; None as step: rows differ."""
        cls.watchers.append(watch)
        try:
            yield
        finally:
            cls.watchers.remove(watch)

    def __init__(self, family, options: Options, rows: int, slots: int, spare: int, padded: bool):
        super().__init__(family, options, rows, slots, spare, padded)
        # Of each row, on the host.
        self.lengths = on_host([slots] * rows)  # of its sequence, which ends at the last slot
        self.tally = torch.zeros(rows, 5, dtype=torch.float64, device="cpu")  # of the last block, as in `Counts`
        self.idle = torch.zeros(rows, dtype=torch.bool, device="cpu")  # whether nobody waits for it
        self.alone: dict[str, torch.Tensor] = {}  # positions that a row computes at a step of each kind, [B]
        self.graphs = Graphs(records(self.device, family.impl), self.device)

    @property
    def nbytes(self) -> int:
        """Bytes of its cache and its graphs. The other buffers are small."""
        return self.graphs.nbytes + (0 if self.cache is None else self.cache.nbytes)

    def load(self, rows: list) -> None:
        """Write the sequences of ``rows`` (`request.Row`) into the canvas. Rows that are done are idle."""
        super().load(rows)
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
        self.seed.copy_(upload(on_host([row.seed for row in rows]), self.device))
        self.row.copy_(upload(on_host([row.noise for row in rows]), self.device))
        self.bad.fill_(GOOD)
        self.prepared = None
        if self.pace is not None:
            self.pace.begin()

    def read(self) -> tuple[torch.Tensor, list[tuple[int, int] | None]]:
        """The canvas [B, S] on the host, and the block and step at which a row's logits first were NaN or infinite."""
        read = download(torch.cat((self.canvas, self.bad[:, None]), 1))  # in one wait for the device
        return read[:, :-1], [None if bad == GOOD else divmod(bad, 1 << 32) for bad in read[:, -1].tolist()]

    def take_over(self, other: "Engine", stayed: list[int]) -> None:
        """Continue with the rows ``stayed`` of another engine: copy the last slots of its cache."""
        if self.cache is not None and not self.options.refresh.full(1):
            index = other._doubled(upload(on_host(stayed), self.device))
            shift = other.slots - self.slots
            self.cache.take_over(other.cache, index, shift, min(self.slots, other.slots))
            self.near, self.ends = other.near[stayed] - shift, other.ends[stayed] - shift

    def block(
        self,
        slot: torch.Tensor,  # [B] int64, on the host as all arguments are: the live block's first slot
        number: torch.Tensor,  # [B]: of the block, among the row's own
        planned: list[tuple[int, torch.Tensor]] | None,  # `Schedule.counts` of it
        full_rows: torch.Tensor,  # [B] bool: rows whose first step is a full forward
        draft=None,  # called after each step
        then: torch.Tensor | None = None,  # [B]: the first slot of the block after it, if drafts may look ahead to that
    ) -> None:
        """Fill one block of every row."""
        # 1. The block's buffers, counts and steps.
        self.tally.zero_()
        steps = self.prepare(slot, number)
        self.drafting = self.options.drafts > 0 and self.states(steps.block) > 1
        going = ~self.idle  # [B]
        sure = 1  # forwards that rows take whatever the device would say
        begun = torch.zeros_like(full_rows)
        if self.drafting:  # how far a forward gets is read from the device
            resumes = self.resumes(slot, planned, going, full_rows)
            self.plan_steps(planned, then)
            sure = self.least_forwards(going) + (not resumes)
            if resumes:
                self.graphs.run(RESUME, self.resume)
                self.tally[:, 3] += going
                begun |= going
                if draft is not None:
                    draft()
            if resumes and planned is None:  # that may have been all
                live, self.tally[:, 3] = self.read_steps(going)
                going = live > 0
                if not bool(going.any()):
                    return
            planned = None
        if planned is not None:
            plan = upload(torch.stack([count for _, count in planned]), self.device)  # [steps, B]
            numbers: Iterable[int] = [step for step, _ in planned]
        else:
            numbers = range(self.block_size + self.options.more_steps)
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
            if step is not None and step.states > 1:
                last = self.then is not None and len(self.unread) + 1 >= sure  # it may be
                step = dataclasses.replace(step, states=self.states(step), ahead=self.window.length * last)
            with contextlib.ExitStack() as stack:
                for watch in self.watchers:
                    stack.enter_context(watch(self, step))
                if step is None:
                    self.take_mixed_step(steps, going, begins, full_rows, live)
                else:
                    self.take_step(step, going, live)
            states = 1 if step is None else step.states + (step.ahead > 0)
            self.tally[:, 3] += going
            self.tally[:, 4] += going * states
            if draft is not None:
                draft()
            # 4. Which rows go on, and how much of them: planned beforehand, or read from the device.
            if planned is None or (self.options.skip_committed and self.options.remask):
                if self.drafting:
                    self.unread.append(states)
                    if len(self.unread) < sure:
                        continue
                    live, self.tally[:, 3] = self.read_steps(going)
                    sure = max(1, self.least_forwards(live > 0))
                else:
                    live = download(self.live)
            else:
                quota = planned[n][1]
                live = torch.where(going, left, live)  # what the step committed is evaluated once more
                left = left - quota
            if planned is None:
                going = live > 0
                if not bool(going.any()):
                    break

    def prepare(self, slot: torch.Tensor, number: torch.Tensor) -> Steps:
        """Begin block ``number`` [B] of each row at its ``slot`` [B], both on the host. Returns its steps."""
        self.slot.copy_(upload(slot, self.device))
        self.number.copy_(upload(number, self.device))
        self.budget.fill_(self.options.more_steps)
        self.look(slot)
        self.committed_probability.zero_()
        self.live.copy_(upload(torch.where(self.idle, 0, self.block_size), self.device))
        multiple = WHOLE if self.graphs.enabled else 1
        steps = Steps.of(self.options, self.slots, int(slot.min()), int(slot.max()), multiple, self.family.shifted)
        self.alone = self._positions(steps, slot)
        if self.looks_ahead:
            self.alone["ahead"] = self._positions(steps, slot + self.block_size)["window"]
        return steps

    @property
    def counts(self) -> list[Counts]:
        """The forwards of each row in the last block."""
        return [
            Counts(int(full), int(part), positions, int(steps), int(states))
            for full, part, positions, steps, states in self.tally.tolist()
        ]

    def _positions(self, steps: Steps, slot: torch.Tensor) -> dict[str, torch.Tensor]:
        """By kind of step, how many positions each row would compute alone, [B]; of a block that begins at ``slot``."""
        pad = self.slots - self.lengths
        block = self.block_size - (pad - slot).clamp(min=0)  # a row shorter than a block has it begin in the padding
        block = block + steps.block.before * (slot > pad)
        begin = torch.maximum(slot - steps.window.before, pad)
        reached = torch.maximum(self.reached, pad)  # a block far behind it sees what is between for the first time
        if self.options.runs_suffix:
            suffix = self.ends - slot - self.block_size
            begin = torch.minimum(begin, reached)
            return {"full": self.ends - pad, "window": self.ends - begin, "block": block + suffix, "live": suffix}
        begin = begin.clamp(max=self.slots - steps.window.length)
        stop = torch.minimum(begin + steps.window.length, self.ends)
        window = stop - torch.maximum(begin, pad)
        if self.options.suffix_length is not None:
            window = window + (self.ends - torch.maximum(reached, stop)).clamp(min=0) + (begin - reached).clamp(min=0)
        return {"full": self.ends - pad, "window": window, "block": block, "live": torch.zeros_like(pad)}

    # The kinds of step

    def _common_step(self, steps: Steps, begins: torch.Tensor, full_rows: torch.Tensor) -> Step | None:
        """The step that all rows take, or None where they differ: those of ``begins`` [B] begin a block, of which
        ``full_rows`` do so by a full forward and others by the refresh's window."""
        if not bool(begins.any()):
            return steps.block
        if self.cache is None or bool((begins & full_rows | self.idle).all()):
            return steps.full
        alike = bool((begins & ~full_rows | self.idle).all()) and not self.options.refresh.layerwise
        return steps.window if alike else None

    def take_step(self, step: Step, going: torch.Tensor, live: torch.Tensor) -> None:
        """Take a step, through its graph where it is recorded; it counts for the rows ``going`` [B], of which ``live``
        [B] positions of the block can still change."""
        own = self._tally(step, going, live)
        self.take(self.packed(step, own))

    def take(self, step: Step) -> None:
        """Take a step that counts for nobody. What is packed of whole sequences has as many sizes as there are sums of
        lengths, and fills the device for longer than its launches take, so it is not recorded."""
        if step.whole and step.packed:
            self.run_step(step)
        else:
            key = (step, self.drafting, step.whole and self.unpadded)
            self.graphs.run(key, functools.partial(self.run_step, step))

    @property
    def draftings(self) -> list[bool]:
        """Whether blocks are drafted: each way that they may go."""
        return [self.options.drafts > 0] if self.pace is None else [True, False]

    def states(self, step: Step) -> int:
        """How many states the next forward of a block evaluates, of those that ``step`` has."""
        if self.pace is None:
            return step.states
        if not self.pace.cost:
            self.pace.measure(functools.partial(self._time, step))
        return self.pace.states

    def _time(self, step: Step, states: int) -> float:
        """Seconds of a forward like ``step`` of so many states, which counts for nobody."""
        live, self.drafting = self.live.clone(), True
        self.live.zero_()
        seconds = []
        for _ in range(TIMES):
            began = now(self.device)
            self.take(dataclasses.replace(step, states=states))
            seconds.append(now(self.device) - began)
        self.live.copy_(live)
        return min(seconds)

    def recorded(self, step: Step) -> list[Step]:
        """The steps that are recorded for ``step``: where positions are packed, one for each number of them, and with
        drafts for each number of states that they may have."""
        if step.states > 1:
            choices = [1] if not self.drafting else [step.states] if self.pace is None else self.pace.choices
            ahead = (0, self.window.length) if self.looks_ahead and self.drafting else (0,)
            return [dataclasses.replace(step, states=states, ahead=more) for states in choices for more in ahead]
        if not self._packs(step):
            return [step]
        if step.whole:
            return [dataclasses.replace(step, packed=self.rows * self.passes * step.length, most=step.length)]
        length = step.length
        if step.refreshes:  # with what a block sees for the first time
            length += self.block_size + self.options.suffix_sample
        most = min(length, self.slots)
        return [dataclasses.replace(step, packed=size, most=most) for size in sizes(self.rows * self.passes * most)]

    def _packs(self, step: Step) -> bool:
        """Whether the step evaluates some positions of each row: those that can still change; what is seen for the
        first time, beside a window; or positions of a sample."""
        if step.states > 1:
            return False
        if self.place is not None and (step.refreshes or self.options.runs_suffix):
            return True
        if step.refreshes:
            return self.options.suffix_length is not None and not step.whole and self.family.block is None
        return self.options.skip_committed

    def _tally(self, step: Step, going: torch.Tensor, live: torch.Tensor, share: float = 1.0) -> torch.Tensor:
        """Add a step through a ``share`` of the layers to the counts of the rows ``going``. Returns how many positions
        each would have computed alone, [B]."""
        packed = self.options.skip_committed and not step.refreshes
        own = (self.alone["live"] + live if packed else self.alone[step.kind]) * step.states
        own = torch.where(going, own + (self.alone["ahead"] if step.ahead else 0), 0)
        self.tally[:, 0 if step.whole else 1] += self.passes * going
        self.tally[:, 2] += self.passes * share * own
        return own

    def packed(self, step: Step, own: torch.Tensor) -> Step:
        """The packed step that evaluates ``own`` [B] positions of each row, if that is better or the only way."""
        size, most = int(own.sum()), int(own.max())
        packs = self._packs(step)
        if step.whole and self.cache is not None and self.rows > 1:
            allowed = PADDING if self.graphs.enabled else 0.0
            packs |= size < (1 - allowed) * self.rows * step.length
        if not packs:
            return step
        exact = dataclasses.replace(step, packed=size * self.passes, most=most)
        if step.whole or not self.graphs.enabled:
            return exact
        fitting = [one for one in self.recorded(step) if one.packed >= exact.packed and one.most >= most]
        if fitting:
            return fitting[0]
        # A block far behind the one before sees more for the first time than others do.
        return dataclasses.replace(step, packed=self.rows * self.passes * self.slots, most=self.slots)

    def run_step(self, step: Step) -> None:
        """One forward of all rows, and what is kept of it."""
        if step.states > 1:
            return self.take_states(step)
        live = hidden = None
        if step.packed:
            live = self.find(step, self._going())
            hidden = self.packed_hidden(step, live)
        else:
            hidden = self.hidden(step)
        if self.drafting:
            self.decide_states(hidden[:, None])
        else:
            self._decide(hidden, None if step.refreshes else live)

    def take_mixed_step(
        self, steps: Steps, going: torch.Tensor, begins: torch.Tensor, full_rows: torch.Tensor, live: torch.Tensor
    ) -> None:
        """A step at which rows differ, [B] bool each: one packed forward a group, then one decision for all."""
        layers = self.family.layers
        hidden = self.weight.new_zeros(self.rows * self.passes, self.block_size, self.weight.shape[1])
        evaluated = torch.ones_like(self.fresh)  # [B, T]: the positions whose hidden states are new
        from_layer = torch.full_like(begins, layers, dtype=torch.int64)  # of each row's full forward; ``layers``: none
        from_layer[begins & full_rows] = 0
        # 1. Rows in the middle of a block.
        if bool((middle := going & ~begins).any()):
            step, own = self._group(steps.block, middle, self._tally(steps.block, middle, live))
            hidden = own.spread(self.packed_hidden(step, own), hidden)
            places = own.spread(torch.ones_like(own.place, dtype=torch.bool), torch.zeros_like(hidden[..., 0]).bool())
            evaluated = torch.where(upload(middle, self.device)[:, None], places[: self.rows], evaluated)
        # 2. Rows that begin one with a window. Of these, which layers drifted?
        if bool((window := begins & ~full_rows).any()):
            step, own = self._group(steps.window, window, self._tally(steps.window, window, live))
            drifts = self.options.refresh.layerwise
            old = self.window_values(step) if drifts else None
            hidden = self._of(window, self.packed_hidden(step, own), hidden)
            if drifts:
                from_layer[window] = self.drifted(step, old)[window]
        # 3. Full forwards, from the first layer on or from the first that drifted.
        for layer in from_layer[from_layer < layers].unique().tolist():
            group = from_layer == layer
            step, own = self._group(steps.full, group, self._tally(steps.full, group, live, (layers - layer) / layers))
            hidden = self._of(group, self.packed_hidden(step, own, layer), hidden)
        # 4. The tokens of all.
        if self.drafting:
            self.decide_states(hidden[:, None])
        else:
            self._decide(hidden, evaluated=evaluated)

    def _group(self, step: Step, group: torch.Tensor, own: torch.Tensor) -> tuple[Step, Live]:
        """``step`` packed for the rows ``group`` [B], which evaluate ``own`` [B] positions each, and the positions."""
        step = dataclasses.replace(step, packed=int(own.sum()) * self.passes, most=int(own.max()))
        return step, self.find(step, upload(group, self.device))

    def _of(self, group: torch.Tensor, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        """``new`` [B*passes, T, d] for the rows ``group`` [B], on the host, and ``old`` for others."""
        return torch.where(upload(group, self.device).repeat(self.passes)[:, None, None], new, old)

    def _doubled(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat((rows, rows + self.rows)) if self.passes == 2 else rows
