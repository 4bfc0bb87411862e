"""Counter-based Gumbel and uniform noise in fp32, both tails exact.

``G = -ln E``, ``E = -ln U``, ``U = (X + 1/2) / 2^64``, X the 64 bits of Philox4x32-10 (Salmon et al., SC 2011) at
counter (index // 2, position, row, step) under the seed: words 0 and 1 for an even vocabulary index, 2 and 3 for an
odd one. So one Philox call gives the noise of two neighbouring columns.

fp32 cannot hold U near 1. The kernel keeps ``s = min(U, 1 - U)`` instead, which has full relative precision: 1 - U
comes from the complemented bits. Both branches of E and the outer logarithm are ``ln x = k ln 2 + log1p(f)`` with
|f| <= 1/3:

    U < 1/2              x = s = 2^k (1 + f), split by its bits
    U > 1/2, s <= 1/3    x = 1 - s:  k = 0,  f = -s       exact, so E has the relative precision of s
    U > 1/2, s > 1/3     x = 1 - s:  k = -1, f = 1 - 2s   also exact

``log1p(f) = f + f^2 Q(f)`` with Q of degree 8, minimax in relative error (2^-27.7) on [-1/3, 1/3]. With fp32 rounding
a logarithm is off by at most 2 ulp, and the noise by 4 * 2^-24 * max(1, |G|) from the definition, for G from -3.82 to
45.05. The hardware's logarithm is not used: near 1, where E often is, it is off by 2^-22.
"""

import torch
import triton
import triton.language as tl

from dllm_fast.kernels.checks import INTEGERS, as_keys, check_tensors, one_device

BLOCK = 1024  # a program's columns in `gumbel`, its rows in `uniform`


@triton.jit
def _log_parts(f, k):
    """``k ln 2 + log1p(f)`` for |f| <= 1/3 and an integral k, both fp32 of one shape."""
    q = f * -0.1294897049665451 + 0.1400475800037384
    q = f * q - 0.12167152762413025
    q = f * q + 0.14001160860061646
    q = f * q - 0.16682305932044983
    q = f * q + 0.20010747015476227
    q = f * q - 0.24999716877937317
    q = f * q + 0.3333320915699005
    q = f * q - 0.5
    return k * 0.6931471805599453 + (f * f * q + f)


@triton.jit
def _split(x):
    """f and k such that ``x = 2^k (1 + f)`` and |f| <= 1/3, for a positive normal fp32 x."""
    bits = x.to(tl.int32, bitcast=True)
    k = (bits - 0x3F2AAAAB) >> 23  # 0x3F2AAAAB is 2/3; the shift is arithmetic
    return (bits - (k << 23)).to(tl.float32, bitcast=True) - 1.0, k.to(tl.float32)


@triton.jit
def gumbel_from_words(high, low):
    """Gumbel noise, fp32, from 64 random bits: two uint32 tensors of one shape."""
    upper = high >= 0x80000000
    high = tl.where(upper, high ^ 0xFFFFFFFF, high)
    low = tl.where(upper, low ^ 0xFFFFFFFF, low)
    s = (high.to(tl.float32) + (low.to(tl.float32) + 0.5) * 2.0**-32) * 2.0**-32  # min(U, 1 - U)
    f, k = _split(s)
    near = s <= 0.3333333
    f = tl.where(upper, tl.where(near, -s, 1.0 - 2.0 * s), f)
    k = tl.where(upper, tl.where(near, 0.0, -1.0), k)
    f, k = _split(-_log_parts(f, k))
    return -_log_parts(f, k)


