"""LoPA (arXiv:2512.16229) against plain thresholds: ``python -m bench.quality.lookahead``

Lookahead parallel decoding, without a cache. A step commits what `Threshold` commits: the anchor. Each lookahead branch
commits one of the most confident positions left as well, the k-th branch the k-th. One forward evaluates all branches,
and the one whose masked positions have the highest mean confidence takes the next step. As in the published code, a
branch with nothing left masked in the block wins, and so does a lookahead branch against an anchor that is its equal.
That code runs on D2F models, which decode several blocks at a time: here it is one, or the whole answer. "entropy" is
the confidence that its scripts give.

To tell why it does what it does, at two thresholds:

- paired: a branch's mean less the anchor's over the same positions. The plain mean rises by leaving out a doubtful
  position, whatever its token;
- unseen: the first lookahead branch, always. Nothing else is evaluated.

Every setting answers the same held-out problems. Two verdicts, by 95 % intervals: whether branches cost no accuracy at
the same threshold, and whether they answer more than plain thresholds with as many forwards: the best one that takes no
more, or, where that is better, this one and the next slower, drawn at random for each problem. It is chosen on the
same problems, which favours it. Forwards and tokens a forward are of a problem, and a forward of all branches counts
once; a last one, that commits nothing, is not counted. Sequences are those that they evaluate. Further columns: how
often the anchor wins; how many of the tokens that the threshold committed, and of the winners' extra ones, are those of
the right answer; and told, how well scores tell right extra tokens from wrong ones: 0.5 is not at all, 1 always. Ends
with one JSON line.
"""

import argparse
import datetime
import itertools
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from statistics import fmean

import torch

import dllm_fast
from bench import checkout, task
from bench.quality.accuracy import Z, wilson
from bench.quality.claims import better, harmless, paired, points
from bench.quality.evaluated import MODELS
from dllm_fast.cli.view import print_table
from dllm_fast.kernels import reference

PLAIN = (0.1, 0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999)
THRESHOLDS = (0.7, 0.9, 0.95, 0.99)
BRANCHES = (0, 1, 3, 7)
# Beside LoPA's own way, "mean".
WAYS = ((0.9, 3, "entropy"), (0.9, 3, "paired"), (0.9, 1, "unseen"), (0.99, 3, "paired"), (0.99, 1, "unseen"))


@dataclass
class Found:
    """What `task.score` reads of an `Output`, and extra: the tokens [B, T] bool of lookahead branches that won; steps:
    those that had more than one branch; anchors: those of them that the anchor won; tried [K, 4] fp64: row, position,
    token of each lookahead branch that the anchor was compared with, and by how much its score was higher."""

    sequences: torch.Tensor
    row_nfe: list[int]
    positions: int
    extra: torch.Tensor
    steps: int
    anchors: int
    tried: torch.Tensor


def branch_scores(
    confidence: torch.Tensor,  # [B, N, T] fp32, the anchor first
    masked: torch.Tensor,  # [B, N, T] bool: what is left of the anchor's block
    way: str,
) -> torch.Tensor:
    """[B, N]; the highest wins."""
    left = masked.sum(-1)
    if way == "paired":
        gain = ((confidence - confidence[:, :1]) * masked).sum(-1) / left.clamp(min=1)
        return gain.masked_fill(left == 0, -1.0)
    return ((confidence * masked).sum(-1) / left.clamp(min=1)).masked_fill(left == 0, 1.0)


def winners(
    scores: torch.Tensor,  # [B, N]
    there: torch.Tensor,  # [B, N] bool
) -> torch.Tensor:
    """[B]: the best branch of those that are there; of equal ones the first, and the anchor last."""
    rivals = scores.masked_fill(~there, float("-inf")).roll(-1, 1)
    return (rivals.argmax(1) + 1) % scores.shape[1]


def current_block(masked: torch.Tensor, length: int) -> torch.Tensor:
    """Those of ``masked`` [B, T] that lie in the first block that has any."""
    block = torch.arange(masked.shape[1]) // length
    first = block.where(masked, masked.shape[1]).amin(1, keepdim=True)
    return masked & (block == first)


