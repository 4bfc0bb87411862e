"""Logits -> token, confidence, log-sum-exp: the part of `predict` that follows the head, a vocabulary tile at a time.

The vocabulary is cut into tiles. For each row a tile stores one id and six numbers: its peak m, S = sum e^(z - m), the
best score, that token and its noise-free logit, and for the confidence T = sum e^(z - m) (z - m) (entropy) or the two
best admissible logits (margin). `_combine_kernel` merges the tiles:

    M = max m_i,  S = sum S_i e^(m_i - M),  T = sum e^(m_i - M) (T_i + (m_i - M) S_i)
    lse = M + ln S,  p_v = e^(z_v - M) / S,  sum p ln p = T / S - ln S

Everything is relative to the peak, so huge and -inf logits are safe. The probability is e^(z - M) / S, since z - lse
would lose the digits that z and lse share.
"""

import torch
import triton
import triton.language as tl

from dllm_fast.kernels.gumbel import gumbel_tile, uniform_from_key

FIELDS = 6  # peak, mass, best score, its logit, and two for the confidence
SELECT = {"BV": 2048, "num_warps": 8}


@triton.jit
def in_ranges(id, RANGES: tl.constexpr):
    """Whether an id is in one of the ranges (low, high, low, high, ...)."""
    inside = id < 0
    for i in tl.static_range(0, len(RANGES), 2):
        inside = inside | ((id >= RANGES[i]) & (id < RANGES[i + 1]))
    return inside


@triton.jit
def softcapped(z, SOFTCAP: tl.constexpr):
    """``SOFTCAP tanh(z / SOFTCAP)``, tanh within 3 * 2^-24 relative; NaN for NaN."""
    x = z * (1.0 / SOFTCAP)
    size = tl.abs(x)
    # Near 0 the quotient of exponentials would cancel: a minimax polynomial of x^2 instead.
    square = x * x
    near = ((1.643756213e-2 * square - 5.267180206e-2) * square + 1.332072484e-1) * square - 3.333294662e-1
    power = tl.exp(-2.0 * size)
    found = tl.where(size < 0.55, size + size * square * near, (1.0 - power) / (1.0 + power))
    return SOFTCAP * tl.where(x < 0, -found, found)


@triton.jit
def reduce_tile(
    z,  # [BV, BN] fp32 logits, bias included
    column,  # [BV] vocabulary ids, ascending
    n,  # [BN] int64 rows
    valid,  # [BN] whether there is such a row
    tile,  # which of the splits
    part_ptr,  # [FIELDS, N, S] fp32
    best_ptr,  # [N, S] int32
    seed_ptr,  # [N] int64
    step_ptr,  # [N] int64
    row_ptr,  # [N] int
    position_ptr,  # [N] int
    temperature,
    N,
    V,
    S,
    BANNED: tl.constexpr,  # (low, high, low, high, ...): the logits of [low, high) are -inf
    DEFERRED: tl.constexpr,  # ranges likewise: not in the softmax
    MASK: tl.constexpr,  # not predicted
    CONFIDENCE: tl.constexpr,
    NOISE: tl.constexpr,
    BV: tl.constexpr,
    BN: tl.constexpr,
):
    """Store the tile's numbers for each row at split ``tile``."""
    # 1. Peak and mass, of all that count in the softmax.
    id = column[:, None]  # [BV, 1]
    z = tl.where((id < V) & ~in_ranges(id, BANNED), z, float("-inf"))
    counted = tl.where(in_ranges(id, DEFERRED), float("-inf"), z)  # [BV, BN]
    peak = tl.max(counted, 0)  # [BN]
    # If all of the tile is -inf, counted - peak would be NaN.
    shift = tl.where(peak == float("-inf"), 0.0, peak)[None, :]  # [1, BN]
    mass = tl.exp(counted - shift)  # [BV, BN]
    fields = part_ptr + n * S + tile  # [BN]
    field = N.to(tl.int64) * S
    tl.store(fields, peak, mask=valid)
    tl.store(fields + field, tl.sum(mass, 0), mask=valid)
    if CONFIDENCE == "entropy":
        slope = tl.where(mass > 0, mass * (counted - shift), 0.0)  # [BV, BN]; 0 * -inf is 0 here
        tl.store(fields + 4 * field, tl.sum(slope, 0), mask=valid)

    # 2. The best token, with noise.
    scored = tl.where(id == MASK, float("-inf"), z)  # [BV, BN]
    if NOISE:
        row = tl.load(row_ptr + n, mask=valid, other=0).to(tl.uint32)[None, :]  # [1, BN]
        position = tl.load(position_ptr + n, mask=valid, other=0).to(tl.uint32)[None, :]  # [1, BN]
        # For 64 rows: with the seed first the entropy's kernel spills on sm_120; with it last the probability's takes
        # 150 registers in place of 125 on sm_90, which leaves one program a multiprocessor.
        if CONFIDENCE != "entropy":
            seed = tl.load(seed_ptr + n, mask=valid, other=0)[None, :]  # [1, BN]
        step = tl.load(step_ptr + n, mask=valid, other=0).to(tl.uint32)[None, :]  # [1, BN]
        if CONFIDENCE == "entropy":
            seed = tl.load(seed_ptr + n, mask=valid, other=0)[None, :]  # [1, BN]
        scored += temperature * gumbel_tile(seed, step, row, position, tile * BV, BV, BN)
    best = tl.max(scored, 0)  # [BN]
    # A minimum of ids instead of an argmax: ties go to the lowest id whatever the order of the reduction.
    token = tl.min(tl.where(scored == best[None, :], id, 0x7FFFFFFF), 0)  # [BN]
    tl.store(fields + 2 * field, best, mask=valid)
    tl.store(best_ptr + n * S + tile, token, mask=valid)
    tl.store(fields + 3 * field, tl.sum(tl.where(id == token[None, :], z, 0.0), 0), mask=valid)
    # 3. The two best logits.
    if CONFIDENCE == "margin":
        admissible = tl.where(id == MASK, float("-inf"), counted)  # [BV, BN]
        first = tl.max(admissible, 0)  # [BN]
        winner = tl.min(tl.where(admissible == first[None, :], id, 0x7FFFFFFF), 0)  # [BN]
        second = tl.max(tl.where(id == winner[None, :], float("-inf"), admissible), 0)  # [BN]
        tl.store(fields + 4 * field, first, mask=valid)
        tl.store(fields + 5 * field, second, mask=valid)


