"""Which positions of a training row are masked, and what their losses weigh.

The bound of a row's negative log-likelihood has two forms with the same value. Over time, with x the clean ids and z_t
the masked ones (MDLM, arXiv:2406.07524, eq. 10):

    integral over t of -alpha'(t) / (1 - alpha(t)) E sum over masked positions of -ln p(x_i | z_t)

And over the number l of masked positions, uniform on 1 to L (LLaDA, arXiv:2502.09992, eq. 6):

    E (L / l) sum over masked positions of -ln p(x_i | z)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dllm_fast.decoding.noise import NOISES, alpha, slope
from dllm_fast.decoding.values import Checked, checked, one_of

EPS = 1e-3  # LLaDA's lowest probability of masking
FORMS = ("time", "count")
WEIGHTINGS = ("elbo", "none")


def _ratio(name: str, value: tuple[float, float] | None) -> tuple[float, float] | None:
    if value is None:
        return None
    pair = isinstance(value, (tuple, list)) and len(value) == 2
    if not pair or not 0 <= value[0] <= value[1] <= 1 or value[1] == 0:
        raise ValueError(f"{name}={value!r} is not two numbers from 0 to 1, the smaller first")
    low, high = value
    return float(low), float(high)


def _weighting(name: str, value):
    return value if callable(value) else one_of(name, value, WEIGHTINGS)


@dataclass(frozen=True)
class Masking(Checked):
    """How rows are masked and weighed. The default is LLaDA's pre-training.

    noise: ``1 - alpha(t)`` of the positions are masked at time t, see `dllm_fast.decoding.noise`.
    ratio: the range into which that share is scaled; default (0.001, 1), as LLaDA's code has it, or (0, 1) to count.
    form: "time" masks each position by itself. "count" masks a fixed number of a row's positions, the share of them
        rounded up.
    weighting: "elbo" makes the loss the bound, in nats per position, if the ratio goes up to 1. "none" is the mean over
        masked positions; with "count" and linear noise both are that. Or a function of t [B] and the ratio [B], both
        fp64, whose result [B] multiplies the sum over masked positions divided by the number of positions.
    """

    noise: str = checked(one_of, NOISES, default="linear")
    ratio: tuple[float, float] | None = checked(_ratio, default=None)
    form: str = checked(one_of, FORMS, default="time")
    weighting: str | Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = checked(_weighting, default="elbo")

    def ratios(self, t: torch.Tensor) -> torch.Tensor:
        """The share of positions to mask at times ``t`` [B] fp64, [B] fp64."""
        low, high = self.ratio or (EPS if self.form == "time" else 0.0, 1.0)
        return (high - low) * (1 - alpha(self.noise, t)) + low

    def masked(
        self,
        ratio: torch.Tensor,  # [B] fp64
        open_: torch.Tensor,  # [B, L] bool: what may be masked
        draw: torch.Tensor,  # [B, L] fp32, uniform on [0, 1)
    ) -> torch.Tensor:
        """The masked positions, [B, L] bool."""
        if self.form == "time":
            return open_ & (draw < ratio.float()[:, None])
        number = torch.ceil(ratio * open_.sum(1)).clamp(min=1)
        rank = draw.masked_fill(~open_, math.inf).argsort(dim=1, stable=True).argsort(dim=1)
        return open_ & (rank < number[:, None])

    def weights(
        self,
        t: torch.Tensor,  # [B] fp64
        ratio: torch.Tensor,  # [B] fp64
        open_: torch.Tensor,  # [B, L] bool
        masked: torch.Tensor,  # [B, L] bool
    ) -> torch.Tensor:
        """What a row's summed negative log-likelihood is multiplied by, [B] fp32; 0 where nothing is masked."""
        positions = open_.sum(1).clamp(min=1)
        number = masked.sum(1)
        if callable(self.weighting):
            weight = (self.weighting(t, ratio) / positions).float()
        elif self.weighting == "none":
            weight = 1 / number.float()
        elif self.form == "count":  # the slope makes a share that is not uniform count as one that is
            weight = slope(self.noise, t).float() / number.float()
        else:
            weight = slope(self.noise, t).float() / (ratio.float() * positions)
        return weight.where(number > 0, 0)  # at t = 0 it is infinite, and infinity times no loss would be NaN
