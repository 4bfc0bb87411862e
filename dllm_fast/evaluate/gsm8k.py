"""GSM8K's first problems with LLaDA's published settings, beside the accuracy that was published with them.

Settings and figures are those of EVAL.md and ``opencompass/examples`` in ML-GSAI/LLaDA. The published prompt has four
worked examples before the question (`gsm8k_gen_1d7fe4.py` of OpenCompass), which do not come along: they are read from
a file.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from dllm_fast.decoding.request import require
from dllm_fast.decoding.schedules import Uniform
from dllm_fast.decoding.text import encode, held_back
from dllm_fast.generate import generate_many
from dllm_fast.patch import bound_family

PROBLEMS, EXAMPLES = 100, 4
UNLIKELY = 0.01  # an accuracy that is less likely than this under the published one is called a difference


@dataclass(frozen=True)
class Published:
    """How a model answers GSM8K: as many steps as tokens, no cache, greedy; ``accuracy`` in percent, by OpenCompass."""

    accuracy: float
    gen_length: int
    block_length: int
    confidence_eos_eot_inf: bool


PUBLISHED = {
    "LLaDA-8B-Base": Published(71.9, 256, 256, False),
    "LLaDA-8B-Instruct": Published(78.9, 256, 8, False),
    "LLaDA-1.5": Published(83.6, 256, 16, True),
}


@dataclass
class Score:
    """``right`` of ``asked`` problems; ``chance`` is that of a count as unlikely as this one, or more so, under the
    published accuracy; None where there is none, or the prompt was another."""

    right: int
    asked: int
    chance: float | None

    @property
    def differs(self) -> bool:
        return self.chance is not None and self.chance < UNLIKELY


def published_name(model: str) -> str | None:
    """The published model whose name a path ends in; None for others."""
    return next((name for name in PUBLISHED if Path(model).name == name), None)


def read_problems(path: str, most: int) -> list[dict[str, str]]:
    """The first lines of a JSONL file with ``question`` and ``answer``. Raises ValueError that names the line."""
    problems = []
    with open(path, encoding="utf-8") as file:
        for number, line in zip(range(1, most + 1), file):
            try:
                entry = json.loads(line)
                problems.append({key: entry[key] for key in ("question", "answer")})
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number}: not an object with question and answer") from error
    require(bool(problems), f"{path}: holds no problems")
    return problems


def prompt(tokenizer, question: str, examples: list[dict[str, str]]) -> str:
    """The question after the worked examples, as turns of a chat where the tokenizer has a template for chats."""
    turns = [{"role": "user", "content": ask(entry["question"])} for entry in [*examples, {"question": question}]]
    answers = [{"role": "assistant", "content": worked(entry["answer"])} for entry in examples]
    turns = [turn for pair in zip(turns, [*answers, None]) for turn in pair if turn is not None]
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return "".join(turn["content"] for turn in turns)


def ask(question: str) -> str:
    return f"Question: {question}\nLet's think step by step\nAnswer:"


def worked(answer: str) -> str:
    """GSM8K's own answers without their calculator's notes, and with the end that the published examples have."""
    steps, mark, number = re.sub(r"<<.*?>>", "", answer).partition("#### ")
    return f"{steps}The answer is {number.strip()}\n" if mark else answer


def number_of(text: str) -> str | None:
    """The last number before the answer goes on to a question of its own; what follows a comma counts as another."""
    numbers = re.findall(r"-?\d+(?:\.\d+)?", text.split("Question:")[0])
    return numbers[-1] if numbers else None


def is_right(text: str, answer: str) -> bool:
    found = number_of(text)
    return found is not None and abs(float(found) - int(answer.split("#### ")[1].replace(",", ""))) < 1e-6


def chance_of(right: int, asked: int, accuracy: float) -> float:
    """The probability of a count no more likely than ``right`` of ``asked``, each right with ``accuracy``."""
    each = [math.comb(asked, k) * accuracy**k * (1 - accuracy) ** (asked - k) for k in range(asked + 1)]
    return sum(p for p in each if p <= each[right] * (1 + 1e-9))


def score(model: nn.Module, tokenizer, problems: list[dict], examples: list[dict], name: str | None,
          batch_size: int) -> Score:  # fmt: skip
    """Ask a patched model. ``name`` is one of `PUBLISHED`, or None: then the settings are LLaDA-8B-Instruct's.

    Raises ValueError where a prompt and its answer are longer than the model's positions.
    """
    how = PUBLISHED[name or "LLaDA-8B-Instruct"]
    mask_id = model.config.mask_token_id
    texts = [prompt(tokenizer, problem["question"], examples) for problem in problems]
    ids = encode(tokenizer, texts, mask_id)
    longest, positions = max(map(len, ids)) + how.gen_length, bound_family(model).positions
    require(longest <= positions, f"the longest prompt and its answer have {longest} tokens, the model {positions}")
    done = generate_many(
        model, ids, batch_size, gen_length=how.gen_length, block_length=how.block_length,
        schedule=Uniform(how.gen_length), cache="none", mask_id=mask_id,
        **held_back(tokenizer, confidence_eos_eot_inf=how.confidence_eos_eot_inf),
    )  # fmt: skip
    right = 0
    for completion, problem in zip(done, problems):
        answer = tokenizer.decode(completion.sequence[len(ids[completion.index]) :], skip_special_tokens=True)
        right += is_right(answer, problem["answer"])
    comparable = name is not None and len(examples) == EXAMPLES
    return Score(right, len(problems), chance_of(right, len(problems), how.accuracy / 100) if comparable else None)
