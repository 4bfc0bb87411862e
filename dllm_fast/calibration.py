"""Draft graphs from a model's own answers: which states its steps reached, by what was predicted before.

`DraftGraph.chain` drafts what comes next if no prediction changes. Often one does: a position waits, and another comes
first. `calibrate` has the model answer prompts without drafts, and takes the drafts that would have saved the most
forwards (as Spiffy does, arXiv:2509.18085). ``dllm-fast calibrate`` puts them into the model's folder, where
``speculate=n`` finds them.
"""

import contextlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from dllm_fast.decoding.drafts import MOST, DraftGraph, Ranks
from dllm_fast.decoding.engine import Engine
from dllm_fast.decoding.options import BLOCK
from dllm_fast.decoding.values import require, whole
from dllm_fast.generate import generate_many
from dllm_fast.patch import bound_family

Draft = tuple[int, Ranks | None]
Paths = list[list[list[set[Draft]]]]
TRIED = 24  # candidates for the next draft: those whose absence ends the most forwards


@dataclass
class Taken:
    """What a step left behind, each [T] but the last two.

    block: tokens. masked: which are still [MASK]. rank: of these, by confidence. token: what was predicted for these.
    count: how many positions the step committed. planned: whether the schedule knew that beforehand.
    """

    block: torch.Tensor
    masked: torch.Tensor
    rank: torch.Tensor
    token: torch.Tensor
    count: int
    planned: bool


def calibrate(
    model: torch.nn.Module, prompts: Iterable[torch.Tensor], drafts: int = 7, batch_size: int = 8, **options
) -> DraftGraph:
    """The drafts with which ``prompts`` would have taken the fewest forwards, chosen one after the other: the first n
    of them are the choice of n. There are fewer than ``drafts`` if no further one saves any.

    ``prompts``, ``batch_size`` and ``options`` are as `generate_many`'s. The answers are written without drafts, but
    each forward evaluates two states.

    Raises:
        ValueError: ``drafts`` is not from 1 to 63; ``options`` have ``speculate``; or as `generate_many`.
    """
    drafts, batch_size = whole("drafts", drafts), whole("batch_size", batch_size)
    require(drafts <= MOST, f"drafts={drafts} is above {MOST}")
    require(options.get("speculate") is None, "speculate: calibrate takes the steps without drafts")
    return choose(follow(record(model, prompts, batch_size, options)), drafts)


def record(model, prompts, batch_size, options: dict) -> list[list[Taken]]:
    """The steps of each block of each prompt."""
    recorder = Recorder()
    # One draft: all of the block. Only a block's last step reaches it, and it has every position's token.
    whole_block = DraftGraph(((1, tuple(range(options.get("block_length") or bound_family(model).block or BLOCK))),))
    with Engine.watched(recorder.watch):
        for _ in generate_many(model, prompts, batch_size, **{**options, "speculate": whole_block}):
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
        rank, token = (x.to("cpu", copy=True) for x in (engine.rank, engine.drafts[:, 0]))
        keys = zip(engine.row.tolist(), engine.number.tolist(), strict=True)
        for b, (key, committed) in enumerate(zip(keys, count.tolist(), strict=True)):
            if committed:
                taken = Taken(block[b].cpu(), masked[b].cpu(), rank[b], token[b], committed, engine.is_planned)
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


def forwards(paths: Paths, graph: set[Draft]) -> tuple[int, Counter]:
    """How many forwards the blocks take with the drafts in ``graph``, and how many of them end for want of each other
    draft."""
    wanted: Counter[Draft] = Counter()
    count = 0
    for block in paths:
        taken = 0
        while taken < len(block):
            count += 1
            taken += 1  # the step from the state that was reached, then those from drafts, made by the step before it
            for fitting in block[taken - 2] if taken > 1 else ():
                if not fitting & graph:
                    wanted.update(fitting)
                    break
                taken += 1
    return count, wanted


def choose(paths: Paths, drafts: int) -> DraftGraph:
    """`calibrate`'s choice, of the drafts that ``paths`` hold."""
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
