"""Training data: documents packed into rows, or prompts with answers, and a tokenizer trained on them."""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from dllm_fast.decoding.text import encode
from dllm_fast.train import losses
from dllm_fast.train.masking import Masking

T = TypeVar("T")


class BadData(ValueError):
    """A file with unusable content; the message names the file."""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadData(f"{path} is not UTF-8 text (byte {error.start})") from error


def documents(path: Path, template: str, drop: str | re.Pattern | None, whole: bool = False) -> list[str]:
    """The documents of a file: ``template`` filled in from each line of a ``.jsonl``; otherwise, each paragraph, or the
    ``whole`` file.

    Whatever matches the regular expression ``drop`` is removed. Raises `BadData` if a line is not an object with the
    template's keys (naming the line), or if the file has no text.
    """
    text = _text(path)
    if path.suffix == ".jsonl":
        texts = [_templated(line, number, path, template) for number, line in _lines(text)]
    elif whole:
        texts = [text]
    else:
        texts = [paragraph.strip() for paragraph in text.split("\n\n")]
    if drop:
        texts = [re.sub(drop, "", document) for document in texts]
    if not any(texts):
        raise BadData(f"{path} holds no text")
    return [document for document in texts if document]


def lines_of(path: Path) -> list[tuple[int, str]]:
    """`_lines` of a file. Raises `BadData` if it is not UTF-8 text."""
    return _lines(_text(path))


def _lines(text: str) -> list[tuple[int, str]]:
    r"""(number, line) of each line that is not blank. Only \n ends one: JSON may hold Unicode's other line breaks."""
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _templated(line: str, number: int, path: Path, template: str) -> str:
    try:
        return template.format(**json.loads(line))
    except KeyError as error:
        raise BadData(f"line {number} of {path} has no {error}, which --template {template!r} asks for") from error
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        what = f"line {number} of {path} is not an object of text for --template {template!r}"
        raise BadData(f"{what}: {error}") from error


def pairs(path: Path) -> list[tuple[str, str]]:
    """(prompt, answer) of each line of a ``.jsonl`` file. Raises `BadData`, naming the line, if a line has none."""
    prompts_and_answers = []
    for number, line in lines_of(path):
        try:
            entry = json.loads(line)
            pair = entry["prompt"], entry["answer"]
        except (ValueError, KeyError, TypeError):
            pair = None, None
        if not all(isinstance(text, str) and text for text in pair):
            raise BadData(f'line {number} of {path} is not {{"prompt": a text, "answer": a text}}')
        prompts_and_answers.append(pair)
    if not prompts_and_answers:
        raise BadData(f"{path} holds no text")
    return prompts_and_answers


