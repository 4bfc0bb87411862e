"""What transformers' users call: ``model.generate(...)`` and `custom_generate`, over `dllm_fast.generate`."""

import copy
import functools
import inspect
from dataclasses import InitVar, dataclass
from typing import Any

import torch
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    MaxLengthCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils import ModelOutput

from dllm_fast.decoding.request import check_token_types
from dllm_fast.decoding.values import require, whole
from dllm_fast.families.bypass import unwrapped
from dllm_fast.generate import fill, generate
from dllm_fast.generation_config import ALIASES, FIELDS, HONOURED, TOP_K, DiffusionGenerationConfig, gather, options_of
from dllm_fast.patch import family_and_pool

NONE_COUNTS = ("eos_token_id", "pad_token_id", "eos_id", "pad_id")  # given as None, they take back what a config says
# Arguments of transformers' own generate that may stand there with a value that asks for nothing.
HARMLESS = {"synced_gpus": (False,), "use_model_defaults": (True,), "logprobs": (False,)}


@dataclass
class DiffusionOutput(ModelOutput):
    """What ``model.generate(...)`` returns.

    sequences: [B, P + new] int64, the prompts as they were given, then the answers; ``num_return_sequences`` of each
        prompt next to each other.
    nfe: [B] int64, the forwards of each row; guidance takes two a step.
    tokens_per_forward: [B] fp32, tokens that were filled in a row, up to the end of its text and that included, over
        its ``nfe``; 0 where there was nothing to fill.

    The last two are attributes and no entries: a pipeline hands a batch on row by row, and fails at a second entry.
    """

    sequences: torch.Tensor | None = None
    nfe: InitVar[torch.Tensor | None] = None
    tokens_per_forward: InitVar[torch.Tensor | None] = None

    def __post_init__(self, nfe, tokens_per_forward):
        super().__post_init__()
        self.nfe, self.tokens_per_forward = nfe, tokens_per_forward


def diffusion_generate(
    model,
    inputs: torch.Tensor | None = None,  # [B, P] int64; or input_ids
    generation_config: GenerationConfig | None = None,
    logits_processor=None,
    stopping_criteria=None,
    streamer=None,
    return_dict: bool = True,  # unless a config or a keyword says
    **kwargs,
) -> DiffusionOutput | torch.Tensor:
    """`DiffusionGenerationMixin.generate` of a patched model, or of any that `patch` takes."""
    (family, pool), model = family_and_pool(model), unwrapped(model)
    if family.ranks is not None:
        refused = bool(logits_processor), bool(stopping_criteria)
        fields = vars(generation_config) if generation_config else {}
        told = [*kwargs.items(), *((name, value) for name, value in fields.items() if name[0] != "_")]
        family.ranks.require_same(inputs, refused, *(x for pair in told for x in pair))
    input_ids = _one_of(inputs, kwargs.pop("input_ids", None))
    for name, value in (("logits_processor", logits_processor), ("stopping_criteria", stopping_criteria)):
        kinds = ", ".join(type(item).__name__ for item in value or ())
        require(not kinds, f"{name}: {kinds} cannot be honoured: many tokens are chosen at once, in any order")
    require(not getattr(streamer, "_takes_logits", False), "streamer: asks for logits, which are never kept")
    attention_mask, fields = _split(kwargs, input_ids)
    fields = gather(model, generation_config, fields)
    options = options_of(model, family, fields, input_ids.shape[1]).resolved(model, family)
    copies = whole("num_return_sequences", fields.get("num_return_sequences", 1))
    if copies > 1:
        input_ids = input_ids.repeat_interleave(copies, 0)
        attention_mask = None if attention_mask is None else attention_mask.repeat_interleave(copies, 0)
    out = fill(model, family, pool, input_ids, attention_mask, options, streamer)
    if not fields.get("return_dict_in_generate", return_dict):
        return out.sequences
    nfe = torch.tensor(out.row_nfe, dtype=torch.int64, device=out.sequences.device)
    tokens = torch.tensor(out.row_tokens, dtype=torch.float32, device=nfe.device)
    return DiffusionOutput(out.sequences, nfe, tokens / nfe.clamp(min=1))


