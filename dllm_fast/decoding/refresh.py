"""When, and for which positions, stale keys and values are computed again.

A policy is asked at the first step of each block. A row's first block begins with a full forward under every policy;
the policies differ in later blocks. All of them compute the previous block again: its last tokens were committed after
its last forward, so its keys and values are still those of [MASK]s.
"""

from dataclasses import dataclass
from typing import ClassVar

from dllm_fast.decoding.values import Checked, checked, real, whole


class _Refresh(Checked):
    layerwise: ClassVar[bool] = False  # whether a full forward may begin at a layer whose values drifted

    def full(self, block: int) -> bool:
        """Whether a row's block of that number begins with a full forward."""
        return block == 0

    def span(self, block_length: int) -> tuple[int, int]:
        """Positions before and after the block that its first step computes if it is not a full forward."""
        return block_length, 0


@dataclass(frozen=True)
class Every(_Refresh):
    """A full forward at every ``blocks``-th block; the others begin with the previous block and their own.

    ``Every(1)`` is ``"block"``.
    """

    blocks: int = checked(whole)

    def full(self, block: int) -> bool:
        return block % self.blocks == 0


@dataclass(frozen=True)
class Window(_Refresh):
    """A block begins with itself, ``before`` positions before it and ``after`` positions after it; the far prefix
    and suffix stay as they were. ``before`` of at least a block length brings the previous block up to date."""

    before: int = checked(whole, 0)
    after: int = checked(whole, 0, default=0)

    def span(self, block_length: int) -> tuple[int, int]:
        return self.before, self.after


@dataclass(frozen=True)
class Drift(_Refresh):
    """A block begins with the previous block and itself, and the change of their value vectors decides.

    In each layer, ``d = mean_j ||v_j' - v_j|| / ||v_j||`` over those positions. From the first layer where d passes
    ``tau`` on, every position is computed again, from the hidden states that entered that layer when it was last
    computed; the layers below stay. (The layer-wise rule of Elastic-Cache, arXiv:2510.14973, with the values' drift
    in place of attention's.) Keeps the hidden states: as much memory again as half a cache without grouped heads.
    """

    tau: float = checked(real, "a number from 0 up", lambda number: number >= 0, default=0.2)
    layerwise: ClassVar[bool] = True


@dataclass(frozen=True)
class Exact(_Refresh):
    """Of a block-causal model, whose cache is exact: the first block begins with a full forward, and each other one
    with the block before it, whose tokens are final now. `Options.resolved` sets it; it is no choice."""


Refresh = Every | Window | Drift | Exact
