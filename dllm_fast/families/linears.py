"""Linears that share an input, run as one matmul; no second copy of a weight is kept.

`fuse` moves the weights of such linears into one buffer, one below the other, and makes each a view of its rows. The
Parameter objects stay, so optimizers, state dicts, hooks and tied names work as before, and the matmul sees a weight
that is written in place. Nothing else is kept: at each call `matmuls` checks that the weights are still one below the
other, and calls the modules if not (after ``.to()``, ``load_state_dict(assign=True)``, an adapter in a module's place).
It is never wrong, only slower until the weights are fused again.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from dllm_fast import ops
from dllm_fast.families.bypass import class_name

Matmuls = Callable[..., tuple[torch.Tensor, ...]]  # `matmuls`, or another way to the same


def matmuls(x: torch.Tensor, *linears: nn.Module, gated: bool = False, impl: str = "torch") -> tuple[torch.Tensor, ...]:
    """``linear(x)`` of each, [..., out]; slices of one matmul if their weights are fused.

    ``gated``: of a gate and an up projection; (``swiglu(gate, up)``,) instead of the two.

    They run one by one if a gradient is wanted, which must reach each parameter, and under ``torch.compile``, which
    does not see where weights are: compiled code may outlive the fusion. A plain linear's module is not called: the
    call costs as much as a small matmul.
    """
    if len(linears) > 1 and not torch.compiler.is_compiling():
        matrix = fused(linears)
        if matrix is not None and gated:
            return (ops.swiglu_linear(x, matrix, impl=impl),)
        if matrix is not None:
            return ops.linear(x, matrix, impl=impl).split_with_sizes([linear.out_features for linear in linears], -1)
    parts = tuple(
        ops.linear(x, linear._parameters["weight"], linear._parameters["bias"], impl=impl)
        if plain(linear)
        else linear(x)
        for linear in linears
    )
    return (ops.swiglu(*parts, impl=impl),) if gated else parts


def fused(linears: Sequence[nn.Module]) -> torch.Tensor | None:
    """The matrix [sum of out, in] whose rows are the linears' weights; None where they are apart or have more to do."""
    if not all(plain(linear) and linear._parameters["bias"] is None for linear in linears):
        return None
    weights = [linear._parameters["weight"] for linear in linears]
    if wants_grad(weights) or not _lie_together(weights):
        return None
    rows, width = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
    return weights[0].as_strided((rows, width), (width, 1))


@dataclass
class Fused:
    """Weights that `fuse` moved, and what must go when they are moved back."""

    weights: list[nn.Parameter]
    hooks: list[RemovableHandle]

    def unhook(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def separate(self) -> None:
        """Move the weights that are still in one buffer into storages of their own, with the values they have now."""
        self.unhook()
        together = sum(weight.nbytes for weight in self.weights)
        with torch.inference_mode(False), torch.no_grad():
            for weight in self.weights:
                if weight.untyped_storage().nbytes() == together:
                    weight.data = weight.detach().clone()


def fuse(linears: Sequence[nn.Module]) -> Fused | None:
    """Move the weights of ``linears`` into one buffer; None if nothing was moved.

    Nothing is moved if it does not pay (`pays`); if they are in one buffer already; if a module is no plain
    ``nn.Linear`` (an adapter, a quantised weight, one with hooks or a bias); if dtypes, devices or
    widths differ; or if a weight cannot be moved: it is shared with other processes, was made in inference mode, or is
    there twice. Needs the memory of these weights once more while it runs; if there is not enough, raises and leaves
    everything as it was.
    """
    if not all(plain(linear) and linear._parameters["bias"] is None for linear in linears):
        return None
    weights = [linear._parameters["weight"] for linear in linears]
    alike = len({(weight.dtype, weight.device, weight.shape[1]) for weight in weights}) == 1
    if len(set(weights)) < 2 or not alike or not pays(weights[0]):
        return None
    if not all(map(_movable, weights)) or _lie_together(weights):
        return None
    # A parameter whose data was made in inference mode could never be trained again.
    with torch.inference_mode(False), torch.no_grad():
        matrix = weights[0].new_empty(sum(weight.shape[0] for weight in weights), weights[0].shape[1])
        parts = matrix.split([weight.shape[0] for weight in weights])
        for weight, part in zip(weights, parts, strict=True):
            part.copy_(weight)
        for weight, part in zip(weights, parts, strict=True):
            weight.data = part
    return Fused(weights, [linear.register_state_dict_post_hook(_own_storage) for linear in linears])


def _own_storage(linear: nn.Linear, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    """Let a state dict hold the weight as a storage of its own, over the same memory.

    Whoever saves checkpoints tells tied weights by their storage: Accelerate would write the first weight of a group
    and drop the others, safetensors' ``save_model`` refuses.
    """
    weight = state_dict.get(f"{prefix}weight")
    if type(weight) is torch.Tensor and weight.untyped_storage().nbytes() > weight.nbytes:
        state_dict[f"{prefix}weight"] = torch.from_dlpack(weight)


def pays(weight: torch.Tensor) -> bool:
    """Whether one matmul of several such weights costs less than one of each.

    On a GPU it saves launches, and a few rows fill more of the chip. On a CPU it saves what a bf16 matmul costs before
    it starts, which is a tenth of q, k and v's for 32 rows at width 768; in fp32 and fp16 nothing, and there a gate
    pays for reading its two halves from longer rows.
    """
    return weight.device.type != "cpu" or weight.dtype == torch.bfloat16


def plain(linear: nn.Module) -> bool:
    """Whether a call is its weight's matmul and its bias, and nothing else (hooks, adapters, quantisation)."""
    return (
        type(linear) is nn.Linear
        and type(linear._parameters.get("weight")) is nn.Parameter
        and not (linear._forward_hooks or linear._forward_pre_hooks or "forward" in linear.__dict__)
    )


def require_weights(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise ValueError naming the first of (name, module) whose weight is no plain parameter of its own to be read."""
    for name, module in modules:
        if type(module._parameters.get("weight")) is not nn.Parameter:
            raise ValueError(
                f"model: {name} is a {class_name(module)} without a plain weight of its own; "
                "merge or remove what stands in its place before patching, and leave it out of quantisation"
            )


def stamp(weight: nn.Parameter) -> tuple[int, int]:
    """Where a weight lies, and how often it was written to. A quantised tensor is several, and told by itself."""
    place = weight.data_ptr() if type(weight) is nn.Parameter else id(weight)
    return place, 0 if weight.is_inference() else weight._version


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
    # Neighbours in memory may be separate storages, which no view may span.
    storage = first.untyped_storage()
    return end <= storage.data_ptr() + storage.nbytes()
