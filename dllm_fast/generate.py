"""The denoising loop.

The canvas holds prompt and [MASK]s, padded on the left so that every row's answer ends at the same slot. Blocks are
planned before the first evaluation: each row's next `block_length` positions from its first open [MASK] on. A step
evaluates the model, turns the block's masked positions into candidates, and commits the schedule's choice of them.
"""

import itertools
from dataclasses import dataclass

import torch

from dllm_fast import ops
from dllm_fast.cache import BlockCache
from dllm_fast.patch import bound_family
from dllm_fast.request import Request, rolled
from dllm_fast.schedules import Schedule, Threshold

# A block's steps are numbered from here times its index, so that a row's noise does not depend on how many steps its
# neighbours' earlier blocks took.
STEPS_PER_BLOCK = 1 << 16


@dataclass
class Output:
    """What `generate` returns.

    sequences: [B, P + gen_length] int64, the prompts as they were given, then the answers.
    nfe: model evaluations, a forward of the whole batch each; guidance takes two a step.
    nfe_full, nfe_block: those over the whole sequence, and those over the live part against a cache.
    """

    sequences: torch.Tensor
    nfe: int
    nfe_full: int
    nfe_block: int


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    input_ids: torch.Tensor,  # [B, P] int64
    attention_mask: torch.Tensor | None = None,  # [B, P], 0 = padding, on either side
    gen_length: int = 128,
    block_length: int = 32,
    schedule: Schedule = Threshold(0.9),
    confidence: str = "probability",
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    cache: str = "dual",
    refresh: str = "block",
    mask_id: int | None = None,
    eos_id: int | None = None,
    seed: int | None = None,
    streamer=None,
) -> Output:
    """Fill ``gen_length`` [MASK]s after each prompt, and any [MASK] inside the prompts, block by block.

    Args:
        model: a patched LLaDA or ModernBERT.
        input_ids: prompts; with ``gen_length=0`` only their own [MASK]s are filled.
        attention_mask: 0 on padding; each row's ones lie together.
        block_length: positions that are live together; divides ``gen_length``.
        schedule: how many candidates a step keeps: `Uniform`, `Pyramid`, `Threshold`, `Factor`.
        confidence: which are kept first: ``"probability"``, ``"margin"``, ``"entropy"`` (negative), ``"random"``.
        temperature: tokens are ``argmax(logits + temperature * Gumbel)``; 0 is greedy.
        cfg_scale: ``logits = uncond + (cfg_scale + 1) * (cond - uncond)``, uncond with its prompt masked.
        cache: ``"none"``: every step evaluates the whole sequence. ``"dual"``: a block's first step does, and stores
            all keys and values; the others evaluate the block against them. ``"prefix"``: the others evaluate the
            block and all that follows it.
        refresh: when stale keys and values are computed again; ``"block"``: at each block's first step.
        mask_id: default ``model.config.mask_token_id``.
        eos_id: once a finished block holds it, the row's remaining [MASK]s become it. None: every position is
            generated, as LLaDA's published sampler does.
        seed: of the noise, a pure function of (seed, step, row, position, token id). None draws one from torch's
            global generator.
        streamer: a transformers ``TextStreamer`` (or anything with ``put`` and ``end``), batch 1: whole blocks, in
            order. If it has ``put_draft``, it also gets the live block after each step.

    Returns:
        `Output`.

    Raises:
        ValueError: an argument that does not fit; it names the argument and the value, and nothing has run.
    """
    family = bound_family(model)
    request = Request(
        input_ids, attention_mask, gen_length, block_length, schedule, confidence, temperature, cfg_scale,
        cache, refresh, mask_id, eos_id, seed, streamer,
    )  # fmt: skip
    return _Run(family, request.check(model, family)).finish()


