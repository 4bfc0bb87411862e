"""The compiled extension's RMSNorm, SwiGLU and RoPE as custom ops: kernels that read their input once."""

import ctypes

import torch

from dllm_fast.cpu.compiled import _check, _check_float, _define, _pointer, _run, _Strides
from dllm_fast.kernels.reference_rounded import E4M3


class _RmsNorm(ctypes.Structure):
    """`RmsNorm` of csrc/cpu/api.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "residual", "weight", "y", "sum")),
        *((name, ctypes.c_int64) for name in ("rows", "width", "x_stride", "residual_stride", "chunk")),
        ("eps", ctypes.c_double),
    )


def _rms_norm(x, weight, eps, residual=None):
    """y and h. A custom op may not return its input: without a residual h is empty, and `rms_norm` returns x."""
    _check_float("weight", weight, 1)
    rows = (*x.shape[:-1], *weight.shape)
    _check(weight.dtype, x=(x, rows), weight=(weight, weight.shape), residual=(residual, rows))
    y = _like(x)
    h = torch.empty(0, dtype=x.dtype, device=x.device) if residual is None else _like(x)
    if y.numel():
        width = x.shape[-1]
        x, stride = _rows(x)
        residual, residual_stride = (None, 0) if residual is None else _rows(residual)
        arguments = _RmsNorm(
            *(x.data_ptr(), _pointer(residual), weight.data_ptr(), y.data_ptr(), h.data_ptr()),
            *(x.numel() // width, width, stride, residual_stride, 0, eps),
        )
        _run("dllm_rms_norm", arguments, x.dtype)
    return y, h


def _like(x: torch.Tensor) -> torch.Tensor:
    """An empty contiguous tensor of x's shape, in half the time of ``torch.empty``."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """x [..., d] as rows, and the stride between them; a copy if there is no single stride."""
    if x.is_contiguous():
        return x, x.shape[-1]
    x = x.reshape(-1, x.shape[-1])
    return x, x.stride(0)


_rms_norm_op = _define(
    "cpu_rms_norm(Tensor x, Tensor weight, float eps, Tensor? residual=None) -> (Tensor, Tensor)",
    _rms_norm,
    lambda x, weight, eps, residual=None: (x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape)),
)


def rms_norm(
    x: torch.Tensor,  # [..., d]
    weight: torch.Tensor,  # [d]
    eps: float,
    residual: torch.Tensor | None = None,  # [..., d]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.rms_norm` for fp32 and bf16. Under autocast x and residual may have different dtypes.

    Raises:
        ValueError: a shape, dtype or stride that does not fit; it names the tensor.
    """
    if residual is not None and residual.dtype != x.dtype:
        wide = torch.promote_types(x.dtype, residual.dtype)
        x = x.to(wide)
        residual = residual.to(wide)
    y, h = _rms_norm_op(x, weight, eps, residual)
    return y, x if residual is None else h


class _SwiGlu(ctypes.Structure):
    """`SwiGlu` of csrc/cpu/api.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("gate", "up", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "width", "gate_stride", "up_stride", "chunk")),
    )


def _swiglu(
    gate: torch.Tensor,  # [..., f]
    up: torch.Tensor,  # [..., f]
) -> torch.Tensor:
    """`reference.swiglu` for fp32 and bf16: one rounding.

    Raises:
        ValueError: a shape, dtype or stride that does not fit; it names the tensor.
    """
    _check_float("gate", gate, max(gate.dim(), 1))
    _check(gate.dtype, gate=(gate, gate.shape), up=(up, gate.shape))
    out = _like(gate)
    if out.numel():
        width = gate.shape[-1]
        (x, x_stride), (y, y_stride) = _rows(gate), _rows(up)
        arguments = _SwiGlu(
            x.data_ptr(), y.data_ptr(), out.data_ptr(), out.numel() // width, width, x_stride, y_stride, 0
        )
        _run("dllm_swiglu", arguments, gate.dtype)
    return out


swiglu = _define("cpu_swiglu(Tensor gate, Tensor up) -> Tensor", _swiglu, lambda gate, up: gate.new_empty(gate.shape))


