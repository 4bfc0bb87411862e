"""The bench of repaired tokens: what it replaces, and the masked decoding that it compares with."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent))
from bench import task
from bench.quality import repair
from dllm_fast import Verify
from dllm_fast.train import options


def test_replaced_tokens_are_others_of_the_same_kind():
    among = torch.tensor([3, 4, 8, 9])
    answers = torch.randint(0, 12, (200, 50), generator=torch.Generator().manual_seed(0))
    given = repair.replaced(answers, 0.3, among, torch.Generator().manual_seed(1))
    changed, inside = given != answers, torch.isin(answers, among)
    assert not changed[~inside].any() and torch.isin(given[inside], among).all()
    assert abs(float(changed[inside].double().mean()) - 0.3) < 0.04
    counts = torch.stack([(given[changed & (answers == 4)] == k).sum() for k in (3, 8, 9)])
    assert float(counts.min() / counts.max()) > 0.6


@pytest.fixture(scope="module")
def half():
    """Eight held-out problems, every third token of their answers wrong."""
    model, tokenizer = task.load("llada-steps")
    prompts, answers = (
        tokenizer(list(texts), return_tensors="pt")["input_ids"]
        for texts in zip(*task.STEPS.problems(8, 4, held_out=True))
    )
    wrong = torch.arange(63).expand(8, -1) % 3 == 0
    return model, prompts, answers, wrong, torch.where(wrong, 200, answers)


def test_masked_decoding_fills_what_is_masked_and_nothing_else(half):
    model, prompts, answers, wrong, given = half
    nothing = torch.zeros_like(wrong)
    assert torch.equal(repair.masked_decoding(model, prompts, given, nothing, None, 1), given)
    told = repair.masked_decoding(model, prompts, given, wrong, None, 8)
    assert torch.equal(told[~wrong], answers[~wrong]) and float((told == answers)[wrong].double().mean()) > 0.95


def test_verifying_masks_wrong_tokens_and_leaves_none(half):
    model, prompts, answers, wrong, given = half
    nothing = torch.zeros_like(wrong)
    found = repair.masked_decoding(model, prompts, given, nothing, Verify(0.9), 8)
    assert not (found == model.config.mask_token_id).any()
    assert float((found == answers)[wrong].double().mean()) > 0.8
    assert float((found == answers)[~wrong].double().mean()) > 0.9


def test_training_takes_the_recipe():
    args = options.parser().parse_args(["flow", "--data", "x", "--out", "y", *repair.RECIPE])
    assert args.pairs and args.noise == [0, 0.7] and args.steps == 1000


def test_the_tables_show_shares_with_intervals(capsys):
    row = {"replaced by": "a digit", "share": 0.1, "way": "flow", "wrong": 40, "repaired": 30, "intact": 100}
    fresh = {"way": "masked", "forwards": 8, "whole": 2, "problems": 20}
    rows = [row | {"broken": 0, "whole": 10}]
    repair.show({"problems": 20, "rows": rows, "fresh": [fresh]})
    printed = capsys.readouterr().out
    for text in ("75.0 (59.8 to 85.8)", "0.0 (0.0 to 3.7)", "50.0 (29.9 to 70.1)", "10.0 (2.8 to 30.1)"):
        assert text in printed
    assert printed.splitlines()[-1].startswith('{"problems": 20')
