"""Fine-tuning of pretrained masked language models: chats, [MASK] for a vocabulary without it, adapters, GPTs."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_plain import SIZES, make
from tiny import SEED, make_llada
from tokenizers import Tokenizer, models
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)  # fmt: skip

import dllm_fast
from dllm_fast.families import gpt
from dllm_fast.train import head_loss, losses, training
from dllm_fast.train.chat import TEMPLATE, ChatCorruption, Chats, chats
from dllm_fast.train.data import Place, save_tokenizer, train_characters, train_tokenizer
from dllm_fast.train.masking import Masking
from dllm_fast.train.models import pretrained

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "user", "assistant", ":", *"abcdefghijk", "=", "+"]
FAST = ["--length", "32", "--batch", "4", "--log-every", "1", "--warmup", "2", "--save-dtype", "float32"]
FAST += ["--threads", "1", "--cpu"]


def chat(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]


TALKS = [chat(f"{a} + {b} =", f"{b} {a} {a}") for a in "abcdefg" for b in "hijk"]


@pytest.fixture
def talks(tmp_path):
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in TALKS))
    return path


def folder_of(kind: str, folder):
    """The folder of a small BERT or RoBERTa with a word tokenizer."""
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(SEED)
    sizes = {**SIZES, "vocab_size": len(WORDS), "max_position_embeddings": 66, "hidden_dropout_prob": 0.0}
    model = BertForMaskedLM(BertConfig(**sizes)) if kind == "bert" else RobertaForMaskedLM(RobertaConfig(**sizes))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def bert(tmp_path):
    return folder_of("bert", tmp_path / "bert")


def test_only_the_assistants_tokens_are_its_own(bert):
    tokenizer = pretrained(str(bert))[1]
    rows = Chats([chat("a b", "c", "d", "e f")], tokenizer, 32)
    ids, own = rows[0]
    text = "[CLS] user : a b [SEP] assistant : c [SEP] user : d [SEP] assistant : e f [SEP]"
    assert tokenizer.convert_ids_to_tokens(ids) == text.split()
    assert [n for n, mark in enumerate(own) if mark] == [8, 9, 16, 17, 18] and rows.tokens(0) == 19
    # A prompt has the ids that a row begins with.
    prompt = tokenizer.apply_chat_template(chat("a b"), add_generation_prompt=True, return_dict=False)
    assert prompt == ids[:8]


def test_a_template_with_markers_is_kept_and_its_rows_end():
    tokenizer = train_tokenizer(["user assistant"], 300, 64)
    own = "{% for m in messages %}<{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    own += "{% else %}{{ m.content }}{% endif %}>{% endfor %}"
    tokenizer.chat_template = own
    ids, marks = Chats([chat("ab", "cd")], tokenizer, 32)[0]
    assert tokenizer.decode(ids) == "<ab><cd>" + tokenizer.eos_token and tokenizer.chat_template == own
    assert tokenizer.decode([i for i, mark in zip(ids, marks) if mark]) == "cd" + tokenizer.eos_token
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"  # marks nothing
    Chats([chat("ab", "cd")], tokenizer, 32)
    assert tokenizer.chat_template == TEMPLATE


def test_mask_ratios_of_chats_are_uniform_in_the_range():
    """Long rows: their shares spread evenly over 15 to 99 %; the prompt stays; the weights average a row's masked."""
    long = ([1] * 8 + [2] * 400, [False] * 8 + [True] * 400)
    corrupt = ChatCorruption(lambda rows: {}, 9, 0, Masking(ratio=(0.15, 0.99), weighting="none"))
    shares = []
    for step in range(100):
        batch = corrupt([(long, Place(step, row, 8, 410)) for row in range(8)])
        masked = batch["masked_labels"] != losses.IGNORED
        assert (batch["input_ids"][:, :8] == 1).all() and not masked[:, :8].any()
        assert torch.equal(batch["input_ids"][masked], torch.full_like(batch["input_ids"][masked], 9))
        assert masked[:, -2:].any()  # the end of text that fills a row belongs to the answer
        torch.testing.assert_close(batch["weight"], 1 / masked.sum(1))
        shares.append(masked.sum(1) / 402)
    share = torch.stack(shares)
    assert (share.min() > 0.05 and share.max() == 1.0) or share.max() > 0.95
    assert abs(float(share.mean()) - 0.57) < 0.01
    counts = torch.histc(share, 7, 0.15, 0.99) / share.numel()
    assert (counts - 1 / 7).abs().max() < 0.02


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt"])
def test_the_loss_on_labelled_positions_is_that_of_all_logits(kind, monkeypatch):
    """Its gradients too; and no more than a row of logits is computed at once."""
    model = make(kind)
    head = model.get_output_embeddings()
    monkeypatch.setattr(head_loss, "ELEMENTS", len(head.weight))
    ids = torch.randint(5, 90, (3, 12))
    labels = torch.where(torch.rand(3, 12) < 0.5, ids, losses.IGNORED)
    expected = torch.nn.functional.cross_entropy(model(ids).logits.mT, labels, reduction="none").sum(1)
    exact = torch.autograd.grad(expected.sum(), list(model.parameters()))
    monkeypatch.setattr(head, "forward", None)  # whoever computes all logits by calling it fails
    monkeypatch.setattr(losses, "plain", lambda linear: linear is head)
    found = losses.masked_nll(model, ids, labels)
    torch.testing.assert_close(found, expected)
    for got, gradient in zip(torch.autograd.grad(found.sum(), list(model.parameters())), exact):
        torch.testing.assert_close(got, gradient, atol=1e-5, rtol=1e-4)


