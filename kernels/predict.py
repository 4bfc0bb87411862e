"""Masked rows -> LM head -> token, confidence, log-sum-exp, with no [N, V] tensor in memory.

    z = h W^T + b                                   or z = z_u + (s + 1) (z_c - z_u) + b with guidance
                                                    c tanh(z / c), each of z_c and z_u too, with a softcap c
    token = argmax_v z_v + temperature * G_v        z = -inf for banned v and [MASK], ties to the lowest
    lse = ln sum_v e^(z_v)                          z = -inf for banned and deferred v

`select.py` reduces logits a tile of the vocabulary at a time and merges the tiles. A tile's logits are computed in one
of two ways:

- fused, for few rows: weights [BV, BK] times rows^T [BK, BN]. The vocabulary is on the M side, because wgmma's M is
  64 and there may be only one row. A weight tile is read once for each group of BN rows, and that read takes most of
  the time. Candidates are compacted on the device, so that groups are full; groups past the last candidate exit.
- streamed, for many rows: cuBLAS multiplies all rows by a chunk of the vocabulary, small enough that its fp32 logits
  stay in L2 until the reduction reads them. Candidates are not gathered: the host does not know how many there are, so
  it would multiply all rows anyway. The reduction skips rows that are not candidates.

Guidance keeps two accumulators. Combining the hidden states first would need one matmul, but bf16 would round the
combination after guidance has amplified it; two fp32 logits lose nothing, and the weights, which cost the time, are
still read once.

A weight in e4m3 has a scale for each vocabulary entry, which multiplies the sum over D: z = scale (h W8^T). Fused, the
weights are widened to bf16 in registers, so half as many bytes are read; streamed, each chunk is widened first. Neither
rounds a second time.
"""

import torch
import triton
import triton.language as tl

from dllm_fast.kernels.checks import FLOATS, as_keys, as_softcap, check_choice, check_tensors, one_device
from dllm_fast.kernels.linear import _packed_dot
from dllm_fast.kernels.select import FIELDS, SELECT, combine, reduce_tile, select, softcapped

# Rows above which cuBLAS and a reduction replace the fused kernel, by bytes of an element. To be set by measurement:
# bench both paths at 32 to 512 rows. In fp32, without tensor cores, cuBLAS is faster from fewer rows on.
CROSSOVER = {2: 128, 4: 16}
CHUNK_ELEMENTS = 1 << 23  # streamed logits at once: 32 MB, which stay in an L2 of 40 MB or more

# By rows of a group. Two blocks on a multiprocessor and four stages keep enough weights in flight; from 64 rows on the
# epilogue needs the registers of eight warps.
FUSED = {
    16: {"BN": 16, "BV": 128, "BK": 64, "num_warps": 4, "num_stages": 4},
    32: {"BN": 32, "BV": 128, "BK": 64, "num_warps": 4, "num_stages": 4},
    64: {"BN": 64, "BV": 128, "BK": 64, "num_warps": 8, "num_stages": 4},
    128: {"BN": 128, "BV": 128, "BK": 64, "num_warps": 8, "num_stages": 3},
}
GUIDED = {
    16: {"BN": 16, "BV": 128, "BK": 64, "num_warps": 4, "num_stages": 4},
    32: {"BN": 32, "BV": 128, "BK": 64, "num_warps": 8, "num_stages": 4},
    # BK is half: with 64 it spills on sm_80 in Triton 3.7.
    64: {"BN": 64, "BV": 128, "BK": 32, "num_warps": 8, "num_stages": 4},
}
# For e4m3 weights: a stage has as many bytes, so twice as many inputs. It spills on sm_100 with four warps for 16 rows,
# and with 128 inputs for 64 rows.
BYTE = {
    16: {"BN": 16, "BV": 128, "BK": 128, "num_warps": 8, "num_stages": 4},
    32: {"BN": 32, "BV": 128, "BK": 128, "num_warps": 4, "num_stages": 4},
    64: {"BN": 64, "BV": 128, "BK": 64, "num_warps": 8, "num_stages": 4},
}
BYTE_GUIDED = {  # for 64 rows Triton 3.7 compiles an empty kernel on sm_100, and spills on sm_120
    16: {"BN": 16, "BV": 128, "BK": 128, "num_warps": 8, "num_stages": 3},  # Triton 3.8 has no room for four on sm_86
    32: {"BN": 32, "BV": 128, "BK": 64, "num_warps": 4, "num_stages": 4},  # with 128 inputs a softcap spills on sm_120
}
PLAIN_ROWS = 64  # with noise, margin or entropy a larger group spills on sm_100
# With four warps it spills on sm_100.
FLOAT32 = {16: {"BN": 16, "BV": 64, "BK": 32, "num_warps": 8, "num_stages": 2}}


