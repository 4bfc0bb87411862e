"""The engine's steps can be recorded, and replays give the same tokens as running them, with a stand-in for CUDA."""

import random
import warnings

import pytest
import torch
from needs import needs_triton, needs_watched
from recording import Forbidden, Recorder, launchers_of_pytorch, watch_compilations
from rows import Request, draw_request, seated, together, with_seeds
from tiny import make_llada, make_modernbert

import dllm_fast
from dllm_fast import (  # fmt: skip
    D2F,
    P2,
    Ancestral,
    Drift,
    EntropyBound,
    Every,
    Factor,
    FirstHitting,
    MultiBlock,
    Pyramid,
    ReMDM,
    Threshold,
    Uniform,
    Verify,
    Window,
)
from dllm_fast.decoding.graphs import Graphs

pytestmark = [
    needs_triton,
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's own recordings are tried there"),
]
SMALL = {
    "llada": lambda: make_llada(n_layers=2, d_model=32, n_heads=2, n_kv_heads=1, mlp_hidden_size=32),
    "modernbert": lambda: make_modernbert(num_hidden_layers=2, hidden_size=32, intermediate_size=32),
}


@pytest.fixture
def recorder(monkeypatch):
    # The warning for a step that cannot be recorded is an error in these tests.
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="steps go on without CUDA graphs")
        yield Recorder(monkeypatch)


def unrecorded(monkeypatch, run):
    """The result of ``run`` without recordings."""
    with monkeypatch.context() as patch:
        patch.setattr(Graphs, "run", lambda self, key, step: step())
        return run()


def compare(monkeypatch, recorder, name, run):
    """``run(model)`` with recordings, compared with the same run without."""
    models = [dllm_fast.patch(SMALL[name](), impl="triton") for _ in range(2)]
    expected = unrecorded(monkeypatch, lambda: run(models[0]))
    assert recorder.recorded == 0
    assert run(models[1]) == expected
    assert run(models[1]) == expected, "a second call replays what the first has recorded"
    assert recorder.collections == 0


OPTIONS = [
    *[{"schedule": s} for s in (Pyramid(1), Factor(1.0), EntropyBound(3.0), FirstHitting(), Threshold(0.1))],
    {"schedule": Ancestral(12, "cosine"), "temperature": 1.0},
    *[{"cache": cache, "cfg_scale": 1.0, "temperature": 0.5} for cache in ("none", "prefix", "dual")],
    *[{"refresh": refresh, "cache": cache} for refresh in (Every(2), Window(2, 1)) for cache in ("prefix", "dual")],
    {"refresh": Drift(0.3)},
    *[{"remask": remask, "confidence": "margin"} for remask in (ReMDM(1.0), Verify(0.3), P2(1.0))],
    {"remask": ReMDM(0.7), "schedule": Threshold(0.1), "confidence": "random", "cfg_scale": 0.5},
    {"confidence": "entropy", "suppress_tokens": [3, 4], "temperature": 0.7},
    {"logprobs": True, "remask": ReMDM(0.7), "temperature": 0.7},
    {"top_k": 7, "top_p": 0.8, "temperature": 0.7, "suppress_tokens": [3, 4], "defer_tokens": [5]},
    {"top_p": 0.8, "temperature": 0.7, "confidence": "random", "speculate": 2, "cfg_scale": 1.0},
    {"logprobs": True, "schedule": Threshold(0.1), "speculate": 2},
    {"pipeline": D2F(0.2, 0.5), "schedule": Threshold(0.9), "cfg_scale": 0.5},
    {"pipeline": MultiBlock(0.2, 2, 1, 3), "schedule": Threshold(0.9), "cache": "prefix"},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("name", "rows"), [("llada", 3), ("modernbert", 1)])
def test_each_kind_of_option(monkeypatch, recorder, ids, padded, name, options, rows):
    launchers_of_pytorch(monkeypatch, recorder)
    options = {"gen_length": 24, "block_length": 8, "schedule": Uniform(12), "seed": 3, **options}

    def run(model):
        out = dllm_fast.generate(model, ids[-rows:], padded[-rows:], **options)
        return out.sequences.tolist(), out.nfe, None if out.logprobs is None else out.logprobs.tolist()

    compare(monkeypatch, recorder, name, run)
    assert recorder.recorded >= 1
    assert recorder.replays > recorder.recorded, "and replayed"


