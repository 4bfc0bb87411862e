"""The masked-diffusion process: corruption of clean text, and the training loss that inverts it.

The loss is the forward of a module: of `DiffusionLoss`, or of a model that `bind_loss` has changed. So a wrapper around
the module takes effect (DistributedDataParallel, FSDP, torch.compile, autocast). The forward calls the model's own
modules, so adapters, gradient checkpointing and dropout take effect too.

All noise is a function of (seed, step, row of the step's whole batch). Splitting the batch differently over processes
or micro-batches changes no draw.
"""

import functools
import hashlib
import types
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertForMaskedLM, PreTrainedModel, RobertaForMaskedLM

from dllm_fast.families import TRAINED
from dllm_fast.families.gpt import BidirectionalGPT2LMHeadModel
from dllm_fast.families.linears import plain
from dllm_fast.train.head_loss import head_nll
from dllm_fast.train.masking import Masking

LLADA = Masking()
CUT = 0.01  # share of steps that cut their rows to a random length, as in LLaDA's pre-training
IGNORED = -100  # the label of unmasked positions


def generator(*key: object) -> torch.Generator:
    """A CPU generator seeded by ``key``."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest, "little") >> 1)


def times(seed: int, step: int, rows: Sequence[int], batch: int) -> torch.Tensor:
    """Times t [B] fp64 of ``rows`` of a step's ``batch``, uniform on [0, 1).

    A step draws one number and spaces its rows' t evenly from there (arXiv:2107.00630, appendix I). Each t is still
    uniform, and the loss varies less from step to step.
    """
    shift = torch.tensor(rows, dtype=torch.float64, device="cpu") / batch
    return (_uniform(generator(seed, step, "ratio"), 1).double() + shift) % 1.0


def _uniform(source: torch.Generator, count: int) -> torch.Tensor:
    return torch.rand(count, generator=source, dtype=torch.float32, device="cpu")


def cut_length(seed: int, step: int, length: int) -> int:
    """``length``; in one step of a hundred, a random length from 1 to ``length``."""
    source = generator(seed, step, "length")
    if float(_uniform(source, 1)) >= CUT:
        return length
    return int(torch.randint(1, length + 1, (1,), generator=source, device="cpu"))


def corrupt(
    input_ids: torch.Tensor,  # [B, L] int64
    prompt_length: torch.Tensor | None,  # [B] int64: leading positions that are never masked; None: no prompts
    mask_id: int,
    seed: int,
    step: int,
    rows: Sequence[int],
    batch: int,
    masking: Masking = LLADA,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mask positions after row b's prompt, as ``masking`` says. Returns (noisy ids, labels, weight).

    Noisy ids and labels are [B, L]; the label is the clean id at masked positions and -100 elsewhere. The weight [B]
    fp32 multiplies a row's summed negative log-likelihood: by default ``1 / (p_b (L - prompt))``, p_b being the
    probability of masking. Noise is drawn on the CPU, so it is the same whatever device ``input_ids`` is on.
    """
    open_ = torch.ones(input_ids.shape, dtype=torch.bool, device="cpu")
    if prompt_length is not None:
        open_ = torch.arange(input_ids.shape[1], device="cpu") >= prompt_length.cpu()[:, None]
    return corrupt_open(input_ids, open_, mask_id, seed, step, rows, batch, masking)


