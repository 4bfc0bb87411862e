"""The serving loop: rows that come and go while a batch runs get the tokens of `generate`."""

import dataclasses

import pytest
import torch
from tiny import EOS, MASK, make_llada

import dllm_fast
from dllm_fast import D2F, Ancestral, Drift, Every, FirstHitting, ReMDM, Threshold, Uniform, Window
from dllm_fast.decoding import memory
from dllm_fast.decoding.engine import Engine
from dllm_fast.decoding.options import Options
from dllm_fast.serve.loop import Loop
from dllm_fast.serve.messages import Accepted, Block, Cancel, Draft, Failed, Load, Refused, Request

OPTIONS = {"gen_length": 24, "block_length": 8, "schedule": Threshold(0.02), "seed": 3}
CASES = [
    {},
    {"temperature": 0.7},
    {"schedule": Uniform(6), "refresh": Window(8), "temperature": 0.7},
    {"schedule": Uniform(6), "refresh": Every(2), "cache": "prefix"},
    {"schedule": Ancestral(12), "cache": "none"},
    {"refresh": Drift(0.1), "remask": ReMDM(0.5), "cfg_scale": 0.5},
    {"suffix_length": 8, "suffix_sample": 2, "refresh": Window(8, 4)},
    {"skip_committed": True, "speculate": None},
    {"speculate": 3, "schedule": Uniform(12)},
    {"eos_id": [EOS, 5], "pad_id": 7, "temperature": 1.0},
]
DRAWN = [
    {"temperature": 1.0, "cfg_scale": 0.5},
    {"confidence": "random", "temperature": 0.7, "skip_committed": True},
    {"schedule": Uniform(12), "speculate": 3, "temperature": 1.0},
    {"remask": ReMDM(0.5), "schedule": Uniform(12), "temperature": 1.0, "cache": "none"},
    {"schedule": FirstHitting(), "temperature": 0.7},
    {"schedule": Ancestral(12), "cfg_scale": 0.5, "temperature": 0.7},
    {"pipeline": D2F(0.1, 0.95), "schedule": Threshold(0.1), "temperature": 0.7},
    {"suffix_length": 8, "suffix_sample": 2, "refresh": Window(8, 4), "temperature": 0.7},
]


def prompt(length: int, seed: int = 0) -> list[int]:
    draw = torch.Generator().manual_seed(100 * seed + length)
    return torch.randint(0, EOS, (length,), generator=draw).tolist()


def asked(number: int, prompts: list[list[int]], blocks=False, drafts=False, **options) -> Request:
    options = Options.of_call("test", {**OPTIONS, **options})
    return Request(number, prompts, options, blocks, drafts)


class Told:
    """The events of a loop, put together as its reader does."""

    def __init__(self, model, seats: int):
        self.events: list = []
        self.loop = Loop(dllm_fast.patch(model), seats, self.events.extend)

    def turns(self, number: int = 1000) -> None:
        """So many turns, or until nothing is left to do."""
        for _ in range(number):
            while not self.loop.inbox.empty():
                self.loop.take_messages()
            if not (self.loop.waiting or self.loop.seated):
                return
            self.loop.turn()

    def of(self, kind, number: int) -> list:
        return [event for event in self.events if isinstance(event, kind) and event.number == number]

    def answers(self, number: int) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for event in self.of(Block, number):
            assert event.begin == len(found.setdefault(event.choice, []))
            found[event.choice] += event.ids
        return found


def alone(model, request: Request) -> list[list[int]]:
    """The answers that `generate_many` gives, a row at a time."""
    options = {field.name: getattr(request.options, field.name) for field in dataclasses.fields(Options)}
    done = dllm_fast.generate_many(model, request.prompts, 1, **options)
    return [done.sequence.tolist()[len(ids) :] for ids, done in zip(request.prompts, done, strict=True)]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_rows_that_come_while_others_run_get_their_own_tokens(llada, options):
    """Longer and shorter ones, more and fewer than seats, so that engines grow, shrink and move rows; each request with
    a seed of its own."""
    told = Told(llada, seats=3)
    lengths = [[9], [4, 30], [21], [3], [50, 8]]
    requests = [
        asked(n, [prompt(x, n) for x in own], blocks=n % 2 == 0, **{"seed": n << 31, **options})
        for n, own in enumerate(lengths)
    ]
    for request in requests:
        told.loop.put(request)
        told.turns(1)
        assert len(told.loop.servers) == bool(told.loop.seated)
    told.turns()
    for request in requests:
        expected = alone(llada, request)
        assert told.answers(request.number) == dict(enumerate(expected)), request
    assert isinstance(told.events[-1], Load) and told.events[-1] == Load(0, 0)


