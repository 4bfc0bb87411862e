"""What the schedules keep: counts against their formulas, and the sampled ones against the exact distribution."""

import itertools
import math

import pytest
import torch
from tiny import MASK, make_llada

import dllm_fast
from dllm_fast import Ancestral, Dynamic, EntropyBound, FirstHitting, Pyramid, Sequential, Static, Threshold, Uniform

ALPHA = {
    "linear": lambda t: 1 - t,
    "cosine": lambda t: math.cos(math.pi * t / 2),
    "loglinear": lambda t: 1 - (1 - 1e-3) * t,
    "polynomial": lambda t: 1 - t * t,
}


def chance(statistic: float, freedom: int) -> float:
    """Of a chi-squared variable to be larger."""
    return float(torch.special.gammaincc(torch.tensor(freedom / 2), torch.tensor(statistic / 2)))


def no_draw():
    raise AssertionError("this schedule draws nothing")


def table(schedule, masked, blocks, draw=no_draw):
    found = schedule.counts(torch.tensor(masked), torch.tensor(blocks), draw)
    return [(step, count.tolist()) for step, count in found]


def test_uniform_shares_each_rows_steps_by_its_own_blocks():
    plan = table(Uniform(12), [8, 3, 0, 7], [3, 4, 4, 6])
    assert plan == [(0, [2, 1, 0, 4]), (1, [2, 1, 0, 3]), (2, [2, 1, 0, 0]), (3, [2, 0, 0, 0])]


def test_pyramid_and_first_hitting_stop_at_what_is_left():
    assert table(Pyramid(2), [6, 3], [1, 1]) == [(0, [1, 1]), (1, [1, 1]), (2, [2, 1]), (3, [2, 0])]
    assert table(FirstHitting(), [3, 1], [2, 2]) == [(0, [1, 1]), (1, [1, 0]), (2, [1, 0])]


@pytest.mark.parametrize("kind", [Static, Sequential])
def test_static_keeps_as_many_at_each_step(kind):
    assert table(kind(3), [7, 2, 0], [4, 1, 2]) == [(0, [3, 2, 0]), (1, [3, 0, 0]), (2, [1, 0, 0])]


def test_sequential_goes_from_left_to_right(either, ids):
    """Two of what is left, whatever the model is surest of."""
    prompt = ids.clone()
    prompt[:, [3, 4, 9, 11, 12]] = MASK
    out = dllm_fast.generate(
        dllm_fast.patch(either), prompt, gen_length=0, block_length=24, schedule=Sequential(2), cache="none"
    )
    assert out.nfe == 3
    expected = prompt.clone()
    for at in ([3, 4], [9, 11], [12]):
        with torch.no_grad():
            logits = either(expected).logits[:, at]
        logits[..., MASK] = -math.inf
        expected[:, at] = logits.argmax(-1)
    assert torch.equal(out.sequences, expected)


def test_dynamic_of_one_token_is_threshold(either, ids):
    dllm_fast.patch(either)
    options = {"gen_length": 16, "block_length": 16, "cache": "none"}
    one, other = (dllm_fast.generate(either, ids, schedule=s, **options) for s in (Dynamic(0.05), Threshold(0.05)))
    assert torch.equal(one.sequences, other.sequences) and one.nfe == other.nfe
    four = dllm_fast.generate(either, ids, schedule=Dynamic(1.0, 4), **options)
    assert four.nfe == 4


