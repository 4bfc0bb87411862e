"""Loading a model with rounded layers, one tensor at a time: the unrounded weights are never all in memory.

transformers builds and loads everything but the layers' linears, which are `RoundedLinear`s from the start. Their
weights are then read from the safetensors files one by one, rounded on the device, and freed.
"""

import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from dllm_fast.families import FAMILIES
from dllm_fast.families.layered import Layered
from dllm_fast.families.native import TRANSFORMERS_5
from dllm_fast.families.rounded import KINDS, Held, RoundedLinear, require_kind

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# Keyword arguments of `from_pretrained` that say where files are.
PLACES = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def load_rounded(
    cls: type[PreTrainedModel],
    name: str,
    config: PretrainedConfig,
    dtype: torch.dtype | str,
    device: torch.device,
    kind: str,
    **kwargs,
) -> tuple[PreTrainedModel, dict]:
    """``cls.from_pretrained(name)`` in ``dtype`` on ``device``, with only ``kind`` ("fp8", "int4") weights in its
    layers; and transformers' report on the keys.

    Raises:
        ValueError: there are no safetensors files, or a weight in them is missing, of another shape or not finite; or
            ``device`` cannot hold such weights.
    """
    require_kind(kind, device)
    files = files_of(name, "weights", **{key: value for key, value in kwargs.items() if key in PLACES})
    skeleton: Any = _skeleton(cls, FAMILIES[config.model_type], kind)
    with torch.device("cpu"):
        model, report = skeleton.from_pretrained(name, config=config, dtype=dtype, output_loading_info=True, **kwargs)
    model.__class__ = cls
    for part in _drawing(model):
        del part._init_weights
    del model._keys_to_ignore_on_load_unexpected
    model.requires_grad_(False)
    linears = _rounded(model)
    report["unexpected_keys"] = set(report["unexpected_keys"]) - {f"{path}.weight" for path in linears}
    missing = set(linears)
    for path, weight in _tensors(files, linears):
        _write(name, path, linears[path], weight.to(model.dtype).to(device))
        missing.remove(path)
    report["missing_keys"] = {*report["missing_keys"], *(f"{path}.weight" for path in missing)}
    return model.to(device), report


def _skeleton(cls: type[PreTrainedModel], family: type[Layered], kind: str) -> type[PreTrainedModel]:
    """``cls`` without weights in the layers' linears."""

    def __init__(self, *args, **kwargs):
        cls.__init__(self, *args, **kwargs)
        names = {module: path for path, module in self.named_modules()}
        for linears in list(family.linears(self)):
            held = Held(kind)
            first = 0
            linear: Any
            for linear in linears:
                path, _, last = names[linear].rpartition(".")
                setattr(self.get_submodule(path), last, RoundedLinear(linear, held, first))
                first += linear.out_features
        rounded = (f"^{re.escape(path)}[.]weight$" for path in _rounded(self))
        patterns = [*(self._keys_to_ignore_on_load_unexpected or ()), *rounded]
        # transformers 5 adds a set of its own to them, transformers 4 a list.
        self._keys_to_ignore_on_load_unexpected = set(patterns) if TRANSFORMERS_5 else patterns
        for part in _drawing(self):
            part._init_weights = functools.partial(_draw, part._init_weights)

    # With the same name, by which transformers looks some classes up.
    return type(cls.__name__, (cls,), {"__init__": __init__, "__module__": cls.__module__})


def _drawing(model: nn.Module) -> list[Any]:
    """The modules that draw new weights for their own modules: ModernBERT has a model inside the model."""
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def _draw(init_weights: Callable[[nn.Module], None], module: nn.Module) -> None:
    """Draw new weights for a module, unless it would draw them for rounded linears, which have no parameter."""
    if not any(isinstance(child, RoundedLinear) for child in module.children()):
        init_weights(module)


def _rounded(model: nn.Module) -> dict[str, RoundedLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, RoundedLinear)}


def files_of(name: str, argument: str, **places) -> list[str]:
    """The safetensors files of a folder, or of a model on the hub, which are downloaded. Raises ValueError, naming the
    ``argument`` that needs them, if there are none."""
    optional = {"_raise_exceptions_for_missing_entries": False}
    index = cached_file(name, INDEX, **places, **optional)
    if index is not None:
        shards = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
        return [cached_file(name, shard, **places) for shard in shards]
    single = cached_file(name, SINGLE, **places, **optional)
    if single is None:
        raise ValueError(f"{name}: {argument}= needs safetensors files, and there is neither {SINGLE} nor {INDEX}")
    return [single]


def _tensors(files: list[str], paths: dict) -> Iterator[tuple[str, torch.Tensor]]:
    """(path of the linear, weight) for each of ``paths`` in the files; one file is open at a time."""
    for file in files:
        with safe_open(file, "pt") as shard:
            for key in shard.keys():  # noqa: SIM118, it is not a dict
                path, _, last = key.rpartition(".")
                if last == "weight" and path in paths:
                    yield path, shard.get_tensor(key)


def _write(name: str, path: str, linear: RoundedLinear, weight: torch.Tensor) -> None:
    """Round a linear's weight [out, in] into its group's matrix."""
    if weight.shape != (linear.out_features, linear.in_features):
        raise ValueError(
            f"{name}: {path}.weight is {list(weight.shape)}, and config.json says "
            f"{[linear.out_features, linear.in_features]}"
        )
    # A sum is NaN or infinite if any term is, and needs no mask as large as the weight.
    if not torch.isfinite(weight.sum(dtype=torch.float32)) and not torch.isfinite(weight).all():
        raise ValueError(f"model: {path}.weight holds NaN or infinite values")
    held = linear.held
    with torch.inference_mode(False), torch.no_grad():
        if held.matrix is None:
            held.matrix = KINDS[held.kind](held.rows, linear.in_features, weight.device)
        held.matrix.write(linear.first, weight)
