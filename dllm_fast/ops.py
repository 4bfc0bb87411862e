"""One function an op, dispatched by a plain ``if`` on ``impl``.

`kernels/reference.py` defines each op. The PyTorch path here computes the same from PyTorch's own fast pieces where
it has them, and is differentiable, so that training goes through the same forward.
"""

import torch
import torch.nn.functional as F

from dllm_fast.kernels import reference

IMPLS = ("auto", "torch")
CHUNK = 256  # rows of logits held at once: 256 x 126,464 fp32 is 130 MB


def resolve(impl: str, device: torch.device) -> str:
    """The implementation that ``impl`` stands for on ``device``. Raises ValueError if it cannot be had."""
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r} is not one of {', '.join(map(repr, IMPLS))}")
    return "torch"


def rms_norm(x, weight, eps, residual=None, impl="torch"):
    """`reference.rms_norm`."""
    return reference.rms_norm(x, weight, eps, residual)


def layer_norm(x, weight, bias, eps, residual=None, impl="torch"):
    """`reference.layer_norm`."""
    h = x if residual is None else x + residual
    return F.layer_norm(h, h.shape[-1:], weight, bias, eps), h


def swiglu(gate, up, impl="torch"):
    """`reference.swiglu`."""
    return F.silu(gate) * up


def geglu(gate, up, impl="torch"):
    """`reference.geglu`."""
    return F.gelu(gate) * up


def rope(q, k, v, cos, sin, position=None, slot=None, keys=None, values=None, impl="torch"):
    """`reference.rope`, returning (q, keys, values).

    Without buffers the rotated k and v themselves are what attention reads. ``position`` and ``slot`` default to 0.
    """
    if keys is not None:
        return reference.rope(q, k, v, cos, sin, position, slot, keys, values), keys, values
    if position is None:
        c, s = cos[: q.shape[1], None], sin[: q.shape[1], None]
    else:
        at = (position[:, None] + torch.arange(q.shape[1], device=q.device)).clamp(min=0)
        c, s = cos[at][:, :, None], sin[at][:, :, None]

    def rotate(x):
        x1, x2 = x.float().chunk(2, -1)
        return torch.cat((x1 * c - x2 * s, x2 * c + x1 * s), -1).to(x.dtype)

    return rotate(q), rotate(k), v


def attention(q, keys, values, start=None, end=None, slot=None, window=None, impl="torch"):
    """`reference.attention`; ``start`` and ``slot`` default to 0, ``end`` to the number of slots."""
    (batch, queries), slots = q.shape[:2], keys.shape[1]
    mask = None
    if start is not None or end is not None or window is not None:
        zero = torch.zeros(batch, dtype=torch.int64, device=q.device)
        start, end, slot = (zero if x is None else x for x in (start, zero + slots if end is None else end, slot))
        mask = reference.visible_slots(queries, slots, start, end, slot, window)[:, None]
    group = q.shape[2] // keys.shape[2]
    if group > 1:
        keys, values = keys.repeat_interleave(group, 2), values.repeat_interleave(group, 2)
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, keys, values)), attn_mask=mask)
    if mask is not None:
        # PyTorch leaves open what a query that sees nothing gets; it differs between its back ends.
        out = out.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return out.transpose(1, 2)


def predict(hidden, weight, bias=None, *, candidate=None, uncond=None, cfg_scale=0.0, impl="torch", **options):
    """`reference.predict`, with logits from the model's dtype and everything after them in fp32.

    On a CPU only the candidates' rows are multiplied; elsewhere that would need a host sync, so all are.
    """
    rows = slice(None)
    if candidate is not None and not candidate.is_cuda:
        rows = candidate.nonzero()[:, 0]
    per_row = {name: options.pop(name)[rows] for name in ("row", "position") if options.get(name) is not None}
    parts = []
    for i in range(0, max(1, hidden[rows].shape[0]), CHUNK):
        part = slice(i, i + CHUNK)
        logits = F.linear(hidden[rows][part], weight, bias).float()
        if uncond is not None:
            # Combining the hidden states would save this product, but in bf16 it more than doubles the logits' error.
            base = F.linear(uncond[rows][part], weight, bias).float()
            logits = base + (cfg_scale + 1) * (logits - base)
        parts.append(reference.select(logits, **options, **{name: x[part] for name, x in per_row.items()}))
    token, confidence, lse = (torch.cat(columns) for columns in zip(*parts, strict=True))
    if candidate is None:
        return token, confidence, lse
    full = (
        torch.full(candidate.shape, options["mask_id"], dtype=token.dtype, device=token.device),
        torch.full(candidate.shape, float("-inf"), device=token.device),
        torch.zeros(candidate.shape, device=token.device),
    )
    if isinstance(rows, slice):
        return tuple(torch.where(candidate, x, nothing) for x, nothing in zip((token, confidence, lse), full))
    return tuple(nothing.index_copy(0, rows, x) for x, nothing in zip((token, confidence, lse), full))


def commit(sequence, token, confidence, candidate, slot, *, impl="torch", **rule):
    """`reference.commit`."""
    return reference.commit(sequence, token, confidence, candidate, slot, **rule)


def masked_loss(hidden, weight, bias, target, loss_weight, impl="torch"):
    """`reference.masked_loss`."""
    return reference.masked_loss(hidden, weight, bias, target, loss_weight)
