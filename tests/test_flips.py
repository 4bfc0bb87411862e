"""Tokens flipped in O(1) have the law of the direct way: the argmax of one-hot and noise over the vocabulary."""

import math

import pytest
import torch

from dllm_fast.decoding.flips import flipped


def direct(token: int, noise_weight: float, vocabulary: int, count: int, seed: int) -> torch.Tensor:
    """``argmax(c onehot + n g)`` with g drawn in full, [count]."""
    source, found = torch.Generator().manual_seed(seed), []
    for rows in torch.arange(count).split(max(1, 4_000_000 // vocabulary)):
        w = noise_weight * torch.randn(len(rows), vocabulary, generator=source, dtype=torch.float32)
        w[:, token] += 1 - noise_weight
        found.append(w.argmax(1))
    return torch.cat(found)


def drawn(token: int, noise_weight: float, vocabulary: int, count: int, seed: int = 0) -> torch.Tensor:
    row = torch.arange(count)
    tokens = torch.full((count,), token)
    return flipped(tokens, torch.full((count,), noise_weight), vocabulary, seed, 3, row // 100, row % 100)


def rate(noise_weight: float, vocabulary: int) -> float:
    """The probability of a flip, by integration over the token's own normal."""
    z = torch.linspace(-12, 12, 40001, dtype=torch.float64)
    density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    upper = torch.special.erfc(((1 - noise_weight) / noise_weight + z) / math.sqrt(2)) / 2  # 1 - Phi
    return float(torch.trapezoid(density * -torch.expm1((vocabulary - 1) * torch.log1p(-upper)), z))


def chi_squared(found: torch.Tensor, expected: torch.Tensor) -> tuple[float, int]:
    """The statistic and its degrees of freedom, for counts that are fixed in sum."""
    return float(((found - expected) ** 2 / expected).sum()), len(found) - 1


def critical(freedom: int) -> float:
    """The chi-squared that one run in 100,000 exceeds (Wilson and Hilferty 1931)."""
    return freedom * (1 - 2 / (9 * freedom) + 4.265 * math.sqrt(2 / (9 * freedom))) ** 3


CASES = [(2, 0.5), (3, 1.0), (7, 0.25), (7, 0.6), (50, 0.3), (50, 0.999), (1000, 0.35), (126464, 0.2), (126464, 0.3)]


@pytest.mark.parametrize("vocabulary, noise_weight", CASES)
def test_the_share_of_flips_is_the_direct_ones(vocabulary, noise_weight):
    """Against fp64 integration, and with a full vocabulary of noise against that."""
    count, expected = 200_000, rate(noise_weight, vocabulary)
    token = vocabulary // 3
    assert 0.005 < expected < 1
    found = int((drawn(token, noise_weight, vocabulary, count) != token).sum())
    assert abs(found - count * expected) < 4.5 * math.sqrt(count * expected * (1 - expected))
    count = min(20_000, 40_000_000 // vocabulary)
    whole = int((direct(token, noise_weight, vocabulary, count, 1) != token).sum())
    assert abs(whole - count * expected) < 4.5 * math.sqrt(count * expected * (1 - expected))


@pytest.mark.parametrize("vocabulary, noise_weight", [(7, 0.25), (7, 0.6), (50, 0.3), (50, 0.999)])
def test_each_token_is_as_frequent_as_in_the_direct_way(vocabulary, noise_weight):
    """Chi-squared of two samples: which token wins, the token itself among them."""
    token, count = vocabulary - 1, 100_000
    a = torch.bincount(drawn(token, noise_weight, vocabulary, count), minlength=vocabulary).double()
    b = torch.bincount(direct(token, noise_weight, vocabulary, count, 2), minlength=vocabulary).double()
    statistic = float(((a - b) ** 2 / (a + b)).sum())
    assert statistic < critical(vocabulary - 1)


def test_a_large_vocabularys_winner_is_uniform_over_the_others():
    vocabulary, token, count = 126_464, 63_000, 300_000
    found = drawn(token, 1.0, vocabulary, count)
    assert abs(int((found == token).sum()) - count / vocabulary) < 10  # 2.4 expected
    others = torch.where(found > token, found - 1, found)[found != token]
    assert found.min() >= 0 and found.max() < vocabulary
    groups = torch.bincount(others * 64 // (vocabulary - 1), minlength=64).double()
    statistic, freedom = chi_squared(groups, torch.full_like(groups, len(others) / 64))
    assert statistic < critical(freedom)


def test_flips_at_the_far_tail_keep_their_rate():
    """At n = 0.117 a flip of one of 126,464 tokens has probability 1.2e-3, of a normal beyond 5 standard deviations."""
    vocabulary, noise_weight, count = 126_464, 0.117, 400_000
    expected = count * rate(noise_weight, vocabulary)
    assert 50 < expected < 2000
    found = int((drawn(5, noise_weight, vocabulary, count) != 5).sum())
    assert abs(found - expected) < 4.5 * math.sqrt(expected)


def test_without_noise_nothing_is_flipped_and_a_pair_of_tokens_is_swapped():
    tokens, row = torch.arange(1000) % 2, torch.arange(1000)
    assert torch.equal(flipped(tokens, torch.zeros(1000), 2, 0, 0, row, row), tokens)
    whole = flipped(tokens, torch.ones(1000), 2, 0, 0, row, row)
    assert 400 < int((whole != tokens).sum()) < 600 and set(whole.tolist()) == {0, 1}


def test_a_flip_is_of_its_key_alone():
    tokens, row = torch.arange(60) % 50, torch.arange(60) // 20
    position = torch.arange(60) % 20
    n = torch.full((60,), 0.5)
    whole = flipped(tokens, n, 50, 7, 2, row, position)
    part = torch.tensor([41, 3, 22])
    assert torch.equal(flipped(tokens[part], n[part], 50, 7, 2, row[part], position[part]), whole[part])
    for seed, step in ((8, 2), (7, 3)):
        assert not torch.equal(flipped(tokens, n, 50, seed, step, row, position), whole)