def predict(model, prompts, mask, states, there, way: str) -> list[torch.Tensor]:
    """Token, probability and the way's confidence [B, N, T] of each branch's answer ``states``, if it is ``there``."""
    row = there.nonzero()[:, 0]
    seen = torch.cat((mask[row], mask.new_ones(len(row), states.shape[-1])), 1)
    logits = model(torch.cat((prompts[row], states[there]), 1), attention_mask=seen).logits[:, prompts.shape[1] :]
    flat, mask_id = logits.flatten(0, 1), model.config.mask_token_id
    token, probability, _ = reference.select(flat, mask_id)
    entropy = way == "entropy"
    confidence = reference.select(flat, mask_id, confidence="entropy")[1] if entropy else probability
    found = []
    for values in (token, probability, confidence):
        found.append(values.new_zeros(states.shape))
        found[-1][there] = values.view(-1, states.shape[-1])
    return found


@torch.no_grad()
def lookahead(
    model,
    input_ids: torch.Tensor,  # [B, P] int64
    attention_mask: torch.Tensor,  # [B, P]
    *,
    gen_length: int,
    block_length: int,
    threshold: float,
    branches: int,
    way: str = "mean",
    seed: int | None = None,  # `task.score` gives one; nothing is drawn
) -> Found:
    batch, mask_id = len(input_ids), model.config.mask_token_id
    answers = input_ids.new_full((batch, gen_length), mask_id)
    extra = torch.zeros_like(answers, dtype=torch.bool)
    states, there = answers[:, None], extra.new_ones(batch, 1)  # [B, N, T] and [B, N]; the anchor is the first branch
    nfe, positions, steps, anchors = torch.zeros(batch, dtype=torch.int64), 0, 0, 0
    tried = [torch.zeros(0, 4, dtype=torch.float64)]
    while bool((live := (answers == mask_id).any(1).nonzero()[:, 0]).numel()):
        # 1. One forward of every branch.
        states, there, each = states[live], there[live], torch.arange(len(live))
        answers_before, prompts, mask = answers[live], input_ids[live], attention_mask[live]
        if way == "unseen" and states.shape[1] > 1:
            there[:, 0] = ~there[:, 1]
        token, probability, confidence = predict(model, prompts, mask, states, there, way)
        # 2. The winner.
        block = current_block(answers_before == mask_id, block_length)
        masked = (states == mask_id) & block[:, None]
        scores = branch_scores(confidence, masked, way)
        won = winners(scores, there)
        rivals = there & there[:, :1] & masked.any(-1)
        row, branch, at = ((states != answers_before[:, None]) & rivals[..., None]).nonzero(as_tuple=True)
        gain = scores[row, branch] - scores[row, 0]
        tried.append(torch.stack((live[row], at, states[row, branch, at], gain), 1))
        answer, token = states[each, won], token[each, won]
        probability, confidence = probability[each, won], confidence[each, won]
        extra[live] |= answer != answers_before
        contested = there.sum(1) > 1
        steps += int(contested.sum())
        anchors += int((contested & (won == 0)).sum())
        needed = (answer == mask_id).any(1)
        nfe[live] += needed
        positions += int(((mask.sum(1) + gen_length) * there.sum(1) * needed).sum())
        # 3. What the threshold commits: the next anchor.
        candidate = current_block(answer == mask_id, block_length)
        start = torch.zeros_like(each)
        chosen = reference.commit(answer, token, probability, candidate, start, threshold=threshold)
        answers[live] = answer
        # 4. The next branches.
        left = candidate & ~chosen
        ranked = confidence.masked_fill(~left, float("-inf")).argsort(dim=1, descending=True, stable=True)[:, :branches]
        ahead = answer[:, None].repeat(1, ranked.shape[1], 1)
        ahead.scatter_(2, ranked[..., None], token.gather(1, ranked)[..., None])
        states = states.new_full((batch, 1 + ranked.shape[1], gen_length), mask_id)
        states[live] = torch.cat((answer[:, None], ahead), 1)
        there = extra.new_zeros(batch, states.shape[1])
        there[live] = torch.cat((torch.ones_like(left[:, :1]), left.gather(1, ranked)), 1)
    return Found(torch.cat((input_ids, answers), 1), nfe.tolist(), positions, extra, steps, anchors, torch.cat(tried))


