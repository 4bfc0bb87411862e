"""lm-eval's model: requests with text, and three local tasks in one process and in two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import dllm_fast
from dllm_fast.decoding.text import answer_text, before_stop
from dllm_fast.evaluate.answers import Sampling, last_of, request_options, spelled_options, whole_blocks
from dllm_fast.evaluate.likelihood import log_likelihood

ROOT = Path(__file__).parent.parent
TASKS = ["dllm_fast_choice", "dllm_fast_words", "dllm_fast_rolling"]
MODEL = {"pretrained": "llada-gsm8k", "dtype": "float32", "schedule": "uniform=32", "mc_num": 8, "seed": 3}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(dllm_fast.model_path("llada-gsm8k"))


@pytest.mark.parametrize(
    "given,expected",
    [
        ({}, ([], 64, (0.3, 9, 0.8))),
        ({"until": "\n", "max_gen_toks": 20}, (["\n"], 20, (0.3, 9, 0.8))),
        ({"until": ["a", "b"], "max_new_tokens": 20, "max_tokens": 30}, (["a", "b"], 20, (0.3, 9, 0.8))),
        ({"until": None, "max_gen_toks": None, "temperature": 0.7}, ([], 64, (0.7, 9, 0.8))),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, ([], 64, (0.0, None, 1.0))),
        ({"do_sample": True}, ([], 64, (0.3, 9, 0.8))),
        ({"temperature": 0.7, "top_p": 0.9, "top_k": 5}, ([], 64, (0.7, 5, 0.9))),
    ],
)
def test_what_a_request_asks_for(given, expected):
    before = dict(given)
    assert request_options(given, 64, Sampling(0.3, 9, 0.8)) == expected
    assert given == before


def test_sampling_that_is_not_had_is_named():
    with pytest.raises(ValueError, match=r"generation_kwargs: min_p=0.1 at temperature 0.7 is not supported"):
        request_options({"do_sample": True, "temperature": 0.7, "min_p": 0.1}, 64, Sampling())


def test_options_as_text():
    found = spelled_options(schedule="ancestral=64,cosine", refresh="every=4", remask=None)
    assert found == {"schedule": dllm_fast.Ancestral(64, "cosine"), "refresh": dllm_fast.Every(4)}
    for name, text in (("schedule", "magic"), ("refresh", "every"), ("remask", "p2=x")):
        with pytest.raises(ValueError, match=f"{name}: '{text}'"):
            spelled_options(**{name: text})


def test_lengths():
    assert [whole_blocks(n, 32) for n in (1, 32, 33)] == [32, 32, 64]
    assert last_of([1, 2, 3], 2, "x") == [2, 3] and last_of([1, 2, 3], 9, "x") == [1, 2, 3]
    with pytest.raises(ValueError, match="max_gen_toks=99: leaves no room"):
        last_of([1, 2, 3], 0, "max_gen_toks=99")


def test_text_of_an_answer(tokenizer):
    ids = tokenizer("How many?\nTom has 3.", add_special_tokens=False)["input_ids"]
    eos, mask = tokenizer.eos_token_id, tokenizer.mask_token_id
    assert answer_text(tokenizer, [*ids, eos, *ids], [eos]) == "How many?\nTom has 3."
    assert answer_text(tokenizer, [*ids, eos, *ids], [ids[-2], eos]) == "How many?\nTom has "
    assert answer_text(tokenizer, ids, [eos], ["3", "\n", ""]) == "How many?"
    assert answer_text(tokenizer, [*ids, mask], [eos]) == "How many?\nTom has 3."
    assert answer_text(tokenizer, [*ids, mask, *ids], [eos], [tokenizer.mask_token]) == "How many?\nTom has 3."
    assert answer_text(tokenizer, [], [eos]) == ""
    assert before_stop("abcabc", ["ca", "b"]) == "a" and before_stop("abc", ["x"]) == "abc"


@pytest.fixture(scope="module")
def harness():
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install '.[eval]'")
    from dllm_fast.evaluate import harness

    yield harness
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # other tests must start without Accelerate's singletons


@pytest.fixture
def lm(harness):
    return harness.MaskedDiffusionLM(**MODEL, batch_size=4)


def requests(*arguments):
    from lm_eval.api.instance import Instance

    return [Instance("", {}, each, i) for i, each in enumerate(arguments)]


def test_it_is_registered(harness):
    from lm_eval.api.registry import get_model

    assert get_model("dllm_fast") is harness.MaskedDiffusionLM


@pytest.fixture(scope="module")
def evaluated(harness, tmp_path_factory):
    """(values of each document, results of the three tasks) in this process."""
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        manager = TaskManager(include_path="tests/data/lm_eval")
        found = simple_evaluate(
            "dllm_fast", model_args=MODEL, tasks=TASKS, batch_size=4, device="cpu", task_manager=manager
        )
    return {task: by_document(found["samples"][task]) for task in TASKS}, found["results"]


def by_document(samples):
    """The model's responses to each document, in one list: text, a number, or a number and a bool per choice."""
    found = {sample["doc_id"]: sample["filtered_resps"] for sample in samples}
    return {i: [y for x in told for y in (x if isinstance(x, list | tuple) else [x])] for i, told in found.items()}


