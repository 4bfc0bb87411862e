"""After `warmup`, a call with the same options compiles and records nothing, and gives the same tokens."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from needs import needs_triton, needs_watched
from recording import Recorder, launchers_of_pytorch, watch_compilations
from test_recording import SMALL

import dllm_fast
from dllm_fast import P2, Ancestral, Drift, Every, ReMDM, Threshold, Uniform, Window, attentions
from dllm_fast.decoding import compiling
from dllm_fast.decoding.engine import Engine
from dllm_fast.patch import bound_pool
from dllm_fast.warmup import _halves, _representatives, warmup

WORDS = torch.Generator().manual_seed(1)
on_the_stand_in = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's own recordings are tried there")


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr("dllm_fast.decoding.server.records", lambda device, impl: True)
    monkeypatch.setattr(sys.modules["dllm_fast.warmup"], "records", lambda device, impl: True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="steps go on without CUDA graphs")
        yield Recorder(monkeypatch)


def prompts(lengths):
    return [torch.randint(0, 99, (length,), generator=WORDS) for length in lengths]


@needs_triton
@on_the_stand_in
@pytest.mark.parametrize(("name", "options"), [
    ("llada", {"schedule": Uniform(12)}),
    ("modernbert", {"cache": "none", "cfg_scale": 0.5}),
    ("modernbert", {"cache": "prefix", "temperature": 0.5}),
    ("llada", {"cache": "prefix", "refresh": Window(8, 2)}),
    ("modernbert", {"refresh": Every(2), "schedule": Threshold(0.02)}),
    ("llada", {"refresh": Drift(0.3), "remask": P2(1.0)}),
    ("modernbert", {"cache": "prefix", "skip_committed": True, "cfg_scale": 0.5, "schedule": Threshold(0.02)}),
    ("llada", {"remask": ReMDM(0.7), "confidence": "margin"}),
    ("llada", {"cache_dtype": "e4m3", "schedule": Uniform(12), "refresh": Every(2)}),
    ("modernbert", {"schedule": Ancestral(12), "temperature": 1.0, "suppress_tokens": [3]}),
    ("llada", {"speculate": 3, "schedule": Uniform(12)}),
    ("modernbert", {"speculate": 2, "cache": "prefix", "refresh": Window(8, 2), "schedule": Threshold(0.02)}),
    ("llada", {"speculate": 1, "cache": "none", "schedule": Threshold(0.02)}),
    ("llada", {"speculate": "auto", "schedule": Uniform(24)}),
    ("llada", {"speculate": "auto", "schedule": Uniform(12), "cfg_scale": 0.5, "cache": "none"}),
], ids=str)  # fmt: skip
def test_a_call_after_it_records_nothing_and_gives_the_same_tokens(monkeypatch, recorder, name, options):
    launchers_of_pytorch(monkeypatch, recorder)
    monkeypatch.setattr("dllm_fast.decoding.options.pays", lambda device, impl: True)
    time = Engine._time
    monkeypatch.setattr(Engine, "_time", lambda *given: 0 * time(*given) + 1)  # so that "auto" does not depend on it
    options = {"gen_length": 24, "block_length": 8, "seed": 3, **options}
    lengths = [40, 17, 9, 70, 41]
    models = [dllm_fast.patch(SMALL[name](), impl="triton") for _ in range(2)]
    asked = prompts(lengths)

    def run(model):
        one = dllm_fast.generate(model, asked[0][None], **options)
        many = list(dllm_fast.generate_many(model, asked, batch_size=3, eos_id=int(one.sequences[0, 45]), **options))
        return one.sequences.tolist(), [(x.sequence.tolist(), x.nfe) for x in many]

    expected = run(models[0])
    state = torch.get_rng_state()
    assert warmup(models[1], lengths, batch_size=3, progress=False, **options) is None
    assert torch.equal(torch.get_rng_state(), state)
    before = recorder.recorded
    assert run(models[1]) == expected
    assert recorder.recorded == before > 0


@needs_triton
@on_the_stand_in
def test_prompts_that_fill_their_slots_have_recordings_of_their_own(monkeypatch, recorder):
    """If PyTorch's attention serves whole sequences."""
    launchers_of_pytorch(monkeypatch, recorder)
    monkeypatch.setattr(attentions, "pytorch_from", {})
    monkeypatch.setenv("DLLM_FAST_ATTENTION", "float32:32:64")
    model = dllm_fast.patch(SMALL["modernbert"](), impl="triton")
    options = {"gen_length": 24, "block_length": 8, "schedule": Uniform(12)}
    warmup(model, [40, 39, 20], progress=False, **options)
    before = recorder.recorded
    for prompt in prompts([40, 39, 20, 40]):
        dllm_fast.generate(model, prompt[None], **options)
    assert recorder.recorded == before


