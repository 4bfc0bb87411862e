"""The task that measures accuracy: its problems, their split, and the score."""

import itertools
import json
import re
import sys
from pathlib import Path

import pytest
import torch

import dllm_fast

sys.path.append(str(Path(__file__).parent.parent))
from bench import task
from bench.task import SENTENCES, STEPS
from bench.tasks import sentences, steps


def worked(prompt: str) -> str:
    """Solve a problem from its prompt alone."""
    results, steps = [], []
    for statement in prompt.removesuffix(";").split(";"):
        (first, sign, second), question = statement.split("=")
        assert question == "??"
        number = int(first) if first.isdigit() else results[{"p": -1, "q": -2}[first]] % 10
        results.append(eval(f"{number}{sign}{second}"))
        steps.append(f"{number}{sign}{second}={results[-1]:02d};")
    return "".join(steps)


def depth(prompt: str) -> int:
    """The number of links in the longest chain of results."""
    links = []
    for first in prompt[::7]:
        links.append(0 if first.isdigit() else links[{"p": -1, "q": -2}[first]] + 1)
    return max(links)


def test_answers_follow_from_their_prompts():
    found = STEPS.problems(500, seed=3, held_out=False)
    for prompt, answer in found:
        assert answer == worked(prompt)
        assert len(prompt) == len(answer) == steps.TOKENS - 1
    assert len({prompt for prompt, _ in found}) == 500
    links = {depth(prompt) for prompt, _ in found}
    assert links <= set(range(4, 9)) and len(links) >= 4
    starts = [{prompt[7 * step] for prompt, _ in found} for step in range(steps.STEPS)]
    assert starts == [set("0123456789"), {"p"}, *[{"p", "q"}] * 7]


def test_a_last_digit_says_nothing_without_the_one_before_it():
    for sign, second in steps.OPERATIONS:
        assert sorted(eval(f"{first}{sign}{second}") % 10 for first in range(10)) == list(range(10))


EXAMPLES = {
    ("past", "passive", "negative", "question"): """
        The fox saw two old kings.
        Two old kings were seen by the fox.
        Two old kings were not seen by the fox.
        Were two old kings not seen by the fox?""",
    ("negative", "question", "swap", "future"): """
        The fox does not see two old kings.
        Does the fox not see two old kings?
        Do two old kings not see the fox?
        Will two old kings not see the fox?""",
    ("future", "passive", "question", "negative"): """
        The fox will see two old kings.
        Two old kings will be seen by the fox.
        Will two old kings be seen by the fox?
        Will two old kings not be seen by the fox?""",
    ("question", "past", "swap", "passive"): """
        Does the fox see two old kings?
        Did the fox see two old kings?
        Did two old kings see the fox?
        Was the fox seen by two old kings?""",
    ("swap", "past", "negative", "statement"): """
        Two old kings see the fox.
        Two old kings saw the fox.
        Two old kings did not see the fox.
        Two old kings did not see the fox.""",
}


@pytest.mark.parametrize("changes", EXAMPLES, ids="-".join)
def test_a_sentence_changes_as_english_does(changes):
    sentence, lines = sentences.Sentence(("the fox", False), sentences.VERBS[0], ("two old kings", True), "present"), []
    for change in changes:
        sentence = sentences.changed(sentence, change)
        lines.append(str(sentence))
    assert lines == [line.strip() for line in EXAMPLES[changes].strip().splitlines()]


def test_no_sentence_says_two_things():
    """Else a prompt would have two right answers. Each noun and verb, in every form."""
    said: dict[str, sentences.Sentence] = {}
    forms = [dict(zip(sentences.CHANGES, values)) for values in itertools.product(*sentences.CHANGES.values())]
    phrases = [(f"the {noun}", many) for pair in sentences.NOUNS.items() for many, noun in enumerate(pair)]
    pairs = [(phrase, ("a dog", False)) for phrase in phrases] + [(("a dog", False), phrase) for phrase in phrases]
    for (subject, whom), verb, form in itertools.product(pairs, sentences.VERBS, forms):
        made = sentences.Sentence(subject, verb, whom, **form)
        assert said.setdefault(str(made), made) == made


