"""`generate_flow`: all tokens at once from a flow language model, over and over, with less noise each time."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from dllm_fast import ops
from dllm_fast.decoding.device import as_written, upload
from dllm_fast.decoding.flips import flipped
from dllm_fast.decoding.options import as_id
from dllm_fast.decoding.request import check_batch, check_bidirectional, check_vocabulary
from dllm_fast.decoding.values import finite, require, share, whole
from dllm_fast.families.bypass import unwrapped
from dllm_fast.families.forward import patch_of
from dllm_fast.generate import Output
from dllm_fast.kernels import reference
from dllm_fast.patch import bound_family, bound_pool


class _Fused:
    """A patched model: its family's forward over the answers, and the fused head."""

    def __init__(self, model: torch.nn.Module):
        self.family = bound_family(model)
        require(self.family.ranks is None, "model: processes share it, and generate_flow is for a whole one")
        self.lock = bound_pool(model).lock
        self.device = self.family.head()[0].device
        self.vocab_size, self.positions = self.family.vocab_size, self.family.positions

    def predict(self, ids, mask, start, answer, **options):
        end = None if start is None else torch.full_like(start, ids.shape[1])
        hidden = self.family.hidden(ids, start, end, rows=answer.expand(len(ids), -1)).flatten(0, 1)
        options |= {"softcap": self.family.softcap, "impl": self.family.impl}
        token, _, lse = ops.predict(hidden, *self.family.head_operands(), **options)
        return token, lse


class _Plain:
    """Any other masked language model: its own forward, and every logit of the answers."""

    lock = contextlib.nullcontext()

    def __init__(self, model: Any):
        self.model = model
        table = model.get_input_embeddings().weight
        self.device, self.vocab_size = table.device, table.shape[0]
        self.positions: int = model.config.max_position_embeddings

    def predict(self, ids, mask, start, answer, **options):
        logits = self.model(input_ids=ids, attention_mask=mask).logits[:, answer].flatten(0, 1)
        token, _, lse = reference.select(logits if logits.dtype == torch.float64 else logits.float(), **options)
        return token, lse