def test_a_request_takes_the_seat_of_one_that_is_done(llada, monkeypatch):
    sizes, block = [], Engine.block
    monkeypatch.setattr(Engine, "block", lambda self, *args: sizes.append(self.rows) or block(self, *args))
    told = Told(llada, seats=2)
    for number, length in enumerate((8, 24, 24)):
        told.loop.put(asked(number, [prompt(9)], gen_length=length))
    told.turns()
    assert sizes == [2, 2, 2, 1]  # the third begins with the second's second block


def test_nfe_is_that_of_the_row_alone(llada):
    told = Told(llada, seats=4)
    request = asked(0, [prompt(9), prompt(30), prompt(5)])
    told.loop.put(request)
    told.turns()
    for event in told.of(Block, 0):
        ids = torch.tensor([request.prompts[event.choice]])
        assert event.done and event.nfe == dllm_fast.generate(llada, ids, **OPTIONS).nfe


def test_options_that_differ_run_side_by_side(llada):
    """None waits for another to be done: each turn brings a block of each."""
    told = Told(llada, seats=4)
    kinds = [{}, {"cache": "none"}, {"block_length": 4}, {"temperature": 1.0, "seed": 8}]
    requests = [asked(n, [prompt(9)], blocks=True, **options) for n, options in enumerate(kinds)]
    for request in requests:
        told.loop.put(request)
    told.turns(1)
    assert len(told.loop.servers) == 4 and all(len(told.of(Block, n)) == 1 for n in range(4))
    told.turns()
    for request in requests:
        assert told.answers(request.number)[0] == alone(llada, request)[0]


@pytest.mark.parametrize("options", DRAWN, ids=str)
def test_seeds_share_an_engine(llada, options, monkeypatch):
    made, init = [], Engine.__init__
    monkeypatch.setattr(Engine, "__init__", lambda self, *args: made.append(self) or init(self, *args))
    told = Told(llada, seats=8)
    own = ({"seed": 1}, {"seed": 2 << 40}, {"seed": 1, "eos_id": 5}, {"seed": 0, "pad_id": 4})
    requests = [asked(number, [prompt(9)], **options, **more) for number, more in enumerate(own)]
    for request in requests:
        told.loop.put(request)
    told.turns(1)
    assert len(told.loop.servers) == len(made) == 1 and made[0].rows == 4
    told.turns()
    assert [told.answers(n)[0] for n in range(4)] == [alone(llada, request)[0] for request in requests]
    assert len({tuple(told.answers(n)[0]) for n in (0, 1, 3)}) == 3


def test_a_cancelled_request_frees_its_seat_at_the_next_block(llada):
    told = Told(llada, seats=1)
    for number in range(3):
        told.loop.put(asked(number, [prompt(9)], blocks=True))
    told.turns(1)
    told.loop.put(Cancel(0))
    told.loop.put(Cancel(1))  # waits
    told.loop.put(Cancel(17))  # is unknown
    told.turns(1)
    assert [len(told.of(Block, number)) for number in range(3)] == [1, 0, 1]
    told.turns()
    assert told.answers(2)[0] == alone(llada, asked(2, [prompt(9)]))[0] and not told.answers(1)
    assert told.loop.load == Load(0, 0) and not told.loop.servers


def test_one_choice_is_cancelled(llada):
    told = Told(llada, seats=2)
    told.loop.put(asked(0, [prompt(9), prompt(5), prompt(7)]))
    told.turns(1)
    told.loop.put(Cancel(0, 1))
    told.turns()
    expected = alone(llada, asked(0, [prompt(9), prompt(5), prompt(7)]))
    assert told.answers(0) == {0: expected[0], 2: expected[2]}


def test_everything_is_cancelled(llada):
    told = Told(llada, seats=2)
    told.loop.put(asked(0, [prompt(9), prompt(5), prompt(7)]))
    told.turns(1)
    told.loop.put(Cancel(0))
    told.loop.put(asked(1, [prompt(9)]))
    told.turns()
    assert not told.of(Block, 0) and told.answers(1)[0] == alone(llada, asked(1, [prompt(9)]))[0]


def test_drafts_show_the_live_block_after_each_step(llada):
    told = Told(llada, seats=2)
    told.loop.put(asked(0, [prompt(9)], blocks=True, drafts=True))
    told.loop.put(asked(1, [prompt(30)]))
    told.turns()
    answer = told.answers(0)[0]
    drafts = told.of(Draft, 0)
    assert len(drafts) == told.of(Block, 0)[-1].nfe and not told.of(Draft, 1)
    masks = [draft.ids.count(MASK) for draft in drafts]
    assert masks.count(0) == 3 and max(masks) <= 7 and {draft.begin for draft in drafts} == {0, 8, 16}
    for draft in drafts:
        assert len(draft.ids) == 8
        assert all(i in (MASK, answer[draft.begin + n]) for n, i in enumerate(draft.ids))


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([[]], {}, "prompt: an empty prompt"),
        ([[1, VOCABULARY := 101]], {}, f"prompt: id {VOCABULARY} is outside the vocabulary"),
        ([[1] * 500], {}, "prompt: a prompt of 500 and gen_length=24 exceed the model's 512 positions"),
        ([[1]], {"schedule": Uniform(100)}, "schedule: Uniform: steps=100"),
        ([[1]], {"eos_id": [1, 101]}, r"eos_id[1]=101 is not an id"),
    ],
    ids=["empty", "vocabulary", "long", "schedule", "eos"],
)
def test_what_does_not_fit_is_refused_by_name(llada, prompts, options, message):
    told = Told(llada, seats=2)
    told.loop.put(asked(0, prompts, **options))
    told.turns()
    assert len(told.events) == 1 and isinstance(told.events[0], Refused) and message in told.events[0].error