@triton.jit(do_not_specialize=["N", "S", "first"])
def _select_kernel(
    logits_ptr,  # [N, C] fp32
    base_ptr,  # [N, C] fp32
    bias_ptr,  # [V]
    candidate_ptr,  # [N] bool, with GATHER
    part_ptr,  # [FIELDS, N, S] fp32
    best_ptr,  # [N, S] int32
    seed_ptr,  # [N] int64
    step_ptr,  # [N] int64
    row_ptr,  # [N] int
    position_ptr,  # [N] int
    guidance,
    temperature,
    first,  # the chunk's first tile
    N,
    V,
    C,
    S,
    BANNED: tl.constexpr,
    DEFERRED: tl.constexpr,
    MASK: tl.constexpr,
    CONFIDENCE: tl.constexpr,
    NOISE: tl.constexpr,
    GATHER: tl.constexpr,
    GUIDED: tl.constexpr,
    BIAS: tl.constexpr,
    BV: tl.constexpr,
    SOFTCAP: tl.constexpr = 0.0,  # of the logits, if positive
):
    n = tl.program_id(0).to(tl.int64)
    wanted = True
    if GATHER:
        wanted = tl.load(candidate_ptr + n) != 0
    if not wanted:
        return
    within = tl.program_id(1) * BV + tl.arange(0, BV)  # [BV]
    column = first * BV + within
    z = tl.load(logits_ptr + n * C + within, mask=within < C, other=0.0)  # [BV]
    if SOFTCAP > 0:
        if BIAS:
            bias = tl.load(bias_ptr + column, mask=column < V, other=0.0).to(tl.float32)  # [BV]
            z += bias
        z = softcapped(z, SOFTCAP)
        if GUIDED:
            base = tl.load(base_ptr + n * C + within, mask=within < C, other=0.0)  # [BV]
            if BIAS:
                base += bias
            base = softcapped(base, SOFTCAP)
            z = base + guidance * (z - base)
    else:
        if GUIDED:
            base = tl.load(base_ptr + n * C + within, mask=within < C, other=0.0)  # [BV]
            z = base + guidance * (z - base)
        if BIAS:
            z += tl.load(bias_ptr + column, mask=column < V, other=0.0).to(tl.float32)
    one = n + tl.arange(0, 1)  # [1]
    reduce_tile(
        z[:, None], column, one, one < N, first + tl.program_id(1), part_ptr, best_ptr, seed_ptr, step_ptr, row_ptr,
        position_ptr, temperature, N, V, S, BANNED, DEFERRED, MASK, CONFIDENCE, NOISE, BV, 1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["mask_id", "V"])
