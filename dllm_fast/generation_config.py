"""transformers' generation config for masked diffusion: what of it is honoured, and what is refused by name.

A field is honoured; ignored (`NO_PART`); or, as any that a newer transformers adds, refused unless it asks for nothing.
"""

from typing import Any, cast

import torch
from transformers import GenerationConfig, PretrainedConfig

from dllm_fast.decoding.options import BLOCK, OPTIONS, Options, as_ids
from dllm_fast.decoding.spelling import SPELLED, policy_of, spell
from dllm_fast.decoding.values import is_whole, require

ALIASES = {"gen_length": "max_new_tokens", "eos_id": "eos_token_id", "pad_id": "pad_token_id"}  # `generate`'s names
SHARED = ("top_k", "top_p", "suppress_tokens")  # options that transformers has fields for, under their names
# Those that it has none for.
DIFFUSION = tuple(name for name in OPTIONS if name not in (*ALIASES, *SHARED, "temperature", "logprobs"))
HONOURED = (
    "max_new_tokens", "max_length", "do_sample", "temperature", "eos_token_id", "pad_token_id", "use_cache",
    "num_return_sequences", "return_dict_in_generate", *SHARED, *DIFFUSION,
)  # fmt: skip
# For prompts that are missing, for encoder-decoders, and what changes neither tokens nor their probabilities here.
NO_PART = ("bos_token_id", "decoder_start_token_id", "renormalize_logits", "disable_compile", "transformers_version")

_PLAIN = GenerationConfig()
FIELDS = frozenset(name for name in vars(_PLAIN) if not name.startswith("_"))
# transformers 4.57 fills fields in, so that in a config of its own they do not tell whether anyone asked for them.
FILLED = {name: value for name, value in vars(_PLAIN).items() if value is not None and name in FIELDS}
# Values that ask for nothing. Its default of top_k does, where it samples.
_DEFAULTS = {**FILLED, **getattr(_PLAIN, "_get_default_generation_params", dict)()}
TOP_K = _DEFAULTS["top_k"]
NEUTRAL = {**_DEFAULTS, "top_k": 0}
NEUTRAL |= {"min_p": 0, "min_new_tokens": 0, "guidance_scale": 1}


class DiffusionGenerationConfig(GenerationConfig):
    """A `transformers.GenerationConfig` with the options of `dllm_fast.generate` in it.

    Args:
        block_length, schedule, confidence, cfg_scale, cache, refresh, remask, suffix_length, suffix_sample,
            skip_committed, speculate, cache_dtype, pipeline, mask_id, seed, defer_tokens: as `dllm_fast.generate`; None
            is its default. ``schedule``, ``refresh``, ``remask`` and ``pipeline`` may be text, as on the command line:
            ``"threshold=0.9"``; so they stand in ``generation_config.json``.
        max_new_tokens: tokens to write, 128 by default, in blocks of ``block_length``; the last may be shorter.
        max_length: those of the prompt and of the answer.
        do_sample, temperature: a temperature alone asks for sampling; ``do_sample`` alone is temperature 1, and False
            is greedy, whatever the temperature.
        top_k, top_p: as `dllm_fast.generate`, where it samples. transformers' own default, a ``top_k`` of 50, is not
            taken: nobody has asked for it.
        eos_token_id, pad_token_id: an id, or several; and what stands after the first of them.
        suppress_tokens: ids that are never chosen.
        num_return_sequences: answers to each prompt, next to each other.
        use_cache: False is ``cache="none"``; in a config that was made from a model's own it plays no part.
        return_dict_in_generate: False for the sequences alone.
        kwargs: transformers' other fields. They are kept, and refused by `generate` if they ask for anything.

    Raises:
        ValueError: a schedule, refresh, remask, pipeline, cache or confidence that there is not, by name.
    """

    def __init__(self, **kwargs):
        own = {name: kwargs.pop(name, None) for name in DIFFUSION}
        for name in DIFFUSION:  # a model's config may have fields of these names, which mean something else
            setattr(self, name, None if kwargs.get("_from_model_config") else own[name])
        temperature = kwargs.get("temperature")
        if kwargs.get("do_sample") is None and temperature is not None:
            kwargs["do_sample"] = temperature > 0
        if temperature == 0:
            kwargs.pop("temperature")
        super().__init__(**kwargs)

    @classmethod
    def from_model_config(cls, model_config: PretrainedConfig | dict) -> "DiffusionGenerationConfig":
        return cls.of(GenerationConfig.from_model_config(model_config))

    @classmethod
    def of(cls, config: GenerationConfig) -> "DiffusionGenerationConfig":
        """``config`` as one of this class."""
        if isinstance(config, cls):
            return config
        given = {name: value for name, value in config.to_dict().items() if value is not None}
        made = cast(DiffusionGenerationConfig, cls.from_dict(given))
        made._original_object_hash = hash(made)  # transformers 4.57 asks for it
        return made

    def validate(self, *args, **kwargs) -> None:
        """Check the fields, and turn text that spells a policy into it. Raises ValueError that names the field."""
        super().validate(*args, **kwargs)
        for name in SPELLED:
            if isinstance(value := getattr(self, name), str):
                setattr(self, name, policy_of(name, value))
        Options(**{name: value for name in (*SHARED, *DIFFUSION) if (value := getattr(self, name)) is not None})

    def to_dict(self) -> dict[str, Any]:
        """All fields but diffusion's unset ones, policies as text."""
        fields = super().to_dict()
        for name in DIFFUSION:
            if fields[name] is None:
                del fields[name]
            elif name in SPELLED and not isinstance(fields[name], str):
                fields[name] = spell(fields[name])
        return fields

    @staticmethod
    def _get_default_generation_params() -> dict[str, Any]:
        """What transformers 5 fills in before it calls a `custom_generate`: nothing that would ask for anything."""
        return {**_PLAIN._get_default_generation_params(), "top_k": None, "temperature": None, "do_sample": None}


