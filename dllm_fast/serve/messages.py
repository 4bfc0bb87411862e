"""What the HTTP process and the worker process tell each other."""

from dataclasses import dataclass

from dllm_fast.decoding.options import Options


@dataclass(frozen=True)
class Request:
    """Prompts to answer with the same options, a seed among them. Choice n is row n of `generate`'s batch.

    blocks: tell each finished block; else only the last, when a choice is done.
    drafts: tell the live block after each step.
    """

    number: int
    prompts: list[list[int]]
    options: Options
    blocks: bool = False
    drafts: bool = False


@dataclass(frozen=True)
class Cancel:
    """Nobody waits for this request any more, or for one choice of it."""

    number: int
    choice: int | None = None


@dataclass(frozen=True)
class Ready:
    """The worker's first message: what is served."""

    device: str
    positions: int
    mask_id: int
    eos_ids: tuple[int, ...]


@dataclass(frozen=True)
class Broken:
    """The worker's only message: why it cannot serve."""

    error: str


@dataclass(frozen=True)
class Accepted:
    """The request's rows are planned, and wait for seats."""

    number: int


@dataclass(frozen=True)
class Refused:
    """The request's options do not fit the model, each other or the memory: ``error`` begins with the option's name if
    one is to blame."""

    number: int
    error: str


@dataclass(frozen=True)
class Failed:
    """The request was accepted and cannot be answered. again: asked again, it may be."""

    number: int
    error: str
    again: bool = False


@dataclass(frozen=True)
class Block:
    """Tokens of the answer ``choice`` from its ``begin``-th on that are final, and the forwards so far."""

    number: int
    choice: int
    begin: int
    ids: list[int]
    nfe: int
    done: bool


@dataclass(frozen=True)
class Draft:
    """The answer ``choice`` from its ``begin``-th token to the end of the live block, after a step; with [MASK]s."""

    number: int
    choice: int
    begin: int
    ids: list[int]


@dataclass(frozen=True)
class Load:
    """How many rows are seated and how many wait."""

    seated: int
    waiting: int
