"""The compiled extension for CPUs, csrc/cpu: where it is, and its kernels as custom ops.

The library has a plain C interface and knows neither Python nor PyTorch: it is given pointers, strides and a number of
threads. It holds every kernel once for each instruction set of `LEVELS` and takes the best that the CPU has, or
``_level``. Threads are OpenMP's, by way of the library that PyTorch itself runs on.
"""

import ctypes
import functools
import importlib.util
import os
import warnings

import torch

LEVELS = ("plain", "avx2", "avx512", "avx512bf16")
FLOATS = (torch.float32, torch.bfloat16)  # that the kernels take

_level: int | None = None  # of LEVELS, for tests; None: the CPU's best
_forked = False  # OpenMP's threads do not survive a fork; a child that waits for them hangs


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run for weights of ``dtype`` on ``device``, or None where they can."""
    if device.type != "cpu":
        return f"the model is on {device}; it needs a CPU"
    if dtype not in FLOATS:
        return f"the model's dtype is {dtype}; it needs {' or '.join(map(str, FLOATS))}"
    return missing()


@functools.cache
def missing() -> str | None:
    """Why the library cannot be loaded. Said once, too: without it everything works, slowly."""
    try:
        _library()
    except (ImportError, OSError) as error:
        warnings.warn(f"dllm_fast runs on PyTorch alone: {error}", stacklevel=2)
        return str(error)
    return None


@functools.cache
def _library() -> ctypes.CDLL:
    spec = importlib.util.find_spec("dllm_fast._cpu")
    if spec is None:
        raise ImportError("the compiled extension was not built; `pip install` builds it where there is a C++ compiler")
    library = ctypes.CDLL(spec.origin)
    openmp = getattr(ctypes.CDLL(torch._C.__file__), "GOMP_parallel", None)
    library.dllm_openmp(ctypes.cast(openmp, ctypes.c_void_p))
    return library


def levels() -> tuple[str, ...]:
    """The instruction sets that this CPU has, of `LEVELS`."""
    return LEVELS[: _library().dllm_level() + 1]


def _run(kernel: str, arguments: ctypes.Structure, dtype: torch.dtype) -> None:
    library = _library()
    level = library.dllm_level() if _level is None else _level
    threads = 1 if _forked else torch.get_num_threads()
    getattr(library, kernel)(ctypes.byref(arguments), level, int(dtype == torch.bfloat16), ctypes.c_int64(threads))


def _pointer(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


_Strides = ctypes.c_int64 * 3


class _Attention(ctypes.Structure):
    """`Attention` of csrc/cpu/api.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "keys", "values", "out", "start", "end", "slot")),
        *((name, ctypes.c_int64) for name in ("batch", "queries", "heads", "kv_heads", "head_dim", "slots")),
        *((name, _Strides) for name in ("q_stride", "k_stride", "v_stride")),
        ("window", ctypes.c_int64),
        ("tile", ctypes.c_int64),
        ("scale", ctypes.c_float),
    )


@torch.library.custom_op("dllm_fast::cpu_attention", mutates_args=(), device_types="cpu")
def attention(
    q: torch.Tensor,  # [B, T, H, D]
    keys: torch.Tensor,  # [B, S, G, D]
    values: torch.Tensor,  # [B, S, G, D]
    start: torch.Tensor | None = None,  # [B] int64: first valid slot
    end: torch.Tensor | None = None,  # [B] int64: one past the last valid slot
    slot: torch.Tensor | None = None,  # [B] int64: buffer slot of each row's first query
    window: int | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """`reference.attention` for fp32 and bf16; ``start`` and ``slot`` default to 0, ``end`` to S.

    The strides are free but for the last dimension's. What lies outside a row's range is not read. In fp32 the error
    can be 2.4 times PyTorch's (5.6e-7 of values near 2 was seen); in bf16 it is PyTorch's.

    Raises:
        ValueError: a shape, dtype or stride that does not fit; it names the tensor.
    """
    _check_attention(q, keys, values, {"start": start, "end": end, "slot": slot}, window, scale)
    batch, queries, heads, head_dim = q.shape
    slots, kv_heads = keys.shape[1:3]
    out = torch.empty(q.shape, dtype=q.dtype)
    if out.numel():
        threads = torch.get_num_threads()
        arguments = _Attention(
            *map(_pointer, (q, keys, values, out, start, end, slot)),
            *(batch, queries, heads, kv_heads, head_dim, slots),
            *(_Strides(*x.stride()[:3]) for x in (q, keys, values)),
            -1 if window is None else min(window, 1 << 40),
            _query_rows(batch * kv_heads, queries * heads // kv_heads, window, threads),
            head_dim**-0.5 if scale is None else scale,
        )
        _run("dllm_attention", arguments, q.dtype)
    return out


@attention.register_fake
def _(q, keys, values, start=None, end=None, slot=None, window=None, scale=None):
    return q.new_empty(q.shape)


def _query_rows(heads: int, rows: int, window: int | None, threads: int) -> int:
    """Query rows of a task: as many as leave the threads with the least to do, each task counting as 8 rows more.

    A row's result does not depend on it but through a window, where tiles of slots begin at the task's first.
    """
    if window is not None:
        return 32  # more would see more slots that are not theirs
    rounds = {size: -(-heads * -(-rows // size) // threads) for size in (96, 48, 32, 16)}
    return min(rounds, key=lambda size: rounds[size] * (min(size, rows) + 8))


def _check_attention(q, keys, values, rows: dict, window, scale) -> None:
    tensors = {"q": q, "keys": keys, "values": values}
    if q.dtype not in FLOATS:
        raise ValueError(f"q.dtype={q.dtype} is not {' or '.join(map(str, FLOATS))}")
    for name, x in tensors.items():
        if x.dim() != 4:
            raise ValueError(f"{name}.shape={tuple(x.shape)} is not of 4 dimensions")
        if x.dtype != q.dtype:
            raise ValueError(f"{name}.dtype={x.dtype} differs from q.dtype={q.dtype}")
        if x.stride(3) != 1 and x.shape[3] > 1:
            raise ValueError(f"{name}.stride()={x.stride()}: the last dimension must be contiguous")
    batch, _, heads, head_dim = q.shape
    if keys.shape[0] != batch or keys.shape[3] != head_dim or keys.shape[2] == 0 or heads % keys.shape[2]:
        raise ValueError(f"keys.shape={tuple(keys.shape)} does not fit q.shape={tuple(q.shape)}")
    if values.shape != keys.shape:
        raise ValueError(f"values.shape={tuple(values.shape)} differs from keys.shape={tuple(keys.shape)}")
    for name, x in rows.items():
        if x is not None and (x.shape != (batch,) or x.dtype != torch.int64 or not x.is_contiguous()):
            raise ValueError(f"{name} is {x.dtype} {tuple(x.shape)}, not contiguous int64 ({batch},)")
    if window is not None and window < 0:
        raise ValueError(f"window={window} is negative")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale={scale} is not above 0")
