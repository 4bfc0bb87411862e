"""Counter-based noise: the definitions. Every draw is a function of its counter and key alone."""

import functools

import torch

_WORD = 0xFFFFFFFF


def philox(seed, c0, c1, c2, c3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011): four 32-bit words, as int64, of a 128-bit counter under a 64-bit key.

    Counters are int64 tensors of 32-bit values, and the key an int or an int64 tensor, that broadcast. The same
    function as ``tl.philox``.
    """
    counter = (c0, c1, c2, c3)
    # Plain numbers become tensors on the device of the others, or they could not be broadcast together.
    device = next((c.device for c in counter if isinstance(c, torch.Tensor) and c.dim()), torch.device("cpu"))
    # By a fill on the device: a CUDA graph cannot record a copy from the host.
    full = functools.partial(torch.full, (), dtype=torch.int64, device=device)
    as_int = functools.partial(torch.as_tensor, dtype=torch.int64, device=device)
    c0, c1, c2, c3 = torch.broadcast_tensors(
        *((as_int(c) if isinstance(c, torch.Tensor) else full(c)) & _WORD for c in counter)
    )
    key0, key1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        # The int64 products wrap, which keeps all 64 bits; masking undoes the arithmetic shift.
        a = c0 * 0xD2511F53
        b = c2 * 0xCD9E8D57
        c0, c2 = ((b >> 32) & _WORD) ^ c1 ^ key0, ((a >> 32) & _WORD) ^ c3 ^ key1
        c1, c3 = b & _WORD, a & _WORD
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def gumbel(
    seed: int | torch.Tensor,  # int, or [1] or [N] int64
    step: int | torch.Tensor,  # int, or [1] or [N] int64
    row: torch.Tensor,  # [N] int
    position: torch.Tensor,  # [N] int
    columns: torch.Tensor,  # [V] or [N, V] int: vocabulary indices
) -> torch.Tensor:
    """Standard Gumbel noise [N, V] fp64, a pure function of (seed, step, row, position, vocabulary index).

    ``G = -ln(-ln U)`` with ``U = (X + 1/2) / 2^64`` and X 64 bits of Philox, counter (index // 2, position, row,
    step): words 0 and 1 for an even index, 2 and 3 for an odd one. Above one half ``-ln U`` is taken as
    ``-log1p(-(1 - U))`` with 1 - U from the complemented bits, so that both tails are exact: G reaches 45.05, where
    24-bit uniforms stop at 16.6 and lower the effective temperature (arXiv:2409.02908).
    """
    seed, step = (x.reshape(-1, 1) if isinstance(x, torch.Tensor) else x for x in (seed, step))
    words = philox(seed, columns // 2, position[:, None], row[:, None], step)
    odd = (columns % 2).bool()
    high = torch.where(odd, words[2], words[0])
    low = torch.where(odd, words[3], words[1])
    upper = high >= 1 << 31
    high = torch.where(upper, _WORD - high, high)
    low = torch.where(upper, _WORD - low, low)
    small = (high.double() + (low.double() + 0.5) * 2.0**-32) * 2.0**-32  # min(U, 1 - U)
    exponential = torch.where(upper, -torch.log1p(-small), -torch.log(small))
    return -torch.log(exponential)


def uniform(
    seed: int | torch.Tensor,  # int, or [1] or [N] int64
    step: int | torch.Tensor,  # int, or [1] or [N] int64
    row: torch.Tensor,  # [N] int
    position: torch.Tensor,  # [N] int
) -> torch.Tensor:
    """Uniform noise on (0, 1), [N] fp64: ``(word 0 + 1/2) / 2^32`` at counter (2^32 - 1, position, row, step).

    No vocabulary index has that counter, so the draw is independent of the Gumbel noise of the same key.
    """
    return (philox(seed, _WORD, position, row, step)[0].double() + 0.5) * 2.0**-32
