"""A few rows times a weight: ``y = x W^T``, for which reading W once is all that it should take.

The weight is on the M side of the matrix instructions, because wgmma's M is 64 and there may be one row. W is cut into
tiles of BN output channels and those into steps of BK inputs. The steps of all tiles, in order, are shared out equally
between as many programs as the chip holds, so that none idles; a program may begin and end inside a tile (arXiv:
2301.03598). A tile that several programs share is summed by the last of them to arrive, in the programs' order: replays
give the same bits, and the order does not depend on the number of rows.

    scale    y[n] = scale[n] * sum_k x[k] W[n, k]          W in e4m3, widened to x's dtype in registers, exactly
    gated    y = silu(round(x G^T)) * round(x U^T)         W = [G; U]: a tile has channels of both, in turns

Where the launch is chained (programmatic dependent launch, `chain.py`), a program asks for its first weights before it
waits for the kernel that makes x.
"""

import functools

import torch
import triton
import triton.language as tl

from dllm_fast.kernels.chain import chained, prefetch, start_next, wait_for_inputs
from dllm_fast.kernels.checks import check_tensors, one_device
from dllm_fast.kernels.tiles import end_tile, multiprocessors, source_rows, sum_parts, zero_counts

HALVES = (torch.bfloat16, torch.float16)
ROWS = 64  # above, cuBLAS is ahead
TILE = 128  # what the width of the output must be a multiple of, and that of the input
# By bytes of a weight, then by rows of x, padded. AHEAD steps of W are asked for before the wait. Of bf16 weights the
# bytes in flight decide: one program with 160 KB of them; e4m3 ones wait for their widening, which a second one covers.
HALF = {"BN": 128, "BK": 128, "AHEAD": 0, "num_warps": 4, "num_stages": 4}
BYTE = {"BN": 128, "BK": 128, "AHEAD": 4, "num_warps": 4, "num_stages": 4}
CONFIGS = {
    2: {rows: {"BM": rows, **HALF} for rows in (16, 32, 64)},
    1: {16: {"BM": 16, **BYTE}, 32: {"BM": 32, **BYTE}, 64: {"BM": 64, **BYTE, "num_warps": 8, "num_stages": 3}},
}
PROGRAMS = {2: 1, 1: 2}  # on a multiprocessor
# Bytes of a weight for which it is ahead of cuBLAS, on Hopper (bench.generation.steps, H200, LLaDA-8B, 32 rows: a block
# step with e4m3 weights takes 4.28 ms, with `torch._scaled_mm` 5.05; with bf16 weights 5.16, with cuBLAS 5.03).
AHEAD = (1,)


