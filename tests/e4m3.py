"""e4m3 by its definition, in fp64, and a check of what claims to be rounded to it."""

import torch

E4M3 = torch.float8_e4m3fn
EVERY = torch.arange(256, dtype=torch.uint8).view(E4M3)  # every number; 127 and 255 are NaN


def nearest(x: torch.Tensor) -> torch.Tensor:
    """The e4m3 number that is nearest to each, ties to even, in fp64; NaN for NaN.

    There are three bits after the first, the largest number is 448, and below 2^-6 numbers are 2^-9 apart. Numbers go
    through fp32, as in PyTorch's cast of fp64.
    """
    x = x.float().double().clamp(-448, 448)
    step = torch.ldexp(torch.ones_like(x), x.abs().frexp().exponent.clamp(min=-5) - 4)
    return (x / step).round() * step


def hard_cases() -> torch.Tensor:
    """Every number, what lies halfway between two, and next to that; numbers beyond 448; NaN. fp32."""
    numbers = EVERY.float()
    numbers = numbers[numbers.isfinite()].unique()
    ties = (numbers[1:] + numbers[:-1]) / 2
    beside = [ties.nextafter(torch.tensor(end)) for end in (1e9, -1e9)]
    edges = [464.0, 480.0, 1e30, torch.inf, torch.nan, 1e-40, 2.0**-10, 0.0]
    edges = torch.tensor([*edges, *(-x for x in edges)])
    return torch.cat((numbers, ties, *beside, edges))


def assert_nearest(found: torch.Tensor, truth: torch.Tensor, slack: float = 0.0) -> None:
    """Each of ``found``, e4m3, is the `nearest` of some number within ``slack`` of the fp64 ``truth``."""
    assert found.dtype == E4M3 and found.shape == truth.shape
    wide = found.double()
    between = (nearest(truth - slack) <= wide) & (wide <= nearest(truth + slack))
    assert (between | (truth.isnan() & wide.isnan())).all()
