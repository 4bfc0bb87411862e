"""Between evaluations and the model: options as text, what a request asks for, prompts that fit."""

from dllm_fast.decoding.request import require
from dllm_fast.decoding.spelling import policy_of

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