class _Rope(ctypes.Structure):
    """`Rope` of csrc/cpu/api.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "cos", "sin", "position", "slot", "row")),
        *((name, ctypes.c_void_p) for name in ("out", "keys", "values")),
        *((name, ctypes.c_int64) for name in ("batch", "queries", "heads", "kv_heads", "head_dim", "slots")),
        *((name, ctypes.c_int64) for name in ("positions", "cos_stride", "sin_stride")),
        *((name, _Strides) for name in ("q_stride", "k_stride", "v_stride", "keys_stride", "values_stride")),
        *((name, ctypes.c_int64) for name in ("e4m3", "chunk")),
    )


def _rope(
    q: torch.Tensor,  # [B, T, H, D]
    k: torch.Tensor,  # [B, T, G, D]
    v: torch.Tensor | None,  # [B, T, G, D]
    cos: torch.Tensor,  # [P, D/2] fp32
    sin: torch.Tensor,  # [P, D/2] fp32
    position: torch.Tensor | None,  # [B] int64: position of each row's first query
    slot: torch.Tensor | None,  # [B] int64: buffer slot of each row's first query
    keys: torch.Tensor,  # [R, S, G, D], written in place
    values: torch.Tensor | None,  # [R, S, G, D], written in place
    to_row: torch.Tensor | None = None,  # [B] int64: which of the buffers' rows; None: each its own
) -> torch.Tensor:
    _check_float("q", q, 4)
    batch, queries, heads, head_dim = q.shape
    if head_dim % 2:
        raise ValueError(f"q.shape={tuple(q.shape)}: the head dim is odd")
    if k.dim() != 4:
        raise ValueError(f"k.shape={tuple(k.shape)} does not fit q.shape={tuple(q.shape)}")
    row, kv_heads = (batch, queries, k.shape[2], head_dim), k.shape[2]
    buffer = (*(keys.shape[:1] if to_row is not None else (batch,)), *keys.shape[1:2], kv_heads, head_dim)
    _check(q.dtype, q=(q, q.shape), k=(k, row), v=(v, row))
    _check(E4M3 if keys.dtype == E4M3 else q.dtype, keys=(keys, buffer), values=(values, buffer))
    table = (*cos.shape[:1], head_dim // 2)
    _check(torch.float32, cos=(cos, table), sin=(sin, table))
    _check(torch.int64, position=(position, (batch,)), slot=(slot, (batch,)), row=(to_row, (batch,)))
    out = _like(q)
    if out.numel() or k.numel():
        if not cos.shape[0]:
            raise ValueError(f"cos.shape={tuple(cos.shape)} holds no position")
        arguments = _Rope(
            *map(_pointer, (q, k, v, cos, sin, position, slot, to_row, out, keys, values)),
            *(batch, queries, heads, kv_heads, head_dim, keys.shape[1], cos.shape[0], cos.stride(0), sin.stride(0)),
            *((0, 0, 0) if x is None else x.stride()[:3] for x in (q, k, v, keys, values)),
            keys.dtype == E4M3,
        )
        _run("dllm_rope", arguments, q.dtype)
    return out


def _rotated(q, k, cos, sin, position):
    turned = _like(k)
    return _rope(q, k, None, cos, sin, position, None, turned, None, None), turned


_rope_op = _define(
    "cpu_rope(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor? position, Tensor? slot, Tensor(a!) keys, "
    "Tensor(b!) values, Tensor? row=None) -> Tensor",
    _rope,
    lambda q, *rest: q.new_empty(q.shape),
)
_rotated_op = _define(
    "cpu_rotated(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? position) -> (Tensor, Tensor)",
    _rotated,
    lambda q, k, *rest: (q.new_empty(q.shape), k.new_empty(k.shape)),
)


def rope(
    q: torch.Tensor,  # [B, T, H, D]
    k: torch.Tensor,  # [B, T, G, D]
    v: torch.Tensor,  # [B, T, G, D]
    cos: torch.Tensor,  # [P, D/2] fp32
    sin: torch.Tensor,  # [P, D/2] fp32
    position: torch.Tensor | None = None,  # [B] int64: position of each row's first query
    slot: torch.Tensor | None = None,  # [B] int64: buffer slot of each row's first query
    keys: torch.Tensor | None = None,  # [R, S, G, D], written in place
    values: torch.Tensor | None = None,  # [R, S, G, D], written in place
    row: torch.Tensor | None = None,  # [B] int64: which of the buffers' rows; None: each its own
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`reference.rope` for fp32 and bf16, into buffers of that or of e4m3: the rotated q, the keys and the values.

    Without buffers it returns the rotated k, and v itself. ``position`` and ``slot`` default to 0. The strides are free
    but for the last dimension's.

    Raises:
        ValueError: a shape, dtype or stride that does not fit; it names the tensor.
    """
    if (keys is None) != (values is None):
        raise ValueError(f"keys and values go together; keys={keys!r}, values={values!r}")
    if keys is None or values is None:
        return *_rotated_op(q, k, cos, sin, position), v
    return _rope_op(q, k, v, cos, sin, position, slot, keys, values, row), keys, values