def test_three_local_tasks(evaluated, tokenizer):
    """lm-eval gets what the package's own functions give for the documents."""
    values, results = evaluated
    model = dllm_fast.from_pretrained("llada-gsm8k", dtype=torch.float32)
    lines = (ROOT / "tests/data/lm_eval/words.jsonl").read_text().splitlines()
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    options = {
        "gen_length": 32,
        "block_length": 32,
        "schedule": dllm_fast.Uniform(32),
        "eos_id": tokenizer.eos_token_id,
    }
    right = 0
    for i, document in enumerate(map(json.loads, lines)):
        prompt = encode(document["context"])
        bounds = [
            log_likelihood(model, prompt, encode(document["context"] + document[which])[len(prompt) :], 8, seed=3)
            for which in ("right", "wrong")
        ]
        assert values["dllm_fast_choice"][i][::2] == pytest.approx(bounds, rel=1e-4)
        right += bounds[0] > bounds[1]
        out = dllm_fast.generate(model, torch.tensor([prompt]), **options).sequences[0, len(prompt) :]
        text = tokenizer.decode(out[:20], skip_special_tokens=True)
        assert values["dllm_fast_words"][i] == [text.partition("?")[0].partition(".")[0]]
        whole = encode(document["context"] + document["right"])
        bound = log_likelihood(model, [tokenizer.eos_token_id], whole, 8, seed=3)
        assert values["dllm_fast_rolling"][i] == pytest.approx([bound], rel=1e-4)
    assert results["dllm_fast_choice"]["acc,none"] == right / len(lines)
    assert right == len(lines)  # words in order are likelier than the same words in another


