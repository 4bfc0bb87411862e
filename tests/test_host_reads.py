"""When the host waits for the device: between blocks of a schedule with counts, only if it needs a value."""

import pytest
import torch
from tiny import EOS, MASK, make_llada
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import dllm_fast
from dllm_fast import (
    D2F,
    Ancestral,
    Drift,
    Every,
    Factor,
    FirstHitting,
    MultiBlock,
    Pyramid,
    ReMDM,
    Threshold,
    Uniform,
    Window,
)
from dllm_fast.decoding.device import upload
from dllm_fast.decoding.engine import Engine
from dllm_fast.decoding.pipelined import Pipelined
from dllm_fast.kernels import reference

READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero", "unique")


class Device(TorchFunctionMode):
    """Simulates a device on the CPU, for an engine's tensors and whatever is made from them. Logs reads of them."""

    def __init__(self):
        super().__init__()
        self.log, self._storages = [], {}

    def put(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self._storages[storage._cdata] = storage  # kept alive, or another tensor could reuse its address

    def _holds(self, x: object) -> bool:
        return isinstance(x, torch.Tensor) and x.untyped_storage()._cdata in self._storages

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_it = any(map(self._holds, given))
        name = func.__name__
        moved = name == "to" and any(isinstance(x, str | torch.device) for x in tree_leaves((args[1:], kwargs)))
        # Selecting elements by a mask needs their number on the host.
        picked = name in ("__getitem__", "__setitem__") and any(
            x.dtype == torch.bool and self._holds(x) for x in tree_leaves(args[1]) if isinstance(x, torch.Tensor)
        )
        read = on_it and (name in READS or moved or picked)
        if read:
            self.log.append(name)
        out = func(*args, **kwargs)
        if on_it and not read:
            for x in tree_leaves(out):
                if isinstance(x, torch.Tensor):
                    self.put(x)
        return out


ON_HOST = ("lengths", "tally", "idle", "near", "ends", "reached")  # an engine's tensors that are not the device's


@pytest.fixture
def log(monkeypatch):
    """A run's events in order: "block" when a block begins, "step" for each step, and reads of the device."""
    # On a CPU, PyTorch's predict selects candidates by a mask, which it does not do on a GPU.
    monkeypatch.setattr(
        "dllm_fast.ops.predict", lambda *args, impl, ranks=None, **rest: reference.predict(*args, **rest)
    )
    device, block = Device(), Engine.block

    def making(init):
        def made(self, *args):
            init(self, *args)
            for name, x in vars(self).items():
                if isinstance(x, torch.Tensor) and name not in ON_HOST:
                    device.put(x)
            if self.cache is not None:
                device.put(self.cache.buffers)

        return made

    def begun(self, *args):
        device.log.append("block")
        block(self, *args)

    def deciding(decide):
        def decided(self, *args, **rest):
            device.log.append("step")
            decide(self, *args, **rest)

        return decided

    for kind in (Engine, Pipelined):
        monkeypatch.setattr(kind, "__init__", making(kind.__init__))
        monkeypatch.setattr(kind, "_decide", deciding(kind._decide))
    monkeypatch.setattr(Engine, "block", begun)
    with device:
        yield device.log


def run(ids, mask=None, **options):
    model = dllm_fast.patch(make_llada(), impl="torch")
    return dllm_fast.generate(model, ids, mask, **{"gen_length": 24, "block_length": 8, "seed": 5, **options})


def test_uploads_to_a_gpu_do_not_wait():
    """A stand-in for tensors on the host, copied from pinned memory."""

    class Values:
        calls = []

        def pin_memory(self):
            self.calls.append("pinned")
            return self

        def to(self, device, non_blocking):
            self.calls.append((device, non_blocking))

    upload(Values(), torch.device("cuda:1"))
    assert Values.calls == ["pinned", (torch.device("cuda:1"), True)]


PLANNED = [
    {"schedule": Uniform(12)},
    {"schedule": Uniform(12), "cache": "none", "temperature": 0.7},
    {"schedule": Uniform(12), "temperature": 0.7, "top_k": 9, "top_p": 0.8},
    {"schedule": Uniform(12), "temperature": 0.7, "top_p": 0.8, "defer_tokens": [EOS]},
    {"schedule": Pyramid(2), "cache": "prefix", "refresh": Window(3, 2)},
    {"schedule": FirstHitting(), "refresh": Every(2), "cfg_scale": 0.5},
    {"schedule": Ancestral(12), "remask": ReMDM(0.5)},
]


@pytest.mark.parametrize("options", PLANNED, ids=str)
def test_a_schedule_with_counts_reads_nothing_until_its_rows_are_done(log, ids, padded, options):
    run(ids, padded, **options)
    assert log.count("block") == 3 and log.count("step") >= 3
    assert log[log.index("block") :].count("to") == 1 and log[-1] == "to"
    assert set(log[log.index("block") :]) == {"block", "step", "to"}


def test_a_row_that_is_done_first_is_read_when_it_is(log, ids):
    prompts = [torch.cat((torch.full((8,), MASK), ids[0])), ids[1]]  # four blocks and three
    model = dllm_fast.patch(make_llada(), impl="torch")
    options = {"gen_length": 24, "block_length": 8, "schedule": Pyramid(1)}
    list(dllm_fast.generate_many(model, prompts, batch_size=2, **options))
    assert [entry for entry in log if entry != "step"] == ["block"] * 3 + ["to", "block", "to"]


def test_an_end_of_text_and_a_streamer_are_read_for_after_each_block(log, ids):
    class Streamer:
        def put(self, value):
            log.append("put")

        def end(self):
            pass

    run(ids, schedule=Uniform(6), eos_id=EOS)
    steps = [entry for entry in log if entry != "step"]
    assert steps[:4] == ["block", "to"] * 2
    log.clear()
    run(ids[:1], schedule=Uniform(6), streamer=Streamer())
    assert [entry for entry in log if entry != "step"] == ["put"] + ["block", "to", "put"] * 3


@pytest.mark.parametrize("schedule", [Threshold(0.02), Factor(1.5)], ids=str)
def test_a_rule_reads_once_a_step(log, ids, schedule):
    run(ids, schedule=schedule)
    assert log.count("to") == log.count("step") + 1, "and the sequences, once"


@pytest.mark.parametrize(
    "pipeline, cache", [(D2F(0.2, 0.5), "dual"), (MultiBlock(0.2, 2), "dual"), (MultiBlock(0.2, 2, 2, 3), "prefix")]
)
def test_a_pipeline_reads_once_a_step(log, ids, padded, pipeline, cache):
    run(ids[:1], schedule=Threshold(0.05), pipeline=pipeline, cache=cache)
    assert log.count("to") == log.count("step") + 1, "and the sequence, once"
    assert set(log) == {"step", "to"}
    log.clear()
    run(ids, padded, schedule=Threshold(0.05), pipeline=pipeline, cache=cache)
    ends = log.count("to") - log.count("step")
    assert set(log) == {"step", "to"} and 1 <= ends <= len(ids), "and the sequences, when any of them is done"


def test_the_device_is_a_good_stand_in(log, ids):
    """A drift's decision is read in every layer-wise refresh."""
    run(ids, schedule=Uniform(6), refresh=Drift(0.1))
    assert log.count("cpu") == 2
    log.clear()
    model = dllm_fast.patch(make_llada(), impl="torch")
    engine = []
    block = Engine.block

    def kept(self, *args):
        engine.append(self)
        block(self, *args)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(Engine, "block", kept)
        dllm_fast.generate(model, ids, gen_length=8, block_length=8)
    log.clear()
    count = engine[0].quota
    bool((count + 1).any()), (count > 0).nonzero(), count[count > 0], int(engine[0].seed[0]), (2 * count).tolist()
    assert log == ["__bool__", "nonzero", "__getitem__", "__int__", "tolist"]
    log.clear()
    torch.ones(3).tolist(), count + torch.ones(3)
    assert log == []
