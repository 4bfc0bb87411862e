"""Draft graphs: which states that a block's next steps may reach are guessed.

What a step predicts orders the positions that stay masked after it by confidence: their ranks. A draft is a set of
ranks, those that are thought to be committed after so many more steps, with the tokens that were predicted for them. A
draft is of use only if each state on the way to it is a draft too, so drafts form a graph (Spiffy, arXiv:2509.18085).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache

from dllm_fast.decoding.schedules import Schedule, Uniform
from dllm_fast.decoding.spelling import spell
from dllm_fast.decoding.values import is_whole, require

MOST = 63  # drafts of a forward
AUTO = 7  # drafts from which "auto" takes as many as pay
FILE = "drafts.json"  # in a model's folder
Ranks = tuple[int, ...]


@dataclass(frozen=True)
class DraftGraph:
    """Drafts, each (steps ahead, its ranks in ascending order, or None: those that come first, as many as the schedule
    will commit by then)."""

    drafts: tuple[tuple[int, Ranks | None], ...]

    def __post_init__(self) -> None:
        """Raises ValueError that names ``speculate`` and the draft."""
        require(len(self.drafts) <= MOST, f"speculate: {len(self.drafts)} drafts are more than {MOST}")
        ahead = [depth for depth, _ in self.drafts]
        for number, (depth, ranks) in enumerate(self.drafts):
            what = f"speculate: draft {number}, {(depth, ranks)}"
            good = ranks is None or (bool(ranks) and all(map(is_whole, ranks)) and sorted(set(ranks)) == list(ranks))
            require(is_whole(depth) and depth > 0 and good, f"{what}, is not (steps ahead, ascending ranks)")
            require(depth == 1 or depth - 1 in ahead, f"{what}: no draft is {depth - 1} steps ahead")

    @classmethod
    def chain(cls, length: int) -> "DraftGraph":
        """What the schedule would do if nothing that is masked were predicted anew."""
        return cls(tuple((depth, None) for depth in range(1, length + 1)))

    @property
    def depth(self) -> int:
        """How many steps ahead the farthest draft is."""
        return max((depth for depth, _ in self.drafts), default=0)


@dataclass(frozen=True)
class AutoGraph(DraftGraph):
    """Drafts of which as many are evaluated as pay, see `pace`."""


def as_drafts(name: str, value: Any) -> int | str | DraftGraph | None:
    """A number of drafts, ``"auto"`` or a `DraftGraph`; None for none. Raises ValueError that names ``name``."""
    if isinstance(value, DraftGraph):
        return value if value.drafts else None
    if value == "auto":
        return value
    wanted = f"{name}={value!r} is not a number of drafts from 0 to {MOST}, 'auto' or a DraftGraph"
    require(value is None or (is_whole(value) and 0 <= value <= MOST), wanted)
    return int(value) if value else None


def pays(device: torch.device) -> bool:
    """Whether more states can take less than so many times as long: on a CPU a forward is bound by its arithmetic."""
    return device.type == "cuda"


# Graphs beside a model


def key_of(schedule: Schedule, gen_length: int, block_length: int) -> str | None:
    """Under which name `FILE` has a graph for ``schedule``: ``"uniform 2"``, by tokens a step, or as on the command
    line, ``"threshold=0.9"``. None if the schedule has no name."""
    if isinstance(schedule, Uniform):
        steps = schedule.steps * block_length // gen_length if gen_length else 0
        return f"uniform {-(-block_length // steps)}" if steps else None
    try:
        return spell(schedule)
    except ValueError:
        return None


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
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {
            key: DraftGraph(tuple((depth, None if own is None else tuple(own)) for depth, own in drafts))
            for key, drafts in found.items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no draft graphs: {error}") from error


def write(folder: str | Path, key: str, graph: DraftGraph) -> Path:
    """Put ``graph`` under ``key`` into the model's ``folder``, beside those that are there. Returns the file."""
    graphs = {**read(folder), key: graph}
    lines = [f"  {json.dumps(name)}: {json.dumps(graphs[name].drafts)}" for name in sorted(graphs)]
    path = Path(folder) / FILE
    fresh = path.with_name(f"{FILE}.new")
    fresh.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    fresh.replace(path)
    return path


def graph_for(model: torch.nn.Module, wanted: int | str, key: str | None) -> DraftGraph:
    """So many drafts, or `AUTO`: the first of the model's own graph under ``key``, else a chain."""
    number = AUTO if wanted == "auto" else int(wanted)
    name = getattr(model.config, "name_or_path", "")
    folder = folder_of(name) if name else None
    known = {} if folder is None else read(folder)
    graph = known[key] if key in known else DraftGraph.chain(number)
    return (AutoGraph if wanted == "auto" else DraftGraph)(graph.drafts[:number])