class _Run:
    """One call's canvas, cache and counts."""

    def __init__(self, family, request: Request):
        self.family, self.request = family, request
        self.canvas, self.open = request.canvas, request.open()  # [B, S]
        self.pad = request.pad  # [B]
        (batch, slots), device = self.canvas.shape, self.canvas.device
        self.device, self.live = device, min(request.block_length, slots)
        self.row = torch.arange(batch, device=device)
        # Without padding there is no range to pass, and attention takes its unmasked path.
        self.start = self.pad if bool(self.pad.any()) else None
        self.end = None
        self.passes = 2 if request.cfg_scale > 0 else 1
        self.nfe_full = self.nfe_block = 0
        self.shown = 0  # slots handed to the streamer
        self.cache = None
        if request.cache != "none":
            spare = 0
            if request.cache == "prefix":
                # Rows at different slots are evaluated to a common length; what overruns lands in spare slots.
                spare = max(int(slot.max() - slot.min()) for slot, _ in request.blocks)
                self.end = torch.full_like(self.row, slots) if spare else None
            shape = (family.layers, batch * self.passes, slots + spare, family.kv_heads, family.head_dim)
            self.cache = BlockCache(*shape, family.head()[0].dtype, device)

    def finish(self) -> Output:
        request = self.request
        if request.streamer is not None:
            self._stream()
        for index, (slot, masked) in enumerate(request.blocks):
            self._block(index, slot, masked)
            if request.eos_id is not None and self._stop_at_eos():
                break
            if request.streamer is not None:
                self._stream()
        if request.streamer is not None:
            self._stream()
            request.streamer.end()
        prompt = request.input_ids.shape[1]
        sequences = torch.cat((rolled(self.canvas[:, :prompt], -request.roll), self.canvas[:, prompt:]), 1)
        return Output(sequences, self.nfe_full + self.nfe_block, self.nfe_full, self.nfe_block)

    def _block(self, index: int, slot: torch.Tensor, masked: torch.Tensor) -> None:
        """Fill one block: of each row the slots from ``slot[b]`` on, ``masked[b]`` of them open."""
        request, family, schedule = self.request, self.family, self.request.schedule
        blocks, limit = len(request.blocks), schedule.limit(int(masked.max()), len(request.blocks))
        tail = self.canvas.shape[1] - int(slot.min())  # positions from the leftmost live slot to the end
        slot, masked = slot.to(self.device), masked.to(self.device)
        at = slot[:, None] + torch.arange(self.live, device=self.device)  # [B, T]
        for step in itertools.count() if limit is None else range(limit):
            candidate = (self.canvas.gather(1, at) == request.mask_id) & self.open.gather(1, at)
            if limit is None and not bool(candidate.any()):  # the step's one read of the device
                break
            hidden, uncond = self._evaluate(slot, at, tail, fresh=step == 0)
            token, score, _ = ops.predict(
                hidden,
                *family.head(),
                candidate=candidate.flatten(),
                mask_id=request.mask_id,
                confidence=request.confidence,
                temperature=request.temperature,
                seed=request.seed,
                step=index * STEPS_PER_BLOCK + step,
                row=self.row[:, None].expand_as(at).flatten(),
                position=(at - self.pad[:, None]).flatten(),
                uncond=uncond,
                cfg_scale=request.cfg_scale,
                impl=family.impl,
            )
            rule = schedule.rule(step, masked, blocks)
            ops.commit(self.canvas, token.view_as(at), score.view_as(at), candidate, slot, impl=family.impl, **rule)
            if hasattr(request.streamer, "put_draft"):
                self._draft(int(at[0, -1]) + 1)

    def _evaluate(
        self, slot: torch.Tensor, at: torch.Tensor, tail: int, fresh: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states [B*T, d] of the slots ``at`` [B, T], and the unconditional ones where there is guidance."""
        canvas, start, end = self.canvas, self.start, self.end
        if self.passes == 2:
            canvas = torch.cat((canvas, canvas.masked_fill(~self.open, self.request.mask_id)))
            slot, at = slot.repeat(2), at.repeat(2, 1)
            start, end = (x if x is None else x.repeat(2) for x in (start, end))
        if fresh or self.cache is None:
            begin = None if self.cache is None else torch.zeros_like(slot)
            hidden = self.family.hidden(canvas, start, end, self.cache, begin, rows=at)
            self.nfe_full += self.passes
        else:
            rows = None
            if self.request.cache == "prefix":
                rows = torch.arange(self.live, device=self.device).expand_as(at)
                at = slot[:, None] + torch.arange(tail, device=self.device)
            ids = canvas.gather(1, at.clamp(max=canvas.shape[1] - 1))
            hidden = self.family.hidden(ids, start, end, self.cache, slot, rows)
            self.nfe_block += self.passes
        hidden = hidden.flatten(0, 1)
        return hidden.chunk(2) if self.passes == 2 else (hidden, None)

    def _draft(self, end: int) -> None:
        draft = self.canvas[0, self.shown : max(end, self.shown)]
        self.request.streamer.put_draft(draft.cpu(), sequence=self.canvas[0, int(self.pad[0]) :].cpu())

    def _stop_at_eos(self) -> bool:
        """Fill what is left of rows whose answer ended; True when no row has anything left."""
        eos_id, mask_id = self.request.eos_id, self.request.mask_id
        ended = ((self.canvas == eos_id) & self.open).cumsum(1) > 0
        self.canvas = self.canvas.where(~(ended & self.open), eos_id)
        return not bool(((self.canvas == mask_id) & self.open).any())

    def _stream(self) -> None:
        """Hand over what is final: everything up to the first position still open."""
        left = ((self.canvas[0] == self.request.mask_id) & self.open[0]).nonzero()
        end = int(left[0]) if len(left) else self.canvas.shape[1]
        begin = max(self.shown, int(self.pad[0]))
        if end > begin:
            self.request.streamer.put(self.canvas[0, begin:end].cpu())
            self.shown = end
