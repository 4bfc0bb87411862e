"""Memory-bound ops: rotation into buffers, norms with residual, gates; and noise and commit."""

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from bench.ops.cases.case import BATCHES, BLOCK, LENGTHS, MODELS, TINY, Case, compare, compiled, dtype_of, installed
from dllm_fast import ops
from dllm_fast.kernels import reference
from dllm_fast.kernels.commit import commit
from dllm_fast.kernels.glu import geglu, swiglu
from dllm_fast.kernels.gumbel import gumbel
from dllm_fast.kernels.norm import layer_norm, rms_norm
from dllm_fast.kernels.rope import rope

EPS, THETA, SHARE = 1e-5, 1e4, 0.85
SAMPLES = 64  # rows that are compared with the truth
KEPT = 4  # positions that a commit keeps
NORMS = {"rms_norm": (rms_norm, reference.rms_norm, 5), "layer_norm": (layer_norm, reference.layer_norm, 8)}
GATES = {"swiglu": (swiglu, reference.swiglu, 4), "geglu": (geglu, reference.geglu, 5)}


def _random(generator: torch.Generator, *shape: int) -> torch.Tensor:
    device = generator.device
    return torch.randn(shape, generator=generator, device=device, dtype=dtype_of(device.type))


def _shapes(quick: bool) -> Iterator[tuple[str, int, int]]:
    """(name, batch, positions) of whole sequences and of a block."""
    lengths, block, batches = ((5,), 3, (2,)) if quick else (LENGTHS, BLOCK, BATCHES)
    for length in (*lengths, block):
        for batch in batches:
            yield f"{'block' if length == block else 'full'}{length}-batch{batch}", batch, length


# Norms: h = x + residual, y = norm(h) * weight. FLOPs per element: 5 for RMSNorm, 8 for LayerNorm.


def norm_run(kind: str, device: str) -> dict:
    kernel, definition, _ = NORMS[kind]
    extra = () if kind == "rms_norm" else (None,)  # neither model has a bias

    def ours(x, residual, weight):
        return kernel(x, weight, *extra, EPS, residual)

    def eager(x, residual, weight):
        return definition(x, weight, *extra, EPS, residual)

    def fused(x, residual, weight):
        h = x + residual
        if kind == "rms_norm":
            return F.rms_norm(h, h.shape[-1:], weight, EPS), h
        return F.layer_norm(h, h.shape[-1:], weight, None, EPS), h

    run = {"ours": ours, "eager": eager, "torch": fused, "compile": compiled(eager, device)}
    if installed("liger_kernel"):
        no_bias = functools.cache(torch.zeros_like)

        def liger(x, residual, weight):
            from liger_kernel.transformers import functional

            if kind == "rms_norm":
                return functional.liger_fused_add_rms_norm(x, residual, weight, EPS)
            h = x + residual
            return functional.liger_layer_norm(h, weight, no_bias(weight), EPS), h

        run["liger"] = liger
    if installed("flashinfer") and kind == "rms_norm":

        def flashinfer(x, residual, weight):  # in place
            from flashinfer.norm import fused_add_rmsnorm

            x, residual = x.flatten(0, 1), residual.flatten(0, 1)
            fused_add_rmsnorm(x, residual, weight, EPS)
            return x, residual

        run["flashinfer"] = flashinfer
    return run


def norm_check(inputs: tuple, kind: str):
    definition = NORMS[kind][1]
    extra = () if kind == "rms_norm" else (None,)
    x, residual, weight = inputs
    rows = [m.flatten(0, 1)[:SAMPLES] for m in (x, residual)]
    eager = definition(rows[0], weight, *extra, EPS, rows[1])
    exact = definition(rows[0].double(), weight.double(), *extra, EPS, rows[1].double())
    return lambda out: compare([m.view(-1, x.shape[-1])[:SAMPLES] for m in out], list(eager), list(exact))


def norm_cases(device: str, quick: bool) -> Iterator[Case]:
    for model in TINY if quick else MODELS:
        for name, batch, length in _shapes(quick):
            elements = batch * length * model.width

            def inputs(generator, shape=(batch, length, model.width)):
                return _random(generator, *shape), _random(generator, *shape), _random(generator, shape[-1])

            yield Case(
                op="norm",
                name=f"{model.name}-{model.norm}-{name}",
                inputs=inputs,
                run=norm_run(model.norm, device),
                check=functools.partial(norm_check, kind=model.norm),
                bytes=(4 * elements + model.width) * dtype_of(device).itemsize,
                flops=NORMS[model.norm][2] * elements,
                aim_share=SHARE,
            )


