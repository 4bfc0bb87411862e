"""d3LLM's delayed cache by hand, and pipelines in an engine as on a GPU: rounded-up slots and steps, empty seats."""

import random

import others
import pytest
import torch
from recording import Eager
from rows import batched, seated
from test_pipeline import CACHES, draw
from tiny import EOS, MAKERS

import dllm_fast
from dllm_fast import D2F, MultiBlock, Threshold
from dllm_fast.decoding import server as server_module


def test_a_delayed_cache_by_hand():
    """Four blocks, each filled by one step: prompt, 9; block, 4."""
    model = dllm_fast.patch(MAKERS["llada"]())
    ids = torch.randint(0, EOS, (1, 9), generator=torch.Generator().manual_seed(1))
    options = {"gen_length": 16, "block_length": 4, "schedule": Threshold(1e-9), "cache": "prefix"}
    for delay, refresh, positions, full in (
        # The second step finds the first block filled, and waits. The third caches it, the fourth the second block.
        (1, None, [25, 25, 16, 12], 2),
        # Each step but the first caches the block before.
        (0, None, [25, 16, 12, 8], 1),
        (0, 2, [25, 16, 12, 8], 1),
        # The second step caches the prompt, the third waits for the first block, which is filled since then.
        (2, None, [25, 25, 25, 16], 3),
        (3, None, [25, 25, 25, 25], 4),
    ):
        out = dllm_fast.generate(model, ids, pipeline=MultiBlock(1.0, None, delay, refresh), **options)
        assert (out.nfe, out.positions, out.nfe_full) == (4, sum(positions), full)
    slow = options | {"schedule": Threshold(1.0), "gen_length": 4}
    for refresh, full in ((None, 1), (1, 4), (2, 3), (3, 2), (4, 2)):
        assert dllm_fast.generate(model, ids, pipeline=MultiBlock(refresh=refresh), **slow).nfe_full == full
    none = dllm_fast.generate(model, ids, pipeline=MultiBlock(0.25), **options | {"cache": "none"})
    out = dllm_fast.generate(model, ids, pipeline=MultiBlock(0.25, delay=10_000), **options)
    assert torch.equal(out.sequences, none.sequences) and out.positions == none.positions


def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr("dllm_fast.decoding.engine.Graphs", Eager)
    monkeypatch.setattr(server_module, "records", lambda device, impl: True)
    monkeypatch.setattr(server_module, "STEP", 8)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["llada-gqa", "qwen2-shifted"])
@pytest.mark.parametrize("seed", [pytest.param(n, marks=() if n < 2 else pytest.mark.long) for n in range(9)])
def test_recorded_steps_and_empty_seats_change_nothing(name, cache, seed, monkeypatch):
    request = draw(random.Random(1000 * seed + CACHES.index(cache)), cache)
    model = others.made(name).double()
    with dllm_fast.patched(model, "torch"):
        expected = batched(model, request)
    as_on_a_gpu(monkeypatch)
    with dllm_fast.patched(model, "torch"):
        assert batched(model, request) == expected, str(request)
        assert seated(model, request, 2) == expected[0]


def test_an_empty_seat_has_no_block_to_add_one_after(monkeypatch):
    """In a window of one block, beside rows that go on."""
    model, prompts = MAKERS["llada"]().double(), [[1, 2, 3], [4] * 9, [5] * 5]
    options = {"gen_length": 16, "block_length": 4, "schedule": Threshold(0.12), "pipeline": D2F(0.1, 0.5, 1)}
    with dllm_fast.patched(model, "torch"):
        expected = [one.sequence.tolist() for one in dllm_fast.generate_many(model, prompts, **options)]
    as_on_a_gpu(monkeypatch)
    with dllm_fast.patched(model, "torch"):
        assert [one.sequence.tolist() for one in dllm_fast.generate_many(model, prompts, **options)] == expected