@needs_triton
@needs_watched
@on_the_stand_in
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.long),
        {"refresh": Window(4, 0), "temperature": 0.5},
        pytest.param({"skip_committed": True}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_call_after_it_compiles_nothing(monkeypatch, recorder, options):
    """On the kernels, watching what they would compile."""
    watch_compilations(monkeypatch, recorder)
    model = dllm_fast.patch(SMALL["llada"](), impl="triton")
    options = {"gen_length": 8, "block_length": 4, "schedule": Uniform(4), "seed": 1, **options}
    warmup(model, range(5, 9), progress=False, **options)
    recorded, compiled = recorder.recorded, len(recorder.compiled)
    dllm_fast.generate(model, prompts([7])[0][None], **options)
    assert recorder.recorded == recorded > 0 and len(recorder.compiled) == compiled > 0


@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_on_a_cpu_it_takes_a_step_of_each_kind_and_keeps_nothing(either, ids, impl):
    dllm_fast.patch(either, impl=impl)
    expected = dllm_fast.generate(either, ids, gen_length=8, block_length=4, seed=1).sequences
    seen = []
    options = {"gen_length": 8, "block_length": 4, "cache": "prefix", "refresh": Window(4, 0)}
    warmup(either, [5, 24], 3, lambda what, done, total: seen.append((what, done, total)), **options)
    assert [what.split(",")[0] for what, *_ in seen] == [
        "compiling", "taking full steps", "taking block steps", "taking window steps", "taking block steps",
        "taking mixed steps",
    ]  # fmt: skip
    assert [(done, total) for _, done, total in seen] == [(n, 6) for n in range(6)]
    assert {what.split(", ")[1] for what, *_ in seen} == {"3 x 32"}
    assert len(bound_pool(either)) == 0
    assert torch.equal(dllm_fast.generate(either, ids, gen_length=8, block_length=4, seed=1).sequences, expected)


def test_progress_goes_to_stderr_and_can_be_silent(llada, capsys):
    dllm_fast.patch(llada)
    warmup(llada, 5, gen_length=8, block_length=4)
    shown = capsys.readouterr()
    assert shown.out == ""
    said = ["0/3: compiling", "1/3: taking full steps", "2/3: taking block steps"]
    assert shown.err.splitlines() == [f"warmup {what}, 1 x 13" for what in said]
    warmup(llada, 5, progress=False, gen_length=8, block_length=4)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_richs_bar(llada, capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("FORCE_COLOR", "1")
    dllm_fast.patch(llada)
    warmup(llada, 5, gen_length=8, block_length=4)
    shown = capsys.readouterr()
    assert shown.out == "" and "taking block steps" in shown.err and "warmup 0/3" not in shown.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "prompt_lengths=0 is not a positive whole number"),
        (([5, True],), "prompt_lengths=True is not"),
        (([],), "prompt_lengths: there are none"),
        ((5, 0), "batch_size=0 is not"),
        ((600,), "prompt_lengths: a prompt of 600 and gen_length=128 exceed the model's 512 positions"),
        ((5, 1, False, ("gen_length", 0)), "gen_length=0: there is nothing to fill"),
        ((5, 1, False, ("gen_length", 7)), "gen_length=7 is not a multiple"),
        ((5, 1, False, ("streamer", None)), "streamer: not an option of warmup"),
    ],
)
def test_what_does_not_fit_is_refused(llada, arguments, message):
    dllm_fast.patch(llada)
    with pytest.raises(ValueError, match=message):
        warmup(llada, *arguments[:3], **dict(arguments[3:]))
    with pytest.raises(ValueError, match="not patched"):
        warmup(dllm_fast.unpatch(llada), 5)


