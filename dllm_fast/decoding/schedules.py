"""How many of a block's masked positions each step commits.

A schedule either knows beforehand how many each step of a block commits (`counts`), or has a rule on the step's
confidences, one of `ops.commit`'s (`rule`). The confidence decides which positions. A schedule that is defined with a
confidence of its own names it (`confidence`), and the caller's is ignored.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from dllm_fast.decoding.noise import NOISES, alpha
from dllm_fast.decoding.values import Checked, checked, finite, one_of, real, require, whole

FINEST = 2**20  # times of an ancestral grid in one block: 8 MB a row, and far more than any block has positions


@dataclass(frozen=True)
class _Schedule(Checked):
    confidence: ClassVar[str | None] = None

    @property
    def rule(self) -> dict[str, float]:
        """`reference.commit`'s keyword argument, if the model's confidences decide; else empty."""
        return {}

    def ranked_by(self, score: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """What a step commits the highest of: the confidences ``score`` [..., T] of a block's positions ``offsets``
        [T], -inf where there is none."""
        return score

    def check(self, blocks: int, masked: int) -> None:
        """Raises ValueError if it cannot plan a row of ``blocks``, the fullest with ``masked`` positions to fill."""

    def check_confidence(self, confidence: str) -> None:
        """Raises ValueError if the schedule's values make no sense for this ``confidence``."""

    def counts(
        self,
        masked: torch.Tensor,  # [B] int64, on the host: positions to fill in this block
        blocks: torch.Tensor,  # [B] int64: blocks of each row's run
        draw: Callable[[], torch.Tensor],  # [B, T] fp64: uniform noise of the block's positions, 2 where none is open
    ) -> list[tuple[int, torch.Tensor]] | None:
        """(step's number, positions kept [B]) of each step that keeps any; None: `rule` decides."""
        return None


