"""`from_pretrained`: a model from a folder or a hub, loaded, checked and patched."""

import json
import struct
from contextlib import suppress
from pathlib import Path

import torch
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from dllm_fast.families import FAMILIES
from dllm_fast.families.shards import load_rounded
from dllm_fast.generation_config import DiffusionGenerationConfig
from dllm_fast.patch import bound_family, patch, require_known

MODELS = Path(__file__).with_name("models")


def shipped() -> list[str]:
    """Names of the small trained models that come with the package; `from_pretrained` takes them."""
    return sorted(path.parent.name for path in MODELS.glob("*/config.json"))


def model_path(name: str) -> str:
    """The folder of a shipped model; any other name or path as it is."""
    return str(MODELS / name) if name in shipped() and not Path(name).exists() else name


def from_pretrained(
    name: str,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device | None = None,
    impl: str = "auto",
    trust_remote_code: bool = False,
    weights: str | None = None,
    head: str | None = None,
    **kwargs,
) -> PreTrainedModel:
    """Load a LLaDA or a ModernBERT and `patch` it; returned in evaluation mode.

    Args:
        name: a local folder, a hub name, or one of `shipped`.
        dtype: of the weights; ``"auto"`` keeps the checkpoint's.
        device: where to put them; default the CPU.
        impl: see `patch`.
        trust_remote_code: load LLaDA's published class instead of the native one, which needs no remote code. Three
            things in it that transformers 5 no longer accepts are mended on the class and config that are loaded.
        weights: None, or ``"fp8"`` or ``"int4"`` for the layers' weights rounded as `patch` rounds them. Each is
            rounded as it is read, on ``device``, and let go: the layers never lie there in ``dtype``. Such a model
            gives the logits of one that was patched with ``weights``. It cannot be unpatched, trained or saved, each of
            which raises a ValueError.
        head: see `patch`. The head is loaded in ``dtype`` as well, and its copy lies beside it.
        kwargs: for transformers' ``from_pretrained`` (revision, token, local_files_only, ...).

    Raises:
        ValueError: the model type is unknown, or a local folder is not there or incomplete: a file is missing or cut
            short, or the weights lack a parameter or hold one that the config has no place for. It names the file. Or
            `patch` refuses: ``weights`` or ``head``, before anything is read, or ``impl``.
    """
    require_known(weights=weights, head=head)
    require_device(device)
    name = model_path(str(name))
    if Path(name).is_dir():
        check_folder(Path(name))
    elif Path(name).exists():
        raise ValueError(f"{name}: is a file, and not the folder of a model")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"{name}: no such folder")
    # The classes are the families', not transformers' registry's: the published code takes over the name llada there.
    fields, _ = PretrainedConfig.get_config_dict(name, **kwargs)
    kind = fields.get("model_type")
    auto_map = fields.get("auto_map") or {}
    family = FAMILIES.get(kind or "")
    if family is None:
        raise ValueError(f"{name}: model_type {kind!r} is not supported; supported are {', '.join(FAMILIES)}")
    if trust_remote_code and family.remote_code is not None and "AutoModel" in auto_map:
        config, cls = family.remote_code(auto_map, name, **kwargs)
    else:
        cls = family.model_class
        assert cls.config_class is not None
        config = cls.config_class.from_pretrained(name, **kwargs)
    if weights is not None:
        place = torch.device("cpu" if device is None else device)
        model, report = load_rounded(cls, name, config, dtype, place, weights, **kwargs)
    else:
        # Not on a default device that a script has set: transformers refuses "meta", and wants Accelerate for others.
        with torch.device("cpu"):
            model, report = cls.from_pretrained(name, config=config, dtype=dtype, output_loading_info=True, **kwargs)
    # transformers 4.57 believes a shard index that lists more than its shards hold, and leaves the rest on meta.
    missing = sorted({*report["missing_keys"], *(name for name, p in model.named_parameters() if p.is_meta)})
    if missing:
        raise ValueError(f"{name}: the weights lack {len(missing)} parameters, the first of them {missing[0]}")
    if unexpected := sorted(report["unexpected_keys"]):
        raise ValueError(
            f"{name}: the weights hold {len(unexpected)} tensors that config.json has no place for, the first of them "
            f"{unexpected[0]}"
        )
    patch(model.eval() if device is None else model.eval().to(device), impl, weights, head)
    if not cls.can_generate():  # then transformers has not read the file
        with suppress(OSError):  # there is none
            model.generation_config = DiffusionGenerationConfig.from_pretrained(name, **kwargs)
    return model


def require_device(device: str | torch.device | None) -> None:
    """Raise ValueError if ``device`` is none, or none that this machine and this PyTorch have."""
    if device is None:
        return
    try:
        torch.empty(0, dtype=torch.float32, device=device)
    except (AssertionError, RuntimeError, NotImplementedError, TypeError) as error:
        # A CPU build of PyTorch asserts. What follows the first sentence is advice on debugging, or a list of backends.
        reason = str(error).strip().splitlines()[0].partition(". ")[0]
        raise ValueError(f"device={str(device)!r} is not available: {reason}") from None


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model that `from_pretrained` takes. Raises ValueError if there is none that can be read."""
    try:
        return AutoTokenizer.from_pretrained(model_path(name), trust_remote_code=trust_remote_code)
    except Exception as error:  # of a file that is not whole, the tokenizers package raises Exception itself
        raise ValueError(f"{name}: its tokenizer cannot be loaded: {error}") from error


def end_of_text(model: PreTrainedModel, tokenizer) -> list[int]:
    """Ids that end a text: the tokenizer's, then those of the model's generation config (a chat's end of turn, say)."""
    config = getattr(model, "generation_config", None)
    several = getattr(config, "eos_token_id", None)
    ids = [tokenizer.eos_token_id, *(several if isinstance(several, list | tuple) else [several])]
    size = bound_family(model).vocab_size  # a config's default may lie outside, where no token can be it
    return list(dict.fromkeys(i for i in ids if i is not None and i < size))


def check_folder(folder: Path) -> None:
    """Raise ValueError if a checkpoint folder is not whole. Reads headers and sizes only."""
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
            raise ValueError(f"{index}: is not an index of shards") from None
    else:
        shards = [path.name for path in folder.glob("*.safetensors")]
        if not shards and not list(folder.glob("*.bin")):
            raise ValueError(f"{folder}: holds no weights (*.safetensors)")
    for shard in shards:
        path = folder / shard
        if not path.is_file():
            raise ValueError(f"{folder}: {shard} is missing ({len(shards)} shards are listed)")
        size, expected = path.stat().st_size, safetensors_size(path)
        if size != expected:
            raise ValueError(f"{folder}: {shard} has {size} bytes, its header says {expected}")


def safetensors_size(path: Path) -> int | None:
    """Bytes that the header of a safetensors file says it has; None if it has no such header."""
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
