"""One function an op, dispatched by a plain ``if`` on ``impl``.

`kernels/reference.py` defines each op. The PyTorch path here uses PyTorch's own fast functions if there are any. It is
differentiable, so training can use the same forward.
"""

import contextlib
import functools

import torch
import torch.nn.functional as F

from dllm_fast import attentions, launchers
from dllm_fast.cpu import compiled, elementwise, matmuls
from dllm_fast.kernels import reference, reference_rounded, reference_shares
from dllm_fast.kernels.reference_rounded import as_bytes, rounded
from dllm_fast.logprobs import token_logprob  # noqa: F401 - one function an op
from dllm_fast.visibility import Both, visible  # noqa: F401 - what `attention` takes

IMPLS = ("auto", "triton", "cpp", "torch")
# Which implementations have each op, and where they serve it if not everywhere. PyTorch serves everything else: layer
# norm, GeGLU, commit and masked loss with impl="cpp", for instance. `show_config` prints this table.
FEW = "few 16-bit rows on Hopper"
SERVED = {
    "linear": {"triton": FEW, "cpp": "up to the rows below"},
    "swiglu_linear": {"triton": FEW},
    "scaled_linear": {"triton": FEW},
    "int4_linear": {"triton": "few 16-bit rows"},
    "widen_int4": {"triton": ""},
    "grouped_linear": {"triton": "where PyTorch has no grouped_mm"},
    "round_rows": {"triton": ""},
    "attention": {"triton": "but whole sequences as below", "cpp": ""},
    "rope": {"triton": "", "cpp": ""},
    "rms_norm": {"triton": "", "cpp": ""},
    "layer_norm": {"triton": ""},
    "swiglu": {"triton": "", "cpp": ""},
    "geglu": {"triton": ""},
    "predict": {"triton": "", "cpp": "but a rounded head"},
    "commit": {"triton": ""},
    "masked_loss": {"triton": ""},
}
WIDENED = 4096  # rows of an e4m3 LM head that are widened at once
CHUNK = 256  # rows of logits in memory at once: 256 x 126,464 fp32 is 130 MB
FILTERED = 32  # and where `reference_nucleus` puts them in order, which takes up to 50 times their bytes


def resolve(impl: str, device: torch.device, dtype: torch.dtype) -> str:
    """The implementation that ``impl`` stands for, for weights of ``dtype`` on ``device``.

    ``"auto"`` is Triton on an NVIDIA GPU of `launchers.CAPABILITIES`, the compiled extension on a CPU, and PyTorch
    where they are not available; `auto` says why. On a CPU ``"triton"`` needs TRITON_INTERPRET=1, which runs the
    kernels in Triton's interpreter: right, and very slow.

    Raises:
        ValueError: ``impl`` is none of `IMPLS`, or is ``"triton"`` or ``"cpp"`` and not available; it says why.
            Or DLLM_FAST_MATMUL or DLLM_FAST_ATTENTION is not in its form (`matmuls`, `attentions`).
    """
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r} is not one of {', '.join(map(repr, IMPLS))}")
    if impl == "auto":
        impl = auto(device, dtype)[0]
    elif impl != "torch" and (obstacle := _obstacle_to(impl, device, dtype)):
        raise ValueError(f"impl={impl!r}: {obstacle}")
    if impl == "cpp":
        matmuls.settle(dtype)  # now, because `torch.compile` could not trace a measurement
    if impl == "triton":
        attentions.settle(device)
    return impl


def auto(device: torch.device, dtype: torch.dtype) -> tuple[str, str | None]:
    """What ``impl="auto"`` stands for; and if that is PyTorch, why the kernels cannot run."""
    wanted = "triton" if device.type == "cuda" else "cpp"
    obstacle = _obstacle_to(wanted, device, dtype)
    return ("torch" if obstacle else wanted), obstacle


def _obstacle_to(impl: str, device: torch.device, dtype: torch.dtype) -> str | None:
    return compiled.obstacle(device, dtype) if impl == "cpp" else launchers.obstacle(device, dtype)


