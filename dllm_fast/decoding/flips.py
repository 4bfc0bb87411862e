"""The noise of flow language models at temperature 0: tokens that are flipped, in O(1) each.

With noise weight n and c = 1 - n, a token k of a vocabulary of V becomes the argmax of ``c onehot(k) + n g``, g [V]
standard normal. Only two things about g matter. The token stays if ``c + n g_k`` beats n times the largest of the other
V - 1 normals, whose distribution function is Phi(z)^(V - 1); and by symmetry the largest of them is equally likely to
be any. So with ``z = c / n + g_k``, one normal, and E, one exponential, in place of -ln of a uniform:

    flipped  <=>  E < -(V - 1) ln Phi(z)

Nothing is inverted, and ``ln Phi`` has full precision in both tails, so the law is exact for any V and n.
"""

import math

import torch

from dllm_fast.kernels import reference

# Columns of `reference.gumbel` past every vocabulary index, and before the counter of `reference.uniform`.
_COLUMNS = tuple(2 * (0xFFFFFFFF - 2) + i for i in range(4))


def flipped(
    tokens: torch.Tensor,  # [N] int64
    noise_weight: torch.Tensor,  # [N] float, from 0 to 1
    vocabulary: int,
    seed: int,
    step: int,
    row: torch.Tensor,  # [N] int
    position: torch.Tensor,  # [N] int
) -> torch.Tensor:
    """``argmax(c onehot(token) + n g)`` [N] int64 over a ``vocabulary`` of at least 2, on the device of ``tokens``.

    The noise is a function of (seed, step, row, position), independent of `reference.gumbel`'s under the same key.
    """
    columns = torch.tensor(_COLUMNS, dtype=torch.int64, device=tokens.device)
    draws = torch.exp(-reference.gumbel(seed, step, row, position, columns))  # [N, 4] fp64: standard exponentials
    normal = torch.sqrt(2 * draws[:, 0]) * torch.cos(2 * math.pi * torch.exp(-draws[:, 1]))  # Box and Muller
    n = noise_weight.double()
    threshold = -(vocabulary - 1) * torch.special.log_ndtr((1 - n) / n + normal)  # n = 0: ln Phi(inf) = 0, no flip
    other = (torch.exp(-draws[:, 3]) * (vocabulary - 1)).long().clamp(max=vocabulary - 2)  # [N], over all but k
    other = other + (other >= tokens)
    return torch.where(draws[:, 2] < threshold, other, tokens)