def corrupt_open(
    input_ids: torch.Tensor,  # [B, L] int64
    open_: torch.Tensor,  # [B, L] bool, on the host: what may be masked
    mask_id: int,
    seed: int,
    step: int,
    rows: Sequence[int],
    batch: int,
    masking: Masking,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`corrupt` of any positions."""
    device = input_ids.device
    t = times(seed, step, rows, batch)
    ratio = masking.ratios(t)
    draw = torch.stack([_uniform(generator(seed, step, row), input_ids.shape[1]) for row in rows])
    masked = masking.masked(ratio, open_, draw)
    weight = masking.weights(t, ratio, open_, masked).to(device)
    masked = masked.to(device)
    return input_ids.masked_fill(masked, mask_id), input_ids.masked_fill(~masked, IGNORED), weight


def masked_nll(
    model: nn.Module,
    input_ids: torch.Tensor,  # [B, L] int64, corrupted
    labels: torch.Tensor,  # [B, L] int64: clean ids, -100 where a position does not count
) -> torch.Tensor:
    """Each row's sum of -ln p(label) over its labelled positions, [B] fp32.

    The backbone runs as the model's own modules. A native LLaDA, a ModernBERT, a BERT, a RoBERTa or a GPT without its
    causal mask applies its head to the labelled positions only, and keeps no logits; any other model (LLaDA's remote
    code, for example) computes all its logits.
    """
    labelled = labels != IGNORED
    target = labels[labelled]  # [N]
    found = head_inputs(model, input_ids, labelled)
    if found is None:
        nll = F.cross_entropy(model(input_ids=input_ids).logits[labelled].float(), target, reduction="none")
    else:
        hidden, head = found
        if isinstance(head, nn.Embedding) or plain(head):
            nll = head_nll(hidden, head, target)
        else:  # an adapter in the head's place: call it, so that it takes effect
            nll = F.cross_entropy(head(hidden).float(), target, reduction="none")
    row = labelled.nonzero()[:, 0]
    return nll.new_zeros(len(labels)).index_add(0, row, nll)


def head_inputs(
    model: Any,
    input_ids: torch.Tensor | None,  # [B, L] int64
    chosen: torch.Tensor,  # [B, L] bool
    embeds: torch.Tensor | None = None,  # [B, L, d], in place of input_ids
) -> tuple[torch.Tensor, nn.Module] | None:
    """The chosen positions' hidden states [N, d] and the matrix that makes logits of them; None of another model."""
    family = TRAINED.get(getattr(model.config, "model_type", ""))
    if family is not None and isinstance(model, family.model_class):
        return family.labelled(model, input_ids, chosen, embeds)
    if isinstance(model, BertForMaskedLM):
        head = model.cls.predictions
        hidden = model.bert(input_ids, inputs_embeds=embeds).last_hidden_state
        return head.transform(hidden[chosen]), head.decoder
    if isinstance(model, RobertaForMaskedLM):
        head = model.lm_head
        hidden = model.roberta(input_ids, inputs_embeds=embeds).last_hidden_state
        return head.layer_norm(F.gelu(head.dense(hidden[chosen]))), head.decoder
    if isinstance(model, BidirectionalGPT2LMHeadModel):
        return model.states(input_ids, inputs_embeds=embeds)[chosen], model.lm_head
    return None


class DiffusionLoss(nn.Module):
    """LLaDA's training losses (arXiv:2502.09992) for ``model``, for use in your own training loop.

    Wrap this module, not the model inside it: ``DistributedDataParallel(DiffusionLoss(model))``.

    Args:
        model: a LLaDA or ModernBERT, or a PEFT model of one.
        mask_id: default ``model.config.mask_token_id``.
        masking: which positions are masked, and what they weigh.

    Raises:
        ValueError: ``model`` is of another kind or already wrapped, or there is no mask id.
    """

    def __init__(self, model: nn.Module, mask_id: int | None = None, masking: Masking = LLADA):
        super().__init__()
        self.masking = masking
        self.mask_id = base_model(model).config.mask_token_id if mask_id is None else mask_id
        if self.mask_id is None:
            raise ValueError("mask_id: None given, and model.config has no mask_token_id")
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,  # [B, L] int64: clean; prompt, answer, and end-of-text tokens up to L
        prompt_length: torch.Tensor | None = None,  # [B] int64
        seed: int = 0,
        step: int = 0,
        first_row: int = 0,
        batch: int | None = None,
    ) -> torch.Tensor:
        """The mean over rows of ``(1 / answer length) sum over masked positions of -ln p(x | noisy) / p_mask``: a
        scalar, in nats per token.

        Without ``prompt_length`` this is the pre-training loss (eq. 3), whose expectation is an upper bound of the
        negative log-likelihood per token. With it, this is the fine-tuning loss (eq. 5): prompts stay visible, and the
        end-of-text tokens that fill a row up to L belong to its answer.

        The noise is a function of ``seed``, ``step`` and each row's number in the step's whole batch, which all
        processes and micro-batches share: these rows are ``first_row``, ``first_row + 1``, ... of ``batch`` (default
        B).
        """
        rows = range(first_row, first_row + len(input_ids))
        given = (input_ids, prompt_length, self.mask_id, seed, step, rows, batch or len(input_ids))
        noisy, labels, weight = corrupt(*given, self.masking)
        return (masked_nll(base_model(self.model), noisy, labels) * weight).mean()


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, or the one that a PEFT model wraps. Raises ValueError for anything else."""
    base = getattr(model, "get_base_model", lambda: model)()
    if not isinstance(base, PreTrainedModel):
        raise ValueError(
            f"model: a {type(model).__name__} is not a transformers model; wrap the loss, not the model in it"
        )
    return base


def bind_loss(model: nn.Module) -> None:
    """Make ``model(input_ids=noisy, masked_labels=labels)`` return `masked_nll`'s [B], through any wrapper."""
    bind(model, "masked_labels", lambda base, input_ids, masked_labels: masked_nll(base, input_ids, masked_labels))


def bind(model: nn.Module, key: str, loss: Callable[..., torch.Tensor]) -> None:
    """Make ``model(**inputs)`` return ``loss(base, **inputs)`` if ``key`` is among the inputs, base being `base_model`.

    Any other call behaves as before. Like `dllm_fast.patch`, this changes the forward of this instance alone.
    """
    base = base_model(model)
    own = cast(types.MethodType, base.forward).__func__

    @functools.wraps(own)
    def forward(self, *args, **kwargs):
        return loss(self, **kwargs) if key in kwargs else own(self, *args, **kwargs)

    base.forward = types.MethodType(forward, base)
