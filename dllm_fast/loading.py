"""`from_pretrained`: load a model from a folder or the hub, check it and patch it."""

import json
import struct
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.distributed.device_mesh import DeviceMesh
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from dllm_fast.families import FAMILIES, diffusion_gemma, gpt, kind_of
from dllm_fast.families.generic import Generic
from dllm_fast.families.shards import load_rounded
from dllm_fast.families.tensor_parallel import check_mesh, load_shared
from dllm_fast.generation_config import DiffusionGenerationConfig
from dllm_fast.patch import bound_family, patch, require_known, require_rounds

MODELS = Path(__file__).with_name("models")
# Models that transformers does not have, by model_type: the class that has their modules and parameter names, and what
# its config lacks.
SAME_MODULES: dict[str | None, tuple[Any, dict[str, Any]]] = {
    "Dream": (Qwen2ForCausalLM, {"is_causal": False, "shifted": True}),
    # ZHZisZZ/dllm's: all layers see all positions, whatever window the config of the causal model had.
    "a2d-llama": (LlamaForCausalLM, {"is_causal": False}),
    "a2d-qwen2": (Qwen2ForCausalLM, {"is_causal": False, "use_sliding_window": False, "layer_types": None}),
    "a2d-qwen3": (Qwen3ForCausalLM, {"is_causal": False, "use_sliding_window": False, "layer_types": None}),
}


def shipped() -> list[str]:
    """Names of the small trained models in the package, for `from_pretrained`."""
    return sorted(path.parent.name for path in MODELS.glob("*/config.json"))


def model_path(name: str) -> str:
    """The folder of a shipped model; any other name or path is returned as it is."""
    return str(MODELS / name) if name in shipped() and not Path(name).exists() else name