# Gates: gate and up are halves of one matmul's output. FLOPs per element, with exp or erf as one: 4 and 5.


def glu_run(kind: str, device: str) -> dict:
    kernel, _, _ = GATES[kind]

    def ours(both):
        return kernel(*both.chunk(2, -1))

    def eager(both):
        gate, up = both.chunk(2, -1)
        return (F.silu(gate) if kind == "swiglu" else F.gelu(gate)) * up

    run = {"ours": ours, "eager": eager, "compile": compiled(eager, device)}
    if installed("liger_kernel"):

        def liger(both):  # its GELU is the tanh approximation
            from liger_kernel.transformers import functional

            gate, up = both.chunk(2, -1)
            return (functional.liger_swiglu if kind == "swiglu" else functional.liger_geglu)(gate, up)

        run["liger"] = liger
    if installed("flashinfer"):

        def flashinfer(both):
            from flashinfer import activation

            return (activation.silu_and_mul if kind == "swiglu" else activation.gelu_and_mul)(both)

        run["flashinfer"] = flashinfer
    return run


def glu_check(inputs: tuple, kind: str):
    gate, up = inputs[0].flatten(0, 1)[:SAMPLES].chunk(2, -1)
    definition = GATES[kind][1]
    eager, exact = definition(gate, up), definition(gate.double(), up.double())
    return lambda out: compare([out.flatten(0, 1)[:SAMPLES]], [eager], [exact])


def glu_cases(device: str, quick: bool) -> Iterator[Case]:
    for model in TINY if quick else MODELS:
        for name, batch, length in _shapes(quick):
            elements = batch * length * model.ffn

            def inputs(generator, shape=(batch, length, 2 * model.ffn)):
                return (_random(generator, *shape),)

            yield Case(
                op="glu",
                name=f"{model.name}-{model.gate}-{name}",
                inputs=inputs,
                run=glu_run(model.gate, device),
                check=functools.partial(glu_check, kind=model.gate),
                bytes=3 * elements * dtype_of(device).itemsize,
                flops=GATES[model.gate][2] * elements,
                aim_share=SHARE,
            )


# Rotation: reads q, k and v; writes rotated q, and rotated k and v into buffers. FLOPs: 3 per element of q and k.


def rope_run(heads: int, dim: int, device: str) -> dict:
    def ours(q, k, v, cos, sin, row, keys, values):
        return rope(q, k, v, cos, sin, row, row, keys, values), keys, values

    def eager(q, k, v, cos, sin, row, keys, values):
        return ops.rope(q, k, v, cos, sin, row, row, keys, values)

    run = {"ours": ours, "eager": eager, "compile": compiled(eager, device)}

    @functools.cache
    def tables(length):
        return [torch.cat((x, x), -1)[None] for x in reference.rope_table(length, dim, THETA, device)]

    if installed("liger_kernel"):

        def liger(q, k, v, cos, sin, row, keys, values):  # q and k in place, then the copies
            from liger_kernel.transformers import functional

            q, k = functional.liger_rope(q.transpose(1, 2), k.transpose(1, 2), *tables(q.shape[1]))
            keys.copy_(k.transpose(1, 2))
            values.copy_(v)
            return q.transpose(1, 2), keys, values

        run["liger"] = liger
    if installed("flashinfer"):

        @functools.cache
        def prepared(batch, length):
            table = torch.cat(reference.rope_table(length, dim, THETA, device), -1)
            return torch.arange(length, device=device).repeat(batch), table

        def flashinfer(q, k, v, cos, sin, row, keys, values):  # q and k in place, then the copies
            from flashinfer.rope import apply_rope_with_cos_sin_cache_inplace

            position, table = prepared(*q.shape[:2])
            apply_rope_with_cos_sin_cache_inplace(position, *(x.view(-1, heads * dim) for x in (q, k)), dim, table)
            keys.copy_(k)
            values.copy_(v)
            return q, keys, values

        run["flashinfer"] = flashinfer
    return run


def rope_check(inputs: tuple):
    q, k, v, cos, sin = inputs[:5]
    few = [x[:1, :SAMPLES] for x in (q, k, v)]
    eager = ops.rope(*few, cos, sin)
    exact = exact_rotation(*few[:2], cos, sin)

    def judge(out: tuple) -> tuple[float, float]:
        mine = [x[:1, :SAMPLES] for x in out]
        if not torch.equal(mine[2], few[2]):
            return float("inf"), float("inf")
        return compare(mine[:2], list(eager[:2]), exact)

    return judge


