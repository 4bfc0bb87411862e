"""What `generate` is asked for: every argument checked, and each row's blocks planned, before any work."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from dllm_fast.decoding.options import Counts, Options
from dllm_fast.decoding.refresh import Every, Refresh
from dllm_fast.decoding.remask import Remask
from dllm_fast.decoding.schedules import Schedule
from dllm_fast.families.rows import valid_spans
from dllm_fast.kernels.checks import CONFIDENCES

CACHES = ("none", "prefix", "dual")
REFRESHES = ("block",)


def require(good: bool, message: str) -> None:
    if not good:
        raise ValueError(message)


@dataclass
class Row:
    """One sequence, without padding, on the host: its prompt, its [MASK]s, and the blocks that fill them."""

    index: int  # among the prompts
    noise: int  # the noise's row
    ids: torch.Tensor  # [L] int64, as it was read last
    open: torch.Tensor  # [L] bool: to be filled
    blocks: list[tuple[int, int]]  # (first position, how many are open from there on within a block length)
    mask_id: int
    next: int = 0  # the block that comes next
    counts: Counts = field(default_factory=Counts)  # its forwards so far

    def left(self) -> torch.Tensor:
        """Positions that are still to be filled, [L] bool."""
        return self.open & (self.ids == self.mask_id)

    def take(self, ids: torch.Tensor, eos_ids: tuple[int, ...], pad_id: int | None = None) -> None:
        """Take in the sequence ``ids`` [L] as far as it is filled, and stop at the end of the text.

        The text ends at the first of ``eos_ids``; what is open after it becomes ``pad_id``, or that id again.
        """
        self.ids = ids.clone()
        eos = torch.tensor(eos_ids, dtype=torch.int64, device="cpu")
        ends = (torch.isin(self.ids, eos) & self.open).nonzero()[:, 0]
        if len(ends):
            end = int(ends[0])
            after = torch.arange(len(self.ids), device="cpu") > end
            self.ids[after & self.open] = int(self.ids[end]) if pad_id is None else pad_id
            self.next = len(self.blocks)

    @property
    def done(self) -> bool:
        return self.next == len(self.blocks)


@dataclass
class Request:
    """The options of `generate`, which hold for every prompt. `check` comes first."""

    gen_length: int
    block_length: int
    schedule: Schedule
    confidence: str
    temperature: float
    cfg_scale: float
    cache: str
    refresh: str | Refresh
    remask: Remask | None
    mask_id: int | None
    eos_id: int | list[int] | tuple[int, ...] | None
    seed: int | None
    pad_id: int | None = None
    suppress_tokens: int | list[int] | tuple[int, ...] | None = None
    defer_tokens: int | list[int] | tuple[int, ...] | None = None
    short_block: bool = False  # the last block may be shorter than the others
    options: Options = field(init=False)
    eos_ids: tuple[int, ...] = field(init=False)

    def check(self, model: torch.nn.Module, family) -> "Request":
        """Check everything but the prompts. Raises ValueError naming the argument and the value."""
        self._check_ids(model, family)
        self._check_numbers()
        refresh = Every(1) if self.refresh == "block" else self.refresh
        self.options = Options(
            self.block_length, self.schedule, self.confidence, float(self.temperature), float(self.cfg_scale),
            self.cache, refresh, self.remask, self.mask_id, self.suppress_tokens, self.defer_tokens,
        )  # fmt: skip
        if self.seed is None:
            self.seed = int(torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu"))
        return self

    def row(self, index: int, ids: torch.Tensor, family, name: str = "input_ids", noise: int | None = None) -> Row:
        """The row of one prompt [P] on the host, and its plan; its noise is row ``index``'s, or ``noise``'s.

        Raises ValueError naming ``name`` and the value.
        """
        require(len(ids) > 0, f"{name}: an empty prompt")
        low, high = int(ids.min()), int(ids.max())
        require(
            low >= 0 and high < family.vocab_size,
            f"{name}: id {low if low < 0 else high} is outside the vocabulary of {family.vocab_size}",
        )
        require(
            len(ids) + self.gen_length <= family.positions,
            f"{name}: a prompt of {len(ids)} and gen_length={self.gen_length} exceed the model's {family.positions} "
            "positions",
        )
        ids = torch.cat((ids, ids.new_full((self.gen_length,), self.mask_id)))
        open_ = ids == self.mask_id
        blocks = plan_blocks(open_, self.block_length)
        if blocks:
            self.schedule.check(len(blocks), max(masked for _, masked in blocks))
        return Row(index, index if noise is None else noise, ids, open_, blocks, self.mask_id)

    def _check_ids(self, model, family) -> None:
        if self.mask_id is None:
            self.mask_id = getattr(model.config, "mask_token_id", None)
            require(self.mask_id is not None, "mask_id: None given, and model.config has no mask_token_id")
        require_id("mask_id", self.mask_id, family.vocab_size)
        self.eos_ids = as_ids("eos_id", self.eos_id, family.vocab_size)
        require(self.mask_id not in self.eos_ids, f"eos_id={self.eos_id}: the mask id, {self.mask_id}, ends no text")
        if self.pad_id is not None:
            require_id("pad_id", self.pad_id, family.vocab_size)
            require(self.pad_id != self.mask_id, f"pad_id={self.pad_id} is the mask id")
        for name in ("suppress_tokens", "defer_tokens"):
            setattr(self, name, tuple(sorted(set(as_ids(name, getattr(self, name), family.vocab_size)))))
        left = family.vocab_size - len({self.mask_id, *self.suppress_tokens})
        require(left > 0, f"suppress_tokens: leaves no token of the vocabulary of {family.vocab_size} to choose")

    def _check_numbers(self) -> None:
        gen, block = self.gen_length, self.block_length
        require(_whole(gen) and gen >= 0, f"gen_length={gen!r} is not a whole number from 0 up")
        require(_whole(block) and block >= 1, f"block_length={block!r} is not a positive whole number")
        require(self.short_block or gen % block == 0, f"gen_length={gen} is not a multiple of block_length={block}")
        require(isinstance(self.schedule, Schedule), f"schedule={self.schedule!r} is not a schedule of dllm_fast")
        for name, choices in (("confidence", CONFIDENCES), ("cache", CACHES)):
            value = getattr(self, name)
            require(value in choices, f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")
        self.schedule.check_confidence(self.confidence)
        if isinstance(self.refresh, Refresh):
            require(self.cache != "none", f"refresh={self.refresh!r}: there is nothing to refresh with cache='none'")
        else:
            known = f"{', '.join(map(repr, REFRESHES))}, Every, Window, Drift"
            require(self.refresh in REFRESHES, f"refresh={self.refresh!r} is not one of {known}")
        if self.remask is not None:
            require(isinstance(self.remask, Remask), f"remask={self.remask!r} is not one of ReMDM, Verify, P2")
        for name in ("temperature", "cfg_scale"):
            value = getattr(self, name)
            good = isinstance(value, int | float) and math.isfinite(value) and value >= 0
            require(good, f"{name}={value!r} is not a finite number from 0 up")
        good = self.seed is None or (_whole(self.seed) and 0 <= self.seed < 2**63)
        require(good, f"seed={self.seed!r} is not a whole number from 0 to 2^63 - 1")


def check_batch(input_ids, attention_mask, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """First position and one past the last of each row's prompt, on the host. Raises ValueError."""
    ids, mask = input_ids, attention_mask
    require(isinstance(ids, torch.Tensor), f"input_ids: a {type(ids).__name__} is not a tensor")
    require(ids.dtype == torch.int64, f"input_ids: dtype {ids.dtype} is not torch.int64")
    require(ids.dim() == 2, f"input_ids: shape {tuple(ids.shape)} is not [B, P]")
    require(ids.shape[0] > 0, f"input_ids: shape {tuple(ids.shape)} has no rows")
    require(ids.shape[1] > 0, f"input_ids: shape {tuple(ids.shape)} is an empty prompt")
    require(ids.device == device, f"input_ids: on {ids.device}, but the model is on {device}")
    if mask is None:
        zero = torch.zeros(len(ids), dtype=torch.int64, device="cpu")
        return zero, zero + ids.shape[1]
    require(
        isinstance(mask, torch.Tensor) and mask.shape == ids.shape and mask.device == ids.device,
        f"attention_mask: {_describe(mask)} does not match input_ids, {_describe(ids)}",
    )
    require(bool(((mask == 0) | (mask == 1)).all()), "attention_mask: has values other than 0 and 1")
    start, end, length = (x.cpu() for x in valid_spans(mask))
    require(bool((length > 0).all()), f"attention_mask: row {int(length.argmin())} is an empty prompt")
    holes = end - start != length
    require(not bool(holes.any()), f"attention_mask: row {int(holes.long().argmax())} has a hole")
    return start, end


