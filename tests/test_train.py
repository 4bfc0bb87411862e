"""The trainer: its loss, exact resuming, its records, and its errors."""

import json
import math

import pytest
import torch
from tiny import EOS, MASK
from transformers import AutoTokenizer, TrainerCallback, default_data_collator

from dllm_fast.errors import one_line
from dllm_fast.train import losses, training
from dllm_fast.train.data import (
    Masked,
    PackedText,
    PromptAnswers,
    Run,
    collate,
    documents,
    save_tokenizer,
    train_tokenizer,
)  # fmt: skip
from dllm_fast.train.masking import EPS

TEXT = "\n\n".join(f"The {a} {b} sat on the {c} and looked at the sea." for a in ("old", "red", "sly", "big", "shy")
                   for b in ("fox", "cat", "hen", "dog", "owl") for c in ("mat", "log", "hill", "roof"))  # fmt: skip
SMALL = ["--vocab-size", "300", "--width", "32", "--layers", "2", "--heads", "2", "--ffn", "48", "--length", "32"]
SMALL += ["--batch", "4", "--log-every", "1", "--warmup", "2", "--save-dtype", "float32", "--threads", "1", "--cpu"]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


PAIRS = [(f"{a}+{b}=", str(a + b) * (1 + b % 3)) for a in range(1, 13) for b in range(4)]


@pytest.fixture
def asked(tmp_path):
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in PAIRS))
    return path


def run(out, text, *more, command="pretrain"):
    assert training.main([command, "--data", str(text), "--out", str(out), *SMALL, *more]) == 0
    return out / "final"


def tensors(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("command, family", [("pretrain", "llada"), ("pretrain", "modernbert"), ("sft", "llada")])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, text, asked, command, family, monkeypatch):
    """Stopped after step 5 of 8, and resumed from the checkpoint of step 4: the same weights, bit for bit."""
    options = ["--family", family, "--steps", "8", "--save-every", "4"]
    text = asked if command == "sft" else text
    whole = run(tmp_path / "whole", text, *options, command=command)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    monkeypatch.setattr(training, "LossRecord", lambda: Stop())
    assert training.main([command, "--data", str(text), "--out", str(tmp_path / "cut"), *SMALL, *options]) == 130
    monkeypatch.undo()
    torch.randn(17)  # as another process would have another generator
    resumed = run(tmp_path / "cut", text, *options, "--resume", command=command)
    a, b = tensors(whole), tensors(resumed)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    recipe = json.loads((resumed / "recipe.json").read_text())
    assert recipe["steps"] == 8 and str(tmp_path) not in json.dumps(recipe)
    assert math.isfinite(recipe["final_loss"]["loss"])
    assert (resumed / "loss.png").stat().st_size > 5000
    assert (tmp_path / "cut" / "loss.csv").read_text().startswith("step,loss,eval_loss\n")


def test_training_lowers_the_loss_and_the_result_generates(tmp_path, text):
    import dllm_fast

    options = ["--steps", "60", "--save-every", "60", "--lr", "5e-3", "--eval-data", str(text)]
    final = run(tmp_path / "run", text, *options)
    rows = [line.split(",") for line in (tmp_path / "run" / "loss.csv").read_text().split()[1:]]
    losses = [float(row[1]) for row in rows if row[1]]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert any(row[2] for row in rows)
    model = dllm_fast.from_pretrained(final)
    ids = torch.randint(0, 200, (1, 8))
    assert not (
        dllm_fast.generate(model, ids, gen_length=8, block_length=8).sequences == model.config.mask_token_id
    ).any()
    assert "tokens" in json.loads((final / "recipe.json").read_text())
    further = run(tmp_path / "more", text, "--model", str(final), "--steps", "1", "--save-every", "1")
    assert tensors(further).keys() == tensors(final).keys()


def test_an_existing_run_is_not_overwritten(tmp_path, text, capsys):
    run(tmp_path / "run", text, "--steps", "2", "--save-every", "2")
    assert training.main(["pretrain", "--data", str(text), "--out", str(tmp_path / "run"), *SMALL]) == 2
    assert "already holds checkpoint-2; add --resume" in capsys.readouterr().err


