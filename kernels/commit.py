"""A schedule's choice among the candidates of each row, written into the sequence in place.

A candidate's rank is how many candidates of its row go before it: those of higher confidence, and those of the same
at a lower position; NaN goes last. With ranks 0, 1, ... the row keeps those below k:

    count       k = count[b]
    threshold   k = how many reach it
    factor      k = the largest r + 1 with (r + 2) (1 - c_r) < factor, c_r the confidence of rank r

at least one and at most all. Counting comparisons, T^2 of them, needs no sort, no scratch and no word from the host;
for the blocks of up to 1024 positions that this is for, one program a row does it in microseconds.
"""

import torch
import triton
import triton.language as tl

from dllm_fast.kernels.gumbel import INTEGERS, check_tensors

MAX_POSITIONS = 8192  # the tile of comparisons is as tall as the block is long
COMPARISONS = 8192  # of a tile
RULES = ("count", "threshold", "factor")


@triton.jit
def _commit_kernel(
    chosen_ptr,  # [B, T] bool
    sequence_ptr,  # [B, S] int64, rows sequence_stride apart
    token_ptr,  # [B, T] int64
    confidence_ptr,  # [B, T] fp32
    candidate_ptr,  # [B, T] bool
    slot_ptr,  # [B] int
    count_ptr,  # [B] int, for the rule "count"
    limit,  # fp32, for the others
    T,
    S,
    sequence_stride,
    RULE: tl.constexpr,
    BT: tl.constexpr,  # at least T
    BJ: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, BT)  # [BT]
    candidate = tl.load(candidate_ptr + b * T + t, mask=t < T, other=0) != 0  # [BT]
    confidence = tl.load(confidence_ptr + b * T + t, mask=t < T, other=0.0)  # [BT]
    # NaN compares false with everything and would share a rank; the order is total with it apart, below -inf.
    number = tl.abs(confidence) <= float("inf")
    rank = tl.zeros([BT], tl.int32)
    for start in range(0, T, BJ):
        j = start + tl.arange(0, BJ)  # [BJ]
        rival = tl.load(candidate_ptr + b * T + j, mask=j < T, other=0) != 0  # [BJ]
        other = tl.load(confidence_ptr + b * T + j, mask=j < T, other=0.0)  # [BJ]
        real = tl.abs(other) <= float("inf")
        above = (other[None, :] > confidence[:, None]) | (real[None, :] & ~number[:, None])  # [BT, BJ]
        level = (other[None, :] == confidence[:, None]) | ~(real[None, :] | number[:, None])
        before = above | (level & (j[None, :] < t[:, None]))
        rank += tl.sum((before & rival[None, :]).to(tl.int32), 1)
    if RULE == "count":
        k = tl.minimum(tl.load(count_ptr + b), T).to(tl.int32)
    elif RULE == "threshold":
        k = tl.sum((candidate & (confidence >= limit)).to(tl.int32), 0)
    else:
        enough = candidate & ((rank + 2).to(tl.float32) * (1.0 - confidence) < limit)
        k = tl.max(tl.where(enough, rank + 1, 0), 0)
    chosen = candidate & (rank < tl.maximum(k, 1))
    at = tl.load(slot_ptr + b).to(tl.int64) + t  # [BT]
    token = tl.load(token_ptr + b * T + t, mask=chosen, other=0)  # [BT]
    tl.store(sequence_ptr + b * sequence_stride + at, token, mask=chosen & (at >= 0) & (at < S))
    tl.store(chosen_ptr + b * T + t, chosen, mask=t < T)


@torch.library.custom_op("dllm_fast::commit", mutates_args=("sequence",))
def _commit(
    sequence: torch.Tensor,
    token: torch.Tensor,
    confidence: torch.Tensor,
    candidate: torch.Tensor,
    slot: torch.Tensor,
    count: torch.Tensor | None,
    rule: str,
    limit: float,
) -> torch.Tensor:
    batch, positions = token.shape
    chosen = torch.empty(batch, positions, dtype=torch.bool, device=token.device)
    if chosen.numel():
        tall = triton.next_power_of_2(positions)
        with torch.cuda.device_of(token):
            _commit_kernel[(batch,)](
                chosen, sequence, token, confidence, candidate, slot, count, limit,
                positions, sequence.shape[1], sequence.stride(0),
                RULE=rule, BT=tall, BJ=max(1, min(tall, COMPARISONS // tall)), num_warps=8 if tall > 128 else 4,
            )  # fmt: skip
    return chosen


@_commit.register_fake
def _(sequence, token, *args):
    return torch.empty_like(token, dtype=torch.bool)


def commit(
    sequence: torch.Tensor,  # [B, S] int64, written in place
    token: torch.Tensor,  # [B, T] int64
    confidence: torch.Tensor,  # [B, T] fp32
    candidate: torch.Tensor,  # [B, T] bool
    slot: torch.Tensor,  # [B] int
    *,
    count: torch.Tensor | None = None,  # [B] int
    threshold: float | None = None,
    factor: float | None = None,
) -> torch.Tensor:
    """`reference.commit`: the chosen candidates [B, T] bool, now in ``sequence``. Writes nothing outside [0, S)."""
    rules = [name for name, value in zip(RULES, (count, threshold, factor), strict=True) if value is not None]
    if len(rules) != 1:
        raise ValueError(f"exactly one of {', '.join(RULES)} must be given, not {rules}")
    if token.dim() != 2 or token.shape[1] > MAX_POSITIONS:
        raise ValueError(f"token is {list(token.shape)}; expected [B, T] with T <= {MAX_POSITIONS}")
    batch, positions = token.shape
    check_tensors(
        sequence.device,
        token=(token, [batch, positions], (torch.int64,)),
        confidence=(confidence, [batch, positions], (torch.float32,)),
        candidate=(candidate, [batch, positions], (torch.bool,)),
        slot=(slot, [batch], INTEGERS),
        count=(count, [batch], INTEGERS),
    )
    if sequence.dim() != 2 or sequence.shape[0] != batch or sequence.dtype != torch.int64 or sequence.stride(1) != 1:
        raise ValueError(
            f"sequence is {sequence.dtype} {list(sequence.shape)} with strides {sequence.stride()}; expected int64 "
            f"[{batch}, S] with neighbouring positions neighbours in memory"
        )
    limit = 0.0 if count is not None else float(threshold if threshold is not None else factor)
    return _commit(sequence, token, confidence, candidate, slot, count, rules[0], limit)
