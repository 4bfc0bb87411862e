"""Rounded weights of the layers' linears, in e4m3 (`fp8`) or four bits (`int4`).

`patch` makes rounded copies: the parameters stay beside them, for the model's own forward and for training. A model
that was loaded rounded (`shards`) has only the rounded weights. Rounding the LM head is a separate option, and its
parameter always stays, because a tied model's embedding reads it.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from dllm_fast import ops
from dllm_fast.families.bypass import class_name
from dllm_fast.families.fp8 import Fp8
from dllm_fast.families.int4 import Int4
from dllm_fast.families.linears import place, plain, stamp, wants_grad

KINDS: dict[str, type[Fp8] | type[Int4]] = {"fp8": Fp8, "int4": Int4}  # by what `patch` calls them
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check(kind: str, model: nn.Module, groups: Iterable[tuple[nn.Module, ...]], device: torch.device) -> None:
    """Raise ValueError if PyTorch cannot hold such weights, or if a module of the layers is not an ``nn.Linear``."""
    require_kind(kind, device)
    names = {module: name for name, module in model.named_modules()}
    for linear in (linear for linears in groups for linear in linears):
        if not isinstance(linear, RoundedLinear) and not plain(linear):
            raise ValueError(f"weights={kind!r}: {names[linear]} {_not_plain(linear)}")


def _not_plain(linear: nn.Module) -> str:
    """Why a module of the layers is not a plain ``nn.Linear``: only its weight would be read."""
    if type(linear) is not nn.Linear:
        return f"is a {class_name(linear)}, not a plain nn.Linear"
    hooks = [*linear._forward_pre_hooks.values(), *linear._forward_hooks.values()]
    if hooks:
        named = ", ".join(getattr(hook, "__qualname__", class_name(hook)) for hook in hooks)
        return f"has a hook that would not run with rounded weights: {named}; remove it first"
    if "forward" in linear.__dict__:
        return "has a forward of its own (an Accelerate hook?) that would not run with rounded weights; remove it first"
    return f"has a {class_name(linear._parameters.get('weight'))} for a weight, not a plain parameter"


def require_kind(kind: str, device: torch.device, argument: str = "weights") -> None:
    """Raise ValueError, naming `patch`'s ``argument``, if ``device`` cannot round and multiply such weights.

    A small weight is tried.
    """
    try:
        matrix = KINDS[kind](1, 16, device)
        ones = torch.ones(1, 16, dtype=torch.float32, device=device)
        matrix.write(0, ones)
        matrix.matmul(ones, False, "torch")
    except (AttributeError, RuntimeError, TypeError) as error:
        lacks = {"fp8": "has no float8_e4m3fn", "int4": "cannot round to four bits"}[kind]
        raise ValueError(f"{argument}={kind!r}: PyTorch {torch.__version__} {lacks} on {device}") from error


@dataclass
class Held:
    """The rounded weights of a group of linears, one below the other, of a model that was loaded rounded."""

    kind: str
    rows: int = 0
    matrix: Fp8 | Int4 | None = None  # None while it is being loaded


class RoundedLinear(nn.Module):
    """An ``nn.Linear`` whose weight is some rows of a rounded matrix, not a parameter: it cannot be trained or saved.

    x [..., in] to [..., out], as the model's own forward calls it. Raises ValueError if a gradient is wanted.
    """

    def __init__(self, linear: nn.Linear, held: Held, first: int):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.held, self.first = held, first
        held.rows += linear.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training or wants_grad([x, *self.parameters()]):
            raise ValueError(f"model: it was loaded with weights={self.held.kind!r}, which cannot be trained")
        y = self.held.matrix.take(self.first, self.out_features).matmul(x, False, "torch")
        return y if self.bias is None else y + self.bias

    def _apply(self, fn, recurse: bool = True) -> "RoundedLinear":
        """Move the weights as integers in ``.to()`` and its like, which would cast floats to another dtype."""
        super()._apply(fn, recurse)
        matrix = self.held.matrix
        for name, x in vars(matrix).items() if matrix is not None else ():
            if isinstance(x, torch.Tensor):
                setattr(matrix, name, fn(x.view(BITS[x.element_size()])).view(x.dtype))
        return self

    def _save_to_state_dict(self, *args) -> None:
        super()._save_to_state_dict(*args)
        if self.held.matrix is not None:
            raise ValueError(
                f"model: it was loaded with weights={self.held.kind!r} and has no weights to save; copy the "
                "checkpoint that it was loaded from"
            )

    def _load_from_state_dict(self, *args) -> None:
        if self.held.matrix is not None:
            raise ValueError(f"model: it was loaded with weights={self.held.kind!r}, which a state dict cannot replace")
        super()._load_from_state_dict(*args)


def loaded_kind(model: nn.Module) -> str | None:
    """The ``weights`` that a model was loaded with; None if it has its own weights."""
    return next((module.held.kind for module in model.modules() if isinstance(module, RoundedLinear)), None)


@dataclass
class _Copy:
    sources: list[torch.Tensor]  # kept alive, so that no other weight can get the same address
    stamps: list[tuple]  # of the sources, see `Copies._stamps`
    matrix: Fp8 | Int4  # their rows, one weight below the other
    sums: torch.Tensor  # of each row, see `row_sums`


class Copies:
    """`linears.matmuls` with rounded copies of the weights, which are rounded again when the weights change.

    A call of the model's forward notices a change by the parameter's version, which optimizers and ``load_state_dict``
    increase, or by its address. A collective and a write through ``parameter.data``, as PEFT merges an adapter, change
    neither: `update` notices these too, by the values, and generation begins with it. Under ``torch.compile`` no change
    is noticed.
    """

    def __init__(self, kind: str):
        self.kind = kind
        self.copies: dict[nn.Module, _Copy] = {}  # by a group's first linear

    def refresh(self, groups: Iterable[tuple[nn.Module, ...]]) -> None:
        """Round every group again."""
        for linears in groups:
            if not isinstance(linears[0], RoundedLinear):
                self.copies[linears[0]] = self._copied(linears)

    def update(self, groups: Iterable[tuple[nn.Module, ...]]) -> None:
        """Round those groups again whose weights changed in any way. Reads every weight once."""
        stale: list[tuple[nn.Module, ...]] = []
        alike: list[tuple[nn.Module, ...]] = []
        for linears in groups:
            if not isinstance(linears[0], RoundedLinear):
                copy = self.copies.get(linears[0])
                known = copy is not None and copy.stamps == self._stamps(linears)
                (alike if known else stale).append(linears)
        if alike:
            copies = [self.copies[linears[0]] for linears in alike]
            now = torch.cat([row_sums(copy.sources) for copy in copies])
            before = torch.cat([copy.sums for copy in copies])
            changed = (now != before).cpu().split([len(copy.sums) for copy in copies])  # one wait for the device
            stale += [linears for linears, rows in zip(alike, changed, strict=True) if bool(rows.any())]
        self.refresh(stale)

    def places(self, groups: Iterable[tuple[nn.Module, ...]]) -> tuple:
        """Where the rounded weights lie, which a recorded step reads."""
        first = (linears[0] for linears in groups)
        held = (x.held.matrix if isinstance(x, RoundedLinear) else self.copies[x].matrix for x in first)
        return tuple(place(x) for matrix in held for x in vars(matrix).values() if isinstance(x, torch.Tensor))

    def __call__(
        self, x: torch.Tensor, *linears: nn.Module, gated: bool = False, impl: str = "torch", rope: tuple = ()
    ) -> tuple[torch.Tensor, ...] | torch.Tensor | None:
        """``linear(x)`` of each, [..., out], with rounded weights; with the parameters if a gradient is wanted."""
        parameters = (parameter for linear in linears for parameter in linear.parameters())
        if wants_grad(itertools.chain([x], parameters)):
            if rope:
                return None
            parts = tuple(linear(x) for linear in linears)
            return (ops.swiglu(*parts, impl=impl),) if gated else parts
        matrix = self._matrix(linears)
        widths = [linear.out_features for linear in linears]
        biased = any(linear.bias is not None for linear in linears)
        if rope:
            return None if biased else matrix.matmul(x, False, impl, rope)
        if not biased:
            y = matrix.matmul(x, gated, impl)
            return (y,) if gated else y.split(widths, -1)
        pairs = zip(matrix.matmul(x, False, impl).split(widths, -1), linears, strict=True)
        parts = tuple(part if linear.bias is None else part + linear.bias for part, linear in pairs)
        return (ops.swiglu(*parts, impl=impl),) if gated else parts

    def _matrix(self, linears: tuple[nn.Module, ...]) -> Fp8 | Int4:
        if isinstance(linears[0], RoundedLinear):
            return linears[0].held.matrix
        copy = self.copies.get(linears[0])
        if not torch.compiler.is_compiling() and (copy is None or copy.stamps != self._stamps(linears)):
            copy = self.copies[linears[0]] = self._copied(linears)
        return copy.matrix

    def _stamps(self, linears: tuple[nn.Module, ...]) -> list[tuple]:
        """For each weight, what changes when it does: how often it was written to, its address, its dtype."""
        stamps = []
        for linear in linears:
            if not plain(linear):
                raise ValueError(f"weights={self.kind!r}: a linear of the layers {_not_plain(linear)}")
            stamps.append(stamp(linear._parameters["weight"]))
        return stamps

    def _copied(self, linears: tuple[nn.Module, ...]) -> _Copy:
        """A copy of the linears' weights, in the old one's memory if it fits: CUDA graphs go on reading there."""
        stamps = self._stamps(linears)
        weights: list[torch.Tensor] = [linear.get_parameter("weight") for linear in linears]
        return _copied(self.kind, weights, stamps, self.copies.get(linears[0]))


class RoundedHead:
    """An LM head's weight in e4m3, rounded again when the weight changes, as `Copies` are."""

    def __init__(self):
        self.copy: _Copy | None = None

    def refresh(self, weight: torch.Tensor) -> None:
        """Round the head's weight [V, d] again."""
        self.copy = _copied("fp8", [weight], [stamp(weight)], self.copy)

    def update(self, weight: torch.Tensor) -> None:
        """Round it again if it changed in any way."""
        if self._stale(weight) or not torch.equal(row_sums([weight]), self.copy.sums):
            self.refresh(weight)

    def places(self) -> tuple:
        """Where the rounded weight lies, which a recorded step reads."""
        return place(self.copy.matrix.matrix), place(self.copy.matrix.scale)

    def _stale(self, weight: torch.Tensor) -> bool:
        return self.copy is None or self.copy.stamps != [stamp(weight)]

    def __call__(
        self, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """The weight in e4m3 [V, d], the bias as it is, and the scale [V]."""
        if not torch.compiler.is_compiling() and self._stale(weight):
            self.refresh(weight)
        rounded = self.copy.matrix
        return rounded.matrix, bias, rounded.scale[:, 0]


@torch.no_grad()
def row_sums(weights: Iterable[torch.Tensor]) -> torch.Tensor:
    """For each row of weights [n, K], the sum of its bits as integers, [sum of n] int64: another one once the row was
    written, unless the changes in it cancel out to the last bit."""
    sums = []
    for weight in weights:
        rows = weight.contiguous()
        size = 8 if rows.shape[1] * rows.element_size() % 8 == 0 else rows.element_size()
        sums.append(rows.view(BITS[size]).sum(1, dtype=torch.int64))
    return torch.cat(sums)


def _copied(kind: str, weights: list[torch.Tensor], stamps: list[tuple], old: _Copy | None) -> _Copy:
    """A rounded copy of weights [n, K], one below the other, in the memory of ``old`` if it fits."""
    shape = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
    # Tensors that are made in inference mode could not be written outside it.
    with torch.inference_mode(False), torch.no_grad():
        if old is not None and old.matrix.fits(*shape, weights[0].device):
            matrix = old.matrix
        else:
            matrix = KINDS[kind](*shape, weights[0].device)
        first = 0
        for weight in weights:
            matrix.write(first, weight)
            first += len(weight)
        sums = row_sums(weights)
    return _Copy(weights, stamps, matrix, sums)
