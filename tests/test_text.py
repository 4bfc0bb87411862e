"""Text that spells the mask token stays text, wherever it comes from; named tokens; answers as text."""

from pathlib import Path

import pytest
from transformers import AddedToken, AutoTokenizer

import dllm_fast
from dllm_fast.cli import main as cli
from dllm_fast.decoding.text import answer_text, encode, held_back, token_ids
from dllm_fast.train.data import PackedText, PromptAnswers

SENTENCE = "Replace the token [MASK] in BERT"
SHIPPED = ("llada-gsm8k", "modernbert-kjv")


def load(name="llada-gsm8k"):
    return AutoTokenizer.from_pretrained(dllm_fast.model_path(name))


def like_llada():
    """Another spelling, mixed with other special tokens, that the tokenizer does not declare as its mask."""
    tokenizer = load()
    more = ["<|mdm_mask|>", "<|eot_id|>", "<|start_header_id|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": more})
    tokenizer.mask_token = None
    return tokenizer, tokenizer.convert_tokens_to_ids("<|mdm_mask|>")


def that_swallows_spaces():
    """Like ModernBERT's: a [MASK] includes the space before it."""
    tokenizer = load()
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True, rstrip=True, special=True)], special_tokens=True)
    return tokenizer, tokenizer.convert_tokens_to_ids("<mask>")


KINDS = {name: lambda name=name: (load(name), load(name).mask_token_id) for name in SHIPPED}
KINDS |= {"like LLaDA's": like_llada, "that swallows spaces": that_swallows_spaces}


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def kind(request):
    return request.param()


def test_documents_come_back_as_they_are(kind):
    tokenizer, mask_id = kind
    word = tokenizer.convert_ids_to_tokens(mask_id)
    documents = [
        "no such word", "", word, f"{word}{word}", f" {word} ", f"Replace the token {word} in BERT", f"a{word}",
        f"{word}, then\n{word}\n\n", f"{word[:-1]} {word} {word[1:]}", f"über {word} 中文",
    ]  # fmt: skip
    plain = tokenizer(documents, add_special_tokens=False)["input_ids"]
    found = encode(tokenizer, documents, mask_id)
    assert [tokenizer.decode(ids) for ids in found] == documents
    assert not any(mask_id in ids for ids in found) and sum(mask_id in ids for ids in plain) == 8
    assert all(a == b for a, b in zip(plain, found) if mask_id not in a)
    assert encode(tokenizer, [], mask_id) == [] and encode(tokenizer, documents[:1], None) == plain[:1]


def test_other_special_tokens_stay_what_they_are():
    tokenizer, mask_id = like_llada()
    begin, end = (tokenizer.convert_tokens_to_ids(t) for t in ("<|start_header_id|>", "<|eot_id|>"))
    (ids,) = encode(tokenizer, [f"<|start_header_id|>user <|mdm_mask|><|eot_id|>{SENTENCE}"], mask_id)
    assert ids[0] == begin and ids.count(end) == 1 and mask_id not in ids
    assert tokenizer.decode(ids).startswith("<|start_header_id|>user <|mdm_mask|><|eot_id|>Replace")


def test_special_tokens_that_are_added_stay_around_it():
    from tokenizers.processors import TemplateProcessing

    tokenizer = load()
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[PAD] $A <|endoftext|>", special_tokens=[("[PAD]", pad), ("<|endoftext|>", eos)]
    )
    (ids,) = encode(tokenizer, [SENTENCE], tokenizer.mask_token_id, add_special_tokens=True)
    assert (ids[0], ids[-1]) == (pad, eos) and tokenizer.decode(ids[1:-1]) == SENTENCE
    assert tokenizer.mask_token_id not in ids


def test_a_mask_that_cannot_be_spelled_is_named(monkeypatch):
    tokenizer = load()
    mask_id = tokenizer("Tom", add_special_tokens=False)["input_ids"][0]
    monkeypatch.setattr(type(tokenizer), "convert_ids_to_tokens", lambda self, i: "#")
    with pytest.raises(ValueError, match="'Tom has 3': this tokenizer cannot write '#'"):
        encode(tokenizer, ["Tom has 3"], mask_id)


def test_prompts_have_masks_where_they_ask_for_them(kind):
    tokenizer, mask_id = kind
    word = tokenizer.convert_ids_to_tokens(mask_id)
    ids = cli.encode(tokenizer, rf"The [MASK][MASK] of \[MASK] and {word.replace('[', chr(92) + '[')}.", mask_id, False)
    assert ids.shape[0] == 1 and ids[0].tolist().count(mask_id) == 2
    assert tokenizer.decode(ids[0][ids[0] != mask_id]) == f"The  of [MASK] and {word}."
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<bot>"
    ids = cli.encode(tokenizer, r"one [MASK], no \[MASK]", mask_id, True)[0]
    assert ids.tolist().count(mask_id) == 1
    assert tokenizer.decode(ids[ids != mask_id]) in ("<user>one , no [MASK]<bot>", "<user>one, no [MASK]<bot>")


