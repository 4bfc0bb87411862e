"""How much the estimates of the likelihood bound vary: ``python -m bench.quality.bounds``

Texts of 56 tokens are masked as in training, 16 copies at once, and `llada-gsm8k` gives the bound of each text from its
16 forwards. All forms and noise schedules estimate the same number. The standard deviation of one estimate from 16
forwards shows how much they vary: with times drawn one by one, with evenly spaced times, as training has them, and with
the masks of `log_likelihoods`. Ends with one JSON line.
"""

import argparse
import datetime
import json
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench import checkout
from bench.task import load
from dllm_fast.cli.view import print_table
from dllm_fast.decoding.noise import NOISES
from dllm_fast.evaluate.likelihood import log_likelihoods
from dllm_fast.train.losses import corrupt, masked_nll
from dllm_fast.train.masking import FORMS, Masking

MODEL, TOKENS, COPIES = "llada-gsm8k", 56, 16
TEXTS = (
    "Clara has 5 boxes of pencils. Each box has 12 pencils. She gives 8 pencils to her brother and 4 to her teacher. "
    "Then she buys 2 more boxes. How many pencils does Clara have now, and how many boxes does she need for them?",
    "A bus starts with 40 people. At the first stop 10 people get off and 6 get on. At the second stop half of the "
    "people get off. How many people are on the bus when it comes to the last stop, if no one gets on after that?",
    "Peter reads 20 pages of a book every day. The book has 300 pages. After a week he reads twice as many pages a day "
    "as before. How many days does he need to finish the book? How many pages are left for him on the last day?",
    "A farmer sells apples for $2 a pound and pears for $3 a pound. On Monday he sells 30 pounds of apples and 20 "
    "pounds of pears. On Tuesday he sells half as much of each. How much money does the farmer make on the two days?",
)  # each more than TOKENS tokens, of the model's kind


@dataclass
class Spread:
    """The mean of all estimates in nats per token, its standard error, and the standard deviation of one estimate."""

    way: str
    mean: float
    error: float
    deviation: float


def spread(way: str, estimates: torch.Tensor) -> Spread:
    """Of estimates [texts, N] fp64: deviations are those within a text."""
    variance = float(estimates.var(dim=1).mean())
    return Spread(way, float(estimates.mean()), (variance / estimates.numel()) ** 0.5, variance**0.5)


def by_training(model, ids: torch.Tensor, masking: Masking, spaced: bool) -> Callable[[int], torch.Tensor]:
    """The bounds [texts] by training's masks of one seed. Not ``spaced``: each copy's time is drawn by itself."""

    def estimate(seed: int) -> torch.Tensor:
        bounds = []
        for text in ids:
            rows = text.expand(COPIES, -1)
            if spaced:
                parts = [corrupt(rows, None, model.config.mask_token_id, seed, 0, range(COPIES), COPIES, masking)]
            else:
                parts = [
                    corrupt(rows[:1], None, model.config.mask_token_id, seed, copy, range(1), 1, masking)
                    for copy in range(COPIES)
                ]
            noisy, labels, weight = (torch.cat(tensors) for tensors in zip(*parts))
            bounds.append((masked_nll(model, noisy, labels) * weight).mean())
        return torch.stack(bounds).double()

    return estimate


def by_likelihood(model, ids: torch.Tensor) -> Callable[[int], torch.Tensor]:
    pairs = [(text[:0], text) for text in ids]
    return lambda seed: -torch.tensor(list(log_likelihoods(model, pairs, COPIES, seed)), dtype=torch.float64) / TOKENS


def measure(count: int) -> list[Spread]:
    model, tokenizer = load(MODEL)
    ids = torch.tensor([row[:TOKENS] for row in tokenizer(list(TEXTS))["input_ids"]])
    ways = {
        f"{form}, {noise}, {'evenly spaced' if spaced else 'independent'}": by_training(
            model, ids, Masking(noise, (0, 1), form), spaced
        )
        for form in FORMS
        for noise in NOISES
        for spaced in (False, True)
    }
    ways["log_likelihoods"] = by_likelihood(model, ids)
    with torch.no_grad():
        return [
            spread(way, torch.stack([estimate(seed) for seed in range(count)], dim=1)) for way, estimate in ways.items()
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0].split(":")[0])
    parser.add_argument("--count", type=int, default=64, help="estimates of each text by each way")
    options = parser.parse_args()
    print(f"{os.cpu_count()} CPU cores, {datetime.date.today()}, torch {torch.__version__}, commit {checkout.commit()}")
    rows = measure(options.count)
    cells = [
        [
            row.way,
            f"{row.mean:.3f} ± {row.error:.3f}",
            f"{row.deviation:.3f}",
            f"{row.deviation / rows[-1].deviation:.1f}",
        ]
        for row in rows
    ]
    size = f"{len(TEXTS)} texts of {TOKENS} tokens, {options.count} estimates of {COPIES} forwards"
    title = f"{MODEL}, {size}; nats per token"
    print_table(["form, noise, times", "mean", "deviation", "relative"], cells, title)
    print(json.dumps({"bench": "bounds", "count": options.count, "rows": [vars(row) for row in rows]}))


if __name__ == "__main__":
    main()
