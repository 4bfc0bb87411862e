"""Weights of linears in four bits, with a scale for each group of 128 inputs: a quarter of bf16's bytes and 3 % more.

    w[n, k] ~ scale[g, n] (q[n, k] - zero[g, n])        g = k // 128        (`reference_rounded.round_int4`)

In Triton a few 16-bit rows are multiplied by q - zero (`kernels/linear_int4.py`), and only the weights are rounded. For
more rows one kernel writes the weights in x's dtype. Elsewhere they are widened some rows at a time.
"""

import copy

import torch

from dllm_fast import ops
from dllm_fast.kernels import reference_rounded

CHUNK = 1024  # rows of a weight that are widened at once
AT_ONCE = 128  # rows that are rounded at once, in fp32


class Int4:
    """A weight [N, K] in four bits, one of `rounded.KINDS`."""

    def __init__(self, n: int, k: int, device: torch.device):
        groups = -(-k // 128)
        self.width = k
        self.matrix = torch.empty(n, 64 * groups, dtype=torch.uint8, device=device)  # [N, 64 G]
        self.scale = torch.empty(groups, n, dtype=torch.bfloat16, device=device)  # [G, N]
        self.zero = torch.empty(groups, n, dtype=torch.uint8, device=device)  # [G, N]

    def fits(self, n: int, k: int, device: torch.device) -> bool:
        """Whether a weight [n, k] on ``device`` can be rounded into this."""
        return (len(self.matrix), self.width) == (n, k) and self.matrix.device == device

    def take(self, first: int, count: int) -> "Int4":
        """``count`` rows from ``first`` on, in the same memory."""
        rows = slice(first, first + count)
        part = copy.copy(self)
        part.matrix = self.matrix[rows]
        part.scale = self.scale[:, rows]
        part.zero = self.zero[:, rows]
        return part

    def write(self, first: int, weight: torch.Tensor) -> None:
        """Round ``weight`` [n, K], of any float dtype, into the n rows from ``first`` on."""
        for done in range(0, len(weight), AT_ONCE):
            part = weight[done : done + AT_ONCE]
            rows = slice(first + done, first + done + len(part))
            self.matrix[rows], self.scale[:, rows], self.zero[:, rows] = reference_rounded.round_int4(part)

    def matmul(self, x: torch.Tensor, gated: bool, impl: str, rope: tuple = ()) -> torch.Tensor | None:
        """`reference.linear` of x [..., K] and the widened weight: [..., N], or [..., N / 2] if ``gated``.

        ``rope``: see `linears.matmuls`.
        """
        y = ops.int4_linear(x, self.matrix, self.scale, self.zero, gated, impl, rope)
        if y is not None or rope:
            return y
        chunk = len(self.matrix) if impl == "triton" else CHUNK
        parts = []
        for first in range(0, len(self.matrix), chunk):
            rows = slice(first, first + chunk)
            weight = ops.widen_int4(
                self.matrix[rows], self.scale[:, rows], self.zero[:, rows], self.width, x.dtype, impl
            )
            parts.append(ops.linear(x, weight, impl=impl))
        y = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
        return ops.swiglu(*y.chunk(2, -1), impl=impl) if gated else y
