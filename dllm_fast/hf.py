"""`custom_generate`: the loop as transformers' ``model.generate(ids, custom_generate=...)`` wants to call it."""

import inspect

import torch

from dllm_fast.generate import generate

_OWN = inspect.signature(generate).parameters


def custom_generate(model, input_ids: torch.Tensor, **kwargs) -> torch.Tensor:
    """``model.generate(ids, custom_generate=dllm_fast.custom_generate, gen_length=64, ...)``: [B, P + gen_length].

    Takes `generate`'s arguments; ``max_new_tokens`` stands for ``gen_length`` where that is not given. transformers
    does not hand its own ``streamer=`` to a callable: bind it with ``functools.partial(custom_generate, streamer=s)``.
    """
    config = kwargs.get("generation_config")
    own = {name: value for name, value in kwargs.items() if name in _OWN}
    if "gen_length" not in own and getattr(config, "max_new_tokens", None):
        own["gen_length"] = config.max_new_tokens
    return generate(model, input_ids, **own).sequences


# transformers reads the signature to learn which keyword arguments are the callable's own.
custom_generate.__signature__ = inspect.Signature(
    [
        *_OWN.values(),
        *(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
            for name in ("logits_processor", "stopping_criteria", "generation_config")
        ),
    ]
)
