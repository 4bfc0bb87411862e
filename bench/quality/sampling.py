"""What samplers draw against what they should. Writes docs/sampling.md: ``python -m bench.quality.sampling``

Three comparisons, each at equal NFE where there is a model:

- precision: the reverse process drawn step by step from a categorical distribution in fp32 and in fp64, as MDLM's code
  draws it, and with this package's noise, from a fixed distribution over 126,464 tokens;
- time: first-hitting against a grid of times, on free text;
- schedule: pyramid against uniform, with one block over the whole answer, on free text and on sums.

Free text comes from the shipped models: 64 tokens after an opening of 16 that the model wrote by first-hitting, so that
greedy decoding has many different prompts. All ways continue the same openings. A text is judged by its surprise, the
model's own bound of its negative log-likelihood in nats per token, and by the entropy of its tokens: dull text has
little of both.
"""

import argparse
import datetime
import json
import os
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from transformers import AutoTokenizer

import dllm_fast
from bench import checkout, task
from bench.ops.noise import GROUPS, softmax, temperature, zipf
from bench.quality.accuracy import wilson
from bench.quality.claims import paired
from bench.quality.patched import PROMPTS
from bench.report import sampling as report
from dllm_fast.decoding.spelling import schedule_of
from dllm_fast.evaluate.likelihood import log_likelihoods

GRIDS = (16, 64, 256, 1024)  # steps of the reverse process
OPENING, LENGTH = 16, 64
MASKS = 16  # of a text's likelihood
# At equal NFE: a pyramid takes as many steps as its name's NFE here, for 64 positions.
PYRAMIDS = {"pyramid=1": 11, "pyramid=2": 15, "pyramid=4": 21}


# 1. Precision


def step_by_step(dtype: torch.dtype, count: int, grid: int, generator: torch.Generator) -> torch.Tensor:
    """How often each group of `zipf` is drawn, [K], by ``count`` positions that un-mask over ``grid`` steps.

    A step draws each masked position from a categorical distribution over the vocabulary and [MASK], as the argmax of
    ``p / -log(u)``: from time t to s, [MASK] has probability s / t. The largest of a group's m ratios uses the largest
    of its m uniforms, rounded to the dtype's grid as ``torch.rand`` rounds.
    """
    logits, many = zipf()
    bits = 24 if dtype == torch.float32 else 53
    p = torch.softmax(logits + torch.log(many), 0) / many  # of one token of a group
    exponent = torch.cat((1 / many, torch.ones(1, dtype=torch.float64)))
    counts = torch.zeros(GROUPS, dtype=torch.float64)
    left = count
    for step in range(grid, 0, -1):
        stay = (step - 1) / step
        weight = torch.cat((p * (1 - stay), torch.tensor([stay], dtype=torch.float64))).to(dtype)
        u = torch.rand(left, GROUPS + 1, dtype=torch.float64, generator=generator) ** exponent
        u = (torch.floor(u * 2.0**bits) * 2.0**-bits).to(dtype)
        drawn = (weight / (1e-10 - torch.log(u + 1e-10))).argmax(1)
        counts += torch.bincount(drawn, minlength=GROUPS + 1)[:GROUPS]
        left = int((drawn == GROUPS).sum())
    return counts


def at_its_time(count: int, generator: torch.Generator) -> torch.Tensor:
    """The same, each position drawn once at its own time with exact noise, as `Ancestral` and `FirstHitting` do."""
    logits, many = zipf()
    e = torch.empty(count, GROUPS, dtype=torch.float64).exponential_(generator=generator) / many
    return torch.bincount((logits - torch.log(e)).argmax(1), minlength=GROUPS).double()


def precision(count: int, generator: torch.Generator) -> list[dict]:
    logits, many = zipf()
    law = softmax(logits, many)
    surprise = torch.log(many) - torch.log(law)  # of one token of a group
    rows = []

    def add(sampler: str, grid: int | None, counts: torch.Tensor) -> None:
        share = counts / counts.sum()
        middle = float((share * surprise).sum())
        spread = float(((share * surprise**2).sum() - middle**2) / counts.sum()) ** 0.5
        t, error = temperature(logits, many, counts)
        rows.append({"sampler": sampler, "steps": grid, "temperature": t, "temperature_error": error,
                     "surprise": middle, "surprise_error": spread})  # fmt: skip

    add("drawn at its time", None, at_its_time(count, generator))
    for dtype in (torch.float64, torch.float32):
        for grid in GRIDS:
            name = f"step by step, {str(dtype).removeprefix('torch.')}"
            add(name, grid, step_by_step(dtype, count, grid, generator))
    return [{"entropy": float((law * surprise).sum()), **row} for row in rows]


# 2 and 3. Free text


@dataclass(frozen=True)
class Way:
    """One way to write: a schedule, the temperature, and which positions it prefers, where the schedule leaves it
    open."""

    schedule: str
    temperature: float
    order: str | None = None

    @property
    def name(self) -> str:
        order = " in random order" if self.order == "random" else ""
        return f"{self.schedule}{order}, temperature {self.temperature:g}"