@triton.jit
def gumbel_tile(
    seed,  # [1, BN] int64
    step,  # [1, BN] uint32
    row,  # [1, BN] uint32
    position,  # [1, BN] uint32
    first,  # int scalar, even: the tile's first vocabulary index
    BV: tl.constexpr,  # columns, even
    BN: tl.constexpr,
):
    """Noise [BV, BN] fp32 for BV neighbouring vocabulary indices and BN rows, from BV / 2 x BN Philox calls."""
    pair = (first // 2 + tl.arange(0, BV // 2)).to(tl.uint32)[:, None]  # [BV/2, 1]
    w0, w1, w2, w3 = tl.philox(seed, pair, position, row, step)  # [BV/2, BN] each
    both = tl.join(gumbel_from_words(w0, w1), gumbel_from_words(w2, w3))  # [BV/2, BN, 2]
    return tl.reshape(tl.permute(both, (0, 2, 1)), (BV, BN))


@triton.jit
def uniform_from_key(seed, step, row, position):
    """Uniform noise on (0, 1], fp32, for int64 and three uint32 tensors of one shape: the definition's fp64 value,
    rounded once."""
    # The first counter word is 2^32 - 1, which no vocabulary index // 2 reaches.
    word, _, _, _ = tl.philox(seed, position | 0xFFFFFFFF, position, row, step)
    return ((word.to(tl.float64) + 0.5) * 2.0**-32).to(tl.float32)


@triton.jit
def _gumbel_kernel(
    out_ptr,  # [N, V] fp32
    seed_ptr,  # [N] int64
    step_ptr,  # [N] int64
    row_ptr,  # [N] int
    position_ptr,  # [N] int
    column_ptr,  # [V] int
    V,
    BV: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BV + tl.arange(0, BV)  # [BV]
    column = tl.load(column_ptr + v, mask=v < V, other=0)  # [BV]
    position = tl.load(position_ptr + n).to(tl.uint32)
    row = tl.load(row_ptr + n).to(tl.uint32)
    step = tl.load(step_ptr + n).to(tl.uint32)
    seed = tl.load(seed_ptr + n)
    # Columns are arbitrary here, so each makes its own Philox call and uses half of it; kernels use `gumbel_tile`.
    w0, w1, w2, w3 = tl.philox(seed, (column // 2).to(tl.uint32), position, row, step)  # [BV]
    odd = column % 2 == 1
    noise = gumbel_from_words(tl.where(odd, w2, w0), tl.where(odd, w3, w1))
    tl.store(out_ptr + n * V + v, noise, mask=v < V)


@triton.jit
def _uniform_kernel(
    out_ptr,  # [N] fp32
    seed_ptr,  # [N] int64
    step_ptr,  # [N] int64
    row_ptr,  # [N] int
    position_ptr,  # [N] int
    N,
    BN: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)  # [BN]
    row = tl.load(row_ptr + n, mask=n < N, other=0).to(tl.uint32)  # [BN]
    position = tl.load(position_ptr + n, mask=n < N, other=0).to(tl.uint32)  # [BN]
    step = tl.load(step_ptr + n, mask=n < N, other=0).to(tl.uint32)  # [BN]
    seed = tl.load(seed_ptr + n, mask=n < N, other=0)  # [BN]
    draw = uniform_from_key(seed, step, row, position)
    tl.store(out_ptr + n, draw, mask=n < N)


@torch.library.custom_op("dllm_fast::gumbel", mutates_args=())
def _gumbel(
    seed: torch.Tensor, step: torch.Tensor, row: torch.Tensor, position: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    out = torch.empty(row.shape[0], columns.shape[0], dtype=torch.float32, device=row.device)
    if out.numel():
        grid = (row.shape[0], triton.cdiv(columns.shape[0], BLOCK))
        with torch.cuda.device_of(row):
            _gumbel_kernel[grid](out, seed, step, row, position, columns, columns.shape[0], BV=BLOCK, num_warps=4)
    return out


@_gumbel.register_fake
@one_device
def _(seed, step, row, position, columns):
    return row.new_empty((row.shape[0], columns.shape[0]), dtype=torch.float32)


@torch.library.custom_op("dllm_fast::uniform", mutates_args=())
def _uniform(seed: torch.Tensor, step: torch.Tensor, row: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    out = torch.empty(row.shape[0], dtype=torch.float32, device=row.device)
    if out.numel():
        with torch.cuda.device_of(row):
            _uniform_kernel[(triton.cdiv(row.shape[0], BLOCK),)](
                out, seed, step, row, position, row.shape[0], BN=BLOCK, num_warps=4
            )
    return out


@_uniform.register_fake
@one_device
def _(seed, step, row, position):
    return row.new_empty(row.shape, dtype=torch.float32)


def gumbel(
    seed: int | torch.Tensor,  # int, or [1] or [N] int64 on the device
    step: int | torch.Tensor,  # int, or [1] or [N] int64 on the device
    row: torch.Tensor,  # [N] int
    position: torch.Tensor,  # [N] int
    columns: torch.Tensor,  # [V] int: vocabulary indices
) -> torch.Tensor:
    """`reference.gumbel` in fp32, [N, V]."""
    check_tensors(row.device, columns=(columns, [columns.numel()], INTEGERS))
    return _gumbel(*as_keys(True, seed, step, row, position, row.numel(), row.device), columns)


def uniform(
    seed: int | torch.Tensor,  # int, or [1] or [N] int64 on the device
    step: int | torch.Tensor,  # int, or [1] or [N] int64 on the device
    row: torch.Tensor,  # [N] int
    position: torch.Tensor,  # [N] int
) -> torch.Tensor:
    """`reference.uniform` rounded to fp32, [N]."""
    return _uniform(*as_keys(True, seed, step, row, position, row.numel(), row.device))
