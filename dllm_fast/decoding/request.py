"""What `generate` is asked to fill: prompts checked, and each row's blocks planned, before any work."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from dllm_fast.decoding.options import Options
from dllm_fast.decoding.record import GIVEN, order_of
from dllm_fast.decoding.steps import Counts
from dllm_fast.decoding.values import require
from dllm_fast.families.rows import valid_spans
from dllm_fast.kernels import reference

# The step numbers under which a schedule's own draws are made, and those of `suffix_sample`; no step of a block has
# them.
PLAN_STEP, SAMPLE_STEP = (1 << 32) - 1, (1 << 32) - 2


@dataclass
class Row:
    """One sequence, without padding, on the host: its prompt, its [MASK]s, and the blocks that fill them."""

    index: int  # among the prompts
    seed: int  # of its noise
    noise: int  # the noise's row
    ids: torch.Tensor  # [L] int64, as it was read last
    open: torch.Tensor  # [L] bool: to be filled
    blocks: list[tuple[int, int]]  # (first position, how many are open from there on within a block length)
    mask_id: int
    length: int  # of the prompt and its answer; what is behind it fills up a block-causal model's last block
    draws: torch.Tensor | None = None  # [L] fp64 on (0, 1), for `suffix_sample`
    next: int = 0  # the block that comes next
    counts: Counts = field(default_factory=Counts)  # its forwards so far
    eos_ids: tuple[int, ...] = ()  # what ends its text
    pad_id: int | None = None  # what stands after the end; None: the id that ended it
    draft: Callable[[torch.Tensor, int], None] | None = None  # takes its ids [L] after each step, and its block's end
    error: str | None = None  # why it was stopped, if its logits are to blame
    # With a `pipeline`: how many blocks are live, from the next one on. Of the filled blocks before it that the cache
    # lacks, for how many steps the first has been there (see `MultiBlock`), and how many there are.
    ahead: int = 0
    waited: int = 0
    behind: int = 0
    origin: int = 0  # the position from which a block-causal model's blocks are counted
    logprobs: torch.Tensor | None = None  # [L] fp32, where they are asked for
    steps: torch.Tensor | None = None  # [L] int64, as `Record` numbers them

    def left(self) -> torch.Tensor:
        """Positions that are still to be filled, [L] bool."""
        return self.open & (self.ids == self.mask_id)

    @property
    def settled(self) -> int:
        """How many of its first positions are filled, and in blocks that are."""
        left = self.left().nonzero()[:, 0]
        end = int(left[0]) if len(left) else len(self.ids)
        return end if self.done or not self.ahead else min(end, self.blocks[self.next][0])

    @property
    def tokens(self) -> int:
        """How many tokens it was given: up to the end of its text, and that included."""
        text = self.ids[: self.length][self.open[: self.length]].tolist()
        return min(len(before_end(text, self.eos_ids)) + 1, len(text))

    def take(self, ids: torch.Tensor, eos_ids: tuple[int, ...], pad_id: int | None = None) -> None:
        """Take in the sequence ``ids`` [L] as far as it is filled, and stop at the end of the text.

        The text ends at the first of ``eos_ids``; what is open after it becomes ``pad_id``, or that id again.
        """
        self.ids = ids.clone()
        if not eos_ids:
            return
        eos = torch.tensor(eos_ids, dtype=torch.int64, device="cpu")
        ends = (torch.isin(self.ids, eos) & self.open)[: self.settled].nonzero()[:, 0]
        if len(ends):
            end = int(ends[0])
            after = torch.arange(len(self.ids), device="cpu") > end
            self.ids[after & self.open] = int(self.ids[end]) if pad_id is None else pad_id
            if self.steps is not None:
                self.logprobs[after], self.steps[after] = 0.0, GIVEN
            self.stop(self.error)

    def results(self) -> list[torch.Tensor]:
        """Its ids, and where they are asked for its log-probabilities and the order of its steps, [L] each."""
        return [self.ids] if self.steps is None else [self.ids, self.logprobs, order_of(self.steps)]

    def restart(self) -> None:
        """As it was before its first block."""
        self.ids = self.ids.masked_fill(self.open, self.mask_id)
        self.next, self.counts = 0, Counts()
        self.ahead, self.behind, self.waited = min(self.ahead, 1), 0, 0
        if self.steps is not None:
            self.logprobs.zero_()
            self.steps.fill_(GIVEN)

    def stop(self, error: str | None = None) -> None:
        """Fill no more of its blocks. Its seat is free at the next one."""
        self.next, self.error = len(self.blocks), error

    @property
    def done(self) -> bool:
        return self.next == len(self.blocks)

    def pad(self, slots: int) -> int:
        """The slot at which the row begins in an engine of ``slots``: it ends at the last."""
        return slots - len(self.ids)

    def slot(self, slots: int, block: int) -> int:
        """The slot at which a block begins there: 0 for one that would begin before the row, in a short row."""
        return max(0, self.pad(slots) + self.blocks[block][0])


def plan_row(
    options: Options,  # resolved
    family,
    index: int,
    prompt: torch.Tensor | list[int],  # [P] int64
    name: str = "input_ids",
    noise: int | None = None,
) -> Row:
    """The row of one prompt, and its blocks; its noise is row ``index``'s, or ``noise``'s.

    Raises ValueError naming ``name`` and the value.
    """
    ids = as_prompt(name, prompt)
    require(len(ids) > 0, f"{name}: an empty prompt")
    check_vocabulary(name, ids, family)
    asked = f"a prompt of {len(ids)} and gen_length={options.gen_length}"
    length = len(ids) + options.gen_length
    origin = len(ids) if family.after_prompt else 0
    slots = length if family.block is None else origin + -(-(length - origin) // family.block) * family.block
    require(slots <= family.positions, f"{name}: {asked} exceed the model's {family.positions} positions")
    cut = f"gen_length={options.gen_length} is not a multiple of block_length={options.block_length}"
    fits = family.block is not None or options.gen_length % options.block_length == 0
    require(options.pipeline is None or fits, f"{cut}, as pipeline={options.pipeline} needs")
    what = f"pipeline={options.pipeline}" if options.pipeline else "a model with config.block_causal_origin='prompt'"
    filled = options.pipeline is None and not family.after_prompt
    inside = f"{name}: a [MASK] inside a prompt, which {what} does not fill"
    require(filled or not bool((ids == options.mask_id).any()), inside)
    ids = torch.cat((ids, ids.new_full((slots - len(ids),), options.mask_id)))
    open_ = ids == options.mask_id
    blocks = plan_blocks(open_, options.block_length, None if family.block is None else origin)
    if blocks:
        options.schedule.check(len(blocks), max(masked for _, masked in blocks))
    noise = index if noise is None else noise
    draws = None
    if options.suffix_sample:
        at = torch.arange(len(ids), device="cpu")
        draws = reference.uniform(options.seed, SAMPLE_STEP, torch.full_like(at, noise), at)
    row = Row(
        index, options.seed, noise, ids, open_, blocks, options.mask_id, length, draws, eos_ids=options.eos_id,
        pad_id=options.pad_id, ahead=int(options.pipeline is not None), origin=origin,
    )  # fmt: skip
    if options.logprobs:
        row.logprobs = torch.zeros(len(ids), dtype=torch.float32, device="cpu")
        row.steps = torch.full((len(ids),), GIVEN, dtype=torch.int64, device="cpu")
    return row


def as_prompt(name: str, given: torch.Tensor | list[int]) -> torch.Tensor:
    """Ids [P] int64 on the host; there may be none. Raises ValueError naming ``name``."""
    ids = torch.as_tensor(given, device="cpu")
    require(ids.dim() == 1, f"{name}: shape {tuple(ids.shape)} is not [P]")
    require(ids.numel() == 0 or ids.dtype == torch.int64, f"{name}: dtype {ids.dtype} is not torch.int64")
    return ids.long()


def check_vocabulary(name: str, ids: torch.Tensor, family) -> None:
    """Raise ValueError naming ``name`` if one of ``ids`` [P], which holds some, is no id of the model's."""
    low, high = int(ids.min()), int(ids.max())
    wrong = low if low < 0 else high
    good = low >= 0 and high < family.vocab_size
    require(good, f"{name}: id {wrong} is outside the vocabulary of {family.vocab_size}")


