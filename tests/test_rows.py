"""A row's tokens, evaluations, keys, values and hidden states are its own, whatever its batch.

Models are fp64 where PyTorch runs them: there batches of other sizes round alike, and no tie between candidates is
broken by its neighbours. In fp32 the compiled extension sums each row in one order, however many there are.
"""

import random

import pytest
import torch
from rows import alone, draw_request, seated, together
from tiny import EOS, MASK, make_llada, make_modernbert

import dllm_fast
from dllm_fast import Ancestral, Drift, Every, FirstHitting, Threshold, Uniform, Verify, Window
from dllm_fast.engine import Engine

FAMILIES = {
    "llada": make_llada,
    "llada-gqa": lambda seed: make_llada(seed, n_kv_heads=2),
    "modernbert": make_modernbert,
}


def make(name: str, seed: int, impl: str):
    model = FAMILIES[name](seed)
    if impl == "torch":
        model = model.double()
    try:
        return dllm_fast.patch(model, impl=impl)
    except ValueError as error:
        if impl == "cpp":
            pytest.skip(str(error))
        raise


def check(impl: str, seed: int, requests: int) -> None:
    rng = random.Random(seed)
    model = make(rng.choice(sorted(FAMILIES)), seed, impl)
    for _ in range(requests):
        request = draw_request(rng)
        expected = alone(model, request)
        assert together(model, request) == expected, str(request)
        for seats in (2, 3):
            assert seated(model, request, seats) == expected, f"{seats} seats: {request}"


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_a_row_alone_in_a_batch_and_through_seats(impl, seed):
    check(impl, seed, 2)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 148))
@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_many_rows_alone_in_a_batch_and_through_seats(impl, seed):
    check(impl, seed, 12)


def test_rows_on_the_kernels():
    """In Triton's interpreter: a row that waits, a row with padding, and a window at its edge."""
    model = make("llada", 0, "triton")
    prompts = [torch.tensor([5, MASK, 7, 8, 9, 3]), torch.tensor([MASK, MASK, MASK, MASK])]
    options = {"gen_length": 4, "block_length": 4, "schedule": FirstHitting(), "refresh": Window(4, 0)}
    many = list(dllm_fast.generate_many(model, prompts, batch_size=2, seed=3, **options))
    for row, prompt in enumerate(prompts):
        (own,) = dllm_fast.generate_many(model, [prompt], noise_rows=[row], seed=3, **options)
        assert torch.equal(own.sequence, many[row].sequence) and own.nfe == many[row].nfe


# What stays of a row


class Watched(Engine):
    """Keeps what each row has in the cache after each of its blocks."""

    def block(self, *args):
        super().block(*args)
        for b in range(self.rows):
            own = slice(self.slots - self.lengths[b], self.slots)
            passes = [b + p * self.rows for p in range(self.passes)]
            kept = [self.cache.buffers[:, :, passes, own].clone()]
            if self.cache.states is not None:
                kept.append(self.cache.states[:, passes, own].clone())
            self.seen.setdefault(int(self.row[b]), []).append((kept, self.evaluations[b]))


WAITING = {
    "none left": FirstHitting(),
    "as it goes": Threshold(1.0),
    "other steps": Ancestral(64),
    "shares": Uniform(12),
}
REFRESHES = ["block", Every(2), Window(0, 0), Window(3, 20), Window(8, 8), Window(40, 0), Drift(0.0), Drift(0.3)]


@pytest.mark.parametrize("schedule", WAITING.values(), ids=WAITING)
@pytest.mark.parametrize("cache", ["dual", "prefix"])
@pytest.mark.parametrize("name", ["llada", "modernbert"])
def test_a_row_that_waits_leaves_no_trace(name, cache, schedule, monkeypatch):
    """Keys, values and hidden states after each block, and the evaluations, are those of the row alone.

    The rows have 8, 3 and 1 positions to fill in their first block and as many blocks, so that they wait for others
    under any schedule; the first begins with [MASK]s.
    """
    model = make(name, 0, "torch")
    monkeypatch.setattr("dllm_fast.generate.Engine", Watched)
    words = torch.randint(0, EOS, (3, 20), generator=torch.Generator().manual_seed(1))
    prompts = [torch.cat((torch.full((8,), MASK), words[0])), words[1][:16], words[2][:9]]
    prompts[1][[2, 4, 7]], prompts[2][5] = MASK, MASK
    for refresh in REFRESHES:
        for extra in ({}, {"cfg_scale": 1.0}, {"remask": Verify(0.3)}):
            options = {"gen_length": 16, "block_length": 8, "schedule": schedule, "cache": cache, "refresh": refresh}
            run = {"temperature": 0.5, "seed": 4, **options, **extra}
            Watched.seen = found = {}
            list(dllm_fast.generate_many(model, prompts, batch_size=3, **run))
            Watched.seen = expected = {}
            for row, prompt in enumerate(prompts):
                list(dllm_fast.generate_many(model, [prompt], noise_rows=[row], **run))
            assert len({count for _, count in (blocks[0] for blocks in expected.values())}) > 1, "no row waits"
            for row, blocks in expected.items():
                assert [count for _, count in found[row]] == [count for _, count in blocks]
                for (kept, _), (own, _) in zip(found[row], blocks, strict=True):
                    for mine, its in zip(kept, own, strict=True):
                        torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-9)


def test_positions_of_a_batch_are_those_of_its_rows_alone():
    model = make("llada", 0, "torch")
    words = torch.randint(0, EOS, (2, 20), generator=torch.Generator().manual_seed(1))
    words[0, :3] = MASK
    mask = torch.ones_like(words)
    mask[1, :13] = 0
    for cache in ("none", "prefix", "dual"):
        for refresh in REFRESHES[: 1 if cache == "none" else None]:
            options = {"gen_length": 16, "block_length": 8, "schedule": Threshold(0.1), "cache": cache}
            options["refresh"] = refresh
            rows = [dllm_fast.generate(model, ids[own.bool()][None], **options) for ids, own in zip(words, mask)]
            batch = dllm_fast.generate(model, words, mask, **options)
            assert batch.positions == pytest.approx(sum(row.positions for row in rows), abs=1), str(options)
            assert batch.row_nfe == [row.nfe for row in rows] == [row.row_nfe[0] for row in rows]
