"""Attention while `Generic` runs a model's own forward: each layer's keys and values go to a cache, and come from it.

transformers calls attention in each layer and knows no slots. `backend` asks for the `Run` that is under way, if any.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from transformers.masking_utils import sdpa_mask

from dllm_fast import ops
from dllm_fast.families.cache import BlockCache
from dllm_fast.families.rows import Packed

_RUN: ContextVar["Run | None"] = ContextVar("run", default=None)


class Unserved(ValueError):
    """A layer asks attention for something that the kernels do not have."""


class Layer(NamedTuple):
    """What a layer's attention was called with."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None


@dataclass
class Run:
    """One forward over slots; the arguments are `Family.hidden`'s. ``layers``: those that called so far."""

    impl: str
    start: torch.Tensor | None = None
    end: torch.Tensor | None = None
    cache: BlockCache | None = None
    slot: torch.Tensor | None = None
    kept: torch.Tensor | None = None
    packed: Packed | None = None
    own: BlockCache | None = None
    block: int | None = None  # `Family.block`
    origin: torch.Tensor | None = None
    layers: list[Layer] = field(default_factory=list)
    seen: dict[int | None, tuple] = field(default_factory=dict)  # of `ops.visible`, by window

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
        """What q [B, T, H, D] attend to, [B, T, H, D]; k and v [B, T, G, D] are the next layer's, rotated already."""
        layer = len(self.layers)
        self.layers.append(Layer(q.shape[2], k.shape[2], q.shape[3], window))
        slots = q.shape[1] if self.cache is None else self.cache[0][0].shape[1]
        if window not in self.seen:
            self.seen[window] = ops.visible(
                q, slots, self.start, self.end, self.slot, window, self.packed, self.impl, self.block, self.origin
            )
        beside = None
        if self.cache is not None:
            assert self.slot is not None
            written = self.cache if self.own is None else self.own
            to_row = None if self.packed is None else self.packed.row
            # A row that is not kept writes behind the buffers, where nothing is stored.
            write_at = self.slot if self.kept is None else self.slot.where(self.kept, slots)
            q, k, v = ops.rope(
                q, k, v, *_unrotated(q), torch.zeros_like(write_at), write_at, *written[layer], to_row,
                outside=self.kept is not None, impl=self.impl,
            )  # fmt: skip
            if self.own is not None:
                beside, (k, v) = (k, v), self.cache[layer]
        return ops.attention(q, k, v, self.seen[window], beside, impl=self.impl)


def _unrotated(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [T, D/2] fp32 of a rotation by nothing: x 1 - y 0 is x. `ops.rope` then only writes."""
    shape = q.shape[1], q.shape[3] // 2
    cos = torch.ones(shape, dtype=torch.float32, device=q.device)
    return cos, torch.zeros_like(cos)


def is_available() -> bool:
    """Whether this transformers asks attention backends for masks, and says how many queries there are: 4.57 does
    not."""
    return "q_length" in inspect.signature(sdpa_mask).parameters


def current() -> Run | None:
    """The `Run` that is under way in this thread."""
    return _RUN.get()


@contextmanager
def running(run: Run) -> Iterator[Run]:
    token = _RUN.set(run)
    try:
        yield run
    finally:
        _RUN.reset(token)