def test_two_processes_find_what_one_does(evaluated, tmp_path):
    """Through the command line, with the documents split over two processes."""
    values, results = evaluated
    arguments = ",".join(f"{name}={value}" for name, value in MODEL.items())
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m",
        "dllm_fast.evaluate", "--model", "dllm_fast", "--model_args", arguments, "--tasks", ",".join(TASKS),
        "--include_path", "tests/data/lm_eval", "--batch_size", "4", "--device", "cpu", "--log_samples",
        "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "datasets"),
    }  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "on rank 0" in done.stderr and "on rank 1" in done.stderr
    (path,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(path.read_text())["results"]
    for task in TASKS:
        (path,) = (tmp_path / "out").rglob(f"samples_{task}_*.jsonl")
        samples = by_document(map(json.loads, path.read_text().splitlines()))
        assert samples.keys() == values[task].keys() and len(samples) == 7
        for i, one in values[task].items():
            two = [float(text) if isinstance(value, float) else text for text, value in zip(samples[i], one)]
            assert len(samples[i]) == len(one)
            assert two == [pytest.approx(x, rel=1e-4) if isinstance(x, float) else str(x) for x in one]
        for name, value in results[task].items():
            if isinstance(value, float):
                assert found[task][name] == pytest.approx(value, rel=1e-4)


def test_greedy_answers_are_told(lm, tokenizer):
    context = "Tom has 3 apples. He buys 4 more."
    prompt = torch.tensor([tokenizer(context)["input_ids"]])
    options = {"gen_length": 4, "block_length": 4, "schedule": dllm_fast.Uniform(4), "cache": "none"}
    answer = tokenizer.decode(dllm_fast.generate(lm.model, prompt, **options).sequences[0, prompt.shape[1] :])
    found = lm.loglikelihood(requests((context, answer), (context, " apples and pears more")), disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, False]


def test_long_documents_go_in_windows(lm, tokenizer, monkeypatch):
    monkeypatch.setattr(lm, "positions", 16)
    text = "Tom has 3 apples. He buys 4 more. How many apples does he have in all? He gives half of them away."
    ids, eos = tokenizer(text)["input_ids"], tokenizer.eos_token_id
    assert 15 < len(ids) < 30
    rest = len(ids) - 15
    # Each id is scored once: the first after an end of text, the last after as much context as fits.
    pairs = [([eos], ids[:15]), (ids[15 - (16 - rest) : 15], ids[15:])]
    expected = sum(log_likelihood(lm.model, *pair, 8, seed=3) for pair in pairs)
    found = lm.loglikelihood_rolling(requests((text,)), disable_tqdm=True)
    assert found == [pytest.approx(expected, rel=1e-4)]


def test_long_prompts_keep_their_end(lm, tokenizer, monkeypatch):
    text = "Tom has 3 apples. He buys 4 more. How many"
    ids = tokenizer(text)["input_ids"]
    ask = {"max_gen_toks": 32, "until": []}
    (expected,) = lm.generate_until(requests((tokenizer.decode(ids[-6:]), ask)), disable_tqdm=True)
    monkeypatch.setattr(lm, "positions", 32 + 6)
    assert lm.generate_until(requests((text, ask)), disable_tqdm=True) == [expected]
    with pytest.raises(ValueError, match="max_gen_toks=64: leaves no room"):
        lm.generate_until(requests((text, {"max_gen_toks": 40})), disable_tqdm=True)


def test_requests_that_differ_keep_their_places(lm):
    asks = [("Tom has", {"max_gen_toks": n, "temperature": t}) for n, t in ((3, 0), (40, 0), (12, 0.9), (12, 0))]
    found = lm.generate_until(requests(*asks), disable_tqdm=True)
    again = [lm.generate_until(requests(ask), disable_tqdm=True)[0] for ask in asks]
    assert found == again
    assert found[3].startswith(found[0]) and len(found[3]) > len(found[0])  # twelve and three tokens of one answer
    assert found[2] != found[3]


def test_options_of_the_cache_are_generates(harness):
    lm = harness.MaskedDiffusionLM(**MODEL, cache_dtype="e4m3", suffix_length=3)
    assert lm.options["cache_dtype"] == "e4m3" and lm.options["suffix_length"] == 3
    lm.generate_until(requests(("Tom has 3 apples.", {"max_gen_toks": 64})), disable_tqdm=True)


def test_a_document_with_a_mask_in_it_comes_back_as_it_is(lm):
    """Neither prompts nor answers contain the mask id, so nothing in a question is filled in."""
    sentence = "Replace the token [MASK] in BERT"
    assert lm.tokenizer.decode(lm.tok_encode(sentence)) == sentence
    assert lm.model.config.mask_token_id not in lm.tok_encode(sentence)
    context, continuation = lm._encode_pair("Replace the", " token [MASK] in BERT")
    assert lm.tokenizer.decode(context + continuation) == sentence
    ((bound, _),) = lm.loglikelihood(requests(("Replace the", " token [MASK] in BERT")), disable_tqdm=True)
    assert bound == pytest.approx(log_likelihood(lm.model, context, continuation, 8, seed=3), rel=1e-4)


@pytest.mark.parametrize(
    "given,suppressed,deferred",
    [
        ({"logits_eos_inf": True}, ["<|endoftext|>"], []),
        ({"confidence_eos_eot_inf": True}, [], ["<|endoftext|>"]),
        ({"suppress_tokens": "[PAD]+5", "defer_tokens": 6}, ["[PAD]", 5], [6]),
    ],
    ids=["logits_eos_inf", "confidence_eos_eot_inf", "both"],
)
def test_tokens_that_are_held_back(harness, tokenizer, given, suppressed, deferred):
    lm = harness.MaskedDiffusionLM(**MODEL, batch_size=4, **given)
    ids = [[tokenizer.convert_tokens_to_ids(t) if isinstance(t, str) else t for t in x] for x in (suppressed, deferred)]
    assert [lm.options[name] for name in ("suppress_tokens", "defer_tokens")] == ids
    (answer,) = lm.generate_until(requests(("Tom has 3 apples.", {"max_gen_toks": 32})), disable_tqdm=True)
    prompt = torch.tensor([tokenizer("Tom has 3 apples.")["input_ids"]])
    options = {"gen_length": 32, "schedule": dllm_fast.Uniform(32), "eos_id": tokenizer.eos_token_id}
    out = dllm_fast.generate(lm.model, prompt, **options, suppress_tokens=ids[0], defer_tokens=ids[1])
    assert answer == answer_text(tokenizer, out.sequences[0, prompt.shape[1] :].tolist(), [tokenizer.eos_token_id])


def test_chat_templates(lm):
    lm.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    )
    history = [{"role": "user", "content": "Hi"}]
    assert lm.apply_chat_template(history) == "<user>Hi<bot>"
    begun = [*history, {"role": "assistant", "content": "So"}]
    assert lm.apply_chat_template(begun, add_generation_prompt=False) == "<user>Hi<assistant>So"
    assert lm.chat_template(True) == lm.tokenizer.chat_template and "llada-gsm8k" in lm.tokenizer_name


@pytest.mark.parametrize(
    "change,message",
    [
        ({"batch_size": "auto"}, "batch_size='auto' is not a number"),
        ({"dtype": "float31"}, "dtype='float31' is not one of"),
        ({"schedule": "magic=1"}, "schedule: 'magic=1' is none of"),
    ],
)
def test_bad_arguments_are_named(harness, change, message):
    with pytest.raises(ValueError, match=message):
        harness.MaskedDiffusionLM(**{**MODEL, **change})