@dataclass
class Row:
    """right: of each problem. forwards: the mean. sequences: evaluated for a problem. anchors: the share of steps with
    branches that the anchor won. committed, extra: the share of the tokens that the threshold committed, and of those
    that a lookahead branch did, that the right answer has there. told: `told_apart` of all lookahead branches' tokens.
    """

    model: str
    block: int
    threshold: float
    branches: int
    way: str
    right: list[bool]
    forwards: float
    sequences: float
    anchors: float | None
    committed: float
    extra: float | None
    told: float | None


@dataclass
class Plain:
    threshold: float
    right: list[bool]
    forwards: float


def measured(loaded, problems, batch: int, name: str, block: int, setting: tuple[float, int, str]) -> Row:
    model, tokenizer = loaded
    tokens = MODELS[name][0].tokens
    threshold, branches, way = setting
    runs: list[Found] = []

    def generate(*args, **options) -> Found:
        runs.append(lookahead(*args, **options))
        return runs[-1]

    options = {"gen_length": tokens, "block_length": block, "threshold": threshold, "branches": branches, "way": way}
    got = task.score(model, tokenizer, problems, batch, generate, **options)
    expected = torch.full_like(got.tokens, -1)
    for line, (_, answer) in zip(expected, problems, strict=True):
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        line[: len(ids)] = torch.tensor(ids)
    extra, known = torch.cat([run.extra for run in runs]), expected >= 0
    steps, same = sum(run.steps for run in runs), got.tokens == expected
    lengths = [len(tokenizer(prompt)["input_ids"]) + tokens for prompt, _ in problems]
    return Row(
        name, block, threshold, branches, way, got.right, fmean(got.nfe), got.positions / sum(lengths),
        sum(run.anchors for run in runs) / steps if steps else None, float(same[known & ~extra].double().mean()),
        float(same[known & extra].double().mean()) if extra.any() else None, told_apart(runs, expected, batch),
    )  # fmt: skip


def told_apart(runs: list[Found], expected: torch.Tensor, batch: int) -> float | None:
    """The probability that a branch with a right token scores higher above the anchor than one with a wrong one does:
    0.5 if scores say nothing of it. None if there are not both."""
    gains: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for number, run in enumerate(runs):
        row, at, token = run.tried[:, :3].long().unbind(1)
        answer = expected[number * batch + row, at]
        for right, own in gains.items():
            own.append(run.tried[(answer >= 0) & ((answer == token) == right), 3])
    right, wrong = (torch.cat(own) for own in gains.values())
    if not len(right) or not len(wrong):
        return None
    higher = (right[:, None] > wrong).double() + 0.5 * (right[:, None] == wrong)
    return float(higher.mean())


def run(name: str, block: int, count: int, batch: int, thresholds=THRESHOLDS, branches=BRANCHES, ways=WAYS):
    """The plain thresholds and the rows of a model in blocks of ``block``."""
    about, loaded = MODELS[name][0], task.load(name)
    problems, plain = about.problems(count, 7, held_out=True), []
    for threshold in PLAIN:
        options = {"gen_length": about.tokens, "block_length": block, "cache": "none"}
        options["schedule"] = dllm_fast.Threshold(threshold)
        got = task.score(*loaded, problems, batch, **options)
        plain.append(Plain(threshold, got.right, fmean(got.nfe)))
    settings: Iterable[tuple[float, int, str]] = itertools.product(thresholds, branches, ("mean",))
    return plain, [measured(loaded, problems, batch, name, block, setting) for setting in (*settings, *ways)]


