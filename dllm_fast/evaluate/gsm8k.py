"""GSM8K's first problems with LLaDA's published settings, compared with the published accuracy.

Settings and figures come from EVAL.md and ``opencompass/examples`` in ML-GSAI/LLaDA. The published prompt puts four
worked examples before the question (OpenCompass's `gsm8k_gen_1d7fe4.py`). They are not part of this package: a file
supplies them.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from dllm_fast.decoding.schedules import Uniform
from dllm_fast.decoding.text import encode, held_back
from dllm_fast.decoding.values import require
from dllm_fast.generate import generate_many
from dllm_fast.patch import bound_family

PROBLEMS, EXAMPLES = 100, 4
UNLIKELY = 0.01  # a score is called different if the published accuracy makes it less likely than this


@dataclass(frozen=True)
class Published:
    """A model's published settings: all greedy, no cache, one step per token. ``accuracy`` is in percent."""

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
    """``right`` of ``asked`` problems.

    ``chance`` is the probability, under the published accuracy, of a count at most as likely as this one. It is None if
    no accuracy was published, or the prompt differs from the published one.
    """

    right: int
    asked: int
    chance: float | None

    @property
    def differs(self) -> bool:
        return self.chance is not None and self.chance < UNLIKELY


def published_name(model: str) -> str | None:
    """The published model that a path ends with; None for others."""
    return next((name for name in PUBLISHED if Path(model).name == name), None)


def read_problems(path: str, most: int) -> list[dict[str, str]]:
    """The first lines of a JSONL file with ``question`` and ``answer``. Raises ValueError, naming the line."""
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
    """The worked examples, then the question: as a chat's turns if the tokenizer has a chat template."""
    turns = [{"role": "user", "content": ask(entry["question"])} for entry in [*examples, {"question": question}]]
    answers = [{"role": "assistant", "content": worked(entry["answer"])} for entry in examples]
    turns = [turn for pair in zip(turns, [*answers, None]) for turn in pair if turn is not None]
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return "".join(turn["content"] for turn in turns)


def ask(question: str) -> str:
    return f"Question: {question}\nLet's think step by step\nAnswer:"


def worked(answer: str) -> str:
    """GSM8K's own answer without its calculator annotations, ending as the published examples end."""
    steps, mark, number = re.sub(r"<<.*?>>", "", answer).partition("#### ")
    return f"{steps}The answer is {number.strip()}\n" if mark else answer


def number_of(text: str) -> str | None:
    """The last number before any further question that the answer asks. A comma ends a number."""
    numbers = re.findall(r"-?\d+(?:\.\d+)?", text.split("Question:")[0])
    return numbers[-1] if numbers else None


def is_right(text: str, answer: str) -> bool:
    number = number_of(text)
    return number is not None and abs(float(number) - int(answer.split("#### ")[1].replace(",", ""))) < 1e-6


def chance_of(right: int, asked: int, accuracy: float) -> float:
    """The probability of a count at most as likely as ``right`` of ``asked``, each right with probability
    ``accuracy``."""
    each = [math.comb(asked, k) * accuracy**k * (1 - accuracy) ** (asked - k) for k in range(asked + 1)]
    return sum(p for p in each if p <= each[right] * (1 + 1e-9))


def score(
    model: PreTrainedModel, tokenizer, problems: list[dict], examples: list[dict], name: str | None, batch_size: int
) -> Score:
    """Ask a patched model. ``name`` is one of `PUBLISHED`, or None to use LLaDA-8B-Instruct's settings.

    Raises ValueError if a prompt with its answer is longer than the model's positions.
    """
    settings = PUBLISHED[name or "LLaDA-8B-Instruct"]
    mask_id = model.config.mask_token_id
    texts = [prompt(tokenizer, problem["question"], examples) for problem in problems]
    ids = encode(tokenizer, texts, mask_id)
    longest = max(map(len, ids)) + settings.gen_length
    positions = bound_family(model).positions
    require(
        longest <= positions,
        f"the longest prompt with its answer has {longest} tokens, the model {positions} positions",
    )
    completions = generate_many(
        model, ids, batch_size, gen_length=settings.gen_length, block_length=settings.block_length,
        schedule=Uniform(settings.gen_length), cache="none", mask_id=mask_id,
        **held_back(tokenizer, confidence_eos_eot_inf=settings.confidence_eos_eot_inf),
    )  # fmt: skip
    right = 0
    for completion, problem in zip(completions, problems):
        answer = tokenizer.decode(completion.sequence[len(ids[completion.index]) :], skip_special_tokens=True)
        right += is_right(answer, problem["answer"])
    comparable = name is not None and len(examples) == EXAMPLES
    return Score(right, len(problems), chance_of(right, len(problems), settings.accuracy / 100) if comparable else None)
