"""The two estimators of the likelihood bound, and the standard errors that they tell."""

import math

import pytest
import torch
from test_likelihood import all_masks, expectation, make_pairs, terms
from tiny import make_llada

import dllm_fast
from dllm_fast.evaluate.likelihood import (
    ESTIMATORS,
    Bound,
    _Design,
    _Scorer,
    draw_times,
    likelihood_bounds,
    log_likelihoods,
)

STUDENT = 2.365  # of 7 degrees of freedom: 95 % lie within so many standard errors


def scored(masks) -> list[float]:
    """A made-up sum of log-probabilities for each mask, so that thousands cost nothing."""
    return [-(float((mask * torch.arange(1, len(mask) + 1)).sum()) ** 1.3) for mask in masks]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_error_is_the_one_told(estimator, monkeypatch):
    """Over 300 seeds: estimates are unbiased, and their intervals hold the truth in 95 % of them."""
    monkeypatch.setattr(_Scorer, "_log_probability", lambda self, pairs, masks: scored(masks))
    model, pairs, length = dllm_fast.patch(make_llada()), make_pairs((2, 5)), 5
    masks = all_masks(length)
    exact = expectation(torch.tensor(scored(masks)) * length / masks.sum(1), length)
    found = [next(likelihood_bounds(model, pairs, 64, seed, 512, estimator=estimator)) for seed in range(300)]
    values = torch.tensor([bound.value for bound in found], dtype=torch.float64)
    assert abs(float(values.mean()) - exact) < 4.5 * float(values.std()) / math.sqrt(300)
    inside = sum(abs(bound.value - exact) <= STUDENT * bound.standard_error for bound in found)
    assert 300 * 0.95 - 4.5 * math.sqrt(300 * 0.95 * 0.05) <= inside, inside
    errors = torch.tensor([bound.standard_error for bound in found], dtype=torch.float64)
    assert float(errors.square().mean()) == pytest.approx(float(values.var()), rel=0.35)


def test_counting_varies_less(monkeypatch):
    monkeypatch.setattr(_Scorer, "_log_probability", lambda self, pairs, masks: scored(masks))
    model, pairs = dllm_fast.patch(make_llada()), make_pairs((2, 5))
    variance = {}
    for estimator in ESTIMATORS:
        bounds = [next(likelihood_bounds(model, pairs, 64, seed, 512, estimator=estimator)) for seed in range(100)]
        values = [bound.value for bound in bounds]
        variance[estimator] = float(torch.tensor(values).var())
    assert variance["count"] < 0.5 * variance["time"], variance


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_bound_of_a_model(estimator):
    """Against the sum over all masks of all logits; and a pair's bound does not depend on its neighbours."""
    model, pairs = dllm_fast.patch(make_llada()), make_pairs((4, 3), (0, 2), (5, 1))
    found = list(likelihood_bounds(model, pairs, 512, 0, estimator=estimator))
    for (prompt, answer), bound in zip(pairs, found):
        exact = expectation(terms(model, prompt, answer), len(answer))
        assert abs(bound.value - exact) <= 5 * bound.standard_error + 1e-4 and bound.tokens == len(answer)
        assert bound.perplexity == pytest.approx(math.exp(-bound.value / len(answer)))
        assert bound.perplexity_error == pytest.approx(bound.perplexity * bound.standard_error / len(answer))
    assert estimator == "time" or found[2].standard_error < 1e-6, "a single token has one mask"
    [alone] = likelihood_bounds(model, pairs[:1], 512, 0, estimator=estimator)
    assert alone.value == pytest.approx(found[0].value, abs=1e-4)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_probability_0_is_a_bound_of_minus_infinity(estimator, monkeypatch):
    monkeypatch.setattr(_Scorer, "_log_probability", lambda self, pairs, masks: [-math.inf] * len(pairs))
    [bound] = likelihood_bounds(dllm_fast.patch(make_llada()), make_pairs((2, 3)), 64, 0, estimator=estimator)
    assert bound.value == -math.inf and math.isnan(bound.standard_error) and bound.perplexity == math.inf
    assert Bound(-4000.0, 1.0, 2).perplexity == math.inf, "beyond what a float holds"


def test_times_are_spread_and_masks_follow_them():
    t, masks = draw_times(50, 400, torch.Generator().manual_seed(0))
    assert torch.equal(t.sort().values, t) and float(t.diff().max() - t.diff().min()) < 1e-9 and 0 <= t[0] < t[-1] < 1
    share = masks.double().mean(1)
    assert float((share - t).abs().max()) < 4.5 * 0.5 / math.sqrt(50)


@pytest.mark.parametrize("wrong, said", [
    ({"estimator": "both"}, "estimator='both'"), ({"replicates": 1}, "replicates=1 tells no error"),
    ({"samples": 12}, "samples=12 is not a multiple of replicates=8"), ({"samples": 0}, "samples=0"),
    ({"seed": 0.5}, "seed=0.5"),
])  # fmt: skip
def test_wrong_arguments_are_named(wrong, said):
    with pytest.raises(ValueError, match=said):
        likelihood_bounds(dllm_fast.patch(make_llada()), make_pairs((2, 2)), **{"samples": 64, **wrong})


def test_replicate_zero_is_log_likelihoods():
    """The estimates of before: `log_likelihoods` draws the masks that it always drew."""
    model, pairs = dllm_fast.patch(make_llada()), make_pairs((4, 6))
    first = _Scorer(model, pairs, 32, 0.0)
    [[one, two]] = first.bounds([_Design(16, 5), _Design(16, 5, "count", 1)])
    assert [one] == list(log_likelihoods(model, pairs, 16, 5)) and one != two
