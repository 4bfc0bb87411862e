"""Reads evaluations' options and requests, and cuts prompts to fit."""

from typing import NamedTuple

from dllm_fast.decoding.spelling import policy_of
from dllm_fast.decoding.values import require

LIMITS = (
    "max_gen_toks",
    "max_new_tokens",
    "max_tokens",
    "max_completion_tokens",
)  # lm-eval's names; the first one wins


def spelled_options(**texts: str | None) -> dict:
    """Parse `generate`'s policies, ``schedule`` for example, spelled as on the command line; None is left out."""
    return {name: policy_of(name, str(text)) for name, text in texts.items() if text is not None}


class Sampling(NamedTuple):
    """`generate`'s options that say how tokens are drawn."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0


def request_options(given: dict, limit: int, default: Sampling) -> tuple[list[str], int, Sampling]:
    """(stop strings, most tokens of an answer, how it is drawn) of an evaluation's request.

    ``limit`` and ``default`` are for what it does not say. ``do_sample: false`` means temperature 0, which ignores all
    other sampling options. At any other temperature, an option that would change the distribution (``min_p``, for
    example) raises a ValueError.
    """
    given = {name: value for name, value in given.items() if value is not None}
    until = given.pop("until", [])
    limits = [given.pop(name) for name in LIMITS if name in given]
    asked = Sampling(*(given.pop(name, getattr(default, name)) for name in Sampling._fields))
    temperature = float(asked.temperature) if given.pop("do_sample", True) else 0.0
    sampling = asked._replace(temperature=temperature) if temperature else Sampling()
    rest = ", ".join(f"{name}={value!r}" for name, value in given.items())
    require(not rest or temperature == 0, f"generation_kwargs: {rest} at temperature {temperature} is not supported")
    return [until] if isinstance(until, str) else list(until), int(limits[0]) if limits else limit, sampling


def whole_blocks(tokens: int, block_length: int) -> int:
    """``tokens`` rounded up to a multiple of ``block_length``."""
    return -(-tokens // block_length) * block_length


def last_of(prompt: list[int], room: int, name: str) -> list[int]:
    """The last ``room`` tokens of a prompt. Raises ValueError if there is no room at all."""
    require(room > 0, f"{name}: leaves no room for a prompt in the model's positions")
    return prompt[-room:]