def test_a_bert_learns_to_answer_and_is_sampled(tmp_path, bert, talks):
    options = ["--model", str(bert), "--steps", "500", "--save-every", "500", "--lr", "5e-3", "--eval-data", str(talks)]
    out = tmp_path / "run"
    assert training.main(["sft", "--data", str(talks), "--out", str(out), *FAST, *options]) == 0
    rows = [line.split(",") for line in (out / "loss.csv").read_text().split()[1:]]
    assert float(next(row[2] for row in rows if row[2])) < 0.5
    model = dllm_fast.load_plain(str(out / "final"))
    tokenizer = AutoTokenizer.from_pretrained(out / "final")
    assert type(model) is BertForMaskedLM and model.config.mask_token_id == 4
    right = 0
    for talk in TALKS[::4]:
        prompt = tokenizer.apply_chat_template(
            talk[:1], add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        made = dllm_fast.generate_plain(model, prompt, gen_length=5, block_length=5, eos_id=tokenizer.eos_token_id)
        answer = tokenizer.decode(made.sequences[0, prompt.shape[1] :], skip_special_tokens=True)
        right += answer == talk[1]["content"]
    assert right >= 5


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_resumed_run_on_chats_is_the_uninterrupted_one(tmp_path, talks, kind):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = ["sft", "--data", str(talks), "--model", str(folder_of(kind, tmp_path / kind)), *FAST, "--steps", "4"]
    for out, save in ((whole, "4"), (cut, "2")):
        assert training.main([*options, "--out", str(out), "--save-every", save]) == 0
    expected = load_file(whole / "final" / "model.safetensors")
    shutil.rmtree(cut / "final")
    shutil.rmtree(cut / "checkpoint-4")
    assert training.main([*options, "--out", str(cut), "--save-every", "2", "--resume"]) == 0
    found = load_file(cut / "final" / "model.safetensors")
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in found)


def test_adapters_alone_are_trained_saved_and_merged(tmp_path, bert, talks):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    out = tmp_path / "run"
    options = ["--model", str(bert), "--steps", "4", "--save-every", "2", "--lora", "4"]
    assert training.main(["sft", "--data", str(talks), "--out", str(out), *FAST, *options]) == 0
    before, merged = dllm_fast.load_plain(str(bert)), dllm_fast.load_plain(str(out / "final"))
    moved = {name for name, value in merged.state_dict().items() if not torch.equal(value, before.state_dict()[name])}
    assert moved and all("weight" in name and "LayerNorm" not in name for name in moved)
    embedding = "bert.embeddings.word_embeddings.weight"
    rows = (merged.state_dict()[embedding] != before.state_dict()[embedding]).any(1)
    assert set(rows.nonzero()[:, 0].tolist()) <= {4}
    again = peft.PeftModel.from_pretrained(before, str(out / "adapter")).eval()
    ids = torch.tensor([[2, 5, 4, 9, 4]])
    torch.testing.assert_close(again(ids).logits, merged(ids).logits, atol=1e-5, rtol=1e-5)


