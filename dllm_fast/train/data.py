"""What `train` reads: documents packed into rows, or prompts with answers; and a tokenizer made from them."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from dllm_fast.decoding.text import encode
from dllm_fast.train import losses


class BadData(ValueError):
    """A file that does not hold what it should; the message names it."""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadData(f"{path} is not UTF-8 text (byte {error.start})") from error


def documents(path: Path, template: str, drop: str | re.Pattern | None) -> list[str]:
    """The texts of a file: each line of a ``.jsonl`` through ``template``, else each paragraph.

    What matches the regular expression ``drop`` is removed. Raises `BadData`, naming the line, for one that is no
    object with the template's keys, and for a file without text.
    """
    text = _text(path)
    if path.suffix == ".jsonl":
        found = [_templated(line, number, path, template) for number, line in _lines(text)]
    else:
        found = [paragraph.strip() for paragraph in text.split("\n\n")]
    found = [re.sub(drop, "", document) if drop else document for document in found]
    if not any(found):
        raise BadData(f"{path} holds no text")
    return [document for document in found if document]


def _lines(text: str) -> list[tuple[int, str]]:
    """Numbers and lines of JSON Lines; a line may hold any of Unicode's other line breaks."""
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
    """(prompt, answer) of each line of a ``.jsonl`` file. Raises `BadData` naming the line that holds none."""
    found = []
    for number, line in _lines(_text(path)):
        try:
            entry = json.loads(line)
            pair = entry["prompt"], entry["answer"]
        except (ValueError, KeyError, TypeError):
            pair = ()
        if not pair or not all(isinstance(text, str) and text for text in pair):
            raise BadData(f'line {number} of {path} is not {{"prompt": a text, "answer": a text}}')
        found.append(pair)
    if not found:
        raise BadData(f"{path} holds no text")
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

    def tokens(self, i: int) -> int:
        """How many tokens row ``i`` has, its end-of-text included."""
        return sum(map(len, self.rows[i]))


def collate(rows: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """Rows of `PromptAnswers` as input_ids [B, L] and prompt_length [B], filled up with the answers' end-of-text."""
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = [[*prompt, *answer] + answer[-1:] * (length - len(prompt) - len(answer)) for prompt, answer in rows]
    columns = {"input_ids": ids, "prompt_length": [len(prompt) for prompt, _ in rows]}
    return {name: torch.tensor(column, dtype=torch.int64, device="cpu") for name, column in columns.items()}


@dataclass(frozen=True)
class Place:
    """Which row of the run an example is: its noise is a function of it, and of no process or micro-batch."""

    step: int  # the optimiser's; -1 in evaluation
    row: int  # of the step's whole batch
    batch: int  # rows of the step
    tokens: int | None  # of the step's longest row; None: all rows are as long as they come


class Run(Dataset):
    """A run's rows in order, ``batch`` of them a step, as (example, `Place`); each pass over ``data`` is in an order
    of its own. Evaluation is one step of all rows, in their own order."""

    def __init__(self, data: Sequence, batch: int, steps: int, seed: int, evaluation: bool = False):
        self.data, self.batch, self.steps, self.seed, self.evaluation = data, batch, steps, seed, evaluation
        self._orders: dict[int, list[int]] = {}  # of the last passes asked for
        self._tokens: dict[int, int] = {}  # of the longest row of the last steps

    def __len__(self) -> int:
        return self.batch * self.steps

    def __getitem__(self, n: int) -> tuple[object, Place]:
        step, row = divmod(n, self.batch)
        if self.evaluation:
            # Mask ratios rise with the row's number, which must have nothing to do with where an example stands.
            return self.data[n], Place(-1, self._order(0)[n], self.batch, self._longest(0))
        return self.data[self._index(n)], Place(step, row, self.batch, self._longest(step))

    def _index(self, n: int) -> int:
        return n if self.evaluation else self._order(n // len(self.data))[n % len(self.data)]

    def _order(self, turn: int) -> list[int]:
        def order() -> list[int]:
            drawn = losses.generator(self.seed, "order", turn)
            return torch.randperm(len(self.data), generator=drawn, dtype=torch.int64, device="cpu").tolist()

        return _recent(self._orders, turn, order)

    def _longest(self, step: int) -> int | None:
        if not hasattr(self.data, "tokens"):
            return None
        rows = range(step * self.batch, (step + 1) * self.batch)
        return _recent(self._tokens, step, lambda: max(self.data.tokens(self._index(n)) for n in rows))


def _recent(kept: dict, key: int, make: Callable[[], object]):
    """``kept[key]``, made where it is missing; ``kept`` holds the last two."""
    if key not in kept:
        kept[key] = make()
        while len(kept) > 2:
            del kept[next(iter(kept))]
    return kept[key]


@dataclass
class Corruption:
    """Collates what a `Run` gives and corrupts it: input_ids (noisy) and masked_labels [B, L], weight [B]."""

    collate: Callable[[list], dict[str, torch.Tensor]]
    mask_id: int
    seed: int

    def __call__(self, rows: list[tuple[object, Place]]) -> dict[str, torch.Tensor]:
        examples, places = zip(*rows, strict=True)
        batch = dict(self.collate(list(examples)))
        ids, prompt = batch.pop("input_ids"), batch.pop("prompt_length", None)
        seen = batch.pop("attention_mask", None)
        if batch or (seen is not None and not bool((seen == 1).all())):
            name = next(iter(batch), "attention_mask, with padding")
            raise ValueError(f"train_dataset: an example has {name}; it may have input_ids and prompt_length")
        step, size, tokens = places[0].step, places[0].batch, places[0].tokens
        if tokens is not None and tokens > ids.shape[1]:
            # A row ends in end-of-text, which is also what fills it up.
            ids = torch.cat((ids, ids[:, -1:].expand(-1, tokens - ids.shape[1])), 1)
        if prompt is None and step >= 0:
            ids = ids[:, : losses.cut_length(self.seed, step, ids.shape[1])]
        given = (ids, prompt, self.mask_id, self.seed, step, [place.row for place in places], size)
        noisy, labels, weight = losses.corrupt(*given)
        return {"input_ids": noisy, "masked_labels": labels, "weight": weight}
