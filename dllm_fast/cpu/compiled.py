"""The compiled extension for CPUs, csrc/cpu: loading it, and its kernels as custom ops.

The library has a plain C interface without Python or PyTorch: it gets pointers, strides and the number of threads. It
contains every kernel once for each instruction set of `LEVELS` and runs the best that the CPU has, or a lower one that
the environment variable DLLM_FAST_LEVEL names, as another processor would. Its threads come from the OpenMP library
that PyTorch uses.

No result depends on the number of threads, and no row's result on the other rows or their number.
"""

import ctypes
import functools
import importlib.util
import os
import warnings

import torch

from dllm_fast.cpu.sources import require_current
from dllm_fast.kernels.checks import CONFIDENCES, as_numbers, as_softcap, check_block, check_choice, one_device
from dllm_fast.kernels.reference_rounded import E4M3

LEVELS = ("plain", "avx2", "avx512", "avx512bf16")
FLOATS = (torch.float32, torch.bfloat16)  # the dtypes of the kernels

_level: int | None = None  # an index into LEVELS, set by tests; None: `best_level`
_forked = False  # OpenMP's threads do not survive a fork, and a child that waits for them hangs


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run for weights of ``dtype`` on ``device``; None if they can."""
    if device.type != "cpu":
        return f"the model is on {device}; it needs a CPU"
    if dtype not in FLOATS:
        return f"the model's dtype is {dtype}; it needs {' or '.join(map(str, FLOATS))}"
    return missing()


@functools.cache
def missing() -> str | None:
    """Why the library cannot be loaded, also as one warning: without it everything works, slowly. None if it can."""
    try:
        _library()
    except (ImportError, OSError) as error:
        warnings.warn(f"dllm_fast runs on PyTorch alone: {error}", stacklevel=2)
        return str(error)
    return None


@functools.cache
def _library() -> ctypes.CDLL:
    spec = importlib.util.find_spec("dllm_fast._cpu")
    if spec is None or spec.origin is None:
        raise ImportError("the compiled extension was not built; `pip install` builds it where there is a C++ compiler")
    library = ctypes.CDLL(spec.origin)
    require_current(library, spec.origin)
    openmp = getattr(ctypes.CDLL(torch._C.__file__), "GOMP_parallel", None)
    library.dllm_openmp(None if openmp is None else ctypes.cast(openmp, ctypes.c_void_p))
    for name in ("attention", "linear", "predict", "rms_norm", "swiglu", "rope"):
        kernel = getattr(library, f"dllm_{name}")
        kernel.argtypes, kernel.restype = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int64), None
    return library


@functools.cache
def best_level() -> int:
    """The index in `LEVELS` of the best level that the CPU has, or of the lower one that DLLM_FAST_LEVEL names.

    Raises:
        ValueError: DLLM_FAST_LEVEL is not one of `LEVELS`.
    """
    best = _library().dllm_level()
    name = os.environ.get("DLLM_FAST_LEVEL")
    if name and name not in LEVELS:
        raise ValueError(f"DLLM_FAST_LEVEL={name!r} in the environment; expected one of {', '.join(LEVELS)}")
    return min(best, LEVELS.index(name)) if name else best


def levels() -> tuple[str, ...]:
    """The instruction sets of `LEVELS` that run here, worst first."""
    return LEVELS[: best_level() + 1]


def _threads() -> int:
    return 1 if _forked else torch.get_num_threads()


def _run(kernel: str, arguments: ctypes.Structure, dtype: torch.dtype) -> None:
    level = best_level() if _level is None else _level
    getattr(_library(), kernel)(ctypes.byref(arguments), level, dtype == torch.bfloat16, _threads())


def _pointer(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _check(dtype: torch.dtype, **expected: tuple[torch.Tensor | None, tuple]) -> None:
    """Raise ValueError unless each tensor is None, or has its shape, ``dtype`` and a contiguous last dimension."""
    for name, (x, shape) in expected.items():
        if x is not None and (x.shape != shape or x.dtype != dtype or (x.stride(-1) != 1 and x.shape[-1] > 1)):
            raise ValueError(
                f"{name} is {x.dtype} {list(x.shape)} with strides {x.stride()}; expected {dtype} {list(shape)} with a "
                "contiguous last dimension"
            )


def _check_float(name: str, x: torch.Tensor, dimensions: int) -> None:
    if x.dtype not in FLOATS or x.dim() != dimensions:
        raise ValueError(f"{name} is {x.dtype} {list(x.shape)}; expected {dimensions} dimensions of one of {FLOATS}")


_ops = torch.library.Library("dllm_fast", "FRAGMENT")  # `custom_op` would add 7 microseconds to each call


def _define(schema: str, kernel, fake) -> torch._ops.OpOverload:
    name = schema.split("(")[0]
    _ops.define(schema)
    _ops.impl(name, kernel, "CPU")
    torch.library.register_fake(f"dllm_fast::{name}", one_device(fake), lib=_ops)
    return getattr(torch.ops.dllm_fast, name).default


_Strides = ctypes.c_int64 * 3


class _Attention(ctypes.Structure):
    """`Attention` of csrc/cpu/api.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "keys", "values", "out", "start", "end", "slot", "origin")),
        *((name, ctypes.c_void_p) for name in ("first", "own_keys", "own_values", "hole")),
        *((name, ctypes.c_int64) for name in ("length", "own_slots")),
        *((name, _Strides) for name in ("own_k_stride", "own_v_stride")),
        *((name, ctypes.c_int64) for name in ("batch", "queries", "heads", "kv_heads", "head_dim", "slots")),
        *((name, _Strides) for name in ("q_stride", "k_stride", "v_stride")),
        *((name, ctypes.c_int64) for name in ("window", "block", "tile", "e4m3")),
        ("scale", ctypes.c_float),
    )


