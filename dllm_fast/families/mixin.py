"""`DiffusionGenerationMixin`: the ``generate`` of the native LLaDA, and of every model while it is patched."""

import types

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin


class DiffusionGenerationMixin:
    """Generation for masked-diffusion models, of the shape of transformers' mixin for DiffusionGemma.

    It is not a ``GenerationMixin``: that decodes from left to right.
    """

    output_modalities = ("text",)

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,  # [B, P] int64
        generation_config: GenerationConfig | None = None,
        logits_processor=None,
        stopping_criteria=None,
        streamer=None,
        custom_generate=None,
        trust_remote_code: bool | None = None,
        **kwargs,
    ):
        """Fill [MASK]s after each prompt, and inside it, by `dllm_fast.generate`.

        ``model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=64, block_length=32, temperature=0.7)``.
        A model that is not patched generates the same, slower.

        Args:
            inputs: the prompts; or ``input_ids``. With ``attention_mask`` [B, P], 0 on padding, on either side.
            generation_config: a `DiffusionGenerationConfig` or any other ``GenerationConfig``. What it leaves open is
                ``model.generation_config``'s, then `DiffusionGenerationConfig`'s defaults.
            logits_processor, stopping_criteria: None, or empty lists: there is no single next token for them.
            streamer: as `dllm_fast.generate`'s.
            custom_generate: `dllm_fast.custom_generate`, which is this; or a folder, local or a hub's, that has a
                ``custom_generate/generate.py``, to be run with ``trust_remote_code=True``.
            kwargs: fields of the config, which come before it, or `dllm_fast.generate`'s arguments by their names
                there (``gen_length``, ``eos_id``). ``token_type_ids`` may be there if they are all 0.

        Returns:
            `DiffusionOutput`; with ``return_dict_in_generate=False`` its ``sequences`` alone, [B, P + new] int64.

        Raises:
            ValueError: an argument or a field that does not fit or cannot be honoured, by name, before any work.
            MemoryError: as `dllm_fast.generate`.
        """
        from dllm_fast import hf  # what users call stands above the models, which only lend it their name

        if custom_generate is None or hf.is_ours(custom_generate):
            run = hf.diffusion_generate if custom_generate is None else custom_generate
            # A callable, and a folder, answer as transformers' own generate does unless they are told otherwise.
            given = dict(kwargs, inputs=inputs, streamer=streamer)
            given = {name: value for name, value in given.items() if value is not None or name in hf.NONE_COUNTS}
            return run(
                self, generation_config=generation_config, logits_processor=logits_processor,
                stopping_criteria=stopping_criteria, **given,
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
            raise ValueError(f"custom_generate={custom_generate!r}: {type(self).__name__} decodes by dllm_fast alone")
        return own(self, custom_generate=custom_generate, trust_remote_code=trust_remote_code, **arguments)

    def adjust_generation_fn(self, *args, **kwargs) -> None:
        """What transformers 5 calls after loading: read ``generation_config.json``."""
        GenerationMixin.adjust_generation_fn(self, *args, **kwargs)
        self.generation_config = generation_config_of(self)


def _can_generate() -> bool:
    return True


# What `lend_generate` puts on an instance: generate, and what transformers' pipelines and `save_pretrained` ask of a
# model that generates.
LENT = ("generate", "can_generate", "generation_config", "output_modalities")


def would_replace(model: nn.Module) -> dict[str, object] | None:
    """The attributes that `lend_generate` would replace, for `take_back`; None for a model whose class generates by
    diffusion."""
    if isinstance(model, DiffusionGenerationMixin):
        return None
    return {name: model.__dict__[name] for name in LENT if name in model.__dict__}


def generation_config_of(model: nn.Module) -> GenerationConfig:
    """The model's own as a `DiffusionGenerationConfig`, or one made from its config."""
    from dllm_fast.generation_config import DiffusionGenerationConfig

    config = getattr(model, "generation_config", None)
    if config is None:
        return DiffusionGenerationConfig.from_model_config(model.config)
    return DiffusionGenerationConfig.of(config)


def lend_generate(model: nn.Module, generation_config: GenerationConfig) -> None:
    """Put `DiffusionGenerationMixin.generate` on this instance, with what belongs to it (`LENT`)."""
    model.__dict__.update(
        generate=types.MethodType(DiffusionGenerationMixin.generate, model),
        can_generate=_can_generate,
        generation_config=generation_config,
        output_modalities=DiffusionGenerationMixin.output_modalities,
    )


def take_back(attributes: dict[str, object], replaced: dict[str, object]) -> None:
    """Undo `lend_generate` in a model's attributes."""
    for name in LENT:
        attributes.pop(name, None)
    attributes.update(replaced)
