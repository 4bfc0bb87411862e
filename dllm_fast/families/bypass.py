"""Modules that a family's forward bypasses, and whether anything attached to them would be lost.

The forward calls the embeddings and the linears of the layers. It does not call blocks, norms and the head: it only
reads their weights, if any. That is right while each is of a class that was checked when the model was patched, with
plain weights and nothing attached. A hook, a forward of the instance's own or an adapter in a module's place would have
no effect: `departure` finds these, in half a microsecond a module.
"""

import types
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.parallel import DistributedDataParallel

# transformers leaves hooks on the layers that only act when the model's own forward is asked for hidden states.
CAPTURE = "transformers.utils.output_capturing"
# Modules whose classes may be bypassed in any model, beside the model's own.
CLASSES = frozenset(f"torch.nn.modules.{name}" for name in ("activation", "container", "dropout", "linear"))


class Departure(NamedTuple):
    module: nn.Module
    reason: str  # follows the module's name in the message
    advice: str = (
        ", which would have no effect: generation does not call the module. Remove it, merge it into the weights, or "
        "do not quantise it"
    )


class Calls(NamedTuple):
    """The modules that a family's forward calls: those with one of these names in their parent, except ``read``."""

    names: frozenset[str]
    read: nn.Module | None  # the head, if it has such a name


def global_hooks() -> bool:
    """Whether every module is called with hooks (``register_module_forward_hook`` and its like)."""
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


def departure(model: nn.Module, calls: Calls, known: frozenset[type], modes: bool = False) -> Departure | None:
    """The first module that the forward would not do justice to; None if all are as they were when patched.

    ``known`` are the classes that may be bypassed. With ``modes``, training mode and hooks on every module count too.

    Raises:
        ValueError: a weight is on the meta device, with nothing attached that would load it. Called modules are checked
            too: PyTorch's own linear returns uninitialised memory there.
    """
    first = None
    if modes and global_hooks():
        first = Departure(model, "is called with hooks on every module (register_module_forward_hook)")
    device = None
    bypassed = list(model._modules.values())
    called: list[nn.Module | None] = []
    while bypassed or called:
        is_called = not bypassed
        module = (bypassed or called).pop()
        if module is None:
            continue
        own = module.__dict__
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
            reason = attached(module)
            if reason is not None:
                if not is_called:
                    first = first or Departure(module, reason)
                continue  # what is attached may load the weights of everything inside
        if not is_called and type(module) not in known:
            first = first or Departure(module, f"is a {class_name(module)}")
        elif not is_called and modes and own["training"]:
            first = first or Departure(module, "is in training mode")
        for name, parameter in own["_parameters"].items():
            if parameter is None:
                continue
            if parameter.is_meta:
                raise ValueError(
                    f"model: the weights of {name_of(model, module)} are on the meta device; load them first"
                )
            device = device or parameter.device
            if parameter.device != device:
                reason = f"is on {parameter.device}, and others are on {device}"
                first = first or Departure(module, reason, "; move them to one device")
            if not is_called and type(parameter) is not nn.Parameter:
                first = first or Departure(module, f"has a {name} that is a {type(parameter).__name__}")
        for name, child in own["_modules"].items():
            into_called = is_called or (name in calls.names and child is not calls.read)
            (called if into_called else bypassed).append(child)
    return first


def attached(module: nn.Module) -> str | None:
    """What else would run if the module were called, beside its class's forward; None if nothing."""
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
    inner: Any = model
    while isinstance(inner, nn.Module):
        if "_orig_mod" in inner._modules:
            inner = inner._orig_mod
        elif isinstance(inner, DistributedDataParallel | nn.DataParallel):
            inner = inner.module
        elif (base := getattr(inner, "get_base_model", None)) is not None:
            inner = base()
        else:
            break
    return inner


def require_no_learned_prompt(model: nn.Module) -> None:
    """Raise ValueError for a PEFT model that puts learned tokens before its input, which the model inside lacks."""
    for name, config in (getattr(model, "peft_config", None) or {}).items():
        if hasattr(model, "get_base_model") and getattr(config, "is_prompt_learning", False):
            raise ValueError(
                f"model: the learned prompt of adapter {name!r} would be left out; pass model.get_base_model() to "
                "generate without it"
            )


def known_classes(model: nn.Module, calls: Calls, files: Iterable[str]) -> frozenset[type]:
    """The classes of bypassed modules. ValueError for one from outside ``files``, the model's own and PyTorch's."""
    files = {*CLASSES, *files, *(base.__module__ for base in type(model).__mro__ if base is not object)}
    classes = set()
    unvisited = list(model._modules.items())
    while unvisited:
        name, module = unvisited.pop()
        if module is None or (name.split(".")[-1] in calls.names and module is not calls.read):
            continue
        if type(module).__module__ not in files:
            raise ValueError(
                f"model: {name} is a {class_name(module)}, which the patched forward would not call; merge or remove "
                "it before patching"
            )
        classes.add(type(module))
        unvisited += [(f"{name}.{child}", inner) for child, inner in module._modules.items()]
    return frozenset(classes)


def class_name(module: object) -> str:
    """Its class, with the module unless that is PyTorch's: several libraries have classes of the same name."""
    kind = type(module)
    return kind.__qualname__ if kind.__module__.startswith("torch.nn.") else f"{kind.__module__}.{kind.__qualname__}"


def name_of(model: nn.Module, module: nn.Module) -> str:
    return next((name for name, other in model.named_modules() if other is module), "") or "the model"


def require_nothing_left_out(model: nn.Module, calls: Calls, known: frozenset[type]) -> None:
    """Raise ValueError naming what `departure` finds, or hooks on the model itself.

    A forward in the model's instance is `patch`'s, and allowed. Hooks on every module only get a warning: those that
    count FLOPs or trace a process are no reason to stop.
    """
    if global_hooks():
        warnings.warn("generation does not call the hooks of register_module_forward_hook", stacklevel=3)
    obstacle = departure(model, calls, known)
    if obstacle is None and (model._forward_pre_hooks or model._forward_hooks):
        obstacle = Departure(model, "has a forward hook")
    if obstacle is not None:
        raise ValueError(f"model: {name_of(model, obstacle.module)} {obstacle.reason}{obstacle.advice}")


def require_one_device(model: nn.Module) -> None:
    """Raise ValueError if the weights are on several devices, naming two of them."""
    first = None
    for name, parameter in model.named_parameters():
        if first is None:
            first = name, parameter.device
        elif parameter.device != first[1] and "meta" not in (parameter.device.type, first[1].type):
            raise ValueError(
                f"model: its weights are on several devices, {first[0]} on {first[1]} and {name} on "
                f"{parameter.device}; move them to one, or do not patch"
            )


def settings(model: nn.Module) -> tuple:
    """What modules that are not the model's own hold beside tensors and modules, such as an adapter's scale and whether
    it is active or merged: a forward goes by it, and so did a step that was recorded."""
    found = []
    for number, module in enumerate(model.modules()):
        file = type(module).__module__
        if file == type(model).__module__ or file.startswith(("torch.nn.", "transformers.", "dllm_fast.")):
            continue
        own = {name: value for name, value in vars(module).items() if name not in _OF_ANY}
        found += [(number, name, repr(value)) for name, value in own.items() if _is_setting(value)]
    return tuple(found)


_OF_ANY = frozenset(vars(nn.Module())) - {"training"}


def _is_setting(value: object) -> bool:
    """Whether a value is a number, text or None, or a collection of such."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_setting, value))
    return value is None or isinstance(value, bool | int | float | str)
