"""Masked language models sampled by a plain loop over their own forward, also those that `patch` does not take.

It takes whatever returns ``logits`` [B, L, V], of which ``logits[:, i]`` predict token i: a BERT, a GPT whose causal
mask is off, a model whose attention takes no backend. Every step is a forward of the whole sequence, one row at a time,
and `kernels/reference.py` chooses. Tokens are those of `generate(cache="none")`, for a model that both take.
"""

import functools
import warnings
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForMaskedLM, GPT2LMHeadModel, PretrainedConfig, PreTrainedModel

from dllm_fast.decoding.options import OPTIONS, Options
from dllm_fast.decoding.request import Row, check_batch, check_bidirectional, check_token_types, plan_row
from dllm_fast.decoding.schedules import Schedule, Threshold
from dllm_fast.decoding.server import PLAN_STEP, Stream
from dllm_fast.decoding.steps import Counts
from dllm_fast.decoding.values import require
from dllm_fast.families import gpt as gpts
from dllm_fast.generate import Output
from dllm_fast.kernels import reference
from dllm_fast.loading import check_folder, require_device


class Limits:
    """What a request is checked against: the size of the vocabulary, and how many positions the model has."""

    layerwise, shifted, block, after_prompt, ranks = True, False, None, False, None

    def __init__(self, model: nn.Module):
        config: PretrainedConfig = model.config  # type: ignore[assignment]
        self.vocab_size: int = config.vocab_size
        self.positions = positions_of(config)


def positions_of(config: PretrainedConfig) -> int:
    """The longest sequence that a model takes. RoBERTa's positions begin after its padding id."""
    positions = config.max_position_embeddings
    offset = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0
    return positions - offset


@torch.no_grad()
def generate_plain(
    model: nn.Module,
    input_ids: torch.Tensor,  # [B, P] int64
    attention_mask: torch.Tensor | None = None,  # [B, P], 0 = padding, on either side
    gen_length: int = 128,
    block_length: int = 32,
    schedule: Schedule = Threshold(0.9),
    confidence: str = "probability",
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    mask_id: int | None = None,
    eos_id: int | list[int] | tuple[int, ...] | None = None,
    seed: int | None = None,
    streamer=None,
    pad_id: int | None = None,
    suppress_tokens: int | list[int] | tuple[int, ...] | None = None,
    defer_tokens: int | list[int] | tuple[int, ...] | None = None,
    token_type_ids: torch.Tensor | None = None,
) -> Output:
    """`generate` for any model whose forward returns ``logits`` [B, L, V]; it need not be patched.

    Args:
        model: a masked language model, in eval mode. It is called as ``model(input_ids=...)`` with one row.
        mask_id: default ``model.config.mask_token_id``.

    The other arguments are `generate`'s. There is no cache, and no token is masked again.

    Returns:
        `Output`.

    Raises:
        ValueError: as `generate`.
    """
    given = {name: value for name, value in locals().items() if name in OPTIONS}
    check_token_types(token_type_ids)
    check_bidirectional(model, "generate_plain")
    limits = Limits(model)
    options = Options.of_call("generate_plain", {**given, "cache": "none"}, limits.block).resolved(model, limits)
    device = next(model.parameters()).device
    start, end = check_batch(input_ids, attention_mask, device)
    batch, prompt = input_ids.shape
    require(streamer is None or batch == 1, f"streamer: takes one row, and input_ids has {batch}")
    host = input_ids.cpu()
    rows = [plan_row(options, limits, b, host[b, start[b] : end[b]]) for b in range(batch)]
    require(any(row.blocks for row in rows), "gen_length=0 and no [MASK] in input_ids: there is nothing to fill")
    sequences = torch.cat((host, host.new_zeros(batch, options.gen_length)), 1)
    for row in rows:
        _fill(model, options, row, None if streamer is None else Stream(streamer, row))
        length = end[row.index] - start[row.index]
        sequences[row.index, start[row.index] : end[row.index]] = row.ids[:length]
        sequences[row.index, prompt:] = row.ids[length:]
    nfe = [row.counts.nfe for row in rows]
    positions = round(sum(row.counts.positions for row in rows))
    steps = max(row.counts.steps for row in rows)
    tokens = [row.tokens for row in rows]
    return Output(sequences.to(input_ids.device), max(nfe), max(nfe), 0, positions, nfe, steps, steps, tokens)