def train_tokenizer(texts: list[str], vocab_size: int, length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE that splits numbers into digits; its last three ids are <|endoftext|>, [PAD] and [MASK]."""
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


def train_characters(texts: list[str], length: int) -> PreTrainedTokenizerFast:
    """A token for each character of ``texts``; the last ids are [UNK], <|endoftext|>, [PAD] and [MASK]."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    special = {"unk_token": "[UNK]", "eos_token": "<|endoftext|>", "pad_token": "[PAD]", "mask_token": "[MASK]"}
    characters = sorted(set().union(*texts))
    vocabulary = {token: i for i, token in enumerate([*characters, *special.values()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=length, padding_side="left",
        clean_up_tokenization_spaces=False, **special,
    )  # fmt: skip


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Save a tokenizer that transformers 4 can load too: version 5 writes a class name that version 4 lacks."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = path.read_text().replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"')
    path.write_text(config)


class PackedText(Dataset):
    """Tokenized documents, joined by end-of-text tokens and cut into rows of ``length``."""

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
    """Tokenized prompts and answers; each answer ends with an end-of-text token."""

    def __init__(self, texts: list[tuple[str, str]], tokenizer, length: int):
        prompts, answers = (encode(tokenizer, list(column), tokenizer.mask_token_id) for column in zip(*texts))
        self.rows = [(prompt, [*answer, tokenizer.eos_token_id]) for prompt, answer in zip(prompts, answers)]
        longest = max(len(prompt) + len(answer) for prompt, answer in self.rows)
        if longest > length:
            raise ValueError(f"--data: a prompt with its answer takes {longest} tokens, more than --length {length}")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[list[int], list[int]]:
        return self.rows[i]

    def tokens(self, i: int) -> int:
        """The number of tokens in row ``i``, including its end-of-text."""
        return sum(map(len, self.rows[i]))


def collate(rows: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """Rows of `PromptAnswers` as input_ids [B, L], padded with end-of-text, and prompt_length [B]."""
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = [[*prompt, *answer] + answer[-1:] * (length - len(prompt) - len(answer)) for prompt, answer in rows]
    columns = {"input_ids": ids, "prompt_length": [len(prompt) for prompt, _ in rows]}
    return {name: torch.tensor(column, dtype=torch.int64, device="cpu") for name, column in columns.items()}


@dataclass(frozen=True)
class Place:
    """Where an example is in the run. Its noise depends on this alone, not on processes or micro-batches."""

    step: int  # the optimiser's; -1 in evaluation
    row: int  # its number in the step's whole batch
    batch: int  # number of rows in the step
    tokens: int | None  # length of the step's longest row; None: rows are not padded


class Run(Dataset):
    """All rows of a run in order, ``batch`` per step, as (example, `Place`). Each pass over ``data`` has its own order.

    Evaluation is a single step over all rows, in the order of ``data``.
    """

    def __init__(self, data: Sequence, batch: int, steps: int, seed: int, evaluation: bool = False):
        self.data = data
        self.batch = batch
        self.steps = steps
        self.seed = seed
        self.evaluation = evaluation
        self._orders: dict[int, list[int]] = {}  # of the most recent passes
        self._tokens: dict[int, int] = {}  # of the longest row, for the most recent steps

    def __len__(self) -> int:
        return self.batch * self.steps

    def __getitem__(self, n: int) -> tuple[object, Place]:
        step, row = divmod(n, self.batch)
        if self.evaluation:
            # Mask ratios rise with the row's number, so that number must be unrelated to the example's index.
            return self.data[n], Place(-1, self._order(0)[n], self.batch, self._longest(0))
        return self.data[self._index(n)], Place(step, row, self.batch, self._longest(step))

    def _index(self, n: int) -> int:
        return n if self.evaluation else self._order(n // len(self.data))[n % len(self.data)]

    def _order(self, epoch: int) -> list[int]:
        def order() -> list[int]:
            generator = losses.generator(self.seed, "order", epoch)
            return torch.randperm(len(self.data), generator=generator, dtype=torch.int64, device="cpu").tolist()

        return _recent(self._orders, epoch, order)

    def _longest(self, step: int) -> int | None:
        tokens = getattr(self.data, "tokens", None)
        if tokens is None:
            return None
        rows = range(step * self.batch, (step + 1) * self.batch)
        return _recent(self._tokens, step, lambda: max(tokens(self._index(n)) for n in rows))


def _recent(kept: dict[int, T], key: int, make: Callable[[], T]) -> T:
    """``kept[key]``, made if it is missing. ``kept`` holds the last two keys that were made."""
    if key not in kept:
        kept[key] = make()
        while len(kept) > 2:
            del kept[next(iter(kept))]
    return kept[key]


@dataclass
class Corruption(ABC):
    """Collates rows of a `Run` and adds an objective's noise."""

    collate: Callable[[list], dict[str, torch.Tensor]]
    mask_id: int
    seed: int

    def __call__(self, placed: list[tuple[object, Place]]) -> dict[str, torch.Tensor]:
        examples, places = zip(*placed, strict=True)
        batch = dict(self.collate(list(examples)))
        ids, prompt = batch.pop("input_ids"), batch.pop("prompt_length", None)
        attention_mask = batch.pop("attention_mask", None)
        if batch or (attention_mask is not None and not bool((attention_mask == 1).all())):
            name = next(iter(batch), "attention_mask, with padding")
            raise ValueError(f"train_dataset: an example has {name}; it may have input_ids and prompt_length")
        step = places[0].step
        tokens = places[0].tokens
        if tokens is not None and tokens > ids.shape[1]:
            # Every row ends with an end-of-text token: repeat it to pad the row.
            ids = torch.cat((ids, ids[:, -1:].expand(-1, tokens - ids.shape[1])), 1)
        if prompt is None and step >= 0:
            ids = ids[:, : losses.cut_length(self.seed, step, ids.shape[1])]
        return self.corrupt(ids, prompt, step, [place.row for place in places], places[0].batch)

    @abstractmethod
    def corrupt(
        self, ids: torch.Tensor, prompt: torch.Tensor | None, step: int, rows: list[int], batch: int
    ) -> dict[str, torch.Tensor]:
        """What the loss is computed from: clean ``ids`` [B, L] whose leading ``prompt`` [B] positions stay."""


@dataclass
class Masked(Corruption):
    """`Corruption` by masks: input_ids (noisy) and masked_labels [B, L], weight [B]."""

    masking: Masking = losses.LLADA

    def corrupt(self, ids, prompt, step, rows, batch):
        given = (ids, prompt, self.mask_id, self.seed, step, rows, batch, self.masking)
        noisy, labels, weight = losses.corrupt(*given)
        return {"input_ids": noisy, "masked_labels": labels, "weight": weight}