def check_token_types(token_type_ids: torch.Tensor | None) -> None:
    """Raise ValueError if ``token_type_ids`` tell anything apart."""
    plain = token_type_ids is None or not torch.as_tensor(token_type_ids, device="cpu").any()
    require(plain, "token_type_ids: has values other than 0, and the model has no token types")


def plan_blocks(open_: torch.Tensor, block_length: int) -> list[tuple[int, int]]:
    """Cover the open positions [L] with windows of ``block_length``, from left to right: (first, open in it) each.

    A window that would overrun the sequence starts earlier, and holds only what earlier windows left; in a sequence
    shorter than a block it starts before the sequence does.
    """
    windows, covered = [], 0
    for i in open_.nonzero()[:, 0].tolist():
        if i >= covered:
            windows.append((min(i, len(open_) - block_length), int(open_[i : i + block_length].sum())))
            covered = i + block_length
    return windows


def before_end(ids: list[int], eos_ids: Sequence[int]) -> list[int]:
    """Ids up to the first of ``eos_ids``."""
    return ids[: next((at for at, i in enumerate(ids) if i in eos_ids), len(ids))]


def require_id(name: str, value: object, vocab_size: int) -> None:
    """Raise ValueError unless ``value`` is an id."""
    known = _whole(value) and 0 <= value < vocab_size
    require(known, f"{name}={value!r} is not an id of the vocabulary of {vocab_size}")


def as_ids(name: str, value: int | list[int] | tuple[int, ...] | None, vocab_size: int) -> tuple[int, ...]:
    """An id, several or None as a tuple of ids. Raises ValueError that names ``name`` and the value."""
    several = isinstance(value, list | tuple)
    ids = tuple(value) if several else () if value is None else (value,)
    for number, item in enumerate(ids):
        require_id(f"{name}[{number}]" if several else name, item, vocab_size)
    return ids


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _describe(x: object) -> str:
    return f"{tuple(x.shape)} on {x.device}" if isinstance(x, torch.Tensor) else f"a {type(x).__name__}"
