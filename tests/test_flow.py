"""Flow language models: the loss, the noisy input and the noise weights against plain formulas, and training."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from test_plain import make
from test_train import PAIRS, SMALL, TEXT, tensors
from tiny import EOS, MASK, make_llada
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback, TrainingArguments, default_data_collator

from dllm_fast.decoding.flips import flipped
from dllm_fast.train import flow, losses, training
from dllm_fast.train.data import Run, collate
from dllm_fast.train.flow import Flow, FlowCorruption, FlowTrainer

IDS = torch.randint(0, EOS, (4, 20), generator=torch.Generator().manual_seed(3))
PROMPT = torch.tensor([0, 5, 12, 19])


def direct_kl(logits: torch.Tensor, target: torch.Tensor, smoothing: float) -> torch.Tensor:
    """``KL(p || q) + KL(q || p)`` as they are defined, [N]."""
    q = F.one_hot(target, logits.shape[1]).to(logits.dtype) * (1 - smoothing) + smoothing / logits.shape[1]
    p = torch.softmax(logits, 1)
    return (p * (torch.log_softmax(logits, 1) - q.log())).sum(1) + (q * (q.log() - torch.log_softmax(logits, 1))).sum(1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("smoothing", [1e-4, 0.1])
def test_the_loss_and_its_gradient_are_those_of_the_formula(dtype, smoothing):
    """Against fp64 autograd. Logits run from flat to nearly one-hot, on the target and off it."""
    source = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 101, generator=source, dtype=torch.float64) * torch.logspace(-1, 1.2, 12)[:, None]
    target = torch.randint(0, 101, (12,), generator=source)
    target[::3] = logits[::3].argmax(1)
    given = logits.to(dtype).requires_grad_()
    exact = given.detach().double().requires_grad_()
    factor = torch.linspace(-1, 2, 12, dtype=torch.float64)
    found, expected = flow.symmetric_kl(given, target, smoothing), direct_kl(exact, target, smoothing)
    (found * factor.to(found.dtype)).sum().backward()
    (expected * factor).sum().backward()
    if dtype == torch.float64:
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(given.grad, exact.grad, atol=1e-12, rtol=1e-12)
        return
    eager = given.detach().float().requires_grad_()
    loss = direct_kl(eager, target, smoothing)
    (loss * factor.float()).sum().backward()
    error, its = (found.double() - expected).abs().max(), (loss.double() - expected).abs().max()
    assert error <= 2 * its + 1e-7
    rounding = 0 if dtype == torch.float32 else 2.0**-8 * exact.grad.abs().max()  # of the gradient's own dtype
    error, its = (x.grad.double().sub(exact.grad).abs().max() for x in (given, eager))
    assert error <= 2 * its + rounding + 1e-7


def test_logits_are_computed_for_some_rows_at_a_time():
    source = torch.Generator().manual_seed(1)
    hidden = torch.randn(50, 8, generator=source, requires_grad=True)
    weight = torch.randn(101, 8, generator=source, requires_grad=True)
    target, widths = torch.randint(0, 101, (50,), generator=source), []

    def head(h):
        widths.append(len(h))
        return F.linear(h, weight)

    found = flow.head_loss(hidden, head, target, 1e-4, 16)
    grads = torch.autograd.grad(found.sum(), (hidden, weight))
    assert widths == [16, 16, 16, 2, 2, 16, 16, 16]  # and once more in the backward pass
    expected = direct_kl(hidden @ weight.T, target, 1e-4)
    torch.testing.assert_close(found, expected)
    for a, b in zip(grads, torch.autograd.grad(expected.sum(), (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def soft(weight, tau, part=flow.PART, count=12):
    token = torch.arange(count) * 7 % len(weight)
    n = torch.linspace(0, 1, count)
    key = 5, 2, torch.arange(count) // 4, torch.arange(count) % 4
    return flow.soft_embedding(weight, token, n, tau, *key, part), (token, n, key)


@pytest.mark.parametrize("tau", [1.0, 0.05, 1e-3])
@pytest.mark.parametrize("part", [24, 12 * 32, flow.PART], ids=["two at a time", "parts", "whole"])
def test_the_noisy_input_is_that_of_the_formula(tau, part):
    """And its gradient, in parts of the vocabulary of any size: in fp64 from the same normals."""
    weight = torch.randn(101, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    found, (token, n, key) = soft(weight, tau, part)
    exact = weight.detach().double().requires_grad_()
    w = (1 - n.double())[:, None] * F.one_hot(token, 101) + n.double()[:, None] * flow.normals(*key, 0, 101).double()
    expected = torch.softmax(w.float().double() / tau, 1) @ exact
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)
    out = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    found.backward(out)
    expected.backward(out.double())
    torch.testing.assert_close(weight.grad.double(), exact.grad, atol=2e-4, rtol=0)


def test_at_a_low_temperature_it_is_the_flipped_tokens_embedding():
    weight = torch.randn(101, 8, generator=torch.Generator().manual_seed(1))
    found, (token, n, key) = soft(weight, 1e-8, count=40)
    w = (1 - n)[:, None] * F.one_hot(token, 101) + n[:, None] * flow.normals(*key, 0, 101)
    winner = w.argmax(1)
    assert 5 < int((winner != token).sum()) < 35
    torch.testing.assert_close(found, weight[winner])


def test_autocast_does_not_round_the_noise():
    weight = torch.randn(101, 8, generator=torch.Generator().manual_seed(1))
    expected = soft(weight, 0.05)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(soft(weight, 0.05)[0], expected)


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt"])
def test_other_models_take_mixed_embeddings_too(kind):
    model = make(kind)
    table, n = model.get_input_embeddings(), torch.tensor([0.3, 0.6, 0.9, 0.99])
    ids = IDS.clamp(min=2) % len(table.weight)
    labels = torch.where(torch.arange(20) < PROMPT[:, None], losses.IGNORED, ids)
    key = torch.stack((torch.full((4,), 3), torch.full((4,), 1), torch.arange(4)), 1)
    found = flow.flow_loss(model, ids, labels, 1e-4, (n, torch.full((4,), 0.02), key))
    for row in range(4):
        kept = int(PROMPT[row])
        where = torch.arange(kept, 20)
        mixed = flow.soft_embedding(
            table.weight, ids[row, kept:], n[row].expand(20 - kept), 0.02, 3, 1, torch.full_like(where, row), where
        )
        logits = model(inputs_embeds=torch.cat((table(ids[row, :kept]), mixed))[None]).logits[0, kept:]
        torch.testing.assert_close(found[row], direct_kl(logits, ids[row, kept:], 1e-4).sum(), atol=1e-4, rtol=1e-4)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an op makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found = [x.numel() for x in (out if isinstance(out, list | tuple) else [out]) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *found])
        return out


def test_nothing_has_a_number_for_each_position_and_token(monkeypatch):
    """A training step with noise and without: no tensor has more elements than the noise and logits allowed at once."""
    vocabulary, tokens = 5000, 4 * 64
    monkeypatch.setattr(flow, "LOGITS", 60_000)
    monkeypatch.setattr(flow.soft_embedding, "__defaults__", (60_000,))
    model = make_llada(vocab_size=vocabulary, mask_token_id=4999, d_model=16, n_layers=1, mlp_hidden_size=16)
    flow.bind_flow(model, 1e-4)
    ids = torch.randint(0, 4999, (4, 64))
    for tau in (0.0, 1e-3):
        made = FlowCorruption(None, MASK, 0, Flow(tau=(tau, tau)), 10, vocabulary).corrupt(ids, None, 0, range(4), 4)
        with Largest() as largest:
            model(**{name: value for name, value in made.items() if name != "weight"}).mean().backward()
        assert tokens * vocabulary > 4 * 60_000 and largest.elements <= max(60_000, vocabulary * 16)


def test_normals_are_standard_normal_and_of_their_index_alone():
    row, position = torch.arange(300), torch.arange(300) % 7
    g = flow.normals(3, 1, row, position, 0, 1000)
    assert torch.equal(flow.normals(3, 1, row[5:7], position[5:7], 20, 31), g[5:7, 20:51])
    edges = torch.special.ndtri(torch.linspace(0, 1, 41)[1:-1])
    counts = torch.bincount(torch.bucketize(g.flatten(), edges), minlength=40).double()
    assert float(((counts - 7500) ** 2 / 7500).sum()) < 39 + 4.3 * math.sqrt(2 * 39)
    for other in (g.roll(1, 1), g.roll(1, 0)):
        assert abs(float((g * other).mean())) < 4.5 / math.sqrt(g.numel())
    assert 4.2 < g.abs().max() < 6.5


def test_noise_weights_are_uniform_and_spread_over_the_batch():
    found = torch.stack([flow.noise_weights(0, step, range(8), 8, 0.2, 0.9) for step in range(1000)])
    assert found.min() >= 0.2 and found.max() <= 0.9
    assert (torch.histc(found, 7, 0.2, 0.9) / found.numel() - 1 / 7).abs().max() < 0.01
    assert all(((row - 0.2) / 0.7 * 8).floor().clamp(max=7).unique().numel() >= 7 for row in found[:50])
    n = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(flow.loss_scale(n, 9), torch.tensor([0.0, 0.1, 1.0]))


def corrupted(prompt, step, rows, tau=(0.0, 0.0)):
    kept = None if prompt is None else prompt[rows]
    return FlowCorruption(collate, MASK, 3, Flow(tau=tau), 10, 101).corrupt(IDS[rows], kept, step, rows, 4)


@pytest.mark.parametrize("tau", [(0.0, 0.0), (1e-2, 1e-4)], ids=["flips", "soft"])
@pytest.mark.parametrize("prompt", [None, PROMPT], ids=["text", "prompts"])
def test_draws_are_of_the_row_and_not_of_its_micro_batch(tau, prompt):
    whole = corrupted(prompt, 5, [0, 1, 2, 3], tau)
    for rows in ([0, 1], [3, 1]):
        part = corrupted(prompt, 5, rows, tau)
        assert part.keys() == whole.keys() and all(torch.equal(part[name], whole[name][rows]) for name in part)
    other = corrupted(prompt, 6, [0, 1, 2, 3], tau)
    assert any(not torch.equal(whole[name], other[name]) for name in ("input_ids", "weight"))
    if prompt is not None:
        ahead = torch.arange(20) < PROMPT[:, None]
        assert torch.equal(whole["input_ids"][ahead], IDS[ahead]) and (whole["flow_labels"][ahead] == -100).all()
    assert torch.equal(whole["flow_labels"][whole["flow_labels"] >= 0], IDS[whole["flow_labels"] >= 0])


@pytest.mark.parametrize("tau", [0.0, 0.02], ids=["flips", "soft"])
@pytest.mark.parametrize("prompt", [None, PROMPT], ids=["text", "prompts"])
def test_a_steps_loss_is_the_formulas(either, tau, prompt):
    """From noise weights to the mean over rows, with the model's own forward and every logit in memory."""
    made = corrupted(prompt, 1, [0, 1, 2, 3], (tau, tau))
    flow.bind_flow(either, 1e-4)
    given = {name: value for name, value in made.items() if name != "weight"}
    (either(**given) * made["weight"]).mean().backward()
    grads = {name: p.grad.clone() for name, p in either.named_parameters()}
    either.zero_grad()
    n, position = flow.noise_weights(3, 1, range(4), 4, 0.0, 0.999), torch.arange(20)
    rows, expected = [], 0
    for row in range(4):
        start = 0 if prompt is None else int(PROMPT[row])
        embedding, number = either.get_input_embeddings(), torch.full((20,), row)
        if tau:
            w = n[row] * flow.normals(3, 1, number, position, 0, 101) + (1 - n[row]) * F.one_hot(IDS[row], 101)
            answer = torch.softmax(w / tau, 1) @ embedding.weight
        else:
            answer = embedding(flipped(IDS[row], n[row].expand(20), 101, 3, 1, number, position))
        rows.append(torch.cat((embedding(IDS[row, :start]), answer[start:])))
        logits = either(inputs_embeds=rows[-1][None]).logits[0, start:]
        scale = n[row] / (101 * (1 - n[row]) + n[row])
        expected = expected + scale * direct_kl(logits, IDS[row, start:], 1e-4).mean() / 4
    expected.backward()
    assert not torch.equal(torch.stack(rows), either.get_input_embeddings()(IDS))
    for name, parameter in either.named_parameters():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(grads[name], parameter.grad, atol=2e-4 * scale + 1e-7, rtol=1e-3, msg=name)