def _fill(model: nn.Module, options: Options, row: Row, stream: Stream | None) -> None:
    """Fill a row's blocks, from left to right."""
    while not row.done:
        first, masked = row.blocks[row.next]
        block = torch.arange(max(0, first), min(max(0, first) + options.block_length, len(row.ids)), device="cpu")
        draw = functools.partial(_draw, row, block)
        one = torch.tensor([masked], dtype=torch.int64, device="cpu")
        planned = options.schedule.counts(one, torch.full_like(one, len(row.blocks)), draw)
        steps = [(step, None) for step in range(len(block))] if planned is None else planned
        if stream is not None:
            stream.flush()
        for step, count in steps:
            if count is not None and not int(count):
                continue
            rule = options.schedule.rule if count is None else {"count": count}
            _step(model, options, row, block, step, rule)
            if row.draft is not None:
                row.draft(row.ids.clone(), int(block[-1]) + 1)
            if not bool(row.left()[block].any()):
                break
        row.next += 1
        row.take(row.ids, options.eos_id, options.pad_id)
        if stream is not None:
            stream.flush()
    if stream is not None:
        stream.end()


def _draw(row: Row, block: torch.Tensor) -> torch.Tensor:
    """A schedule's uniform draws of the block's positions, [1, T] fp64; 2 where nothing is to be filled."""
    drawn = reference.uniform(row.seed, PLAN_STEP, torch.full_like(block, row.noise), block)
    return drawn.where(row.left()[block], 2.0)[None]


def _step(model: nn.Module, options: Options, row: Row, block: torch.Tensor, step: int, rule: dict) -> None:
    """One step: a forward (guidance takes two), a token and a confidence for each candidate, the schedule's choice."""
    assert options.mask_id is not None
    logits = _logits(model, row.ids)[block]  # [T, V]
    if options.passes == 2:
        unprompted = row.ids.masked_fill(~row.open, options.mask_id)
        logits = reference.guided(logits, _logits(model, unprompted)[block], options.cfg_scale)
    row.counts.add(Counts(options.passes, 0, options.passes * len(row.ids), 1, 1))
    candidate = row.left()[block]
    token, score, lse = reference.select(
        logits, options.mask_id, candidate, options.schedule.confidence or options.confidence, options.temperature,
        row.seed, step, torch.full_like(block, row.noise), block, options.suppress_tokens, options.defer_tokens,
        options.top_k or 0, options.top_p,
    )  # fmt: skip
    if not bool(lse.isfinite().all()):
        where = f"step {step} of block {row.next} of row {row.index}"
        raise ValueError(f"model: logits are NaN or infinite at {where}")
    score = options.schedule.ranked_by(score, torch.arange(len(block), device="cpu"))
    reference.commit(row.ids[None], token[None], score[None], candidate[None], block[:1], **rule)


def _logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits [L, V] of ids [L], on the host, in fp32 or better."""
    logits = model(input_ids=ids[None].to(next(model.parameters()).device)).logits[0].cpu()
    return logits if logits.dtype == torch.float64 else logits.float()


def load_plain(
    name: str, dtype: torch.dtype | str = "auto", device: str | torch.device | None = None, shifted: bool = False
) -> PreTrainedModel:
    """Load a masked language model in eval mode, as transformers has it; of an autoregressive GPT-2 the causal mask is
    taken off.

    Args:
        name: a local folder or a hub name: BERT, RoBERTa and whatever else transformers' ``AutoModelForMaskedLM``
            takes; a GPT-2; or a GPT that ``train --family gpt`` wrote.
        shifted: of an autoregressive GPT-2: keep the head's output at i as the prediction of token i + 1.

    Raises:
        ValueError: there is no such folder, a file in it is missing or truncated, or it is no masked language model.
    """
    require_device(device)
    if Path(name).is_dir():
        check_folder(Path(name))
    elif Path(name).exists() or name.startswith((".", "/", "~")):
        raise ValueError(f"{name}: no such folder")
    kind = PretrainedConfig.get_config_dict(name)[0].get("model_type")
    gpts.register()
    cls = GPT2LMHeadModel if kind == "gpt2" else AutoModelForMaskedLM
    with torch.device("cpu"):
        try:
            loaded = cls.from_pretrained(name, dtype=dtype, output_loading_info=True)  # type: ignore[misc]
        except ValueError as error:
            raise ValueError(f"{name}: model_type {kind!r} is no masked language model and no GPT-2: {error}") from None
    model, report = loaded  # type: ignore[misc]
    if missing := sorted(report["missing_keys"]):
        warnings.warn(f"{name}: {len(missing)} parameters begin at random, among them {missing[0]}", stacklevel=2)
    if kind == "gpt2":
        model = gpts.without_causal_mask(model, shifted)
    return model.eval() if device is None else model.eval().to(device)
