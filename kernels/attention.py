"""Attention's launcher: its tiles, chosen from shapes alone, and its checks. `attention_kernel` has the algorithm."""

import math

import torch
import triton

from dllm_fast.kernels.attention_kernel import _attention_kernel, _merge_kernel
from dllm_fast.kernels.chain import chained
from dllm_fast.kernels.checks import FLOATS, INTEGERS, check_block, check_tensors, one_device
from dllm_fast.kernels.reference_rounded import E4M3

# (BM query rows, BN slots, warps, stages, mask every tile): first for few rows or a window, then for many rows. The key
# is (bytes an element, padded head dim, whether a block may use 227 KB of shared memory). These compile without spills
# on every such chip; they were not searched for.
# - 64 rows and 4 warps are the smallest shape of Hopper's matrix instructions. Few rows are limited by memory, so
#   neither padded rows nor masks in every tile cost time; a second loop body without masks spills on sm_80.
# - A window of 64 makes every tile a boundary tile, and 128 rows would read 256 slots to use 129.
# - fp32 dots are unrolled over the head dim without matrix instructions: larger tiles spill kilobytes.
CONFIGS = {
    (2, 64, True): ((64, 64, 4, 3, True), (128, 128, 8, 3, False)),
    (2, 128, True): ((64, 64, 4, 3, True), (128, 128, 8, 3, False)),
    (2, 256, True): ((64, 64, 8, 2, True), (64, 64, 8, 2, True)),
    (2, 64, False): ((64, 64, 4, 3, True), (128, 64, 8, 3, False)),
    (2, 128, False): ((64, 32, 4, 3, True), (128, 32, 8, 3, False)),
    (2, 256, False): ((64, 32, 8, 2, True), (64, 32, 8, 2, True)),
    **{(4, d, big): ((16, 32, 8, 1, True),) * 2 for d in (64, 128) for big in (True, False)},
    **{(4, 256, big): ((16, 16, 8, 1, True),) * 2 for big in (True, False)},  # 16 x 32 spills with Triton 3.6 on sm_100
}
# Of 16-bit queries against e4m3, by (padded head dim, big). What is widened takes registers, and the tiles above would
# spill.
WIDENED = {
    (128, True): (CONFIGS[2, 128, True][0], (128, 64, 8, 3, False)),
    (128, False): ((64, 32, 8, 3, True), (128, 32, 8, 3, True)),
}
FEW_QUERIES = 64
THREADS = 132 * 256  # enough to fill 132 multiprocessors; a launch with fewer splits the slots
MERGE_WARPS = 2
SPLIT_SLOTS = 128  # with fewer slots a program spends its time on starting and on writing its part


def for_states(few: tuple) -> tuple:
    """Tiles for the queries of states: those for ``few`` mask every slot; 64 slots of D=128 spill on sm_100."""
    rows, slots, *rest = few
    return rows, min(slots, 32), *rest


def for_blocks(config: tuple) -> tuple:
    """Tiles for rows that each see as far as their own block: every tile is masked, and 128 slots of D=128 spill."""
    rows, slots, warps, stages, _ = config
    return rows, min(slots, 64), warps, stages, True