def exact_rotation(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> list[torch.Tensor]:
    """Half-split rotation of positions 0, 1, ... in fp64, by multiplying complex numbers."""
    turn = torch.complex(cos.double(), sin.double())[: q.shape[1], None]  # [T, 1, D/2]
    turned = (torch.complex(*x.double().chunk(2, -1)) * turn for x in (q, k))
    return [torch.cat((z.real, z.imag), -1) for z in turned]


def rope_cases(device: str, quick: bool) -> Iterator[Case]:
    for model in TINY if quick else MODELS:
        for name, batch, length in _shapes(quick):
            shape = (batch, length, model.heads, model.head_dim)
            elements = batch * length * model.heads * model.head_dim

            def inputs(generator, shape=shape):
                q, k, v, keys, values = (_random(generator, *shape) for _ in range(5))
                tables = reference.rope_table(max(LENGTHS), shape[-1], THETA, generator.device)
                return q, k, v, *tables, torch.zeros(shape[0], dtype=torch.int64, device=q.device), keys, values

            yield Case(
                op="rope",
                name=f"{model.name}-{name}",
                inputs=inputs,
                run=rope_run(model.heads, model.head_dim, device),
                check=rope_check,
                bytes=6 * elements * dtype_of(device).itemsize + 4 * length * model.head_dim,
                flops=6 * elements,
                aim_share=SHARE,
            )


# Noise: writes 4 bytes per number. FLOPs: 40, for two logarithms; integer multiplications are not counted.


def gumbel_run(device: str) -> dict:
    def ours(row, columns):
        return gumbel(7, 1, row, row, columns)

    def naive(row, columns, dtype=torch.float32):
        u = torch.rand(row.numel(), columns.numel(), dtype=dtype, device=row.device)
        return -torch.log(-torch.log(u))

    def double(row, columns):
        return naive(row, columns, torch.float64)

    return {"ours": ours, "fp32": naive, "fp64": double, "fp32-compile": compiled(naive, device),
            "fp64-compile": compiled(double, device)}  # fmt: skip


def gumbel_check(inputs: tuple):
    row, columns = inputs
    exact = reference.gumbel(7, 1, row[:1], row[:1], columns)
    return lambda out: compare([out[:1]], [exact.float()], [exact], ulps=4)


def gumbel_cases(device: str, quick: bool) -> Iterator[Case]:
    for model in TINY if quick else MODELS[:2]:
        for rows in (2,) if quick else (1, 32, 256):

            def inputs(generator, rows=rows, vocabulary=model.vocabulary):
                return tuple(torch.arange(n, device=generator.device) for n in (rows, vocabulary))

            yield Case(
                op="gumbel",
                name=f"{model.name}-rows{rows}",
                inputs=inputs,
                run=gumbel_run(device),
                check=gumbel_check,
                bytes=4 * rows * model.vocabulary,
                flops=40 * rows * model.vocabulary,
                unchecked=("fp32", "fp64", "fp32-compile", "fp64-compile"),
            )


# Commit: reads token, confidence and candidate, writes the choice and the tokens. A launch dominates its time.


def commit_run(device: str) -> dict:
    def ours(sequence, token, confidence, candidate, slot, count):
        return commit(sequence, token, confidence, candidate, slot, count=count), sequence

    def eager(sequence, token, confidence, candidate, slot, count):
        return reference.commit(sequence, token, confidence, candidate, slot, count=count), sequence

    return {"ours": ours, "eager": eager, "compile": compiled(eager, device)}


def commit_check(inputs: tuple):
    sequence, *rest, count = (x.clone() for x in inputs)
    chosen = reference.commit(sequence, *rest, count=count)

    def judge(out: tuple) -> tuple[float, float]:
        same = torch.equal(out[0], chosen) and torch.equal(out[1], sequence)
        return (0.0, 0.0) if same else (float("inf"), float("inf"))

    return judge


def commit_cases(device: str, quick: bool) -> Iterator[Case]:
    for batch in (2,) if quick else BATCHES:
        for block in (5,) if quick else (BLOCK, 1024):

            def inputs(generator, batch=batch, block=block):
                options = {"generator": generator, "device": generator.device}
                sequence, token = (torch.randint(0, 99, (batch, block), **options) for _ in range(2))
                confidence, live = (torch.rand(batch, block, **options) for _ in range(2))
                slot = torch.zeros(batch, dtype=torch.int64, device=generator.device)
                return sequence, token, confidence, live < 0.7, slot, slot + KEPT

            yield Case(
                op="commit",
                name=f"block{block}-batch{batch}",
                inputs=inputs,
                run=commit_run(device),
                check=commit_check,
                bytes=batch * (block * (8 + 4 + 1 + 1) + 8 * KEPT + 16),
                flops=batch * block**2,
            )
