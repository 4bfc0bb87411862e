"""What a family's forward passes by, and whether the result would be another if it did not.

It calls the embeddings and the linears of the layers. Blocks, norms and the head it does not call: it reads their
weights, or nothing of them. That is right while each is of a class that was looked at when the model was patched, with
plain weights and nothing attached. A hook, a forward of the instance's own or an adapter in its place would never act:
`departure` finds these, at half a microsecond a module.
"""

import types
import warnings
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.parallel import DistributedDataParallel

# transformers leaves hooks on the layers that act only while hidden states are asked for, in the model's own forward.
CAPTURE = "transformers.utils.output_capturing"
# Files of the classes that may be passed by in any model, beside its own.
CLASSES = frozenset(f"torch.nn.modules.{name}" for name in ("activation", "container", "dropout", "linear"))


class Departure(NamedTuple):
    module: nn.Module
    reason: str  # in words that follow the module's name
    advice: str = (
        ", which would never act: generation does not call it. Remove it, merge it into the weights, or leave it out "
        "of quantisation"
    )


class Calls(NamedTuple):
    """What a family's forward calls: every module of one of these names in its parent, but for one that it reads."""

    names: frozenset[str]
    read: nn.Module | None  # the head, where it has such a name too


def global_hooks() -> bool:
    """Whether every module is called with hooks (``register_module_forward_hook`` and its like)."""
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


def departure(model: nn.Module, calls: Calls, known: frozenset[type], modes: bool = False) -> Departure | None:
    """The first module within the model of which something would be left out; None where all is as it was patched.

    ``known`` are the classes that may be passed by. ``modes``: a module in training mode counts too, and so do hooks on
    every module.

    Raises:
        ValueError: a weight is on the meta device, with nothing attached that would load it. This is asked of called
            modules too: PyTorch's own linear returns uninitialised memory there.
    """
    first = None
    if modes and global_hooks():
        first = Departure(model, "is called with hooks on every module (register_module_forward_hook)")
    (names, read), called, device = calls, [], None
    passed = list(model._modules.values())
    while passed:
        module = passed.pop()
        if module is None:
            continue
        own = module.__dict__
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
            reason = attached(module)
            if reason is not None:
                first = first or Departure(module, reason)
                continue  # what is attached may load the weights of all that is within
        if type(module) not in known:
            first = first or Departure(module, f"is a {class_name(module)}")
        elif modes and own["training"]:
            first = first or Departure(module, "is in training mode")
        for name, parameter in own["_parameters"].items():
            if parameter is not None:
                if parameter.is_meta:
                    _refuse(model, module)
                device = device or parameter.device
                if parameter.device != device:
                    first = first or _elsewhere(module, parameter, device)
                if type(parameter) is not nn.Parameter:
                    first = first or Departure(module, f"has a {name} that is a {type(parameter).__name__}")
        for name, child in own["_modules"].items():
            (called if name in names and child is not read else passed).append(child)
    while called:
        module = called.pop()
        if module is None or attached(module):
            continue
        for parameter in module._parameters.values():
            if parameter is not None:
                if parameter.is_meta:
                    _refuse(model, module)
                device = device or parameter.device
                if parameter.device != device:
                    first = first or _elsewhere(module, parameter, device)
        called += module._modules.values()
    return first


def _elsewhere(module: nn.Module, parameter: nn.Parameter, device: torch.device) -> Departure:
    return Departure(module, f"lies on {parameter.device}, and others on {device}", "; move them to one")


def _refuse(model: nn.Module, module: nn.Module) -> None:
    raise ValueError(f"model: the weights of {name_of(model, module)} are on the meta device; load them first")


def attached(module: nn.Module) -> str | None:
    """What acts when the module is called, beside its class's forward."""
    own = module.__dict__
    if "forward" in own and own["forward"] != types.MethodType(type(module).forward, module):
        return "has a forward of its own (an Accelerate hook, say)"
    if own["_forward_pre_hooks"]:
        return "has a forward pre-hook"
    hooks = own["_forward_hooks"]
    if hooks and any(getattr(hook, "__module__", None) != CAPTURE for hook in hooks.values()):
        return "has a forward hook"
    return None


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of torch.compile, DistributedDataParallel, DataParallel and PEFT."""
    while isinstance(model, nn.Module):
        if "_orig_mod" in model._modules:
            model = model._orig_mod
        elif isinstance(model, DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            break
    return model


def require_no_learned_prompt(model: nn.Module) -> None:
    """Raise ValueError for a PEFT model that puts learned tokens before its input: the model inside knows none."""
    for name, config in (getattr(model, "peft_config", None) or {}).items():
        if hasattr(model, "get_base_model") and getattr(config, "is_prompt_learning", False):
            raise ValueError(
                f"model: the learned prompt of adapter {name!r} would be left out; hand in model.get_base_model() to "
                "generate without it"
            )


def known_classes(model: nn.Module, calls: Calls, files: Iterable[str]) -> frozenset[type]:
    """The classes of what is passed by. Raises ValueError for one from none of ``files``, its own or PyTorch's."""
    files = {*CLASSES, *files, *(base.__module__ for base in type(model).__mro__ if base is not object)}
    found, ahead = set(), list(model._modules.items())
    while ahead:
        name, module = ahead.pop()
        if module is None or (name.split(".")[-1] in calls.names and module is not calls.read):
            continue
        if type(module).__module__ not in files:
            raise ValueError(
                f"model: {name} is a {class_name(module)}, which would be passed by; merge or remove what stands "
                "in its place before patching"
            )
        found.add(type(module))
        ahead += [(f"{name}.{child}", inner) for child, inner in module._modules.items()]
    return frozenset(found)


def class_name(module: nn.Module) -> str:
    """Of several libraries' classes of the same name, which."""
    kind = type(module)
    return kind.__qualname__ if kind.__module__.startswith("torch.nn.") else f"{kind.__module__}.{kind.__qualname__}"


def name_of(model: nn.Module, module: nn.Module) -> str:
    return next((name for name, other in model.named_modules() if other is module), "") or "the model"


def require_nothing_left_out(model: nn.Module, calls: Calls, known: frozenset[type]) -> None:
    """Raise ValueError naming what `departure` finds, or what is attached to the model itself.

    The model's own forward in the instance's place of it is `patch`'s. Hooks on every module are warned of: those that
    count FLOPs or trace a whole process are no reason to stop.
    """
    if global_hooks():
        warnings.warn("generation does not call the hooks of register_module_forward_hook", stacklevel=3)
    found = departure(model, calls, known)
    if found is None and (model._forward_pre_hooks or model._forward_hooks):
        found = Departure(model, "has a forward hook")
    if found is not None:
        raise ValueError(f"model: {name_of(model, found.module)} {found.reason}{found.advice}")


def require_one_device(model: nn.Module) -> None:
    """Raise ValueError if the weights lie on several devices, naming two of them."""
    first = None
    for name, parameter in model.named_parameters():
        if first is None:
            first = name, parameter.device
        elif parameter.device != first[1] and "meta" not in (parameter.device.type, first[1].type):
            raise ValueError(
                f"model: its weights lie on several devices, {first[0]} on {first[1]} and {name} on "
                f"{parameter.device}; move them to one, or do not patch"
            )
