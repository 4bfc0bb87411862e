"""A schedule's choice among the candidates of each row, written into the sequence in place.

A candidate's rank is the number of candidates of its row that go before it: those with a higher confidence, and those
with the same confidence at a lower position. A confidence that is not finite counts as -inf. The row keeps the
candidates of ranks 0 to k - 1:

    count       k = count[b]
    threshold   k = the number of candidates that reach it
    factor      k = the largest r + 1 with (r + 2) (1 - c_r) < factor, c_r the confidence of rank r
    bound       k = the largest r + 1 with -(c_0 + ... + c_{r-1}) <= bound, c the negative entropy

All rules but ``count`` keep at least ``least``. Ranks come from T^2 comparisons: that needs no sort, no scratch memory
and no value from the host, and the same comparisons sum the entropies for ``bound``. One program a row takes
microseconds for blocks of up to 1024 positions.
"""

import torch
import triton
import triton.language as tl

from dllm_fast.kernels.checks import INTEGERS, check_tensors, one_device

MAX_POSITIONS = 8192  # a tile of comparisons has a row for every position
COMPARISONS = 4096  # in a tile; twice as many spill for 1,024 positions
RULES = ("count", "threshold", "factor", "bound")


@triton.jit
def _load_confidence(confidence_ptr, mask):
    confidence = tl.load(confidence_ptr, mask=mask, other=0.0)
    return tl.where(tl.abs(confidence) < float("inf"), confidence, float("-inf"))


@triton.jit(do_not_specialize=["S", "sequence_stride", "least"])
def _commit_kernel(
    chosen_ptr,  # [B, T] bool
    sequence_ptr,  # [B, S] int64, rows sequence_stride apart
    token_ptr,  # [B, T] int64
    confidence_ptr,  # [B, T] fp32
    candidate_ptr,  # [B, T] bool
    slot_ptr,  # [B] int
    count_ptr,  # [B] int, for the rule "count"
    limit,  # fp32, for the other rules
    least,  # for them too
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
    confidence = _load_confidence(confidence_ptr + b * T + t, t < T)  # [BT]
    rank = tl.zeros([BT], tl.int32)
    entropy = tl.zeros([BT], tl.float32)  # of the candidates that go before
    # 1. Ranks: every candidate against every other.
    for start in range(0, T, BJ):
        j = start + tl.arange(0, BJ)  # [BJ]
        rival = tl.load(candidate_ptr + b * T + j, mask=j < T, other=0) != 0  # [BJ]
        other = _load_confidence(confidence_ptr + b * T + j, j < T)  # [BJ]
        tied = (other[None, :] == confidence[:, None]) & (j[None, :] < t[:, None])  # [BT, BJ]
        before = rival[None, :] & ((other[None, :] > confidence[:, None]) | tied)  # [BT, BJ]
        rank += tl.sum(before.to(tl.int32), 1)
        if RULE == "bound":
            entropy += tl.sum(tl.where(before, -other[None, :], 0.0), 1)
    # 2. How many the rule keeps.
    if RULE == "count":
        k = tl.load(count_ptr + b)
    elif RULE == "threshold":
        k = tl.maximum(tl.sum((candidate & (confidence >= limit)).to(tl.int32), 0), least)
    else:
        if RULE == "factor":
            enough = (rank + 2).to(tl.float32) * (1.0 - confidence) < limit
        else:
            enough = entropy <= limit
        k = tl.maximum(tl.max(tl.where(candidate & enough, rank + 1, 0), 0), least)
    # 3. Write them where they belong.
    chosen = candidate & (rank < k)
    index = tl.load(slot_ptr + b).to(tl.int64) + t  # [BT]
    token = tl.load(token_ptr + b * T + t, mask=chosen, other=0)  # [BT]
    tl.store(sequence_ptr + b * sequence_stride + index, token, mask=chosen & (index >= 0) & (index < S))
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
    least: int,
) -> torch.Tensor:
    batch, positions = token.shape
    chosen = torch.empty(batch, positions, dtype=torch.bool, device=token.device)
    if chosen.numel():
        padded = triton.next_power_of_2(positions)
        with torch.cuda.device_of(token):
            _commit_kernel[(batch,)](
                chosen, sequence, token, confidence, candidate, slot, count, limit, least,
                positions, sequence.shape[1], sequence.stride(0),
                RULE=rule, BT=padded, BJ=max(1, min(padded, COMPARISONS // padded)), num_warps=8 if padded > 128 else 4,
            )  # fmt: skip
    return chosen


@_commit.register_fake
@one_device
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
    bound: float | None = None,
    least: int = 1,
) -> torch.Tensor:
    """`reference.commit`: the chosen candidates [B, T] bool, now in ``sequence``. Writes nothing outside [0, S)."""
    limits = dict(zip(RULES, (count, threshold, factor, bound), strict=True))
    rules = [name for name, value in limits.items() if value is not None]
    if len(rules) != 1:
        raise ValueError(f"exactly one of {', '.join(RULES)} must be given, not {rules}")
    if token.dim() != 2 or token.shape[1] > MAX_POSITIONS:
        raise ValueError(f"token is {list(token.shape)}; expected [B, T] with T <= {MAX_POSITIONS}")
    batch, positions = token.shape
    check_tensors(sequence.device, contiguous=False, sequence=(sequence, [batch, None], (torch.int64,)))
    check_tensors(
        sequence.device,
        token=(token, [batch, positions], (torch.int64,)),
        confidence=(confidence, [batch, positions], (torch.float32,)),
        candidate=(candidate, [batch, positions], (torch.bool,)),
        slot=(slot, [batch], INTEGERS),
        count=(count, [batch], INTEGERS),
    )
    others = [float(value) for value in (threshold, factor, bound) if value is not None]
    limit = others[0] if others else 0.0
    return _commit(sequence, token, confidence, candidate, slot, count, rules[0], limit, least)