def test_bad_data_is_named(tmp_path, text, capsys):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    for data, message in ((tmp_path / "gone.txt", "no such file"), (empty, "holds no text")):
        assert training.main(["pretrain", "--data", str(data), "--out", str(tmp_path / "x"), *SMALL]) == 2
        assert message in capsys.readouterr().err
    arguments = ["pretrain", "--data", str(text), "--out", str(tmp_path / "x"), *SMALL, "--length", "100000"]
    assert training.main(arguments) == 2
    assert "do not fill one row of --length 100000" in capsys.readouterr().err


def test_documents_are_paragraphs_or_templated_lines(tmp_path):
    lines = tmp_path / "d.jsonl"
    lines.write_text('{"q": "1+1?", "a": "<<1+1=2>>2"}\n\n{"q": "é", "a": "b"}\n', encoding="utf-8")
    assert documents(lines, "{q}\n{a}", "<<[^>]*>>") == ["1+1?\n2", "é\nb"]
    text = tmp_path / "d.txt"
    text.write_text("one\ntwo\n\nthree\n")
    assert documents(text, "{text}", None) == ["one\ntwo", "three"]


def test_a_saved_tokenizer_loads_in_transformers_4_too(tmp_path):
    tokenizer = train_tokenizer([TEXT], 300, 64)
    save_tokenizer(tokenizer, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("The fox.")["input_ids"] == tokenizer("The fox.")["input_ids"] and again.mask_token_id == 299


def test_packed_rows_hold_every_token_in_order():
    tokenizer = train_tokenizer([TEXT], 300, 64)
    assert tokenizer.decode(tokenizer("a 123 é")["input_ids"]) == "a 123 é"
    assert len(tokenizer) == 300 and tokenizer.mask_token_id == 299
    data = PackedText(["The fox", "the sea"], tokenizer, 3)
    flat = torch.cat([data[i]["input_ids"] for i in range(len(data))]).tolist()
    joined = [*tokenizer("The fox")["input_ids"], tokenizer.eos_token_id, *tokenizer("the sea")["input_ids"]]
    assert flat == [*joined, tokenizer.eos_token_id][: len(flat)]


def mask_ratios(*place) -> torch.Tensor:
    return losses.LLADA.ratios(losses.times(*place)).float()


def test_mask_ratios_are_uniform_and_spread_over_the_batch():
    ratios = torch.stack([mask_ratios(0, step, range(8), 8) for step in range(2000)])
    assert ratios.min() >= EPS and ratios.max() <= 1
    assert abs(float(ratios.mean()) - (1 + EPS) / 2) < 0.005
    share = torch.histc(ratios, 10, 0, 1) / ratios.numel()
    assert (share - 0.1).abs().max() < 0.01
    for row in ratios[:50]:
        assert (row * 8).floor().clamp(max=7).unique().numel() >= 7  # one in each eighth, up to rounding


def test_draws_are_of_the_row_and_not_of_its_micro_batch():
    ids, prompt = torch.randint(0, EOS, (8, 20)), torch.arange(8)
    for lengths in (None, prompt):
        whole = losses.corrupt(ids, lengths, MASK, 3, 5, range(8), 8)
        for rows in ([0, 1, 2, 3], [6, 2]):
            part = losses.corrupt(ids[rows], None if lengths is None else lengths[rows], MASK, 3, 5, rows, 8)
            assert all(torch.equal(a[rows], b) for a, b in zip(whole, part))
        for seed, step in ((4, 5), (3, 6)):
            assert not torch.equal(whole[0], losses.corrupt(ids, lengths, MASK, seed, step, range(8), 8)[0])


def test_the_loss_is_the_published_one(either):
    """Against a transcription of LLaDA's guideline code: CE / p at masked tokens, averaged over all tokens."""
    ids = torch.randint(0, EOS, (4, 20))
    got = losses.DiffusionLoss(either, MASK)(ids, seed=3, step=2)
    ratio = mask_ratios(3, 2, range(4), 4)
    noisy, labels, _ = losses.corrupt(ids, None, MASK, 3, 2, range(4), 4)
    masked = labels == ids
    assert torch.equal(noisy[~masked], ids[~masked]) and (noisy[masked] == MASK).all() and (labels[~masked] < 0).all()
    loss = torch.nn.functional.cross_entropy(either(noisy).logits[masked], ids[masked], reduction="none")
    expected = (loss / ratio[:, None].expand(4, 20)[masked]).sum() / ids.numel()
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    got.backward()
    assert all(parameter.grad is not None for parameter in either.parameters())


def test_one_step_in_a_hundred_is_cut():
    lengths = [losses.cut_length(0, step, 32) for step in range(2000)]
    cut = [length for length in lengths if length < 32]
    assert all(length >= 1 for length in cut) and len(set(cut)) > 5 and 8 <= len(cut) <= 36  # 20 expected, 3.6 sigma
    packed = PackedText([TEXT], train_tokenizer([TEXT], 300, 64), 32)
    for evaluation in (False, True):
        run = Run(packed, 2, 2000, 0, evaluation)
        collated = Masked(default_data_collator, 299, 0)
        for step in (0, lengths.index(min(lengths))):
            batch = collated([run[2 * step], run[2 * step + 1]]) if not evaluation else collated([run[0], run[1]])
            assert batch["input_ids"].shape[1] == (32 if evaluation else lengths[step])


def test_fine_tuning_goes_on_from_a_model_and_learns_answers(tmp_path, text, asked):
    """The held-out loss of answers falls, starting from pre-trained weights."""
    first = run(tmp_path / "first", text, "--steps", "2", "--save-every", "2")
    options = ["--model", str(first), "--steps", "80", "--save-every", "20", "--lr", "1e-2", "--eval-data", str(asked)]
    final = run(tmp_path / "run", asked, *options, command="sft")
    rows = [line.split(",") for line in (tmp_path / "run" / "loss.csv").read_text().split()[1:]]
    losses = [float(row[2]) for row in rows if row[2]]
    assert len(losses) == 4 and losses[-1] < 0.5 * math.log(300)
    recipe = json.loads((final / "recipe.json").read_text())
    assert recipe["rows"] == 320 and recipe["started_from"]["steps"] == 2


def test_prompts_are_seen_and_answers_end():
    tokenizer = train_tokenizer([TEXT], 300, 64)
    data = PromptAnswers([("1+1=", "2"), ("é", "abc")], tokenizer, 6)
    batch = collate([data[0], data[1]])
    assert batch["prompt_length"].tolist() == [4, 2]  # é is two bytes
    eos = tokenizer.eos_token
    assert [tokenizer.decode(row) for row in batch["input_ids"]] == [f"1+1=2{eos}", f"éabc{eos}"]
    batch = collate([data[0], ([1], [2, 3, 9])])
    assert batch["input_ids"][1].tolist() == [1, 2, 3, 9, 9, 9]
    with pytest.raises(ValueError, match="takes 6 tokens, more than --length 5"):
        PromptAnswers([("1+1=", "2")], tokenizer, 5)


def test_the_fine_tuning_loss_is_the_published_one(llada):
    """Against a transcription of LLaDA's guideline code: unmasked prompts, CE / p / answer length, mean over rows."""
    ids, prompt = torch.randint(0, EOS, (4, 20)), torch.tensor([0, 5, 12, 19])
    loss = losses.DiffusionLoss(llada)
    got = loss(ids, prompt, seed=3)
    ratio = mask_ratios(3, 0, range(4), 4)
    noisy, _, _ = losses.corrupt(ids, None, MASK, 3, 0, range(4), 4)
    expected = torch.zeros(())
    for row in range(4):
        noisy[row, : prompt[row]] = ids[row, : prompt[row]]
        masked = noisy[row] == MASK
        logits = llada(noisy[row : row + 1]).logits[0, masked]
        nll = torch.nn.functional.cross_entropy(logits, ids[row, masked], reduction="sum")
        expected = expected + nll / ratio[row] / (20 - prompt[row]) / 4
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss(ids, 0 * prompt, seed=3), loss(ids, seed=3), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"prompt": "x"}', '{"prompt": "x", "answer": ""}'])
def test_a_line_without_prompt_and_answer_is_named(tmp_path, line, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "x", "answer": "y"}\n\n' + line + "\n")
    assert training.main(["sft", "--data", str(path), "--out", str(tmp_path / "x"), *SMALL]) == 2
    assert "line 3 of" in capsys.readouterr().err
    path.write_text("\n")
    assert training.main(["sft", "--data", str(path), "--out", str(tmp_path / "x"), *SMALL]) == 2
    assert "holds no text" in capsys.readouterr().err


