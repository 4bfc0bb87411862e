"""LLaDA's published sampler, written out plainly: the yardstick of the tests, the demo and the benches.

It asks the model for every logit of the whole sequence at every step and works on all of them, in fp64 where the
original did in its first revisions (ML-GSAI/LLaDA, `generate.py`; arXiv:2502.09992, algorithm 5). Two differences, both
this package's semantics: [MASK] itself is never predicted, and the shares of a step may come from any schedule of
counts.
"""

from collections.abc import Callable, Sequence

import torch


@torch.no_grad()
def published_generate(
    logits_of: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor],  # (ids, mask) -> [B, L, V]
    input_ids: torch.Tensor,  # [B, P] int64, padded on the left
    attention_mask: torch.Tensor | None = None,  # [B, P]
    *,
    gen_length: int,
    block_length: int,
    steps: int | None = None,
    mask_id: int,
    cfg_scale: float = 0.0,
    pyramid: int | None = None,
    threshold: float | None = None,
    suppress_tokens: Sequence[int] = (),
    defer_tokens: Sequence[int] = (),
    watch: Callable[[torch.Tensor, slice, torch.Tensor], None] = lambda *step: None,
) -> tuple[torch.Tensor, int]:
    """Greedy, low-confidence remasking: (sequences [B, P + gen_length], NFE).

    One of ``steps`` (shared equally by blocks and steps), ``pyramid`` (1, 1, ..., 2, 2, ... tokens, each number
    ``pyramid`` times) and ``threshold`` (all tokens whose confidence reaches it, and the best) says what a step keeps.

    ``suppress_tokens`` is the original's ``logits_eos_inf`` for any ids: their logits are -inf before a token is
    chosen. ``defer_tokens`` is ``confidence_eos_eot_inf``: their logits are -inf once it is chosen, so that no
    probability counts them and their own is 0. (At a temperature above 0 the original writes one of its two ids into
    the noisy copy of the logits, where nothing reads it any more.)

    ``watch`` is given each step before it commits: the sequences, the live block, and the block's logits [B, T, V].
    """
    batch, prompt = input_ids.shape
    blocks, nfe = gen_length // block_length, 0
    x = torch.cat((input_ids, input_ids.new_full((batch, gen_length), mask_id)), 1)
    if attention_mask is not None:
        attention_mask = torch.cat((attention_mask, attention_mask.new_ones(batch, gen_length)), 1)
    given = x != mask_id
    for end in range(prompt + block_length, prompt + gen_length + 1, block_length):
        share = block_length if steps is None else steps // blocks
        for i in range(share):
            masked = x == mask_id
            masked[:, end:] = False
            if not masked.any():
                break
            logits = logits_of(x, attention_mask)
            nfe += 1
            if cfg_scale > 0:
                base = logits_of(x.masked_fill(given, mask_id), attention_mask)
                logits = base + (cfg_scale + 1) * (logits - base)
                nfe += 1
            live = slice(end - block_length, end)
            watch(x, live, logits[:, live])
            logits[..., list(suppress_tokens)] = float("-inf")
            choice = logits.clone()
            choice[..., mask_id] = float("-inf")
            token = choice.argmax(-1)
            logits[..., list(defer_tokens)] = float("-inf")
            probability = torch.softmax(logits.double(), -1)
            confidence = probability.gather(-1, token[..., None])[..., 0].masked_fill(~masked, float("-inf"))
            for row in range(batch):
                if threshold is not None:
                    k = max(1, int((confidence[row] >= threshold).sum()))
                elif pyramid is not None:
                    k = i // pyramid + 1
                else:
                    k = block_length // share + (i < block_length % share)
                order = confidence[row].argsort(descending=True, stable=True)[: min(k, int(masked[row].sum()))]
                x[row, order] = token[row, order]
    return x, nfe
