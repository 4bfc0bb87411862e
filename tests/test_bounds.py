"""The bench of the likelihood bound's estimates."""

import sys
from pathlib import Path

import pytest
import torch
from tiny import make_llada

sys.path.append(str(Path(__file__).parent.parent))
import dllm_fast
from bench.quality import bounds
from dllm_fast.train.masking import Masking

IDS = torch.randint(0, 90, (2, bounds.TOKENS), generator=torch.Generator().manual_seed(0))


def test_a_spread_is_that_of_each_texts_own_estimates():
    got = bounds.spread("x", torch.tensor([[1.0, 3.0], [11.0, 13.0]], dtype=torch.float64))
    assert got.mean == 7 and got.deviation == pytest.approx(2**0.5) and got.error == pytest.approx((2 / 4) ** 0.5)


def test_all_ways_estimate_one_bound():
    model = dllm_fast.patch(make_llada())
    ways = [bounds.by_training(model, IDS, Masking("cosine", (0, 1), form), True) for form in ("time", "count")]
    ways += [bounds.by_training(model, IDS, Masking(ratio=(0, 1)), False), bounds.by_likelihood(model, IDS)]
    with torch.no_grad():
        found = [bounds.spread("", torch.stack([way(seed) for seed in range(12)], 1)) for way in ways]
    for one in found:
        assert abs(one.mean - found[-1].mean) < 4.5 * (one.error**2 + found[-1].error ** 2) ** 0.5
        assert one.deviation > 0