def _attention(
    q: torch.Tensor,  # [B, T, H, D]
    keys: torch.Tensor,  # [B, S, G, D]
    values: torch.Tensor,  # [B, S, G, D]
    start: torch.Tensor | None = None,  # [B] int64: first valid slot
    end: torch.Tensor | None = None,  # [B] int64: one past the last valid slot
    slot: torch.Tensor | None = None,  # [B] int64: buffer slot of each row's first query
    window: int | None = None,
    scale: float | None = None,
    first: torch.Tensor | None = None,  # [B + 1] int64: packed queries, q [N, 1, H, D] and slot [N]
    most: int = 0,  # packed queries of a row at most
    hole: torch.Tensor | None = None,  # [B] int64: with states, as are the rest
    length: int = 0,
    own_keys: torch.Tensor | None = None,  # [B, K, G, D]
    own_values: torch.Tensor | None = None,  # [B, K, G, D]
    block: int | None = None,  # not with states
    origin: torch.Tensor | None = None,  # [B] int64, with a block; None: start
) -> torch.Tensor:
    """`reference.attention`, or `reference_states.attention`, for fp32 and bf16, keys and values of that or of e4m3;
    ``start`` and ``slot`` default to 0, ``end`` to S.

    All strides but the last dimension's are free. Slots outside a row's range are not read, nor those in its hole. In
    fp32 the error is on average 0.6 to 0.8 times PyTorch's; in a small tensor the largest error may exceed PyTorch's.

    Raises:
        ValueError: a shape, dtype or stride that does not fit; it names the tensor.
    """
    _check_float("q", q, 4)
    batch, queries, heads, head_dim = q.shape
    if keys.dim() != 4 or keys.shape[2] == 0 or heads % keys.shape[2]:
        raise ValueError(f"keys.shape={tuple(keys.shape)} does not fit q.shape={tuple(q.shape)}")
    slot_shape, strides = (batch,), q.stride()[:3]
    if first is not None:
        if queries != 1 or slot is None:
            raise ValueError(f"first: packed queries are q [N, 1, H, D] with slot [N]; q.shape={tuple(q.shape)}")
        batch, queries, strides = keys.shape[0], most, (0, q.stride(0), q.stride(2))
    slots, kv_heads = keys.shape[1:3]
    buffer = (batch, slots, kv_heads, head_dim)
    _check(q.dtype, q=(q, q.shape))
    kept = E4M3 if keys.dtype == E4M3 else q.dtype
    check_block(block, hole, origin)
    own_slots, own_strides = _states(kept, buffer, first, hole, length, own_keys, own_values)
    _check(kept, keys=(keys, buffer), values=(values, buffer))
    _check(torch.int64, start=(start, (batch,)), end=(end, (batch,)), slot=(slot, slot_shape))
    _check(torch.int64, first=(first, (batch + 1,)), origin=(origin, (batch,)))
    if window is not None and window < 0:
        raise ValueError(f"window={window} is negative")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale={scale} is not above 0")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() and queries:
        arguments = _Attention(
            *map(_pointer, (q, keys, values, out, start, end, slot, origin, first, own_keys, own_values, hole)),
            *(length, own_slots, *own_strides),
            *(batch, queries, heads, kv_heads, head_dim, slots),
            *(_Strides(*three) for three in (strides, keys.stride()[:3], values.stride()[:3])),
            -1 if window is None else min(window, 1 << 40),
            0 if block is None else min(block, 1 << 30),
            _query_rows(batch * kv_heads, queries * heads // kv_heads, window if hole is None else None, _threads()),
            keys.dtype == E4M3,
            head_dim**-0.5 if scale is None else scale,
        )
        _run("dllm_attention", arguments, q.dtype)
    return out


def _states(dtype, buffer, first, hole, length, own_keys, own_values) -> tuple[int, tuple]:
    """The number of slots in the states' buffers, and these buffers' strides; 0 without states."""
    if hole is None and own_keys is None and own_values is None:
        return 0, (_Strides(), _Strides())
    given = {"first": first, "hole": hole, "own_keys": own_keys, "own_values": own_values}
    if lacking := [name for name, x in given.items() if x is None]:
        raise ValueError(f"{' and '.join(lacking)}: None; states need {', '.join(given)}")
    if length < 1:
        raise ValueError(f"length={length}: a state has at least 1 slot")
    shape = (buffer[0], own_keys.shape[1] if own_keys.dim() == 4 else 0, *buffer[2:])
    _check(torch.int64, hole=(hole, shape[:1]))
    _check(dtype, own_keys=(own_keys, shape), own_values=(own_values, shape))
    return shape[1], tuple(_Strides(*x.stride()[:3]) for x in (own_keys, own_values))


def _query_rows(heads: int, rows: int, window: int | None, threads: int) -> int:
    """Query rows in a task: the number that gives the busiest thread the least work, a task's overhead being 8 rows.

    A row's result depends on it only with a window, where the tiles of slots begin at the task's first visible one;
    with states, at the hole's.
    """
    if window is not None:
        return 32  # a larger task reads more slots outside a row's window
    rounds = {size: -(-heads * -(-rows // size) // threads) for size in (96, 48, 32, 16)}
    return min(rounds, key=lambda size: rounds[size] * (min(size, rows) + 8))


attention = _define(
    "cpu_attention(Tensor q, Tensor keys, Tensor values, Tensor? start=None, Tensor? end=None, Tensor? slot=None, "
    "int? window=None, float? scale=None, Tensor? first=None, int most=0, "
    "Tensor? hole=None, int length=0, Tensor? own_keys=None, Tensor? own_values=None, int? block=None, "
    "Tensor? origin=None) -> Tensor",
    _attention,
    lambda q, *rest, **options: q.new_empty(q.shape),
)


class _Linear(ctypes.Structure):
    """`Linear` of csrc/cpu/api.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "out", "packed")),
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "outputs", "x_stride", "w_stride")),
    )


def _linear(
    x: torch.Tensor,  # [..., inputs]
    weight: torch.Tensor,  # [outputs, inputs]
    bias: torch.Tensor | None = None,  # [outputs]
) -> torch.Tensor:
    """``x W^T + b`` [..., outputs] for fp32 and bf16, summed in fp32 and rounded once.

    Raises:
        ValueError: a shape, dtype or stride that does not fit; it names the tensor.
    """
    _check_float("weight", weight, 2)
    outputs, inputs = weight.shape
    _check(weight.dtype, x=(x, (*x.shape[:-1], inputs)), weight=(weight, weight.shape), bias=(bias, (outputs,)))
    out = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device=x.device)
    if out.numel():
        rows = x.reshape(out.numel() // outputs, inputs)
        arguments = _Linear(
            *map(_pointer, (rows, weight, bias, out, None)),
            *(rows.shape[0], inputs, outputs, rows.stride(0), weight.stride(0)),
        )
        _run("dllm_linear", arguments, x.dtype)
    return out


linear = _define(
    "cpu_linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
    _linear,
    lambda x, weight, bias=None: x.new_empty((*x.shape[:-1], weight.shape[0])),
)


class _Predict(ctypes.Structure):
    """`Predict` of csrc/cpu/api.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("hidden", "uncond", "weight", "bias", "candidate")),
        *((name, ctypes.c_void_p) for name in ("seed", "step", "row", "position")),
        *((name, ctypes.c_void_p) for name in ("banned", "deferred", "token", "score", "lse")),
        *((name, ctypes.c_void_p) for name in ("packed", "part", "chosen")),
        *((name, ctypes.c_int64) for name in ("rows", "width", "vocabulary")),
        *((name, ctypes.c_int64) for name in ("hidden_stride", "uncond_stride", "weight_stride")),
        *(
            (name, ctypes.c_int64)
            for name in ("banned_ranges", "deferred_ranges", "mask_id", "confidence", "chosen_rows")
        ),
        ("temperature", ctypes.c_float),
        ("guidance", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


def _predict(
    hidden, weight, bias, candidate, uncond, seed, step, row, position, mask_id, banned, deferred, confidence,
    temperature, guidance, softcap,
):  # fmt: skip
    rows, width = hidden.shape
    token = torch.empty(rows, dtype=torch.int64, device=hidden.device)
    score, lse = (torch.empty(rows, dtype=torch.float32, device=hidden.device) for _ in range(2))
    if rows:
        ranges = [(ctypes.c_int64 * len(ids))(*ids) for ids in (banned, deferred)]
        arguments = _Predict(
            *map(_pointer, (hidden, uncond, weight, bias, candidate, seed, step, row, position)),
            *map(ctypes.addressof, ranges), *map(_pointer, (token, score, lse)), None, None, None,
            *(rows, width, len(weight), hidden.stride(0), 0 if uncond is None else uncond.stride(0), weight.stride(0)),
            *(len(banned) // 2, len(deferred) // 2, mask_id, CONFIDENCES.index(confidence), 0),
            *(temperature, guidance, softcap),
        )  # fmt: skip
        _run("dllm_predict", arguments, hidden.dtype)
    return token, score, lse


def _fake_predict(hidden, *rest):
    score = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    return torch.empty_like(score, dtype=torch.int64), score, torch.empty_like(score)


_predict_op = _define(
    "cpu_predict(Tensor hidden, Tensor weight, Tensor? bias, Tensor? candidate, Tensor? uncond, Tensor? seed, "
    "Tensor? step, Tensor? row, Tensor? position, int mask_id, int[] banned, int[] deferred, str confidence, "
    "float temperature, float guidance, float softcap) -> (Tensor, Tensor, Tensor)",
    _predict,
    _fake_predict,
)


def predict(
    hidden: torch.Tensor,  # [N, d]
    weight: torch.Tensor,  # [V, d]
    bias: torch.Tensor | None = None,  # [V]
    *,
    mask_id: int,
    candidate: torch.Tensor | None = None,  # [N] bool
    confidence: str = "probability",
    temperature: float = 0.0,
    seed: int | torch.Tensor = 0,  # int, or [1] or [N] int64
    step: int | torch.Tensor = 0,  # int, or [1] or [N] int64
    row: torch.Tensor | None = None,  # [N] int64
    position: torch.Tensor | None = None,  # [N] int64
    uncond: torch.Tensor | None = None,  # [N, d]
    cfg_scale: float = 0.0,
    banned: tuple[int, ...] = (),
    deferred: tuple[int, ...] = (),
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`reference.predict` for fp32 and bf16: token [N] int64, confidence [N] fp32, log-sum-exp [N] fp32.

    Logits are fp32 and never all in memory; noise is fp32, as in kernels/gumbel.py.

    Raises:
        ValueError: an argument that does not fit; it names it.
    """
    _check_float("hidden", hidden, 2)
    _check_float("weight", weight, 2)
    (rows, width), vocabulary = hidden.shape, weight.shape[0]
    matrices = {"hidden": (hidden, (rows, width)), "weight": (weight, (vocabulary, width))}
    _check(hidden.dtype, **matrices, bias=(bias, (vocabulary,)), uncond=(uncond, (rows, width)))
    _check(torch.bool, candidate=(candidate, (rows,)))
    if vocabulary >= 1 << 31:
        raise ValueError(f"weight has {vocabulary} rows; expected fewer than 2^31")
    banned_ranges, deferred_ranges, noisy = check_choice(
        mask_id, banned, deferred, vocabulary, confidence, temperature, row, position
    )
    noise: tuple = (None, None, None, None)
    if noisy and row is not None and position is not None:
        row, position = row.contiguous(), position.contiguous()  # a single row's number is an expanded tensor
        _check(torch.int64, row=(row, (rows,)), position=(position, (rows,)))
        numbers = (as_numbers(name, x, rows, hidden.device) for name, x in (("seed", seed), ("step", step)))
        noise = (*numbers, row, position)
    return _predict_op(
        hidden, weight, bias, candidate, uncond, *noise, mask_id, banned_ranges, deferred_ranges,
        confidence, float(temperature), cfg_scale + 1.0, as_softcap(softcap),
    )  # fmt: skip