@triton.jit
def _compact_kernel(
    index_ptr,  # [N] int32: the candidates' rows, in order
    count_ptr,  # [1] int32: how many
    candidate_ptr,  # [N] bool
    N,
    BN: tl.constexpr,
):
    count = 0
    for start in range(0, N, BN):
        n = start + tl.arange(0, BN)  # [BN]
        keep = tl.load(candidate_ptr + n, mask=n < N, other=0).to(tl.int32)  # [BN]
        tl.store(index_ptr + count + tl.cumsum(keep, 0) - 1, n, mask=keep != 0)
        count += tl.sum(keep, 0)
    tl.store(count_ptr, count)


@triton.jit(do_not_specialize=["N", "V", "S"])
def _predict_kernel(
    hidden_ptr,  # [N, D]
    uncond_ptr,  # [N, D]
    weight_ptr,  # [V, D], or with SCALED [V, D / 4] int32: four e4m3 weights a word
    scale_ptr,  # [V] fp32, with SCALED
    bias_ptr,  # [V]
    index_ptr,  # [N] int32, with GATHER
    count_ptr,  # [1] int32, with GATHER
    part_ptr,  # [FIELDS, N, S] fp32
    best_ptr,  # [N, S] int32
    seed_ptr,  # [N] int64
    step_ptr,  # [N] int64
    row_ptr,  # [N] int
    position_ptr,  # [N] int
    guidance,
    temperature,
    N,
    V,
    D,
    S,
    BANNED: tl.constexpr,
    DEFERRED: tl.constexpr,
    MASK: tl.constexpr,
    CONFIDENCE: tl.constexpr,
    NOISE: tl.constexpr,
    GATHER: tl.constexpr,
    GUIDED: tl.constexpr,
    BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    BK: tl.constexpr,
    SOFTCAP: tl.constexpr = 0.0,  # of the logits, if positive
):
    # 1. This program's tile and rows. Groups run fastest, so that those that share a weight tile find it in L2.
    groups = tl.cdiv(N, BN)
    tile = tl.program_id(0) // groups
    group = tl.program_id(0) % groups
    count = N
    if GATHER:
        count = tl.load(count_ptr)
    if group * BN >= count:
        return
    place = group * BN + tl.arange(0, BN)  # [BN]: among the candidates
    n = place.to(tl.int64)
    if GATHER:
        n = tl.load(index_ptr + place, mask=place < count, other=0).to(tl.int64)
    else:
        n = tl.minimum(n, N - 1)
    column = tile * BV + tl.arange(0, BV)  # [BV]
    # Past the vocabulary its last row is read again, cheaper than a mask in the loop; `reduce_tile` drops the result.
    source = tl.minimum(column, V - 1).to(tl.int64)

    # 2. The logits, and with guidance those without the prompt.
    PER: tl.constexpr = 4 if SCALED else 1  # weights in an element of W
    k = tl.arange(0, BK)
    word = tl.arange(0, BK // PER)
    w_ptr = weight_ptr + source[:, None] * (D // PER) + word[None, :]
    h_ptr = hidden_ptr + n[:, None] * D + k[None, :]
    if GUIDED:
        u_ptr = uncond_ptr + n[:, None] * D + k[None, :]
    z = tl.zeros([BV, BN], tl.float32)
    base = tl.zeros([BV, BN], tl.float32)
    for start in range(0, D, BK):
        inside = (start + k < D)[None, :]  # [1, BK]
        w = tl.load(w_ptr, mask=(start + PER * word < D)[None, :], other=0)  # [BV, BK / PER]
        h = tl.load(h_ptr, mask=inside, other=0.0)  # [BN, BK]
        if SCALED:
            z = _packed_dot(w, h, z, BN, BK)
        else:
            z = tl.dot(w, tl.trans(h), z, input_precision="ieee")
        if GUIDED:
            u = tl.load(u_ptr, mask=inside, other=0.0)  # [BN, BK]
            if SCALED:
                base = _packed_dot(w, u, base, BN, BK)
            else:
                base = tl.dot(w, tl.trans(u), base, input_precision="ieee")
            u_ptr += BK
        w_ptr += BK // PER
        h_ptr += BK
    # 3. Into the tile's numbers.
    if SOFTCAP > 0:
        if SCALED:
            scale = tl.load(scale_ptr + source)[:, None]  # [BV, 1]
            z *= scale
            base *= scale
        if BIAS:
            bias = tl.load(bias_ptr + source).to(tl.float32)[:, None]  # [BV, 1]
            z += bias
            base += bias
        z = softcapped(z, SOFTCAP)
        if GUIDED:
            base = softcapped(base, SOFTCAP)
            z = base + guidance * (z - base)
    else:
        if GUIDED:
            z = base + guidance * (z - base)
        if SCALED:
            z *= tl.load(scale_ptr + source)[:, None]
        if BIAS:
            z += tl.load(bias_ptr + source).to(tl.float32)[:, None]
    reduce_tile(
        z, column, n, place < count, tile, part_ptr, best_ptr, seed_ptr, step_ptr, row_ptr, position_ptr,
        temperature, N, V, S, BANNED, DEFERRED, MASK, CONFIDENCE, NOISE, BV, BN,
    )  # fmt: skip


def _packs(hidden: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the fused kernel takes e4m3 weights: for bf16 rows on a GPU, and weights that are whole words."""
    return hidden.dtype == torch.bfloat16 and hidden.is_cuda and weight.shape[1] % 4 == weight.storage_offset() % 4 == 0


def _config(rows: int, dtype: torch.dtype, guided: bool, plain: bool, scaled: bool) -> dict:
    if scaled:
        table = BYTE_GUIDED if guided else BYTE
    else:
        table = FLOAT32 if dtype == torch.float32 else GUIDED if guided else FUSED
    sizes = [size for size in table if plain or size <= PLAIN_ROWS]
    return table[next((size for size in sizes if rows <= size), sizes[-1])]


def _logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``hidden weight^T`` in fp32, never rounded to hidden's dtype. e4m3 weights are widened to it, which is exact."""
    weight = weight.to(hidden.dtype)
    if hidden.dtype == torch.float32:
        return hidden @ weight.T
    if hidden.is_cuda:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return hidden.float() @ weight.float().T


@torch.library.custom_op("dllm_fast::predict", mutates_args=())
def _predict(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    candidate: torch.Tensor | None,
    uncond: torch.Tensor | None,
    scale: torch.Tensor | None,
    seed: torch.Tensor | None,
    step: torch.Tensor | None,
    row: torch.Tensor | None,
    position: torch.Tensor | None,
    mask_id: int,
    banned: list[int],
    deferred: list[int],
    confidence: str,
    temperature: float,
    guidance: float,
    softcap: float,
    path: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, width = hidden.shape
    vocabulary = weight.shape[0]
    device = hidden.device
    token = torch.empty(rows, dtype=torch.int64, device=device)
    score = torch.empty(rows, dtype=torch.float32, device=device)
    lse = torch.empty(rows, dtype=torch.float32, device=device)
    if rows == 0:
        return token, score, lse
    scaled = scale is not None
    if path == "auto":
        few = rows <= CROSSOVER[hidden.element_size()] and (not scaled or _packs(hidden, weight))
        path = "fused" if few else "streamed"
    plain = temperature == 0 and confidence in ("probability", "random")
    config = _config(rows, hidden.dtype, uncond is not None, plain, scaled) if path == "fused" else SELECT
    splits = triton.cdiv(vocabulary, config["BV"])
    part = torch.empty(FIELDS, rows, splits, dtype=torch.float32, device=device)
    best = torch.empty(rows, splits, dtype=torch.int32, device=device)
    keys = (seed, step, row, position)
    flags = {
        "BANNED": tuple(banned),
        "DEFERRED": tuple(deferred),
        "MASK": mask_id,
        "CONFIDENCE": confidence,
        "NOISE": temperature > 0,
        "GATHER": candidate is not None,
        "GUIDED": uncond is not None,
        "BIAS": bias is not None,
        "SOFTCAP": softcap,
        **config,
    }
    with torch.cuda.device_of(hidden):
        if path == "fused":
            index = count = None
            if candidate is not None:
                index = torch.empty(rows, dtype=torch.int32, device=device)
                count = torch.empty(1, dtype=torch.int32, device=device)
                _compact_kernel[(1,)](index, count, candidate, rows, BN=1024, num_warps=4)
            _predict_kernel[(splits * triton.cdiv(rows, config["BN"]),)](
                hidden, uncond, weight.view(torch.int32) if scaled else weight, scale, bias, index, count, part, best,
                *keys, guidance, temperature, rows, vocabulary, width, splits, **flags, SCALED=scaled,
            )  # fmt: skip
        else:
            tiles = max(1, CHUNK_ELEMENTS // (rows * config["BV"]))  # in a chunk
            for first in range(0, splits, tiles):
                columns = slice(first * config["BV"], (first + tiles) * config["BV"])
                logits = _logits(hidden, weight[columns])  # [N, C]
                base = None if uncond is None else _logits(uncond, weight[columns])
                for z in (logits, base):
                    if z is not None and scale is not None:
                        z.mul_(scale[columns])
                select(logits, base, bias, candidate, part, best, keys, guidance, temperature, first, vocabulary, flags)
        combine(token, score, lse, part, best, candidate, keys, mask_id, vocabulary, deferred, confidence)
    return token, score, lse


@_predict.register_fake
@one_device
def _(hidden, *args):
    rows = hidden.shape[0]
    score = hidden.new_empty(rows, dtype=torch.float32)
    return hidden.new_empty(rows, dtype=torch.int64), score, torch.empty_like(score)


def predict(
    hidden: torch.Tensor,  # [N, D]
    weight: torch.Tensor,  # [V, D], or e4m3 with scale
    bias: torch.Tensor | None = None,  # [V]
    scale: torch.Tensor | None = None,  # [V] fp32
    *,
    mask_id: int,
    candidate: torch.Tensor | None = None,  # [N] bool
    confidence: str = "probability",
    temperature: float = 0.0,
    seed: int | torch.Tensor = 0,  # int, or [1] or [N] int64 on the device
    step: int | torch.Tensor = 0,  # int, or [1] or [N] int64 on the device
    row: torch.Tensor | None = None,  # [N] int
    position: torch.Tensor | None = None,  # [N] int
    uncond: torch.Tensor | None = None,  # [N, D]
    cfg_scale: float = 0.0,
    banned: tuple[int, ...] = (),
    deferred: tuple[int, ...] = (),
    softcap: float | None = None,
    _path: str = "auto",  # "fused" or "streamed": for tests and benches
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`reference.predict` for fp32, bf16 and fp16: token [N] int64, confidence [N] fp32, log-sum-exp [N] fp32.

    With e4m3 weights, a few bf16 rows on a GPU are fused; everything else is streamed.
    ``banned`` and ``deferred`` are compiled into the kernel as ranges of ids, ``softcap`` as a number: each new set
    compiles it again.
    """
    check_tensors(hidden.device, hidden=(hidden, [None, None], FLOATS))
    kinds = (hidden.dtype,) if scale is None else (torch.float8_e4m3fn,)
    check_tensors(hidden.device, weight=(weight, [None, hidden.shape[1]], kinds))
    rows, width = hidden.shape
    vocabulary = weight.shape[0]
    device = hidden.device
    check_tensors(
        device,
        uncond=(uncond, [rows, width], (hidden.dtype,)),
        bias=(bias, [vocabulary], FLOATS),
        scale=(scale, [vocabulary], (torch.float32,)),
        candidate=(candidate, [rows], (torch.bool,)),
    )
    if vocabulary < 2 or vocabulary >= 1 << 30:
        raise ValueError(f"weight has {vocabulary} rows; expected 2 to 2^30 vocabulary ids")
    if _path not in ("auto", "fused", "streamed"):
        raise ValueError(f"_path={_path!r} is not one of 'auto', 'fused', 'streamed'")
    if _path == "fused" and scale is not None and not _packs(hidden, weight):
        raise ValueError(f"_path='fused' takes e4m3 weights in words of four and bf16 rows on a GPU: {hidden.dtype}")
    banned_ranges, deferred_ranges, noisy = check_choice(
        mask_id, banned, deferred, vocabulary, confidence, temperature, row, position
    )
    noise = as_keys(noisy, seed, step, row, position, rows, device)
    return _predict(
        hidden, weight, bias, candidate, uncond, scale, *noise, mask_id, banned_ranges, deferred_ranges,
        confidence, float(temperature), cfg_scale + 1.0, as_softcap(softcap), _path,
    )  # fmt: skip
