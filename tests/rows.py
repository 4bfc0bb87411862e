"""Random requests for several rows, run row by row, as one batch, and with seats: each way must give a row the same
results."""

import copy
import math
import random
from dataclasses import dataclass, replace

import torch
from tiny import EOS, MASK

import dllm_fast
from dllm_fast import (
    P2,
    Ancestral,
    Drift,
    Dynamic,
    EntropyBound,
    Every,
    Factor,
    FirstHitting,
    Pyramid,
    ReMDM,
    Sequential,
    Static,
    Threshold,
    Uniform,
    Verify,
    Window,
)
from dllm_fast.decoding.noise import NOISES
from dllm_fast.decoding.options import Options
from dllm_fast.decoding.request import plan_blocks, plan_row
from dllm_fast.decoding.server import Server
from dllm_fast.patch import bound_family, bound_pool

BLOCKS = (4, 8, 16)
Result = tuple[list[int], int]  # tokens, and NFE


@dataclass
class Request:
    prompts: list[torch.Tensor]  # [P] int64 each
    options: dict
    right: bool  # pad the batch on the right

    def __str__(self) -> str:
        return f"{self.options} of {[prompt.tolist() for prompt in self.prompts]}"


def draw_request(
    rng: random.Random, rows=(3, 4), blocks=BLOCKS, most_blocks: int = 3, longest: int = 30, windows: bool = True
) -> Request:
    """Prompts of any length, many of them starting with [MASK]s, and options of every kind.

    A prompt has up to ``longest`` ids after up to ``min(12, longest)`` [MASK]s. ``windows``: layers of the model may
    have some.
    """
    block = rng.choice(blocks)
    options = {"block_length": block, "gen_length": block * rng.randint(0, most_blocks)}
    most_masks = min(12, longest)
    prompts = []
    for _ in range(rng.choice(rows)):
        prompt = torch.tensor([rng.randrange(EOS) for _ in range(rng.randint(1, longest))])
        if rng.random() < 0.3:
            prompt[[rng.randrange(len(prompt)) for _ in range(rng.randint(1, most_masks))]] = MASK
        if rng.random() < 0.5 or (options["gen_length"] == 0 and not (prompt == MASK).any()):
            prompt = torch.cat((torch.full((rng.randint(1, most_masks),), MASK), prompt))
        prompts.append(prompt)
    options["cache"] = rng.choice(["none", "prefix", "dual", "dual"])
    if options["cache"] != "none":
        window = Window(rng.choice([0, 1, block, block + 3, 40]), rng.choice([0, 1, 9, 40]))
        options["refresh"] = rng.choice(["block", Every(2), Every(3), window, window, *map(Drift, (0.1, 0.4, 0.9))])
        options["suffix_length"] = rng.choice([None, None, 0, 3, block, 40])
        options["skip_committed"] = rng.random() < 0.5
    options["confidence"] = rng.choice(["probability", "margin", "entropy", "random"])
    limits = (-4.0, -3.0) if options["confidence"] == "entropy" else (0.05, 0.1, 0.3)
    options["schedule"] = rng.choice(
        [
            *map(Threshold, limits), Factor(0.9), Factor(1.5), EntropyBound(3.0), EntropyBound(8.0),
            Dynamic(limits[-1], 2), Static(2), Sequential(3), *_planned(prompts, options["gen_length"], block, rng),
        ]
    )  # fmt: skip
    options["remask"] = rng.choice([None, None, ReMDM(0.7), Verify(0.2), P2(1.0)])
    masks = [torch.cat((prompt == MASK, torch.ones(options["gen_length"], dtype=torch.bool))) for prompt in prompts]
    if not all(any(first + block < len(mask) for first, _ in plan_blocks(mask, block)) for mask in masks):
        options["suffix_length"] = None  # nothing follows a block
    if options.get("suffix_length") is not None and not windows and not isinstance(options["refresh"], Drift):
        options["suffix_sample"] = rng.choice([0, 1, 4, 20])
    options["temperature"] = rng.choice([0.0, 0.0, 0.5, 1.0])
    options["cfg_scale"] = rng.choice([0.0, 0.0, 1.5])
    options["seed"] = rng.randrange(100)
    if options["temperature"] and options["seed"] % 3 == 0:
        options |= [{"top_k": 9}, {"top_p": 0.8}, {"top_k": 40, "top_p": 0.5}][options["seed"] % 9 // 3]
    if not options.get("skip_committed"):
        options["speculate"] = rng.choice([None, None, 1, 3])
    if options["cache"] != "none":
        options["cache_dtype"] = rng.choice([None, None, "e4m3"])
    for name, share in (("suppress_tokens", 0.2), ("defer_tokens", 0.6), ("eos_id", 0.1)):
        if rng.random() < 0.3:
            options[name] = sorted(rng.sample(range(EOS), int(share * EOS)))
    options["logprobs"] = rng.random() < 0.2
    return Request(prompts, options, rng.random() < 0.5)


def _planned(prompts: list[torch.Tensor], gen_length: int, block: int, rng: random.Random) -> list:
    """Schedules whose counts fit every prompt's number of blocks."""
    plans = [plan_blocks(torch.cat((p == MASK, torch.ones(gen_length, dtype=torch.bool))), block) for p in prompts]
    steps = math.lcm(*map(len, plans))
    found = [Pyramid(rng.choice([1, 2])), FirstHitting()]
    found.append(Ancestral(steps * rng.choice([1, 4]), rng.choice(NOISES)))
    fit = min(len(plan) * max(masked for _, masked in plan) for plan in plans)
    if steps <= fit:
        found.append(Uniform(steps * rng.randint(1, fit // steps)))
    return found


def is_as_alone(request: Request, mine: Result, own: Result) -> bool:
    """Whether a row's result ``mine`` of a batch is its ``own`` when it is alone. Only then may drafts look at the next
    block, which saves forwards."""
    looks_ahead = Options.of_call("generate", request.options, None).looks_ahead
    return mine[0] == own[0] and (mine[1] >= own[1] if looks_ahead else mine[1] == own[1])


def alone(model, request: Request) -> list[Result]:
    """Each prompt alone, with its row's noise."""
    found = []
    for row, prompt in enumerate(request.prompts):
        (done,) = dllm_fast.generate_many(model, [prompt], batch_size=1, noise_rows=[row], **request.options)
        found.append((done.sequence.tolist(), done.nfe))
    return found


def together(model, request: Request) -> list[Result]:
    """All prompts as a padded batch."""
    return batched(model, request)[0]


def batched(model, request: Request) -> tuple[list[Result], int]:
    """`together`, and the positions that were evaluated."""
    width = max(map(len, request.prompts))
    ids, mask = torch.full((len(request.prompts), width), EOS), torch.zeros(len(request.prompts), width).long()
    for row, prompt in enumerate(request.prompts):
        place = slice(0, len(prompt)) if request.right else slice(width - len(prompt), width)
        ids[row, place], mask[row, place] = prompt, 1
    device = next(model.parameters()).device
    out = dllm_fast.generate(model, ids.to(device), mask.to(device), **request.options)
    seen = torch.cat((mask, torch.ones(len(ids), request.options["gen_length"])), 1).bool()
    found = [(row[own].tolist(), nfe) for row, own, nfe in zip(out.sequences.cpu(), seen, out.row_nfe, strict=True)]
    return found, out.positions


def seated(model, request: Request, seats: int) -> list[Result]:
    """``seats`` prompts at a time, through `generate_many`."""
    done = dllm_fast.generate_many(model, request.prompts, batch_size=seats, **request.options)
    return [(row.sequence.tolist(), row.nfe) for row in done]


def with_seeds(model, request: Request, seeds: list[int], seats: int) -> list[list[int]]:
    """The tokens of each prompt with a seed of its own, ``seats`` at a time, as the first row of a batch."""
    family = bound_family(model)
    options = Options.of_call("generate", request.options, family.block).resolved(model, family)
    rows = [
        plan_row(replace(options, seed=seed), family, n, prompt, noise=0)
        for n, (prompt, seed) in enumerate(zip(request.prompts, seeds, strict=True))
    ]
    assert len(list(Server(model, family, bound_pool(model), options, rows, seats).serve())) == len(rows)
    return [row.ids.tolist() for row in rows]


@torch.no_grad()
def is_level(model, request: Request, row: int, found: Result, rounding: float = 2.0**-22) -> bool:
    """Whether the row alone gives what is ``found`` in a batch if every weight changes by about a factor of
    1 + ``rounding``."""
    for seed in range(40):
        moved = copy.deepcopy(model)
        torch.manual_seed(seed)
        for weight in moved.parameters():
            weight.mul_(1 + rounding * torch.randn_like(weight))
        (done,) = dllm_fast.generate_many(moved, [request.prompts[row]], noise_rows=[row], **request.options)
        if is_as_alone(request, found, (done.sequence.tolist(), done.nfe)):
            return True
    return False