def check_batch(ids, mask, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """First position and one past the last of each row's prompt, on the host. Raises ValueError."""
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


def check_suffix(options: Options, rows: list[Row]) -> None:
    """Raise ValueError for a ``suffix_length`` where no block has anything after it."""
    bounded = options.suffix_length is not None
    there = any(first + options.block_length < len(row.ids) for row in rows for first, _ in row.blocks)
    useless = f"suffix_length={options.suffix_length}: nothing follows the only block; gen_length={options.gen_length}"
    require(not bounded or there or all(row.done for row in rows), f"{useless}, block_length={options.block_length}")


def check_bidirectional(model: torch.nn.Module, function: str) -> None:
    """Raise ValueError if the model's config asks for blocks, which ``function`` does not have."""
    bidirectional = getattr(model.config, "block_causal", None) is None
    require(bidirectional, f"model: it is block-causal, and {function} is for bidirectional models")


def check_token_types(token_type_ids: torch.Tensor | None) -> None:
    """Raise ValueError if ``token_type_ids`` tell anything apart."""
    plain = token_type_ids is None or not torch.as_tensor(token_type_ids, device="cpu").any()
    require(plain, "token_type_ids: has values other than 0, and the model has no token types")


def plan_blocks(open_: torch.Tensor, block_length: int, origin: int | None = None) -> list[tuple[int, int]]:
    """Cover the open positions [L] with windows of ``block_length``, from left to right: (first, open in it) each.

    A window that would overrun the sequence starts earlier, and holds only what earlier windows left; in a sequence
    shorter than a block it starts before the sequence does. With an ``origin`` the L positions from there on are whole
    blocks, and windows are those that hold any.
    """
    if origin is not None:
        masked = open_[origin:].view(-1, block_length).sum(1).tolist()
        return [(origin + number * block_length, count) for number, count in enumerate(masked) if count]
    windows, covered = [], 0
    for i in open_.nonzero()[:, 0].tolist():
        if i >= covered:
            windows.append((min(i, len(open_) - block_length), int(open_[i : i + block_length].sum())))
            covered = i + block_length
    return windows


def before_end(ids: list[int], eos_ids: Sequence[int]) -> list[int]:
    """Ids up to the first of ``eos_ids``."""
    return ids[: next((at for at, i in enumerate(ids) if i in eos_ids), len(ids))]


def _describe(x: object) -> str:
    return f"{tuple(x.shape)} on {x.device}" if isinstance(x, torch.Tensor) else f"a {type(x).__name__}"