def _plan(
    batch, queries, kv_heads, group, head_dim, slots, window, itemsize, big, widened=False, states=False, blocks=False
):
    """(config, padded head dim, splits), from shapes alone: a CUDA graph must stay valid whatever the device holds.

    ``widened``: keys and values are e4m3. ``states``: the queries are those of states. ``blocks``: they see as far
    as their own.
    """
    padded = max(16, triton.next_power_of_2(head_dim))
    tile = max(64, padded), big
    few, many = CONFIGS[(itemsize, *tile)]
    if widened and itemsize == 2:
        few, many = WIDENED.get(tile, (few, many))
    config = few if queries <= FEW_QUERIES or window is not None else many
    if blocks:
        config = for_blocks(config)
    if states:
        config = for_states(few)
    threads = batch * kv_heads * triton.cdiv(queries * group, config[0]) * config[2] * 32
    visible = slots if window is None else min(slots, queries + 2 * window)
    return config, padded, max(1, min(THREADS // threads, visible // SPLIT_SLOTS))


@torch.library.custom_op("dllm_fast::attention", mutates_args=())
def attention(
    q: torch.Tensor,  # [B, T, H, D]
    keys: torch.Tensor,  # [B, S, G, D] of q's dtype or e4m3, as values
    values: torch.Tensor,  # [B, S, G, D]
    start: torch.Tensor,  # [B] int: first valid slot
    end: torch.Tensor,  # [B] int: one past the last valid slot
    slot: torch.Tensor,  # [B] int: buffer slot of each row's first query
    window: int | None = None,
    scale: float | None = None,
    first: torch.Tensor | None = None,  # [B + 1] int: packed queries, q [N, 1, H, D] and slot [N]
    most: int = 0,  # packed queries of a row at most
    hole: torch.Tensor | None = None,  # [B] int: with states, as are the rest
    length: int = 0,
    own_keys: torch.Tensor | None = None,  # [B, K, G, D]
    own_values: torch.Tensor | None = None,  # [B, K, G, D]
    block: int | None = None,  # not with states
    origin: torch.Tensor | None = None,  # [B] int, with a block; None: start
) -> torch.Tensor:
    """`reference.attention`, or `reference_states.attention`, for scales above 0 and head dims up to 256."""
    _check(q, keys, values, start, end, slot, window, scale, first, origin)
    check_block(block, hole, origin)
    _check_states(keys, hole, length, own_keys, own_values)
    heads, head_dim = q.shape[2:]
    batch, slots, kv_heads = keys.shape[:3]
    queries = q.shape[1] if first is None else most
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    rows = q.shape[0] * q.shape[1] * heads
    if rows * queries == 0:
        return out
    group = heads // kv_heads
    big = not q.is_cuda or torch.cuda.get_device_capability(q.device)[0] in (9, 10)
    shape = batch, queries, kv_heads, group, head_dim, slots, window, q.element_size(), big
    states = hole is not None
    config, padded, splits = _plan(*shape, keys.dtype == E4M3, states, block is not None)
    bm, bn, warps, stages, masked = config
    tiles = triton.cdiv(queries * group, bm) * kv_heads * batch
    part, lse = out, None
    if splits > 1:
        part = torch.empty((splits, *q.shape), dtype=torch.float32, device=q.device)
        lse = torch.empty((splits, rows), dtype=torch.float32, device=q.device)
    grid = (tiles * splits,)
    own_strides = (0, 0, 0) if own_keys is None else own_keys.stride()[:3]
    q_strides = q.stride()[:3] if first is None else (0, q.stride(0), q.stride(2))
    with torch.cuda.device_of(q):
        _attention_kernel[grid](
            q, keys, values, start, end, slot, start if origin is None else origin, first, hole, own_keys, own_values,
            part, lse, *q_strides, *keys.stride()[:3], *values.stride()[:3], *own_strides,
            queries, slots, kv_heads, splits, rows, min(window or 0, 1 << 30), length, min(block or 1, 1 << 30),
            (head_dim**-0.5 if scale is None else scale) * math.log2(math.e),
            D=head_dim, GROUP=group, WINDOW=window is not None, BLOCK=block is not None,
            MASKED=masked, SPLIT=splits > 1, PACKED=first is not None, STATES=states, BM=bm, BN=bn, BD=padded,
            num_warps=warps, num_stages=stages, **chained(q.device, grid[0]),
        )  # fmt: skip
        if splits > 1:
            _merge_kernel[(rows,)](
                part, lse, out, splits, rows, D=head_dim, BS=triton.next_power_of_2(splits), BD=padded,
                num_warps=MERGE_WARPS, **chained(q.device, rows),
            )  # fmt: skip
    return out


@attention.register_fake
@one_device
def _(q, *rest):
    return q.new_empty(q.shape)


def _check(q, keys, values, start, end, slot, window, scale, first, origin):
    check_tensors(q.device, contiguous=False, q=(q, [None, None if first is None else 1, None, None], FLOATS))
    queries, _, heads, head_dim = q.shape
    batch = queries if first is None else keys.shape[0]
    if not 1 <= head_dim <= 256:
        raise ValueError(f"q is {list(q.shape)}: the head dim must be in 1..256")
    check_tensors(q.device, contiguous=False, keys=(keys, [batch, None, None, head_dim], (q.dtype, E4M3)))
    if keys.shape[2] == 0 or heads % keys.shape[2]:
        raise ValueError(f"keys is {list(keys.shape)}: its heads do not divide those of q, {list(q.shape)}")
    check_tensors(q.device, contiguous=False, values=(values, keys.shape, (keys.dtype,)))
    each = [batch], INTEGERS
    check_tensors(q.device, start=(start, *each), end=(end, *each), slot=(slot, [queries], INTEGERS))
    check_tensors(q.device, first=(first, [batch + 1], INTEGERS), origin=(origin, *each))
    if window is not None and window < 0:
        raise ValueError(f"window={window} is negative")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale={scale} is not above 0")


def _check_states(keys, hole, length, own_keys, own_values):
    if hole is None:
        return
    shape = [keys.shape[0], None, *keys.shape[2:]]
    check_tensors(keys.device, hole=(hole, [keys.shape[0]], INTEGERS))
    check_tensors(keys.device, contiguous=False, own_keys=(own_keys, shape, (keys.dtype,)))
    check_tensors(keys.device, contiguous=False, own_values=(own_values, own_keys.shape, (keys.dtype,)))
    if length < 1 or own_keys.stride() != own_values.stride():
        raise ValueError(f"length={length} of states whose keys and values have strides of their own")
