"""e4m3 copies of the weights of the layers' linear products: half the bytes of bf16, a scale an output channel.

    w[n, k] ~ scale[n] w8[n, k]        scale[n] = max_k |w[n, k]| / 448        (e4m3: arXiv:2209.05433)

with PyTorch's own rounding cast. Where the chip multiplies e4m3 (Hopper), the rows of x are rounded the same way at
each call and PyTorch's scaled product takes both scales; elsewhere, and for fp32 and wider, the weights alone are
rounded, and multiplied back some rows at a time: right, but not fast.

The model's parameters stay as they are beside the copies, for the model's own forward and for training. The LM head is
left alone: rounding it as well doubles the error of the shipped models' logits (``bench/fp8.py``).
"""

import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from dllm_fast import ops
from dllm_fast.bypass import class_name
from dllm_fast.kernels import reference
from dllm_fast.weights import plain, wants_grad

CHUNK = 1024  # rows of a weight that are wide at once: 1024 x 12,288 in bf16 is 25 MB


def check(model: nn.Module, groups: Iterable[tuple[nn.Module, ...]], device: torch.device) -> None:
    """Raise ValueError where PyTorch cannot hold e4m3, or if a module of the layers is no plain ``nn.Linear``."""
    try:
        torch.zeros(1, dtype=torch.float32, device=device).to(torch.float8_e4m3fn)
    except (AttributeError, RuntimeError, TypeError) as error:
        raise ValueError(f"weights='fp8': PyTorch {torch.__version__} has no float8_e4m3fn on {device}") from error
    names = {module: name for name, module in model.named_modules()}
    for linear in (linear for linears in groups for linear in linears):
        if not plain(linear):
            raise ValueError(f"weights='fp8': {names[linear]} is a {class_name(linear)}, not a plain nn.Linear")


@functools.cache
def native(device: torch.device) -> bool:
    """Whether `torch._scaled_mm` takes a scale a row there. Asked of the chip by one small product.

    Capability alone does not tell: it is (8, 9) and up where the matrix units know e4m3, but some versions of PyTorch
    and of cuBLAS refuse scales by row on chips other than Hopper, and one gave wrong numbers.
    """
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 9):
        return False
    ones = torch.ones(16, 32, dtype=torch.float32, device=device)
    try:
        product = _scaled(ones.bfloat16(), ones.to(torch.float8_e4m3fn), ones[:, :1].contiguous(), "torch")
    except RuntimeError:
        return False
    return bool((product == 32).all())


@dataclass
class _Copy:
    sources: list[nn.Parameter]  # held, so that no other weight can come to lie where they do
    stamps: list[tuple]  # of the sources, see `_stamp`
    matrix: torch.Tensor  # [N, K] e4m3
    scale: torch.Tensor  # [N, 1] fp32
    native: bool


class Fp8:
    """`weights.products` from e4m3 copies, which are made anew when the weights they were made from have changed.

    A change is seen by the parameter's version, which optimizers and ``load_state_dict`` raise, or by its place. What
    writes through ``parameter.data`` raises nothing: patch again. Under ``torch.compile`` no change is seen.
    """

    def __init__(self):
        self.copies: dict[nn.Module, _Copy] = {}  # by a group's first linear

    def refresh(self, groups: Iterable[tuple[nn.Module, ...]]) -> None:
        """Copy every group anew."""
        for linears in groups:
            self.copies[linears[0]] = _copied(linears, self.copies.get(linears[0]))

    def __call__(
        self, x: torch.Tensor, *linears: nn.Module, gated: bool = False, impl: str = "torch"
    ) -> tuple[torch.Tensor, ...]:
        """``linear(x)`` of each, [..., out], with rounded weights; without rounding where a gradient is wanted. The
        product is PyTorch's under every ``impl``."""
        parameters = (parameter for linear in linears for parameter in linear.parameters())
        if wants_grad(itertools.chain([x], parameters)):
            parts = tuple(linear(x) for linear in linears)
            return (ops.swiglu(*parts, impl=impl),) if gated else parts
        copy = self.copies.get(linears[0])
        if not torch.compiler.is_compiling() and (copy is None or copy.stamps != _stamps(linears)):
            copy = self.copies[linears[0]] = _copied(linears, copy)
        plain_rows = not any(linear.bias is not None for linear in linears)
        if plain_rows and (y := ops.scaled_linear(x, copy.matrix, copy.scale[:, 0], gated, impl)) is not None:
            return (y,) if gated else y.split([linear.out_features for linear in linears], -1)
        rows = x.reshape(-1, x.shape[-1])
        if copy.native and len(rows) > 0 and x.dtype in (torch.bfloat16, torch.float16):
            y = _scaled(rows, copy.matrix, copy.scale, impl)
        else:
            y = _widened(rows, copy.matrix, copy.scale)
        parts = y.unflatten(0, x.shape[:-1]).split([linear.out_features for linear in linears], -1)
        parts = tuple(
            part if linear.bias is None else part + linear.bias for part, linear in zip(parts, linears, strict=True)
        )
        return (ops.swiglu(*parts, impl=impl),) if gated else parts


def _scaled(
    x: torch.Tensor,  # [M, K] bf16 or fp16
    matrix: torch.Tensor,  # [N, K] e4m3
    scale: torch.Tensor,  # [N, 1] fp32
    impl: str,
) -> torch.Tensor:
    """x W^T, [M, N], from x rounded to e4m3 by rows. The product by rows comes out as bf16, whatever x is."""
    x8, x_scale = ops.round_rows(x, impl)
    return torch._scaled_mm(x8, matrix.t(), x_scale, scale.t(), out_dtype=torch.bfloat16).to(x.dtype)


def _widened(x: torch.Tensor, matrix: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x W^T, [M, N], from weights multiplied back in fp32 and rounded to x's dtype."""
    parts = zip(matrix.split(CHUNK), scale.split(CHUNK), strict=True)
    return torch.cat([F.linear(x, (part.float() * by).to(x.dtype)) for part, by in parts], -1)


def _stamps(linears: tuple[nn.Module, ...]) -> list[tuple]:
    """What changes when a weight does: how often it was written to, where it lies, its type."""
    found = []
    for linear in linears:
        if not plain(linear):
            raise ValueError(f"weights='fp8': needs plain nn.Linear modules in the layers, not a {class_name(linear)}")
        weight = linear._parameters["weight"]
        found.append((0 if weight.is_inference() else weight._version, weight.data_ptr(), weight.dtype))
    return found


def _copied(linears: tuple[nn.Module, ...], old: _Copy | None) -> _Copy:
    """The copy of the linears' weights, where the old one lies if that can be: a CUDA graph goes on reading there."""
    stamps, weights, done = _stamps(linears), [linear.weight for linear in linears], 0
    n, k = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
    # What is made in inference mode could not be written again outside it.
    with torch.inference_mode(False), torch.no_grad():
        if old is not None and old.matrix.shape == (n, k) and old.matrix.device == weights[0].device:
            matrix, scale = old.matrix, old.scale
        else:
            matrix = weights[0].new_empty(n, k, dtype=torch.float8_e4m3fn)
            scale = weights[0].new_empty(n, 1, dtype=torch.float32)
        for rows in (rows for weight in weights for rows in weight.split(CHUNK)):
            to = slice(done, done + len(rows))
            matrix[to], scale[to] = reference.round_rows(rows)
            done += len(rows)
    # The scaled product wants both sides in sixteens.
    return _Copy(weights, stamps, matrix, scale, n % 16 == k % 16 == 0 and native(matrix.device))
