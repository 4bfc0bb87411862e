"""Draft graphs: which states that a block's next steps may reach are guessed.

What a step predicts orders the positions that stay masked after it by confidence: their ranks. A draft is a set of
ranks, those that are thought to be committed after so many more steps, with the tokens that were predicted for them. A
draft is of use only if each state on the way to it is a draft too, so drafts form a graph (Spiffy, arXiv:2509.18085).

A graph may hold more drafts than a forward evaluates. Then each step prunes it, on the device: it keeps the drafts that
are likeliest to be reached, by a logistic model of how confident the step was of what a draft commits and of what it
leaves masked:

    log-odds = w[0] + w[1] * sum of log(confidence) of the positions that the draft commits
                    + w[2] * logit(highest confidence of those that stay masked)

with a ``w`` for each draft. A confidence that is a negative entropy counts as its exponential. Each draft that is
reached saves one forward, so the likeliest ones save the most.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache

from dllm_fast.decoding.graphs import records
from dllm_fast.decoding.schedules import Schedule, Uniform
from dllm_fast.decoding.spelling import spell
from dllm_fast.decoding.values import is_whole, require

MOST = 63  # drafts of a forward
AUTO = 7  # drafts from which "auto" takes as many as pay
FILE = "drafts.json"  # in a model's folder
LEAST = 1e-6  # a confidence is taken to be at least so far from 0 and from 1
Ranks = tuple[int, ...]
Weights = tuple[float, float, float]


@dataclass(frozen=True)
class DraftGraph:
    """Drafts, each (steps ahead, its ranks in ascending order, or None: those that come first, as many as the schedule
    will commit by then).

    A forward evaluates ``evaluated`` of them, or all (None). Without ``weights`` these are the first ones. With them,
    three for each draft, they are the likeliest ones after each step, by the module's formula.
    """

    drafts: tuple[tuple[int, Ranks | None], ...]
    evaluated: int | None = None
    weights: tuple[Weights, ...] | None = None

    def __post_init__(self) -> None:
        """Raises ValueError that names ``speculate`` and the draft or the field."""
        require(len(self.drafts) <= MOST, f"speculate: {len(self.drafts)} drafts are more than {MOST}")
        ahead = [depth for depth, _ in self.drafts]
        for number, (depth, ranks) in enumerate(self.drafts):
            what = f"speculate: draft {number}, {(depth, ranks)}"
            good = ranks is None or (bool(ranks) and all(map(is_whole, ranks)) and sorted(set(ranks)) == list(ranks))
            require(is_whole(depth) and depth > 0 and good, f"{what}, is not (steps ahead, ascending ranks)")
            require(depth == 1 or depth - 1 in ahead, f"{what}: no draft is {depth - 1} steps ahead")
        some = self.evaluated is None or (is_whole(self.evaluated) and 0 <= self.evaluated <= len(self.drafts))
        require(some, f"speculate: evaluated={self.evaluated!r} is not a number from 0 to {len(self.drafts)} or None")
        given = self.weights
        fits = given is None or len(given) == len(self.drafts)
        fits = fits and all(len(own) == 3 and all(map(math.isfinite, own)) for own in given or ())
        require(fits, f"speculate: weights={given} are not three finite numbers for each of {len(self.drafts)} drafts")

    @classmethod
    def chain(cls, length: int) -> "DraftGraph":
        """What the schedule would do if nothing that is masked were predicted anew."""
        return cls(tuple((depth, None) for depth in range(1, length + 1)))

    @classmethod
    def sets(cls, number: int) -> "DraftGraph":
        """The next step as it would be if it committed the first position by confidence, the first two, and so on."""
        return cls(tuple((1, tuple(range(count))) for count in range(1, number + 1)))

    @property
    def number(self) -> int:
        """How many drafts a forward evaluates."""
        return len(self.drafts) if self.evaluated is None else self.evaluated

    @property
    def depth(self) -> int:
        """How many steps ahead drafts of a forward can reach."""
        return min(max((depth for depth, _ in self.drafts), default=0), self.number)


@dataclass(frozen=True)
class AutoGraph(DraftGraph):
    """Drafts of which as many are evaluated as pay, see `pace`."""


def as_drafts(name: str, value: Any) -> int | str | DraftGraph | None:
    """A number of drafts, ``"auto"``, a JSON file of `calibrate`'s or a `DraftGraph`; None for none. Raises ValueError
    that names ``name``."""
    if isinstance(value, DraftGraph):
        return value if value.number else None
    if value == "auto":
        return value
    if isinstance(value, str) and value.endswith(".json"):
        require(Path(value).is_file(), f"{name}={value!r}: there is no such file")
        return value
    wanted = f"{name}={value!r} is not a number of drafts from 0 to {MOST}, 'auto', a .json file or a DraftGraph"
    require(value is None or (is_whole(value) and 0 <= value <= MOST), wanted)
    return int(value) if value else None


def pays(device: torch.device, impl: str) -> bool:
    """Whether more states can take less than so many times as long, and are timed only once: on a CPU a forward is
    bound by its arithmetic, and an engine that records nothing is not kept."""
    return records(device, impl)


# How likely drafts are


def features(
    score: torch.Tensor,  # [..., T]: confidences
    masked: torch.Tensor,  # [..., T] bool
    chosen: torch.Tensor,  # [..., G, T] bool: what drafts commit
) -> torch.Tensor:
    """What the module's formula weighs, [..., G, 2]. -inf where a draft leaves nothing masked: it ends the block, and
    there is nothing to evaluate it for."""
    confidence = score.clamp(LEAST, 1 - LEAST)[..., None, :]
    masked = masked[..., None, :]
    committed = torch.where(masked & chosen, confidence.log(), 0.0).sum(-1)
    best_left = torch.where(masked & ~chosen, confidence.logit(), float("-inf")).amax(-1)
    return torch.stack((committed, best_left), -1)


def log_odds(found: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Of drafts with the `features` [..., G, 2] and ``weights`` [G, 3], [..., G]; -inf where nothing is left masked."""
    ends = found[..., 1] == float("-inf")
    found = found.masked_fill(ends[..., None], 0.0)  # a weight of either sign
    return ((found * weights[:, 1:]).sum(-1) + weights[:, 0]).masked_fill(ends, float("-inf"))


