"""Rounded copies of the weights of the layers' linear products, in e4m3 (`fp8`) or four bits (`int4`).

The model's parameters stay as they are beside the copies, for the model's own forward and for training. The LM head is
left alone: rounding it as well doubles the error of the shipped models' logits (``bench/rounded.py``).
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from dllm_fast import ops
from dllm_fast.bypass import class_name
from dllm_fast.fp8 import Fp8
from dllm_fast.int4 import Int4
from dllm_fast.weights import plain, wants_grad

KINDS = {"fp8": Fp8, "int4": Int4}  # by what `patch` calls them


def check(kind: str, model: nn.Module, groups: Iterable[tuple[nn.Module, ...]], device: torch.device) -> None:
    """Raise ValueError where PyTorch cannot hold such weights, or if a module of the layers is no ``nn.Linear``."""
    require_kind(kind, device)
    names = {module: name for name, module in model.named_modules()}
    for linear in (linear for linears in groups for linear in linears):
        if not plain(linear):
            raise ValueError(f"weights={kind!r}: {names[linear]} is a {class_name(linear)}, not a plain nn.Linear")


def require_kind(kind: str, device: torch.device) -> None:
    """Raise ValueError where ``device`` cannot round and multiply such weights, by trying it on a small one."""
    try:
        matrix = KINDS[kind](1, 16, device)
        ones = torch.ones(1, 16, dtype=torch.float32, device=device)
        matrix.write(0, ones)
        matrix.product(ones, False, "torch")
    except (AttributeError, RuntimeError, TypeError) as error:
        lacks = {"fp8": "has no float8_e4m3fn", "int4": "cannot round to four bits"}[kind]
        raise ValueError(f"weights={kind!r}: PyTorch {torch.__version__} {lacks} on {device}") from error


@dataclass
class _Copy:
    sources: list[nn.Parameter]  # held, so that no other weight can come to lie where they do
    stamps: list[tuple]  # of the sources, see `Copies._stamps`
    matrix: Fp8 | Int4  # their rows, one weight below the other


class Copies:
    """`weights.products` from rounded copies, which are made anew when the weights they were made from have changed.

    A change is seen by the parameter's version, which optimizers and ``load_state_dict`` raise, or by its place. What
    writes through ``parameter.data`` raises nothing: patch again. Under ``torch.compile`` no change is seen.
    """

    def __init__(self, kind: str):
        self.kind = kind
        self.copies: dict[nn.Module, _Copy] = {}  # by a group's first linear

    def refresh(self, groups: Iterable[tuple[nn.Module, ...]]) -> None:
        """Copy every group anew."""
        for linears in groups:
            self.copies[linears[0]] = self._copied(linears)

    def __call__(
        self, x: torch.Tensor, *linears: nn.Module, gated: bool = False, impl: str = "torch"
    ) -> tuple[torch.Tensor, ...]:
        """``linear(x)`` of each, [..., out], with rounded weights; without rounding where a gradient is wanted."""
        parameters = (parameter for linear in linears for parameter in linear.parameters())
        if wants_grad(itertools.chain([x], parameters)):
            parts = tuple(linear(x) for linear in linears)
            return (ops.swiglu(*parts, impl=impl),) if gated else parts
        copy = self.copies.get(linears[0])
        if not torch.compiler.is_compiling() and (copy is None or copy.stamps != self._stamps(linears)):
            copy = self.copies[linears[0]] = self._copied(linears)
        if not any(linear.bias is not None for linear in linears):
            y = copy.matrix.product(x, gated, impl)
            return (y,) if gated else y.split([linear.out_features for linear in linears], -1)
        parts = copy.matrix.product(x, False, impl).split([linear.out_features for linear in linears], -1)
        parts = tuple(
            part if linear.bias is None else part + linear.bias for part, linear in zip(parts, linears, strict=True)
        )
        return (ops.swiglu(*parts, impl=impl),) if gated else parts

    def _stamps(self, linears: tuple[nn.Module, ...]) -> list[tuple]:
        """What changes when a weight does: how often it was written to, where it lies, its type."""
        found = []
        for linear in linears:
            if not plain(linear):
                raise ValueError(
                    f"weights={self.kind!r}: needs plain nn.Linear modules in the layers, not a {class_name(linear)}"
                )
            weight = linear._parameters["weight"]
            found.append((0 if weight.is_inference() else weight._version, weight.data_ptr(), weight.dtype))
        return found

    def _copied(self, linears: tuple[nn.Module, ...]) -> _Copy:
        """A copy of the linears' weights, where the old one lies if that can be: a CUDA graph goes on reading there."""
        old, stamps = self.copies.get(linears[0]), self._stamps(linears)
        weights = [linear.weight for linear in linears]
        shape = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
        # What is made in inference mode could not be written again outside it.
        with torch.inference_mode(False), torch.no_grad():
            if old is not None and old.matrix.fits(*shape, weights[0].device):
                matrix = old.matrix
            else:
                matrix = KINDS[self.kind](*shape, weights[0].device)
            first = 0
            for weight in weights:
                matrix.write(first, weight)
                first += len(weight)
        return _Copy(weights, stamps, matrix)