def custom_generate(model, input_ids: torch.Tensor | None = None, **kwargs) -> torch.Tensor | DiffusionOutput:
    """``model.generate(ids, custom_generate=dllm_fast.custom_generate, max_new_tokens=64, ...)``: [B, P + new].

    Takes what ``model.generate`` of a patched model does, but returns the sequences alone unless
    ``return_dict_in_generate=True``. Where transformers' own generate calls it, that does not hand its ``streamer=`` to
    a callable: bind it with ``functools.partial(custom_generate, streamer=s)``.
    """
    config = kwargs.get("generation_config")
    if hasattr(config, "_eos_token_tensor"):  # transformers' own generate sets it, and calls us
        kwargs = _as_asked(model, config, input_ids, kwargs)
    return diffusion_generate(model, kwargs.pop("inputs", None), input_ids=input_ids, return_dict=False, **kwargs)


# transformers' own generate reads the signature to learn which keyword arguments are the callable's. An attention mask
# it hands over in any case.
custom_generate.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        *(p for name, p in inspect.signature(generate).parameters.items() if name != "attention_mask"),
        *(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
            for name in ("logits_processor", "stopping_criteria", "generation_config")
        ),
    ]
)


def _as_asked(model, config: GenerationConfig, input_ids: torch.Tensor, kwargs: dict) -> dict:
    """``kwargs`` of transformers' own generate, without what it has made for a loop from left to right: a cache,
    positions, its default of top_k where it cannot be told from a wish, and what honoured fields stand for."""
    made_of, config = config, copy.copy(config)
    if config.top_k == TOP_K and not isinstance(model.generation_config, DiffusionGenerationConfig):
        config.top_k = None
    made = {"use_cache", "cache_position", "logits_to_keep"}
    for name in ("past_key_values", "cache"):  # the second in newer versions, where it is also an option of ours
        if hasattr(cache := kwargs.get(name), "get_seq_length") and cache.get_seq_length() == 0:
            made.add(name)
    if (positions := kwargs.get("position_ids")) is not None:
        mask = kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        if torch.equal(positions * mask, ((mask.cumsum(1) - 1) * mask).expand_as(positions)):
            made.add("position_ids")
    kwargs = {name: value for name, value in kwargs.items() if name not in made}
    kwargs["logits_processor"] = [p for p in kwargs.get("logits_processor") or () if not _is_fields(p, made_of)]
    kwargs["stopping_criteria"] = [c for c in kwargs.get("stopping_criteria") or () if not _is_fields(c, made_of)]
    if config.eos_token_id is None and "eos_id" not in kwargs:  # the model's own is merged in, so that was asked for
        kwargs["eos_token_id"] = None
    return kwargs | {"generation_config": config}


def _is_fields(made: object, config: GenerationConfig) -> bool:
    """Whether a processor or criterion says no more than a field of ``config`` that is honoured."""
    if isinstance(made, MaxLengthCriteria):
        return made.max_length == config.max_length
    if isinstance(made, EosTokenCriteria):
        return sorted(made.eos_token_id.flatten().tolist()) == sorted(config._eos_token_tensor.flatten().tolist())
    warpers = ((TemperatureLogitsWarper, "temperature"), (TopKLogitsWarper, "top_k"), (TopPLogitsWarper, "top_p"))
    return any(isinstance(made, kind) and getattr(made, name) == getattr(config, name) for kind, name in warpers)


def is_ours(function) -> bool:
    """Whether it is `custom_generate`, arguments bound or not."""
    while isinstance(function, functools.partial):
        function = function.func
    return function is custom_generate


def _one_of(inputs, input_ids) -> torch.Tensor:
    require(inputs is None or input_ids is None, "inputs and input_ids: both are given")
    ids = input_ids if inputs is None else inputs
    require(ids is not None, "input_ids: None is an empty prompt")
    require(isinstance(ids, torch.Tensor) and ids.dim() == 2, f"input_ids: {ids!r} is not a tensor [B, P]")
    return ids


def _split(kwargs: dict, input_ids: torch.Tensor) -> tuple[torch.Tensor | None, dict]:
    """(attention mask, fields of a generation config) out of the keywords of a call.

    Raises ValueError for any other keyword that has a value, and where two names of one field disagree.
    """
    attention_mask = kwargs.pop("attention_mask", None)
    check_token_types(kwargs.pop("token_type_ids", None))
    kwargs.pop("tokenizer", None)  # of use to stop strings alone, which are refused
    fields: dict[str, Any] = {}
    for name, value in kwargs.items():
        field = ALIASES.get(name, name)
        if value is None and name not in NONE_COUNTS:
            continue
        if field not in FIELDS and field not in HONOURED:
            require(value in HARMLESS.get(name, ()), f"{name}={value!r}: not an argument that can be honoured")
            continue
        require(fields.get(field, value) == value, f"{field}={fields.get(field)!r} and {value!r}: two values")
        fields[field] = value
    return attention_mask, fields