def test_a_shipped_model_is_trained_on_and_an_unknown_one_is_named(tmp_path, text, capsys):
    options = ["--model", "modernbert-kjv", "--steps", "1", "--save-every", "1"]
    final = run(tmp_path / "run", text, *options)
    recipe = json.loads((final / "recipe.json").read_text())
    assert recipe["steps"] == 1 and recipe["started_from"]["steps"] > 1
    assert training.main(["pretrain", "--data", str(text), "--out", str(tmp_path / "x"), "--model", "./none"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --model: ./none: ")


@pytest.mark.parametrize("command", ["pretrain", "sft"])
@pytest.mark.parametrize("name", ["data.bin", "data.jsonl"])
def test_a_binary_file_is_named(tmp_path, command, name, capsys):
    path = tmp_path / name
    path.write_bytes(b"PK\x03\x04\xff\xfe\x00")
    for option in ("--data", "--eval-data"):
        good = tmp_path / "good.jsonl"
        good.write_text('{"text": "x", "prompt": "x", "answer": "y"}\n')
        files = ["--data", str(good)] if option == "--eval-data" else []
        assert training.main([command, *files, option, str(path), "--out", str(tmp_path / "x"), *SMALL]) == 2
        assert capsys.readouterr().err == f"error: {option}: {path} is not UTF-8 text (byte 4)\n"


@pytest.mark.parametrize("line", ['{"story": "x"}', "nonsense", "[1]", '"x"', '{"text": 1}'])
@pytest.mark.parametrize("template", ["{text}", "{text.x}", "{0}", "{text"])
def test_a_line_that_the_template_does_not_fit_is_one_line_of_error(tmp_path, line, template, capsys):
    if (line, template) == ('{"text": 1}', "{text}"):
        return  # a number is formatted as it is
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n' * (template == "{text}") + line + "\n")
    options = ["--data", str(path), "--template", template, "--out", str(tmp_path / "x")]
    assert training.main(["pretrain", *options, *SMALL]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("error: --data: line ") and f"{path}" in err and template in err


@pytest.mark.parametrize(
    "error, code",
    [
        (OSError(28, "No space left on device", "checkpoint-4"), 2),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"), 2),
        (MemoryError(), 2),
        (BrokenPipeError(), 0),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, BaseException) else str(x),
)
def test_errors_of_the_machine_are_a_line(tmp_path, text, capsys, monkeypatch, error, code):
    def fail(args):
        raise error

    monkeypatch.setattr(training, "train", fail)
    with (tmp_path / "printed").open(
        "w"
    ) as printed:  # a closed pipe redirects it, which must not be pytest's own output
        monkeypatch.setattr("sys.stdout", printed)
        assert training.main(["pretrain", "--data", str(text), "--out", str(tmp_path / "x"), *SMALL]) == code
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    if code == 2:
        assert printed == f"error: {one_line(error)}\n"
    assert ("--resume" in printed and "stopped" in printed) == (code == 130)


def test_an_error_of_the_program_keeps_its_traceback(tmp_path, text, monkeypatch):
    monkeypatch.setattr(training, "train", lambda args: {}["x"])
    with pytest.raises(KeyError):
        training.main(["pretrain", "--data", str(text), "--out", str(tmp_path / "x"), *SMALL])
