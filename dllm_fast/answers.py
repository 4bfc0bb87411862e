"""Between evaluations, which ask with text, and the model: options as text, prompts that fit, answers as text."""

from collections.abc import Sequence

from dllm_fast.request import before_end, require
from dllm_fast.spelling import policy_of

LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # lm-eval's names, first one wins


def spelled_options(**texts: str | None) -> dict:
    """`generate`'s ``schedule``, ``refresh`` and ``remask`` from text as on the command line; None is left out."""
    return {name: policy_of(name, str(text)) for name, text in texts.items() if text is not None}


def request_options(given: dict, limit: int, temperature: float) -> tuple[list[str], int, float]:
    """Stop strings, the most tokens an answer has, and the temperature that an evaluation's request asks for.

    ``limit`` and ``temperature`` stand for what the request leaves open. ``do_sample: false`` is temperature 0, and
    whatever else it says of sampling then plays no part; where there is sampling, anything else that would change the
    distribution (``top_p``, say) raises a ValueError.
    """
    given = {name: value for name, value in given.items() if value is not None}
    until = given.pop("until", [])
    limits = [given.pop(name) for name in LIMITS if name in given]
    asked = float(given.pop("temperature", temperature))
    temperature = asked if given.pop("do_sample", True) else 0.0
    rest = ", ".join(f"{name}={value!r}" for name, value in given.items())
    require(not rest or temperature == 0, f"generation_kwargs: {rest} at temperature {temperature} is not supported")
    return [until] if isinstance(until, str) else list(until), int(limits[0]) if limits else limit, temperature


def whole_blocks(tokens: int, block_length: int) -> int:
    """The least multiple of ``block_length`` that holds ``tokens``."""
    return -(-tokens // block_length) * block_length


def last_of(prompt: list[int], room: int, name: str) -> list[int]:
    """The end of a prompt that is longer than ``room``. Raises ValueError where there is none for any of it."""
    require(room > 0, f"{name}: leaves no room for a prompt in the model's positions")
    return prompt[-room:]


def before_stop(text: str, until: Sequence[str]) -> str:
    """The text up to the first of the stop strings; empty ones stop nothing."""
    return text[: min((text.index(stop) for stop in until if stop and stop in text), default=len(text))]


def answer_text(tokenizer, ids: list[int], eos_ids: Sequence[int], until: Sequence[str] = ()) -> str:
    """Generated ids as text: up to the end of text, then to the first stop string, then without special tokens.

    In this order, because a stop string may be a special token, as a chat's end of turn is.
    """
    ids = before_end(ids, eos_ids)
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    text = before_stop(text, until)
    for token in tokenizer.added_tokens_decoder.values():
        if token.special:
            text = text.replace(token.content, "")
    return text
