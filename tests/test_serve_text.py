"""What a stream's reader is sent: whole characters, no beginning of a stop string, and in sum the answer."""

import pytest

from dllm_fast.decoding.text import answer_text
from dllm_fast.loading import load_tokenizer
from dllm_fast.serve.messages import Block, Draft
from dllm_fast.serve.text import Answer, held

TOKENIZER = load_tokenizer("llada-gsm8k")  # of bytes: a character may be several tokens
MASK = 2047
EOS = TOKENIZER.eos_token_id


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False).input_ids


def told(tokens: list[int], stops=(), eos_ids=(EOS,), length: int = 1000, size: int = 1) -> tuple[list[str], Answer]:
    """What is sent at each block of ``size`` tokens, until there is no more."""
    answer, sent = Answer(TOKENIZER, MASK, eos_ids, stops, length), []
    for begin in range(0, len(tokens), size):
        end = min(begin + size, len(tokens))
        answer.take(Block(0, 0, begin, tokens[begin:end], begin + 1, end == len(tokens)))
        sent.append(answer.news())
        if answer.finish:
            break
    return sent, answer


@pytest.mark.parametrize(
    "text, stops, count",
    [
        ("abc", (), 0),
        ("abc", ("cd",), 1),
        ("abc", ("bcd", "cx"), 2),
        ("abc", ("abc",), 0),  # it would have been found
        ("aab", ("aabaac",), 3),
        ("ab\ufffd\ufffd", ("bc",), 3),
        ("", ("a",), 0),
    ],
)
def test_what_is_held_back(text, stops, count):
    assert held(text, stops) == count


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_pieces_are_the_text(size):
    text = "Tom paid 3 € for an 🍎 — naïve?"
    sent, answer = told(ids(text), size=size)
    assert "".join(sent) == text == answer.text and answer.finish == "length"
    assert not any("\ufffd" in piece for piece in sent) and answer.tokens == len(ids(text))


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("stops", [("apples",), ("les and", "never"), ("and p", "and")], ids=str)
def test_nothing_of_a_stop_string_is_sent(size, stops):
    tokens = ids("Tom has apples and pears and plums.")
    expected = answer_text(TOKENIZER, tokens, (), stops)
    sent, answer = told(tokens, stops, size=size)
    assert "".join(sent) == expected == answer.text and answer.finish == "stop"
    shown = tokens[: answer.tokens]
    assert any(stop in TOKENIZER.decode(shown) for stop in stops)
    assert not any(stop in TOKENIZER.decode(shown[:-1]) for stop in stops)


def test_a_special_token_may_be_a_stop_string():
    tokens = [*ids("one"), EOS, *ids(" two")]
    sent, answer = told(tokens, (TOKENIZER.eos_token,), eos_ids=())
    assert "".join(sent) == "one" and answer.finish == "stop" and answer.tokens == len(ids("one")) + 1
    sent, answer = told(tokens, (), eos_ids=())
    assert "".join(sent) == "one two" and answer.finish == "length"


def test_ends_of_text_and_lengths():
    tokens = [*ids("one two"), EOS, EOS]
    assert told(tokens)[1].finish == "stop" and told(tokens)[1].tokens == len(ids("one two"))
    other = ids("one two three")
    end = told(other, eos_ids=(EOS, other[-1]), size=2)[1]
    assert end.finish == "stop" and end.text == answer_text(TOKENIZER, other[:-1], ())
    cut = told(other, length=2, size=4)[1]
    assert cut.finish == "length" and cut.tokens == 2 and cut.text == answer_text(TOKENIZER, other[:2], ())


def test_what_a_new_worker_tells_again_changes_nothing():
    tokens = ids("one two three four")
    answer = Answer(TOKENIZER, MASK, (EOS,), (), 1000)
    sent = ""
    for begin, end in ((0, 2), (2, 3), (0, 2), (2, 3), (3, len(tokens))):
        answer.take(Block(0, 0, begin, tokens[begin:end], end, end == len(tokens)))
        sent += answer.news()
    assert sent == "one two three four" and answer.nfe == len(tokens)


def test_a_draft_is_a_text_or_nothing_for_each_token():
    answer = Answer(TOKENIZER, MASK, (EOS,), (), length=4)
    one, two = ids("ab")[0], ids("7")[0]
    assert answer.draft(Draft(0, 0, 0, [one, MASK, two])) == [TOKENIZER.decode([one]), None, TOKENIZER.decode([two])]
    assert answer.draft(Draft(0, 0, 0, [one, EOS, two])) == [TOKENIZER.decode([one])]
    assert len(answer.draft(Draft(0, 0, 2, [one] * 8))) == 2  # the rest is cut off