def test_the_temperature_falls_by_equal_factors_and_an_evaluation_flips():
    flow_ = Flow(tau=(1e-3, 1e-8))
    assert [flow_.tau_at(step, 6) for step in range(6)] == pytest.approx([10.0**-k for k in range(3, 9)])
    assert flow_.tau_at(-1, 6) == 0 and Flow(tau=(0, 0)).tau_at(3, 6) == 0
    assert "tau" not in corrupted(None, -1, [0, 1], (1e-3, 1e-8))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"noise": (0.5, 0.2)}, r"Flow: noise=\(0.5, 0.2\) is not a range"),
        ({"noise": (0.0, 1.5)}, "Flow: noise=1.5 is not from 0 to 1"),
        ({"tau": (1e-3, 0.0)}, "Flow: tau=.* neither falls"),
        ({"tau": (1e-8, 1e-3)}, "Flow: tau=.* neither falls"),
        ({"tau": (1.0,)}, "Flow: tau=.* is not two numbers"),
        ({"smoothing": 0.0}, "Flow: smoothing=0.0 is not above 0 and below 1"),
    ],
)
def test_an_objective_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Flow(**options)


# The command line


@pytest.fixture
def files(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in PAIRS))
    return tmp_path


def run(folder, out, *more, code=0):
    command = ["flow", "--out", str(folder / out), *SMALL, *more]
    assert training.main(command) == code
    return folder / out / "final"


