"""What a step of a block computes, and what a row's forwards are counted in."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from dllm_fast.decoding.options import Options


@dataclass(frozen=True)
class Step:
    """Which slots of each row a step computes. Steps that are equal share a CUDA graph.

    length: how many.
    before: how many slots before the block they begin, but never before the row.
    whole: all that are seen, in a full forward; else these against the cache.
    refreshes: a block begins with it, and the cache takes in every row; else only the rows that go.
    packed: if above 0, only so many positions in all, of the rows that go: without padding, or only what can change.
    most: of these, one row's at most.
    states: settings of the block's tokens that are evaluated, see `speculation`.
    ahead: slots of the next block's window, evaluated beside them.
    """

    length: int
    before: int = 0
    whole: bool = False
    refreshes: bool = False
    packed: int = 0
    most: int = 0
    states: int = 1
    ahead: int = 0

    @property
    def kind(self) -> str:
        """Its field in `Steps`."""
        return "full" if self.whole else "window" if self.refreshes else "block"


class Steps(NamedTuple):
    """The steps that a block is made of."""

    full: Step
    window: Step  # a block's first, where the refresh asks for no full forward
    block: Step

    @classmethod
    def of(
        cls, options: Options, slots: int, first: int, last: int, multiple: int = 1, shifted: bool = False
    ) -> "Steps":
        """In an engine of ``slots``, for blocks that begin at slots from ``first`` to ``last``.

        A full forward ends at a multiple of ``multiple`` or at the last slot. Of a ``shifted`` model each step
        evaluates the position before the block too, which predicts its first token.
        """
        block = min(options.block_length, slots)
        left = min(int(shifted), slots - block)
        before, after = options.refresh.span(block)
        before = min(max(before, left), slots - block)
        whole, suffix = slots, slots - first - block  # after the first row's block
        if options.suffix_length is not None:
            reach = options.suffix_length + options.suffix_sample
            whole = min(slots, -(-(last + block + reach) // multiple) * multiple)
            suffix = min(suffix, reach)
            after = min(after, options.suffix_length)
        if options.runs_suffix:
            block += suffix
            window = before + block
        else:
            window = min(before + block + after, slots)
        full = Step(whole, whole=True, refreshes=True)
        again = Step(block + left, left) if options.has_cache else full
        return cls(full, Step(window, before, refreshes=True), replace(again, states=options.drafts + 1))


class Rows(NamedTuple):
    """What a forward is told of each row, [B] each; None: nothing."""

    slot: torch.Tensor  # the block's first
    begin: torch.Tensor  # the first that is computed
    start: torch.Tensor | None  # the first that is no padding
    end: torch.Tensor | None  # one past the last
    kept: torch.Tensor | None  # bool: whether the cache takes in what is computed
    origin: torch.Tensor | None  # where its blocks are counted from

    def repeat(self, times: int) -> "Rows":
        start, end, kept, origin = (None if x is None else x.repeat(times) for x in self[2:])
        return Rows(self.slot.repeat(times), self.begin.repeat(times), start, end, kept, origin)


@dataclass
class Counts:
    """A row's forwards: over whole sequences, over parts against a cache, and over how many positions in all. The
    schedule's steps, and the states that were evaluated for them."""

    full: int = 0
    block: int = 0
    positions: float = 0.0  # one that passes through half the layers counts a half
    steps: int = 0
    states: int = 0

    @property
    def nfe(self) -> int:
        return self.full + self.block

    def add(self, other: "Counts") -> None:
        self.full += other.full
        self.block += other.block
        self.positions += other.positions
        self.steps += other.steps
        self.states += other.states
