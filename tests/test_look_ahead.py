"""A block's last forwards with drafts evaluate the next block's first step too: the same tokens, fewer forwards."""

import random

import others
import pytest
import torch
from needs import needs_cpp, needs_triton
from rows import draw_request, is_level
from tiny import EOS, MAKERS, MASK

import dllm_fast
from dllm_fast import Ancestral, Every, FirstHitting, Pyramid, Static, Threshold, Uniform, Window
from dllm_fast.decoding.drafts import AutoGraph
from dllm_fast.decoding.options import Options
from dllm_fast.decoding.speculation import Speculation
from dllm_fast.patch import bound_pool

NAMES = ["llada-gqa", "modernbert"]


@pytest.fixture
def resumed(monkeypatch):
    """How many blocks began with a step that had been evaluated."""
    found = []

    def watched(engine, resume=Speculation.resume):
        found.append(int(engine.number[0]))
        resume(engine)

    monkeypatch.setattr(Speculation, "resume", watched)
    return found


def request_of(seed: int, name: str, **limits):
    """A request of one row whose options let drafts look ahead, drawn at random."""
    rng = random.Random(seed)
    limits = {"rows": (1,), "most_blocks": 3, "longest": 12, **limits}
    request = draw_request(rng, **limits, windows=name == "modernbert")
    o = request.options
    o["gen_length"] = max(o["gen_length"], 2 * o["block_length"])
    if isinstance(o["schedule"], Uniform | Ancestral):  # these fit the blocks as drawn
        o["schedule"] = rng.choice([Static(2), Pyramid(1), FirstHitting()])
    reach = o["block_length"] + rng.choice([0, 0, 3, 40])
    o |= {"cache": "dual", "refresh": rng.choice([Every(2), Every(3), Window(reach, rng.choice([0, 0, 5]))])}
    if name in others.SHIFTED:  # the window has to hold the position before the block
        o["refresh"] = Window(reach + 1)
    o |= {"skip_committed": False, "suffix_length": None, "suffix_sample": 0, "remask": None}
    o |= {"speculate": rng.choice([1, 2, 3, 7]), "cache_dtype": rng.choice([None, None, "e4m3"])}
    return request


def run(model, request) -> dllm_fast.Output:
    device = next(model.parameters()).device
    return dllm_fast.generate(model, request.prompts[0][None].to(device), **request.options)


def without(model, request, monkeypatch) -> dllm_fast.Output:
    """Drafts, and no look at the next block."""
    with monkeypatch.context() as patch:
        patch.setattr(Options, "looks_ahead", False)
        found = run(model, request)
    bound_pool(model).clear()  # of the engine that does not
    return found


def check(model, request, resumed, monkeypatch, level: bool = False) -> None:
    """A block that is resumed saves its first forward, and the steps are the same. With ``level``, two candidates that
    are within rounding of each other may change places."""
    expected = without(model, request, monkeypatch)
    assert not resumed
    found = run(model, request)
    if not torch.equal(found.sequences, expected.sequences):
        mine = found.sequences[0].tolist(), found.nfe
        assert level and is_level(model, request, 0, mine), str(request)
        return
    assert found.steps == expected.steps and found.nfe_full == expected.nfe_full, str(request)
    passes = 2 if request.options["cfg_scale"] else 1
    assert expected.nfe - found.nfe == passes * len(resumed), str(request)


class Drafts:
    """A streamer that counts the masks of each draft."""

    def __init__(self):
        self.masks: list[int] = []

    def put_draft(self, value, sequence):
        self.masks.append(int((sequence == MASK).sum()))

    def put(self, value):
        pass

    def end(self):
        pass


def test_a_resumed_step_is_shown(resumed):
    model = dllm_fast.patch(MAKERS["llada"]().double(), impl="torch")
    given = {"gen_length": 16, "block_length": 4, "refresh": Window(4, 0), "speculate": 3, "schedule": Static(1)}
    for prompt in torch.randint(0, EOS, (10, 9), generator=torch.Generator().manual_seed(0)):
        before, streamer = len(resumed), Drafts()
        out = dllm_fast.generate(model, prompt[None], streamer=streamer, **given)
        assert len(streamer.masks) == out.nfe + len(resumed) - before and streamer.masks[-1] == 0
    assert resumed