def linear(x, weight, bias=None, impl="torch"):
    """``x W^T + b``, [..., out]. With ``"cpp"``, `matmuls` says from how many rows on PyTorch's serves."""
    if impl == "triton" and bias is None and _few_rows(x, weight):
        return launchers.triton().linear(x, weight)
    if impl == "cpp" and x.numel() < matmuls.pytorch_from.get(x.dtype, matmuls.NEVER) * x.shape[-1]:
        return compiled.linear(x, weight, bias)
    return F.linear(x, weight, bias)


def scaled_linear(x, weight, scale, gated=False, impl="torch", rope=()):
    """`reference.linear` of e4m3 weights; None if no kernel serves.

    ``rope``: the arguments of `rope` from ``cos`` on. The weights are then those of q, k and v: k and v are written to
    the buffers, and the rotated q is returned.
    """
    if impl == "triton" and _few_rows(x, weight, rope):
        if rope:
            return launchers.triton().linear_rope(x, weight, scale, *rope)
        return launchers.triton().linear(x, weight, scale, gated)
    return None


def int4_linear(x, packed, scale, zero, gated=False, impl="torch", rope=()):
    """`scaled_linear` of 4-bit weights."""
    if impl == "triton" and _few_rows(x, packed, rope):
        if rope:
            return launchers.triton().linear_int4_rope(x, packed, scale, zero, *rope)
        return launchers.triton().linear_int4(x, packed, scale, zero, gated)
    return None


def widen_int4(packed, scale, zero, width, dtype, impl="torch"):
    """`reference_rounded.widen_int4`, rounded to ``dtype``."""
    if impl == "triton":
        return launchers.triton().widen_int4(packed, scale, zero, width, dtype)
    return reference_rounded.widen_int4(packed, scale, zero, width).to(dtype)


def logits(hidden, weight, bias=None, scale=None, *, impl="torch"):
    """``hidden W^T + b``, [..., V], of an LM head. With ``scale`` [V], its e4m3 rows are widened some at a time."""
    if scale is None:
        return linear(hidden, weight, bias, impl)
    parts = [
        linear(hidden, (rows.float() * factor[:, None]).to(hidden.dtype), impl=impl)
        for rows, factor in zip(weight.split(WIDENED), scale.split(WIDENED), strict=True)
    ]
    y = torch.cat(parts, -1)
    return y if bias is None else y + bias


def swiglu_linear(x, weight, impl="torch"):
    """`reference.linear` with ``gated``: ``weight`` [2f, d] is a gate, then an up projection; returns [..., f]."""
    if impl == "triton" and _few_rows(x, weight):
        return launchers.triton().linear(x, weight, gated=True)
    return swiglu(*linear(x, weight, impl=impl).chunk(2, -1), impl=impl)


def grouped_linear(x, weight, ends, impl="torch"):
    """`reference.grouped_linear`: PyTorch's ``grouped_mm`` where it serves."""
    if _has_grouped(x, weight):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends.int())
    if impl == "triton":
        return launchers.triton().grouped_linear(x, weight, ends)
    parts = x.tensor_split(ends[:-1].cpu())
    return torch.cat([linear(part, matrix, impl=impl) for part, matrix in zip(parts, weight, strict=True)])


def _has_grouped(x, weight) -> bool:
    """Whether ``grouped_mm`` serves: from PyTorch 2.10 on, in bf16, with rows of whole 16 bytes."""
    aligned = x.shape[1] % 8 == 0 and weight.shape[1] % 8 == 0
    return hasattr(F, "grouped_mm") and x.is_cuda and x.dtype == torch.bfloat16 and aligned


