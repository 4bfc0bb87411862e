"""What an engine is made for, and what a row's forwards are counted in."""

from dataclasses import dataclass

from dllm_fast.decoding.refresh import Refresh
from dllm_fast.decoding.remask import Remask
from dllm_fast.decoding.schedules import Schedule


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
    """A row's forwards: over whole sequences, over parts against a cache, and over how many positions in all."""

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