# Graphs beside a model


def key_of(schedule: Schedule, gen_length: int, block_length: int, confidence: str = "probability") -> str | None:
    """Under which name `FILE` has a graph for ``schedule``: ``"uniform 2"``, by tokens a step, or as on the command
    line, ``"threshold=0.9"``; with a ``confidence`` other than the probability, ``"uniform 2, entropy"``. None if the
    schedule has no name."""
    if isinstance(schedule, Uniform):
        steps = schedule.steps * block_length // gen_length if gen_length else 0
        name = f"uniform {-(-block_length // steps)}" if steps else None
    else:
        try:
            name = spell(schedule)
        except ValueError:
            return None
    usual = schedule.confidence is not None or confidence == "probability"
    return name if name is None or usual else f"{name}, {confidence}"


def folder_of(name: str) -> Path | None:
    """Where the files of a model are: its folder, or that of the hub's copy on this machine; None if there is none."""
    if Path(name).is_dir():
        return Path(name)
    try:
        config = try_to_load_from_cache(name, "config.json")
    except ValueError:  # not a hub name
        return None
    return Path(config).parent if isinstance(config, str) else None


def read(folder: str | Path) -> dict[str, DraftGraph]:
    """The graphs in a model's ``folder``, by `key_of`; none without `FILE`. Raises ValueError that names the file."""
    path = Path(folder) / FILE
    return read_file(path) if path.is_file() else {}


def read_file(path: Path) -> dict[str, DraftGraph]:
    """The graphs in a file, by `key_of`. Raises ValueError that names it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {key: _parsed(**graph) for key, graph in found.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no draft graphs: {error}") from error


def _parsed(drafts: list, weights: list | None) -> DraftGraph:
    kept = tuple((depth, None if own is None else tuple(own)) for depth, own in drafts)
    return DraftGraph(kept, None, None if weights is None else tuple((b, c, left) for b, c, left in weights))


def write(folder: str | Path, key: str, graph: DraftGraph) -> Path:
    """Put ``graph`` under ``key`` into the model's ``folder``, beside those that are there, but for how many of its
    drafts a forward evaluates. Returns the file."""
    graphs = {**read(folder), key: graph}
    lines = []
    for name in sorted(graphs):
        kept = {field: getattr(graphs[name], field) for field in ("drafts", "weights")}
        lines.append(f"  {json.dumps(name)}: {json.dumps(kept)}")
    path = Path(folder) / FILE
    fresh = path.with_name(f"{FILE}.new")
    fresh.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    fresh.replace(path)
    return path


def graph_for(model: torch.nn.Module, wanted: int | str, key: str | None, planned: bool) -> DraftGraph:
    """So many drafts, or `AUTO`, of the model's own graph under ``key``. Without one a chain, or sets for a schedule
    that has not ``planned`` how many positions a step commits. Or `AUTO` of a file's graph.
    Raises ValueError if the file has none."""
    number = AUTO if isinstance(wanted, str) else int(wanted)
    if isinstance(wanted, str) and wanted != "auto":
        known = read_file(Path(wanted))
        require(key in known, f"speculate={wanted!r}: it has no drafts for {key}, but for {', '.join(sorted(known))}")
    else:
        name = getattr(model.config, "name_or_path", "")
        folder = folder_of(name) if name else None
        known = {} if folder is None else read(folder)
    graph = known.get(str(key)) or (DraftGraph.chain if planned else DraftGraph.sets)(number)
    kind = AutoGraph if wanted == "auto" else DraftGraph
    return kind(graph.drafts, min(number, len(graph.drafts)), graph.weights)
