"""q, k and v of a few rows, rotated and written to their places by the matmul that makes them.

    [q; k; v] = x W^T, then `rope`        W [(H + 2 G) D, K] in bf16, e4m3 (`linear.py`) or four bits (`linear_int4.py`)

Bit for bit what the two kernels make one after the other: the matmul's sum is rounded to x's dtype, turned in fp32 and
rounded again (`rope.store_rotated`). A tile of the matmul is one head or several, whose two halves its channels have in
turns, so that the two of a pair meet in one thread. It spares a launch, and writing and reading q, k and v.
"""

import torch

from dllm_fast.kernels import linear, linear_int4
from dllm_fast.kernels.checks import INTEGERS, check_tensors, one_device
from dllm_fast.kernels.reference_rounded import E4M3

# Weights for which it is ahead of two kernels (bench.generation.steps, H200, LLaDA-8B, 32 rows: a block step with bf16
# weights takes 5.25 ms, not 5.34; with four bits 5.63, not 5.71; with e4m3 ones 4.39, not 4.30).
ROPE: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.uint8)


def fits_rope(x, weight, cos, sin, position, slot, keys=None, values=None, row=None) -> bool:
    """Whether `linear_rope` or `linear_int4_rope` takes what `linear` or `linear_int4` does and this beside it, and is
    ahead of two kernels."""
    return weight.dtype in ROPE and _takes(x, weight, position, slot, keys, values)


def _takes(x, weight, position, slot, keys, values) -> bool:
    """Whether there are buffers, without gaps, and a tile is whole heads, all of q, of k or of v."""
    if keys is None or position is None or slot is None:
        return False
    rows, (kv_heads, head_dim) = x.numel() // max(1, x.shape[-1]), keys.shape[2:]
    config = linear_int4.config_of(rows) if weight.dtype == torch.uint8 else linear.config_of(rows, weight)
    if config is None or config["BN"] % head_dim or kv_heads * head_dim % config["BN"] or head_dim % 2:
        return False
    return keys.is_contiguous() and values.is_contiguous()


def _prepare(x, weight, cos, sin, position, slot, keys, values, row) -> tuple[torch.Tensor, dict]:
    """q, not filled yet, and what `linear.launch` and `linear_int4.launch_int4` are given beyond a plain matmul's."""
    check_tensors(x.device, contiguous=False, x=(x, [None] * 3, linear.HALVES))
    batch, queries, _ = x.shape
    check_tensors(x.device, keys=(keys, [batch if row is None else None, None, None, None], (x.dtype, E4M3)))
    check_tensors(x.device, values=(values, keys.shape, (keys.dtype,)))
    slots, kv_heads, head_dim = keys.shape[1:]
    check_tensors(x.device, cos=(cos, [None, head_dim // 2], (torch.float32,)))
    check_tensors(x.device, sin=(sin, cos.shape, (torch.float32,)))
    each = [batch], INTEGERS
    check_tensors(x.device, position=(position, *each), slot=(slot, *each), row=(row, *each))
    heads = len(weight) // max(1, head_dim) - 2 * kv_heads
    if heads < 1 or not cos.shape[0] or not _takes(x, weight, position, slot, keys, values):
        raise ValueError(
            f"x is {list(x.shape)}, keys {list(keys.shape)} and cos {list(cos.shape)}: expected up to {linear.ROWS} "
            f"rows, whole heads of q, of k or of v in a tile of {linear.TILE} or fewer channels, and a position"
        )
    rope = cos, sin, position, slot, row, keys, values, queries, slots, cos.shape[0], heads
    out = torch.empty(batch, queries, heads, head_dim, dtype=x.dtype, device=x.device)
    return out, {"rope": rope, "half": head_dim // 2}


@torch.library.custom_op("dllm_fast::linear_rope", mutates_args=("keys", "values"))
def linear_rope(
    x: torch.Tensor,  # [B, T, K] bf16 or fp16, up to `linear.ROWS` rows
    weight: torch.Tensor,  # [(H + 2 G) D, K] of x's dtype, or e4m3 with scale
    scale: torch.Tensor | None,  # [(H + 2 G) D] fp32
    cos: torch.Tensor,  # [P, D/2] fp32
    sin: torch.Tensor,  # [P, D/2] fp32
    position: torch.Tensor,  # [B] int: position of each row's first query
    slot: torch.Tensor,  # [B] int: buffer slot of each row's first query
    keys: torch.Tensor,  # [R, S, G, D] of x's dtype or e4m3, as values; written in place
    values: torch.Tensor,  # [R, S, G, D], written in place
    row: torch.Tensor | None = None,  # [B] int: which of the buffers' rows; None: each its own
) -> torch.Tensor:
    """`reference.rope` of `reference.linear`: q [B, T, H, D]."""
    out, rotated = _prepare(x, weight, cos, sin, position, slot, keys, values, row)
    linear.launch(x, weight, scale, out, **rotated)
    return out


@torch.library.custom_op("dllm_fast::linear_int4_rope", mutates_args=("keys", "values"))
def linear_int4_rope(
    x: torch.Tensor,  # [B, T, K] bf16 or fp16, up to `linear.ROWS` rows
    packed: torch.Tensor,  # [(H + 2 G) D, K / 2] uint8, as `reference_rounded.round_int4` has it
    scale: torch.Tensor,  # [K / 128, (H + 2 G) D] bf16
    zero: torch.Tensor,  # [K / 128, (H + 2 G) D] uint8
    cos: torch.Tensor,  # the rest as in `linear_rope`
    sin: torch.Tensor,
    position: torch.Tensor,
    slot: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    row: torch.Tensor | None = None,
) -> torch.Tensor:
    """`reference.rope` of `reference.linear` of the widened weight: q [B, T, H, D]."""
    out, rotated = _prepare(x, packed, cos, sin, position, slot, keys, values, row)
    linear_int4.launch_int4(x, packed, scale, zero, out, **rotated)
    return out


@linear_rope.register_fake
@one_device
def _(x, weight, scale, cos, sin, position, slot, keys, values, row=None):
    return x.new_empty(*x.shape[:2], len(weight) // keys.shape[3] - 2 * keys.shape[2], keys.shape[3])


@linear_int4_rope.register_fake
@one_device
def _(x, packed, scale, zero, cos, sin, position, slot, keys, values, row=None):
    return x.new_empty(*x.shape[:2], len(packed) // keys.shape[3] - 2 * keys.shape[2], keys.shape[3])