def from_pretrained(
    name: str,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device | None = None,
    impl: str = "auto",
    trust_remote_code: bool = False,
    weights: str | None = None,
    head: str | None = None,
    device_mesh: DeviceMesh | None = None,
    **kwargs,
) -> PreTrainedModel:
    """Load a model, in eval mode, and `patch` it.

    A LLaDA, a ModernBERT, an SDAR, a LLaDA-MoE or a LLaDA2; or of transformers 5 a Dream, a Llama or Qwen of
    ZHZisZZ/dllm (``a2d-llama``, ``a2d-qwen2``, ``a2d-qwen3``), a DiffusionGemma, any other masked language model, or a
    decoder whose config says ``is_causal: false``, see `families.generic`.

    Args:
        name: a local folder, a hub name, or one of `shipped`.
        dtype: of the weights; ``"auto"`` for the checkpoint's.
        device: for the weights; by default the CPU.
        impl: see `patch`.
        trust_remote_code: load LLaDA's published class instead of the native one, which needs no remote code. Three
            things in it that transformers 5 no longer accepts are fixed on the loaded class and config.
        weights: None; or ``"fp8"`` or ``"int4"`` to round the layers' weights as `patch` does. Each weight is rounded
            on ``device`` as it is read, and freed: the layers are never in memory in ``dtype``. Logits are those of a
            model that was patched with ``weights``. To unpatch, train or save such a model raises a ValueError.
        head: see `patch`. The head is loaded in ``dtype`` as well.
        device_mesh: the processes that share the model, each of which calls this and reads its share of the weights
            alone, see `parallelize`. Of a LLaDA, with its own weights.
        kwargs: for transformers' ``from_pretrained`` (revision, token, local_files_only, ...).

    Raises:
        ValueError: the model type is unknown; a local folder does not exist, or a file in it is missing or truncated;
            the weights lack a parameter, or have one that the config does not know; ``device``, ``weights`` or ``head``
            is not valid, before anything is read; or `patch` refuses the model or ``impl``.
    """
    require_known(weights=weights, head=head)
    require_device(device)
    place = torch.device("cpu" if device is None else device)
    if device_mesh is not None:
        check_mesh(device_mesh, place)
        unshared = {"weights": weights, "head": head, "trust_remote_code": trust_remote_code or None}
        if given := [f"{option}={value!r}" for option, value in unshared.items() if value is not None]:
            raise ValueError(f"device_mesh: cannot be combined with {', '.join(given)}")
    name = require_model(name)
    # The classes are the families', not transformers' registry's: the published code takes over the name llada there.
    fields, _ = PretrainedConfig.get_config_dict(name, **kwargs)
    kind = kind_of(fields)
    auto_map = fields.get("auto_map") or {}
    family = FAMILIES.get(kind or "")
    require_rounds(family or Generic, weights)
    if device_mesh is not None and (family is None or not family.shared):
        raise ValueError(f"device_mesh: processes can share a LLaDA, and {name} has model_type {kind!r}")
    if family is None:
        cls, config = other_model(name, kind, **kwargs)
    elif trust_remote_code and family.remote_code is not None and "AutoModel" in auto_map:
        config, cls = family.remote_code(auto_map, name, **kwargs)
    else:
        cls = family.model_class
        assert cls.config_class is not None
        config = cls.config_class.from_pretrained(name, **kwargs)
    if device_mesh is not None:
        model, report = load_shared(name, config, dtype, place, device_mesh, **kwargs)
    elif weights is not None:
        model, report = load_rounded(cls, name, config, dtype, place, weights, **kwargs)
    else:
        # Not on a default device that a script has set: transformers refuses "meta", and needs Accelerate for others.
        with torch.device("cpu"):
            model, report = cls.from_pretrained(name, config=config, dtype=dtype, output_loading_info=True, **kwargs)
    # If a shard index lists more than the shards have, transformers 4.57 leaves the rest on the meta device.
    missing = sorted({*report["missing_keys"], *(name for name, p in model.named_parameters() if p.is_meta)})
    if missing:
        raise ValueError(f"{name}: the weights lack {len(missing)} parameters, the first of them {missing[0]}")
    if unexpected := sorted(report["unexpected_keys"]):
        reason = (
            f"{name}: the weights hold {len(unexpected)} tensors that do not belong to config.json's model, the "
            f"first of them {unexpected[0]}"
        )
        if family is not None:
            raise ValueError(reason)
        warnings.warn(reason, stacklevel=2)  # such as the pooler of a published BERT
    patch(model.eval() if device is None else model.eval().to(device), impl, weights, head)
    if not cls.can_generate():  # transformers has not read the file
        with suppress(OSError):  # there is no such file
            model.generation_config = DiffusionGenerationConfig.from_pretrained(name, **kwargs)
    return model


def other_model(name: str, kind: str | None, **kwargs) -> tuple[Any, PretrainedConfig]:
    """Transformers' class with a language model's head for a ``model_type`` that is no family's, and its config."""
    gpt.register()
    cls: Any
    if kind in SAME_MODULES:
        cls, changes = SAME_MODULES[kind]
        fields, _ = PretrainedConfig.get_config_dict(name, **kwargs)
        kept = {key: value for key, value in fields.items() if key not in ("model_type", "architectures", "auto_map")}
        return cls, cls.config_class(**{**kept, **changes})
    try:
        config = AutoConfig.from_pretrained(name, **kwargs)
    except ValueError:  # transformers does not know it
        config = None
    for mapping in (MODEL_FOR_MASKED_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        cls = mapping.get(type(config), None)
        if cls is not None:
            return cls, config
    cls = getattr(transformers, diffusion_gemma.CLASS, None)
    if cls is not None and isinstance(config, cls.config_class):
        return cls, config
    raise ValueError(
        f"{name}: model_type {kind!r} is not supported; supported are "
        f"{', '.join(map(str, (*FAMILIES, *SAME_MODULES)))}, diffusion_gemma, and what transformers has as a masked "
        "language model, or as a decoder if config.json says is_causal: false"
    )


def is_other(name: str) -> bool:
    """Whether a local folder holds a model of no family. Raises ValueError if it is incomplete."""
    if name in shipped() or not Path(name).is_dir():
        return False
    check_folder(Path(name))
    kind = kind_of(PretrainedConfig.get_config_dict(name)[0])
    return kind is not None and kind not in FAMILIES


def require_model(name: str) -> str:
    """`model_path` of a name. Raises ValueError if it is neither a complete folder nor a hub name."""
    name = model_path(str(name))
    if Path(name).is_dir():
        check_folder(Path(name))
    elif Path(name).exists():
        raise ValueError(f"{name} is a file, not the folder of a model")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"{name}: no such folder")
    return name