def test_a_literal_mask_goes_through_the_command_line(capsys):
    prompt = r"Tom has [MASK] apples and a \[MASK]."
    assert cli.main(["generate", "--model", "llada-gsm8k", "--gen-length", "0", "--quiet", "--prompt", prompt]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Tom has") and out.rstrip().endswith("apples and a [MASK].") and out.count("[MASK]") == 1


def test_training_text_has_no_mask_in_it():
    tokenizer = load()
    packed = PackedText([SENTENCE] * 40, tokenizer, 16)
    assert not (packed.rows == tokenizer.mask_token_id).any() and SENTENCE in tokenizer.decode(packed.rows.flatten())
    ((prompt, answer),) = PromptAnswers([(SENTENCE, "[MASK]")], tokenizer, 64).rows
    assert tokenizer.decode(prompt) == SENTENCE and tokenizer.decode(answer) == "[MASK]<|endoftext|>"
    assert tokenizer.mask_token_id not in prompt + answer


def test_an_answer_keeps_text_that_spells_special_tokens(kind):
    tokenizer, mask_id = kind
    word, eos = tokenizer.convert_ids_to_tokens(mask_id), tokenizer.eos_token_id
    (ids,) = encode(tokenizer, [f"The token {word} is BERT's."], mask_id)
    assert answer_text(tokenizer, [*ids, eos, *ids], [eos]) == f"The token {word} is BERT's."
    assert answer_text(tokenizer, [*ids, mask_id, *ids], [eos]) == f"The token {word} is BERT's." * 2
    assert answer_text(tokenizer, [mask_id, *ids], [eos], [" is"]) == f"The token {word}"
    assert answer_text(tokenizer, [*ids[:2], mask_id, *ids], [eos], [word]) == tokenizer.decode(ids[:2])


def test_a_stop_string_may_be_a_special_token():
    tokenizer, mask_id = like_llada()
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    (ids,) = encode(tokenizer, ["So it is."], mask_id)
    assert answer_text(tokenizer, [*ids, end, *ids], [tokenizer.eos_token_id], ["<|eot_id|>"]) == "So it is."
    assert answer_text(tokenizer, [*ids, end, *ids], [tokenizer.eos_token_id]) == "So it is.So it is."


def test_tokens_by_id_and_by_name():
    tokenizer, _ = like_llada()
    eos, turn = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|eot_id|>")
    for given in (f"{eos},<|eot_id|>", f"<|endoftext|> , {turn}", f"{eos}+{turn}", [eos, "<|eot_id|>"], (eos, turn)):
        assert token_ids("--defer-tokens", given, tokenizer) == [eos, turn]
    assert token_ids("x", None, tokenizer) == [] and token_ids("x", 5, tokenizer) == [5]
    for wrong in ("<|nothing|>", "", "-3", "1.5"):
        with pytest.raises(ValueError) as raised:
            token_ids("--defer-tokens", wrong, tokenizer)
        assert f"--defer-tokens: {wrong!r} is neither an id nor a token" in str(raised.value)


def test_lladas_names():
    tokenizer, _ = like_llada()
    eos, turn = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert held_back(tokenizer) == {"suppress_tokens": [], "defer_tokens": []}
    assert held_back(tokenizer, logits_eos_inf=True) == {"suppress_tokens": [eos], "defer_tokens": []}
    assert held_back(tokenizer, confidence_eos_eot_inf=True) == {"suppress_tokens": [], "defer_tokens": [eos, turn]}
    both = held_back(tokenizer, "5", "6", True, True)
    assert both == {"suppress_tokens": [5, eos], "defer_tokens": [6, eos, turn]}
    assert held_back(load(), confidence_eos_eot_inf=True)["defer_tokens"] == [load().eos_token_id]
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no end of text"):
        held_back(tokenizer, logits_eos_inf=True)


def test_the_command_line_hands_them_on(monkeypatch, capsys):
    seen = []

    def generate(model, ids, **options):
        seen.append((options["suppress_tokens"], options["defer_tokens"]))
        return real(model, ids, **options)

    real = cli.generate
    monkeypatch.setattr(cli, "generate", generate)
    arguments = ["generate", "--model", "llada-gsm8k", "--gen-length", "32", "--quiet", "--prompt", "Tom has"]
    assert cli.main([*arguments, "--suppress-tokens", "5,6", "--defer-tokens", "<|endoftext|>"]) == 0
    assert seen == [([5, 6], [load().eos_token_id])]
    assert cli.main([*arguments, "--defer-tokens", "<|none|>"]) == 2
    assert "--defer-tokens: '<|none|>' is neither an id nor a token" in capsys.readouterr().err
    assert cli.main([*arguments, "--suppress-tokens", "999999"]) == 2
    assert "suppress_tokens[0]=999999 is not an id" in capsys.readouterr().err


def test_the_plugins_entry_point_is_the_model():
    """lm-eval's main branch loads a name in the group `lm_eval.models` when it is asked for."""
    import importlib.metadata

    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    (declared,) = project["entry-points"]["lm_eval.models"].items()
    name, value = declared
    assert name == "dllm_fast"
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install '.[eval]'")
    loaded = importlib.metadata.EntryPoint(name, value, "lm_eval.models").load()
    from lm_eval.api.model import LM
    from lm_eval.api.registry import get_model

    assert issubclass(loaded, LM)
    # The decorator and the entry point must register the same object, or lm-eval refuses the second.
    assert get_model("dllm_fast") is loaded and value == f"{loaded.__module__}:{loaded.__name__}"
