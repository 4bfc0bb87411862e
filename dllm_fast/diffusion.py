"""The masked-diffusion process: corruption of clean text, and the training loss that inverts it."""

import torch

from dllm_fast import ops

EPS = 1e-3


def mask_ratios(batch: int, generator: torch.Generator) -> torch.Tensor:
    """Mask probabilities [B] fp32, each ``(1 - 1e-3) t + 1e-3`` with t ~ U(0, 1), as LLaDA is trained.

    One draw is shared and shifted evenly over the batch (arXiv:2107.00630, appendix I): each t is still uniform, and
    the loss varies less from batch to batch.
    """
    shift = torch.arange(batch, dtype=torch.float32, device="cpu") / batch
    t = (torch.rand(1, generator=generator, dtype=torch.float32, device="cpu") + shift) % 1.0
    return (1 - EPS) * t + EPS


def corrupt(
    input_ids: torch.Tensor,  # [B, L] int64
    ratio: torch.Tensor,  # [B]
    mask_id: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask each position of row b with probability ``ratio[b]``: (noisy ids [B, L], masked [B, L] bool).

    Draws come from the CPU generator, so that a run gives the same masks on any device.
    """
    draw = torch.rand(input_ids.shape, generator=generator, dtype=torch.float32, device="cpu")
    masked = (draw < ratio[:, None]).to(input_ids.device)
    return input_ids.masked_fill(masked, mask_id), masked


def pretrain_loss(family, input_ids: torch.Tensor, mask_id: int, generator: torch.Generator) -> torch.Tensor:
    """LLaDA's pre-training loss (arXiv:2502.09992, eq. 3) of clean ids [B, L]: a scalar, nats a token.

    ``(1 / (B L)) sum over masked positions of -ln p(x | noisy) / p_mask``: in expectation over t an upper bound of
    the negative log-likelihood per token. Hidden states and logits are computed at the masked positions alone.
    """
    ratio = mask_ratios(input_ids.shape[0], generator)
    noisy, masked = corrupt(input_ids, ratio, mask_id, generator)
    weight = (1 / ratio).to(input_ids.device)[:, None].expand_as(masked)[masked] / input_ids.numel()
    hidden = family.hidden(noisy, rows=masked)
    return ops.masked_loss(hidden, *family.head(), input_ids[masked], weight, impl=family.impl)


def sft_loss(
    family,
    input_ids: torch.Tensor,  # [B, L] int64: prompt, answer, and end-of-text up to L
    prompt_length: torch.Tensor,  # [B] int64
    mask_id: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """LLaDA's fine-tuning loss (arXiv:2502.09992, eq. 5): prompts stay visible, answers are corrupted; a scalar.

    The mean over rows of ``(1 / answer length) sum over masked answer positions of -ln p(x | noisy) / p_mask``. The
    end-of-text that fills a row up to L is part of its answer, so that the model learns where to end.
    """
    ratio = mask_ratios(input_ids.shape[0], generator)
    _, masked = corrupt(input_ids, ratio, mask_id, generator)
    answer = torch.arange(input_ids.shape[1], device=input_ids.device) >= prompt_length[:, None]  # [B, L]
    masked &= answer
    weight = 1 / (ratio.to(input_ids.device) * answer.sum(1) * len(input_ids))  # [B]
    hidden = family.hidden(input_ids.masked_fill(masked, mask_id), rows=masked)
    weight = weight[:, None].expand_as(masked)[masked]
    return ops.masked_loss(hidden, *family.head(), input_ids[masked], weight, impl=family.impl)
