"""Weights of linears in e4m3: half the bytes of bf16, a scale an output channel.

    w[n, k] ~ scale[n] w8[n, k]        scale[n] = max_k |w[n, k]| / 448        (e4m3: arXiv:2209.05433)

rounded by PyTorch's own cast. On Hopper a few rows are multiplied by the e4m3 weights (`kernels/linear.py`), and only
the weights are rounded. If the chip multiplies e4m3, more rows are rounded the same way at each call, for PyTorch's
scaled matmul, which takes both scales. Elsewhere, and in fp32 and wider, the weights are widened some rows at a time:
right, but not fast.
"""

import copy
import functools

import torch

from dllm_fast import ops
from dllm_fast.kernels import reference_rounded

CHUNK = 1024  # rows of a weight that are widened at once: 1024 x 12,288 in bf16 is 25 MB
AT_ONCE = 128  # rows that are rounded at once, in fp32


class Fp8:
    """A weight [N, K] in e4m3, one of `rounded.KINDS`."""

    def __init__(self, n: int, k: int, device: torch.device):
        self.matrix = torch.empty(n, k, dtype=torch.float8_e4m3fn, device=device)  # [N, K]
        self.scale = torch.empty(n, 1, dtype=torch.float32, device=device)  # [N, 1]

    def fits(self, n: int, k: int, device: torch.device) -> bool:
        """Whether a weight [n, k] on ``device`` can be rounded into this."""
        return self.matrix.shape == (n, k) and self.matrix.device == device

    def take(self, first: int, count: int) -> "Fp8":
        """``count`` rows from ``first`` on, in the same memory."""
        rows = slice(first, first + count)
        part = copy.copy(self)
        part.matrix = self.matrix[rows]
        part.scale = self.scale[rows]
        return part

    def write(self, first: int, weight: torch.Tensor) -> None:
        """Round ``weight`` [n, K], of any float dtype, into the n rows from ``first`` on."""
        for done in range(0, len(weight), AT_ONCE):
            part = weight[done : done + AT_ONCE]
            rows = slice(first + done, first + done + len(part))
            self.matrix[rows], self.scale[rows] = reference_rounded.round_rows(part)

    def matmul(self, x: torch.Tensor, gated: bool, impl: str, rope: tuple = ()) -> torch.Tensor | None:
        """`reference.linear` of x [..., K] and the weight: [..., N], or [..., N / 2] if ``gated``.

        ``rope``: see `linears.matmuls`.
        """
        y = ops.scaled_linear(x, self.matrix, self.scale[:, 0], gated, impl, rope)
        if y is not None or rope:
            return y
        rows = x.reshape(-1, x.shape[-1])
        # The scaled matmul needs both lengths to be multiples of 16.
        sixteens = all(length % 16 == 0 for length in self.matrix.shape)
        if sixteens and len(rows) > 0 and x.dtype in (torch.bfloat16, torch.float16) and native(x.device):
            y = _scaled(rows, self.matrix, self.scale, impl)
        else:
            parts = zip(self.matrix.split(CHUNK), self.scale.split(CHUNK), strict=True)
            y = torch.cat([ops.linear(rows, (part.float() * by).to(x.dtype), impl=impl) for part, by in parts], -1)
        y = y.unflatten(0, x.shape[:-1])
        return ops.swiglu(*y.chunk(2, -1), impl=impl) if gated else y


@functools.cache
def native(device: torch.device) -> bool:
    """Whether `torch._scaled_mm` takes a scale for each row there, found by one small matmul.

    The capability is not enough: from (8, 9) on the matrix units multiply e4m3, but some versions of PyTorch and cuBLAS
    refuse row scales on chips other than Hopper, and one gave wrong numbers.
    """
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 9):
        return False
    ones = torch.ones(16, 32, dtype=torch.float32, device=device)
    try:
        y = _scaled(ones.bfloat16(), ones.to(torch.float8_e4m3fn), ones[:, :1].contiguous(), "torch")
    except RuntimeError:
        return False
    return bool((y == 32).all())


def _scaled(
    x: torch.Tensor,  # [M, K] bf16 or fp16
    matrix: torch.Tensor,  # [N, K] e4m3
    scale: torch.Tensor,  # [N, 1] fp32
    impl: str,
) -> torch.Tensor:
    """x W^T, [M, N], with the rows of x rounded to e4m3. `torch._scaled_mm` with row scales only returns bf16."""
    x8, x_scale = ops.round_rows(x, impl)
    return torch._scaled_mm(x8, matrix.t(), x_scale, scale.t(), out_dtype=torch.bfloat16).to(x.dtype)
