"""What `generate` is asked for: every argument checked, and the blocks planned, before any work."""

import math
from dataclasses import dataclass, field

import torch

from dllm_fast.families.rows import valid_spans
from dllm_fast.schedules import Schedule

CONFIDENCES = ("probability", "margin", "entropy", "random")
CACHES = ("none", "prefix", "dual")
REFRESHES = ("block",)


def require(good: bool, message: str) -> None:
    if not good:
        raise ValueError(message)


@dataclass
class Request:
    """The arguments of `generate`, and after `check` what follows from them."""

    input_ids: torch.Tensor  # [B, P] int64
    attention_mask: torch.Tensor | None  # [B, P]
    gen_length: int
    block_length: int
    schedule: Schedule
    confidence: str
    temperature: float
    cfg_scale: float
    cache: str
    refresh: str
    mask_id: int | None
    eos_id: int | None
    seed: int | None
    streamer: object | None
    pad: torch.Tensor = field(init=False)  # [B] int64: padding to the left of each row once it is rolled
    canvas: torch.Tensor = field(init=False)  # [B, P + gen_length]: rolled prompts, then [MASK]s
    roll: torch.Tensor = field(init=False)  # [B] int64: how far right each prompt moved, around its end
    blocks: list[tuple[torch.Tensor, torch.Tensor]] = field(init=False)  # (slot [B], open positions [B]), on the host

    def check(self, model: torch.nn.Module, family) -> "Request":
        """Check every argument and plan the run. Raises ValueError naming the argument and the value."""
        self._check_ids(model, family)
        self._check_numbers(model, family)
        self._lay_out(family)
        self.blocks = plan_blocks(self.open().cpu(), self.block_length)
        require(bool(self.blocks), "gen_length=0 and no [MASK] in input_ids: there is nothing to fill")
        self.schedule.check(len(self.blocks), max(int(masked.max()) for _, masked in self.blocks))
        if self.seed is None:
            self.seed = int(torch.randint(2**63 - 1, ()))
        return self

    def open(self) -> torch.Tensor:
        """Positions to fill, [B, P + gen_length] bool."""
        slots = torch.arange(self.canvas.shape[1], device=self.canvas.device)
        return (self.canvas == self.mask_id) & (slots >= self.pad[:, None])

    def _check_ids(self, model, family) -> None:
        ids = self.input_ids
        require(isinstance(ids, torch.Tensor), f"input_ids: a {type(ids).__name__} is not a tensor")
        require(ids.dtype == torch.int64, f"input_ids: dtype {ids.dtype} is not torch.int64")
        require(ids.dim() == 2, f"input_ids: shape {tuple(ids.shape)} is not [B, P]")
        require(ids.shape[0] > 0, f"input_ids: shape {tuple(ids.shape)} has no rows")
        require(ids.shape[1] > 0, f"input_ids: shape {tuple(ids.shape)} is an empty prompt")
        device = family.head()[0].device
        require(ids.device == device, f"input_ids: on {ids.device}, but the model is on {device}")
        low, high = int(ids.min()), int(ids.max())
        require(
            low >= 0 and high < family.vocab_size,
            f"input_ids: id {low if low < 0 else high} is outside the vocabulary of {family.vocab_size}",
        )
        for name, default in (("mask_id", "mask_token_id"), ("eos_id", None)):
            value = getattr(self, name)
            if value is None and default:
                value = getattr(model.config, default, None)
                require(value is not None, f"mask_id: None given, and model.config has no {default}")
                setattr(self, name, value)
            require(
                value is None or (_whole(value) and 0 <= value < family.vocab_size),
                f"{name}={value!r} is not an id of the vocabulary of {family.vocab_size}",
            )
        require(self.eos_id is None or self.eos_id != self.mask_id, f"eos_id={self.eos_id} is the mask id")

    def _check_numbers(self, model, family) -> None:
        gen, block, prompt = self.gen_length, self.block_length, self.input_ids.shape[1]
        require(_whole(gen) and gen >= 0, f"gen_length={gen!r} is not a whole number from 0 up")
        require(_whole(block) and block >= 1, f"block_length={block!r} is not a positive whole number")
        require(gen % block == 0, f"gen_length={gen} is not a multiple of block_length={block}")
        require(
            prompt + gen <= family.positions,
            f"input_ids: a prompt of {prompt} and gen_length={gen} exceed the model's {family.positions} positions",
        )
        require(isinstance(self.schedule, Schedule), f"schedule={self.schedule!r} is not a schedule of dllm_fast")
        for name, choices in (("confidence", CONFIDENCES), ("cache", CACHES), ("refresh", REFRESHES)):
            value = getattr(self, name)
            require(value in choices, f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")
        for name in ("temperature", "cfg_scale"):
            value = getattr(self, name)
            good = isinstance(value, int | float) and math.isfinite(value) and value >= 0
            require(good, f"{name}={value!r} is not a finite number from 0 up")
        require(self.seed is None or _whole(self.seed), f"seed={self.seed!r} is not a whole number")
        require(
            self.streamer is None or self.input_ids.shape[0] == 1,
            f"streamer: takes one row, and input_ids has {self.input_ids.shape[0]}",
        )

    def _lay_out(self, family) -> None:
        """Roll right-padded prompts to the right, so that every row's answer starts at slot P."""
        ids, mask = self.input_ids, self.attention_mask
        batch, prompt = ids.shape
        if mask is None:
            self.pad = self.roll = torch.zeros(batch, dtype=torch.int64, device=ids.device)
        else:
            require(
                isinstance(mask, torch.Tensor) and mask.shape == ids.shape and mask.device == ids.device,
                f"attention_mask: {_describe(mask)} does not match input_ids, {_describe(ids)}",
            )
            require(bool(((mask == 0) | (mask == 1)).all()), "attention_mask: has values other than 0 and 1")
            start, end, length = valid_spans(mask)
            require(bool((length > 0).all()), f"attention_mask: row {int(length.argmin())} is an empty prompt")
            holes = end - start != length
            require(not bool(holes.any()), f"attention_mask: row {int(holes.long().argmax())} has a hole")
            self.pad, self.roll = prompt - length, prompt - end
        tail = ids.new_full((batch, self.gen_length), self.mask_id)
        self.canvas = torch.cat((rolled(ids, self.roll), tail), 1)


def rolled(x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Row b of x [B, P] rolled right by ``shift[b]``."""
    at = (torch.arange(x.shape[1], device=x.device) - shift[:, None]) % x.shape[1]
    return x.gather(1, at)


def plan_blocks(open_: torch.Tensor, block_length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Cover each row's open positions [B, S] with windows of ``block_length`` slots, from left to right.

    Returns (slot [B], open positions in the window [B]) a block; a row that has fewer blocks than its neighbours
    idles at the end of the sequence with nothing open. A window that would overrun the sequence starts earlier, and
    holds only what earlier windows left.
    """
    slots = open_.shape[1]
    block_length = min(block_length, slots)
    rows = []
    for row in open_.tolist():
        windows, covered = [], 0
        for i, is_open in enumerate(row):
            if is_open and i >= covered:
                windows.append((min(i, slots - block_length), sum(row[i : i + block_length])))
                covered = i + block_length
        rows.append(windows)
    idle = (slots - block_length, 0)
    count = max(map(len, rows))
    return [
        tuple(torch.tensor(column) for column in zip(*(row[n] if n < len(row) else idle for row in rows), strict=True))
        for n in range(count)
    ]


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _describe(x: object) -> str:
    return f"{tuple(x.shape)} on {x.device}" if isinstance(x, torch.Tensor) else f"a {type(x).__name__}"
