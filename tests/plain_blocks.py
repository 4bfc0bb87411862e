"""The published samplers of block-causal models, written out: SDAR's and LLaDA2's loops over a model's own forward.

One sequence, no cache: every step evaluates all that its block sees, under the mask that the samplers build.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dllm_fast.kernels import reference


@dataclass
class Found:
    ids: torch.Tensor  # [P + gen_length]
    steps: int = 0


def causal_blocks(length: int, block: int, prompt: int = 0) -> torch.Tensor:
    """Which positions each sees, [L, L] bool: all blocks up to its own. D2F's first block is the whole ``prompt``
    (`create_full_block_attention_mask` of zhijie-group/Discrete-Diffusion-Forcing)."""
    seen = torch.zeros(length, length, dtype=torch.bool)
    seen[:prompt, :prompt] = True
    for begin in range(prompt, length, block):
        seen[begin : begin + block, : begin + block] = True
    return seen


@torch.no_grad()
def run(
    logits: Callable,  # of ids [L] under a mask [L, L] bool: [L, V]
    prompt: torch.Tensor,  # [P]
    gen_length: int,
    block: int,
    mask_id: int,
    choose: Callable,  # of tokens and confidences of the masked positions [N], in order: which are committed, [N] bool
    confidence: str = "probability",
    temperature: float = 0.0,
    seed: int = 0,
    row: int = 0,
    cfg_scale: float = 0.0,
    edit: tuple[float, int] | None = None,  # LLaDA2.1's editing_threshold and max_post_steps
    first: int = 0,  # how many positions are one block, before all others
) -> Found:
    length = len(prompt) + gen_length
    total = first + -(-(length - first) // block) * block
    ids = torch.cat((prompt, prompt.new_full((total - len(prompt),), mask_id)))
    given = ids != mask_id
    seen = causal_blocks(total, block, first)
    found = Found(ids)
    for begin in range(first, total, block):
        step = after = 0
        own = ~given[begin : begin + block]  # not the prompt's
        while bool(own.any()):
            if not bool((ids[begin : begin + block] == mask_id).any()):
                after += 1
                if edit is None or after > edit[1]:
                    break
            # 1. Everything up to the end of the block, and of that the block.
            end = begin + block
            z = logits(ids[:end], seen[:end, :end])[begin:]
            if cfg_scale:
                unprompted = ids.masked_fill(given, mask_id)
                base = logits(unprompted[:end], seen[:end, :end])[begin:]
                z = base + (cfg_scale + 1) * (z - base)
            # 2. A token and a confidence for each position that is not the prompt's.
            at = begin + own.nonzero()[:, 0]
            token, score, _ = reference.select(
                z[at - begin], mask_id, confidence=confidence, temperature=temperature, seed=seed, step=step,
                row=torch.full_like(at, row), position=at,
            )  # fmt: skip
            # 3. The sampler's choice of the masked ones, and edits of the others.
            step += 1
            found.steps += 1
            masked = ids[at] == mask_id
            new = masked.clone()
            if bool(masked.any()):
                new[masked] = choose(token[masked], score[masked])
                assert bool(new.any())
            edited = ~masked & (token != ids[at]) & (edit is not None and score >= edit[0])
            ids[at] = torch.where(new | edited, token, ids[at])
            if not bool(masked.any()) and not bool(edited.any()):
                break
    found.ids = ids[:length]
    return found


def best(score: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` largest, the first of equal ones; [N] bool."""
    kept = torch.zeros_like(score, dtype=torch.bool)
    kept[score.argsort(descending=True, stable=True)[:count]] = True
    return kept


def dynamic(threshold: float, least: int = 1) -> Callable:
    """SDAR's ``low_confidence_dynamic``, LLaDA2's: all confident ones, if they are at least so many."""

    def choose(token, score):
        confident = score >= threshold
        return confident if int(confident.sum()) >= least else best(score, least)

    return choose


def static(count: int) -> Callable:
    """SDAR's ``low_confidence_static``."""
    return lambda token, score: best(score, count)


def sequential(count: int) -> Callable:
    """SDAR's ``sequential``: from left to right."""
    return lambda token, score: torch.arange(len(score)) < count
