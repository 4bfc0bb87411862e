"""How many steps are recorded for prompts of many lengths; keeping them few changes no token."""

import random

import pytest
import torch
from recording import Eager
from rows import alone, draw_request, is_as_alone, seated, together
from tiny import EOS, MASK, make_llada, make_modernbert

import dllm_fast
from bench.common import interleave
from dllm_fast import Drift, Threshold, Uniform, Window
from dllm_fast.decoding import server as server_module
from dllm_fast.decoding.engine import Engine
from dllm_fast.decoding.graphs import Graphs
from dllm_fast.patch import bound_pool


class Counted(Eager):
    """Runs every step eagerly, and counts those that a GPU would record: each key's second run."""

    recorded = 0

    def __init__(self, enabled, device):
        super().__init__(enabled, device)
        self._runs = {}

    def run(self, key, step):
        self._runs[key] = self._runs.get(key, 0) + 1
        Counted.recorded += self._runs[key] == 2
        super().run(key, step)


@pytest.fixture
def recorded(monkeypatch):
    """Lay out and keep engines as on a GPU. Returns a function that counts recorded steps."""
    monkeypatch.setattr("dllm_fast.decoding.engine.Graphs", Counted)
    monkeypatch.setattr(server_module, "records", lambda device, impl: True)
    monkeypatch.setattr(Counted, "recorded", 0)
    return lambda: Counted.recorded


@pytest.mark.parametrize("seed", range(8))
def test_layouts_of_recorded_steps_change_no_tokens(seed, monkeypatch):
    check_layouts(seed, monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 160))
def test_layouts_of_recorded_steps_change_no_tokens_of_many_requests(seed, monkeypatch):
    check_layouts(seed, monkeypatch)


def check_layouts(seed, monkeypatch):
    """Rounded-up slots and empty seats, for prompts alone, in a batch, and with seats."""
    rng = random.Random(seed)
    make = rng.choice([make_llada, make_modernbert])
    model = dllm_fast.patch(make(seed).double(), impl="torch")
    request = draw_request(rng, (3, 5), windows=make is make_modernbert)
    expected = alone(model, request)
    monkeypatch.setattr(server_module, "records", lambda device, impl: True)
    monkeypatch.setattr(server_module, "STEP", rng.choice([8, 32]))
    assert alone(model, request) == expected, str(request)
    for found in (together(model, request), *(seated(model, request, seats) for seats in (2, 4))):
        same = (is_as_alone(request, mine, own) for mine, own in zip(found, expected, strict=True))
        assert all(same), str(request)


@pytest.mark.parametrize("schedule", [Uniform(6), Threshold(0.02)], ids=str)
@pytest.mark.parametrize("refresh", ["block", Window(8, 0), Drift(0.1)], ids=str)
def test_an_empty_seat_is_idle(schedule, refresh, monkeypatch):
    """Of five rows the shortest ends last, so up to two of four seats are empty; no forward includes them."""
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
    rows = [3, 0, 4, 3]
    four = dllm_fast.generate_many(model, [prompts[row] for row in rows], 4, noise_rows=rows, **options)
    for row, done in zip(rows, four, strict=True):
        assert torch.equal(done.sequence, many[row].sequence) and done.nfe == many[row].nfe
    assert [(seats, sum(idle)) for seats, _, idle in shapes] == [(4, 0), (4, 1), (1, 0)]


LENGTHS = range(25, 234)  # of GSM8K's test questions, in tokens of the shipped llada-gsm8k
PROBLEMS = 1319
GSM8K = {"gen_length": 256, "block_length": 32, "schedule": Uniform(16), "seed": 0}


@pytest.mark.parametrize(
    "options", [pytest.param({}, marks=pytest.mark.long), {"cache": "none"}, {"refresh": Window(32, 0)}], ids=str
)
@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.long), 8])
def test_at_most_a_dozen_recordings_over_gsm8k(recorded, monkeypatch, batch, options):
    """1,319 prompts of every length, in random order; answers cost nothing here."""
    monkeypatch.setattr(Engine, "run_step", lambda self, step: None)
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


def test_a_full_step_is_recorded_once_for_all_blocks(recorded):
    """With a prefix cache too, whose other steps reach from each block to the end of the sequence."""
    model = dllm_fast.patch(make_llada(), impl="torch")
    options = {"gen_length": 24, "block_length": 8, "schedule": Uniform(6), "cache": "prefix"}
    for _ in range(2):
        dllm_fast.generate(model, torch.full((1, 9), 7), **options)
    assert recorded() == 1 + 3


