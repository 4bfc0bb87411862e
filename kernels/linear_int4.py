"""A few rows times a weight in four bits: ``y = x W^T``, ``W[n, k] = scale[g, n] (q[n, k] - zero[g, n])``.

The grid, the order of the sums and the gate are those of `linear.py`. A step is one group g of 128 inputs: q - zero is
an integer that 16 bits hold exactly, the group's terms are summed in fp32, and scale multiplies that sum. A word holds
8 q from 8 slices of the group's inputs (`reference_rounded.round_int4`), so x is read slice by slice and no q is moved.

`widen_int4` writes W, rounded to a dtype, for matmuls of many rows.
"""

import torch
import triton
import triton.language as tl

from dllm_fast.kernels.chain import chained, start_next, wait_for_inputs
from dllm_fast.kernels.checks import FLOATS, check_tensors, one_device
from dllm_fast.kernels.linear import HALVES, ROWS, TILE
from dllm_fast.kernels.tiles import end_tile, multiprocessors, source_rows, sum_parts, zero_counts

GROUP = 128  # inputs that share a scale
# By rows of x, padded. 32 were measured (bench.generation.steps, H200, LLaDA-8B: a block step takes 5.42 ms, with 4
# stages 5.63). All compile without spills on every supported GPU. For 64 rows and 128 channels Triton 3.7 compiles an
# empty kernel on sm_100.
CONFIGS = {
    16: {"BM": 16, "BN": 128, "num_warps": 4, "num_stages": 5},
    32: {"BM": 32, "BN": 128, "num_warps": 8, "num_stages": 3, "maxnreg": 128},  # so that two programs fit
    64: {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 3},
}
PROGRAMS = 2  # on a multiprocessor
WIDEN = {"BN": 32, "num_warps": 4}


@triton.jit
def _eight(words, zero):
    """q - ``zero`` of words [...] int32 that hold 8 q each, as eight bf16 tensors [...], the lowest bits first.

    ``q | 0x4300`` is 128 + q in bf16, to which -128 - zero is added. Both are exact.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 low, high, t, one, offset;
        mov.b32 one, 0x3f803f80;
        prmt.b32 offset, $10, $11, 0x5410;
        or.b32 offset, offset, 0xc300c300;
        prmt.b32 low, $8, $9, 0x5410;
        prmt.b32 high, $8, $9, 0x7632;
        lop3.b32 t, low, 0x000f000f, 0x43004300, 0xea;
        fma.rn.bf16x2 $0, t, one, offset;
        shr.u32 low, low, 4;
        lop3.b32 t, low, 0x000f000f, 0x43004300, 0xea;
        fma.rn.bf16x2 $1, t, one, offset;
        shr.u32 low, low, 4;
        lop3.b32 t, low, 0x000f000f, 0x43004300, 0xea;
        fma.rn.bf16x2 $2, t, one, offset;
        shr.u32 low, low, 4;
        lop3.b32 t, low, 0x000f000f, 0x43004300, 0xea;
        fma.rn.bf16x2 $3, t, one, offset;
        lop3.b32 t, high, 0x000f000f, 0x43004300, 0xea;
        fma.rn.bf16x2 $4, t, one, offset;
        shr.u32 high, high, 4;
        lop3.b32 t, high, 0x000f000f, 0x43004300, 0xea;
        fma.rn.bf16x2 $5, t, one, offset;
        shr.u32 high, high, 4;
        lop3.b32 t, high, 0x000f000f, 0x43004300, 0xea;
        fma.rn.bf16x2 $6, t, one, offset;
        shr.u32 high, high, 4;
        lop3.b32 t, high, 0x000f000f, 0x43004300, 0xea;
        fma.rn.bf16x2 $7, t, one, offset;
        }""",
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r",
        [words, zero],
        dtype=(
            tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16,
        ),
        is_pure=True,
        pack=2,
    )  # fmt: skip


@triton.jit
def _one(words, zero, j: tl.constexpr, kind: tl.constexpr):
    """The j-th result of `_eight`, from plain operations, in dtype ``kind``."""
    return (((words >> (4 * j)) & 15) - zero).to(tl.float32).to(kind)


