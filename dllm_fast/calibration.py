"""Draft graphs from a model's own answers: which states its steps reached, by what was predicted before.

`DraftGraph.chain` drafts what comes next if no prediction changes. Often one does: a position waits, and another comes
first. `calibrate` has the model answer prompts without drafts, and takes the drafts that would have saved the most
forwards (as Spiffy does, arXiv:2509.18085). Then it fits how likely each is to be reached by the confidences of a step,
by which the engine chooses among them, if that saves more still. ``dllm-fast calibrate`` puts all that into the model's
folder, where ``speculate=n`` finds it.
"""

import contextlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, pad

from dllm_fast.decoding.drafts import MOST, DraftGraph, Ranks, features, log_odds
from dllm_fast.decoding.engine import Engine
from dllm_fast.decoding.options import BLOCK
from dllm_fast.decoding.values import require, whole
from dllm_fast.generate import generate_many
from dllm_fast.patch import bound_family

Draft = tuple[int, Ranks | None]
Paths = list[list[list[set[Draft]]]]
DRAFTS = 24  # in a graph, of which each step chooses
TRIED = 24  # candidates for the next draft: those whose absence ends the most forwards
ITERATIONS = 100  # of the fit


@dataclass
class Taken:
    """What a step left behind, each [T] but the last two.

    block: tokens. masked: which are still [MASK]. score: confidences of these. rank: by them. token: what was predicted
    for these. count: how many positions the step committed. planned: whether the schedule knew that beforehand.
    """

    block: torch.Tensor
    masked: torch.Tensor
    score: torch.Tensor
    rank: torch.Tensor
    token: torch.Tensor
    count: int
    planned: bool


def calibrate(
    model: torch.nn.Module, prompts: Iterable[torch.Tensor], drafts: int = 7, batch_size: int = 8, **options
) -> DraftGraph:
    """Drafts with which ``prompts`` would have taken few forwards. A forward evaluates ``drafts`` of them, or fewer if
    no further one saved any: the likeliest by a step's confidences, or the first if these save as much.

    ``prompts``, ``batch_size`` and ``options`` are as `generate_many`'s. The answers are written without drafts, but
    each forward evaluates two states.

    Raises:
        ValueError: ``drafts`` is not from 1 to 63; ``options`` have ``speculate``; or as `generate_many`.
    """
    drafts, batch_size = whole("drafts", drafts), whole("batch_size", batch_size)
    require(drafts <= MOST, f"drafts={drafts} is above {MOST}")
    require(options.get("speculate") is None, "speculate: calibrate takes the steps without drafts")
    blocks = record(model, prompts, batch_size, options)
    paths = follow(blocks)
    graph = choose(paths, max(drafts, DRAFTS))
    graph = replace(graph, evaluated=min(drafts, graph.number))
    found = samples(blocks, graph)
    pruned = fit(found, paths, graph)
    # The first drafts are chosen for what they save together, the likeliest each for itself: either may save more.
    without, _ = forwards(paths, set(graph.drafts[: graph.number]))
    return pruned if graph.drafts and forwards(paths, likeliest(found, pruned))[0] < without else graph


def record(model, prompts, batch_size, options: dict) -> list[list[Taken]]:
    """The steps of each block of each prompt."""
    recorder = Recorder()
    # One draft: all of the block. Only a block's last step reaches it, and it has every position's token.
    whole_block = DraftGraph(((1, tuple(range(options.get("block_length") or bound_family(model).block or BLOCK))),))
    given = {**options, "speculate": whole_block, "logprobs": True}  # with these no forward looks at the next block
    with Engine.watched(recorder.watch):
        for _ in generate_many(model, prompts, batch_size, **given):
            pass
    return list(recorder.blocks.values())


class Recorder:
    """Writes down each step of any engine, by prompt and block."""

    def __init__(self):
        self.blocks: dict[tuple[int, int], list[Taken]] = {}

    @contextlib.contextmanager
    def watch(self, engine: Engine, step):
        _, before = self._block(engine)
        yield
        block, masked = self._block(engine)
        count = (before & ~masked).sum(1)
        score, rank, token = (x.to("cpu", copy=True) for x in (engine.score, engine.rank, engine.drafts[:, 0]))
        keys = zip(engine.row.tolist(), engine.number.tolist(), strict=True)
        for b, (key, committed) in enumerate(zip(keys, count.tolist(), strict=True)):
            if committed:
                kept = (block[b].cpu(), masked[b].cpu(), score[b], rank[b], token[b])
                taken = Taken(*kept, committed, engine.is_planned)
                self.blocks.setdefault(key, []).append(taken)

    @staticmethod
    def _block(engine: Engine) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens of each row's block, and which the model has still to choose, [B, T] each."""
        at = engine.slot[:, None] + engine.offsets
        block = engine.canvas.gather(1, at)
        return block, (block == engine.options.mask_id) & engine.open.gather(1, at)


def follow(blocks: list[list[Taken]]) -> Paths:
    """By block and step, which drafts would be the state 1, 2, ... steps later, up to the first that none would."""
    return [[_followed(steps, n) for n in range(len(steps))] for steps in blocks]


