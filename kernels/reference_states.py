"""Attention of several states of each row's live slots: they share its other keys and values, and each has its own.

Speculation evaluates guesses of a block's next tokens beside the block. A state's L slots stand for the row's L slots
from ``hole`` on. Its keys and values lie in buffers of their own, a state's after those of the state before it.
"""

import torch

from dllm_fast.kernels import reference


def visible(
    slots: int,  # S
    own: int,  # slots of a row's states together
    start: torch.Tensor,  # [B]: first valid slot
    end: torch.Tensor,  # [B]: one past the last
    slot: torch.Tensor,  # [B, T]: where each query's keys and values lie in the states' buffers
    window: int | None,
    hole: torch.Tensor,  # [B]
    length: int,  # L
) -> torch.Tensor:
    """Which slots each query sees, [B, T, S + own] bool: the row's outside the hole, then its own state's."""
    j = torch.arange(slots, device=slot.device)
    k = torch.arange(own, device=slot.device)
    place = torch.cat((j.expand(len(hole), -1), hole[:, None] + k % length), 1)  # [B, S + own]: what each stands for
    outside = (j < hole[:, None]) | (j >= hole[:, None] + length)  # [B, S]
    mine = k // length == (slot // length)[..., None]  # [B, T, own]
    seen = torch.cat((outside[:, None].expand(-1, slot.shape[1], -1), mine), 2)
    seen = seen & ((place >= start[:, None]) & (place < end[:, None]))[:, None]
    if window is not None:
        query = hole[:, None] + slot % length  # [B, T]
        seen = seen & ((query[..., None] - place[:, None]).abs() <= window)
    return seen


def attention(
    q: torch.Tensor,  # [N, 1, H, D]
    keys: torch.Tensor,  # [B, S, G, D]
    values: torch.Tensor,  # [B, S, G, D]
    start: torch.Tensor,  # [B]
    end: torch.Tensor,  # [B]
    slot: torch.Tensor,  # [N]: in the states' buffers
    window: int | None,
    first: torch.Tensor,  # [B + 1]: where each row's queries begin
    hole: torch.Tensor,  # [B]
    length: int,
    own_keys: torch.Tensor,  # [B, K, G, D], for K / L states
    own_values: torch.Tensor,  # [B, K, G, D]
) -> torch.Tensor:
    """`reference.attention` of packed queries, each of which sees what `visible` says."""
    row = reference.row_of(first, len(q))
    seen = visible(
        keys.shape[1], own_keys.shape[1], start[row], end[row], slot[:, None], window, hole[row], length
    )  # [N, 1, S + K]
    group = q.shape[2] // keys.shape[2]
    wide_k, wide_v = (
        torch.cat([reference.widened(x) for x in pair], 1)[row].repeat_interleave(group, 2)
        for pair in ((keys, own_keys), (values, own_values))
    )
    score = torch.einsum("nthd,nshd->nhts", reference.widened(q), wide_k) * q.shape[-1] ** -0.5
    weight = torch.softmax(score.masked_fill(~seen[:, None], float("-inf")), -1)
    weight = weight.masked_fill(~seen.any(-1)[:, None, :, None], 0.0)
    return torch.einsum("nhts,nshd->nthd", weight, wide_v).to(q.dtype)