@triton.jit(do_not_specialize=["queries", "slots", "positions", "heads", "rows"])
def _linear_int4_kernel(
    x_ptr,  # [M, K], rows x_stride apart
    weight_ptr,  # [N, K / 8] int32
    scale_ptr,  # [K / 128, N] bf16
    zero_ptr,  # [K / 128, N] uint8
    out_ptr,  # [M, N], or [M, N / 2] with GATED, or q [B, T, H, D]
    part_ptr,  # [programs, 2, BN, BM] fp32: a program's parts of its first and its last tile
    count_ptr,  # [N / BN] int32: how many programs have written their part of a tile; 0 before and after
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
    PACKED: tl.constexpr,  # unpack by `_eight`
    CHAINED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    # 1. This program's steps, of all the tiles' steps in order.
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    steps = K // 128  # of a tile
    total = N // BN * steps
    first = program * total // programs
    last = (program + 1) * total // programs

    c = tl.arange(0, 16)  # [16]
    m = tl.arange(0, BM)  # [BM]
    source = source_rows(N, GATED, HALF, BN)  # [BN]
    tile_rows = BN // 2 if GATED else BN
    kind = x_ptr.dtype.element_ty
    w_at = weight_ptr + source[:, None] * (K // 8) + c[None, :]  # [BN, 16]
    x_at = x_ptr + tl.minimum(m, rows - 1).to(tl.int64)[:, None] * x_stride + c[None, :]  # [BM, 16]

    rope = cos_ptr, sin_ptr, position_ptr, slot_ptr, row_ptr, keys_ptr, values_ptr, queries, slots, positions, heads
    to = out_ptr, None, rope

    if CHAINED:
        wait_for_inputs()
        start_next()

    # 2. A group of inputs at each step; a tile's sum is stored or kept as a part where the tile or the program ends.
    acc = tl.zeros([BN, BM], tl.float32)
    for i in range(first, last):
        tile = i // steps
        group = i - tile * steps
        k = group * 128
        words = tl.load(w_at + tl.cast(tile * tile_rows, tl.int64) * (K // 8) + group * 16)  # [BN, 16]
        place = tl.cast(group, tl.int64) * N + tile * tile_rows + source  # [BN]
        scale = tl.load(scale_ptr + place).to(tl.float32)  # [BN]
        zero = tl.load(zero_ptr + place).to(tl.int32)[:, None]  # [BN, 1]
        if PACKED:
            w0, w1, w2, w3, w4, w5, w6, w7 = _eight(words, zero)  # [BN, 16] each
        else:
            w0 = _one(words, zero, 0, kind)
            w1 = _one(words, zero, 1, kind)
            w2 = _one(words, zero, 2, kind)
            w3 = _one(words, zero, 3, kind)
            w4 = _one(words, zero, 4, kind)
            w5 = _one(words, zero, 5, kind)
            w6 = _one(words, zero, 6, kind)
            w7 = _one(words, zero, 7, kind)
        y = tl.dot(w0, tl.trans(tl.load(x_at + k)))  # [BN, BM]
        y = tl.dot(w1, tl.trans(tl.load(x_at + k + 16)), y)
        y = tl.dot(w2, tl.trans(tl.load(x_at + k + 32)), y)
        y = tl.dot(w3, tl.trans(tl.load(x_at + k + 48)), y)
        y = tl.dot(w4, tl.trans(tl.load(x_at + k + 64)), y)
        y = tl.dot(w5, tl.trans(tl.load(x_at + k + 80)), y)
        y = tl.dot(w6, tl.trans(tl.load(x_at + k + 96)), y)
        y = tl.dot(w7, tl.trans(tl.load(x_at + k + 112)), y)
        acc += y * scale[:, None]
        if (group + 1 == steps) | (i + 1 == last):
            end_tile(acc, part_ptr, to, tile, first, i + 1, steps, rows, N, GATED, HALF, BM, BN)
            acc = tl.zeros([BN, BM], tl.float32)
    # 3. Tiles that several programs share.
    sum_parts(part_ptr, count_ptr, to, first, last, steps, total, rows, N, GATED, HALF, BM, BN)


@triton.jit
def _widen_int4_kernel(
    weight_ptr,  # [N, 16 G] int32
    scale_ptr,  # [G, N] bf16
    zero_ptr,  # [G, N] uint8
    out_ptr,  # [N, width]
    N,
    width,
    BN: tl.constexpr,
):
    group = tl.program_id(1)
    groups = tl.num_programs(1)
    n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)  # [BN]
    c = tl.arange(0, 16)  # [16]
    words = tl.load(weight_ptr + n[:, None] * (groups * 16) + group * 16 + c[None, :], mask=(n < N)[:, None], other=0)
    place = tl.cast(group, tl.int64) * N + n  # [BN]
    scale = tl.load(scale_ptr + place, mask=n < N, other=0.0).to(tl.float32)
    zero = tl.load(zero_ptr + place, mask=n < N, other=0).to(tl.int32)
    for j in tl.static_range(8):
        k = group * 128 + j * 16 + c  # [16]
        w = _one(words, zero[:, None], j, tl.float32) * scale[:, None]  # [BN, 16]
        inside = (n < N)[:, None] & (k < width)[None, :]
        tl.store(out_ptr + n[:, None] * width + k[None, :], w.to(out_ptr.dtype.element_ty), mask=inside)


def fits_int4(x: torch.Tensor, packed: torch.Tensor) -> bool:
    """Whether `linear_int4` takes these: few bf16 or fp16 rows, and widths of whole tiles and groups."""
    rows = x.numel() // max(1, x.shape[-1])
    whole = packed.shape[0] % TILE == 0 and x.shape[-1] % GROUP == 0
    return 1 <= rows <= ROWS and x.dtype in HALVES and whole and packed.is_contiguous() and x.stride(-1) == 1


def config_of(rows: int) -> dict | None:
    """The tiles for so many rows; None: too many."""
    return next((config for most, config in CONFIGS.items() if rows <= most), None)


def _check(packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, width: int) -> None:
    n, groups = packed.shape[0], -(-width // GROUP)
    check_tensors(
        packed.device,
        packed=(packed, [None, GROUP // 2 * groups], (torch.uint8,)),
        scale=(scale, [groups, n], (torch.bfloat16,)),
        zero=(zero, [groups, n], (torch.uint8,)),
    )


@torch.library.custom_op("dllm_fast::linear_int4", mutates_args=())
def linear_int4(
    x: torch.Tensor,  # [..., K] bf16 or fp16, up to ROWS rows
    packed: torch.Tensor,  # [N, K / 2] uint8, as `reference_rounded.round_int4` has it
    scale: torch.Tensor,  # [K / 128, N] bf16
    zero: torch.Tensor,  # [K / 128, N] uint8
    gated: bool = False,
) -> torch.Tensor:
    """`reference.linear` of the widened weight: [..., N], or [..., N / 2] if ``gated``."""
    n = packed.shape[0]
    out = torch.empty(*x.shape[:-1], n // 2 if gated else n, dtype=x.dtype, device=x.device)
    launch_int4(x, packed, scale, zero, out, gated)
    return out


def launch_int4(x, packed, scale, zero, out, gated=False, rope=(None,) * 11, half=0) -> None:
    """`linear_int4` into ``out``; with ``rope`` and ``half`` as in `linear_rope`."""
    check_tensors(packed.device, contiguous=False, x=(x, x.shape, HALVES))
    n, k = packed.shape[0], x.shape[-1]
    _check(packed, scale, zero, k)
    rows = x.numel() // max(1, k)
    config = config_of(rows)
    if n % TILE or k % GROUP or rows < 1 or config is None:
        raise ValueError(
            f"x is {list(x.shape)} and packed {list(packed.shape)}: expected 1 to {ROWS} rows and multiples of {TILE} "
            "channels"
        )
    tiles = n // config["BN"]
    programs = min(PROGRAMS * multiprocessors(x.device), tiles * (k // GROUP))
    part = torch.empty(programs, 2, config["BN"], config["BM"], dtype=torch.float32, device=x.device)
    x = x.reshape(rows, k)
    with torch.cuda.device_of(x):
        _linear_int4_kernel[(programs,)](
            x, packed.view(torch.int32), scale, zero, out, part, zero_counts(tiles, x.device), *rope, x.stride(0), rows,
            n, k, GATED=gated, HALF=half, PACKED=x.dtype == torch.bfloat16 and x.is_cuda, **config,
            **chained(x.device, programs),
        )  # fmt: skip


@linear_int4.register_fake
@one_device
def _(x, packed, scale, zero, gated=False):
    return x.new_empty(*x.shape[:-1], packed.shape[0] // 2 if gated else packed.shape[0])


@torch.library.custom_op("dllm_fast::widen_int4", mutates_args=())
def widen_int4(
    packed: torch.Tensor,  # [N, 64 G] uint8
    scale: torch.Tensor,  # [G, N] bf16
    zero: torch.Tensor,  # [G, N] uint8
    width: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`reference_rounded.widen_int4`, [N, width], rounded to ``dtype``."""
    _check(packed, scale, zero, width)
    if dtype not in FLOATS:
        raise ValueError(f"dtype={dtype} is not one of {', '.join(map(str, FLOATS))}")
    out = torch.empty(packed.shape[0], width, dtype=dtype, device=packed.device)
    grid = triton.cdiv(packed.shape[0], WIDEN["BN"]), -(-width // GROUP)
    with torch.cuda.device_of(packed):
        _widen_int4_kernel[grid](packed.view(torch.int32), scale, zero, out, packed.shape[0], width, **WIDEN)
    return out


@widen_int4.register_fake
@one_device
def _(packed, scale, zero, width, dtype):
    return packed.new_empty(packed.shape[0], width, dtype=dtype)
