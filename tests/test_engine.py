"""What the engine promises around its tokens: steps that a CUDA graph can hold, threads, faults, memory."""

import itertools
import threading
from dataclasses import replace

import pytest
import torch
from needs import needs_triton
from recording import Eager
from tiny import MAKERS, MASK
from torch.fx.experimental.proxy_tensor import make_fx

import dllm_fast
from dllm_fast import Drift, Every, Threshold, Uniform, Window
from dllm_fast.decoding.engine import Engine
from dllm_fast.decoding.pool import Pool
from dllm_fast.kernels import reference
from dllm_fast.patch import bound_family, bound_pool


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


class Replays:
    """Stands in for CUDA graphs: a key's second run is traced over fake tensors, where reading a value on the host
    is an error, and from then on the trace is run in place of the step, on the same buffers."""

    traced = 0

    def __init__(self, enabled, device):
        self.enabled, self.failure, self.nbytes, self._steps = True, None, 0, {}

    def release(self):
        self._steps.clear()

    def run(self, key, step):
        if key not in self._steps:
            self._steps[key] = None
            return step()
        engine = step.func.__self__
        named = {name: x for name, x in vars(engine).items() if isinstance(x, torch.Tensor)}
        if self._steps[key] is None:
            type(self).traced += 1
            self._steps[key] = self._trace(engine, named, step)
        self._steps[key](list(named.values()), engine.cache and engine.cache.buffers)

    @staticmethod
    def _trace(engine, named, step):
        def replay(values, buffers):
            own = engine.cache and engine.cache.buffers
            try:
                vars(engine).update(zip(named, values))
                if engine.start is not None:
                    engine.start = engine.pad
                if own is not None:
                    engine.cache.buffers = buffers
                step()
            finally:
                vars(engine).update(named)
                if own is not None:
                    engine.cache.buffers = own

        trace = make_fx(replay, tracing_mode="fake", _allow_non_fake_inputs=True)
        return trace(list(named.values()), engine.cache and engine.cache.buffers)


OPTIONS = [
    {"schedule": Uniform(8), "cache": "none", "temperature": 0.8},
    {"schedule": Threshold(0.02), "cache": "dual", "confidence": "entropy", "refresh": Window(2, 1)},
    {"schedule": Uniform(8), "cache": "prefix", "cfg_scale": 1.0, "remask": dllm_fast.ReMDM(1.0)},
    {"schedule": dllm_fast.FirstHitting(), "cache": "dual", "remask": dllm_fast.P2(1.0)},
    {"schedule": dllm_fast.EntropyBound(4.0), "cache": "dual", "remask": dllm_fast.Verify(0.5)},
    {"schedule": Uniform(8), "cache": "dual", "skip_committed": True, "cfg_scale": 1.0},
    {"schedule": Threshold(0.9), "cache": "prefix", "skip_committed": True, "remask": dllm_fast.Verify(0.5)},
    {"schedule": Uniform(8), "cache": "dual", "skip_committed": True, "refresh": Drift(0.2), "temperature": 0.8},
    {"schedule": Uniform(8), "cache": "prefix", "cache_dtype": "e4m3", "skip_committed": True, "refresh": Window(2, 1)},
]