def _combine_kernel(
    token_ptr,  # [N] int64
    confidence_ptr,  # [N] fp32
    lse_ptr,  # [N] fp32
    part_ptr,  # [FIELDS, N, S] fp32
    best_ptr,  # [N, S] int32
    candidate_ptr,  # [N] bool, with GATHER
    seed_ptr,  # [N] int64
    step_ptr,  # [N] int64
    row_ptr,  # [N] int
    position_ptr,  # [N] int
    mask_id,
    V,
    S,
    DEFERRED: tl.constexpr,
    CONFIDENCE: tl.constexpr,
    GATHER: tl.constexpr,
    BS: tl.constexpr,  # at least S
):
    n = tl.program_id(0).to(tl.int64)
    wanted = True
    if GATHER:
        wanted = tl.load(candidate_ptr + n) != 0
    s = tl.arange(0, BS)  # [BS]
    inside = (s < S) & wanted
    fields = part_ptr + n * S + s  # [BS]
    field = tl.num_programs(0).to(tl.int64) * S
    # 1. Peak and mass of all tiles.
    low = float("-inf")
    peaks = tl.load(fields, mask=inside, other=low)  # [BS]
    masses = tl.load(fields + field, mask=inside, other=0.0)  # [BS]
    peak = tl.max(peaks, 0)
    shift = tl.where(peak == low, 0.0, peak)
    scale = tl.exp(peaks - shift)  # [BS]
    mass = tl.sum(masses * scale, 0)

    # 2. The token of the best score, and its confidence.
    scores = tl.load(fields + 2 * field, mask=inside, other=low)  # [BS]
    ids = tl.load(best_ptr + n * S + s, mask=inside, other=0x7FFFFFFF)  # [BS]
    token = tl.min(tl.where(scores == tl.max(scores, 0), ids, 0x7FFFFFFF), 0)
    if CONFIDENCE == "probability":
        logits = tl.load(fields + 3 * field, mask=inside, other=low)  # [BS]
        score = tl.exp(tl.sum(tl.where(ids == token, logits, 0.0), 0) - shift) / mass
    elif CONFIDENCE == "margin":
        firsts = tl.load(fields + 4 * field, mask=inside, other=low)  # [BS]
        seconds = tl.load(fields + 5 * field, mask=inside, other=low)  # [BS]
        first = tl.max(firsts, 0)
        winner = tl.min(tl.where(firsts == first, s, BS), 0)
        second = tl.max(tl.where(s == winner, seconds, firsts), 0)
        score = (tl.exp(first - shift) - tl.exp(second - shift)) / mass
    elif CONFIDENCE == "entropy":
        slopes = tl.load(fields + 4 * field, mask=inside, other=0.0)  # [BS]
        # Where scale is 0, peaks - shift may be -inf.
        slopes = tl.where(scale > 0, scale * (slopes + (peaks - shift) * masses), 0.0)
        score = tl.sum(slopes, 0) / mass - tl.log(mass)
    else:
        row = tl.load(row_ptr + n).to(tl.uint32)
        position = tl.load(position_ptr + n).to(tl.uint32)
        step = tl.load(step_ptr + n).to(tl.uint32)
        score = uniform_from_key(tl.load(seed_ptr + n), step, row, position)
    score = tl.where(in_ranges(token, DEFERRED), low, score)
    # NaN logits equal no maximum; the minimum keeps the token of such a row in the vocabulary.
    tl.store(token_ptr + n, tl.where(wanted, tl.minimum(token, V - 1), mask_id).to(tl.int64))
    tl.store(confidence_ptr + n, tl.where(wanted, score, low))
    tl.store(lse_ptr + n, tl.where(wanted, shift + tl.log(mass), 0.0))


def select(
    logits: torch.Tensor,  # [N, C] fp32: a chunk of the vocabulary, whole tiles except at its end
    base: torch.Tensor | None,  # [N, C] fp32
    bias: torch.Tensor | None,  # [V]
    candidate: torch.Tensor | None,  # [N] bool
    part: torch.Tensor,  # [FIELDS, N, S] fp32, written
    best: torch.Tensor,  # [N, S] int32, written
    keys: tuple,  # seed, step, row and position, [N] each, or None each
    guidance: float,
    temperature: float,
    first: int,  # the chunk's first tile
    vocabulary: int,
    flags: dict,  # the kernel's constants
) -> None:
    """Reduce a chunk of logits to the numbers of its tiles."""
    rows, columns = logits.shape
    _select_kernel[(rows, triton.cdiv(columns, flags["BV"]))](
        logits, base, bias, candidate, part, best, *keys,
        guidance, temperature, first, rows, vocabulary, columns, best.shape[1], **flags,
    )  # fmt: skip


def combine(
    token: torch.Tensor,  # [N] int64, written
    confidence: torch.Tensor,  # [N] fp32, written
    lse: torch.Tensor,  # [N] fp32, written
    part: torch.Tensor,  # [FIELDS, N, S] fp32
    best: torch.Tensor,  # [N, S] int32
    candidate: torch.Tensor | None,  # [N] bool
    keys: tuple,  # seed, step, row and position, [N] each, or None each
    mask_id: int,
    vocabulary: int,
    deferred: list[int],
    kind: str,
) -> None:
    """Merge every row's tiles into the results."""
    rows, splits = best.shape
    if kind != "random":
        keys = (None,) * len(keys)  # not read: the same kernel serves with and without noise
    _combine_kernel[(rows,)](
        token, confidence, lse, part, best, candidate, *keys, mask_id, vocabulary, splits,
        DEFERRED=tuple(deferred), CONFIDENCE=kind, GATHER=candidate is not None, BS=triton.next_power_of_2(splits),
        num_warps=4,
    )  # fmt: skip
