"""A step's forward: over consecutive slots of every row, or over some positions of some rows, packed.

Slots are positions, after a row's padding. Only with ``suffix_sample`` do the last slots that a row sees hold farther
positions: `place` says which.
"""

import torch

from dllm_fast import ops
from dllm_fast.decoding.decider import Decider
from dllm_fast.decoding.device import on_host, upload
from dllm_fast.decoding.live import Live, pack
from dllm_fast.decoding.options import Options
from dllm_fast.decoding.steps import Rows, Step
from dllm_fast.families.cache import BlockCache

ARRIVALS = 4096  # tiles of 128 output channels: as wide as a layer's linears get


class Forwards(Decider):
    """Which slots each row sees, the cache, and what the LM head multiplies."""

    def __init__(self, family, options: Options, rows: int, slots: int, spare: int, padded: bool):
        super().__init__(family, options, rows, slots)
        # Of each row, on the host.
        self.near = self.ends = on_host([slots] * rows)  # one past the last slot that is its position, and that it sees
        self.reached = self.near  # `near` of the block before
        # Without padding there is no range to pass, and attention takes its unmasked path.
        self.start = self.pad if padded else None
        # Where blocks are counted from, if not where a row begins.
        self.origin = torch.zeros_like(self.pad) if family.after_prompt else None
        self.unpadded = False  # no row is padded, and PyTorch's attention serves that: full steps then pass no range
        # Rows at different slots are computed to a common length; what overruns lands in the spare slots.
        self.end = torch.full_like(self.pad, slots) if spare or options.suffix_length is not None else None
        self.seen = torch.full_like(self.pad, slots)  # `reached`, on the device
        self.place = self.draws = None
        if options.suffix_sample:
            self.place = torch.zeros((rows, slots + options.suffix_sample), dtype=torch.int64, device=self.device)
            self.draws = torch.zeros((rows, slots), dtype=torch.float64, device=self.device)
        self.cache = None
        if options.has_cache:
            width = self.weight.shape[1] if options.refresh.layerwise else 0
            shape = (family.layers, rows * self.passes, slots + spare, family.kv_heads, family.head_dim)
            self.cache = BlockCache(*shape, self.weight.dtype, self.device, width, options.cache_dtype is not None)
        # What the few-row matmuls count in: a step has it to itself.
        kept = family.impl == "triton"
        self.arrivals = torch.zeros(ARRIVALS, dtype=torch.int32, device=self.device) if kept else None

    def load(self, rows: list) -> None:
        """Write where ``rows`` (`request.Row`) and their blocks begin, and what they draw from."""
        pad = on_host([row.pad(self.slots) for row in rows])
        self.pad.copy_(upload(pad, self.device))
        if self.origin is not None:
            self.origin.copy_(upload(pad + on_host([row.origin for row in rows]), self.device))
        if self.draws is not None:
            draws = torch.zeros(self.draws.shape, dtype=torch.float64, device="cpu")
            for b, row in enumerate(rows):
                if row.draws is not None:
                    draws[b, row.pad(self.slots) :] = row.draws
            self.draws.copy_(upload(draws, self.device))

    def look(self, slot: torch.Tensor) -> None:
        """Bound what each row sees from the block at ``slot`` [B] on, on the host."""
        if self.options.suffix_length is None:
            return
        self.reached = self.near
        self.near = (slot + self.block_size + self.options.suffix_length).clamp(max=self.slots)
        self.ends = (self.near + self.options.suffix_sample).clamp(max=self.slots)
        self.seen.copy_(upload(self.reached, self.device))
        self.end.copy_(upload(self.ends, self.device))
        if self.place is not None:
            self._sample(upload(self.near, self.device)[:, None])

    def _sample(self, near: torch.Tensor) -> None:
        """Put the sample of the positions from ``near`` [B, 1] on into the slots from there on.

        It is drawn without replacement, one twice as far half as likely: the largest of log(weight) + Gumbel noise.
        """
        at = torch.arange(self.slots, device=self.device).expand(self.rows, -1)
        weight = 1 / (at - near + 1).double()
        score = (weight.log() - (-self.draws.log()).log()).masked_fill(at < near, float("-inf"))
        best = score.topk(min(self.options.suffix_sample, self.slots), 1)
        found = best.indices.where(best.values > float("-inf"), self.slots - 1).sort(1).values
        self.place[:, : self.slots] = at
        self.place.scatter_(1, near + torch.arange(found.shape[1], device=self.device), found)

    def begin(self, step: Step, slot: torch.Tensor | None = None) -> torch.Tensor:
        """The first slot that a step computes for the block at ``slot``, by default the live one, [B]."""
        slot = self.slot if slot is None else slot
        if step.whole:
            return torch.zeros_like(slot)
        if not step.refreshes:
            return slot if not step.before else (slot - step.before).clamp(min=0)
        # Where a row begins, not where its padding does: a window that would reach beyond is moved to the right.
        begin = torch.maximum(slot - step.before, self.pad)
        return begin if self.options.runs_suffix else begin.clamp(max=self.slots - step.length)

    def hidden(self, step: Step) -> torch.Tensor:
        """What the LM head multiplies for the block after ``step``, which is not packed, [B*passes, T, d]. Guidance's
        second half sees the prompt masked."""
        # 1. The rows: twice with guidance.
        start = None if step.whole and self.unpadded else self.start
        kept = None if step.refreshes else self._going()
        rows = Rows(self.slot, self.begin(step), start, self.end, kept, self.origin)
        canvas = self.canvas
        if self.passes == 2:
            canvas = torch.cat((canvas, canvas.masked_fill(~self.open, self.options.mask_id)))
            rows = rows.repeat(2)
        # 2. The slots: which ids are computed, and which of them are the block.
        ids = canvas[:, : step.length]
        if not step.whole:
            at = rows.begin[:, None] + torch.arange(step.length, device=self.device)
            ids = canvas.gather(1, at.clamp(max=self.slots - 1))
        block = None if step.length == self.block_size else (rows.slot - rows.begin)[:, None] + self.offsets
        # 3. The forward, which writes to the cache. Without one the ids are the whole sequence.
        begin = rows.begin if self.cache is not None else None
        with ops.counting(self.arrivals):
            return self.family.hidden(
                ids, rows.start, rows.end, self.cache, begin, block, kept=rows.kept, origin=rows.origin
            )

    def find(self, step: Step, going: torch.Tensor | None) -> Live:
        """The positions that the packed ``step`` evaluates, of the rows ``going`` [B] bool; None: of all."""
        end = (torch.full_like(self.pad, self.slots) if self.end is None else self.end)[:, None]
        if step.refreshes:  # all or the window, and what is seen for the first time
            at = torch.arange(self.slots, device=self.device).expand(self.rows, -1)
            begin = self.begin(step)[:, None]
            inside = (at >= begin) & (at < begin + step.length)
            wanted = (inside | (at >= self.seen[:, None])) & (at >= self.pad[:, None]) & (at < end)
        else:
            at = self.begin(step)[:, None] + torch.arange(step.length, device=self.device)
            wanted = at < end
            if self.options.skip_committed:
                block = at[:, : self.block_size]
                masked = (self.canvas.gather(1, block) == self.options.mask_id) & self.open.gather(1, block)
                wanted = torch.cat((masked | self.fresh, wanted[:, self.block_size :]), 1)
            else:  # a row shorter than a block has it begin in the padding
                wanted = wanted & (at >= self.pad[:, None])
        if going is not None:
            wanted = wanted & going[:, None]
        offset = (at - self.slot[:, None]).repeat(self.passes, 1)  # in the block
        wanted, at = wanted.repeat(self.passes, 1), at.repeat(self.passes, 1)
        return pack(wanted, at, offset, self.block_size, step.packed, step.most, self.cache.buffers.shape[3])

    def packed_hidden(self, step: Step, live: Live, from_layer: int = 0) -> torch.Tensor:
        """What the LM head multiplies for the positions ``live``, [N, d]; of a step that begins a block, for the block
        alone, [B*passes, T, d], which means nothing where a row does not go.

        From layer ``from_layer`` on: from the cache's hidden states of that layer.
        """
        row = live.packed.row % self.rows
        source = live.slot.clamp(max=self.slots - 1)
        if self.place is not None:
            source = self.place[row, source]
        ids = self.canvas[row, source]
        if self.passes == 2:
            prompt = ~self.open[row, source] & (live.packed.row >= self.rows)
            ids = ids.masked_fill(prompt, self.options.mask_id)
        packed = live.packed._replace(position=source - self.pad[row])
        each = self.start, self.end, self.origin
        start, end, origin = (None if x is None else x.repeat(self.passes) for x in each)
        block = None
        if step.refreshes:
            block = live.at_places((self.rows * self.passes, self.block_size)).flatten().clamp(min=0)
        with ops.counting(self.arrivals):
            hidden = self.family.hidden(
                ids[:, None], start, end, self.cache, live.slot, block, from_layer, packed=packed, origin=origin
            )[:, 0]
        return hidden if block is None else hidden.unflatten(0, (-1, self.block_size))

    def window_values(self, step: Step) -> list[torch.Tensor]:
        """Of each layer, the values at the ``step``'s window of every row, [B*passes, W, G*D] fp32."""
        at = self.begin(step)[:, None] + torch.arange(step.length, device=self.device)
        return [self.cache.values(layer, at.repeat(self.passes, 1)) for layer in range(self.family.layers)]

    def drifted(self, step: Step, old: list[torch.Tensor]) -> torch.Tensor:
        """Of each row, the first layer whose value vectors changed by more than tau from the ``old`` ones of
        `window_values`, or the number of layers; [B] on the host."""
        at = self.begin(step)[:, None] + torch.arange(step.length, device=self.device)  # [B, W]
        # What a block sees for the first time has no old values.
        seen = ((at < self.seen[:, None]) & (at >= self.pad[:, None])).repeat(self.passes, 1)
        layers = []
        for was, new in zip(old, self.window_values(step), strict=True):
            drift = (new - was).norm(dim=2) / was.norm(dim=2).clamp(min=1e-12)
            layers.append((drift * seen).sum(1) / seen.sum(1).clamp(min=1))
        drift = torch.stack(layers).unflatten(1, (self.passes, -1)).amax(1)  # [L, B]
        past = torch.cat((drift > self.options.refresh.tau, torch.ones_like(drift[:1], dtype=torch.bool)))
        return past.int().argmax(0).cpu()