TIME = (
    Way("first-hitting", 1.0),
    *(Way(f"ancestral={steps}", 1.0) for steps in (16, 64, 256)),
    *(Way(f"uniform={steps}", 1.0, "random") for steps in (16, 32)),
)
SCHEDULE = tuple(
    Way(schedule, warmth, "probability")
    for warmth in (0.0, 1.0)
    for name, nfe in PYRAMIDS.items()
    for schedule in (name, f"uniform={nfe}")
)


def entropy(ids: list[int]) -> float:
    """The entropy of a text's own token frequencies, in nats."""
    counts = torch.bincount(torch.tensor(ids)).double()
    share = counts[counts > 0] / len(ids)
    return float(-(share * share.log()).sum())


def openings(name: str, model, tokenizer, count: int) -> list[list[int]]:
    """``count`` prompts: the model's usual ones, in turn, each with `OPENING` more tokens of its own."""
    found = []
    for n, text in enumerate(PROMPTS[name]):
        ids = torch.tensor([tokenizer(text)["input_ids"]] * len(range(n, count, len(PROMPTS[name]))))
        found += dllm_fast.generate(
            model, ids, gen_length=OPENING, block_length=OPENING, schedule=dllm_fast.FirstHitting(), temperature=1.0,
            cache="none", seed=n,
        ).sequences.tolist()  # fmt: skip
    return found


def written(name: str, model, tokenizer, way: Way, prompts: list[list[int]]) -> dict:
    """A text of `LENGTH` tokens, in one block, after each prompt: NFE, surprise and entropy of each, and a sample."""
    options = {"gen_length": LENGTH, "block_length": LENGTH, "cache": "none", "temperature": way.temperature}
    if way.order:
        options["confidence"] = way.order
    texts, nfe = [], []
    for length in sorted({len(prompt) for prompt in prompts}):
        rows = torch.tensor([prompt for prompt in prompts if len(prompt) == length])
        out = dllm_fast.generate(model, rows, schedule=schedule_of(way.schedule), seed=0, **options)
        texts += [(ids[:length], ids[length:]) for ids in out.sequences.tolist()]
        nfe += out.row_nfe
    bounds = list(log_likelihoods(model, texts, samples=MASKS, seed=1))
    return {
        "model": name, "way": way.name, "schedule": way.schedule, "temperature": way.temperature, "nfe": mean(nfe),
        "surprise": [-bound / LENGTH for bound in bounds], "entropy": [entropy(ids) for _, ids in texts],
        "sample": tokenizer.decode(texts[0][1], skip_special_tokens=True),
    }  # fmt: skip


def sums(count: int, block_length: int) -> list[dict]:
    """Pyramid and uniform on the task: how many problems each answers, and the difference, problem by problem."""
    model, tokenizer = task.load("llada-steps")
    found, rows = task.STEPS.problems(count, 3, held_out=True), []
    for name, nfe in PYRAMIDS.items():
        right = {}
        for schedule in (name, f"uniform={nfe}"):
            length = {"gen_length": task.STEPS.tokens, "block_length": block_length}
            options = {**length, "schedule": schedule_of(schedule), "cache": "none"}
            got = task.score(model, tokenizer, found, count, **options)
            right[schedule] = torch.tensor(got.right, dtype=torch.float64)
        a, b = right.values()
        rows.append({"pyramid": name, "uniform": f"uniform={nfe}", "problems": count, "block_length": block_length,
                     "right": [float(a.mean()), float(b.mean())],
                     "intervals": [wilson(int(a.sum()), count), wilson(int(b.sum()), count)],
                     "difference": paired(a, b)})  # fmt: skip
    return rows


def measured(draws: int, texts: int, problems: int) -> dict:
    generator = torch.Generator().manual_seed(0)
    result: dict = {"bench": "sampling", "machine": machine(), "precision": precision(draws, generator)}
    result |= {"time": [], "schedule": []}
    for name in PROMPTS:
        tokenizer = AutoTokenizer.from_pretrained(dllm_fast.model_path(name))
        model = dllm_fast.from_pretrained(name, dtype=torch.float32)
        prompts = openings(name, model, tokenizer, texts)
        for comparison, ways in (("time", TIME), ("schedule", SCHEDULE)):
            for way in ways:
                result[comparison].append(written(name, model, tokenizer, way, prompts))
                print(name, way.name, flush=True)
    result["sums"] = sums(problems, task.STEPS.tokens)
    return result


def machine() -> str:
    versions = f"torch {torch.__version__}, commit {checkout.commit()}"
    return f"{os.cpu_count()} CPU cores, {datetime.date.today()}, {versions}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0].split(".")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/sampling"), help="folder for sampling.json and plots")
    parser.add_argument("--page", type=Path, help="write this page too, with plots beside sampling.json")
    parser.add_argument("--quick", action="store_true", help="few texts and draws, for a dry run")
    parser.add_argument("--from", dest="stored", type=Path, help="draw a stored sampling.json again")
    options = parser.parse_args()
    if options.stored:
        result = json.loads(options.stored.read_text())
    else:
        result = measured(2_000, 3, 8) if options.quick else measured(60_000, 48, 600)
    for path in report.save(result, options.out, options.page):
        print(path)


if __name__ == "__main__":
    main()
