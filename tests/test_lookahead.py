"""bench/quality/lookahead.py: the plain threshold's tokens without branches, which branch wins, what it is held to."""

from types import SimpleNamespace

import pytest
import torch

import dllm_fast
from bench import task
from bench.quality import lookahead
from bench.quality.lookahead import Plain


@pytest.mark.parametrize("block", [52, 13])
def test_without_branches_it_is_the_plain_threshold(block):
    model, tokenizer = task.load("llada-sentences")
    problems = task.SENTENCES.problems(6, 1, held_out=True)  # of several lengths, so that some are padded
    plain = {"schedule": dllm_fast.Threshold(0.9), "cache": "none"}
    options = {"gen_length": 52, "block_length": block}
    expected = task.score(model, tokenizer, problems, 3, **plain, **options)
    given = {"threshold": 0.9, "branches": 0}
    found = task.score(model, tokenizer, problems, 3, lookahead.lookahead, **given, **options)
    assert torch.equal(found.tokens, expected.tokens)
    assert (found.nfe, found.positions) == (expected.nfe, expected.positions)


class Table(torch.nn.Module):
    """Predicts token 1 everywhere, with the probabilities that belong to the positions that have a token."""

    def __init__(self, rows: dict[tuple[int, ...], list[float]]):
        super().__init__()
        self.config = SimpleNamespace(mask_token_id=0)
        self.rows, self.evaluated = rows, []

    def forward(self, input_ids, attention_mask):
        states = [tuple(n for n, token in enumerate(answer) if token) for answer in input_ids[:, 1:].tolist()]
        self.evaluated.append(states)
        sure = torch.tensor([[0.5, *self.rows[state]] for state in states])
        others = (1 - sure) / 3
        never = torch.full_like(sure, 1e-9)
        return SimpleNamespace(logits=torch.stack((never, sure, others, others, others), -1).log())


ROWS = {
    (): [0.95, 0.8, 0.7, 0.5], (0,): [0.9, 0.8, 0.7, 0.5], (0, 1): [0.9, 0.9, 0.7, 0.5],
    (0, 2): [0.9, 0.95, 0.9, 0.45], (0, 1, 2): [0.9, 0.9, 0.9, 0.5], (0, 1, 2, 3): [0.9] * 4,
}  # fmt: skip


def filled(rows, way: str = "mean", branches: int = 2):
    """A run of `Table` with a threshold of 0.9, and the states that each forward evaluated."""
    model, prompt = Table(rows), torch.ones(1, 1, dtype=torch.int64)
    options = {"gen_length": 4, "block_length": 4, "threshold": 0.9, "branches": branches, "way": way}
    found = lookahead.lookahead(model, prompt, torch.ones_like(prompt), **options)
    assert found.sequences.tolist() == [[1] * 5]
    return found, model.evaluated


def test_the_branch_with_the_highest_mean_confidence_wins():
    """The threshold commits position 0. The anchor's mean is (0.8 + 0.7 + 0.5) / 3 = 0.667; that of the branch with
    position 1 too (0.7 + 0.5) / 2 = 0.6; that with position 2 (0.95 + 0.45) / 2 = 0.7: it wins, and the threshold
    commits position 1."""
    _, evaluated = filled(ROWS)
    assert evaluated == [[()], [(0,), (0, 1), (0, 2)], [(0, 1, 2), (0, 1, 2, 3)]]
    _, evaluated = filled(ROWS, "unseen", 1)
    assert evaluated == [[()], [(0, 1)], [(0, 1, 2, 3)]]
    # Less confident than the anchor where both are masked: by 0.005, and by 0.01 (0.03 more and 0.05 less).
    rows = {(0,): [0.9, 0.89, 0.7, 0.5], (0, 1): [0.9, 0.9, 0.69, 0.5], (0, 2): [0.9, 0.92, 0.9, 0.45]}
    _, evaluated = filled(ROWS | rows | {(0, 1, 3): [0.9] * 4}, "paired")
    assert evaluated[2][0] == (0, 1)  # the anchor goes on


def test_what_a_run_counts():
    """Position 0 by the threshold, 2 by a branch, 1 by the threshold, 3 by a branch that leaves nothing to evaluate."""
    found, _ = filled(ROWS)
    assert (found.row_nfe, found.positions) == ([2], 5 * (1 + 3))
    assert found.extra.tolist() == [[False, False, True, True]] and (found.steps, found.anchors) == (2, 0)
    expected = torch.tensor([[0, 1, 1, 0.6 - 2 / 3], [0, 2, 1, 0.7 - 2 / 3]]).double()
    torch.testing.assert_close(found.tried, expected, atol=1e-6, rtol=0)
    for answer, told in ((1, None), (2, 1.0)):  # token 1 is right at position 2, and right or wrong at position 1
        expected = torch.tensor([[1, answer, 1, 1]])
        assert lookahead.told_apart([found], expected, 1) == told


def test_leaving_out_a_doubtful_position_raises_the_mean_and_not_the_paired_difference():
    confidence = torch.tensor([[[0.8, 0.2], [0.79, 0.0], [0.99, 0.99]]])
    masked = torch.tensor([[[True, True], [True, False], [False, False]]])
    there = torch.tensor([[True, True, False]])
    mean, paired = (lookahead.branch_scores(confidence, masked, way) for way in ("mean", "paired"))
    torch.testing.assert_close(mean, torch.tensor([[0.5, 0.79, 1.0]]))
    torch.testing.assert_close(paired, torch.tensor([[0.0, -0.01, -1.0]]))
    assert [int(lookahead.winners(scores, there)) for scores in (mean, paired)] == [1, 0]
    equal = torch.zeros(1, 3)
    assert int(lookahead.winners(equal, there)) == 1  # and not the anchor


def test_rivals_take_as_many_forwards():
    plain = [Plain(0.5, [True, False, False], 2.0), Plain(0.9, [True, True, False], 4.0), Plain(0.99, [True] * 3, 8.0)]
    names, right = lookahead.rival(5.0, plain)
    assert names == "0.9 and 0.99" and right.tolist() == [1, 1, 0.25]
    assert lookahead.rival(1.0, plain)[0] == "0.5"  # all take more
    assert lookahead.rival(9.0, plain)[0] == "0.99"
    plain[1].right = [False] * 3
    assert lookahead.rival(3.0, plain)[0] == "0.5"  # the next slower is worse


def test_the_benchs_rows_and_verdicts():
    plain, rows = lookahead.run("llada-steps", 64, 6, 3, (0.9,), (0, 3), ((0.9, 1, "unseen"),))
    assert [(row.branches, row.way) for row in rows] == [(0, "mean"), (3, "mean"), (1, "unseen")]
    none, three, unseen = rows
    assert none.right == next(one.right for one in plain if one.threshold == 0.9)
    assert none.sequences == none.forwards > three.forwards and three.sequences > three.forwards
    assert none.extra is None and unseen.sequences == unseen.forwards
    assert [len(line) for line in lookahead.scores(rows, 64)] == [len(lookahead.SCORES)] * 3
    assert [len(line) for line in lookahead.verdicts(rows, plain)] == [len(lookahead.VERDICTS)] * 2
