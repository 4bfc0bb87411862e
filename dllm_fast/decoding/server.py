"""Rows seated in an engine, block after block, until each is done.

All rows of a batch begin a block together. Rows that are done leave at its end, and waiting rows take their seats. An
open server takes rows while it runs, and grows and shrinks with their number.

The host reads the filled tokens only where it must: when a row is done, and after each block if an end of text may be
in it or a streamer wants it. Between the other blocks of a schedule with counts it reads nothing, and the device never
waits for the host.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator

import torch

from dllm_fast.decoding.device import as_written, on_host
from dllm_fast.decoding.engine import Engine
from dllm_fast.decoding.graphs import records
from dllm_fast.decoding.memory import fits, most_rows, require_memory
from dllm_fast.decoding.options import Options
from dllm_fast.decoding.pipelined import Pipelined
from dllm_fast.decoding.pool import Pool
from dllm_fast.decoding.request import PLAN_STEP, Row
from dllm_fast.decoding.values import require
from dllm_fast.kernels import reference

STEP = 64  # slots are a multiple of it where steps are recorded, so that prompts of many lengths share a recording
SHRINK = 0.75  # an engine gives way to a smaller one when the rows fit in this share of its slots


def rounded_up(slots: int) -> int:
    """The slots of an engine whose steps are recorded, for rows that need ``slots``."""
    return -(-slots // STEP) * STEP


class Server:
    """Seats rows in an engine and runs it block by block."""

    def __init__(
        self, model, family, pool: Pool, options: Options, rows: list[Row], seats: int | None, streamer=None,
        is_open: bool = False,
    ):  # fmt: skip
        """``seats`` None: as many as fit into memory, and half as many each time that this turns out to be too many.
        ``is_open``: rows may be added later (`add`), up to ``seats`` at a time; too many are halved there too."""
        if family.ranks is not None:
            apart = f"{family.ranks.size} processes share the model, and may run out of memory apart"
            require(seats is not None and not is_open, f"batch_size='auto': {apart}")
            given = [(row.ids.tolist(), row.open.tolist(), row.noise) for row in rows]
            family.ranks.require_same(options, seats, given)
        self.model, self.family, self.pool = model, family, pool
        self.device, self.options = family.head()[0].device, options
        self.finished = [row for row in rows if row.done]  # nothing to fill
        self.waiting = sorted((row for row in rows if not row.done), key=lambda row: -len(row.ids))
        self.seated: list[Row] = []
        self.going: list[Row] = []  # those of them that are not done
        self.engine: Engine | None = None
        self.key: tuple | None = None
        self.recorded = records(self.device, family.impl)
        self.stream = None if streamer is None else Stream(streamer, rows[0])
        self.is_open = is_open
        self.automatic = seats is None or is_open
        if seats is None:
            pool.clear()  # what it keeps is not free
            seats = most_rows(family, options, *self._plan(self.waiting, len(self.waiting))[:3]) if self.waiting else 0
        self.seats = seats if is_open else min(seats, len(self.waiting))
        if self.waiting:
            self._require_memory(self._plan(self.waiting, self.seats))

    def serve(self) -> Iterator[Row]:
        """Yield rows as they are done. Threads take turns, a block each; every run has buffers of its own."""
        yield from self.finished
        while self.busy:
            done = self.advance()
            for row in done:
                require(row.error is None, str(row.error))
            yield from done
        self.close()
        if self.stream is not None:
            self.stream.end()

    @property
    def busy(self) -> bool:
        """Whether any row has blocks left to fill."""
        return not all(row.done for row in self.going + self.waiting)

    def add(self, row: Row) -> None:
        """Have ``row`` seated at the next block, of an open server. Its options are equal to the server's."""
        self.waiting.append(row)

    def advance(self) -> list[Row]:
        """Seat waiting rows, and fill a block of each seated one. Returns those that are done with it."""
        # The buffers of an engine that is kept are ordinary tensors, whatever mode the call comes in.
        with torch.inference_mode(False), torch.no_grad(), as_written(self.device), self.pool.lock:
            handed_out = [row.index for row in self.going if row.done]
            self.waiting = [row for row in self.waiting if not row.done]  # stopped since it was added
            joins = self.waiting and len(self.going) < self.seats
            try:
                if not self.going or handed_out or joins:
                    self._seat()
                self._block()
            except (torch.OutOfMemoryError, MemoryError) as error:
                self._halve(error, handed_out)
        return [row for row in self.going if row.done]

    def close(self) -> None:
        """Leave the engine to the pool."""
        if self.engine is not None:
            self.pool.give(self.key, self.engine)
            self.engine = None
            self.seated, self.going = [], []

    @contextlib.contextmanager
    def seated_engine(self) -> Iterator[Engine]:
        """The engine that `serve` would begin with, its rows loaded; the pool keeps it for a call like this."""
        with torch.inference_mode(False), torch.no_grad(), as_written(self.device), self.pool.lock:
            self._seat()
            yield self.engine
            self.pool.give(self.key, self.engine)

    def _plan(self, rows: list[Row], seats: int) -> tuple[int, int, int, bool]:
        """(seats, slots, spare slots, padded) of an engine for ``rows``, of which ``seats`` sit at a time."""
        options = self.options
        slots = max(len(row.ids) for row in rows) + self.family.shifted  # each block has a left neighbour
        spare = 0
        if options.runs_suffix and options.pipeline is None:
            spare = 0 if options.refresh.full(1) else options.refresh.span(options.block_length)[0]
            firsts = [row.pad(slots) + first for row in rows for first, _ in row.blocks]
            if seats > 1:
                spare += max(firsts) - min(firsts)
        if self.recorded:
            return seats, rounded_up(slots), rounded_up(spare), True
        return seats, slots, spare, any(len(row.ids) < slots for row in rows)

    def _key(self, plan: tuple[int, int, int, bool]) -> tuple:
        """Of an engine in the pool. Weights that are written in place leave it as it is: graphs hold addresses."""
        return self.options, plan, self.family.recorded(self.model)

    def _require_memory(self, plan: tuple[int, int, int, bool]) -> None:
        """Raise MemoryError if a new engine would not fit even without those that the pool keeps."""
        # Processes that share a model agree on what is free, each time: their pools may differ.
        if self.family.ranks is None and self._key(plan) in self.pool:
            return
        if not fits(self.family, self.options, *plan[:3], self.pool.recorded):
            self.pool.clear()
        require_memory(self.family, self.options, *plan[:3])

    def _seat(self) -> None:
        """Give free seats to waiting rows. Seats that nobody takes are removed, and added when they are needed."""
        taken = [seat for seat, row in enumerate(self.seated) if not row.done]
        joining = self.waiting[: self.seats - len(taken)]
        del self.waiting[: len(joining)]
        # 1. The seats to keep, and how many are new.
        stayed = self._stay(taken, len(taken) + len(joining))
        queue = iter(joining)
        rows = [self.seated[seat] if seat in taken else next(queue, None) for seat in stayed]
        self.going = [row for row in rows if row is not None]
        # 2. An idle seat repeats the first row, with nothing to fill.
        ids = self.going[0].ids
        idle = Row(-1, 0, 0, ids, torch.zeros_like(ids, dtype=torch.bool), [], self.options.mask_id, len(ids))
        self.seated = [idle if row is None else row for row in rows]
        # 3. Their engine.
        old, plan = self.engine, self._plan(self.going + self.waiting, len(stayed))
        if old is None or not self._serves(self.key[1], plan):
            key = self._key(plan)
            kind = Engine if self.options.pipeline is None else Pipelined
            self.engine = self.pool.take(key) or kind(self.family, self.options, *plan)
            if old is not None:
                self.engine.take_over(old, [0 if seat is None else seat for seat in stayed])
                self.pool.give(self.key, old)
            self.key = key
        self.engine.load(self.seated)
        if self.engine.record is not None:
            self.engine.record.load(self.seated)

    def _serves(self, plan: tuple[int, int, int, bool], wanted: tuple[int, int, int, bool]) -> bool:
        """Whether an engine of ``plan`` seats the rows of which one of the plan ``wanted`` would be made."""
        seats, slots, spare, padded = plan
        fits = wanted[0] == seats and SHRINK * slots < wanted[1] <= slots and wanted[2] <= spare
        return fits and (padded or all(len(row.ids) == slots for row in self.going + self.waiting))

    def _halve(self, error: Exception, handed_out: list[int]) -> None:
        """Begin the seated rows but those ``handed_out`` again in half as many seats, after ``error``, which is raised
        where that is not asked for or not possible. A row's tokens depend on nothing else, so they are the same."""
        if not self.automatic or self.seats == 1:
            raise error
        warnings.warn(
            f"batch_size='auto': no memory for {self.seats} rows, going on with {self.seats // 2}", stacklevel=2
        )
        self.seats //= 2
        unfinished = [row for row in self.going if row.index not in handed_out]
        for row in unfinished:
            row.restart()
        self.waiting = sorted(unfinished + self.waiting, key=lambda row: -len(row.ids))
        self.seated, self.going, self.engine = [], [], None
        self.pool.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _stay(self, taken: list[int], wanted: int) -> list[int | None]:
        """The seats to keep for ``wanted`` rows, the ``taken`` ones among them, and None for each new one. Where steps
        are recorded, their number is halved as long as that leaves enough, so that few numbers are recorded."""
        number = self.seats if self.recorded else wanted
        while number // 2 >= wanted:
            number //= 2
        empty = [seat for seat in range(len(self.seated)) if seat not in taken]
        kept = sorted(taken + empty[: number - len(taken)])
        return [*kept, *[None] * (number - len(kept))]

    def _block(self) -> None:
        """Fill each seated row's next block; with a `pipeline`, until one of them has filled it."""
        engine = self.engine
        if self.stream is not None:
            self.stream.flush()
        if isinstance(engine, Pipelined):
            self._stage(engine)
        else:
            self._next_blocks(engine)
        may_end = any(row.done or row.eos_ids for row in self.going)
        if may_end or self.stream is not None or self.is_open:
            self._take_in()

    def _stage(self, engine: Pipelined) -> None:
        """Take steps until some seated row has filled the first of its live blocks."""
        last = engine.slots - engine.block_size  # where a window begins at the latest
        slot = on_host([last if row.done else min(row.slot(engine.slots, row.next), last) for row in self.seated])
        stage = engine.stage(self.seated, self._drafting(slot))
        for row, counts, (filled, *state) in zip(self.seated, engine.counts, stage.T.tolist(), strict=True):
            if not row.done:
                row.counts.add(counts)
                row.next += filled
                row.ahead, row.behind, row.waited = state

    def _next_blocks(self, engine: Engine) -> None:
        """Fill each seated row's next block."""
        rows = [self.going[0] if row.done else row for row in self.seated]
        slot = on_host([row.slot(engine.slots, row.next) for row in rows])
        masked = on_host([0 if row.done else row.blocks[row.next][1] for row in self.seated])
        blocks = on_host([len(row.blocks) for row in rows])
        draw = functools.partial(self._draw, slot, masked)
        plan = self.options.schedule.counts(masked, blocks, draw)
        number = on_host([row.next for row in rows])
        full_rows = on_host([self._begins_full(row) for row in rows], torch.bool)
        engine.block(slot, number, plan, full_rows, self._drafting(slot), self._then(rows, slot))
        for row, counts in zip(self.seated, engine.counts, strict=True):
            if not row.done:
                row.counts.add(counts)
                row.next += 1

    def _drafting(self, slot: torch.Tensor) -> Callable[[], None] | None:
        """What to call after each step of what is live from ``slot`` [B] on, if any row is watched."""
        watched = [seat for seat, row in enumerate(self.seated) if row.draft is not None and not row.done]
        return functools.partial(self._draft, watched, slot + self.engine.block_size) if watched else None

    def _then(self, rows: list[Row], slot: torch.Tensor) -> torch.Tensor | None:
        """The slots [B] of the blocks after those at ``slot`` [B], if the engine may look ahead to their first step."""
        last = any(row.next + 1 == len(row.blocks) or self.options.refresh.full(row.next + 1) for row in rows)
        if last or not self.engine.looks_ahead:
            return None
        then = on_host([row.slot(self.engine.slots, row.next + 1) for row in rows])
        return then if torch.equal(then, slot + self.engine.block_size) else None

    def _begins_full(self, row: Row) -> bool:
        """Whether a row's next block begins with a full forward. So does a block of a block-causal model that does not
        follow the one before it: the cache lacks what lies between."""
        if self.options.refresh.full(row.next) or self.family.block is None:
            return self.options.refresh.full(row.next)
        (before, _), (first, _) = row.blocks[row.next - 1 : row.next + 1]
        return first != before + self.family.block

    def _draw(self, slot: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """Uniform noise [B, T] of the positions that a block of each row has to fill, on the host; 2 elsewhere.

        From its first slot [B] on; the last ``masked`` [B] of the open ones are its own.
        """
        pad = on_host([row.pad(self.engine.slots) for row in self.seated])
        at = slot[:, None] + torch.arange(self.engine.block_size, device="cpu") - pad[:, None]  # [B, T] positions
        numbers = on_host([(row.seed, row.noise) for row in self.seated])  # [B, 2]
        seed, noise = numbers.T[:, :, None].expand(2, *at.shape).flatten(1)
        drawn = reference.uniform(seed, PLAN_STEP, noise, at.flatten()).view_as(at)
        left = torch.stack([row.left()[own.clamp(min=0)] for row, own in zip(self.seated, at, strict=True)]) & (at >= 0)
        # What earlier blocks filled is [MASK] here still, where it was not read.
        left &= left.flip(1).cumsum(1).flip(1) <= masked[:, None]
        return drawn.where(left, 2.0)

    def _draft(self, watched: list[int], ends: torch.Tensor) -> None:
        """Show the tokens of the ``watched`` seats after a step of the blocks that end at the slots ``ends`` [B]."""
        canvas = self.engine.canvas.to("cpu", copy=True)
        for seat in watched:
            pad = self.seated[seat].pad(self.engine.slots)
            self.seated[seat].draft(canvas[seat, pad:], int(ends[seat]) - pad)

    def _take_in(self) -> None:
        """Read the seated rows' tokens from the device."""
        engine = self.engine
        canvas, bad = engine.read()
        if engine.record is not None:
            for row, *own in zip(self.seated, *engine.record.read(), strict=True):
                row.logprobs, row.steps = (x[row.pad(engine.slots) :].clone() for x in own)
        for row, ids, when in zip(self.seated, canvas, bad, strict=True):
            if when is not None:
                block, step = when
                row.stop(
                    f"model: logits are NaN or infinite at step {step} of block {block} of row {row.index}: "
                    f"weights that are, or activations too large for {engine.weight.dtype}"
                )
            row.take(ids[row.pad(engine.slots) :], row.eos_ids, row.pad_id)
        if self.stream is not None:
            self.stream.flush()


class Stream:
    """Hands a row to a transformers streamer: everything up to the first position still open."""

    def __init__(self, streamer, row: Row):
        self.streamer, self.row, self.shown = streamer, row, 0
        if hasattr(streamer, "put_draft"):  # it wants each step
            row.draft = self.draft

    def flush(self) -> None:
        end = min(self.row.settled, self.row.length)
        if end > self.shown:
            self.streamer.put(self.row.ids[self.shown : end].clone())
            self.shown = end

    def draft(self, sequence: torch.Tensor, end: int) -> None:
        """``sequence`` [L] on the host after a step of the block that ends at position ``end``."""
        sequence = sequence[: self.row.length]
        self.streamer.put_draft(sequence[self.shown : max(end, self.shown)], sequence=sequence)

    def end(self) -> None:
        self.streamer.end()