@pytest.mark.parametrize("noise", ALPHA)
@pytest.mark.parametrize("steps", [1, 3, 16])
def test_ancestral_keeps_by_the_reverse_posterior(noise, steps):
    """Of those still masked at a grid step, the share kept is binomial with (alpha_s - alpha_t) / (1 - alpha_t)."""
    masked = 40_000
    draw = torch.rand(1, masked, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plan = table(Ancestral(steps, noise), [masked], [1], lambda: draw)
    left, statistic = masked, 0.0
    kept = dict(plan)
    for step in range(steps):
        t, s = 1 - step / steps, 1 - (step + 1) / steps
        share = (ALPHA[noise](s) - ALPHA[noise](t)) / (1 - ALPHA[noise](t))
        count = kept.get(step, [0])[0]
        if step == steps - 1:
            assert count == left
        else:
            statistic += (count - left * share) ** 2 / (left * share * (1 - share))
            left -= count
    assert chance(statistic, max(1, steps - 1)) > 1e-3


def test_ancestral_evaluates_no_step_that_keeps_nothing():
    draw = torch.tensor([[0.99, 0.02, 2.0], [0.51, 2.0, 2.0]], dtype=torch.float64)
    assert table(Ancestral(100), [2, 1], [1, 1], lambda: draw) == [(1, [1, 0]), (50, [0, 1]), (98, [1, 0])]


ROWS = 6000


@pytest.fixture(scope="module")
def pair():
    """A model of 4 tokens and [MASK], and p(x1, x2 | what is seen of them) after one id."""
    model = make_llada(vocab_size=5, mask_token_id=4, eos_token_id=3, pad_token_id=3)
    with torch.no_grad():
        for block in model.model.transformer.blocks:
            block.attn_out.weight *= 12  # far from independent
        logits = torch.stack([model(torch.tensor([[0, a, 4]])).logits[0, 1:, :4] for a in range(5)])
        model.model.transformer.ff_out.weight /= logits.std()  # far from uniform, and no cell empty
    dllm_fast.patch(model)

    @torch.no_grad()
    def given(x1, x2):
        logits = model(torch.tensor([[0, x1, x2]])).logits[0, 1:, :4]
        return torch.softmax(logits.double(), -1)

    both = given(4, 4)
    left = torch.stack([both[0, a] * given(a, 4)[1] for a in range(4)])  # x1 first: [x1, x2]
    right = torch.stack([both[1, b] * given(4, b)[0] for b in range(4)], 1)  # x2 first
    return model, {"at once": both[0][:, None] * both[1], "left": left, "right": right}


HALF = math.cos(math.pi / 4)  # the share that the cosine keeps in the first of two steps
CASES = {
    "first-hitting": (FirstHitting(), {"left": 0.5, "right": 0.5}),
    "ancestral-1": (Ancestral(1), {"at once": 1.0}),
    "ancestral-2": (Ancestral(2), {"at once": 0.5, "left": 0.25, "right": 0.25}),
    "ancestral-2-cosine": (
        Ancestral(2, "cosine"),
        {"at once": HALF**2 + (1 - HALF) ** 2, "left": HALF * (1 - HALF), "right": HALF * (1 - HALF)},
    ),
    "uniform-random": (Uniform(2), {"left": 0.5, "right": 0.5}),
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_come_from_the_masked_diffusion_process(pair, case):
    """Two positions at temperature 1: 16 outcomes against their exact probabilities, by chi-squared."""
    model, joint = pair
    schedule, mixture = CASES[case]
    truth = sum(weight * joint[order] for order, weight in mixture.items())
    ids = torch.zeros(ROWS, 1, dtype=torch.int64)
    out = dllm_fast.generate(
        model, ids, gen_length=2, block_length=2, schedule=schedule, confidence="random", temperature=1.0,
        cache="none", seed=11,
    )  # fmt: skip
    seen = torch.zeros(16, dtype=torch.float64)
    seen.index_add_(0, out.sequences[:, 1] * 4 + out.sequences[:, 2], torch.ones(ROWS, dtype=torch.float64))
    expected = ROWS * truth.flatten()
    assert expected.min() > 1, "a cell too rare for a chi-squared test"
    statistic = float(((seen - expected) ** 2 / expected).sum())
    assert chance(statistic, 15) > 1e-3
    # The test can tell the processes apart.
    for order, other in joint.items():
        if mixture != {order: 1.0}:
            assert float(((seen - ROWS * other.flatten()) ** 2 / (ROWS * other.flatten())).sum()) > statistic


@torch.no_grad()
@pytest.mark.parametrize("gamma", [0.0, 5.0, 12.0, 1e9])
def test_entropy_bound_keeps_what_its_formula_says(either, ids, gamma):
    """A plain loop: entropies in order, the largest k whose first k - 1 sum to at most gamma."""
    sequence = torch.cat((ids[:1], torch.full((1, 16), MASK)), 1)
    nfe = 0
    while (sequence == MASK).any():
        logits = either(sequence).logits[0].double()
        probability = torch.softmax(logits, -1)
        entropy = -(probability * probability.log()).sum(-1)
        masked = (sequence[0] == MASK).nonzero()[:, 0].tolist()
        order = sorted(masked, key=lambda i: float(entropy[i]))
        reached = [0.0, *itertools.accumulate(float(entropy[i]) for i in order)]
        logits[:, MASK] = -math.inf
        for i, before in zip(order, reached):
            if before <= gamma:
                sequence[0, i] = logits[i].argmax()
        nfe += 1
    out = dllm_fast.generate(
        dllm_fast.patch(either), ids[:1], gen_length=16, block_length=16, schedule=EntropyBound(gamma), cache="none"
    )
    assert torch.equal(out.sequences, sequence) and out.nfe == nfe
    assert {0.0: nfe == 16, 1e9: nfe == 1}.get(gamma, 1 < nfe < 16)
