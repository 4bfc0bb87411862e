"""Noise schedules of masked diffusion, and the process that they define.

At time t in [0, 1] a token is still itself with probability alpha(t), and [MASK] otherwise; once masked, it stays so:

    linear        1 - t                    LLaDA, arXiv:2502.09992
    cosine        cos(pi t / 2)            MDLM, arXiv:2406.07524
    loglinear     1 - (1 - 10^-3) t        SEDD, arXiv:2310.16834
    polynomial    1 - t^2                  MD4, arXiv:2406.04329

All functions are elementwise and keep the dtype of ``t``.
"""

import math

import torch

NOISES = ("linear", "cosine", "loglinear", "polynomial")
_LEFT = 1e-3  # of loglinear: what is still itself at t = 1
_POWER = 2  # of polynomial


def alpha(noise: str, t: torch.Tensor) -> torch.Tensor:
    """The probability that a token is still itself at time ``t``."""
    if noise == "cosine":
        return torch.cos(math.pi / 2 * t)
    if noise == "polynomial":
        return 1 - t**_POWER
    return 1 - t if noise == "linear" else 1 - (1 - _LEFT) * t


def slope(noise: str, t: torch.Tensor) -> torch.Tensor:
    """-alpha'(t), at least 0."""
    if noise == "cosine":
        return math.pi / 2 * torch.sin(math.pi / 2 * t)
    if noise == "polynomial":
        return _POWER * t ** (_POWER - 1)
    return torch.ones_like(t) if noise == "linear" else torch.full_like(t, 1 - _LEFT)


def masked_at(noise: str, t: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
    """Which positions are masked at time ``t``, bool: z_t of q(z_t | x).

    ``draw`` is uniform on [0, 1), one number a position. The same draws at several times give one path of the process.
    """
    return draw < 1 - alpha(noise, t)


def unmasked_by(noise: str, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The reverse posterior q(z_s | z_t, x) of a position that is masked at ``t``, for ``s`` < ``t``: the probability
    that it is x at ``s``, ``(alpha(s) - alpha(t)) / (1 - alpha(t))``. Else it is [MASK]. Any other position is x."""
    after = alpha(noise, t)
    return (alpha(noise, s) - after) / (1 - after)
