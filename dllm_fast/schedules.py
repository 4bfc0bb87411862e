"""How many of a block's masked positions each step keeps.

A schedule is told how a run is cut (`check`), says how many steps a block takes where that is known beforehand
(`limit`), and gives each step's rule for `ops.commit` (`rule`). Which positions are kept is the confidence's business.
"""

import math
from dataclasses import dataclass

import torch


def _require(good: bool, message: str) -> None:
    if not good:
        raise ValueError(f"schedule: {message}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


@dataclass(frozen=True)
class Uniform:
    """``steps`` in all, shared equally by the blocks; of a block's n masked positions and s steps each step keeps
    ``n // s``, the first ``n % s`` steps one more (LLaDA, arXiv:2502.09992)."""

    steps: int

    def check(self, blocks: int, masked: int) -> None:
        """``blocks`` in the run, the fullest of which has ``masked`` positions to fill."""
        _require(_is_count(self.steps), f"Uniform: steps={self.steps!r} is not a positive whole number")
        _require(self.steps % blocks == 0, f"Uniform: steps={self.steps} is not a multiple of the {blocks} blocks")
        _require(
            self.steps // blocks <= masked,
            f"Uniform: steps={self.steps} over {blocks} blocks is more than the {masked} positions of a block",
        )

    def limit(self, masked: int, blocks: int) -> int | None:
        return min(self.steps // blocks, masked)

    def rule(self, step: int, masked: torch.Tensor, blocks: int) -> dict:
        share = self.steps // blocks
        return {"count": masked // share + (step < masked % share)}


@dataclass(frozen=True)
class Pyramid:
    """Step i of a block keeps ``i // factor + 1``, so few tokens while little is known and more as it fills: factor 1
    takes 8 steps for 32 positions. As many steps as the block needs."""

    factor: int = 1

    def check(self, blocks: int, masked: int) -> None:
        _require(_is_count(self.factor), f"Pyramid: factor={self.factor!r} is not a positive whole number")

    def limit(self, masked: int, blocks: int) -> int | None:
        step = kept = 0
        while kept < masked:
            kept += step // self.factor + 1
            step += 1
        return step

    def rule(self, step: int, masked: torch.Tensor, blocks: int) -> dict:
        return {"count": torch.full_like(masked, step // self.factor + 1)}


@dataclass(frozen=True)
class Threshold:
    """Every position whose confidence reaches ``threshold``, and always the best (Fast-dLLM, arXiv:2505.22618)."""

    threshold: float = 0.9

    def check(self, blocks: int, masked: int) -> None:
        _require(
            isinstance(self.threshold, int | float) and math.isfinite(self.threshold),
            f"Threshold: threshold={self.threshold!r} is not a finite number",
        )

    def limit(self, masked: int, blocks: int) -> int | None:
        return None

    def rule(self, step: int, masked: torch.Tensor, blocks: int) -> dict:
        return {"threshold": self.threshold}


@dataclass(frozen=True)
class Factor:
    """The largest k with ``(k + 1) (1 - c_k) < factor``, c sorted downwards, and always one (Fast-dLLM)."""

    factor: float = 1.0

    def check(self, blocks: int, masked: int) -> None:
        _require(
            isinstance(self.factor, int | float) and math.isfinite(self.factor) and self.factor > 0,
            f"Factor: factor={self.factor!r} is not a positive number",
        )

    def limit(self, masked: int, blocks: int) -> int | None:
        return None

    def rule(self, step: int, masked: torch.Tensor, blocks: int) -> dict:
        return {"factor": self.factor}


Schedule = Uniform | Pyramid | Threshold | Factor
