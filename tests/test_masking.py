"""Noise schedules, their process, and the two forms of the bound, on a model whose likelihood is known."""

import itertools
import math

import pytest
import torch
from tiny import MASK

from dllm_fast.decoding.noise import NOISES, alpha, masked_at, slope, unmasked_by
from dllm_fast.train import losses
from dllm_fast.train.masking import Masking

DRAWS = 40_000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("noise", NOISES)
def test_slope_is_the_derivative_and_alpha_falls(noise):
    t = torch.linspace(0, 1, 1001, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(alpha(noise, t).sum(), t)
    value = alpha(noise, t.detach())
    torch.testing.assert_close(slope(noise, t.detach()), -grad, atol=1e-12, rtol=1e-12)
    assert value[0] == 1 and abs(float(value[-1])) <= 1.001e-3 and bool((value.diff() < 0).all())


@pytest.mark.parametrize("noise", NOISES)
def test_the_process_has_its_marginals_and_the_reverse_posterior(noise):
    """Along simulated paths, against the formulas; and the posterior against Bayes' rule."""
    draw = torch.rand(DRAWS, generator=generator(), dtype=torch.float64)
    s, t = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    before, after = masked_at(noise, s, draw), masked_at(noise, t, draw)
    assert not (before & ~after).any(), "what is masked stays masked"
    for time, masked in ((s, before), (t, after)):
        expected = float(1 - alpha(noise, time))
        assert abs(float(masked.double().mean()) - expected) < 4.5 * math.sqrt(expected * (1 - expected) / DRAWS)
    p, n = float(unmasked_by(noise, s, t)), int(after.sum())
    assert abs(float((~before)[after].double().mean()) - p) < 4.5 * math.sqrt(p * (1 - p) / n)
    # q(z_t = [MASK] | z_s = x) q(z_s = x | x) / q(z_t = [MASK] | x)
    bayes = (1 - alpha(noise, t) / alpha(noise, s)) * alpha(noise, s) / (1 - alpha(noise, t))
    assert p == pytest.approx(float(bayes), rel=1e-12)


LENGTH, VOCAB = 4, 3


def joint() -> torch.Tensor:
    """A random distribution over all sequences, [V, V, V, V]."""
    return torch.rand((VOCAB,) * LENGTH, generator=generator(5), dtype=torch.float64).pow(3).clamp(min=1e-3)


def masked_log_probability(p: torch.Tensor, ids: tuple[int, ...], masked: tuple[bool, ...]) -> float:
    """Sum over masked positions of ln p(x_i | unmasked ones) of the exact denoiser."""
    total = 0.0
    for i in range(LENGTH):
        if masked[i]:
            given = tuple(slice(None) if hidden and j != i else ids[j] for j, hidden in enumerate(masked) if j != i)
            index = (*given[:i], slice(None), *given[i:])
            axes = [n for n, j in enumerate(j for j in range(LENGTH) if j == i or masked[j]) if j != i]
            marginal = p[index].sum(axes) if axes else p[index]
            total += math.log(float(marginal[ids[i]] / marginal.sum()))
    return total


FORMS = [Masking(noise, (0, 1), form) for form in ("time", "count") for noise in NOISES if noise != "loglinear"]


@pytest.mark.parametrize("masking", FORMS, ids=lambda masking: f"{masking.form}-{masking.noise}")
@pytest.mark.parametrize("independent", [True, False])
def test_both_forms_estimate_the_same_bound(masking, independent):
    """Against the sum over all masks; where the positions are independent, the bound is the likelihood itself."""
    p = joint() / joint().sum()
    if independent:
        marginals = [p.sum([j for j in range(LENGTH) if j != i]) for i in range(LENGTH)]
        p = torch.einsum("a,b,c,d->abcd", *marginals)
    ids = (0, 2, 1, 1)
    table = {m: -masked_log_probability(p, ids, m) for m in itertools.product((False, True), repeat=LENGTH)}
    exact = sum(value * LENGTH / (sum(m) * LENGTH * math.comb(LENGTH, sum(m))) for m, value in table.items() if any(m))
    if independent:
        assert exact == pytest.approx(-math.log(float(p[ids])), rel=1e-12)
    t = torch.rand(DRAWS, generator=generator(1), dtype=torch.float64)
    ratio, open_ = masking.ratios(t), torch.ones(DRAWS, LENGTH, dtype=torch.bool)
    masked = masking.masked(ratio, open_, torch.rand(DRAWS, LENGTH, generator=generator(2)))
    weight = masking.weights(t, ratio, open_, masked).double()
    code = (masked * 2 ** torch.arange(LENGTH)).sum(1)
    values = torch.tensor([table[tuple(bool(n >> i & 1) for i in range(LENGTH))] for n in range(2**LENGTH)])
    samples = weight * values.double()[code] * LENGTH
    assert float(samples.mean()) == pytest.approx(exact, abs=4.5 * float(samples.std()) / math.sqrt(DRAWS))


def test_counting_varies_less_than_time():
    """The variances of the two forms, on the independent model: the weight 1 / t of few masks is what varies."""
    variance = {}
    for masking in (Masking(ratio=(0, 1)), Masking(form="count")):
        t = torch.rand(DRAWS, generator=generator(1), dtype=torch.float64)
        ratio, open_ = masking.ratios(t), torch.ones(DRAWS, 32, dtype=torch.bool)
        masked = masking.masked(ratio, open_, torch.rand(DRAWS, 32, generator=generator(2)))
        loss = masking.weights(t, ratio, open_, masked) * masked.sum(1)  # each position's is 1 nat
        assert float(loss.mean()) == pytest.approx(1, abs=4.5 * float(loss.std()) / math.sqrt(DRAWS) + 1e-6)
        variance[masking.form] = float(loss.var())
    assert variance["count"] < 1e-9 < variance["time"]


def test_weightings():
    t = torch.tensor([0.25, 0.5], dtype=torch.float64)
    open_ = torch.tensor([[True] * 8, [False] * 4 + [True] * 4])
    masked = open_ & (torch.arange(8) % 2 == 0)
    for masking, expected in (
        (Masking(ratio=(0, 1)), [1 / (0.25 * 8), 1 / (0.5 * 4)]),
        (Masking("polynomial", (0, 1)), [0.5 / (0.0625 * 8), 1 / (0.25 * 4)]),
        (Masking(weighting="none"), [1 / 4, 1 / 2]),
        (Masking(form="count"), [1 / 4, 1 / 2]),
        (Masking("polynomial", form="count"), [0.5 / 4, 1 / 2]),
        (Masking("polynomial", form="count", weighting="none"), [1 / 4, 1 / 2]),
        (Masking(ratio=(0, 1), weighting=lambda t, ratio: t * 8), [2 / 8, 4 / 4]),
    ):
        assert masking.weights(t, masking.ratios(t), open_, masked).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("noise", NOISES)
def test_a_row_without_masks_has_no_loss(noise):
    """At t = 0, where 1 / t is infinite."""
    for masking in (Masking(noise, (0, 1)), Masking(noise, (0, 1), weighting=lambda t, ratio: 1 / t)):
        t, open_ = torch.zeros(1, dtype=torch.float64), torch.ones(1, 4, dtype=torch.bool)
        assert masking.weights(t, masking.ratios(t), open_, ~open_).tolist() == [0]


def test_a_range_of_ratios_and_of_numbers():
    ids = torch.zeros(400, 20, dtype=torch.int64)
    # Counts are those of ceil(10 r): 2 for a third of the range, else 3.
    for form, mean in (("time", 2.25), ("count", 8 / 3)):
        masking = Masking(ratio=(0.15, 0.3), form=form)
        prompt = torch.full((400,), 10)
        noisy, _, _ = losses.corrupt(ids, prompt, MASK, 0, 0, range(400), 400, masking)
        number = (noisy == MASK).sum(1)
        assert not (noisy == MASK)[:, :10].any()
        assert abs(float(number.double().mean()) - mean) < 4.5 * 1.4 / 20  # binomial: at most 1.4 a row
        assert form == "time" or set(number.tolist()) == {2, 3}


@pytest.mark.parametrize("wrong", [{"noise": "sine"}, {"ratio": (0.9, 0.1)}, {"ratio": (0, 0)}, {"ratio": (-1, 1)},
                                   {"ratio": 0.5}, {"ratio": (0.1, 0.2, 0.3)},
                                   {"form": "both"}, {"weighting": "loss"}])  # fmt: skip
def test_a_wrong_value_is_named(wrong):
    with pytest.raises(ValueError, match=f"Masking: {next(iter(wrong))}="):
        Masking(**wrong)
