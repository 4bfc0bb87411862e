"""The denoising step on static buffers, and the blocks made of such steps.

The canvas holds prompts and [MASK]s, padded on the left so that every row's end is the last slot. A step evaluates the
model on some slots, turns the live block's masked positions into candidates, and commits the schedule's choice of
them. Nothing in a step depends on a value that the host would have to read, so it can be recorded in a CUDA graph. The
host reads one flag a row and step; where the schedule knows its counts none, so that it runs ahead of the device, over
as many blocks as its caller likes. What it writes for a block goes through `device.upload`, which does not wait.

A flag is read when its step has ended, not one step behind: a step more in every block, which is evaluated for nothing,
costs a cached step, a hundred times what the device waits for a flag and a launch.

A row of a batch is what it would be alone. It is *going* at the steps that it would take alone; at the others, where
its block is filled or it keeps nothing, its neighbours' evaluation computes it too, and nothing of that is kept.
"""

import functools
from dataclasses import dataclass

import torch

from dllm_fast import attentions, ops
from dllm_fast.decoding.device import download, on_host, upload
from dllm_fast.decoding.graphs import Graphs, records
from dllm_fast.decoding.refresh import Drift, Refresh
from dllm_fast.decoding.remask import STAYS, Committed, Remask, ranks
from dllm_fast.decoding.schedules import Schedule
from dllm_fast.families.cache import BlockCache

ARRIVALS = 4096  # tiles of 128 output channels: as wide as a layer's linears get
GOOD = 1 << 62  # in `Engine.bad`: no step of any block


@dataclass(frozen=True)
class Options:
    """What is fixed for an engine, and baked into its graphs."""

    block_length: int
    schedule: Schedule
    confidence: str
    temperature: float
    cfg_scale: float
    cache: str
    refresh: Refresh
    remask: Remask | None
    mask_id: int
    suppress_tokens: tuple[int, ...] = ()  # never chosen, no part of the softmax
    defer_tokens: tuple[int, ...] = ()  # of confidence -inf


@dataclass
class Counts:
    """A row's model evaluations: forwards over whole sequences, over parts against a cache, and positions in all."""

    full: int = 0
    block: int = 0
    positions: float = 0.0  # one that passes through half the layers counts a half

    @property
    def nfe(self) -> int:
        return self.full + self.block

    def add(self, other: "Counts") -> None:
        self.full += other.full
        self.block += other.block
        self.positions += other.positions