def require_device(device: str | torch.device | None) -> None:
    """Raise ValueError if this machine or this PyTorch has no such device."""
    if device is None:
        return
    try:
        torch.empty(0, dtype=torch.float32, device=device)
    except (AssertionError, RuntimeError, NotImplementedError, TypeError) as error:
        # A CPU build of PyTorch asserts. After the first sentence come hints for debugging, or a list of backends.
        reason = str(error).strip().splitlines()[0].partition(". ")[0]
        raise ValueError(f"device={str(device)!r} is not available: {reason}") from None


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model for `from_pretrained`. Raises ValueError if it cannot be loaded."""
    try:
        return AutoTokenizer.from_pretrained(model_path(name), trust_remote_code=trust_remote_code)
    except Exception as error:  # for a truncated file the tokenizers package raises Exception itself
        raise ValueError(f"{name}: its tokenizer cannot be loaded: {error}") from error


def mask_of(given: int | None, model: torch.nn.Module, tokenizer) -> int:
    """The id of [MASK]: the one ``given``, else the config's, else the tokenizer's. Raises ValueError for none."""
    known = (given, getattr(model.config, "mask_token_id", None), tokenizer.mask_token_id)
    mask_id = next((i for i in known if i is not None), None)
    if mask_id is None:
        raise ValueError("mask_id: None given, and neither the model's config nor its tokenizer names one")
    return mask_id


def end_of_text(model: PreTrainedModel, tokenizer) -> list[int]:
    """Ids that end a text: the tokenizer's, and those of the generation config, such as a chat's end of turn."""
    config = getattr(model, "generation_config", None)
    configured = getattr(config, "eos_token_id", None)
    ids = [tokenizer.eos_token_id, *(configured if isinstance(configured, list | tuple) else [configured])]
    size = bound_family(model).vocab_size  # a config's default may be outside the vocabulary
    return list(dict.fromkeys(i for i in ids if i is not None and i < size))


def check_folder(folder: Path) -> None:
    """Raise ValueError if a checkpoint folder is incomplete. Reads only headers and sizes."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: config.json is missing")
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise ValueError(f"{folder}: config.json is not a JSON object")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{index} is not an index of shards") from None
    else:
        shards = [path.name for path in folder.glob("*.safetensors")]
        if not shards and not list(folder.glob("*.bin")):
            raise ValueError(f"{folder} contains no weights (*.safetensors)")
    for shard in shards:
        path = folder / shard
        if not path.is_file():
            raise ValueError(f"{folder}: {shard} is missing ({len(shards)} shards are listed)")
        size = path.stat().st_size
        expected = safetensors_size(path)
        if size != expected:
            raise ValueError(f"{folder}: {shard} has {size} bytes, its header says {expected}")


def safetensors_size(path: Path) -> int | None:
    """The size in bytes according to a safetensors file's header; None without a valid header."""
    with open(path, "rb") as file:
        head = file.read(8)
        if len(head) < 8:
            return None
        (length,) = struct.unpack("<Q", head)
        if length > path.stat().st_size:
            return None
        try:
            entries = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
    return 8 + length + max(ends, default=0)
