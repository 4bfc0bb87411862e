"""How many steps are recorded, over prompts of many lengths, and that what makes them few changes no token."""

import random

import pytest
import torch
from rows import alone, draw_request, seated, together
from tiny import EOS, MASK, make_llada, make_modernbert

import dllm_fast
from dllm_fast import Drift, Threshold, Uniform, Window
from dllm_fast import server as server_module
from dllm_fast.engine import Engine
from dllm_fast.graphs import Graphs
from dllm_fast.patch import bound_pool


class Counted(Graphs):
    """Runs every step eagerly, and counts those that a GPU would have recorded: a key's second run."""

    recorded = 0

    def __init__(self, enabled, device):
        super().__init__(True, device)
        self._runs = {}

    def run(self, key, step):
        self._runs[key] = self._runs.get(key, 0) + 1
        Counted.recorded += self._runs[key] == 2
        step()


@pytest.fixture
def recorded(monkeypatch):
    """Engines are laid out and kept as on a GPU; how many steps were recorded, when called."""
    monkeypatch.setattr("dllm_fast.engine.Graphs", Counted)
    monkeypatch.setattr(server_module, "records", lambda device, impl: True)
    monkeypatch.setattr(Counted, "recorded", 0)
    return lambda: Counted.recorded


@pytest.mark.parametrize("seed", range(24))
def test_layouts_of_recorded_steps_change_no_tokens(seed, monkeypatch):
    """Slots rounded up, and seats that stay empty, for prompts alone, in a batch, and through seats."""
    rng = random.Random(seed)
    make = rng.choice([make_llada, make_modernbert])
    model = dllm_fast.patch(make(seed).double(), impl="torch")
    request = draw_request(rng, (3, 5))
    expected = alone(model, request)
    monkeypatch.setattr(server_module, "records", lambda device, impl: True)
    monkeypatch.setattr(server_module, "STEP", rng.choice([8, 32]))
    assert alone(model, request) == expected, str(request)
    assert together(model, request) == expected, str(request)
    for seats in (2, 4):
        assert seated(model, request, seats) == expected, str(request)


@pytest.mark.parametrize("schedule", [Uniform(6), Threshold(0.02)], ids=str)
@pytest.mark.parametrize("refresh", ["block", Window(8, 0), Drift(0.1)], ids=str)
def test_an_empty_seat_is_idle(schedule, refresh, monkeypatch):
    """Of five rows the shortest ends last, so that up to two of four seats are empty; none evaluates for them."""
    monkeypatch.setattr(server_module, "records", lambda device, impl: True)
    shapes = []
    load = Engine.load

    def noted(self, rows):
        shapes.append((self.rows, self.slots, [row.done for row in rows]))
        load(self, rows)

    monkeypatch.setattr(Engine, "load", noted)
    model = dllm_fast.patch(make_llada().double(), impl="torch")
    words = torch.randint(0, EOS, (5, 20), generator=torch.Generator().manual_seed(1))
    prompts = [words[n, : 20 - n] for n in range(5)]
    prompts[4] = torch.cat((torch.full((8,), MASK), words[4, :5], torch.full((8,), MASK), words[4, :3]))
    prompts[3] = torch.cat((torch.full((8,), MASK), words[3, :5]))
    options = {"gen_length": 8, "block_length": 8, "refresh": refresh, "temperature": 0.5, "seed": 3}
    options["schedule"] = schedule
    many = list(dllm_fast.generate_many(model, prompts, batch_size=5, **options))
    assert [(rows, slots, sum(idle)) for rows, slots, idle in shapes] == [(5, 64, 0), (2, 64, 0), (1, 64, 0)]
    for row, prompt in enumerate(prompts):
        (own,) = dllm_fast.generate_many(model, [prompt], noise_rows=[row], **options)
        assert torch.equal(own.sequence, many[row].sequence) and own.nfe == many[row].nfe
    shapes.clear()
    four = list(dllm_fast.generate_many(model, [prompts[3], prompts[0], prompts[4], prompts[3]], 4, **options))
    assert [(rows, sum(idle)) for rows, _, idle in shapes] == [(4, 0), (4, 1), (1, 0)]
    assert four[2].nfe == many[4].nfe or schedule == Uniform(6)


LENGTHS = range(25, 234)  # of GSM8K's test questions, in tokens of the shipped llada-gsm8k
PROBLEMS = 1319
GSM8K = {"gen_length": 256, "block_length": 32, "schedule": Uniform(16), "seed": 0}


@pytest.mark.parametrize("options", [{}, {"cache": "none"}, {"refresh": Window(32, 0)}], ids=str)
@pytest.mark.parametrize("batch", [1, 8])
def test_at_most_a_dozen_recordings_over_gsm8k(recorded, monkeypatch, batch, options):
    """Every length there is, as often as it takes to make 1,319 prompts, in any order; answers cost nothing here."""
    monkeypatch.setattr(Engine, "_step", lambda self, kind, tail: None)
    model = dllm_fast.patch(make_llada(), impl="torch")
    lengths = [LENGTHS[n % len(LENGTHS)] for n in range(PROBLEMS)]
    random.Random(0).shuffle(lengths)
    prompts = [torch.full((length,), 7) for length in lengths]
    if batch == 1:
        for prompt in prompts:
            dllm_fast.generate(model, prompt[None], **GSM8K, **options)
    else:
        list(dllm_fast.generate_many(model, prompts, batch_size=batch, **GSM8K, **options))
    assert 0 < recorded() <= 12
    before = recorded()
    for prompt in prompts[:20]:
        dllm_fast.generate(model, prompt[None], **GSM8K, **options)
    if batch == 1:
        assert recorded() == before, "all of them are kept"
    assert len(bound_pool(model)) <= 12
