"""The masked-diffusion process: corruption of clean text, and the training loss that inverts it.

The loss is the forward of a module, `DiffusionLoss` or a model that `bind_loss` was given: what wraps the module then
acts (DistributedDataParallel, FSDP, torch.compile, autocast), and inside it the model's own modules are called, so
adapters, gradient checkpointing and dropout do too.

All noise is a function of (seed, step, row of the step's whole batch): how rows are shared out to processes and
micro-batches changes no draw.
"""

import functools
import hashlib
import types
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from dllm_fast import ops
from dllm_fast.families import FAMILIES
from dllm_fast.families.linears import plain

EPS = 1e-3
CUT = 0.01  # share of steps whose rows are cut to a random length, as in LLaDA's pre-training
IGNORED = -100  # the label of a position that is not masked


def generator(*key: object) -> torch.Generator:
    """A generator on the CPU whose draws are a function of ``key``."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest, "little") >> 1)


def mask_ratios(seed: int, step: int, rows: Sequence[int], batch: int) -> torch.Tensor:
    """Mask probabilities [B] fp32 of ``rows`` of a step's ``batch``: ``(1 - 1e-3) t + 1e-3`` with t ~ U(0, 1).

    One draw is shared and shifted evenly over the batch (arXiv:2107.00630, appendix I): each t is still uniform, and
    the loss varies less from step to step.
    """
    shift = torch.tensor(rows, dtype=torch.float64, device="cpu") / batch
    t = (_uniform(generator(seed, step, "ratio"), 1).double() + shift) % 1.0
    return ((1 - EPS) * t + EPS).float()


def _uniform(drawn: torch.Generator, count: int) -> torch.Tensor:
    return torch.rand(count, generator=drawn, dtype=torch.float32, device="cpu")


def cut_length(seed: int, step: int, length: int) -> int:
    """``length``, or in one step of a hundred a random one up to it."""
    drawn = generator(seed, step, "length")
    if float(_uniform(drawn, 1)) >= CUT:
        return length
    return int(torch.randint(1, length + 1, (1,), generator=drawn, device="cpu"))


def corrupt(
    input_ids: torch.Tensor,  # [B, L] int64
    prompt_length: torch.Tensor | None,  # [B] int64: positions that are never masked; None: none
    mask_id: int,
    seed: int,
    step: int,
    rows: Sequence[int],
    batch: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mask each position behind the prompt of row b with probability p_b: (noisy ids, labels, weight).

    Noisy ids and labels are [B, L]; a label is the clean id of a masked position, elsewhere -100. The weight [B] fp32
    of a row's summed negative log-likelihood is ``1 / (p_b (L - prompt))``. Draws are the CPU's, the same for any
    device of ``input_ids``.
    """
    ratio, device = mask_ratios(seed, step, rows, batch), input_ids.device
    draw = [_uniform(generator(seed, step, row), input_ids.shape[1]) for row in rows]
    masked = (torch.stack(draw) < ratio[:, None]).to(device)  # [B, L]
    answer = torch.full((len(rows),), input_ids.shape[1], dtype=torch.int64, device=device)  # [B]
    if prompt_length is not None:
        answer = answer - prompt_length.to(device)
        masked &= torch.arange(input_ids.shape[1], device=device) >= prompt_length.to(device)[:, None]
    weight = 1 / (ratio.to(device) * answer.clamp(min=1))
    return input_ids.masked_fill(masked, mask_id), input_ids.masked_fill(~masked, IGNORED), weight


def masked_nll(
    model: nn.Module,
    input_ids: torch.Tensor,  # [B, L] int64, corrupted
    labels: torch.Tensor,  # [B, L] int64: clean ids, -100 where a position does not count
) -> torch.Tensor:
    """Each row's sum of -ln p(label) over its labelled positions, [B] fp32.

    The backbone runs as the model's own modules. Of a native LLaDA and a ModernBERT the head multiplies the labelled
    positions alone; any other model, LLaDA's remote code say, is asked for all its logits.
    """
    labelled = labels != IGNORED
    target = labels[labelled]  # [N]
    family = FAMILIES.get(getattr(model.config, "model_type", None))
    if family is not None and isinstance(model, family.model_class):
        hidden, head = family.labelled(model, input_ids, labelled)
    else:
        logits, head = model(input_ids=input_ids).logits[labelled], None
    if isinstance(head, nn.Embedding) or (head is not None and plain(head)):
        nll = ops.masked_loss(hidden, head.weight, getattr(head, "bias", None), target, None)
    else:  # an adapter in its place must act
        logits = logits if head is None else head(hidden)
        nll = F.cross_entropy(logits.float(), target, reduction="none")
    row = labelled.nonzero()[:, 0]
    return nll.new_zeros(len(labels)).index_add(0, row, nll)


class DiffusionLoss(nn.Module):
    """LLaDA's training losses (arXiv:2502.09992) of ``model``, for a training loop of one's own.

    Wrap this module, not the model inside it: ``DistributedDataParallel(DiffusionLoss(model))``.

    Args:
        model: a LLaDA or ModernBERT, or a PEFT model of one.
        mask_id: default ``model.config.mask_token_id``.

    Raises:
        ValueError: ``model`` is no such model or is wrapped already, or there is no mask id.
    """

    def __init__(self, model: nn.Module, mask_id: int | None = None):
        super().__init__()
        self.mask_id = base_model(model).config.mask_token_id if mask_id is None else mask_id
        if self.mask_id is None:
            raise ValueError("mask_id: None given, and model.config has no mask_token_id")
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,  # [B, L] int64: clean; prompt, answer, and end-of-text up to L
        prompt_length: torch.Tensor | None = None,  # [B] int64
        seed: int = 0,
        step: int = 0,
        first_row: int = 0,
        batch: int | None = None,
    ) -> torch.Tensor:
        """The mean over rows of ``(1 / answer length) sum over masked positions of -ln p(x | noisy) / p_mask``; a
        scalar, in nats a token.

        Without ``prompt_length`` that is the pre-training loss (eq. 3), in expectation an upper bound of the negative
        log-likelihood per token; with it the fine-tuning loss (eq. 5): prompts stay visible, and the end-of-text that
        fills a row up to L is part of its answer.

        The noise is a function of seed, step and the rows' numbers, ``first_row`` and on, in the step's ``batch`` over
        all processes and micro-batches; ``batch`` is B by default.
        """
        rows = range(first_row, first_row + len(input_ids))
        given = (input_ids, prompt_length, self.mask_id, seed, step, rows, batch or len(input_ids))
        noisy, labels, weight = corrupt(*given)
        return (masked_nll(base_model(self.model), noisy, labels) * weight).mean()


def base_model(model: nn.Module) -> PreTrainedModel:
    """The model itself, or what a PEFT model wraps. Raises ValueError for what is neither."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, PreTrainedModel):
        raise ValueError(
            f"model: a {type(model).__name__} is no transformers model; wrap the loss, not the model in it"
        )
    return base


def bind_loss(model: nn.Module) -> None:
    """Let ``model(input_ids=noisy, masked_labels=labels)``, through any wrapper, give `masked_nll`'s [B].

    Any other call is answered as before. It is this instance's forward, as it is `dllm_fast.patch`'s.
    """
    base = base_model(model)
    own = base.forward.__func__

    @functools.wraps(own)
    def forward(self, *args, masked_labels=None, **kwargs):
        if masked_labels is None:
            return own(self, *args, **kwargs)
        return masked_nll(self, kwargs["input_ids"], masked_labels)

    base.forward = types.MethodType(forward, base)
