"""Attention: whole sequences, and a block of queries at the end of a buffer of keys."""

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.ops.cases.case import (
    BATCHES,
    BLOCK,
    KEYS,
    LENGTHS,
    MODELS,
    TINY,
    Case,
    Model,
    Run,
    compare,
    compiled,
    dtype_of,
    installed,
)
from dllm_fast.kernels.attention import attention

SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION}  # fmt: skip
SAMPLES = 16  # queries per head that are compared with the truth


def visible_pairs(queries: int, slots: int, window: int | None) -> int:
    """(query, slot) pairs of one head; the queries are the last of the slots."""
    if window is None:
        return queries * slots
    first = slots - queries
    return sum(min(slots, i + window + 1) - max(0, i - window) for i in range(first, slots))


@functools.cache
def visible_mask(queries: int, slots: int, window: int, device: str) -> torch.Tensor:
    """[T, S] bool; cached, as a peer would cache it across layers."""
    i, j = torch.arange(slots - queries, slots, device=device), torch.arange(slots, device=device)
    return (i[:, None] - j).abs() <= window


def count(batch: int, queries: int, slots: int, model: Model, window: int | None, itemsize: int) -> tuple[int, int]:
    """Bytes: q, out, and the visible keys and values. FLOPs: two dot products per visible pair."""
    seen = slots if window is None else min(slots, queries + window)
    elements = 2 * batch * queries * model.heads * model.head_dim + 2 * batch * seen * model.heads * model.head_dim
    return elements * itemsize, 4 * batch * model.heads * model.head_dim * visible_pairs(queries, slots, window)


def make(generator: torch.Generator, batch: int, queries: int, slots: int, model: Model) -> tuple:
    """q [B, T, H, D], keys and values [B, S, H, D], and each row's range [B]."""
    device, dtype = generator.device, dtype_of(generator.device.type)
    shapes = [(batch, n, model.heads, model.head_dim) for n in (queries, slots, slots)]
    tensors = [torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in shapes]
    rows = [torch.full((batch,), n, device=device) for n in (0, slots, slots - queries)]
    return (*tensors, *rows)


def check(inputs: tuple, window: int | None):
    """Queries of the first and the last row and head against all slots, in fp64."""
    q, keys, values = inputs[:3]
    batch, queries, heads, dim = q.shape
    rows, heads = sorted({0, batch - 1}), sorted({0, heads - 1})
    at = torch.linspace(0, queries - 1, min(queries, SAMPLES), device=q.device).long()

    def pick(x: torch.Tensor) -> torch.Tensor:
        return x[rows][:, :, heads]

    def exact(wide: torch.dtype) -> torch.Tensor:
        score = torch.einsum("bthd,bshd->bhts", pick(q)[:, at].to(wide), pick(keys).to(wide)) * dim**-0.5
        if window is not None:
            score = score.masked_fill(~visible_mask(queries, keys.shape[1], window, q.device.type)[at], float("-inf"))
        return torch.einsum("bhts,bshd->bthd", torch.softmax(score, -1), pick(values).to(wide))

    truth, eager = exact(torch.float64), exact(torch.float32).to(q.dtype)
    # In fp32 both errors are random in the last place.
    ulps = 2 if q.dtype == torch.bfloat16 else 4
    return lambda out: compare([pick(out)[:, at]], [eager], [truth], ulps)


def library_peers(batch: int, queries: int, slots: int, model: Model, window: int | None) -> Iterator[tuple[str, Run]]:
    """Whichever of flash-attn 2, 3, 4 and flashinfer are installed."""
    sided = {} if window is None else {"window_size": (window, window)}
    modules = {"flash-attn-2": "flash_attn", "flash-attn-3": "flash_attn_interface", "flash-attn-4": "flash_attn.cute"}
    for name, module in modules.items():
        if installed(module):

            def flash(q, k, v, *_, module=module):
                out = __import__(module, fromlist=["flash_attn_func"]).flash_attn_func(q, k, v, **sided)
                return out[0] if isinstance(out, tuple) else out

            yield name, flash
    if installed("flashinfer"):

        @functools.cache
        def planned(device, dtype):
            import flashinfer

            workspace = torch.empty(1 << 28, dtype=torch.uint8, device=device)
            wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
            ends = (torch.arange(batch + 1, dtype=torch.int32, device=device) * n for n in (queries, slots))
            heads = (model.heads, model.heads, model.head_dim)
            wrapper.plan(*ends, *heads, causal=False, q_data_type=dtype)
            return wrapper

        def ragged(q, k, v, *_):
            if window is not None:
                raise NotImplementedError("its window only covers earlier slots")
            return planned(q.device, q.dtype).run(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)).view_as(q)

        yield "flashinfer", ragged


def implementations(batch: int, queries: int, slots: int, model: Model, window: int | None, device: str) -> dict:
    mask = None if window is None else visible_mask(queries, slots, window, torch.device(device).type)

    def ours(q, k, v, start, end, slot):
        return attention(q, k, v, start, end, slot, window)

    def eager(q, k, v, *_):
        score = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * model.head_dim**-0.5  # [B, H, T, S]
        if window is not None:
            score = score.masked_fill(~mask, float("-inf"))
        return (torch.softmax(score, -1) @ v.transpose(1, 2)).transpose(1, 2)

    def sdpa(q, k, v, *_, backend):
        with sdpa_kernel(backend):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    run = {"ours": ours, "eager": eager, "compile": compiled(eager, device)}
    run |= {f"sdpa-{name}": functools.partial(sdpa, backend=backend) for name, backend in SDPA.items()}
    if window is not None:
        run["flex"] = flex(queries, slots, window, device)
    return run | dict(library_peers(batch, queries, slots, model, window))


def flex(queries: int, slots: int, window: int, device: str) -> Run:
    """torch's compiled FlexAttention: PyTorch's only back end with a two-sided window."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(b, h, i, j):
        return (i + (slots - queries) - j).abs() <= window

    @functools.cache
    def prepared():
        cuda = torch.device(device).type == "cuda"
        return (
            create_block_mask(visible, None, None, queries, slots, device=device),
            torch.compile(flex_attention, dynamic=False) if cuda else flex_attention,
        )

    def run(q, k, v, *_):
        block_mask, function = prepared()
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return function(q, k, v, block_mask=block_mask).transpose(1, 2)

    return run


def one(model: Model, window: int | None, name: str, batch: int, queries: int, slots: int, device: str) -> Case:
    shape = (batch, queries, slots, model)
    size, flops = count(*shape, window, dtype_of(device).itemsize)
    return Case(
        op="attention",
        name=f"{model.name}{'-window' * (window is not None)}-{name}-batch{batch}",
        inputs=lambda generator: make(generator, *shape),
        run=implementations(*shape, window, device),
        check=functools.partial(check, window=window),
        bytes=size,
        flops=flops,
        aim_ratio=1.0 if queries < slots else 0.9,
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    lengths, keys, batches, block = ((12,), (40,), (2,), 4) if quick else (LENGTHS, KEYS, BATCHES, BLOCK)
    shapes = [(f"full{n}", n, n) for n in lengths] + [(f"block{block}x{n}", block, n) for n in keys]
    for model in TINY if quick else MODELS:
        for window in (None,) if model.window is None else (None, model.window):
            for name, queries, slots in shapes:
                for batch in batches:
                    yield one(model, window, name, batch, queries, slots, device)
