"""``batch_size="auto"``: as many rows as fit, fewer where that was too many, and the same tokens."""

import warnings

import pytest
import torch
from tiny import EOS

import dllm_fast
from dllm_fast import Threshold, Uniform, Window
from dllm_fast.decoding import memory
from dllm_fast.decoding.engine import Engine

PROMPTS = [
    torch.randint(0, EOS, (n,), generator=torch.Generator().manual_seed(n)) for n in (5, 20, 9, 14, 3, 17, 8, 11)
]
SCHEDULES = (Uniform(6), Threshold(0.02))


@pytest.fixture
def sizes(monkeypatch) -> list[int]:
    """The rows of every engine that is made."""
    made, init = [], Engine.__init__

    def counted(self, family, options, rows, *rest):
        made.append(rows)
        init(self, family, options, rows, *rest)

    monkeypatch.setattr(Engine, "__init__", counted)
    return made


def run(model, schedule, **options) -> list[tuple[list[int], int]]:
    options = {"gen_length": 24, "block_length": 8, "refresh": Window(8), "temperature": 0.7, "seed": 1, **options}
    done = dllm_fast.generate_many(dllm_fast.patch(model), PROMPTS, schedule=schedule, **options)
    return [(row.sequence.tolist(), row.nfe) for row in done]


def test_all_prompts_where_they_fit(llada, sizes):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(llada, Uniform(6), batch_size="auto")
    assert sizes[0] == len(PROMPTS)


def test_a_share_of_what_is_free(llada, sizes, monkeypatch):
    def need(family, options, rows, slots, spare):
        return 100 * rows

    monkeypatch.setattr(memory, "need", need)
    monkeypatch.setattr(memory, "available", lambda device: 345)
    run(llada, Uniform(6), batch_size="auto")
    assert sizes[0] == 3  # 300 of 345 x 0.9


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_too_many_rows_for_an_engine(llada, sizes, monkeypatch, schedule, error):
    expected = run(llada, schedule, batch_size=2)
    sizes.clear()
    init = Engine.__init__

    def limited(self, family, options, rows, *rest):
        if rows > 3:
            raise error("no memory")
        init(self, family, options, rows, *rest)

    monkeypatch.setattr(Engine, "__init__", limited)
    with pytest.warns(UserWarning, match="no memory for 8 rows, going on with 4"):
        assert run(llada, schedule, batch_size="auto") == expected
    assert sizes[0] == 2


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("step", [1, 7, 11])
def test_no_memory_in_a_later_step(llada, monkeypatch, schedule, step):
    """At one step of a run, with rows half done and others handed out already."""
    expected = run(llada, schedule, batch_size=2)
    take, taken = Engine.take, []

    def limited(self, *args):
        taken.append(self.rows)
        if len(taken) == step:
            raise torch.OutOfMemoryError("no memory")
        take(self, *args)

    monkeypatch.setattr(Engine, "take", limited)
    monkeypatch.setattr(memory, "ROWS", 4)
    with pytest.warns(UserWarning, match="no memory for 4 rows, going on with 2"):
        assert run(llada, schedule, batch_size="auto") == expected


def test_only_where_it_is_asked_for_and_there_is_a_half(llada, monkeypatch):
    monkeypatch.setattr(Engine, "take", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory")))
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        run(llada, Uniform(6), batch_size=4)
    with pytest.warns(UserWarning), pytest.raises(torch.OutOfMemoryError, match="no memory"):
        run(llada, Uniform(6), batch_size="auto")


@pytest.mark.parametrize("wrong", ["all", 0, 2.5, None])
def test_refused(llada, wrong):
    with pytest.raises(ValueError, match="batch_size="):
        run(llada, Uniform(6), batch_size=wrong)