@pytest.mark.parametrize("seed", [pytest.param(n, marks=() if n < 12 else pytest.mark.long) for n in range(40)])
def test_any_request(monkeypatch, recorder, seed):
    launchers_of_pytorch(monkeypatch, recorder)
    rng = random.Random(seed)
    request = draw_request(rng, rows=(1, 2, 3), blocks=(4, 8), longest=12)
    served = rng.random() < 0.5
    compare(monkeypatch, recorder, rng.choice(list(SMALL)), lambda model: (
        seated(model, request, 2) if served else together(model, request)
    ))  # fmt: skip


@pytest.mark.parametrize("schedule", [FirstHitting(), Threshold(0.1)], ids=str)
def test_other_seeds_replay_what_was_recorded(monkeypatch, recorder, ids, schedule):
    launchers_of_pytorch(monkeypatch, recorder)
    models = [dllm_fast.patch(SMALL["llada"](), impl="triton") for _ in range(2)]
    options = {"gen_length": 16, "block_length": 8, "schedule": schedule, "temperature": 1.0}
    request, seeds = Request(list(ids), options, right=False), ([1, 1 << 40, 3], [9, 2, 7])
    expected = unrecorded(monkeypatch, lambda: [with_seeds(models[0], request, own, 3) for own in seeds])
    assert expected[0] != expected[1]
    counts = []
    for own, tokens in zip(seeds, expected, strict=True):
        assert with_seeds(models[1], request, own, 3) == tokens
        counts.append(recorder.recorded)
    assert 0 < counts[0] == counts[1]


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": Uniform(4), "temperature": 0.5},
        pytest.param(
            {"schedule": Threshold(0.9), "remask": ReMDM(0.7), "cfg_scale": 0.5, "cache": "prefix"},
            marks=pytest.mark.long,
        ),
    ],
    ids=str,
)
@needs_watched
def test_on_the_kernels(monkeypatch, recorder, ids, options):
    """Also watch compilations: there must be none while recording."""
    watch_compilations(monkeypatch, recorder)

    def run(model):
        return dllm_fast.generate(
            model, ids[:2, :5], gen_length=4, block_length=4, seed=3, **options
        ).sequences.tolist()

    compare(monkeypatch, recorder, "llada", run)
    assert recorder.replays > recorder.recorded >= 1 and recorder.compiled


def record(step):
    graphs = Graphs(True, torch.device("cpu"))
    graphs.run("step", lambda: None)
    with pytest.warns(UserWarning, match="steps go on without"):
        graphs.run("step", lambda: step(graphs) if graphs.enabled else None)
    return graphs.failure


KEPT = []
FAULTS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).any()),
    "int": lambda x: int(x[0]),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: (x > 0).nonzero(),
    "masked": lambda x: x[x > 0],
    "masked-store": lambda x: x.index_put_((x > 0,), torch.zeros(())),
    "select": lambda x: x.masked_select(x > 0),
    "from-the-host": lambda x: x + torch.tensor([1.0]),
    "list-index": lambda x: x[[0, 1]],
    "kept-view": lambda x: KEPT.append((x + 1)[:2]),
    "kept": lambda x: KEPT.append(x + 1),
}


@pytest.mark.filterwarnings("ignore:steps go on")
@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_recorded_is_found(monkeypatch, fault):
    Recorder(monkeypatch)
    x = torch.arange(3.0)
    failure = record(lambda graphs: FAULTS[fault](x))
    KEPT.clear()
    assert failure.startswith(Forbidden.__name__), failure


@needs_watched
def test_a_kernel_that_was_not_compiled_before_is_found(monkeypatch):
    recorder = Recorder(monkeypatch)
    watch_compilations(monkeypatch, recorder)
    from dllm_fast.kernels.glu import swiglu

    x, y = torch.ones(1, 16), torch.ones(1, 17)
    swiglu(x, x)
    assert record(lambda graphs: swiglu(y, y)).startswith(f"{Forbidden.__name__}: _glu_kernel is compiled")


def test_a_replay_sees_buffers_and_no_python(monkeypatch):
    Recorder(monkeypatch)
    graphs, buffer, out, number = Graphs(True, torch.device("cpu")), torch.zeros(2), torch.zeros(2), 1.0

    def step():
        out.copy_((buffer * number).view(2, 1)[:, 0] + 1)

    for _ in range(2):
        graphs.run("step", step)
    buffer.fill_(5)
    graphs.run("step", step)
    assert out.tolist() == [6, 6]
    number = 100.0
    graphs.run("step", step)
    assert out.tolist() == [6, 6], "the number was baked in"
