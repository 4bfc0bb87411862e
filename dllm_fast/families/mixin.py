"""`DiffusionGenerationMixin`: ``model.generate`` of the native LLaDA, and of any model while it is patched."""

import types
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin


class DiffusionGenerationMixin:
    """``generate`` for masked-diffusion models, modelled on transformers' mixin for DiffusionGemma.

    It is not a ``GenerationMixin``, which decodes from left to right.
    """

    output_modalities = ("text",)

    @torch.no_grad()
    def generate(
        self: Any,
        inputs: torch.Tensor | None = None,  # [B, P] int64
        generation_config: GenerationConfig | None = None,
        logits_processor=None,
        stopping_criteria=None,
        streamer=None,
        custom_generate=None,
        trust_remote_code: bool | None = None,
        **kwargs,
    ):
        """Fill the [MASK]s after and inside each prompt, with `dllm_fast.generate`.

        ``model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=64, block_length=32, temperature=0.7)``.
        A model that is not patched generates the same tokens, more slowly.

        Args:
            inputs: the prompts, also as ``input_ids``; with ``attention_mask`` [B, P], 0 on padding, on either side.
            generation_config: a `DiffusionGenerationConfig` or any other ``GenerationConfig``. Fields that it does not
                set come from ``model.generation_config``, then from the defaults of `DiffusionGenerationConfig`.
            logits_processor, stopping_criteria: None or empty lists: there is no single next token to process.
            streamer: as `dllm_fast.generate`'s.
            custom_generate: `dllm_fast.custom_generate`, which is this method; or a folder, local or on the hub, with a
                ``custom_generate/generate.py``, which runs with ``trust_remote_code=True``.
            kwargs: fields of the config, which override it, or arguments of `dllm_fast.generate` by their names there
                (``gen_length``, ``eos_id``). ``token_type_ids`` are allowed if they are all 0.

        Returns:
            `DiffusionOutput`; with ``return_dict_in_generate=False`` its ``sequences`` alone, [B, P + new] int64.

        Raises:
            ValueError: an argument or a field is not valid or not supported; it is named, before any work.
            MemoryError: as `dllm_fast.generate`.
        """
        from dllm_fast import hf  # it stands above the models, so it is imported when called

        if custom_generate is None or hf.is_ours(custom_generate):
            run = hf.diffusion_generate if custom_generate is None else custom_generate
            # A callable and a folder return what transformers' own generate returns, unless told otherwise.
            passed = dict(kwargs, inputs=inputs, streamer=streamer)
            passed = {name: value for name, value in passed.items() if value is not None or name in hf.NONE_COUNTS}
            return run(
                self, generation_config=generation_config, logits_processor=logits_processor,
                stopping_criteria=stopping_criteria, **passed,
            )  # fmt: skip
        arguments = dict(
            kwargs, inputs=inputs, generation_config=generation_config, logits_processor=logits_processor,
            stopping_criteria=stopping_criteria, streamer=streamer,
        )  # fmt: skip
        if isinstance(custom_generate, str):
            run = GenerationMixin.load_custom_generate(self, custom_generate, trust_remote_code=trust_remote_code)
            return run(model=self, **arguments)
        own = getattr(type(self), "generate", None)
        if own is None or isinstance(self, DiffusionGenerationMixin):
            raise ValueError(
                f"custom_generate={custom_generate!r}: {type(self).__name__} generates only with dllm_fast"
            )
        return own(self, custom_generate=custom_generate, trust_remote_code=trust_remote_code, **arguments)

    def adjust_generation_fn(self: Any, *args, **kwargs) -> None:
        """Read ``generation_config.json``; transformers 5 calls this after loading."""
        GenerationMixin.adjust_generation_fn(self, *args, **kwargs)
        self.generation_config = generation_config_of(self)


def _can_generate() -> bool:
    return True


# The attributes that `lend_generate` sets: generate, and those that transformers' pipelines and `save_pretrained`
# expect of a model that generates.
LENT = ("generate", "can_generate", "generation_config", "output_modalities")


def would_replace(model: nn.Module) -> dict[str, object] | None:
    """The attributes that `lend_generate` would replace, for `take_back`; None if the class itself generates by
    diffusion."""
    if isinstance(model, DiffusionGenerationMixin):
        return None
    return {name: model.__dict__[name] for name in LENT if name in model.__dict__}


def generation_config_of(model: Any) -> GenerationConfig:
    """The model's generation config as a `DiffusionGenerationConfig`, or a new one from the model's config."""
    from dllm_fast.generation_config import DiffusionGenerationConfig

    config = getattr(model, "generation_config", None)
    if config is None:
        return DiffusionGenerationConfig.from_model_config(model.config)
    return DiffusionGenerationConfig.of(config)


def lend_generate(model: nn.Module, generation_config: GenerationConfig | None) -> None:
    """Set `DiffusionGenerationMixin.generate` on this instance, with the other attributes of `LENT`."""
    model.__dict__.update(
        generate=types.MethodType(DiffusionGenerationMixin.generate, model),
        can_generate=_can_generate,
        generation_config=generation_config,
        output_modalities=DiffusionGenerationMixin.output_modalities,
    )


def take_back(attributes: dict[str, object], replaced: dict[str, object]) -> None:
    """Undo `lend_generate` among a model's attributes."""
    for name in LENT:
        attributes.pop(name, None)
    attributes.update(replaced)