def test_an_engine_serves_calls_in_and_out_of_inference_mode(recorded):
    model = dllm_fast.patch(make_llada(), impl="torch")
    ids, options = torch.full((1, 9), 7), {"gen_length": 16, "block_length": 8, "schedule": Uniform(4)}
    expected = dllm_fast.generate(model, ids, **options).sequences
    bound_pool(model).clear()
    for inside in (True, False, True):
        with torch.inference_mode(inside):
            assert torch.equal(dllm_fast.generate(model, ids, **options).sequences, expected)
        assert len(bound_pool(model)) == 1
    model.model.transformer.ff_out.weight.sum().backward()  # a model used in inference mode can still be trained


def test_memory_that_the_pool_holds_is_given_back_before_a_batch_is_refused(recorded, monkeypatch):
    """Graphs keep memory that PyTorch counts as free: a batch that needs it gets it."""
    model = dllm_fast.patch(make_llada(), impl="torch")
    options = {"gen_length": 8, "block_length": 8}
    dllm_fast.generate(model, torch.full((1, 9), 7), **options)
    (engine,) = bound_pool(model)._engines.values()
    monkeypatch.setattr("dllm_fast.decoding.memory.need", lambda *shape: 100)
    monkeypatch.setattr("dllm_fast.decoding.memory.available", lambda device: 120)
    engine.graphs.nbytes = 20
    dllm_fast.generate(model, torch.full((2, 9), 7), **options)
    assert len(bound_pool(model)) == 2, "it fits beside what is kept"
    engine.graphs.nbytes = 21
    dllm_fast.generate(model, torch.full((3, 9), 7), **options)
    assert len(bound_pool(model)) == 1, "what was kept has made room"
    monkeypatch.setattr("dllm_fast.decoding.memory.available", lambda device: 99)
    dllm_fast.generate(model, torch.full((3, 9), 7), **options)  # its engine is there, and needs nothing
    with pytest.raises(MemoryError, match="2 rows of"):
        dllm_fast.generate(model, torch.full((2, 9), 7), **options)


@pytest.mark.parametrize("first", [True, False])
def test_a_kept_engine_serves_calls_in_and_out_of_inference_mode(recorded, ids, first):
    model = dllm_fast.patch(make_llada(), impl="torch")
    options = {"gen_length": 16, "block_length": 8, "schedule": Uniform(4)}
    with torch.inference_mode(first):
        expected = dllm_fast.generate(model, ids, **options).sequences
    kept = recorded()
    with torch.inference_mode(not first):
        assert torch.equal(dllm_fast.generate(model, ids, **options).sequences, expected)
    assert recorded() == kept > 0 and len(bound_pool(model)) == 1


def test_show_config_tells_of_recordings(recorded, ids, capsys):
    model = dllm_fast.patch(make_llada(), impl="torch")
    for rows in (1, 2):
        dllm_fast.generate(model, ids[:rows], gen_length=8, block_length=8)
    dllm_fast.show_config(model)
    assert "keeps the CUDA graphs of 2 shapes of batches" in capsys.readouterr().out
    bound_pool(model).failure = "ValueError: no such kernel"
    dllm_fast.show_config(model)
    assert "without CUDA graphs where recording failed, last with ValueError: no such kernel" in capsys.readouterr().out


def test_an_engine_that_is_kept_needs_no_memory_of_its_own(recorded, ids, monkeypatch):
    """There is no memory for a second engine: the kept one is reused, and no other is dropped for it."""
    model = dllm_fast.patch(make_llada(), impl="torch")
    options = {"gen_length": 16, "block_length": 8}
    expected = dllm_fast.generate(model, ids, **options).sequences
    kept = recorded()
    monkeypatch.setattr("dllm_fast.decoding.memory.available", lambda device: 1 << 10)
    assert torch.equal(dllm_fast.generate(model, ids, **options).sequences, expected) and recorded() == kept
    with pytest.raises(MemoryError, match="1 rows of 64 positions"):
        dllm_fast.generate(model, ids[:1], **options)
    assert len(bound_pool(model)) == 0, "what was kept was given back before"


def test_a_timed_run_that_records_is_timed_again(monkeypatch):
    monkeypatch.setattr(Graphs, "recordings", 0)
    runs = []

    def run():
        runs.append(1)
        Graphs.recordings += len(runs) < 3

    times = interleave({"run": run}, 2, torch.device("cpu"))
    assert len(runs) == 4 and len(times["run"].seconds) == 2

    def forgetful():
        Graphs.recordings += 1

    with pytest.raises(RuntimeError, match="runs recorded a CUDA graph"):
        interleave({"run": forgetful}, 1, torch.device("cpu"))