def rival(forwards: float, plain: list[Plain]) -> tuple[str, torch.Tensor]:
    """Plain thresholds that take as many forwards: their names, and the share of right answers [N] to each problem."""
    able = [one for one in plain if one.forwards <= forwards] or [min(plain, key=lambda one: one.forwards)]
    best = max(able, key=lambda one: sum(one.right))
    right = torch.tensor(best.right, dtype=torch.float64)
    slower = min((one for one in plain if one.forwards > forwards), key=lambda one: one.forwards, default=best)
    if best.forwards > forwards or sum(slower.right) <= sum(best.right):
        return f"{best.threshold:g}", right
    weight = (forwards - best.forwards) / (slower.forwards - best.forwards)
    mixed = right + weight * (torch.tensor(slower.right, dtype=torch.float64) - right)
    return f"{best.threshold:g} and {slower.threshold:g}", mixed


def less(a: list[bool], b: torch.Tensor) -> tuple[float, float, float]:
    """The difference of two shares of right answers to the same problems, with a 95 % interval. ``b`` may be mixed."""
    difference = torch.tensor(a, dtype=torch.float64) - b
    middle, spread = float(difference.mean()), Z * float(difference.std()) / len(a) ** 0.5
    return middle, middle - spread, middle + spread


def share(right: list[bool]) -> str:
    low, high = wilson(sum(right), len(right))
    return f"{fmean(right):.1%} ({low:.1%} to {high:.1%})"


SCORES = (
    "setting", "right", "forwards", "tokens each", "sequences", "anchor", "committed", "extra", "told",
)  # fmt: skip
VERDICTS = ("setting", "points over 0 branches", "no cost", "plain", "points over it", "better")


def setting(row: Row) -> str:
    return f"{row.threshold:g} + {row.branches}" + f" {row.way}" * (row.way != "mean")


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def scores(rows: list[Row], tokens: int) -> list[list[str]]:
    return [
        [
            setting(row), share(row.right), f"{row.forwards:.2f}", f"{tokens / row.forwards:.1f}",
            f"{row.sequences:.1f}", percent(row.anchors), percent(row.committed), percent(row.extra),
            "" if row.told is None else f"{row.told:.2f}",
        ]
        for row in rows
    ]  # fmt: skip


def short(difference: tuple[float, float, float]) -> str:
    return points(difference).replace(" points", "")


def verdicts(rows: list[Row], plain: list[Plain]) -> list[list[str]]:
    base = {row.threshold: row for row in rows if row.branches == 0}
    lines = []
    for row in rows:
        if row.branches:
            outcomes = (torch.tensor(x, dtype=torch.float64) for x in (row.right, base[row.threshold].right))
            own = paired(*outcomes)
            names, right = rival(row.forwards, plain)
            against = less(row.right, right)
            lines.append([setting(row), short(own), harmless(own), names, short(against), better(against)])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0].split(":")[0])
    parser.add_argument("--count", type=int, default=200, help="problems of each task")
    parser.add_argument("--batch", type=int, default=50)
    options = parser.parse_args()
    print(f"{os.cpu_count()} CPU cores, {datetime.date.today()}, torch {torch.__version__}, commit {checkout.commit()}")
    every: list[dict] = []
    for name, (about, length) in MODELS.items():
        for block in (about.tokens, length):
            plain, rows = run(name, block, options.count, options.batch)
            where = "one block" if block == about.tokens else f"blocks of {block}"
            title = f"{name}, {options.count} problems of {about.tokens} tokens in {where}"
            lines = [[f"{one.threshold:g}", share(one.right), f"{one.forwards:.2f}",
                      f"{about.tokens / one.forwards:.1f}"] for one in plain]  # fmt: skip
            print_table(["threshold", "right", "forwards", "tokens each"], lines, f"{title}: plain thresholds")
            print_table(list(SCORES), scores(rows, about.tokens), f"{title}: lookahead")
            print_table(list(VERDICTS), verdicts(rows, plain), f"{title}: verdicts")
            every += [asdict(row) for row in rows]
            every += [{"model": name, "block": block, **asdict(one)} for one in plain]
    print(json.dumps({"bench": "lookahead", "count": options.count, "rows": [
        row | {"right": "".join("01"[x] for x in row["right"])} for row in every
    ]}))  # fmt: skip


if __name__ == "__main__":
    main()
