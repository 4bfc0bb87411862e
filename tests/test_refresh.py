"""Refresh policies: extreme ones give the exact cache, their forwards are counted, and rows stay independent."""

import functools

import pytest
import torch
from tiny import MASK

import dllm_fast
from dllm_fast import Drift, Every, Threshold, Uniform, Window

GEN, BLOCK, STEPS = 32, 8, 16  # 4 blocks of 4 steps


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def run(either, ids):
    dllm_fast.patch(either)
    options = {"gen_length": GEN, "block_length": BLOCK, "schedule": Uniform(STEPS)}
    return functools.partial(dllm_fast.generate, either, ids, **options)


@pytest.mark.parametrize("cache", ["dual", "prefix"])
@pytest.mark.parametrize("refresh", [Every(1), Window(56, 56), Drift(0.0)], ids=str)
def test_a_policy_that_computes_everything_is_a_full_refresh(run, cache, refresh):
    expected = run(cache=cache)
    out = run(cache=cache, refresh=refresh)
    assert torch.equal(out.sequences, expected.sequences)
    assert out.positions >= expected.positions


@pytest.mark.parametrize("cache", ["dual", "prefix"])
def test_a_policy_that_never_refreshes_is_the_window_it_begins_with(run, cache):
    window = run(cache=cache, refresh=Window(BLOCK, 0))
    for refresh in (Every(100), Drift(float("inf"))):
        out = run(cache=cache, refresh=refresh)
        assert torch.equal(out.sequences, window.sequences)
        assert (out.nfe_full, out.nfe_block, out.positions) == (1, 15, window.positions)


def test_positions_are_those_that_were_evaluated(run):
    """Three rows of 24 + 32; by hand."""
    steps = 3 * BLOCK * 3  # rows, block, later steps of a block
    full, first, beside = 3 * 56, 3 * BLOCK, 3 * 2 * BLOCK
    assert run(cache="none").positions == STEPS * full
    assert run(cache="dual").positions == 4 * (full + steps)
    assert run(cache="dual", cfg_scale=1.0).positions == 2 * 4 * (full + steps)
    assert run(cache="dual", refresh=Every(2)).positions == 2 * (full + beside) + 4 * steps
    assert run(cache="dual", refresh=Window(0)).positions == full + 3 * first + 4 * steps
    assert run(cache="dual", refresh=Window(4, 100)).positions == full + 3 * full + 4 * steps
    suffixes = sum(3 * 3 * (32 - BLOCK * block) for block in range(4))
    assert run(cache="prefix").positions == 4 * full + suffixes
    assert (
        run(cache="prefix", refresh=Window(4)).positions == full + sum(3 * (36 - 8 * b) for b in (1, 2, 3)) + suffixes
    )


def test_drift_computes_more_the_lower_its_bound(run):
    found = [run(refresh=Drift(tau)).positions for tau in (0.0, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 1e9)]
    assert found == sorted(found, reverse=True) and len(set(found)) > 2


@torch.no_grad()
def test_drift_recomputes_from_the_first_layer_that_moved(llada, ids):
    """If nothing has changed, recomputing from layer 1 with kept hidden states changes nothing."""
    from dllm_fast.families.cache import BlockCache
    from dllm_fast.families.rows import Packed
    from dllm_fast.patch import bound_family

    family = bound_family(dllm_fast.patch(llada))
    cache = BlockCache(family.layers, 3, 24, family.kv_heads, family.head_dim, torch.float32, ids.device, width=64)
    row, slot = (x.flatten().to(ids.device) for x in torch.meshgrid(torch.arange(3), torch.arange(24), indexing="ij"))
    every = {"cache": cache, "slot": slot, "packed": Packed(row, 24 * torch.arange(4, device=ids.device), 24)}
    whole = family.hidden(ids.view(-1, 1), **every)
    before = cache.buffers.clone()
    cache.buffers[1:] = 0
    again = family.hidden(ids.view(-1, 1), **every, from_layer=1)
    assert torch.equal(whole, again) and torch.equal(cache.buffers, before)


@pytest.mark.parametrize("refresh", ["block", Every(2), Window(8, 8), Drift(0.7)], ids=str)
@pytest.mark.parametrize("cache", ["dual", "prefix"])
def test_rows_of_other_lengths_and_phases_change_nothing(either, ids, padded, refresh, cache):
    """Row by row alone, in a padded batch, and through two seats with rows at different blocks."""
    dllm_fast.patch(either.double(), impl="torch")  # where no tie is broken by the size of the batch
    options = {"gen_length": 24, "block_length": 8, "schedule": Threshold(0.05), "cache": cache, "refresh": refresh}
    prompts = [row[mask.bool()] for row, mask in zip(ids, padded)]
    prompts[1] = torch.cat((prompts[1].new_full((3,), MASK), prompts[1]))  # one block more than the others
    alone = [dllm_fast.generate(either, prompt[None], **options).sequences[0] for prompt in prompts]
    many = list(dllm_fast.generate_many(either, prompts, batch_size=2, **options))
    assert [done.index for done in many] == [0, 1, 2]
    for done, expected in zip(many, alone):
        assert torch.equal(done.sequence, expected.cpu())
    width = max(map(len, prompts))
    batch = torch.stack([torch.cat((p.new_zeros(width - len(p)), p)) for p in prompts])
    mask = torch.stack([torch.arange(width) >= width - len(p) for p in prompts]).long().to(ids.device)
    together = dllm_fast.generate(either, batch, mask, **options).sequences
    for row, prompt, expected in zip(together, prompts, alone):
        assert torch.equal(row[width - len(prompt) :], expected)