def test_adapters_of_a_llada_are_merged(tmp_path, talks):
    pytest.importorskip("peft", reason="peft is not installed")
    sizes = [
        "--width",
        "32",
        "--layers",
        "2",
        "--heads",
        "2",
        "--ffn",
        "48",
        "--positions",
        "64",
        "--vocab-size",
        "300",
    ]
    for folder, options in (("base", sizes), ("adapted", ["--model", str(tmp_path / "base" / "final"), "--lora", "4"])):
        out = ["--out", str(tmp_path / folder), "--steps", "2", "--save-every", "2", "--length", "64"]
        assert training.main(["sft", "--data", str(talks), *FAST, *out, *options]) == 0
    before, after = (load_file(tmp_path / folder / "final" / "model.safetensors") for folder in ("base", "adapted"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    embedding = "model.transformer.wte.weight"
    assert before.keys() == after.keys() and moved - {embedding} and all(".blocks." in n for n in moved - {embedding})
    rows = (before[embedding] != after[embedding]).any(1)
    mask_id = AutoTokenizer.from_pretrained(tmp_path / "base" / "final").mask_token_id
    assert set(rows.nonzero()[:, 0].tolist()) <= {mask_id}
    assert (tmp_path / "adapted" / "adapter" / "adapter_config.json").exists()


@pytest.mark.parametrize("family", ["llada", "gpt2"])
def test_a_vocabulary_without_a_mask_token_grows(tmp_path, family):
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2, "[END]": 3}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="[END]")
    torch.manual_seed(SEED)
    if family == "llada":
        model = make_llada(vocab_size=4, mask_token_id=None, eos_token_id=3, pad_token_id=3)
    else:
        ids = {"bos_token_id": 3, "eos_token_id": 3}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=4, n_embd=32, n_head=2, n_layer=1, n_positions=64, **ids))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rows = model.get_input_embeddings().weight
    model, tokenizer = pretrained(str(tmp_path))
    assert model.config.mask_token_id == tokenizer.mask_token_id == 4 and tokenizer.mask_token == "[MASK]"
    grown = model.get_input_embeddings().weight
    assert len(grown) == 5 and torch.equal(grown[:4], rows)
    model.save_pretrained(tmp_path / "grown")
    load = dllm_fast.load_plain if family == "gpt2" else dllm_fast.from_pretrained
    again = load(str(tmp_path / "grown"))
    assert again.config.mask_token_id == 4 and again(torch.tensor([[4, 1]])).logits.shape == (1, 2, 5)


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"messages": 3}', 'line 2 of .* is not {"messages": '),
        ('{"messages": [{"role": "user"}]}', "line 2 of .* is not"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "line 2 of .* has no assistant turn"),
        ('{"messages": [{"role": "assistant", "content": " "}]}', "line 2 of .* has no assistant turn"),
    ],
)
def test_a_line_that_is_no_chat_is_named(tmp_path, talks, line, message):
    talks.write_text(json.dumps({"messages": TALKS[0]}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        chats(talks)


def test_what_does_not_fit_is_named(tmp_path, bert, talks, capsys, monkeypatch):
    def error(*more):
        arguments = ["sft", "--data", str(talks), "--out", str(tmp_path / "x"), *FAST, "--model", str(bert), *more]
        assert training.main(arguments) == 2
        return capsys.readouterr().err

    assert "chat 1 takes 14 tokens, more than --length 8" in error("--length", "8")
    assert "--length: 67 exceeds the model's 66 positions" in error("--length", "67")
    assert "--mask-ratio: Masking: ratio=(0.9, 0.2) is not" in error("--mask-ratio", "0.9", "0.2")
    assert "--shifted: " in error("--shifted")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "--lora: adapters are not gathered" in error("--lora", "4")
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    talks.write_text(json.dumps({"messages": chat("a", "b [MASK]")}) + "\n")
    assert "chat 1 spells the mask token '[MASK]'" in error()


def test_a_character_has_a_token(tmp_path):
    tokenizer = train_characters(["To be,\n\nor not"], 64)
    save_tokenizer(tokenizer, tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    ids = again("or\n\nbe,")["input_ids"]
    assert len(ids) == 7 and again.decode(ids) == "or\n\nbe," and again("x")["input_ids"] == [again.unk_token_id]
    assert again.mask_token_id == len(again) - 1


def test_a_gpt_without_its_causal_mask_is_pretrained_on_characters(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("abcd\n\n" * 200)
    sizes = ["--width", "32", "--layers", "2", "--heads", "2", "--ffn", "64", "--positions", "64", "--lr", "1e-2"]
    options = ["--family", "gpt", "--tokenizer", "char", "--steps", "100", "--save-every", "100", *sizes]
    out = tmp_path / "run"
    assert training.main(["pretrain", "--data", str(text), "--out", str(out), *FAST, *options]) == 0
    model = dllm_fast.load_plain(str(out / "final"))
    tokenizer = AutoTokenizer.from_pretrained(out / "final")
    assert type(model) is gpt.BidirectionalGPT2LMHeadModel
    assert falls(out)
    ids = torch.tensor([[tokenizer.mask_token_id, *tokenizer("bcd\n\n")["input_ids"]]])
    made = dllm_fast.generate_plain(model, ids, gen_length=6, block_length=6, schedule=dllm_fast.Pyramid())
    assert set(tokenizer.decode(made.sequences[0])) <= set("abcd\n")
    further = ["--model", str(out / "final"), "--tokenizer", "char", "--steps", "1", "--save-every", "1"]
    assert training.main(["pretrain", "--data", str(text), "--out", str(tmp_path / "more"), *FAST, *further]) == 0


def falls(out):
    """Whether a run's last losses are well below its first."""
    losses = [float(line.split(",")[1]) for line in (out / "loss.csv").read_text().split()[1:]]
    return sum(losses[-10:]) < 0.6 * sum(losses[:10])


@pytest.mark.parametrize("shifted", [False, True])
def test_training_goes_on_from_an_autoregressive_checkpoint(tmp_path, shifted):
    text, folder = tmp_path / "text.txt", tmp_path / "gpt2"
    text.write_text("abcd\n\n" * 100)
    tokenizer = train_characters([text.read_text()], 64)
    torch.manual_seed(SEED)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_head=2, n_layer=1, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    options = ["--model", str(folder), "--tokenizer", "char", "--steps", "60", "--save-every", "60", "--lr", "1e-2"]
    options += ["--shifted"] if shifted else []
    out = tmp_path / "run"
    assert training.main(["pretrain", "--data", str(text), "--out", str(out), *FAST, *options]) == 0
    assert falls(out)
    assert dllm_fast.load_plain(str(out / "final")).config.shifted == shifted
