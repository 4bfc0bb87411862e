"""Linears that share an input, run as one matmul; no second copy of a weight is kept.

`fuse` moves the weights of such linears into one buffer and makes each of them a view of its rows. The Parameter
objects stay, so optimizers, state dicts, hooks and tied names work as before, and a weight that is written in place is
seen. Nothing else is kept: each call of `matmuls` checks that the weights are still adjacent, and calls the modules if
they are not (after ``.to()``, ``load_state_dict(assign=True)``, or with an adapter in a module's place). It is never
wrong, only slower until the weights are fused again.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from dllm_fast import ops
from dllm_fast.families.bypass import class_name
from dllm_fast.families.ranks import SummedLinear

Matmuls = Callable[..., tuple[torch.Tensor, ...] | torch.Tensor | None]  # `matmuls`, or `rounded.Copies`


def matmuls(
    x: torch.Tensor, *linears: nn.Module, gated: bool = False, impl: str = "torch", rope: tuple = ()
) -> tuple[torch.Tensor, ...] | torch.Tensor | None:
    """``linear(x)`` of each, [..., out]: slices of one matmul if their weights are fused.

    ``gated``: the two are a gate and an up projection; returns (``swiglu(gate, up)``,). ``rope``: they are those of q,
    k and v; returns the rotated q as `ops.scaled_linear` does, or None if no kernel serves.

    They run one by one if a gradient is wanted, which must reach each parameter, and under ``torch.compile``, which
    does not see addresses: compiled code may outlive the fusion. Plain linears are not called as modules, because a
    call costs as much as a small matmul.
    """
    if rope:
        matrix = None if torch.compiler.is_compiling() else fused(linears)
        return None if matrix is None else ops.scaled_linear(x, matrix, None, impl=impl, rope=rope)
    if len(linears) > 1 and not torch.compiler.is_compiling():
        matrix = fused(linears)
        if matrix is not None and gated:
            return (ops.swiglu_linear(x, matrix, impl=impl),)
        if matrix is not None:
            return ops.linear(x, matrix, impl=impl).split_with_sizes([linear.out_features for linear in linears], -1)
    parts = tuple(_product(x, linear, impl) for linear in linears)
    return (ops.swiglu(*parts, impl=impl),) if gated else parts


def _product(x: torch.Tensor, linear: nn.Module, impl: str) -> torch.Tensor:
    if plain(linear):
        return ops.linear(x, linear._parameters["weight"], linear._parameters["bias"], impl=impl)
    return linear(x, impl=impl) if type(linear) is SummedLinear else linear(x)


def fused(linears: Sequence[nn.Module]) -> torch.Tensor | None:
    """The matrix [sum of out, in] of the linears' weights; None if not adjacent, not plain or to be trained."""
    weights = _bare_weights(linears)
    if not weights or wants_grad(weights) or not _lie_together(weights):
        return None
    width = weights[0].shape[1]
    return weights[0].as_strided((sum(len(weight) for weight in weights), width), (width, 1))