def test_what_is_recorded_for_which_lengths_and_rows():
    assert _representatives([3, 40, 41, 103], 24) == [3, 40, 103]
    assert _representatives([30, 39], 24) == [39]
    assert _halves(1) == [1] and _halves(5) == [1, 2, 5] and _halves(8) == [1, 2, 4, 8]


PROGRAM = """
import sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Hopper:
    "A stand-in for a card that is not here: what is compiled for it cannot be launched."
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device=None: 0

driver.set_active(Hopper())
from dllm_fast.decoding.compiling import kernels, side_by_side
from dllm_fast.kernels import glu, norm, select

x = torch.ones(4, 64, dtype=torch.bfloat16)
before = [kernel.run for kernel in kernels()]
with side_by_side():
    for _ in range(3):
        glu.swiglu(x, x)
        norm.rms_norm(x, x[0], 1e-5)
assert [kernel.run for kernel in kernels()] == before
for kernel in (glu._glu_kernel, norm._norm_kernel):
    (compiled,) = kernel.device_caches[0][0].values()
    print(kernel.fn.__name__, compiled.metadata.target.arch, ".visible .entry" in compiled.asm["ptx"])
assert not select._select_kernel.device_caches[0][0]
"""


@needs_triton
def test_kernels_are_compiled_side_by_side_and_not_launched(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["_glu_kernel 90 True", "_norm_kernel 90 True"]


STEPS = """
import sys
from unittest import mock
sys.path[:0] = [".", "tests"]
from bench.generation.compilations import Card, driver
import torch
from triton.runtime.jit import JITFunction
import dllm_fast
from dllm_fast import Drift, P2, Uniform, launchers
from dllm_fast.patch import bound_family, bound_pool
from dllm_fast.decoding.options import Options
from dllm_fast.decoding.request import plan_row
from dllm_fast.decoding.server import Server
from test_recording import SMALL
warmup = sys.modules["dllm_fast.warmup"]

found, launched = set(), []

def compile_nothing(self, key, signature, device, constexprs, options, attrs, warmup):
    found.add(self.fn.__name__)
    launched.append(not warmup)
    kernel = self.device_caches[device][0][key] = object()
    return kernel

driver.set_active(Card())
launchers.obstacle = lambda *_: None
for name, options in (("llada", {"remask": P2(1.0), "refresh": Drift(0.3)}), ("modernbert", {"cache": "prefix"})):
    model = dllm_fast.patch(SMALL[name]().to(torch.bfloat16), impl="triton")
    family = bound_family(model)
    given = {"gen_length": 16, "block_length": 8, "schedule": Uniform(8), "seed": 0, **options}
    options = Options(**given).resolved(model, family)
    rows = [plan_row(options, family, n, [1] * 9) for n in range(2)]
    work = warmup._Work(warmup._plan(options, rows), lambda *_: None, 0, 1)
    with Server(model, family, bound_pool(model), options, rows, 2).seated_engine() as engine:
        canvas, before = engine.canvas.clone(), engine.options
        with mock.patch.object(JITFunction, "_do_compile", compile_nothing):
            work.compile(engine, rows)
        assert torch.equal(engine.canvas, canvas) and engine.options is before
assert launched and not any(launched)
print(*sorted(found))
"""


@needs_triton
@needs_watched
def test_every_kernel_of_the_steps_is_compiled_beforehand(monkeypatch):
    """Without launches: steps must work although kernels have written nothing."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", STEPS], cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    wanted = "_attention_kernel _commit_kernel _compact_kernel _glu_kernel _norm_kernel _predict_kernel _rope_kernel"
    assert set(done.stdout.split()) >= set(wanted.split())


@needs_triton
@on_the_stand_in
def test_the_interpreter_has_nothing_to_compile():
    from dllm_fast.kernels import glu  # noqa: F401

    assert compiling.kernels() == []
