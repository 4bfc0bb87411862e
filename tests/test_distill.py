"""Few-step distillation: its runs, its loss, and that a model learns an order."""

import json

import pytest
import torch
from test_train import SMALL
from tiny import EOS, MASK, make_llada

import dllm_fast
from dllm_fast.train import training
from dllm_fast.train.distill import best_run, distill_loss, quotas


def job(batch: int = 3, length: int = 12):
    """ids [B, L], which of them are an answer [B, L], with prompts of different lengths."""
    ids = torch.randint(0, EOS, (batch, length), generator=torch.Generator().manual_seed(1))
    prompt = torch.tensor([2, 4, 3])[:batch]
    return ids, torch.arange(length) >= prompt[:, None]


def test_without_noise_the_run_is_the_schedules():
    """States, and what each step commits, against `generate`'s own steps; only unsure positions are compared."""
    model = make_llada()
    ids, answer = job(1)
    counts = quotas(dllm_fast.Uniform(5), answer.sum(1))
    assert [int(count) for count in counts] == [2, 2, 2, 2, 2]
    states, committed, right = best_run(model, ids, answer, counts, torch.zeros(1, 1, 5, 12), MASK)
    with torch.no_grad():
        sequence = ids.masked_fill(answer, MASK)
        for step in range(5):
            masked = sequence == MASK
            assert torch.equal(states[step] == MASK, masked), step
            assert torch.equal(states[step][~masked], ids[~masked]), "right tokens stand where a step committed"
            logits = model(sequence).logits
            logits[..., MASK] = float("-inf")
            confidence, token = logits.softmax(-1).max(-1)
            best = confidence.masked_fill(~masked, -1).clamp(max=0.9525741).topk(2, 1).indices  # log-odds of 3
            assert set(best[0].tolist()) == set(committed[step][0].nonzero()[:, 0].tolist()), step
            sequence = sequence.masked_scatter(committed[step], token[committed[step]])
    assert right.tolist() == [[int((sequence == ids)[answer].sum())]]


def test_the_best_run_is_taken():
    """Rows are independent: each is shown the run with the most right tokens, as if it ran alone."""
    model = make_llada()
    ids, answer = job()
    ids = ids.where(~answer, model(ids.masked_fill(answer, MASK)).logits[..., :90].argmax(-1))  # some will be right
    noise = torch.randn(3, 6, 4, 12, generator=torch.Generator().manual_seed(0))
    counts = quotas(dllm_fast.Uniform(4), answer.sum(1))
    states, committed, right = best_run(model, ids, answer, counts, noise, MASK)
    assert right.shape == (3, 6) and len(right.unique()) > 1
    for row in range(3):
        best = int(right[row].argmax())
        alone = [count[row : row + 1] for count in counts]
        one = best_run(
            model, ids[row : row + 1], answer[row : row + 1], alone, noise[row : row + 1, best : best + 1], MASK
        )
        assert torch.equal(one[0][:, 0], states[:, row]) and torch.equal(one[1][:, 0], committed[:, row])
        assert int(one[2]) == int(right[row, best])
    assert torch.equal(committed.sum(2), torch.stack(counts)) and torch.equal(committed.any(0), answer)


@pytest.mark.parametrize("bias", [False, True])
def test_the_loss_is_the_formula(bias, either):
    model = either if bias else make_llada()
    ids, answer = job()
    states = ids.masked_fill(answer & (torch.arange(12) % 3 > 0), MASK)
    states[2] = ids[2]  # nothing is masked
    committed = torch.arange(12).expand(3, -1) % 3 == 1
    got = distill_loss(model, states, ids, committed, 0.2, MASK)
    logp = model(states).logits.double().log_softmax(-1)
    right = -logp.gather(-1, ids[..., None])[..., 0]
    held = 0.8 * right - 0.2 * logp.mean(-1)
    masked = states == MASK
    terms = torch.where(committed, right, held) * masked
    expected = terms.sum(1) / masked.sum(1).clamp(min=1)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)
    assert got[2] == 0
    got.sum().backward()
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    expected.sum().backward()
    for grad, parameter in zip(grads, model.parameters()):
        torch.testing.assert_close(grad, parameter.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("schedule", ["threshold=0.9", "first-hitting", "ancestral=4"])
def test_a_schedule_without_fixed_numbers_is_refused(schedule, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "1+1=", "answer": "2"}) + "\n")
    options = ["--data", str(data), "--out", str(tmp_path / "x"), "--model", "llada-steps", "--schedule", schedule]
    assert training.main(["distill", *options, *SMALL]) == 2
    assert "schedule: " in capsys.readouterr().err


def test_distilling_resumes_exactly_and_needs_a_model(tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    lines = [{"prompt": f"{a}+{b}=", "answer": f"{a + b}"} for a in range(4) for b in range(4)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--data", str(data), "--schedule", "uniform=2", "--runs", "2", *SMALL, "--log-every", "1"]
    assert training.main(["distill", *options, "--out", str(tmp_path / "none")]) == 2
    assert "--model" in capsys.readouterr().err
    options += ["--model", "llada-steps", "--save-every", "2"]
    whole = tmp_path / "whole"
    assert training.main(["distill", *options, "--steps", "4", "--out", str(whole)]) == 0
    recipe = json.loads((whole / "final" / "recipe.json").read_text())
    assert recipe["steps"] == 4 and recipe["started_from"]["steps"] == 1250
    rows = (whole / "loss.csv").read_text().splitlines()
    (whole / "checkpoint-4").rename(tmp_path / "gone")
    assert training.main(["distill", *options, "--steps", "4", "--out", str(whole), "--resume"]) == 0
    assert (whole / "loss.csv").read_text().splitlines() == rows
