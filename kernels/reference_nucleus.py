"""Which tokens may be chosen: the ``top_k`` most probable, and of these the most probable up to ``top_p``.

z are a position's logits, -inf for what must not be chosen, and T > 0 is the temperature. Tokens are put in the order
of z, the largest first, equal ones by id, the lowest first. Of the first ``top_k`` of them, or of all V,

    p_i = e^(z_i / T) / sum_j e^(z_j / T)

and token i is kept if the p of those before it sum to less than ``top_p``. This is the smallest set of the most
probable tokens that reaches ``top_p``; the token that crosses it is in, so one is always kept (top-k,
arXiv:1805.04833; nucleus sampling, arXiv:1904.09751). transformers filters in this order too: the temperature, then
``top_k``, then ``top_p`` of what is left. There all tokens are kept that equal the last of the ``top_k``.

Sums are in fp64, so that their order, which depends on the device, decides nothing that shows. What a row keeps is a
function of its own logits.
"""

import torch
import torch.nn.functional as F

# Where a result costs no wait for a device, so many of the most probable tokens are tried before all are sorted. They
# mostly hold all that is kept, and sorting a whole vocabulary takes many times as long.
FEW = (1024, 16384)
_WORD = 0xFFFFFFFF


def filters(temperature: float, top_k: int, top_p: float) -> bool:
    """Whether only some of the tokens may be drawn."""
    return temperature > 0 and (top_k > 0 or top_p < 1)


def kept(
    logits: torch.Tensor,  # [N, V]: -inf for what must not be chosen
    temperature: float,
    top_k: int = 0,  # 0: all
    top_p: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of the tokens that are kept, and their ids, [N, K] each: in the order above, ties too.

    Where a row keeps fewer than K tokens, other ids follow, with logits of -inf. K is ``top_k``, or V, whatever the
    logits are. On a CPU, without ``top_k``, K is one of `FEW` where that holds all that is kept.
    """
    vocabulary = logits.shape[1]
    if top_k:
        widths = [min(top_k, vocabulary)]
    else:
        widths = [*(few for few in FEW if few < vocabulary and not logits.is_cuda), vocabulary]
    best = logits.amax(1, keepdim=True)
    mass = None if top_k else _weight(logits, best, temperature).sum(1, keepdim=True)
    for width in widths:
        z, ids = ordered(logits, width)
        if top_p == 1:
            break
        weight = _weight(z, best, temperature)
        before = F.pad(weight.cumsum(1), (1, 0))[:, :-1]
        keep = before < top_p * (weight.sum(1, keepdim=True) if mass is None else mass)
        z = z.masked_fill(~keep, float("-inf"))
        if width == widths[-1] or not bool(keep[:, -1].any()):  # what follows is not kept either
            break
    return z, ids


def _weight(logits: torch.Tensor, best: torch.Tensor, temperature: float) -> torch.Tensor:
    """e^((z - best) / T), fp64: fp32 has no temperature below 1e-45."""
    return torch.exp((logits - best).double() / temperature)


def ordered(logits: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``width`` largest of ``logits`` [N, V] and their ids: the largest first, equal ones by id, the lowest first;
    [N, width] each."""
    vocabulary = logits.shape[1]
    if width == vocabulary or logits.dtype == torch.float64:
        z, ids = torch.sort(logits, dim=1, descending=True, stable=True)
        return z[:, :width], ids[:, :width]
    # `topk` takes any of several equal numbers, so it is given numbers of which no two are equal: above, a logit's
    # bits, made to rise as logits do; below, its id, which counts downwards.
    bits = (logits.float() + 0.0).view(torch.int32)  # + 0.0 makes 0.0 of -0.0, which equals it
    rising = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    key = rising << 32 | (_WORD - torch.arange(vocabulary, device=logits.device))
    ids = _WORD - (key.topk(width, 1).values & _WORD)
    return logits.gather(1, ids), ids


def winner(scores: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The lowest of the ``ids`` [N, K] that have the largest score [N, K]; [N]. NaN equals nothing; then it is one of
    them."""
    largest = ids.amax(1, keepdim=True)
    return torch.where(scores == scores.amax(1, keepdim=True), ids, largest).amin(1)
