"""Between text and ids: text that spells the mask token is text, tokens named on a command line, answers as text."""

import re
from collections.abc import Sequence
from typing import TypedDict

from dllm_fast.decoding.request import before_end


class HeldBack(TypedDict):
    suppress_tokens: list[int]
    defer_tokens: list[int]


END_OF_TURN = "<|eot_id|>"  # in LLaDA's chats, where it ends an answer before the end of text does


def encode(tokenizer, texts: list[str], mask_id: int | None, add_special_tokens: bool = False) -> list[list[int]]:
    """Ids of each text, in which none is ``mask_id``: a document that says [MASK] has nothing to be filled in.

    Other special tokens are what the tokenizer makes of them. Raises ValueError for a text that cannot be written
    without the mask token.
    """
    found = tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)["input_ids"] if texts else []
    return [
        ids if mask_id is None or mask_id not in ids else _spelled_out(tokenizer, text, mask_id, ids)
        for text, ids in zip(texts, found)
    ]


def _spelled_out(tokenizer, text: str, mask_id: int, whole: list[int]) -> list[int]:
    """Ids of ``text``, cut within each spelling of the mask token, and what ``whole`` has before and behind them."""

    def plain(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]

    bare = plain(text)
    begin = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    spelling = tokenizer.convert_ids_to_tokens(mask_id)
    first, *rest = text.split(spelling)
    parts = [first, *(spelling[1:] + part for part in rest)]
    ids = [i for part in parts[:-1] for i in plain(part + spelling[0])] + plain(parts[-1])
    if mask_id in ids:
        raise ValueError(f"{text[:80]!r}: this tokenizer cannot write {spelling!r} without the mask token")
    return whole[:begin] + ids + whole[begin + len(bare) :]


def token_ids(name: str, text: str | int | Sequence | None, tokenizer) -> list[int]:
    """Ids of tokens that are named by id or by content, with a comma or a plus between: ``126081,<|eot_id|>``.

    Raises ValueError that names ``name`` for what is no token of the tokenizer's.
    """
    if text is None:
        return []
    items = text if isinstance(text, list | tuple) else re.split("[,+]", str(text))
    known, ids = tokenizer.get_vocab(), []
    for item in (str(item).strip() for item in items):
        if not item.isdecimal() and item not in known:
            raise ValueError(f"{name}: {item!r} is neither an id nor a token of the tokenizer's")
        ids.append(int(item) if item.isdecimal() else known[item])
    return ids


def held_back(
    tokenizer,
    suppress_tokens: str | int | Sequence | None = None,
    defer_tokens: str | int | Sequence | None = None,
    logits_eos_inf: bool = False,
    confidence_eos_eot_inf: bool = False,
) -> HeldBack:
    """`generate`'s ``suppress_tokens`` and ``defer_tokens`` from tokens as `token_ids` reads them, and from LLaDA's
    options: ``logits_eos_inf`` suppresses the end of text, ``confidence_eos_eot_inf`` defers it and a chat's end of
    turn, ``<|eot_id|>``, where the tokenizer has one."""
    suppress, defer = token_ids("suppress_tokens", suppress_tokens, tokenizer), []
    defer += token_ids("defer_tokens", defer_tokens, tokenizer)
    if (logits_eos_inf or confidence_eos_eot_inf) and tokenizer.eos_token_id is None:
        raise ValueError("logits_eos_inf, confidence_eos_eot_inf: the tokenizer has no end of text")
    if logits_eos_inf:
        suppress.append(tokenizer.eos_token_id)
    if confidence_eos_eot_inf:
        turn = tokenizer.get_added_vocab().get(END_OF_TURN)
        defer += [tokenizer.eos_token_id] if turn is None else [tokenizer.eos_token_id, turn]
    return {"suppress_tokens": suppress, "defer_tokens": defer}


def before_stop(text: str, until: Sequence[str]) -> str:
    """The text up to the first of the stop strings; empty ones stop nothing."""
    return text[: min((text.index(stop) for stop in until if stop and stop in text), default=len(text))]


def answer_text(tokenizer, ids: list[int], eos_ids: Sequence[int], until: Sequence[str] = ()) -> str:
    """Generated ids as text: up to the end of text, then to the first stop string, then without special tokens.

    In this order, because a stop string may be a special token, as a chat's end of turn is. Text that only looks like a
    special token stays.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    runs: list[list[int]] = []
    for i in before_end(ids, eos_ids):
        if runs and (runs[-1][0] in special) == (i in special):
            runs[-1].append(i)
        else:
            runs.append([i])
    texts = [tokenizer.decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False) for run in runs]
    end, at, kept = len(before_stop("".join(texts), until)), 0, ""
    for run, text in zip(runs, texts):
        if run[0] not in special:
            kept += text[: max(0, end - at)]
        at += len(text)
    return kept
