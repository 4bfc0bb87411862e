"""Parts of the families' forward: the choice of rows, the implementation, and rotary tables."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dllm_fast import ops
from dllm_fast.kernels.reference import rope_table


class States(NamedTuple):
    """Where packed positions are those of several states of each row's live slots, a state after the other.

    A state's keys and values are in buffers of their own, ``length`` slots of them after those of the state before.
    They take the place of the row's slots from ``hole`` on.
    """

    hole: torch.Tensor  # [B] int64
    length: int
    number: int


class Packed(NamedTuple):
    """Some positions of each row of a cache, one row's after the other's, each row's in order: N in all."""

    row: torch.Tensor  # [N] int64: the row of each
    first: torch.Tensor  # [B + 1] int64: where each row's begin; what lies behind the last is of no row
    most: int  # of one row at most
    position: torch.Tensor | None = None  # [N] int64: in its sequence; None: what its slot is of the row's range
    states: States | None = None
    also: States | None = None  # one further state of each row: its positions lie behind those of all others


def first_position(
    start: torch.Tensor | None,  # [B]: first valid slot
    slot: torch.Tensor | None,  # [B], or [N] if packed: of each row's first id
    packed: Packed | None,
    padding_counts: bool,
) -> torch.Tensor | None:
    """The position of each row's first id, [B], or [N] if packed; None: 0. Padding has positions if it counts."""
    if packed is not None and packed.position is not None:
        return packed.position
    if start is None or padding_counts:
        return slot
    return (0 if slot is None else slot) - (start if packed is None else start[packed.row])


def take(x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """The chosen rows of x [B, T, ...].

    ``rows`` is None for all; bool [B, T] for the rows that are True, flattened to [N, ...]; int [B, R] for R
    consecutive rows of each batch row, [B, R, ...]; or int [N] for these of B, [N, T, ...].
    """
    if rows is None:
        return x
    if rows.dtype == torch.bool or rows.dim() == 1:
        return x[rows]
    return x[torch.arange(x.shape[0], device=x.device)[:, None], rows]


def is_span(rows: torch.Tensor | None) -> bool:
    """Whether ``rows`` are consecutive: the last layer then computes attention only for them."""
    return rows is not None and rows.dtype != torch.bool and rows.dim() == 2


def valid_spans(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first valid slot, one past the last, and the number of valid slots of a mask [B, S], 0 = padding; [B] int64.

    The number is the difference of the other two unless the row has a hole; it is 0 for a row without valid slots.
    """
    valid = mask.long()
    return valid.argmax(1), valid.shape[1] - valid.flip(1).argmax(1), valid.sum(1)


class Impl:
    """The implementation that ``impl`` stands for on the weights' device: ``.to()`` may change that of ``"auto"``."""

    def __init__(self, asked: str, weight: torch.Tensor):
        self.asked = asked
        self._resolved: dict[tuple[torch.device, torch.dtype], str] = {}
        self(weight)  # now, because torch.compile could not trace it

    def __call__(self, weight: torch.Tensor) -> str:
        key = weight.device, weight.dtype
        if key not in self._resolved:
            self._resolved[key] = ops.resolve(self.asked, *key)
        return self._resolved[key]


class RopeTables:
    """cos and sin [positions, D/2] fp32 for each theta, made now, and again when the model changes device.

    ``rotated``: how many of a head's D channels are rotated; the others by an angle of 0. `ordered` puts each where it
    then has to lie.
    """

    def __init__(
        self, positions: int, head_dim: int, thetas: Iterable[float], device: torch.device, rotated: int | None = None
    ):
        self.positions = positions
        self.head_dim = head_dim
        self.rotated = head_dim if rotated is None else rotated
        self._tables: dict[tuple[float, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}
        self._order: dict[torch.device, torch.Tensor] = {}
        for theta in set(thetas):
            self(theta, device)
        self._order_on(device)

    def __call__(self, theta: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if (theta, device) not in self._tables:
            self._tables = {key: table for key, table in self._tables.items() if key[1] == device}
            with torch.inference_mode(False):  # a later call may need gradients
                cos, sin = rope_table(self.positions, self.rotated, theta, device)
                still = (self.head_dim - self.rotated) // 2
                self._tables[theta, device] = F.pad(cos, (0, still), value=1.0), F.pad(sin, (0, still))
        return self._tables[theta, device]

    def ordered(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., D] of q or k for a rotation in pairs half a head apart, where the model rotates its first channels in
        pairs half of them apart. Scores are the same in any order that q and k share."""
        return x if self.rotated == self.head_dim else x[..., self._order_on(x.device)]

    def _order_on(self, device: torch.device) -> torch.Tensor:
        """Which channel lies at each place, [D] int64."""
        if device not in self._order:
            first, second, rest = self.rotated // 2, self.rotated, (self.head_dim - self.rotated) // 2
            with torch.inference_mode(False):
                at = torch.arange(self.head_dim, device=device)
                order = torch.cat((at[:first], at[second : second + rest], at[first:second], at[second + rest :]))
            self._order = {device: order}
        return self._order[device]
