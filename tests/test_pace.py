"""``speculate="auto"``: as many drafts as pay, and the same tokens."""

import random

import pytest
import torch
from rows import batched, draw_request
from tiny import EOS, MAKERS, MASK

import dllm_fast
from bench import task
from dllm_fast import Uniform
from dllm_fast.decoding import options
from dllm_fast.decoding.engine import Engine
from dllm_fast.decoding.pace import ENOUGH, Pace


def measured(most: int, cost: dict[int, float]) -> Pace:
    pace = Pace(most)
    pace.measure(cost.__getitem__)
    return pace


def test_what_is_free_is_tried_first():
    assert measured(8, {1: 1, 2: 1.01, 4: 1.05, 8: 1.3}).states == 4
    assert measured(8, {1: 1, 2: 1.1, 4: 1.2, 8: 1.3}).states == 1
    assert measured(3, {1: 1, 2: 1.0, 3: 1.0}).states == 3


def test_nothing_is_measured_beyond_what_could_pay():
    pace = measured(8, {1: 1, 2: 2.0})
    assert pace.choices == [1, 2] and pace.states == 1
    assert measured(8, {1: 1, 2: 1.5, 4: 4.1}).choices == [1, 2, 4]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([1, 1, 1, 1], 1),  # no draft was of use
        ([2, 1, 2, 1], 2),  # 1.5 steps for 1.04; more would take no more steps
        ([2, 4, 3, 4], 8),  # twice as far as there were states, and 9 of 11 drafts were right
        ([4, 1, 1, 3], 4),
    ],
)
def test_then_what_forwards_took_decides(steps, expected):
    pace = measured(8, {1: 1, 2: 1.04, 4: 1.05, 8: 1.3})
    for one in steps:
        assert pace.states == 4
        pace.took(4, one)
    assert len(steps) == ENOUGH and pace.states == expected
    pace.begin()
    assert pace.states == 4


@pytest.fixture
def costs(monkeypatch):
    """Times of forwards by their states, in place of measured ones."""
    given: dict[int, float] = {}
    monkeypatch.setattr(options, "pays", lambda device, impl: True)
    monkeypatch.setattr(Engine, "_time", lambda self, step, states: given[states])
    return given


@pytest.mark.parametrize("name", ["llada-gqa", "modernbert"])
@pytest.mark.parametrize("seed", range(6))
def test_the_same_tokens_as_without(name, seed, costs):
    model = dllm_fast.patch(MAKERS[name]().double(), impl="torch")
    rng = random.Random(1000 + seed)
    request = draw_request(rng, rows=(1, 3), most_blocks=2, longest=12, windows=name == "modernbert")
    request.options |= {"skip_committed": False, "speculate": None}
    without, _ = batched(model, request)
    request.options["speculate"] = "auto"
    costs.update({n: 1 + rng.choice([0.0, 0.04, 0.2]) * (n - 1) for n in (1, 2, 4, 8)})
    with_drafts, _ = batched(model, request)
    assert [ids for ids, _ in with_drafts] == [ids for ids, _ in without], str(request)


def test_on_the_shipped_model(costs):
    model, tokenizer = task.load("llada-steps")
    prompts = [prompt for prompt, _ in task.STEPS.problems(2, 3, held_out=True)]
    rows = tokenizer(prompts, return_tensors="pt", padding=True)
    given = {"gen_length": 64, "block_length": 32, "schedule": Uniform(64)}

    def run(speculate):
        return dllm_fast.generate(model, rows["input_ids"], rows["attention_mask"], **given, speculate=speculate)

    none, seven = run(None), run(7)
    costs.update({1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0})
    free = run("auto")
    assert torch.equal(free.sequences, none.sequences) and free.row_nfe == seven.row_nfe
    costs.update({2: 1.9, 4: 3.8, 8: 7.6})
    steep = run("auto")
    assert torch.equal(steep.sequences, none.sequences)
    assert steep.row_nfe == none.row_nfe and steep.states == steep.steps == 64


def test_measured_times_change_no_token(monkeypatch):
    monkeypatch.setattr(options, "pays", lambda device, impl: True)
    model = dllm_fast.patch(MAKERS["llada"]().double(), impl="torch")
    ids = torch.randint(0, EOS, (3, 9), generator=torch.Generator().manual_seed(0))
    for given in ({"cache": "none"}, {"cache": "prefix"}, {"refresh": dllm_fast.Every(2)}, {"cfg_scale": 1.0}):
        given = {"gen_length": 16, "block_length": 8, "schedule": Uniform(8), **given}
        out = [dllm_fast.generate(model, ids, **given, speculate=how) for how in (None, "auto")]
        assert torch.equal(out[0].sequences, out[1].sequences) and out[1].nfe <= out[0].nfe


@pytest.mark.parametrize("tau", [0.02, 0.05, 0.1, 0.2, 0.4])
def test_measuring_leaves_the_cache_as_it_was(tau, monkeypatch):
    """A batch of which one row is left goes on in another engine, which measures first."""
    monkeypatch.setattr(options, "pays", lambda device, impl: True)
    model = dllm_fast.patch(MAKERS["llada"]().double(), impl="torch")
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.cat((torch.full((n,), MASK), torch.randint(0, EOS, (9,), generator=draw))) for n in (24, 0)]
    given = {"gen_length": 16, "block_length": 8, "schedule": dllm_fast.Static(1), "refresh": dllm_fast.Drift(tau)}
    with_drafts, without = (
        [done.sequence.tolist() for done in dllm_fast.generate_many(model, prompts, 2, **given, speculate=how)]
        for how in ("auto", None)
    )
    assert with_drafts == without


def test_none_on_a_cpu():
    model = dllm_fast.patch(MAKERS["llada"]())
    out = dllm_fast.generate(
        model, torch.zeros(1, 5, dtype=torch.int64), gen_length=8, block_length=8, schedule=Uniform(8), speculate="auto"
    )
    assert out.nfe == out.states == out.steps == 8