@dataclass
class Fused:
    """Weights that `fuse` moved, and the hooks to remove when they are moved back."""

    weights: list[nn.Parameter]
    hooks: list[RemovableHandle]

    def unhook(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def separate(self) -> None:
        """Give the weights that are still in one buffer their own storages, with their current values."""
        self.unhook()
        together = sum(weight.nbytes for weight in self.weights)
        with torch.inference_mode(False), torch.no_grad():
            for weight in self.weights:
                if weight.untyped_storage().nbytes() == together:
                    weight.data = weight.detach().clone()


def fuse(linears: Sequence[nn.Module]) -> Fused | None:
    """Move the weights of ``linears`` into one buffer; None if nothing was moved.

    Nothing is moved if it does not pay (`pays`); if they are in one buffer already; if a module is not a plain
    ``nn.Linear`` (an adapter, a quantised weight, hooks, a bias); if dtypes, devices or widths differ; or if a weight
    cannot be moved, because other processes share it, it was made in inference mode, or it is in the group twice. While
    it runs, it needs the memory of these weights a second time. If there is not enough it raises, and changes nothing.
    """
    weights = _bare_weights(linears)
    alike = len({(weight.dtype, weight.device, weight.shape[1]) for weight in weights}) == 1
    if len(set(weights)) < 2 or not alike or not pays(weights[0]):
        return None
    if not all(map(_movable, weights)) or _lie_together(weights):
        return None
    # Data that is made in inference mode could never be trained.
    with torch.inference_mode(False), torch.no_grad():
        matrix = weights[0].new_empty(sum(len(weight) for weight in weights), weights[0].shape[1])
        parts = matrix.split([len(weight) for weight in weights])
        for weight, part in zip(weights, parts, strict=True):
            part.copy_(weight)
        for weight, part in zip(weights, parts, strict=True):
            weight.data = part
    return Fused(weights, [linear.register_state_dict_post_hook(_own_storage) for linear in linears])


def _bare_weights(linears: Sequence[nn.Module]) -> list[nn.Parameter]:
    """The weights of plain linears without a bias; empty unless all of them are."""
    weights = []
    for linear in linears:
        weight = linear._parameters.get("weight")
        if weight is None or not plain(linear) or linear._parameters["bias"] is not None:
            return []
        weights.append(weight)
    return weights


def _own_storage(linear: nn.Linear, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    """In a state dict, give the weight its own storage over the same memory.

    Libraries that save checkpoints recognise tied weights by their storage: Accelerate would write the first weight of
    a group and drop the others, and safetensors' ``save_model`` would refuse.
    """
    weight = state_dict.get(f"{prefix}weight")
    if type(weight) is torch.Tensor and weight.untyped_storage().nbytes() > weight.nbytes:
        state_dict[f"{prefix}weight"] = torch.from_dlpack(weight)


def pays(weight: torch.Tensor) -> bool:
    """Whether one matmul of several such weights costs less than one matmul for each.

    On a GPU it saves launches, and a few rows fill more of the chip. On a CPU it saves the fixed cost of a bf16 matmul,
    a tenth of the time of q, k and v for 32 rows at width 768. In fp32 and fp16 it saves nothing, and the gate is
    slower, because its two halves are read from longer rows.
    """
    return weight.device.type != "cpu" or weight.dtype == torch.bfloat16


def plain(linear: nn.Module) -> bool:
    """Whether a call does nothing but multiply by its weight and add its bias (no hook, adapter or quantisation)."""
    return (
        type(linear) is nn.Linear
        and type(linear._parameters.get("weight")) is nn.Parameter
        and not (linear._forward_hooks or linear._forward_pre_hooks or "forward" in linear.__dict__)
    )


def require_weights(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise ValueError naming the first of the (name, module) pairs whose weight is not a plain parameter."""
    for name, module in modules:
        if type(module._parameters.get("weight")) is not nn.Parameter:
            raise ValueError(
                f"model: {name} is a {class_name(module)} without a plain weight of its own; before patching, merge or "
                "remove what replaces it, and do not quantise it"
            )


def place(weight: torch.Tensor) -> tuple:
    """Where a weight lies, and as what; a quantised tensor has no one address, so its id."""
    address = weight.data_ptr() if type(weight) in (torch.Tensor, nn.Parameter) else id(weight)
    return address, weight.shape, weight.dtype


def stamp(weight: torch.Tensor) -> tuple:
    """`place`, and how often a weight was written to: not through ``.data``, and not by a collective's kernel."""
    return *place(weight), 0 if weight.is_inference() else weight._version


def wants_grad(weights: Iterable[torch.Tensor]) -> bool:
    return torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)


def _movable(weight: nn.Parameter) -> bool:
    floats = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    return weight.dtype in floats and not weight.is_inference() and (weight.is_cuda or not weight.is_shared())


def _lie_together(weights: Sequence[nn.Parameter]) -> bool:
    first = weights[0]
    end = first.data_ptr()
    for weight in weights:
        if weight.data_ptr() != end or weight.dtype != first.dtype or weight.stride() != (first.shape[1], 1):
            return False
        end += weight.nbytes
    # Adjacent memory may belong to separate storages, and no view may span those.
    storage = first.untyped_storage()
    return end <= storage.data_ptr() + storage.nbytes()
