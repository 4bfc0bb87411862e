"""What `train` reads: documents packed into rows, or prompts with answers; and a tokenizer made from them."""

import json
import re
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from dllm_fast.text import encode


def documents(path: Path, template: str, drop: str | None) -> list[str]:
    """The texts of a file: each line of a ``.jsonl`` through ``template``, else each paragraph.

    What matches the regular expression ``drop`` is removed. Raises ValueError for a file without text.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        found = [template.format(**json.loads(line)) for line in text.splitlines() if line.strip()]
    else:
        found = [paragraph.strip() for paragraph in text.split("\n\n")]
    found = [re.sub(drop, "", document) if drop else document for document in found]
    if not any(found):
        raise ValueError(f"--data: {path} holds no text")
    return [document for document in found if document]


def pairs(path: Path) -> list[tuple[str, str]]:
    """(prompt, answer) of each line of a ``.jsonl`` file. Raises ValueError naming the line that holds none."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            pair = entry["prompt"], entry["answer"]
        except (ValueError, KeyError, TypeError):
            pair = ()
        if not pair or not all(isinstance(text, str) and text for text in pair):
            raise ValueError(f'--data: line {number} of {path} is not {{"prompt": a text, "answer": a text}}')
        found.append(pair)
    if not found:
        raise ValueError(f"--data: {path} holds no text")
    return found


def train_tokenizer(texts: list[str], vocab_size: int, length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with single digits and [MASK], <|endoftext|> and [PAD] as its last three ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = ["<|endoftext|>", "[PAD]", "[MASK]"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size - len(special), initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=special[0],
        pad_token=special[1],
        mask_token=special[2],
        model_max_length=length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Save it so that transformers 4 loads it too: version 5 writes a class name that only version 5 has."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = path.read_text().replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"')
    path.write_text(config)


class PackedText(Dataset):
    """Documents tokenized, joined with end-of-text, and cut into rows of ``length`` tokens."""

    def __init__(self, texts: list[str], tokenizer, length: int):
        eos = tokenizer.eos_token_id
        encoded = encode(tokenizer, texts, tokenizer.mask_token_id, add_special_tokens=True)
        ids = [i for document in encoded for i in [*document, eos]]
        rows = len(ids) // length
        if rows == 0:
            raise ValueError(f"--data: {len(ids)} tokens do not fill one row of --length {length}")
        self.rows = torch.tensor(ids[: rows * length], dtype=torch.int64, device="cpu").view(rows, length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[i]}


class PromptAnswers(Dataset):
    """Prompts and answers tokenized, each answer ended by end-of-text."""

    def __init__(self, found: list[tuple[str, str]], tokenizer, length: int):
        mask_id = tokenizer.mask_token_id
        prompts, answers = (encode(tokenizer, list(texts), mask_id) for texts in zip(*found, strict=True))
        self.rows = [(prompt, [*answer, tokenizer.eos_token_id]) for prompt, answer in zip(prompts, answers)]
        longest = max(len(prompt) + len(answer) for prompt, answer in self.rows)
        if longest > length:
            raise ValueError(f"--data: a prompt with its answer takes {longest} tokens, more than --length {length}")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[list[int], list[int]]:
        return self.rows[i]


def collate(rows: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """Rows of `PromptAnswers` as input_ids [B, L] and prompt_length [B], filled up with the answers' end-of-text."""
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = [[*prompt, *answer] + answer[-1:] * (length - len(prompt) - len(answer)) for prompt, answer in rows]
    columns = {"input_ids": ids, "prompt_length": [len(prompt) for prompt, _ in rows]}
    return {name: torch.tensor(column, dtype=torch.int64, device="cpu") for name, column in columns.items()}
