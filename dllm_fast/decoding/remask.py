"""Self-correction: which committed tokens of the current block a step masks again.

After a step has committed what its schedule says, a policy gives each committed token an urgency, from the probability
that the step's forward gives it. The engine masks the most urgent again, within a bound:

- a schedule with counts masks at most as many as the step leaves masked, and commits as many others in the same step.
  So the block ends after its planned number of steps, with no [MASK] left;
- under Threshold, Factor and EntropyBound a row masks at most ``block_length`` positions a block again. Each step
  commits at least one, so a block of n positions ends within n + block_length steps.

The model sees the token that is verified: no second, masked copy of the block is evaluated.

`Edit` masks nothing again. It replaces committed tokens by others, and goes on when none is masked.
"""

from dataclasses import dataclass

import torch

from dllm_fast.decoding.values import Checked, checked, share, whole

STAYS = float("-inf")


def ranks(score: torch.Tensor) -> torch.Tensor:
    """Each position's place in its row, [B, T], from the highest score on; ties to the lowest position."""
    return score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


@dataclass
class Committed:
    """What a policy sees of a block after the step's commit; each [B, T] but the last."""

    before: torch.Tensor  # bool: committed before this step
    now: torch.Tensor  # fp32: probability of the position's token, for a masked position of the one predicted
    committed_probability: torch.Tensor  # fp32: of a committed token, when it was committed
    masked: torch.Tensor  # bool: masked at the step's beginning
    kept: torch.Tensor  # [B] int64: how many of those the step kept


@dataclass(frozen=True)
class ReMDM(Checked):
    """A share of the committed tokens, those whose probability fell most since they were committed
    (ReMDM, arXiv:2503.00307, the rescaled schedule): ``round(eta sigma n)`` of n committed ones, with
    ``sigma = min(1, (1 - alpha_s) / alpha_t)`` and alpha the share of the block that is filled before and after."""

    eta: float = checked(share, default=0.1)

    def urgency(self, block: Committed) -> torch.Tensor:
        filled = block.before.sum(1)  # [B]
        left = block.masked.sum(1) - block.kept
        share = self.eta * (left.float() / filled.clamp(min=1)).clamp(max=1) * filled
        fell = (block.committed_probability - block.now).where(block.before, STAYS)  # [B, T]
        rank = ranks(fell)
        return fell.where((fell > 0) & (rank < (share + 0.5).floor()[:, None]), STAYS)


@dataclass(frozen=True)
class Verify(Checked):
    """Every committed token whose probability is below ``threshold``: draft with a low `Threshold`, verify with a
    higher one (WINO, arXiv:2507.18578, which evaluates a second, masked copy of the block instead)."""

    threshold: float = checked(share, default=0.7)

    def urgency(self, block: Committed) -> torch.Tensor:
        return (-block.now).where(block.before & (block.now < self.threshold), STAYS)


@dataclass(frozen=True)
class P2(Checked):
    """Path planning with the model as its own planner (P2, arXiv:2502.03540): of all positions of the block, as many
    as are filled after the step stay, those with the highest score: the log-probability of a masked position's
    prediction, and ``eta`` times that of a committed token. ``eta=0`` masks nothing again."""

    eta: float = checked(share, default=1.0)

    def urgency(self, block: Committed) -> torch.Tensor:
        score = block.now.clamp(min=1e-30).log()  # [B, T]
        score = torch.where(block.before, self.eta * score, score)
        score = score.where(block.before | block.masked, STAYS)
        rank = ranks(score)
        stay = rank < (block.before.sum(1) + block.kept)[:, None]
        return (-score).where(block.before & ~stay, STAYS)


@dataclass(frozen=True)
class Edit(Checked):
    """A committed token is replaced by what the step predicts in its place, where that is another one and its
    confidence reaches ``threshold`` (LLaDA2.1, arXiv:2602.08676). When no position of the block is masked, steps go on
    until one replaces nothing, but no more than ``rounds`` of them."""

    threshold: float = checked(share, default=0.5)
    rounds: int = checked(whole, 0, default=16)


Remask = ReMDM | Verify | P2 | Edit
