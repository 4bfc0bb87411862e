"""The candidates that a schedule keeps, and the tokens that are written, against the definition."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from dllm_fast.kernels import commit as kernel
from dllm_fast.kernels import reference
from dllm_fast.kernels.commit import commit

SHAPES = {"1x1": (1, 1), "3x11": (3, 11), "2x32": (2, 32), "4x33": (4, 33), "1x600": (1, 600), "1x1024": (1, 1024)}


@pytest.fixture
def poison(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(1))  # for a bool: everything chosen


def problem(batch, positions, device, seed=0):
    """Few distinct confidences, so that many are tied; slots leave room on both sides."""
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.randint(0, 12, (batch, positions), generator=generator) / 12
    candidate = torch.rand(batch, positions, generator=generator) < 0.6
    token = torch.randint(100, 999, (batch, positions), generator=generator)
    slot = torch.randint(1, 9, (batch,), generator=generator)
    sequence = torch.randint(0, 99, (batch, positions + 10), generator=generator)
    return [x.to(device) for x in (sequence, token, confidence, candidate, slot)]


def as_entropy(arguments, rule):
    """For ``bound``: confidences that are negative entropies in eighths, whose sums are exact in any order."""
    sequence, token, confidence, *rest = arguments
    return sequence, token, ((confidence - 1) * 12 / 8 if "bound" in rule else confidence), *rest


def rules(batch, positions, device):
    count = torch.arange(batch, device=device) * 3 % (positions + 2)
    yield from ({"count": count}, {"count": count.int() + 2}, {"count": count - 2}, {"count": count + (1 << 40)})
    yield from ({"threshold": x} for x in (-1.0, 0.5, 11 / 12, 2.0))
    yield from ({"threshold": x, "least": n} for x in (0.5, 11 / 12) for n in (2, 5, positions + 1))
    yield from ({"factor": x} for x in (0.3, 1.0, 1.5, 100.0))
    yield from ({"bound": x} for x in (-1.0, 0.0, 2.25, 1000.0))


def assert_matches(sequence, *arguments, **rule):
    ours, theirs = sequence.clone(), sequence.clone()
    chosen, expected = commit(ours, *arguments, **rule), reference.commit(theirs, *arguments, **rule)
    assert chosen.dtype == torch.bool
    assert torch.equal(chosen, expected), rule
    assert torch.equal(ours, theirs), rule
    return chosen


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_matches_definition(shape, device, poison):
    arguments = problem(*shape, device)
    for rule in list(rules(*shape, device))[:: 1 if shape[1] < 100 else 3]:  # count, threshold, factor, bound
        assert_matches(*as_entropy(arguments, rule), **rule)


def test_few_candidates(device, poison):
    sequence, token, confidence, _, slot = problem(4, 9, device)
    candidate = torch.zeros(4, 9, dtype=torch.bool, device=device)
    candidate[1, 8] = candidate[2, 0] = candidate[3] = True
    for rule in rules(4, 9, device):
        chosen = assert_matches(*as_entropy((sequence, token, confidence, candidate, slot), rule), **rule)
        kept = rule["count"] > 0 if "count" in rule else torch.ones(4, dtype=torch.bool, device=device)
        assert chosen.any(1).tolist() == (candidate.any(1) & kept).tolist()


def test_ties_go_to_the_lowest_position(device):
    sequence, token, confidence, candidate, slot = problem(2, 40, device)
    confidence.fill_(0.25)
    chosen = commit(sequence, token, confidence, candidate, slot, count=torch.tensor([3, 7], device=device))
    for row, k in ((0, 3), (1, 7)):
        assert chosen[row].nonzero()[:, 0].tolist() == candidate[row].nonzero()[:k, 0].tolist()


def test_what_is_not_finite_goes_last_and_one_is_always_kept(device, poison):
    sequence, token, confidence, candidate, slot = problem(4, 6, device)
    candidate.fill_(True)
    candidate[3, :2] = False
    nan, inf = float("nan"), float("inf")
    confidence[:] = torch.tensor([[nan, -inf, inf, -0.5, nan, -1], [nan] * 6, [inf] + [nan] * 4 + [-inf], [-inf] * 6])
    for k, expected in (
        (0, [[], [], [], []]),
        (1, [[3], [0], [0], [2]]),
        (2, [[3, 5], [0, 1], [0, 1], [2, 3]]),
        (4, [[0, 1, 3, 5], [0, 1, 2, 3], [0, 1, 2, 3], [2, 3, 4, 5]]),
    ):
        count = torch.full((4,), k, device=device)
        chosen = assert_matches(sequence, token, confidence, candidate, slot, count=count)
        assert [row.nonzero()[:, 0].tolist() for row in chosen] == expected
    for rule in ({"threshold": -0.7}, {"factor": 3.1}, {"bound": 0.4}):
        chosen = assert_matches(sequence, token, confidence, candidate, slot, **rule)
        assert [row.nonzero()[:, 0].tolist() for row in chosen] == [[3], [0], [0], [2]]
    # An entropy counts only if another candidate follows it, and none follows an infinite one.
    for bound, first in ((0.5, [3, 5]), (1.5, [0, 3, 5]), (1e30, [0, 3, 5])):
        chosen = assert_matches(sequence, token, confidence, candidate, slot, bound=bound)
        assert [row.nonzero()[:, 0].tolist() for row in chosen] == [first, [0], [0], [2]]


def test_a_view_of_a_longer_sequence(device):
    sequence, *arguments = problem(3, 11, device)
    buffer = torch.full((3, 64), -7, device=device)
    view = buffer[:, 20 : 20 + sequence.shape[1]]
    view.copy_(sequence)
    commit(view, *arguments, threshold=0.5)
    reference.commit(sequence, *arguments, threshold=0.5)
    assert torch.equal(view, sequence)
    assert (buffer[:, :20] == -7).all() and (buffer[:, 20 + sequence.shape[1] :] == -7).all()


def test_nothing_is_written_outside(device):
    buffer = torch.full((2, 60), -7, device=device)
    _, token, confidence, candidate, _ = problem(2, 8, device)
    candidate.fill_(True)
    commit(buffer[:, 20:40], token, confidence, candidate, torch.tensor([-3, 15], device=device), threshold=-1.0)
    assert buffer[0, 20:25].tolist() == token[0, 3:].tolist() and buffer[1, 35:40].tolist() == token[1, :5].tolist()
    assert (buffer == -7).sum() == 2 * 60 - 10


def test_nothing_to_do(device):
    for batch, positions in ((0, 4), (3, 0)):
        sequence, *arguments = problem(batch, positions, device)
        assert commit(sequence, *arguments, threshold=0.5).shape == (batch, positions)


@hypothesis.settings(max_examples=15, deadline=None, derandomize=True)
@hypothesis.given(batch=st.integers(1, 3), positions=st.integers(1, 40), seed=st.integers(0, 999))
def test_any_shape(batch, positions, seed):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arguments = problem(batch, positions, device, seed)
    spoilt = [float("nan"), float("inf"), -float("inf")] if seed % 2 else []
    for i, value in enumerate(spoilt):
        arguments[2].view(-1)[i :: 5 + i] = value
    for rule in (
        {"count": arguments[-1] // 2},
        {"threshold": (seed % 12) / 12},
        {"factor": 0.1 + seed / 300},
        {"bound": (seed - 99) / 24},
    ):
        assert_matches(*as_entropy(arguments, rule), **rule)


def test_bad_arguments(device):
    sequence, token, confidence, candidate, slot = problem(2, 5, device)
    good = {"sequence": sequence, "token": token, "confidence": confidence, "candidate": candidate, "slot": slot}
    wide = kernel.MAX_POSITIONS + 1
    for message, change in {
        "exactly one of count, threshold, factor, bound must be given, not \\[\\]": {"threshold": None},
        "exactly one of .*'threshold', 'bound'": {"bound": 0.0},
        "exactly one of .*'threshold', 'factor'": {"factor": 1.0},
        "sequence is torch.int32": {"sequence": sequence.int()},
        r"sequence is .* strides \(1, 2\)": {"sequence": sequence.T.contiguous().T},
        r"sequence is torch.int64 \[1, 15\]": {"sequence": sequence[:1]},
        f"T <= {wide - 1}": {"token": torch.zeros(2, wide, dtype=torch.int64, device=device)},
        "token is torch.int32": {"token": token.int()},
        "confidence is torch.float64": {"confidence": confidence.double()},
        "candidate is torch.uint8": {"candidate": candidate.byte()},
        r"slot is torch.int64 \[1\]": {"slot": slot[:1]},
        "count is torch.float32": {"threshold": None, "count": slot.float()},
    }.items():
        with pytest.raises(ValueError, match=message):
            commit(**{**good, "threshold": 0.5, **change})


def test_custom_op(device):
    sequence, *arguments = problem(3, 11, device)
    for rule in (("threshold", 0.5), ("factor", 1.1), ("bound", 2.0)):
        torch.library.opcheck(kernel._commit, (sequence, *arguments, None, *rule, 2))
    torch.library.opcheck(kernel._commit, (sequence, *arguments, arguments[-1], "count", 0.0, 1))

    def step(sequence, *arguments):
        chosen = commit(sequence, *arguments, factor=1.5)
        return sequence + 1, chosen

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    ours, theirs = sequence.clone(), sequence.clone()
    result, expected = compiled(ours, *arguments), step(theirs, *arguments)
    assert torch.equal(ours, theirs) and all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