@torch.no_grad()
def generate_flow(
    model: torch.nn.Module,
    input_ids: torch.Tensor,  # [B, P] int64
    attention_mask: torch.Tensor | None = None,  # [B, P], 0 = padding, on the left
    gen_length: int = 128,
    steps: int = 16,
    temperature: float = 0.0,
    start_ids: torch.Tensor | None = None,  # [B, gen_length] int64
    noise: float = 1.0,
    mask_id: int | None = None,
    seed: int | None = None,
    watch: Callable[[torch.Tensor], None] | None = None,
) -> Output:
    """``gen_length`` tokens after each prompt from a flow language model (``python -m dllm_fast.train flow``).

    The answer begins with tokens drawn uniformly from the vocabulary, or with ``start_ids``. Each step predicts all of
    its tokens; then each is flipped again, as a token of noise weight n is (`decoding.flips`). n falls linearly, from
    ``noise`` to 0 after the last step, so that later steps correct what earlier ones wrote.

    Args:
        model: a patched LLaDA or ModernBERT, over the fused ops; or any masked language model in eval mode, by its own
            forward. Both give the same tokens, to rounding.
        temperature: tokens are ``argmax(logits + temperature * Gumbel)``; 0 is greedy.
        start_ids: the answers to begin with, [B, gen_length], such as a text with wrong words. None: random tokens.
        noise: the noise weight at the beginning, from 0 to 1: how many of ``start_ids`` may be wrong. Where it is 0, no
            token is ever flipped.
        mask_id: never generated; default ``model.config.mask_token_id``.
        seed: of the noise, a pure function of (seed, step, row, position in the row), so that a row's tokens do not
            depend on its batch. None draws one from torch's global generator.
        watch: called with the answers [B, gen_length] that each step predicted.

    Returns:
        `Output`: sequences [B, P + gen_length] int64, and ``steps`` forwards of each row.

    Raises:
        ValueError: an argument that does not fit; it names the argument and the value, and nothing has run. Or logits
            are NaN or infinite; it names the step.
    """
    inner = unwrapped(model)
    runner = _Fused(model) if patch_of(inner) is not None else _Plain(model)
    check_bidirectional(inner, "generate_flow")
    gen_length, steps = whole("gen_length", gen_length), whole("steps", steps)
    temperature, noise = finite("temperature", temperature), share("noise", noise)
    mask_id = getattr(inner.config, "mask_token_id", None) if mask_id is None else mask_id
    require(mask_id is not None, "mask_id: None given, and model.config has no mask_token_id")
    seed = int(torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")) if seed is None else seed
    options = {"mask_id": as_id("mask_id", mask_id, runner.vocab_size), "temperature": temperature}
    options["seed"] = seed = whole("seed", seed, 0, 63)
    begin, end = check_batch(input_ids, attention_mask, runner.device)  # [B] each, on the host
    batch, prompt = input_ids.shape
    check_vocabulary("input_ids", input_ids, runner)
    late = (end != prompt).nonzero()
    require(not len(late), f"attention_mask: row {int(late[0]) if len(late) else 0} is padded on the right")
    fits = prompt + gen_length <= runner.positions
    asked = f"a prompt of {prompt} and gen_length={gen_length}"
    require(fits, f"input_ids: {asked} exceed the model's {runner.positions} positions")
    if start_ids is not None:
        _check_start(start_ids, (batch, gen_length), runner)

    start = None if attention_mask is None else upload(begin, runner.device)
    mask = None
    if attention_mask is not None:
        mask = torch.cat((attention_mask, attention_mask.new_ones(batch, gen_length)), 1)
    answer = torch.arange(prompt, prompt + gen_length, device=runner.device)
    row = torch.arange(batch, device=runner.device).repeat_interleave(gen_length)  # [B G]
    position = (answer - (0 if start is None else start[:, None])).expand(batch, -1).flatten()
    key = {"row": row, "position": position}
    tokens = torch.zeros_like(row) if start_ids is None else start_ids.flatten()
    bad = torch.full(
        (), steps, dtype=torch.int64, device=runner.device
    )  # the first step with logits that are not finite
    with torch.inference_mode(False), torch.no_grad(), as_written(runner.device), runner.lock:
        if start_ids is None:
            tokens = flipped(tokens, torch.ones_like(tokens), runner.vocab_size, seed, steps, **key)
        for step in range(steps):
            ids = torch.cat((input_ids, tokens.view(batch, gen_length)), 1)
            tokens, lse = runner.predict(ids, mask, start, answer, step=step, **key, **options)
            bad = torch.minimum(bad, torch.where(lse.isfinite().all(), steps, step))
            if watch is not None:
                watch(tokens.view(batch, gen_length))
            n = noise * (1 - (step + 1) / steps)
            if n > 0:
                weights = torch.full_like(lse, n)
                tokens = flipped(tokens, weights, runner.vocab_size, seed, step, **key)
    require(int(bad) == steps, f"model: its logits at step {int(bad)} are NaN or infinite")
    sequences = torch.cat((input_ids, tokens.view(batch, gen_length)), 1)
    positions = steps * int((prompt - begin + gen_length).sum())
    nfe, written = [steps] * batch, [gen_length] * batch
    return Output(sequences, steps, steps, 0, positions, nfe, steps, steps, written)


def _check_start(start_ids: torch.Tensor, shape: tuple[int, int], runner) -> None:
    good = isinstance(start_ids, torch.Tensor) and start_ids.dtype == torch.int64
    require(good, "start_ids: is not an int64 tensor")
    require(tuple(start_ids.shape) == shape, f"start_ids: shape {tuple(start_ids.shape)} is not {shape}")
    same = start_ids.device == runner.device
    require(same, f"start_ids: on {start_ids.device}, but the model is on {runner.device}")
    check_vocabulary("start_ids", start_ids, runner)
