"""A GPT-2 whose causal mask is taken off: every position sees every other.

Its folders have a ``model_type`` of their own, so that no library loads them as the causal model that they are not.
"""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForMaskedLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput


class BidirectionalGPT2Config(GPT2Config):
    """GPT-2's config, with two fields more.

    Args:
        mask_token_id: the id of [MASK].
        shifted: the head's output at position i predicts token i + 1, as in the autoregressive checkpoint that the
            model came from; else token i.
    """

    model_type = "bidirectional_gpt2"
    is_causal = False
    mask_token_id: int | None = None
    shifted: bool = False

    def __init__(self, mask_token_id: int | None = None, shifted: bool = False, **kwargs):
        super().__init__(**kwargs)
        self.mask_token_id = mask_token_id
        self.shifted = shifted


class BidirectionalGPT2LMHeadModel(GPT2LMHeadModel):
    """GPT-2's modules and parameter names, without the causal mask. ``logits[:, i]`` predict token i."""

    config_class = BidirectionalGPT2Config
    shifts_logits = True  # by itself, with ``config.shifted``

    def forward(
        self,
        input_ids: torch.Tensor | None = None,  # [B, L] int64
        attention_mask: torch.Tensor | None = None,  # [B, L], 0 = padding
        position_ids: torch.Tensor | None = None,  # [B, L]
        inputs_embeds: torch.Tensor | None = None,  # [B, L, d], in place of input_ids
        **kwargs,
    ) -> MaskedLMOutput:
        """``logits`` [B, L, V]. With ``config.shifted``, they are the head's output one position to the left; the
        first token has no such position, and takes the head's output at its own."""
        last = self._last(input_ids, attention_mask, position_ids, inputs_embeds)
        logits: Any = self._moved(self.lm_head(last))
        return MaskedLMOutput(logits=logits)

    def states(
        self,
        input_ids: torch.Tensor | None = None,  # [B, L] int64
        inputs_embeds: torch.Tensor | None = None,  # [B, L, d], in place of input_ids
    ) -> torch.Tensor:
        """What the head makes the logits of, [B, L, d]."""
        return self._moved(self._last(input_ids, inputs_embeds=inputs_embeds))

    def _moved(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, L, ...], each from one position to the left, with ``config.shifted``."""
        return torch.cat((x[:, :1], x[:, :-1]), 1) if self.config.shifted else x

    def _last(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None) -> torch.Tensor:
        """The last layer's states, [B, L, d]."""
        embeds = self.transformer.wte(input_ids) if inputs_embeds is None else inputs_embeds
        # A mask of four dimensions is taken as it is: transformers adds no causal one to it.
        bias = embeds.new_zeros(embeds.shape[:2])
        if attention_mask is not None:
            bias = bias.masked_fill(attention_mask == 0, torch.finfo(bias.dtype).min)
        mask = bias[:, None, None].expand(-1, 1, embeds.shape[1], -1)  # [B, 1, L, L]
        if self.config._attn_implementation == "eager":  # that of transformers 4 adds the causal mask of a buffer
            for layer in self.transformer.h:
                if (seen := getattr(layer.attn, "bias", None)) is not None:
                    seen.fill_(True)
        options = {"attention_mask": mask, "position_ids": position_ids, "use_cache": False}
        return self.transformer(inputs_embeds=embeds, **options).last_hidden_state


def register() -> None:
    """Let transformers' ``AutoModelForMaskedLM`` load such folders. Harmless when called again."""
    AutoConfig.register(BidirectionalGPT2Config.model_type, BidirectionalGPT2Config, exist_ok=True)
    AutoModelForMaskedLM.register(BidirectionalGPT2Config, BidirectionalGPT2LMHeadModel, exist_ok=True)


def without_causal_mask(model: GPT2LMHeadModel, shifted: bool) -> BidirectionalGPT2LMHeadModel:
    """A model with the weights of an autoregressive GPT-2; they are shared, not copied."""
    fields = model.config.to_dict()
    fields.pop("model_type", None)
    bidirectional = BidirectionalGPT2LMHeadModel(BidirectionalGPT2Config(**{**fields, "shifted": shifted}))
    bidirectional.transformer = model.transformer
    bidirectional.lm_head = model.lm_head
    return bidirectional


def new(width: int, heads: int, layers: int, ffn: int, positions: int, tie: bool, **ids) -> PreTrainedModel:
    """A newly initialised model of these sizes; ``ids`` are ``vocab_size`` and the special tokens' ids."""
    ids.setdefault("bos_token_id", ids["eos_token_id"])  # GPT-2's own id is beyond a small vocabulary
    config = BidirectionalGPT2Config(
        n_embd=width, n_head=heads, n_layer=layers, n_inner=ffn, n_positions=positions, tie_word_embeddings=tie,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **ids,
        initializer_range=width**-0.5,  # at its default of 0.02 a narrow model knows only letter frequencies for long
    )  # fmt: skip
    return BidirectionalGPT2LMHeadModel(config)