@triton.jit
def _widen(words):
    """Words of four e4m3 each, [...] int32, to four bf16 [...] of their first bytes, second bytes, and so on.

    e4m3's bits lie in bf16 as they are, but for an exponent that is 120 too low; the product with 2^120 is exact,
    subnormal numbers included. Converting by the hardware goes through fp16, at an eighth of this rate.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 t, s, zero, bias;
        mov.b32 zero, 0x80008000;
        mov.b32 bias, 0x7b807b80;
        prmt.b32 t, $4, $5, 0x4400;
        and.b32 s, t, 0x80008000;
        shr.u32 t, t, 4;
        lop3.b32 t, t, 0x07f007f0, s, 0xea;
        fma.rn.bf16x2 $0, t, bias, zero;
        prmt.b32 t, $4, $5, 0x5511;
        and.b32 s, t, 0x80008000;
        shr.u32 t, t, 4;
        lop3.b32 t, t, 0x07f007f0, s, 0xea;
        fma.rn.bf16x2 $1, t, bias, zero;
        prmt.b32 t, $4, $5, 0x6622;
        and.b32 s, t, 0x80008000;
        shr.u32 t, t, 4;
        lop3.b32 t, t, 0x07f007f0, s, 0xea;
        fma.rn.bf16x2 $2, t, bias, zero;
        prmt.b32 t, $4, $5, 0x7733;
        and.b32 s, t, 0x80008000;
        shr.u32 t, t, 4;
        lop3.b32 t, t, 0x07f007f0, s, 0xea;
        fma.rn.bf16x2 $3, t, bias, zero;
        }""",
        "=r,=r,=r,=r,r,r",
        [words],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _packed_dot(
    words,  # [BN, BK / 4] int32: four e4m3 weights each
    x,  # [BM, BK] bf16
    acc,  # [BN, BM] fp32
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """``acc + W x^T``, over every fourth input at a time: a word's bytes need not be put in order."""
    even, odd = tl.split(tl.reshape(x, [BM, BK // 4, 2, 2]))  # [BM, BK / 4, 2] each
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    w0, w1, w2, w3 = _widen(words)
    acc = tl.dot(w0, tl.trans(x0), acc)
    acc = tl.dot(w1, tl.trans(x1), acc)
    acc = tl.dot(w2, tl.trans(x2), acc)
    return tl.dot(w3, tl.trans(x3), acc)


@triton.jit(do_not_specialize=["queries", "slots", "positions", "heads", "rows"])
def _linear_kernel(
    x_ptr,  # [M, K], rows x_stride apart
    weight_ptr,  # [N, K], or with PACKED [N, K / 4] int32
    scale_ptr,  # [N] fp32, or None
    out_ptr,  # [M, N], or [M, N / 2] with GATED, or q [B, T, H, D]
    part_ptr,  # [programs, 2, BN, BM] fp32: what a program leaves of its first tile, and of its last
    count_ptr,  # [N / BN] int32: programs that have left their part of a tile; 0 before and after
    cos_ptr,  # [P, D/2] fp32. This and the next ten are None where HALF is 0
    sin_ptr,  # [P, D/2] fp32
    position_ptr,  # [B] int
    slot_ptr,  # [B] int
    row_ptr,  # [B] int, or None
    keys_ptr,  # [R, S, G, D]
    values_ptr,  # [R, S, G, D]
    queries,  # T
    slots,  # S
    positions,  # P
    heads,  # H
    x_stride,
    rows,  # M
    N,
    K,
    GATED: tl.constexpr,
    HALF: tl.constexpr,  # D/2: q, k and v are rotated; or 0
    PACKED: tl.constexpr,  # four e4m3 weights a word
    CHAINED: tl.constexpr,
    AHEAD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    steps = K // BK  # of a tile
    total = N // BN * steps
    first = program * total // programs
    last = (program + 1) * total // programs

    k = tl.arange(0, BK)  # [BK]
    source = source_rows(N, GATED, HALF, BN)  # [BN]
    tile_rows = BN // 2 if GATED else BN
    PER: tl.constexpr = 4 if PACKED else 1  # weights of an element of W
    w_at = weight_ptr + source[:, None] * (K // PER) + tl.arange(0, BK // PER)[None, :]  # [BN, BK / PER]
    x_rows = tl.minimum(tl.arange(0, BM), rows - 1)
    x_at = x_ptr + x_rows.to(tl.int64)[:, None] * x_stride + k[None, :]  # [BM, BK]

    rope = cos_ptr, sin_ptr, position_ptr, slot_ptr, row_ptr, keys_ptr, values_ptr, queries, slots, positions, heads
    to = out_ptr, scale_ptr, rope

    if CHAINED:
        for i in tl.static_range(AHEAD):
            step = tl.minimum(first + i, last - 1)
            ahead = (tl.cast(step // steps * tile_rows, tl.int64) * K + step % steps * BK) // PER
            prefetch(weight_ptr + source * (K // PER) + ahead)
        wait_for_inputs()
        start_next()

    acc = tl.zeros([BN, BM], tl.float32)
    for i in range(first, last):
        tile = i // steps
        at = (i - tile * steps) * BK
        w_step = (tl.cast(tile * tile_rows, tl.int64) * K + at) // PER
        w = tl.load(w_at + w_step, eviction_policy="evict_first")  # [BN, BK / PER]
        x = tl.load(x_at + at)  # [BM, BK]
        if PACKED:
            acc = _packed_dot(w, x, acc, BM, BK)
        else:
            acc = tl.dot(w.to(x.dtype), tl.trans(x), acc)
        if (at + BK == K) | (i + 1 == last):
            end_tile(acc, part_ptr, to, tile, first, i + 1, steps, rows, N, GATED, HALF, BM, BN)
            acc = tl.zeros([BN, BM], tl.float32)
    sum_parts(part_ptr, count_ptr, to, first, last, steps, total, rows, N, GATED, HALF, BM, BN)


@functools.cache
def _measured(device: torch.device) -> bool:
    """Whether `AHEAD` was measured there: on Hopper. In the interpreter it is tested."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9


def fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `linear` takes these, and is ahead of cuBLAS: few rows of half precision, widths of whole tiles."""
    rows = x.numel() // max(1, x.shape[-1])
    return _measured(x.device) and (
        1 <= rows <= ROWS
        and weight.element_size() in AHEAD
        and x.dtype in HALVES
        and weight.shape[0] % TILE == 0
        and weight.shape[1] % TILE == 0
        and weight.is_contiguous()
        and weight.storage_offset() * weight.element_size() % 4 == 0  # e4m3 is read in words of four
        and x.stride(-1) == 1
    )


def config_of(rows: int, weight: torch.Tensor) -> dict | None:
    """The tiles for so many rows; None: too many."""
    return next((config for most, config in CONFIGS[weight.element_size()].items() if rows <= most), None)


@torch.library.custom_op("dllm_fast::linear", mutates_args=())
def linear(
    x: torch.Tensor,  # [..., K] bf16 or fp16, up to ROWS rows
    weight: torch.Tensor,  # [N, K] of x's dtype, or e4m3 with scale
    scale: torch.Tensor | None = None,  # [N] fp32
    gated: bool = False,
) -> torch.Tensor:
    """`reference.linear`: [..., N], or [..., N / 2] if ``gated``. N and K are multiples of `TILE`."""
    n = weight.shape[0]
    out = torch.empty(*x.shape[:-1], n // 2 if gated else n, dtype=x.dtype, device=x.device)
    launch(x, weight, scale, out, gated)
    return out


def launch(x, weight, scale, out, gated=False, rope=(None,) * 11, half=0) -> None:
    """`linear` into ``out``; with ``rope`` and ``half`` as in `linear_rope`."""
    check_tensors(x.device, contiguous=False, x=(x, x.shape, HALVES))
    (n, k), rows = weight.shape, x.numel() // max(1, x.shape[-1])
    kinds = (x.dtype,) if scale is None else (torch.float8_e4m3fn,)
    check_tensors(x.device, weight=(weight, [None, x.shape[-1]], kinds), scale=(scale, [n], (torch.float32,)))
    config = config_of(rows, weight)
    if n % TILE or k % TILE or rows < 1 or config is None:
        raise ValueError(
            f"x is {list(x.shape)} and weight {list(weight.shape)}: expected 1 to {ROWS} rows and multiples of "
            f"{TILE} channels"
        )
    programs = min(PROGRAMS[weight.element_size()] * multiprocessors(x.device), n // config["BN"] * (k // config["BK"]))
    part = torch.empty(programs, 2, config["BN"], config["BM"], dtype=torch.float32, device=x.device)
    x = x.reshape(rows, k)
    packed = scale is not None and x.dtype == torch.bfloat16 and x.is_cuda
    with torch.cuda.device_of(x):
        _linear_kernel[(programs,)](
            x, weight.view(torch.int32) if packed else weight, scale, out, part,
            zero_counts(n // config["BN"], x.device), *rope, x.stride(0), rows, n, k,
            GATED=gated, HALF=half, PACKED=packed, **config, **chained(x.device, programs),
        )  # fmt: skip


@linear.register_fake
@one_device
def _(x, weight, scale=None, gated=False):
    return x.new_empty(*x.shape[:-1], weight.shape[0] // 2 if gated else weight.shape[0])
