"""DiffusionGemma: transformers' own generation loop, with a denoising step that keeps no logits (`families.canvas`).

`patch` binds `denoising_step` on the model in the place of transformers' ``_denoising_step``. The decoder, the cache,
the sampler, the criterion and the loop stay transformers'. What goes from step to step is the soft embedding [B, L, d],
instead of logits [B, L, V] from which the decoder would compute it.
"""

import functools
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dllm_fast.families import canvas
from dllm_fast.families.bypass import attached, global_hooks
from dllm_fast.families.family import Family
from dllm_fast.families.forward import patch_of
from dllm_fast.families.linears import Matmuls, matmuls
from dllm_fast.families.rounded import RoundedHead

CLASS = "DiffusionGemmaForBlockDiffusion"
STEP = "_denoising_step"
ARGUMENTS = (
    "decoder_forward", "current_canvas", "argmax_canvas", "input_ids", "decoder_position_ids",
    "self_conditioning_logits", "mask_mapping", "past_key_values", "finished_denoising", "cur_step", "sampler",
    "logits_processor", "diffusion_stopping_criteria", "model_kwargs",
)  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16)
MASKED_ONLY = (
    f"model: a {CLASS} generates with model.generate(...), transformers' own loop, whose denoising step is patched. "
    "dllm_fast.generate is for masked-diffusion models"
)