def _followed(steps: list[Taken], n: int) -> list[set[Draft]]:
    base, path, foreseen = steps[n], [], 0
    for ahead, step in enumerate(steps[n + 1 :], 1):
        drafted = base.masked & ~step.masked
        if not step.masked.any() or not torch.equal(step.block, base.token.where(drafted, base.block)):
            break
        ranks = tuple(sorted(base.rank[drafted].tolist()))
        fitting: set[Draft] = {(ahead, ranks)}
        foreseen += step.count if base.planned else base.count
        if ranks == tuple(range(foreseen)):
            fitting.add((ahead, None))
        path.append(fitting)
    return path


def forwards(paths: Paths, graph: set[Draft] | list[list[set[Draft]]]) -> tuple[int, Counter]:
    """How many forwards the blocks take with the drafts in ``graph``, always the same or by block and step, and how
    many of them end for want of each other draft."""
    wanted: Counter[Draft] = Counter()
    count = 0
    for number, block in enumerate(paths):
        taken = 0
        while taken < len(block):
            count += 1
            taken += 1  # the step from the state that was reached, then those from drafts, made by the step before it
            last = taken - 2
            for fitting in block[last] if taken > 1 else ():
                if not fitting & (graph if isinstance(graph, set) else graph[number][last]):
                    wanted.update(fitting)
                    break
                taken += 1
    return count, wanted


def choose(paths: Paths, drafts: int) -> DraftGraph:
    """The drafts of ``paths`` that save the most forwards, one after the other, up to ``drafts``."""
    chosen: list[Draft] = []
    for _ in range(drafts):
        now, wanted = forwards(paths, set(chosen))
        most = sorted(wanted, key=lambda draft: (-wanted[draft], draft[0], draft[1] is not None, draft[1] or ()))
        left = {draft: forwards(paths, {*chosen, draft})[0] for draft in most[:TRIED]}
        best = min(left, key=left.__getitem__, default=None)
        if best is None or left[best] == now:
            break
        chosen.append(best)
    return DraftGraph(tuple(chosen))


def samples(blocks: list[list[Taken]], graph: DraftGraph) -> list[torch.Tensor]:
    """The `features` of the ``graph``'s drafts after each step, [steps, G, 2] of each block."""

    def sample(steps: list[Taken], n: int) -> torch.Tensor:
        return features(steps[n].score.double(), steps[n].masked, _chosen(steps, n, graph))

    return [torch.stack([sample(steps, n) for n in range(len(steps))]) for steps in blocks if graph.drafts]


def fit(found: list[torch.Tensor], paths: Paths, graph: DraftGraph) -> DraftGraph:
    """``graph`` with the weights under which the drafts that ``paths`` reached are likeliest: for each draft a logistic
    regression over all steps, of which `samples` are ``found``. It is drawn towards how often the draft is reached, by
    a normal prior on what differs from that; the features are scaled to a deviation of one."""
    if not graph.drafts:
        return graph
    fitting = (set().union(*step) for path in paths for step in path)
    reached = [[draft in drafts for draft in graph.drafts] for drafts in fitting]
    sampled, hit = torch.cat(found), torch.tensor(reached, dtype=torch.float64, device="cpu")  # [N, G, 2], [N, G]
    fits = sampled[..., 1] > float("-inf")
    mean, spread = sampled[fits].mean(0), sampled[fits].std(0, correction=0).clamp(min=1e-6)
    sampled = (sampled - mean) / spread
    rate = (hit.sum(0) + 0.5) / (fits.sum(0) + 1)
    start = pad(rate.logit()[:, None], (0, 2))  # [G, 3]
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = binary_cross_entropy_with_logits(log_odds(sampled, weights)[fits], hit[fits], reduction="sum")
        value = (value + (weights - start).square().sum() / 2) / fits.sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    scaled = weights.detach()[:, 1:] / spread
    bias = weights.detach()[:, 0] - (scaled * mean).sum(1)
    rows = torch.cat((bias[:, None], scaled), 1).tolist()
    return replace(graph, weights=tuple((round(b, 3), round(c, 3), round(left, 3)) for b, c, left in rows))


def likeliest(found: list[torch.Tensor], graph: DraftGraph) -> list[list[set[Draft]]]:
    """By block and step, of which `samples` are ``found``, the drafts of the ``graph`` that the engine evaluates."""
    weights = torch.tensor(graph.weights, dtype=torch.float64, device="cpu")
    orders = (log_odds(block, weights).sort(descending=True, stable=True).indices for block in found)
    return [[{graph.drafts[i] for i in step[: graph.number]} for step in order.tolist()] for order in orders]


def _chosen(steps: list[Taken], n: int, graph: DraftGraph) -> torch.Tensor:
    """What the drafts that follow step ``n`` of a block commit, [G, T] bool."""
    base = steps[n]
    rows = []
    for ahead, own in graph.drafts:
        if own is not None:
            rows.append(torch.isin(base.rank, torch.tensor(own, dtype=torch.int64, device="cpu")))
            continue
        later = [step.count for step in steps[n + 1 : n + 1 + ahead]] if base.planned else [base.count] * ahead
        rows.append(base.rank < sum(later))
    return torch.stack(rows)