def test_options_that_need_too_much_memory_are_refused_or_get_fewer_seats(llada, monkeypatch):
    """Two of four run at a time, and one whose drafts need more than is free does not."""
    told = Told(llada, seats=4)
    own = asked(0, [prompt(9)] * 4).options.resolved(llada, told.loop.family)
    told.loop.free = memory.need(told.loop.family, own, 2, told.loop.positions, 8)
    sizes, block = [], Engine.block
    monkeypatch.setattr(Engine, "block", lambda self, *args: sizes.append(self.rows) or block(self, *args))
    told.loop.put(asked(0, [prompt(9)] * 4))
    told.loop.put(asked(1, [prompt(480)], cache="none", schedule=Uniform(12), speculate=16, cfg_scale=1.0))
    told.turns()
    (refused,) = told.of(Refused, 1)
    assert "with its options one choice needs 0.0 GiB of memory" in refused.error and not told.of(Block, 1)
    assert max(sizes) == 2 and [told.answers(0)[n] for n in range(4)] == alone(llada, asked(0, [prompt(9)] * 4))


def test_an_error_fails_the_requests_of_its_engine_alone(llada, monkeypatch):
    block = Engine.block

    def failing(self, *args):
        if self.options.cache == "none":
            raise RuntimeError("an illegal access")
        block(self, *args)

    monkeypatch.setattr(Engine, "block", failing)
    told = Told(llada, seats=2)
    told.loop.put(asked(0, [prompt(9), prompt(7), prompt(8)], cache="none"))
    told.loop.put(asked(1, [prompt(9)]))
    told.turns()
    assert [event.error for event in told.of(Failed, 0)] == ["RuntimeError: an illegal access"]
    assert told.answers(1)[0] == alone(llada, asked(1, [prompt(9)]))[0]


def test_a_row_whose_logits_are_nan_fails_alone(llada):
    """Its neighbour in the same engine goes on."""
    told = Told(llada, seats=4)
    with torch.no_grad():
        llada.model.transformer.wte.weight[98] = float("nan")
    others = asked(1, [[i if i != 98 else 97 for i in prompt(9)]], suppress_tokens=98)
    told.loop.put(asked(0, [[1, 98], [3, 4]], suppress_tokens=98))
    told.loop.put(others)
    told.turns()
    assert "logits are NaN or infinite at step 0 of block 0" in told.of(Failed, 0)[0].error and not told.of(Block, 0)
    assert len(told.of(Failed, 0)) == 1 and told.answers(1)[0] == alone(llada, others)[0]


def test_too_little_memory_halves_the_seats_and_keeps_the_tokens(llada, monkeypatch):
    init = Engine.__init__

    def limited(self, family, options, rows, *rest):
        if rows > 2:
            raise torch.OutOfMemoryError("no memory")
        init(self, family, options, rows, *rest)

    monkeypatch.setattr(Engine, "__init__", limited)
    told = Told(llada, seats=4)
    first = asked(0, [prompt(9), prompt(20)], blocks=True, temperature=0.5)
    later = asked(1, [prompt(8, 1), prompt(30, 1)], blocks=True, temperature=0.5)
    told.loop.put(first)
    told.turns(1)
    told.loop.put(later)
    with pytest.warns(UserWarning, match="no memory for 4 rows, going on with 2"):
        told.turns()
    for request in (first, later):
        assert told.answers(request.number) == dict(enumerate(alone(llada, request)))


def test_a_row_of_a_batch_is_a_row_of_generate():
    """Several choices of one prompt are the rows of a batch: their noise differs."""
    model = make_llada()
    told = Told(model, seats=2)
    told.loop.put(asked(0, [prompt(9)] * 3, temperature=1.0))
    told.turns()
    out = dllm_fast.generate(model, torch.tensor([prompt(9)] * 3), **OPTIONS, temperature=1.0)
    assert list(told.answers(0).items()) == sorted(told.answers(0).items())
    assert [told.answers(0)[n] for n in range(3)] == out.sequences[:, 9:].tolist()
    assert told.of(Accepted, 0) == [Accepted(0)]