def test_rewritten_sentences_fit_and_differ():
    found = SENTENCES.problems(2000, seed=3, held_out=False)
    assert len({prompt for prompt, _ in found}) == 2000
    for prompt, answer in found:
        changes = prompt[:-2].rpartition(". ")[2].split(", ")
        lines = answer.split("\n")
        assert len(changes) == len(lines) == sentences.LINES
        assert len(re.findall(r"\w+|[.?\n]", answer)) < sentences.TOKENS
        assert all(line[0].isupper() and line[-1] in ".?" for line in lines)
        assert not re.search(r"\b(a (?=[aeiou]|honest)|an (?![aeiou]|honest))", answer.lower())


def test_no_problem_is_on_both_sides_of_the_split():
    assert all(task.is_held_out(prompt) for prompt, _ in STEPS.problems(50, seed=0, held_out=True))
    assert not any(task.is_held_out(prompt) for prompt, _ in STEPS.problems(500, seed=0, held_out=False))
    assert STEPS.problems(5, seed=1, held_out=True) == STEPS.problems(5, seed=1, held_out=True)
    assert STEPS.problems(5, seed=1, held_out=True) != STEPS.problems(5, seed=2, held_out=True)


def test_the_score_counts_whole_answers(shipped):
    model, tokenizer = shipped
    found = [("12", "1234"), ("3", "5678"), ("4", "90")]
    replies = iter([["1234", "5679"], ["9"]])  # right, one character of four wrong; one of two missing
    asked = []

    def generate(model, ids, mask, seed, gen_length):
        asked.append((mask.sum(1).tolist(), seed, gen_length))
        answers = tokenizer(next(replies), return_tensors="pt", padding="max_length", max_length=gen_length)
        sequences, forwards = torch.cat((ids, answers["input_ids"]), 1), [9, 6][: len(ids)]
        return dllm_fast.Output(sequences, 9, 9, 0, 50, forwards, 9, 9, [gen_length] * len(ids))

    got = task.score(model, tokenizer, found, 2, generate, itertools.count(5, 2), gen_length=6)
    assert asked == [([2, 1], 5, 6), ([1], 7, 6)]
    assert (got.right, got.characters, got.nfe) == ([True, False, False], [1, 0.75, 0.5], [9, 6, 9])
    assert got.positions == 100 and got.tokens.shape == (3, 6)
    assert got.facts() == {"exact": 1 / 3, "token": 0.75, "nfe": 8, "problems": 3}


def test_a_file_of_problems_is_what_sft_reads(tmp_path):
    from dllm_fast.train.data import pairs

    found = STEPS.problems(3, seed=0, held_out=False)
    task.write(tmp_path / "new" / "x.jsonl", found)
    assert pairs(tmp_path / "new" / "x.jsonl") == found


@pytest.fixture(scope="module")
def shipped():
    return task.load("llada-steps")


def test_the_shipped_model_works_the_steps_and_needs_them(shipped):
    """Nearly perfect with one forward per token; with an eighth as many, results in the chain are guesses."""
    found = STEPS.problems(32, seed=5, held_out=True)
    exact = {}
    for nfe in (64, 8):
        options = {"gen_length": 64, "block_length": 64, "schedule": dllm_fast.Uniform(nfe), "cache": "none"}
        got = task.score(*shipped, found, 32, **options)
        assert got.nfe == [nfe] * 32
        exact[nfe] = sum(got.right) / 32
    assert exact[64] >= 0.95 and exact[8] < exact[64] - 0.25


def test_the_shipped_model_rewrites_sentences():
    model, tokenizer = task.load("llada-sentences")
    found = SENTENCES.problems(32, seed=5, held_out=True)
    for schedule in (dllm_fast.Uniform(52), dllm_fast.Threshold(0.9)):
        options = {"gen_length": 52, "block_length": 52, "schedule": schedule, "cache": "none"}
        assert sum(task.score(model, tokenizer, found, 32, **options).right) >= 21
    assert all(len(tokenizer(" " + word)["input_ids"]) == 1 for word in ("thieves", "forgotten", "honest", "negative"))


def test_the_shipped_models_tokens_are_characters(shipped):
    model, tokenizer = shipped
    prompt, answer = STEPS.problems(1, seed=0, held_out=True)[0]
    assert len(tokenizer(prompt + answer)["input_ids"]) == 2 * (steps.TOKENS - 1)
    recipe = json.loads((dllm_fast.loading.MODELS / "llada-steps" / "recipe.json").read_text())
    assert recipe["task"]["generator_version"] == task.VERSION
    assert sum(p.numel() for p in model.parameters()) == recipe["parameters"]
    assert all(torch.isfinite(p).all() for p in model.parameters())
