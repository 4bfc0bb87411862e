"""`reference_shares`: prediction from shares of the vocabulary is prediction from all of it, in fp64 to rounding."""

import pytest
import torch

from dllm_fast.kernels import reference, reference_shares
from dllm_fast.kernels.checks import CONFIDENCES

ROWS, VOCAB, MASK = 7, 60, 41


class Played:
    """One of several processes that are played one after the other, twice: in the second round each has the messages
    of all, which the first round left in ``messages``."""

    def __init__(self, rank: int, size: int, ids: int, messages: dict):
        self.rank, self.size, self.ids, self.first, self.messages = rank, size, ids, rank * ids, messages

    def exchange(self, part, best):
        self.messages[self.rank] = part, best
        of_all = [self.messages.get(rank, (part, best)) for rank in range(self.size)]
        return torch.cat([x for x, _ in of_all], -1), torch.cat([x for _, x in of_all], -1)


def played(size: int, ids: int, call) -> list:
    """``call(ranks)`` on each process."""
    processes = [Played(rank, size, ids, messages) for messages in [{}] for rank in range(size)]
    for ranks in processes:
        call(ranks)
    return [call(ranks) for ranks in processes]


def options(confidence, temperature=0.0, **more):
    row, position = torch.arange(ROWS) % 3, torch.arange(ROWS) * 5
    return {
        "mask_id": MASK, "confidence": confidence, "temperature": temperature, "seed": 11, "step": 2, "row": row,
        "position": position, **more,
    }  # fmt: skip


def compare(logits, size, **given):
    ids = logits.shape[1] // size
    expected = reference.select(logits, **given)
    for found in played(
        size, ids, lambda ranks: reference_shares.select(logits[:, ranks.first :][:, :ids], ranks, **given)
    ):
        assert torch.equal(found[0], expected[0])
        for ours, truth in zip(found[1:], expected[1:], strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-13, equal_nan=True)


def normal(scale=3.0):
    return torch.randn(ROWS, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * scale


@pytest.mark.parametrize("size", [1, 2, 3, 5, 30])
@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_it_is_the_definition(confidence, size):
    for temperature in (0.0, 0.8):
        for ids in ({}, {"banned": (0, 33), "deferred": (33, 34, 59)}, {"deferred": (MASK, 2)}):
            compare(normal(), size, **options(confidence, temperature, **ids))


@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_a_seed_for_each_row(confidence):
    given, seeds = options(confidence, 0.8), torch.arange(ROWS) % 3 << 31
    compare(normal(), 3, **given | {"seed": seeds})
    together = reference.select(normal(), **given | {"seed": seeds})
    for n, seed in enumerate(seeds.tolist()):
        own = given | {"seed": seed, "row": given["row"][n : n + 1], "position": given["position"][n : n + 1]}
        for mine, found in zip(reference.select(normal()[n : n + 1], **own), together, strict=True):
            assert torch.equal(mine[0], found[n])


@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_shares_of_which_nothing_may_be_chosen(confidence):
    """A share that is banned, one that is deferred, and one of [MASK] and banned ids."""
    banned, deferred = tuple(range(20, 30)), tuple(range(50, 60))
    for temperature in (0.0, 0.8):
        compare(normal(), 6, **options(confidence, temperature, banned=banned, deferred=deferred))
        rest = tuple(i for i in range(40, 50) if i != MASK)
        compare(normal(), 6, **options(confidence, temperature, banned=banned + rest, deferred=deferred))
        compare(normal(), 30, **options(confidence, temperature, banned=(40,)))


@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_huge_logits_and_ties(confidence):
    compare(normal(3e4), 3, **options(confidence))
    tied = normal()
    tied[:, [12, 25, 39, 58]] = 50.0  # in each share, the lowest id wins
    compare(tied, 3, **options(confidence))
    compare(torch.zeros(ROWS, VOCAB, dtype=torch.float64), 4, **options(confidence))


def test_nan_and_infinite_logits_are_seen():
    logits = normal()
    logits[1, 7], logits[2, 55], logits[3, 9] = float("nan"), float("nan"), float("inf")
    for confidence in CONFIDENCES:
        for token, _, lse in played(
            2, 30, lambda r, c=confidence: reference_shares.select(logits[:, r.first :][:, :30], r, **options(c))
        ):
            assert (lse - lse == 0).tolist() == [True, False, False, False, True, True, True]
            assert (token >= 0).all() and (token < VOCAB).all()


@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_condensing_before_changes_nothing(confidence):
    given = options(confidence, 0.5)
    parts = [reference_shares.reduce(normal()[:, first : first + 10], first, **given) for first in range(0, VOCAB, 10)]
    rest = {name: x for name, x in given.items() if name not in ("mask_id", "temperature")}
    part, best = (torch.cat(x, -1) for x in zip(*parts, strict=True))
    halves = [reference_shares.condense(part[..., i : i + 3], best[:, i : i + 3], confidence) for i in (0, 3)]
    condensed = (torch.cat(x, -1) for x in zip(*halves, strict=True))
    for one, other in zip(
        reference_shares.combine(part, best, **rest), reference_shares.combine(*condensed, **rest), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-14)