def _check_share(schedule: "Uniform | Ancestral", blocks: int, most: int, limit: str) -> None:
    """Raise ValueError unless each of ``blocks`` has the same whole number of steps, and at most ``most``."""
    name = f"schedule: {type(schedule).__name__}: steps={schedule.steps}"
    require(schedule.steps % blocks == 0, f"{name} is not a multiple of the {blocks} blocks")
    require(schedule.steps // blocks <= most, f"{name} over {blocks} blocks is more than {limit}")


@dataclass(frozen=True)
class Uniform(_Schedule):
    """``steps`` in all, shared equally by the blocks; of a block's n masked positions and s steps each step commits
    ``n // s``, the first ``n % s`` steps one more (LLaDA, arXiv:2502.09992)."""

    steps: int = checked(whole)

    def check(self, blocks: int, masked: int) -> None:
        _check_share(self, blocks, masked, f"the {masked} positions of a block")

    def counts(self, masked, blocks, draw):
        share = self.steps // blocks  # [B]
        steps = range(int(torch.minimum(share, masked).max()))
        return [(step, (masked // share + (step < masked % share)) * (step < share)) for step in steps]


@dataclass(frozen=True)
class Pyramid(_Schedule):
    """Step i of a block commits ``i // factor + 1``: few tokens at first, more as the block fills: factor 1
    takes 8 steps for 32 positions. As many steps as the block needs."""

    factor: int = checked(whole, default=1)

    def counts(self, masked, blocks, draw):
        found: list[tuple[int, torch.Tensor]] = []
        kept = 0
        while kept < int(masked.max()):
            step = len(found)
            found.append((step, (masked - kept).clamp(0, step // self.factor + 1)))
            kept += step // self.factor + 1
        return found


@dataclass(frozen=True)
class Static(_Schedule):
    """Each step commits ``tokens`` positions, a block's last step those that are left. (SDAR's
    ``low_confidence_static``, with ``tokens`` times ``denoising_steps`` a block length.)"""

    tokens: int = checked(whole, default=1)

    def counts(self, masked, blocks, draw):
        steps = range(-(-int(masked.max()) // self.tokens))
        return [(step, (masked - step * self.tokens).clamp(0, self.tokens)) for step in steps]


@dataclass(frozen=True)
class Sequential(Static):
    """From left to right, ``tokens`` positions a step (SDAR's ``sequential``)."""

    confidence: ClassVar[str | None] = "probability"  # which is not looked at

    def ranked_by(self, score, offsets):
        return torch.where(score > float("-inf"), -offsets.to(score.dtype), score)


@dataclass(frozen=True)
class FirstHitting(_Schedule):
    """One position at a time, at the times at which the reverse process hits them (arXiv:2409.02908).

    The times order the positions uniformly at random and enter a time-agnostic model no further, so a step commits one
    masked position drawn at random. At temperature 1 that samples the masked-diffusion process exactly.
    """

    confidence: ClassVar[str | None] = "random"

    def counts(self, masked, blocks, draw):
        return [(step, (step < masked).long()) for step in range(int(masked.max()))]


@dataclass(frozen=True)
class Ancestral(_Schedule):
    """The reverse posterior on a grid (MDLM, arXiv:2406.07524): from time t to s every masked position is kept with
    probability ``(alpha_s - alpha_t) / (1 - alpha_t)``, by itself; at temperature 1.

    ``steps`` in all, shared equally by the blocks, each block's times going from 1 to 0. ``noise``: "linear", "cosine",
    "loglinear" or "polynomial", see `dllm_fast.decoding.noise`. The draws do not depend
    on the model, so they are made first, and grid steps that keep nothing in any row are not evaluated.
    """

    steps: int = checked(whole)
    noise: str = checked(one_of, NOISES, default="linear")
    confidence: ClassVar[str | None] = "random"

    def check(self, blocks: int, masked: int) -> None:
        _check_share(self, blocks, FINEST, f"{FINEST} in one block")

    def counts(self, masked, blocks, draw):
        share = (self.steps // blocks)[:, None]  # [B, 1]
        grid = torch.arange(1, int(share.max()) + 1, dtype=torch.float64, device=share.device)
        time = 1 - grid / share  # [B, n]: each step's end
        begin = alpha(self.noise, torch.ones((), dtype=torch.float64, device=share.device))
        # The product of (1 - alpha_s) / (1 - alpha_t) over a position's steps telescopes into the share still masked.
        reached = (alpha(self.noise, time.clamp(min=0)) - begin) / (1 - begin)
        reached[time <= 0] = 1.0  # cos(0) and the division leave it within rounding of 1
        hit = torch.searchsorted(reached, draw())  # [B, T]: each position's step; a draw of 2 is in none
        found = [(step, (hit == step).sum(1)) for step in range(reached.shape[1])]
        return [(step, count) for step, count in found if bool(count.any())]


@dataclass(frozen=True)
class Threshold(_Schedule):
    """Every position whose confidence reaches ``threshold``, and always the best (Fast-dLLM, arXiv:2505.22618).

    At most 1, which no confidence exceeds, and not 0, which any reaches. Below 0 it is for ``confidence="entropy"``,
    the negative entropy in nats: -0.5, say.
    """

    threshold: float = checked(
        real,
        "a number above 0 and up to 1, or for confidence='entropy' a finite one below 0",
        lambda number: number <= 1 and number != 0 and math.isfinite(number),
        default=0.9,
    )

    def check_confidence(self, confidence: str) -> None:
        wrong = f"Threshold: threshold={self.threshold} is below every confidence={confidence!r}, which begin at 0"
        require(self.threshold > 0 or confidence == "entropy", f"schedule: {wrong}")

    @property
    def rule(self) -> dict:
        return {"threshold": self.threshold}


@dataclass(frozen=True)
class Dynamic(Threshold):
    """`Threshold`, and never fewer than ``tokens`` positions, the best (SDAR's ``low_confidence_dynamic`` and LLaDA2's
    sampler, with ``tokens`` times their steps a block length)."""

    tokens: int = checked(whole, default=1)

    @property
    def rule(self) -> dict:
        return {"threshold": self.threshold, "least": self.tokens}


@dataclass(frozen=True)
class Factor(_Schedule):
    """The largest k with ``(k + 1) (1 - c_k) < factor``, c sorted downwards, and always one (Fast-dLLM)."""

    factor: float = checked(real, "a positive finite number", lambda number: 0 < number < math.inf, default=1.0)

    @property
    def rule(self) -> dict:
        return {"factor": self.factor}


@dataclass(frozen=True)
class EntropyBound(_Schedule):
    """The most certain positions whose entropies, without the largest, sum to at most ``gamma`` nats
    (EB-Sampler, arXiv:2505.24857): a bound on how far sampling them at once is from one after the other."""

    gamma: float = checked(finite, default=0.1)
    confidence: ClassVar[str | None] = "entropy"

    @property
    def rule(self) -> dict:
        return {"bound": self.gamma}


Schedule = (
    Uniform | Pyramid | Static | Sequential | FirstHitting | Ancestral | Threshold | Dynamic | Factor | EntropyBound
)