@pytest.mark.parametrize("name", ["llada-gqa", "modernbert"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_recorded_step_gives_the_same_tokens(name, options, monkeypatch, device):
    """A step reads nothing on the host, and all that changes from step to step and call to call is in its buffers.

    On the definition of predict: PyTorch's path picks out the candidates' rows on a CPU, which is such a reading.
    """
    monkeypatch.setattr(
        "dllm_fast.ops.predict", lambda *args, impl, ranks=None, **rest: reference.predict(*args, **rest)
    )
    check_recorded(name, "torch", options | {"gen_length": 16, "block_length": 8}, monkeypatch, device)


@needs_triton
def test_a_recorded_step_gives_the_same_tokens_on_kernels(monkeypatch, device):
    options = {"schedule": Uniform(2), "cache": "none", "temperature": 0.8, "gen_length": 2, "block_length": 2}
    check_recorded("llada-gqa", "triton", options, monkeypatch, device)


def check_recorded(name, impl, options, monkeypatch, device):
    model = dllm_fast.patch(MAKERS[name]().to(device), impl=impl)
    ids = torch.randint(0, 99, (2, 6), generator=torch.Generator().manual_seed(1)).to(device)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    expected = [dllm_fast.generate(model, ids, mask, **options, seed=seed) for seed in (3, 4, 5)]
    dllm_fast.patch(dllm_fast.unpatch(model), impl=impl)  # on a GPU, engines are kept
    monkeypatch.setattr("dllm_fast.decoding.engine.Graphs", Replays)
    monkeypatch.setattr(Replays, "traced", 0)
    traced = []
    for seed, plain in zip((3, 4, 5), expected):
        got = dllm_fast.generate(model, ids, mask, **options, seed=seed)
        assert torch.equal(got.sequences, plain.sequences) and got.nfe == plain.nfe
        traced.append(Replays.traced)
    assert traced[0] <= traced[1] == traced[2] > 0, "a later call replays what earlier ones recorded"


def test_engines_with_graphs_are_kept_for_the_next_call_of_their_shape(llada, ids, monkeypatch):
    made = []
    init = Engine.__init__

    def counted(self, *args):
        made.append(args[2:])
        init(self, *args)

    monkeypatch.setattr(Engine, "__init__", counted)
    released = []

    class Released(Eager):
        def release(self):
            released.append(self)

    monkeypatch.setattr("dllm_fast.decoding.engine.Graphs", Released)
    monkeypatch.setattr("dllm_fast.decoding.server.records", lambda device, impl: True)
    monkeypatch.setattr("dllm_fast.decoding.pool.total_memory", lambda device: 3 * row / Pool.SHARE)
    dllm_fast.patch(llada)
    options = {"gen_length": 8, "block_length": 8}
    family = bound_family(llada)
    row = 2 * family.layers * 64 * family.kv_heads * family.head_dim * 4  # bytes of a row's cache
    for n in (1, 2, 1, 2, 3, 1):
        dllm_fast.generate(llada, ids[:n], **options)
    # One of 1 row and one of 2 fit together; that of 3 rows leaves no room for either, nor they for it.
    assert [rows for rows, *_ in made] == [1, 2, 3, 1]
    assert len(released) == 3
    pool = bound_pool(llada)
    with pytest.raises(ZeroDivisionError):
        monkeypatch.setattr(Engine, "_decide", lambda *a: 1 / 0)
        dllm_fast.generate(llada, ids[:3], **options)
    assert [key[1][0] for key in pool._engines] == [1]  # what broke half-way is not kept


def test_threads_of_one_model_get_the_tokens_they_get_alone(either, ids):
    dllm_fast.patch(either)
    options = {"gen_length": 16, "block_length": 8, "temperature": 0.5}
    expected = [dllm_fast.generate(either, ids, seed=seed, **options).sequences.cpu() for seed in range(4)]
    found, errors = {}, []

    def work(seed):
        try:
            if seed % 2:
                found[seed] = dllm_fast.generate(either, ids, seed=seed, **options).sequences.cpu()
            else:
                done = dllm_fast.generate_many(either, list(ids), batch_size=2, seed=seed, **options)
                found[seed] = torch.stack([row.sequence for row in done])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for seed in range(4):
        assert torch.equal(found[seed], expected[seed])


@pytest.mark.parametrize("fault", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("at", [0, 1, 5])
def test_a_fault_half_way_leaves_the_model_usable(either, ids, monkeypatch, fault, at):
    dllm_fast.patch(either)
    options = {"gen_length": 16, "block_length": 8, "schedule": Uniform(8)}
    expected = dllm_fast.generate(either, ids, **options).sequences
    logits = either(ids).logits
    # Where no step is recorded it happens between the evaluation and what is kept of it; a replay has no such place.
    name = "take_step" if ids.is_cuda else "_decide"
    whole, calls = getattr(Engine, name), itertools.count()

    def broken(self, *args):
        if next(calls) == at:
            raise fault("half-way")
        whole(self, *args)

    with monkeypatch.context() as patches:
        patches.setattr(Engine, name, broken)
        with pytest.raises(fault, match="half-way"):
            dllm_fast.generate(either, ids, **options)
    assert bound_pool(either).lock.acquire(blocking=False)
    bound_pool(either).lock.release()
    assert torch.equal(dllm_fast.generate(either, ids, **options).sequences, expected)
    assert torch.equal(either(ids).logits, logits) and torch.equal(
        dllm_fast.unpatch(either)(ids).logits, either(ids).logits
    )


def test_an_abandoned_generate_many_holds_nothing(llada, ids):
    dllm_fast.patch(llada)
    options = {"gen_length": 16, "block_length": 8}
    running = dllm_fast.generate_many(llada, list(ids), batch_size=1, **options)
    first = next(running)
    # Another run in between, of the same shape and in the same thread, does not disturb it.
    expected = dllm_fast.generate(llada, ids, **options).sequences.cpu()
    assert torch.equal(first.sequence, expected[0])
    assert torch.equal(next(running).sequence, expected[1])
    del running
    assert torch.equal(dllm_fast.generate(llada, ids, **options).sequences.cpu(), expected)


def test_a_batch_that_does_not_fit_is_refused_with_the_sizes(llada, ids, monkeypatch):
    dllm_fast.patch(llada)
    monkeypatch.setattr(Engine, "__init__", lambda *a: pytest.fail("an engine was made"))
    monkeypatch.setattr("dllm_fast.decoding.memory.available", lambda device: 1 << 20)
    with pytest.raises(
        MemoryError,
        match=r"3 rows of (280|320) positions need 0\.\d GiB on (cpu|cuda:\d) .* 0\.0 GiB are free; about \d",
    ):
        dllm_fast.generate(llada, ids, gen_length=256)
    with pytest.raises(MemoryError, match=r"2 rows of (280|320) positions"):
        dllm_fast.generate_many(llada, list(ids), batch_size=2, gen_length=256)


def test_the_memory_that_is_asked_for_is_what_the_cache_takes(llada):
    from dllm_fast.decoding.memory import available, need
    from dllm_fast.decoding.options import Options

    family = bound_family(dllm_fast.patch(llada))
    options = Options(32, 8, cfg_scale=1.0, refresh=Drift()).resolved(llada, family)
    cache = Engine(family, options, 3, 56, 0, False).cache
    taken = (cache.buffers.numel() + cache.states.numel()) * 4
    rest = need(family, options, 3, 56, 0) - taken
    assert rest == 6 * 56 * (2 * 64 + 3 * 96) * 4 + 3 * 6 * 8 * 101 * 4
    options = Options(32, 8, cfg_scale=1.0, speculate=3).resolved(llada, family)
    drafts = need(family, options, 3, 56, 0) - need(family, replace(options, speculate=None), 3, 56, 0)
    own = Engine(family, options, 3, 56, 0, False).own
    assert drafts == own.buffers.numel() * 4 + 3 * 6 * 8 * 3 * 101 * 4  # the logits of three more states of each row
    assert available(torch.device("cpu")) is None or available(torch.device("cpu")) > 1 << 20


def test_generate_many_orders_reports_and_checks(llada, ids, device):
    dllm_fast.patch(llada)
    ids = ids.cpu()
    prompts = [ids[0, :5], ids[1].tolist(), ids[2, :9]]
    options = {"gen_length": 8, "block_length": 8, "schedule": Uniform(2)}
    rows = [torch.as_tensor(prompt, device=device)[None] for prompt in prompts]
    expected = [dllm_fast.generate(llada, row, **options).sequences[0].cpu() for row in rows]
    seen = []
    run = dllm_fast.generate_many(
        llada, prompts, batch_size=1, ordered=False, progress=lambda *x: seen.append(x), **options
    )
    done = list(run)
    assert [row.index for row in done] == [1, 2, 0] and seen == [(1, 3), (2, 3), (3, 3)]  # the longest first
    assert all(torch.equal(row.sequence, expected[row.index]) for row in done)
    assert list(dllm_fast.generate_many(llada, [], **options)) == []
    whole = list(dllm_fast.generate_many(llada, [ids[0], torch.tensor([1, MASK])], gen_length=0, block_length=8))
    assert torch.equal(whole[0].sequence, ids[0]) and whole[1].sequence[0] == 1 and whole[1].sequence[1] != MASK
    for bad, message in (
        ({"batch_size": 0}, "batch_size=0 is not a positive"),
        ({"streamer": None}, "streamer: not an option of generate_many"),
        ({"prompts": [ids]}, r"prompts\[0\]: shape \(3, 24\) is not \[P\]"),
        ({"prompts": [[1, 2], []]}, r"prompts\[1\]: an empty prompt"),
        ({"prompts": [[1.5]]}, r"prompts\[0\]: dtype torch.float32"),
        ({"prompts": [[101]]}, r"prompts\[0\]: id 101 is outside"),
    ):
        with pytest.raises(ValueError, match=message):
            dllm_fast.generate_many(llada, **{"prompts": prompts, **options, **bad})


RUNS = [
    {"cache": "none"},
    {"cache": "dual", "cfg_scale": 1.0},
    {"cache": "dual", "refresh": Every(2)},
    {"cache": "prefix", "refresh": Window(4, 0), "cfg_scale": 1.0},
    {"cache": "dual", "refresh": Drift(0.02)},
]


@pytest.mark.parametrize("options", RUNS, ids=str)
def test_a_completion_counts_its_own_forwards(llada, ids, options):
    """Those of the prompt alone, wherever its neighbours in the batch are, and however long they take."""
    dllm_fast.patch(llada.double(), impl="torch")
    prompts = [ids[n % 3, : 24 - 2 * n] for n in range(5)]
    options = options | {"gen_length": 24, "block_length": 8}
    alone = dllm_fast.generate(llada, prompts[3][None], schedule=Uniform(9), **options).sequences[0]
    options["eos_id"] = int(alone[len(prompts[3]) + 2])  # this row ends early, and others take its seat
    for schedule in (Uniform(9), Threshold(0.1)):
        expected = [dllm_fast.generate(llada, prompt[None], schedule=schedule, **options).nfe for prompt in prompts]
        done = dllm_fast.generate_many(llada, prompts, batch_size=2, schedule=schedule, **options)
        assert [completion.nfe for completion in done] == expected
    empty, filled = dllm_fast.generate_many(llada, [ids[0], torch.tensor([1, MASK])], gen_length=0, block_length=8)
    assert empty.nfe == 0 and filled.nfe == 1


def test_noise_rows_go_with_the_prompts(llada, ids):
    dllm_fast.patch(llada)
    options = {"gen_length": 16, "block_length": 8, "schedule": Uniform(4), "temperature": 1.0, "seed": 2}
    expected = dllm_fast.generate(llada, ids, **options).sequences.cpu()
    for order in ([0, 1, 2], [2, 0, 1], [1]):
        done = dllm_fast.generate_many(llada, ids[order], batch_size=2, noise_rows=order, **options)
        assert [(row.index, row.sequence.tolist()) for row in done] == list(enumerate(expected[order].tolist()))
    other, alike, last = dllm_fast.generate_many(llada, ids[[0, 0, 0]], noise_rows=iter([1, 0, 2**32 - 1]), **options)
    assert torch.equal(alike.sequence, expected[0])
    assert len({tuple(row.sequence.tolist()) for row in (other, alike, last)}) == 3
    for rows, message in (
        ([0, 1], "noise_rows: 2 for 3 prompts"),
        ([0, 1, -1], r"noise_rows\[2\]=-1 is not a whole number from 0 to 2\^32 - 1"),
        ([2**32, 1, 0], r"noise_rows\[0\]=4294967296 is not"),
        ([0, 1.0, 2], r"noise_rows\[1\]=1.0 is not"),
    ):
        with pytest.raises(ValueError, match=message):
            dllm_fast.generate_many(llada, list(ids), noise_rows=rows, **options)