class Engine:
    """Buffers for a batch of ``rows`` sequences of up to ``slots`` positions, and the steps over them."""

    def __init__(self, family, options: Options, rows: int, slots: int, spare: int, padded: bool):
        self.family, self.options, self.rows, self.slots = family, options, rows, slots
        self.weight = family.head()[0]
        device = self.device = self.weight.device
        self.live = min(options.block_length, slots)
        self.passes = 2 if options.cfg_scale > 0 else 1
        self.counts = [Counts() for _ in range(rows)]  # of each row in the last block
        self.lengths = [slots] * rows  # of each row's sequence, which ends at the last slot
        self.firsts = [0] * rows  # each row's position at which its live block begins
        self.idle = [False] * rows  # rows that nobody waits for
        long = functools.partial(torch.zeros, dtype=torch.int64, device=device)
        self.canvas = long((rows, slots))
        self.open = torch.zeros((rows, slots), dtype=torch.bool, device=device)  # to be filled, or filled by us
        self.pad, self.row, self.slot, self.count = (long(rows) for _ in range(4))
        self.number = long(rows)  # of each row's live block, among its blocks
        self.budget = long(rows)  # positions that may still be opened again in this block
        self.step, self.seed = long(1), long(1)
        self.more = torch.zeros(rows, dtype=torch.bool, device=device)  # has the row's block a position still open
        self.bad = long(rows)  # number << 32 | step at which a candidate's logits first were NaN or infinite, or GOOD
        self.then = torch.zeros((rows, self.live), dtype=torch.float32, device=device)  # probabilities at commitment
        self.offsets = torch.arange(self.live, device=device)
        # Without padding there is no range to pass, and attention takes its unmasked path.
        self.start = self.pad if padded else None
        self.whole = False  # no row is padded, and PyTorch's attention serves that: full steps then pass no range
        # Rows at different slots are evaluated to a common length; what overruns lands in the spare slots.
        self.end = torch.full_like(self.pad, slots) if spare else None
        self.cache = None
        if options.cache != "none":
            width = self.weight.shape[1] if isinstance(options.refresh, Drift) else 0
            shape = (family.layers, rows * self.passes, slots + spare, family.kv_heads, family.head_dim)
            self.cache = BlockCache(*shape, self.weight.dtype, device, width)
        # What the few-row matmuls count in: a step has it to itself.
        self.arrivals = long(ARRIVALS, dtype=torch.int32) if family.impl == "triton" else None
        self.graphs = Graphs(records(device, family.impl), device)

    @property
    def nbytes(self) -> int:
        """Bytes of its cache and its graphs, which is all of it that is large."""
        return self.graphs.nbytes + (0 if self.cache is None else self.cache.nbytes)

    def load(self, rows: list) -> None:
        """Write the sequences of ``rows`` (`request.Row`) into the canvas, as they stand; one that is done is idle."""
        shape = (len(rows), self.slots)
        canvas, open_ = (torch.zeros(shape, dtype=dtype, device="cpu") for dtype in (torch.int64, torch.bool))
        for b, row in enumerate(rows):
            canvas[b, self.slots - len(row.ids) :] = row.ids
            open_[b, self.slots - len(row.ids) :] = row.open
        self.canvas.copy_(upload(canvas, self.device))
        self.open.copy_(upload(open_, self.device))
        self.lengths = [len(row.ids) for row in rows]
        self.idle = [row.done for row in rows]
        shape = self.family.heads, self.family.kv_heads, self.family.head_dim, self.slots
        self.whole = self.end is None and min(self.lengths) == self.slots
        self.whole = self.whole and attentions.serves(self.device, self.weight.dtype, *shape)
        self.pad.copy_(upload(on_host([self.slots - length for length in self.lengths]), self.device))
        self.row.copy_(upload(on_host([row.noise for row in rows]), self.device))
        self.bad.fill_(GOOD)

    def read(self) -> tuple[torch.Tensor, list[tuple[int, int] | None]]:
        """The canvas [B, S] on the host, and the block and step at which a row's logits first were NaN or infinite."""
        read = download(torch.cat((self.canvas, self.bad[:, None]), 1))  # in one wait for the device
        return read[:, :-1], [None if bad == GOOD else divmod(bad, 1 << 32) for bad in read[:, -1].tolist()]

    def take_over(self, other: "Engine", stayed: list[int]) -> None:
        """Go on with the rows ``stayed`` of a larger engine: its cache, the last slots of it."""
        if self.cache is not None and not self.options.refresh.full(1):
            index = other._doubled(upload(on_host(stayed), self.device))
            self.cache.take_over(other.cache, index, other.slots - self.slots, self.slots)

    def block(
        self,
        slot: torch.Tensor,  # [B] int64, on the host as all arguments are: the live block's first slot
        number: torch.Tensor,  # [B]: of the block, among the row's own
        planned: list[tuple[int, torch.Tensor]] | None,  # `Schedule.counts` of it
        fresh: torch.Tensor,  # [B] bool: rows whose first step is a full forward
        draft=None,  # called after each step
    ) -> None:
        """Fill one block of every row."""
        self.counts = [Counts() for _ in range(self.rows)]
        # A row shorter than a block has its block begin in the padding.
        self.firsts = [max(0, s - self.slots + n) for s, n in zip(slot.tolist(), self.lengths, strict=True)]
        self.prepare(slot, number)
        if planned is not None:
            plan = upload(torch.stack([count for _, count in planned]), self.device)  # [steps, B]
            steps = [step for step, _ in planned]
        else:
            steps = range(self.live + (self.options.block_length if self.options.remask else 0))
        # How far the longest suffix goes, which is what a prefix cache's evaluations depend on, and others do not.
        tail = self.slots - int(slot.min()) if self.options.cache == "prefix" else 0
        going = ~on_host(self.idle, torch.bool)  # [B]
        begun = torch.zeros_like(fresh)
        for n, step in enumerate(steps):
            self.step.fill_(step)
            if planned is not None:
                self.count.copy_(plan[n])
                going = planned[n][1] > 0
            begins = going & ~begun
            begun |= going
            if self.cache is None or not bool(begins.any()):
                self.take_step("full" if self.cache is None else "block", tail, going)
            else:
                self._first(going, begins, fresh, tail)
            if draft is not None:
                draft()
            if planned is None:
                going = download(self.more)  # the step's one read of the device
                if not bool(going.any()):
                    break

    def prepare(self, slot: torch.Tensor, number: torch.Tensor) -> None:
        """Begin block ``number`` [B] of each row at its ``slot`` [B], both on the host."""
        self.slot.copy_(upload(slot, self.device))
        self.number.copy_(upload(number, self.device))
        self.budget.fill_(self.options.block_length)
        self.then.zero_()
        self.more.fill_(True)

    # The kinds of step

    def _first(self, going: torch.Tensor, begins: torch.Tensor, fresh: torch.Tensor, tail: int) -> None:
        """A step at which rows begin a block, by a full forward where they are fresh, else by the refresh's window."""
        idle = on_host(self.idle, torch.bool)
        if bool((begins & fresh | idle).all()):
            self.take_step("full", tail, going)
        elif bool((begins & ~fresh | idle).all()) and not isinstance(self.options.refresh, Drift):
            self.take_step("window", tail, going)
        else:
            self.take_mixed_step(going, begins, fresh, tail)

    def take_step(self, kind: str, tail: int, going: torch.Tensor) -> None:
        self.graphs.run((kind, tail, self.whole and kind == "full"), functools.partial(self._step, kind, tail))
        self._tally(kind, going.nonzero()[:, 0].tolist())

    def _tally(self, kind: str, rows: list[int], share: float = 1.0) -> None:
        """Add an evaluation to those of ``rows``, through a ``share`` of the layers."""
        for row in rows:
            counts = self.counts[row]
            if kind == "full":
                counts.full += self.passes
            else:
                counts.block += self.passes
            counts.positions += self.passes * self._own(kind, row) * share

    def _own(self, kind: str, row: int) -> int:
        """How many positions of a row an evaluation goes over: those that it would go over alone."""
        length, first = self.lengths[row], self.firsts[row]
        if kind == "full":
            return length
        live = min(self.live, length)
        before, after = self.options.refresh.span(live) if kind == "window" else (0, 0)
        if self.options.cache == "prefix":
            return length - max(0, first - before)
        return min(before + live + after, length)

    def _reach(self, kind: str, tail: int) -> tuple[int, int]:
        """How far before the block an evaluation against the cache begins, and over how many slots it goes."""
        before, after = self.options.refresh.span(self.live) if kind == "window" else (0, 0)
        before = min(before, self.slots - self.live)
        if self.options.cache == "prefix":
            return before, before + tail
        return before, min(before + self.live + after, self.slots)

    def _step(self, kind: str, tail: int) -> None:
        """One evaluation of all rows, and what is kept of it."""
        # All rows go when they begin a block, and without a cache nothing of an evaluation is kept but its tokens.
        self._decide(self._evaluate(kind, tail, kept=self._going() if kind == "block" else None))

    def _going(self) -> torch.Tensor | None:
        """The rows that the step is one of, [B] bool; None: there is one row, which every step is one of."""
        if self.rows == 1:
            return None
        return self.more if self.options.schedule.rule else self.count > 0

    def take_mixed_step(self, going: torch.Tensor, begins: torch.Tensor, fresh: torch.Tensor, tail: int) -> None:
        """A step in which rows differ, [B] bool each: evaluated a group at a time, decided together."""
        rows, layers = self.rows, self.family.layers
        hidden = self.weight.new_zeros(rows * self.passes, self.live, self.weight.shape[1])
        first = torch.full_like(begins, layers, dtype=torch.int64)  # from which layer on the whole row is computed
        first[begins & fresh] = 0
        for kind, group in (("block", going & ~begins), ("window", begins & ~fresh)):
            if not bool(group.any()):
                continue
            index = self._doubled(upload(group.nonzero()[:, 0], self.device))
            drifts = kind == "window" and isinstance(self.options.refresh, Drift)
            old = self.cache.rows(index) if drifts else None
            hidden[index] = self._evaluate(kind, tail, index)
            self._tally(kind, group.nonzero()[:, 0].tolist())
            if drifts:
                first[group] = self._drifted(old, index, tail)
        for layer in first[first < layers].unique().tolist():
            whole = (first == layer).nonzero()[:, 0]
            index = self._doubled(upload(whole, self.device))
            hidden[index] = self._evaluate("full", tail, index, layer)
            self._tally("full", whole.tolist(), (layers - layer) / layers)
        self._decide(hidden)

    def _doubled(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat((rows, rows + self.rows)) if self.passes == 2 else rows

    def _drifted(self, old: BlockCache, index: torch.Tensor, tail: int) -> torch.Tensor:
        """Of each row, the first layer whose value vectors changed by more than tau, or the number of layers; [N]."""
        begin, length = self._begin("window", tail)
        at = begin.repeat(self.passes)[index][:, None] + torch.arange(length, device=self.device)  # [N, W]
        row = torch.arange(len(index), device=self.device)[:, None]
        seen = (at < self.slots) & (at >= self.pad.repeat(self.passes)[index][:, None])  # [N, W]
        layers = []
        for layer in range(self.family.layers):
            was = old.buffers[layer, 1][row, at].flatten(2).float()  # [N, W, G*D]
            change = self.cache.buffers[layer, 1][index[:, None], at].flatten(2).float() - was
            drift = change.norm(dim=2) / was.norm(dim=2).clamp(min=1e-12)
            layers.append((drift * seen).sum(1) / seen.sum(1))
        drift = torch.stack(layers).unflatten(1, (self.passes, -1)).amax(1)  # [L, rows]
        past = torch.cat((drift > self.options.refresh.tau, torch.ones_like(drift[:1], dtype=torch.bool)))
        return past.int().argmax(0).cpu()

    # Evaluation

    def _begin(self, kind: str, tail: int) -> tuple[torch.Tensor, int]:
        """First slot of an evaluation against the cache, [B], and its length."""
        before, length = self._reach(kind, tail)
        if kind == "block":
            return self.slot, length
        # Where a row begins, not where its padding does: a window that would reach beyond is moved to the right.
        begin = torch.maximum(self.slot - before, self.pad)
        if self.options.cache != "prefix":
            begin = begin.clamp(max=self.slots - length)
        return begin, length

    def _evaluate(
        self,
        kind: str,
        tail: int,
        index: torch.Tensor | None = None,
        first: int = 0,
        kept: torch.Tensor | None = None,  # [B] bool
    ) -> torch.Tensor:
        """What the LM head multiplies for the live block, [B*passes, T, d]; of the rows ``index`` alone, where given.

        A full evaluation goes over all slots; the others over `_reach` of them, against the cache, which takes in
        the rows ``kept``, by default all. Guidance's second half sees the prompt masked. From layer ``first`` on: from
        the cache's hidden states of that layer.
        """
        canvas, slot, end = self.canvas, self.slot, self.end
        start = None if self.whole and kind == "full" else self.start
        begin, length = (torch.zeros_like(slot), self.slots) if kind == "full" else self._begin(kind, tail)
        if self.passes == 2:
            canvas = torch.cat((canvas, canvas.masked_fill(~self.open, self.options.mask_id)))
            slot, begin, start, end, kept = (x if x is None else x.repeat(2) for x in (slot, begin, start, end, kept))
        cache = self.cache
        if index is not None:
            canvas, slot, begin, start, end = (x if x is None else x[index] for x in (canvas, slot, begin, start, end))
            cache = cache.rows(index)
        ids = canvas
        if kind != "full":
            at = begin[:, None] + torch.arange(length, device=self.device)
            ids = canvas.gather(1, at.clamp(max=self.slots - 1))
        rows = None
        if length != self.live:
            rows = (slot - begin)[:, None] + self.offsets
        with ops.counting(self.arrivals):
            hidden = self.family.hidden(ids, start, end, cache, None if cache is None else begin, rows, first, kept)
        if index is not None:
            self.cache.put(index, cache)
        return hidden

    def _decide(self, hidden: torch.Tensor) -> None:
        """Candidates from hidden states, the schedule's choice of them, and what is opened again."""
        o, family = self.options, self.family
        uncond = None
        if self.passes == 2:
            hidden, uncond = (x.flatten(0, 1) for x in hidden.chunk(2))
        else:
            hidden = hidden.flatten(0, 1)
        at = self.slot[:, None] + self.offsets  # [B, T]
        block, live = self.canvas.gather(1, at), self.open.gather(1, at)
        candidate = (block == o.mask_id) & live
        token, score, lse = ops.predict(
            hidden,
            *family.head_operands(),
            candidate=(candidate if o.remask is None else live).flatten(),
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
            impl=family.impl,
        )
        # lse - lse is 0, or NaN where lse is NaN or infinite; a position that is no candidate has lse 0.
        fine = (lse - lse == 0).view_as(at).all(1)
        self.bad.copy_(torch.minimum(self.bad, torch.where(fine, GOOD, (self.number << 32) + self.step)))
        token, score = token.view_as(at), score.view_as(at)
        commit = functools.partial(ops.commit, self.canvas, token, score, impl=family.impl)
        planned = not o.schedule.rule
        chosen = commit(candidate, self.slot, **({"count": self.count} if planned else o.schedule.rule))
        if o.remask is not None:
            current = torch.where(candidate, token, block)
            now = ops.token_probability(
                hidden, *family.head_operands(), token=current.flatten(), lse=lse, uncond=uncond,
                cfg_scale=o.cfg_scale, deferred=[i for i in o.defer_tokens if i not in o.suppress_tokens],
            ).view_as(at)  # fmt: skip
            if o.defer_tokens:  # a prediction that is held back takes no committed token's place
                now = now.masked_fill(candidate & (score == float("-inf")), 0.0)
            seen = Committed(live & ~candidate, now, self.then, candidate, chosen.sum(1))
            opened = self._reopen(seen, at, planned)
            if planned:
                chosen = chosen | commit(candidate & ~chosen, self.slot, count=opened)
            self.then.copy_(torch.where(chosen, now, self.then))
        self.more.copy_(((self.canvas.gather(1, at) == o.mask_id) & live).any(1))

    def _reopen(self, seen: Committed, at: torch.Tensor, planned: bool) -> torch.Tensor:
        """Mask the most urgent of the committed positions, within the bound that ends the block; how many, [B]."""
        urgency = self.options.remask.urgency(seen)  # [B, T]
        bound = seen.masked.sum(1) - seen.kept if planned else self.budget
        if (going := self._going()) is not None:
            bound = bound * going
        again = (urgency > STAYS) & (ranks(urgency) < bound[:, None])
        self.canvas.scatter_(1, at, self.canvas.gather(1, at).masked_fill(again, self.options.mask_id))
        opened = again.sum(1)
        if not planned:
            self.budget.sub_(opened)
        return opened