class DiffusionGemma(Family):
    runs_own = True
    layerwise = False
    generates = False  # model.generate stays transformers'
    keeps_weights = "the model runs its own forward, with its own weights"

    def __init__(
        self, model: nn.Module, impl: str, matmuls: Matmuls = matmuls, rounded_head: RoundedHead | None = None
    ):
        super().__init__(model, impl, matmuls, rounded_head)
        if impl not in ("auto", "torch"):
            raise ValueError(f"impl={impl!r}: the denoising step of a {CLASS} is written in PyTorch alone")
        if rounded_head is not None:
            raise ValueError(f"head='fp8': a {CLASS} has the head that it embeds with, and is not rounded")
        if STEP in model.__dict__ and patch_of(model) is None:
            raise ValueError(f"model: its {STEP} has been replaced already")
        _, *found = inspect.signature(getattr(type(model), STEP)).parameters
        if tuple("past_key_values" if name == "cache" else name for name in found) != ARGUMENTS:
            raise ValueError(f"model: this transformers' {STEP} takes {', '.join(found)}, not {', '.join(ARGUMENTS)}")
        self._settle()

    @staticmethod
    def matches(model: nn.Module) -> bool:
        kind = type(model)
        return kind.__name__ == CLASS and kind.__module__.startswith("transformers.")

    def methods(self) -> dict[str, Callable]:
        return {STEP: denoising_step}

    def head(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.model.lm_head.weight, self.model.lm_head.bias

    def require_whole(self) -> None:
        raise ValueError(MASKED_ONLY)

    def hidden(self, *args, **kwargs) -> torch.Tensor:
        raise ValueError(MASKED_ONLY)


@dataclass(frozen=True)
class SoftEmbedding:
    """What a step hands to the next one, where transformers' hands logits."""

    value: torch.Tensor | None  # [B, L, d], of the embedding's dtype and scaled by it; None after a canvas' last step

    def cpu(self) -> torch.Tensor:
        """What the loop calls for a streamer that takes logits."""
        raise ValueError("streamer: it takes logits, which are never kept; call dllm_fast.unpatch(model) first")


def denoising_step(
    self: Any,
    *,
    decoder_forward: Callable,
    current_canvas: torch.Tensor,  # [B, L] int64
    argmax_canvas: torch.Tensor,  # [B, L] int64
    input_ids: torch.Tensor,  # [B, P] int64
    decoder_position_ids: torch.Tensor,
    self_conditioning_logits: Any,  # None at a canvas' first step, or the caller's [B, L, V]; then `SoftEmbedding`
    mask_mapping: dict[str, torch.Tensor],
    finished_denoising: torch.Tensor,  # [B] bool
    cur_step: int,  # counts down to 1
    sampler: Any,
    logits_processor: Any,
    diffusion_stopping_criteria: Any,
    past_key_values: Any = None,
    cache: Any = None,  # the name of past_key_values in newer versions of transformers
    **model_kwargs,
) -> tuple:
    """Transformers' ``_denoising_step``, of the same arguments and results but for the soft embedding.

    A canvas whose first step `why_not` finds something against runs transformers' own steps.
    """
    before = self_conditioning_logits
    prompt = {"past_key_values": past_key_values} if cache is None else {"cache": cache}
    parts = sampler, logits_processor, diffusion_stopping_criteria
    if not isinstance(before, SoftEmbedding) and why_not(self, decoder_forward, parts, model_kwargs):
        return getattr(type(self), STEP)(
            self, decoder_forward, current_canvas, argmax_canvas, input_ids, decoder_position_ids, before, mask_mapping,
            *prompt.values(), finished_denoising, cur_step, *parts, **model_kwargs,
        )  # fmt: skip
    # 1. Hidden states.
    hidden = decoded(
        self, before, decoder_input_ids=current_canvas, decoder_attention_mask=mask_mapping,
        decoder_position_ids=decoder_position_ids, **prompt, **model_kwargs,
    )  # fmt: skip
    # 2. Samples, argmax, entropies and the soft embedding, from tiles of logits.
    step = torch.tensor(cur_step, device=hidden.device, dtype=torch.int32)
    embedding = self.model.decoder.embed_tokens
    rows, vocabulary = current_canvas.numel(), self.lm_head.weight.shape[0]
    width = canvas.tile_width(rows, vocabulary, hidden.device)
    out = canvas.denoise(
        hidden.flatten(0, 1),
        self.lm_head.weight,
        embedding.weight if cur_step > 1 else None,
        self.final_logit_softcapping,
        functools.partial(logits_processor, input_ids, cur_step=step),
        torch.rand(-(-vocabulary // width), rows, dtype=torch.float64, device=hidden.device),
        width,
    )
    sampled, best, entropy = (x.view_as(current_canvas) for x in out[:3])
    if not bool(torch.isfinite(entropy).all()):
        raise ValueError(f"model: its logits are NaN, with {cur_step} steps of a canvas to go")
    soft = out.soft
    if soft is not None:
        soft = soft.view_as(hidden).to(embedding.weight.dtype) * embedding.embed_scale.to(embedding.weight.dtype)
    # 3. What is accepted, and noise for the rest.
    accepted = accept(sampler, current_canvas, sampled, entropy)
    renoised = sampler.renoise_canvas(accepted, step)
    # 4. Rows that have finished stay as they are.
    if diffusion_stopping_criteria is not None:
        done = finished_denoising[:, None]
        best = torch.where(done, argmax_canvas, best)
        renoised = torch.where(done, current_canvas, renoised)
        if soft is not None and isinstance(before, SoftEmbedding) and before.value is not None:
            soft = torch.where(done[..., None], before.value, soft)
        finished_denoising = finished_denoising | stops(diffusion_stopping_criteria, best, entropy)
    return renoised, best, SoftEmbedding(soft), finished_denoising


def why_not(model: Any, decoder_forward: Callable, parts: tuple, model_kwargs: dict) -> str | None:
    """Why a canvas is left to transformers' own steps; None if it is not."""
    from transformers.models.diffusion_gemma import generation_diffusion_gemma as own

    sampler, processors, criterion = parts
    head, embedding = model.lm_head, model.model.decoder.embed_tokens.weight
    if decoder_forward != model.forward or "forward" in model.__dict__:
        return "the decoder's forward is compiled, or another one"
    if type(sampler) is not own.EntropyBoundSampler or "accept_canvas" in sampler.__dict__:
        return "its sampler is not the entropy bound's"
    if any(type(item) is not own.LinearTemperatureScheduleLogitsProcessor for item in processors):
        return "a logits processor may need all logits at once"
    if criterion is not None and type(criterion) is not own.StableAndConfidentStoppingCriteria:
        return "its stopping criterion may need logits"
    if "self_conditioning_mask" in model_kwargs:
        return "self_conditioning_mask is applied to the logits' embedding"
    if type(head) is not nn.Linear or head.bias is not None or attached(head) or global_hooks():
        return "something is attached to the head"
    if not all(type(x) is nn.Parameter and x.dtype in DTYPES for x in (head.weight, embedding)):
        return "the head or the embedding is quantised, or of another dtype"
    if torch.is_autocast_enabled(head.weight.device.type):
        return "autocast"
    return None


def decoded(model: Any, before: Any, **inputs) -> torch.Tensor:
    """The decoder's hidden states [B, L, d]. ``before`` is a `SoftEmbedding`, logits [B, L, V] or None."""
    if not isinstance(before, SoftEmbedding):
        return model.model(self_conditioning_logits=before, **inputs).last_hidden_state
    own_thread = threading.get_ident()

    def give(module: nn.Module, args: tuple) -> tuple | None:
        """Replaces the zeros that the decoder hands on where it got no logits; not in another thread's call."""
        return (args[0], before.value) if threading.get_ident() == own_thread else None

    with patch_of(model).pool.lock:
        handle = model.model.decoder.self_conditioning.register_forward_pre_hook(give)
        try:
            return model.model(**inputs).last_hidden_state
        finally:
            handle.remove()


def accept(
    sampler: Any,
    canvas: torch.Tensor,  # [B, L] int64
    sampled: torch.Tensor,  # [B, L] int64
    entropy: torch.Tensor,  # [B, L] fp32
) -> torch.Tensor:
    """The canvas with the samples that the sampler's entropy bound accepts: those whose entropies, with all smaller
    ones but without their own, sum to no more. Leaves the mask of these in the sampler, whose renoising reads it."""
    ordered, order = entropy.sort(-1)
    smaller = (ordered.cumsum(-1) - ordered).gather(-1, order.argsort(-1))
    sampler.accepted_token_mask = smaller <= sampler.entropy_bound
    return torch.where(sampler.accepted_token_mask, sampled, canvas)


def stops(
    criterion: Any,
    best: torch.Tensor,  # [B, L] int64
    entropy: torch.Tensor,  # [B, L] fp32
) -> torch.Tensor:
    """Which rows the criterion stops, [B] bool: their argmax stayed the same, and their mean entropy is low. Keeps the
    criterion's history of canvases, as calling it with logits would."""
    confident = entropy.mean(-1) < criterion.confidence_threshold
    if criterion.stability_threshold == 0:
        return confident
    history = criterion.argmax_canvas_history
    if history is None:
        history = best.new_full((criterion.stability_threshold, *best.shape), -1)
    criterion.argmax_canvas_history = torch.cat((history[1:], best[None]))
    return confident & (history == best).all(-1).all(0)
