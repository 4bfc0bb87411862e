"""Remasking: which tokens are masked again, and that every run ends within its bound."""

import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import EOS, MAKERS, MASK

import dllm_fast
from dllm_fast import (
    P2,
    Ancestral,
    Drift,
    EntropyBound,
    Every,
    Factor,
    FirstHitting,
    Pyramid,
    ReMDM,
    Threshold,
    Uniform,
    Verify,
    Window,
)
from dllm_fast.decoding.remask import Committed

PLANNED = [Uniform(8), Pyramid(2), FirstHitting(), Ancestral(8, "cosine")]
ADAPTIVE = [Threshold(0.3), Threshold(1.0), Factor(1.0), EntropyBound(4.0)]


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def committed(**changes):
    """A block of six: 0 to 3 committed, 4 and 5 masked, one of which the step commits."""
    given = {
        "before": torch.tensor([[True, True, True, True, False, False]]),
        "now": torch.tensor([[0.9, 0.2, 0.5, 0.6, 0.8, 0.1]]),
        "committed_probability": torch.tensor([[0.8, 0.9, 0.6, 0.7, 0.0, 0.0]]),
        "masked": torch.tensor([[False, False, False, False, True, True]]),
        "kept": torch.tensor([1]),
    }
    return Committed(**{**given, **changes})


def opened(policy, **changes):
    urgency = policy.urgency(committed(**changes))[0]
    return [int(i) for i in urgency.argsort(descending=True) if urgency[i] > float("-inf")]


def test_what_each_policy_opens_most_urgent_first():
    assert opened(Verify(0.55)) == [1, 2] and opened(Verify(0.0)) == [] and opened(Verify(1.0)) == [1, 2, 3, 0]
    # One position stays masked of six, four are filled: sigma 1/4, so round(4 eta / 4) are opened; 1 fell most.
    assert opened(ReMDM(1.0)) == [1] and opened(ReMDM(0.4)) == []
    assert opened(ReMDM(1.0), kept=torch.tensor([0])) == [1, 2]  # 2 and 3 fell alike; the lower position first
    assert opened(ReMDM(1.0), committed_probability=torch.zeros(1, 6)) == []  # none fell
    # Five stay: the four committed and the masked 4 by probability, so that 1 is the lowest but one, 5 the lowest.
    assert opened(P2(1.0)) == [] and opened(P2(1.0), kept=torch.tensor([0])) == [1]
    assert opened(P2(0.0), kept=torch.tensor([0])) == []


@pytest.mark.parametrize("policy", [ReMDM(0.0), Verify(0.0), P2(0.0)], ids=str)
@pytest.mark.parametrize("schedule", [Uniform(8), Threshold(0.3)], ids=str)
def test_a_policy_that_opens_nothing_changes_nothing(either, ids, policy, schedule):
    dllm_fast.patch(either)
    options = {"gen_length": 16, "block_length": 16, "schedule": schedule}
    plain = dllm_fast.generate(either, ids, **options)
    out = dllm_fast.generate(either, ids, remask=policy, **options)
    assert torch.equal(out.sequences, plain.sequences) and out.nfe == plain.nfe


class Drafts:
    def __init__(self):
        self.seen = []

    def put(self, value): ...

    def end(self): ...

    def put_draft(self, value, sequence):
        self.seen.append(sequence[24:])


@pytest.mark.parametrize("schedule", PLANNED, ids=str)
@pytest.mark.parametrize("policy", [ReMDM(1.0), Verify(1.0), P2(1.0)], ids=str)
def test_planned_schedules_keep_their_steps_and_counts(either, ids, schedule, policy):
    """However many are remasked, as many positions are committed after each step as without remasking."""
    dllm_fast.patch(either)
    options = {"gen_length": 16, "block_length": 16, "schedule": schedule, "seed": 3}
    plain, drafts = Drafts(), Drafts()
    expected = dllm_fast.generate(either, ids[:1], streamer=plain, **options)
    out = dllm_fast.generate(either, ids[:1], streamer=drafts, remask=policy, **options)
    assert out.nfe == expected.nfe and not (out.sequences == MASK).any()
    assert [int((x == MASK).sum()) for x in drafts.seen] == [int((x == MASK).sum()) for x in plain.seen]
    if isinstance(policy, Verify):  # at a threshold of 1 every step remasks as many as allowed
        again = [bool(((a != MASK) & (b == MASK)).any()) for a, b in zip(drafts.seen, drafts.seen[1:])]
        assert any(again)