@pytest.mark.parametrize("name", [*NAMES, "qwen2-shifted"])
@pytest.mark.parametrize("seed", range(6))
def test_the_same_tokens(name, seed, resumed, monkeypatch):
    model = dllm_fast.patch(others.made(name).double(), impl="torch")
    check(model, request_of(seed, name), resumed, monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("name", [*NAMES, "qwen2-shifted"])
@pytest.mark.parametrize("hundred", range(3))
def test_the_same_tokens_in_900_runs(name, hundred, resumed, monkeypatch):
    model, blocks = dllm_fast.patch(others.made(name).double(), impl="torch"), 0
    for seed in range(1000 + 100 * hundred, 1100 + 100 * hundred):
        check(model, request_of(seed, name), resumed, monkeypatch)
        blocks += len(resumed)
        resumed.clear()
    assert blocks > 20


@needs_cpp
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(4))
def test_the_same_tokens_in_the_compiled_kernels(name, seed, resumed, monkeypatch):
    model = dllm_fast.patch(MAKERS[name](), impl="cpp")
    check(model, request_of(seed, name), resumed, monkeypatch, level=True)


@needs_triton
@pytest.mark.usefixtures("strict_interpreter")
def test_the_same_tokens_in_tritons_kernels(resumed, monkeypatch):
    model = MAKERS["llada-gqa"]().to("cuda" if torch.cuda.is_available() else "cpu")
    request = request_of(3, "llada-gqa", blocks=(4,), longest=5)
    request.options |= {"cache_dtype": None, "gen_length": 8}
    check(dllm_fast.patch(model, impl="triton"), request, resumed, monkeypatch, level=True)


@pytest.mark.parametrize(("schedule", "least"), [(Uniform(32), 2), (Threshold(0.9), 1)])
def test_the_shipped_model_saves_forwards(schedule, least, resumed, monkeypatch):
    from bench import task

    model, tokenizer = task.load("llada-steps")
    prompt = next(iter(task.STEPS.problems(1, 3, held_out=True)))[0]
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    given = {"gen_length": 64, "block_length": 16, "refresh": Window(16, 0), "speculate": 3}
    with monkeypatch.context() as patch:
        patch.setattr(Options, "looks_ahead", False)
        expected = dllm_fast.generate(model, ids, schedule=schedule, **given)
    bound_pool(model).clear()
    found = dllm_fast.generate(model, ids, schedule=schedule, **given)
    assert torch.equal(found.sequences, expected.sequences)
    assert len(resumed) >= least and found.nfe == expected.nfe - len(resumed)
    assert found.states > found.nfe and found.positions > 0


@pytest.mark.parametrize(
    "other",
    [
        {"refresh": "block"}, {"refresh": Window(7, 0)}, {"cache": "prefix"}, {"cache": "none", "refresh": "block"},
        {"suffix_length": 8}, {"speculate": AutoGraph(((1, None),))}, {"speculate": None},
        {"remask": dllm_fast.ReMDM(0.5)},
    ],
    ids=str,
)  # fmt: skip
def test_where_it_does_not_look_ahead(other):
    given = {"gen_length": 32, "block_length": 8, "schedule": Uniform(16), "refresh": Window(8, 0), "speculate": 3}
    assert Options.of_call("generate", given, None).looks_ahead
    assert not Options.of_call("generate", {**given, **other}, None).looks_ahead


def test_not_in_a_batch(resumed):
    """Its rows would begin their blocks apart."""
    model = dllm_fast.patch(MAKERS["llada"]().double(), impl="torch")
    ids = torch.randint(0, EOS, (2, 9), generator=torch.Generator().manual_seed(0))
    given = {"gen_length": 32, "block_length": 8, "schedule": Uniform(32), "refresh": Window(8, 0), "speculate": 3}
    alone = [dllm_fast.generate(model, row[None], **given) for row in ids]
    assert resumed
    resumed.clear()
    together = dllm_fast.generate(model, ids, **given)
    assert not resumed
    assert torch.equal(together.sequences[0], alone[0].sequences[0])
