"""Fine-tuning on chats: only the assistant's tokens are masked.

A chat is text through the tokenizer's own template if that marks what the assistant says with ``{% generation %}``;
else through `TEMPLATE`.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import Dataset

from dllm_fast.train import losses
from dllm_fast.train.data import BadData, Corruption, Masked, lines_of
from dllm_fast.train.trainer import DiffusionTrainer

Message = dict[str, str]
CHAT_RATIO = (0.15, 0.99)  # range of the share of the assistant's tokens that is masked
# Each turn is its role, a colon, its text and the end-of-text token. Nothing stands between colon and text, so that a
# prompt which ends with the colon has the same ids as the beginning of a training row.
TEMPLATE = (
    "{% if cls_token is defined and cls_token %}{{ cls_token }}{% endif %}"
    "{% for message in messages %}{{ message['role'] }}:"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] | trim }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def is_chat(path: Path) -> bool:
    """Whether the first line of a ``.jsonl`` file is a chat. Raises `BadData` if the file is not text."""
    for _, line in lines_of(path):
        try:
            return "messages" in json.loads(line)
        except (ValueError, TypeError):
            return False
    return False


def chats(path: Path) -> list[list[Message]]:
    """The chats of a ``.jsonl`` file, each up to its last assistant turn.

    A line is ``{"messages": [{"role": ..., "content": ...}, ...]}``. Raises `BadData`, naming the line, if one is not a
    chat or the assistant says nothing in it.
    """
    found = []
    for number, line in lines_of(path):
        try:
            messages = [{key: message[key] for key in ("role", "content")} for message in json.loads(line)["messages"]]
        except (ValueError, KeyError, TypeError):
            messages = []
        if not messages or not all(isinstance(text, str) for message in messages for text in message.values()):
            wanted = '{"messages": [{"role": a text, "content": a text}, ...]}'
            raise BadData(f"line {number} of {path} is not {wanted}")
        says = [n for n, said in enumerate(messages) if said["role"] == "assistant" and said["content"].strip()]
        if not says:
            raise BadData(f"line {number} of {path} has no assistant turn: there is nothing to learn from it")
        found.append(messages[: says[-1] + 1])
    if not found:
        raise BadData(f"{path} holds no text")
    return found


def set_template(tokenizer) -> None:
    """Give `TEMPLATE` to a tokenizer whose own does not mark the assistant's words, or that has none."""
    if "generation %}" not in (tokenizer.chat_template or ""):
        tokenizer.chat_template = TEMPLATE


class Chats(Dataset):
    """Tokenized chats: (ids, whether each is the assistant's). A row ends with an end-of-text token, which is.

    Raises ValueError, naming the chat, if it is longer than ``length`` or spells the mask token.
    """

    def __init__(self, texts: list[list[Message]], tokenizer, length: int):
        set_template(tokenizer)
        self.rows: list[tuple[list[int], list[bool]]] = []
        for number, messages in enumerate(texts, 1):
            encoded = tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            ids, own = list(encoded["input_ids"]), [bool(mark) for mark in encoded["assistant_masks"]]
            if not any(own):
                raise ValueError(f"--data: chat {number}: the tokenizer's template marks no token as the assistant's")
            if tokenizer.mask_token_id in ids:
                raise ValueError(f"--data: chat {number} spells the mask token {tokenizer.mask_token!r}")
            if ids[-1] != tokenizer.eos_token_id or not own[-1]:
                ids.append(tokenizer.eos_token_id)
                own.append(True)
            if len(ids) > length:
                raise ValueError(f"--data: chat {number} takes {len(ids)} tokens, more than --length {length}")
            self.rows.append((ids, own))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[list[int], list[bool]]:
        return self.rows[i]

    def tokens(self, i: int) -> int:
        """The number of tokens in row ``i``."""
        return len(self.rows[i][0])


@dataclass
class ChatCorruption(Masked):
    """Batches of `Chats`, of which only the assistant's tokens are masked.

    Rows are filled up with end-of-text tokens, which belong to the last answer, as in LLaDA's fine-tuning: so the model
    learns where to end.
    """

    def __call__(self, placed: list) -> dict[str, torch.Tensor]:
        rows, places = zip(*placed, strict=True)
        length = places[0].tokens
        ids = torch.tensor(
            [[*ids, *ids[-1:] * (length - len(ids))] for ids, _ in rows], dtype=torch.int64, device="cpu"
        )
        own = torch.tensor([[*own, *[True] * (length - len(own))] for _, own in rows], dtype=torch.bool, device="cpu")
        numbers = [place.row for place in places]
        given = (self.mask_id, self.seed, places[0].step, numbers, places[0].batch, self.masking)
        noisy, labels, weight = losses.corrupt_open(ids, own, *given)
        return {"input_ids": noisy, "masked_labels": labels, "weight": weight}


class ChatTrainer(DiffusionTrainer):
    """`DiffusionTrainer` on `Chats`."""

    def corruption(self, collate, args) -> Corruption:
        return ChatCorruption(collate, self.mask_id, args.seed, self.masking)