def experts(x, gate_up, down, chosen, weight, impl="torch"):
    """`reference.experts`: two grouped matmuls over the tokens sorted by expert. Nothing is read on the host where
    grouped matmuls serve."""
    count, each = len(gate_up), chosen.shape[1]
    order = chosen.flatten().argsort(stable=True)  # [N k]
    numbers = torch.arange(count, device=x.device)
    ends = torch.searchsorted(chosen.flatten()[order], numbers, right=True)
    both = grouped_linear(x[order // each], gate_up, ends, impl)
    out = grouped_linear(swiglu(*both.chunk(2, -1), impl=impl), down, ends, impl)
    parts = torch.empty_like(out).index_copy_(0, order, out).view(*chosen.shape, -1)
    return (reference.widened(parts) * weight[..., None]).sum(1).to(x.dtype)


def _few_rows(x, weight, rope=()) -> bool:
    """Whether Triton's matmul serves, and rotates if there is ``rope``: it is for few rows and has no gradient."""
    wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    triton = launchers.triton()
    fits = triton.fits_int4 if weight.dtype == torch.uint8 else triton.fits
    return not wanted and fits(x, weight) and (not rope or triton.fits_rope(x, weight, *rope))


def round_rows(x, impl="torch"):
    """`reference_rounded.round_rows`."""
    if impl == "triton":
        return launchers.triton().round_rows(x)
    return reference_rounded.round_rows(x)


def counting(arrivals: torch.Tensor | None):
    """A context where Triton's kernels count in ``arrivals`` (`kernels.tiles.counters`); None: in their own zeros."""
    return contextlib.nullcontext() if arrivals is None else launchers.triton().counters(arrivals)


def rms_norm(x, weight, eps, residual=None, impl="torch"):
    """`reference.rms_norm`."""
    if impl == "triton":
        return launchers.triton().rms_norm(x, weight, eps, residual)
    if impl == "cpp":
        return elementwise.rms_norm(x, weight, eps, residual)
    return reference.rms_norm(x, weight, eps, residual)


def layer_norm(x, weight, bias, eps, residual=None, impl="torch"):
    """`reference.layer_norm`."""
    if impl == "triton":
        return launchers.triton().layer_norm(x, weight, bias, eps, residual)
    h = x if residual is None else x + residual
    return F.layer_norm(h, h.shape[-1:], weight, bias, eps), h


def swiglu(gate, up, *, impl="torch"):
    """`reference.swiglu`."""
    if impl == "triton":
        return launchers.triton().swiglu(gate, up)
    if impl == "cpp":
        return elementwise.swiglu(gate, up)
    return F.silu(gate) * up


def geglu(gate, up, *, impl="torch"):
    """`reference.geglu`."""
    if impl == "triton":
        return launchers.triton().geglu(gate, up)
    return F.gelu(gate) * up


def rope(q, k, v, cos, sin, position=None, slot=None, keys=None, values=None, row=None, *, outside=False, impl="torch"):
    """`reference.rope`, returning (q, keys, values).

    Without buffers it returns the rotated k, and v itself. ``position`` defaults to 0. All slots must be inside the
    buffers, unless ``outside`` allows rows that are behind them; where ``row`` is given, single positions may be.
    """
    if impl == "triton":
        zero = torch.zeros(q.shape[0], dtype=torch.int64, device=q.device)
        if keys is None:
            keys, values = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
        position, slot = (zero if x is None else x for x in (position, slot))
        return launchers.triton().rope(q, k, v, cos, sin, position, slot, keys, values, row), keys, values
    if impl == "cpp":
        return elementwise.rope(q, k, v, cos, sin, position, slot, keys, values, row)
    if position is None:
        c, s = cos[: q.shape[1], None], sin[: q.shape[1], None]
    else:
        angle = (position[:, None] + torch.arange(q.shape[1], device=q.device)).clamp(0, cos.shape[0] - 1)
        c, s = cos[angle][:, :, None], sin[angle][:, :, None]
    c, s = (table.to(reference.widened(q).dtype) for table in (c, s))

    if keys is None:
        return reference.rotate(q, c, s), reference.rotate(k, c, s), v
    k = as_bytes(rounded(reference.rotate(reference.widened(k), c, s), keys.dtype))
    v = as_bytes(rounded(v, values.dtype))
    kept_keys, kept_values = as_bytes(keys), as_bytes(values)
    if row is not None:
        source = stored(slot, keys.shape[1])
        k, v, row, slot = k[source], v[source], row[source], slot[source]
    row = (torch.arange(q.shape[0], device=q.device) if row is None else row)[:, None]
    slots = slot[:, None] + torch.arange(q.shape[1], device=q.device)
    if outside:
        # Rows behind the buffers write the last slot's own value: selecting the other rows would need a host sync.
        inside = (slots < keys.shape[1])[:, :, None, None]
        slots = slots.clamp(max=keys.shape[1] - 1)
        k = k.where(inside, kept_keys[row, slots])
        v = v.where(inside, kept_values[row, slots])
    kept_keys[row, slots] = k
    kept_values[row, slots] = v
    return reference.rotate(q, c, s), keys, values


def stored(slot: torch.Tensor, slots: int) -> torch.Tensor:
    """Of packed positions at ``slot`` [N], the index of one to store in each's place: the first, where a slot lies
    behind the buffers. Storing the first one twice changes nothing, and needs no host sync."""
    return torch.where(slot < slots, torch.arange(len(slot), device=slot.device), 0)


def attention(q, keys, values, seen, beside=None, impl="torch"):
    """`reference.attention`; ``seen`` is from `visible`, with the same ``impl``. ``beside``: the keys and values of
    states.

    With ``impl="triton"``, `attentions` says from how many queries on PyTorch's serves whole sequences.
    """
    if isinstance(seen, Both):
        n, own = seen.queries, seen.own
        states = attention(q[:n], keys, values, seen.states, [x[:, :own] for x in beside], impl)
        return torch.cat((states, attention(q[n:], keys, values, seen.also, [x[:, own:] for x in beside], impl)))
    if beside is not None:
        if impl == "triton":
            return launchers.triton().attention(q, keys, values, *seen[:-1], *beside)
        if impl == "cpp":
            return compiled.attention(q, keys, values, *seen, *beside)
        pairs = zip((keys, values), beside, strict=True)
        keys, values = (torch.cat((as_bytes(x), as_bytes(y)), 1).view(x.dtype) for x, y in pairs)
        return attention(q, keys, values, seen)
    if impl == "triton":
        *ranges, whole = seen
        if not (whole and attentions.serves(q.device, q.dtype, q.shape[2], keys.shape[2], q.shape[3], q.shape[1])):
            return launchers.triton().attention(q, keys, values, *ranges)
        seen = None, None, None, None
    if impl == "cpp":
        return compiled.attention(q, keys, values, *seen)
    near, mask, blind, places = seen
    if places is not None:
        at, row, place = places
        return attention(q[:, 0][at], keys, values, (near, mask, blind, None))[row, place][:, None]
    zero_or_nan = None if q.is_cuda else (q - q).sum(-1, keepdim=True)  # [B, T, H, 1]: NaN if the query has NaN
    if near is not None:
        row = torch.arange(q.shape[0], device=q.device)[:, None]
        keys, values = (as_bytes(x)[row, near].view(x.dtype) for x in (keys, values))
    keys, values = keys.to(q.dtype), values.to(q.dtype)
    # The query heads of a group become rows of one head, so that K and V are not copied for each of them.
    queries = q.shape[1]
    group = q.shape[2] // keys.shape[2]
    q = q.unflatten(2, (-1, group)).transpose(1, 2).flatten(2, 3)  # [B, G, T x H/G, D]
    if mask is not None:
        mask = mask[:, None] if group == 1 or mask.shape[1] == 1 else mask[:, None].repeat_interleave(group, 2)
    out = F.scaled_dot_product_attention(q, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=mask)
    out = out.unflatten(2, (queries, group)).transpose(1, 2).flatten(2, 3)  # [B, T, H, D]
    if zero_or_nan is not None:
        out = out + zero_or_nan  # on a CPU, PyTorch returns 0 for a query of NaN that sees few slots
    # PyTorch does not define the result of a query that sees nothing, and its back ends differ.
    return out if blind is None else out.masked_fill(blind[..., None, None], 0.0)


def predict(
    hidden, weight, bias=None, scale=None, *,
    candidate=None, uncond=None, cfg_scale=0.0, softcap=None, ranks=None, top_k=0, top_p=1.0, impl="torch", **options,
):  # fmt: skip
    """`reference.predict`: the head multiplies in the model's dtype, and the rest is in fp32.

    On a CPU only the rows of candidates are multiplied. Elsewhere all rows are: selecting them would need a host sync.
    ``ranks``: the processes that share the head (`families.ranks`), of which each has the weight of its own ids; not
    with ``top_k`` and ``top_p``, which PyTorch serves whatever ``impl``, as no kernel puts logits in order.
    """
    guided = {"candidate": candidate, "uncond": uncond, "cfg_scale": cfg_scale, "softcap": softcap}
    filtered = reference.filters(options.get("temperature", 0.0), top_k, top_p)
    if filtered:
        options |= {"top_k": top_k, "top_p": top_p}
    elif impl == "triton" and ranks is None:
        return launchers.triton().predict(hidden, weight, bias, scale, **guided, **options)
    elif impl == "triton" and bias is None and scale is None and launchers.triton().fits_share(ranks.ids):
        return launchers.triton().predict_share(hidden, weight, ranks, **guided, **options)
    elif impl == "cpp" and scale is None and ranks is None:
        return compiled.predict(hidden, weight, bias, **guided, **options)
    select = reference.select if ranks is None else functools.partial(reference_shares.select, ranks=ranks)
    rows = slice(None)
    if candidate is not None and not candidate.is_cuda and impl != "triton":  # whose steps are recorded
        rows = candidate.nonzero()[:, 0]
    keys = {name: options.get(name) for name in ("seed", "step", "row", "position")}
    each = [name for name, key in keys.items() if isinstance(key, torch.Tensor) and key.numel() == len(hidden)]
    per_row = {name: options.pop(name).reshape(-1)[rows] for name in each}
    parts = []
    chunk = FILTERED if filtered else CHUNK
    for i in range(0, max(1, hidden[rows].shape[0]), chunk):
        part = slice(i, i + chunk)
        z = reference.capped(logits(hidden[rows][part], weight, bias, scale, impl=impl).float(), softcap)
        if uncond is not None:
            # Combining the hidden states would save this matmul, but in bf16 it more than doubles the logits' error.
            base = reference.capped(logits(uncond[rows][part], weight, bias, scale, impl=impl).float(), softcap)
            z = reference.guided(z, base, cfg_scale)
        parts.append(select(z, **options, **{name: x[part] for name, x in per_row.items()}))
    token, confidence, lse = (torch.cat(columns) for columns in zip(*parts, strict=True))
    if candidate is None:
        return token, confidence, lse
    full = (
        token.new_full(candidate.shape, options["mask_id"]),
        confidence.new_full(candidate.shape, float("-inf")),
        lse.new_zeros(candidate.shape),
    )
    if isinstance(rows, slice):
        return tuple(torch.where(candidate, x, default) for x, default in zip((token, confidence, lse), full))
    return tuple(default.index_copy(0, rows, x) for x, default in zip((token, confidence, lse), full))


def commit(sequence, token, confidence, candidate, slot, *, impl="torch", **rule):
    """`reference.commit`."""
    if impl == "triton":
        return launchers.triton().commit(sequence, token, confidence, candidate, slot, **rule)
    return reference.commit(sequence, token, confidence, candidate, slot, **rule)


def masked_loss(hidden, weight, bias, target, loss_weight, impl="torch"):
    """`reference.masked_loss`."""
    if impl == "triton":
        return launchers.triton().masked_loss(hidden, weight, bias, target, loss_weight)
    return reference.masked_loss(hidden, weight, bias, target, loss_weight)