CUT = {
    "text": ["--data", "{}/text.txt", "--family", "modernbert"],
    "pairs": ["--data", "{}/asked.jsonl", "--pairs", "--tau", "0", "0"],
}


@pytest.mark.parametrize("kind", CUT)
def test_a_resumed_run_is_the_uninterrupted_one(files, kind, monkeypatch):
    """Stopped after step 3 of 4 and resumed from the checkpoint of step 2: the same weights, bit for bit."""
    options = [word.format(files) for word in CUT[kind]] + ["--steps", "4", "--save-every", "2"]
    whole = run(files, "whole", *options)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(training, "LossRecord", lambda: Stop())
    run(files, "cut", *options, code=130)
    monkeypatch.undo()
    torch.randn(17)
    a, b = tensors(whole), tensors(run(files, "cut", *options, "--resume"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_training_lowers_the_held_out_loss(files):
    data = [f"{files}/asked.jsonl"]
    options = ["--pairs", "--noise", "0", "0.5", "--steps", "80", "--save-every", "20", "--lr", "3e-3", "--batch", "16"]
    run(files, "run", "--data", *data, "--eval-data", *data, *options)
    rows = [line.split(",") for line in (files / "run" / "loss.csv").read_text().split()[1:]]
    held = [float(row[2]) for row in rows if row[2]]
    assert len(held) == 4 and held[-1] < 0.8 * held[0]


def test_options_that_make_no_sense_are_a_line(files, capsys):
    run(files, "x", "--data", f"{files}/text.txt", "--tau", "1", "0", code=2)
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: Flow: tau=")


def test_micro_batches_give_the_whole_batchs_steps(tmp_path):
    """Eight rows at once, and two by two: the same losses. Evaluation is the mean over rows."""
    data = [{"input_ids": row} for row in torch.randint(0, EOS, (16, 12), generator=torch.Generator().manual_seed(2))]
    found = []
    for batch in (8, 2):
        args = TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=batch, learning_rate=5e-3,
            gradient_accumulation_steps=8 // batch, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
            dataloader_pin_memory=False, disable_tqdm=True, per_device_eval_batch_size=batch,
        )  # fmt: skip
        objective = Flow(tau=(0.1, 1e-3))
        model = make_llada()
        trainer = FlowTrainer(model, args, mask_id=MASK, train_dataset=data, eval_dataset=data, objective=objective)
        trainer.train()
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found.append((logged, trainer.evaluate()["eval_loss"]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4) and found[0][1] == pytest.approx(found[1][1], rel=1e-3)
    rows = Run(data, 16, 1, 42, evaluation=True)
    batch = FlowCorruption(default_data_collator, MASK, 42, objective, 3, 101)([rows[i] for i in range(16)])
    weight = batch.pop("weight")
    with torch.no_grad():
        assert float((model(**batch) * weight).mean()) == pytest.approx(found[1][1], rel=1e-3)
    assert losses.IGNORED not in batch["flow_labels"]