def given(config: GenerationConfig | None) -> dict[str, Any]:
    """The fields of ``config`` that say something, with ``do_sample`` and ``cache`` resolved, see `_resolved`."""
    if config is None:
        return {}
    fields = {name: value for name, value in vars(config).items() if value is not None and not name.startswith("_")}
    fields = {name: value for name, value in fields.items() if name not in FILLED or not _same(value, FILLED[name])}
    if FILLED and "do_sample" not in fields:
        fields.pop("temperature", None)  # transformers 4.57 has said that it ignores it
    if getattr(config, "_from_model_config", False):
        fields.pop("use_cache", None)
    if "max_new_tokens" in fields and fields.get("max_length") == 20:
        del fields["max_length"]  # transformers' own default
    return _resolved(fields)


def _resolved(fields: dict[str, Any]) -> dict[str, Any]:
    """``do_sample`` out of a temperature that stands alone, and ``cache`` out of ``use_cache``."""
    if "temperature" in fields and "do_sample" not in fields:
        fields["do_sample"] = True
    if fields.pop("use_cache", None) is False:
        cache = fields.setdefault("cache", "none")
        require(cache == "none", f"use_cache=False and cache={cache!r}: they do not agree")
    return fields


def gather(model, config: GenerationConfig | None, keywords: dict[str, Any]) -> dict[str, Any]:
    """What a call asks for: its keywords, then the config that it hands in, then the model's own.

    ``keywords`` are fields alone, by transformers' names; None takes ``eos_token_id`` and ``pad_token_id`` back.

    Raises:
        ValueError: a field that cannot be honoured and asks for something, by name.
    """
    fields: dict[str, Any] = {}
    for level in (given(getattr(model, "generation_config", None)), given(config), _resolved(dict(keywords))):
        if "max_new_tokens" in level or "max_length" in level:
            for name in ("max_new_tokens", "max_length"):
                fields.pop(name, None)
        fields |= level
    for name, value in fields.items():
        known = name in HONOURED or name in NO_PART
        require(known or _asks_nothing(name, value), f"generation_config: {name}={value!r} is not supported here")
    return fields


def _asks_nothing(name: str, value: object) -> bool:
    if value is None or value is False or (isinstance(value, list | tuple | dict) and not value):
        return True
    return name in NEUTRAL and _same(value, NEUTRAL[name])


def _same(value: object, other: object) -> bool:
    """Equality of plain values: a tensor's would be a tensor, and True is not 1."""
    plain = int | float | str | list | tuple | dict | None
    return isinstance(value, plain) and isinstance(value, bool) == isinstance(other, bool) and value == other


def new_tokens(fields: dict[str, Any], prompt: int) -> int:
    """Tokens to write after a prompt of that length. Raises ValueError where ``fields`` contradict each other."""
    new, total = fields.get("max_new_tokens"), fields.get("max_length")
    for name, value, least in (("max_new_tokens", new, 0), ("max_length", total, prompt)):
        good = value is None or (is_whole(value) and value >= least)
        require(good, f"{name}={value!r} is not a whole number from {least} up, after a prompt of {prompt}")
    if total is None:
        return Options.gen_length if new is None else new
    require(new in (None, total - prompt), f"max_new_tokens={new} and max_length={total} after {prompt} do not agree")
    return total - prompt


def options_of(model, family, fields: dict[str, Any], prompt: int) -> Options:
    """What `gather` found, as options. Raises ValueError that names the argument."""
    found = {name: fields[name] for name in (*SHARED, *DIFFUSION) if fields.get(name) is not None}
    found |= {name: policy_of(name, found[name]) for name in SPELLED if isinstance(found.get(name), str)}
    found["gen_length"] = new_tokens(fields, prompt)
    if family.block is None:
        found.setdefault("block_length", min(BLOCK, found["gen_length"]) or BLOCK)
    found["temperature"] = fields.get("temperature", 1.0) if fields.get("do_sample") else 0.0
    found["eos_id"], found["pad_id"] = special_ids(model, family, fields, found.get("mask_id"))
    return Options(**found)


def special_ids(model, family, fields: dict[str, Any], mask_id: int | None) -> tuple[tuple[int, ...], int | None]:
    """(ids that end a text, the id after them).

    Of what a model's own config says, ids outside the vocabulary and [MASK] are left out: no text can hold them, and
    they are defaults that nobody chose.
    """
    own = getattr(model, "generation_config", None)
    mask_id = getattr(model.config, "mask_token_id", None) if mask_id is None else mask_id
    found = []
    for name in ("eos_token_id", "pad_token_id"):
        value = fields.get(name)
        value = value.tolist() if isinstance(value, torch.Tensor) else value
        if value is not None and _listed(value) == _listed(getattr(own, name, None)):
            value = [i for i in _listed(value) if 0 <= i < family.vocab_size and i != mask_id]
        found.append(as_ids(name, value, family.vocab_size))
    eos_ids, pad_ids = found
    require(len(pad_ids) < 2, f"pad_token_id={fields.get('pad_token_id')!r} is more than one id")
    return eos_ids, pad_ids[0] if pad_ids else None


def _listed(value: object) -> list:
    return list(value) if isinstance(value, list | tuple) else [value]
