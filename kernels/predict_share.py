"""`predict` where several processes hold a share of the vocabulary each: `reference_shares` for a GPU.

cuBLAS multiplies all rows by a chunk of the own ids' weights, and `select` reduces the chunk's fp32 logits to tiles, as
for a whole head. The tiles are those of the whole vocabulary, so that noise and ids are too; a share is as many whole
tiles. They are condensed to one, which the processes exchange, and `combine` merges what came. Nothing here waits for
the device, so a CUDA graph can record it, the exchange included.
"""

import torch

from dllm_fast.kernels.checks import FLOATS, as_keys, as_softcap, check_choice, check_tensors
from dllm_fast.kernels.predict import CHUNK_ELEMENTS, _logits
from dllm_fast.kernels.reference_shares import condense
from dllm_fast.kernels.select import FIELDS, SELECT, combine, select

LEAST = 16  # ids in a tile


def tile_of(ids: int) -> int:
    """The largest tile of which ``ids``, a process's, are a whole number: a power of two."""
    return min(SELECT["BV"], ids & -ids)


def config(ids: int) -> dict:
    """The tile, and warps for it."""
    tile = tile_of(ids)
    return {"BV": tile, "num_warps": 8 if tile > 1024 else 4}


def fits_share(ids: int) -> bool:
    """Whether processes of so many ids each are served: else their tiles would be tiny."""
    return tile_of(ids) >= LEAST


def predict_share(
    hidden: torch.Tensor,  # [N, D]
    weight: torch.Tensor,  # [ids, D]: of the process's own ids
    ranks,  # `families.ranks.Ranks`
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`reference.predict` for fp32, bf16 and fp16, the same on every process: token [N] int64, confidence [N] fp32 and
    log-sum-exp [N] fp32. Ids in the arguments and the results are those of the whole vocabulary."""
    # 1. The arguments.
    check_tensors(hidden.device, hidden=(hidden, [None, None], FLOATS))
    rows, width = hidden.shape
    device, vocabulary = hidden.device, ranks.ids * ranks.size
    check_tensors(
        device,
        weight=(weight, [ranks.ids, width], (hidden.dtype,)),
        uncond=(uncond, [rows, width], (hidden.dtype,)),
        candidate=(candidate, [rows], (torch.bool,)),
    )
    banned_ranges, deferred_ranges, noisy = check_choice(
        mask_id, banned, deferred, vocabulary, confidence, temperature, row, position
    )
    keys = as_keys(noisy, seed, step, row, position, rows, device)
    # 2. The own tiles, at their places among those of the whole vocabulary.
    tile = tile_of(ranks.ids)
    before, own, splits = ranks.first // tile, ranks.ids // tile, vocabulary // tile
    part = torch.empty(FIELDS, rows, splits, dtype=torch.float32, device=device)
    best = torch.empty(rows, splits, dtype=torch.int32, device=device)
    flags = {
        "BANNED": tuple(banned_ranges),
        "DEFERRED": tuple(deferred_ranges),
        "MASK": mask_id,
        "CONFIDENCE": confidence,
        "NOISE": temperature > 0,
        "GATHER": candidate is not None,
        "GUIDED": uncond is not None,
        "BIAS": False,
        "SOFTCAP": as_softcap(softcap),
        **config(ranks.ids),
    }
    with torch.cuda.device_of(hidden):
        chunk = max(1, CHUNK_ELEMENTS // (max(rows, 1) * tile))  # tiles
        for first in range(0, own if rows else 0, chunk):
            columns = slice(first * tile, (first + chunk) * tile)
            logits = _logits(hidden, weight[columns])  # [N, C]
            base = None if uncond is None else _logits(uncond, weight[columns])
            select(
                logits, base, None, candidate, part, best, keys, cfg_scale + 1.0, float(temperature), before + first,
                vocabulary, flags,
            )  # fmt: skip
        # 3. All processes' shares.
        mine = slice(before, before + own)
        part, best = ranks.exchange(*condense(part[..., mine], best[:, mine].long(), confidence))
        token = torch.empty(rows, dtype=torch.int64, device=device)
        score, lse = (torch.empty(rows, dtype=torch.float32, device=device) for _ in range(2))
        if rows:
            combine(
                token, score, lse, part.contiguous(), best.int().contiguous(), candidate, keys, mask_id, vocabulary,
                deferred_ranges, confidence,
            )  # fmt: skip
    return token, score, lse
