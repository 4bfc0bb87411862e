"""Draft graphs: which states that a block's next steps may reach are guessed.

What a step predicts orders the positions that stay masked after it by confidence: their ranks. A draft is a set of
ranks, those that are thought to be committed after so many more steps, with the tokens that were predicted for them. A
draft is of use only if each state on the way to it is a draft too, so drafts form a graph (Spiffy, arXiv:2509.18085).
"""

from dataclasses import dataclass
from typing import Any

from dllm_fast.decoding.values import is_whole, require

MOST = 63  # drafts of a forward
Ranks = tuple[int, ...]


@dataclass(frozen=True)
class DraftGraph:
    """Drafts, each (steps ahead, its ranks in ascending order, or None: those that come first, as many as the schedule
    will commit by then)."""

    drafts: tuple[tuple[int, Ranks | None], ...]

    def __post_init__(self) -> None:
        """Raises ValueError that names ``speculate`` and the draft."""
        require(len(self.drafts) <= MOST, f"speculate: {len(self.drafts)} drafts are more than {MOST}")
        ahead = [depth for depth, _ in self.drafts]
        for number, (depth, ranks) in enumerate(self.drafts):
            what = f"speculate: draft {number}, {(depth, ranks)}"
            good = ranks is None or (bool(ranks) and all(map(is_whole, ranks)) and sorted(set(ranks)) == list(ranks))
            require(is_whole(depth) and depth > 0 and good, f"{what}, is not (steps ahead, ascending ranks)")
            require(depth == 1 or depth - 1 in ahead, f"{what}: no draft is {depth - 1} steps ahead")

    @classmethod
    def chain(cls, length: int) -> "DraftGraph":
        """What the schedule would do if nothing that is masked were predicted anew."""
        return cls(tuple((depth, None) for depth in range(1, length + 1)))

    @property
    def depth(self) -> int:
        """How many steps ahead the farthest draft is."""
        return max((depth for depth, _ in self.drafts), default=0)


def as_graph(name: str, value: Any) -> DraftGraph | None:
    """An int, a `DraftGraph` or None as a graph; None for no drafts. Raises ValueError that names ``name``."""
    if isinstance(value, DraftGraph):
        return value if value.drafts else None
    wanted = f"{name}={value!r} is not a number of drafts from 0 to {MOST}, or a DraftGraph"
    require(value is None or (is_whole(value) and 0 <= value <= MOST), wanted)
    return DraftGraph.chain(int(value)) if value else None
