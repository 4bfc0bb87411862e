"""`dllm-fast verify`: reports agreement, and finds differences and exits with 1."""

import json

import pytest
import torch
from tiny import MASK, make_llada

from dllm_fast.cli import main as cli
from dllm_fast.evaluate import gsm8k, verify
from dllm_fast.patch import patched

PROMPTS = [torch.arange(5, 14), torch.arange(40, 45)]
QUICK = verify.RULES[1:3]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(verify, "RULES", QUICK)
    monkeypatch.setattr(verify, "PROMPTS", verify.PROMPTS[:2])


def test_tokens_and_logits_agree(either, quick):
    before = {name: value.clone() for name, value in either.state_dict().items()}
    assert not verify.compare_logits(either, PROMPTS, MASK, "torch").differ
    for name, value in either.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, before[name])
    for found in verify.compare_tokens(either, PROMPTS, MASK, "torch"):
        assert (found.same, found.differences) == (2, [])


def spoil(monkeypatch, change):
    """Make `patched` simulate a wrong patch: ``change`` modifies the weights inside and restores them afterwards."""

    def wrong(model, impl="auto", weights=None):
        context = patched(model, impl, weights)

        class Spoilt:
            def __enter__(self):
                change(model, 1)
                return context.__enter__()

            def __exit__(self, *error):
                context.__exit__(*error)
                change(model, -1)

        return Spoilt()

    monkeypatch.setattr(verify, "patched", wrong)


def turn_round(model, sign):
    """In `make_paired`'s model, exchange each word's logit with another's without changing any confidence."""
    head = model.model.transformer.ff_out
    head.weight.data = -head.weight.data


def make_paired():
    """A model whose words form pairs with opposite logits; [MASK]'s logit is 0."""
    model = make_llada()
    weight = model.model.transformer.ff_out.weight.data
    weight[1:MASK:2], weight[MASK] = -weight[:MASK:2], 0
    return model


def test_a_wrong_patch_is_found(quick, monkeypatch):
    model = make_paired()
    spoil(monkeypatch, turn_round)
    logits = verify.compare_logits(model, PROMPTS, MASK, "torch")
    assert logits.differ and verify.print_logits(logits)
    for found in verify.compare_tokens(model, PROMPTS, MASK, "torch"):
        assert found.same == 0 and all(x.step == 0 for x in found.differences)
        # The same positions are committed with the least likely word: a gap of nats, where rounding is a millionth.
        assert all(x.gap > 0.1 for x in found.differences)
        assert verify.print_tokens(found, 1e-6)


def test_a_tie_is_rounding(quick, monkeypatch, capsys):
    """Two words whose logits differ by a relative 1e-6, so that rounding decides between them."""
    model = make_llada()

    def swap(model, sign):
        weight = model.model.transformer.ff_out.weight.data
        weight[:MASK:2], weight[1:MASK:2] = weight[1:MASK:2].clone(), weight[:MASK:2].clone()

    weight = model.model.transformer.ff_out.weight.data
    weight[1:MASK:2] = weight[:MASK:2] * (1 + 1e-6)
    spoil(monkeypatch, swap)
    found = verify.compare_tokens(model, PROMPTS, MASK, "torch")[0]
    assert found.differences and all(0 <= x.gap < 1e-4 for x in found.differences)
    assert not verify.print_tokens(found, 1e-4) and "within rounding" in capsys.readouterr().out
    assert verify.print_tokens(found, 1e-12)


def test_wider_weights_that_do_not_fit_are_said(monkeypatch, capsys):
    model = make_llada()

    def no_memory(*args):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(model, "to", no_memory)
    logits = verify.compare_logits(model, PROMPTS, MASK, "torch")
    assert logits.errors is None and not verify.print_logits(logits)
    assert "do not fit into memory" in capsys.readouterr().out
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_the_command(quick, monkeypatch, capsys, tmp_path):
    file = tmp_path / "problems.jsonl"
    file.write_text(json.dumps({"question": "What is 1 + 1?", "answer": "It is 2.\n#### 2"}) + "\n")
    monkeypatch.setitem(gsm8k.PUBLISHED, "LLaDA-8B-Instruct", gsm8k.Published(78.9, 8, 8, False))
    command = ["verify", "--model", "llada-gsm8k", "--device", "cpu"]
    assert cli.main([*command, "--gsm8k", str(file)]) == 0
    out = capsys.readouterr().out
    assert out.count("2 of 2 prompts have the same tokens") == 2 and "GSM8K's first 1: " in out
    assert "accuracies are published for LLaDA-8B-Base" in out and out.endswith(
        "nothing differs by more than rounding\n"
    )
    monkeypatch.setattr(verify, "compare_logits", lambda *args: verify.Logits(1.0, 1.0, verify.Errors(1e-6, 1.0, 1e-6)))
    assert cli.main(command) == 1
    out = capsys.readouterr().out
    assert "GSM8K: left out" in out and "SOMETHING DIFFERS" in out and f"torch {torch.__version__}" in out
    file.write_text('{"question": 1}\n')
    assert cli.main([*command, "--gsm8k", str(file)]) == 2
    assert f"{file}:1: not an object with question and answer" in capsys.readouterr().err


def test_gsm8k_is_scored_as_published():
    assert gsm8k.is_right("so 3 x 4 = 12.", "#### 12") and gsm8k.is_right("-7.0", "#### -7")
    assert gsm8k.is_right("The answer is 5\nQuestion: 9", "x\n#### 5")
    assert gsm8k.is_right("It costs 1200", "#### 1,200") and not gsm8k.is_right("1,200", "#### 1,200")
    assert not gsm8k.is_right("none", "#### 0")
    assert gsm8k.worked("3 - 1 = <<3-1=2>>2\n#### 2") == "3 - 1 = 2\nThe answer is 2\n"
    assert gsm8k.published_name("GSAI-ML/LLaDA-1.5") == "LLaDA-1.5" and gsm8k.published_name("x/LLaDA") is None


def test_the_chance_of_a_count():
    """Of two fair coins: 0, 1, 2 heads with 1/4, 1/2, 1/4."""
    assert gsm8k.chance_of(0, 2, 0.5) == 0.5 and gsm8k.chance_of(1, 2, 0.5) == 1
    assert gsm8k.chance_of(79, 100, 0.789) > 0.9 and gsm8k.chance_of(60, 100, 0.789) < gsm8k.UNLIKELY