@pytest.mark.parametrize("schedule", ADAPTIVE, ids=str)
def test_adaptive_schedules_end_within_twice_the_block(either, ids, schedule):
    dllm_fast.patch(either)
    drafts = Drafts()
    out = dllm_fast.generate(
        either, ids[:1], gen_length=16, block_length=16, schedule=schedule, remask=Verify(1.0), streamer=drafts
    )
    assert not (out.sequences == MASK).any() and out.nfe <= 32
    reopened = sum(int(((a != MASK) & (b == MASK)).sum()) for a, b in zip(drafts.seen, drafts.seen[1:]))
    assert 0 < reopened <= 16


def test_a_row_that_is_filled_is_not_opened_in_its_neighbours_steps(llada, ids):
    """Rows with 8, 3 and 1 positions to fill, one per step, where every step remasks as many as allowed."""
    dllm_fast.patch(llada)
    ids[0, 10:18] = ids[1, [10, 12, 17]] = ids[2, 13] = MASK
    options = {"gen_length": 0, "block_length": 8, "schedule": Threshold(1.0), "remask": Verify(1.0), "cache": "none"}
    together = dllm_fast.generate(llada, ids, **options)
    alone = [dllm_fast.generate(llada, ids[row : row + 1], **options) for row in range(len(ids))]
    assert alone[2].nfe == 1 and alone[0].nfe == together.nfe > 8
    assert torch.equal(together.sequences, torch.cat([out.sequences for out in alone]))


@functools.cache
def shared_model(name):
    return dllm_fast.patch(MAKERS[name]().to("cuda" if torch.cuda.is_available() else "cpu"))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(["llada", "modernbert"]),
    schedule=st.sampled_from(PLANNED + ADAPTIVE),
    confidence=st.sampled_from(["probability", "margin", "entropy", "random"]),
    cache=st.sampled_from(["none", "prefix", "dual"]),
    refresh=st.sampled_from(["block", Every(2), Window(3, 5), Drift(0.5)]),
    remask=st.sampled_from([None, ReMDM(0.5), Verify(0.5), P2(1.0)]),
    temperature=st.sampled_from([0.0, 0.7]),
    cfg_scale=st.sampled_from([0.0, 1.5]),
    eos_id=st.sampled_from([None, 7]),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    seats=st.integers(1, 3),
)
def test_any_combination_ends_with_every_position_filled(
    name, schedule, confidence, cache, refresh, remask, temperature, cfg_scale, eos_id, lengths, seats
):
    generator = torch.Generator().manual_seed(sum(lengths))
    prompts = [torch.randint(0, EOS, (length,), generator=generator) for length in lengths]
    options = {"gen_length": 16, "block_length": 8, "schedule": schedule, "confidence": confidence, "cache": cache}
    options |= {"temperature": temperature, "cfg_scale": cfg_scale, "remask": remask, "eos_id": eos_id, "seed": 5}
    options["refresh"] = "block" if cache == "none" else refresh
    done = list(dllm_fast.generate_many(shared_model(name), prompts, batch_size=seats, **options))
    assert [row.index for row in done] == list(range(len(prompts)))
    for row, prompt in zip(done, prompts):
        assert torch.equal(row.sequence[: len(prompt)], prompt) and len(row.sequence) == len(prompt) + 16
        answer = row.sequence[len(prompt) :].tolist()
        assert MASK not in answer
        if eos_id in answer:
            assert set(answer[answer.index(eos_id) :]) == {eos_id}
