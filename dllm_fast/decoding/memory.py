"""Whether a batch fits, found out before it is begun."""

import math
from pathlib import Path

import torch

from dllm_fast.decoding.options import Options
from dllm_fast.ops import FILTERED

SHARE = 0.9  # of what is free that ``batch_size="auto"`` fills
ROWS = 256  # with more than that, steps are bound by arithmetic everywhere, and memory is all that rows cost
LOGITS = 256  # rows of fp32 logits that are held at once where there is no fused kernel
SORTED = 200  # bytes for each logit where they are put in order, see `kernels.reference_nucleus`


def need(family, options: Options, rows: int, slots: int, spare: int) -> int:
    """Bytes that generation needs besides the weights: the cache, a full forward's activations, a chunk of logits."""
    vocabulary, width = family.head()[0].shape
    size = family.head()[0].element_size()
    rows *= options.passes
    cache = 0
    if options.has_cache:
        own = slots if options.runs_suffix else options.block_length + family.shifted  # of each state
        kept = slots + spare + (options.drafts + 1) * own * bool(options.drafts)
        if options.looks_ahead and rows == options.passes:  # one row
            kept += min(sum(options.refresh.span(options.block_length)) + options.block_length, slots)
        each = size if options.cache_dtype is None else 1
        cache = 2 * family.layers * rows * kept * family.kv_heads * family.head_dim * each
        if options.refresh.layerwise:
            cache += family.layers * rows * slots * width * size
    # At the widest point of a layer: the residual stream and its norm, gate and up, and their product.
    states = rows * (options.drafts + 1)
    whole = rows if options.has_cache else states
    activations = whole * slots * (2 * width + 3 * family.ffn_width) * size
    positions = states * options.block_length
    logits = 3 * 4 * min(LOGITS, positions)
    if options.filters:
        logits = max(logits, SORTED * min(FILTERED, positions))
    return cache + activations + logits * vocabulary


def available(device: torch.device) -> int | None:
    """Bytes that are free on ``device``, PyTorch's own free blocks included; None if unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "cpu":
        try:
            lines = Path("/proc/meminfo").read_text().splitlines()
        except OSError:
            return None
        found = [line.split()[1] for line in lines if line.startswith("MemAvailable")]
        return int(found[0]) * 1024 if found else None
    return None


def free(family) -> int | None:
    """`available` on the device of a family's model; of one that processes share, what all of them have."""
    there = available(family.head()[0].device)
    return there if there is None or family.ranks is None else family.ranks.least(there)


def fits(family, options: Options, rows: int, slots: int, spare: int, held: int) -> bool:
    """Whether a batch of this shape fits into what is free, less ``held`` bytes; True if that is unknown."""
    there = free(family)
    return there is None or need(family, options, rows, slots, spare) <= there - held


def most_rows(family, options: Options, rows: int, slots: int, spare: int) -> int:
    """How many rows, up to ``rows`` and `ROWS`, fit into `SHARE` of what is free; at least 1."""
    there = free(family)
    there = None if there is None else int(SHARE * there)
    return max(1, rows_within(there, family, options, min(rows, ROWS), slots, spare))


def rows_within(there: int | None, family, options: Options, rows: int, slots: int, spare: int) -> int:
    """How many rows, up to ``rows``, fit into ``there`` bytes; all of them if that is None."""
    if there is None:
        return rows
    return max((n for n in range(1, rows + 1) if need(family, options, n, slots, spare) <= there), default=0)


def require_memory(family, options: Options, rows: int, slots: int, spare: int) -> None:
    """Raise MemoryError, with the size needed and the size there is, if a batch of this shape does not fit."""
    device = family.head()[0].device
    wanted, there = need(family, options, rows, slots, spare), free(family)
    if there is not None and wanted > there:
        fits = math.floor(rows * there / wanted)
        raise MemoryError(
            f"{rows} rows of {slots} positions need {wanted / 2**30:.1f} GiB on {device} beside the weights, and "
            f"{there / 2**30:.1f} GiB are free; about {fits} rows would fit"
        )
