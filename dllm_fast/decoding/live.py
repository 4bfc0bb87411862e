"""Some positions of each row, packed: what a step evaluates where it does not take consecutive slots of every row."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dllm_fast.families.rows import Packed

LEAST = 64  # positions of the smallest recorded step; each size is twice the one before


class Live(NamedTuple):
    """N positions of B rows, row by row. Guidance's rows, which see the prompt masked, follow the others."""

    packed: Packed
    slot: torch.Tensor  # [N] int64; of one that is of no row, it lies behind the cache
    place: torch.Tensor  # [N] int64: where in [B T], the rows' blocks; -1 for what is in none

    def gather(self, x: torch.Tensor, default) -> torch.Tensor:
        """Of each position, its x [B, T]; ``default`` where it is in no block. [N]"""
        return torch.cat((x.flatten(), x.new_full((1,), default)))[self.place]

    def at_places(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Of each place of the rows' blocks, [B, T] as ``shape`` says, which position lies there; -1 for none."""
        places = math.prod(shape)
        to = self.place.where(self.place >= 0, places)  # the cell behind the last takes in what is in no block
        at = torch.arange(len(to), device=to.device)
        return to.new_full((places + 1,), -1).index_copy(0, to, at)[:-1].view(shape)

    def spread(self, x: torch.Tensor, onto: torch.Tensor) -> torch.Tensor:
        """``onto`` [B, T, ...], with x [N, ...] at the positions' places."""
        at = self.at_places(onto.shape[:2])
        there = (at >= 0).view(*at.shape, *[1] * (onto.dim() - 2))
        return torch.where(there, x[at.clamp(min=0)], onto)

    def halves(self, hidden: torch.Tensor) -> tuple["Live", torch.Tensor, torch.Tensor]:
        """The rows without guidance's, and of hidden [N, d] their part and guidance's, [N / 2, d] each."""
        row, first, most = self.packed[:3]
        n, rows = len(hidden) // 2, len(first) // 2
        at = torch.arange(n, device=hidden.device)
        own = at < first[rows]
        live = Live(Packed(row[:n], first[: rows + 1], most), self.slot[:n], self.place[:n].where(own, -1))
        return live, hidden[:n], hidden[(at + first[rows]).clamp(max=len(hidden) - 1)]


def sizes(most: int) -> list[int]:
    """The numbers of positions for which a step is recorded, where there may be ``most``."""
    found = [min(LEAST, most)]
    while found[-1] < most:
        found.append(min(2 * found[-1], most))
    return found


def pack(
    wanted: torch.Tensor,  # [B, W] bool
    at: torch.Tensor,  # [B, W]: their slots
    offset: torch.Tensor,  # [B, W]: from the first of the row's block on
    block: int,  # the length of a block
    size: int,  # N
    most: int,  # of one row at most
    behind: int,  # the slot of what is left of N
) -> Live:
    """The positions ``wanted``. Nothing is read on the host."""
    rows = len(wanted)
    count = wanted.sum(1).cumsum(0).clamp(max=size)  # [B]
    row = torch.arange(rows, device=at.device)[:, None].expand_as(at)
    place = torch.where((offset >= 0) & (offset < block), row * block + offset, -1)
    order = wanted.flatten().cumsum(0) - 1
    order = torch.where(wanted.flatten() & (order < size), order, size)  # the others go to a cell behind the last

    def packed(x: torch.Tensor, default: int) -> torch.Tensor:
        return x.new_full((size + 1,), default).index_copy(0, order, x.flatten())[:-1]

    # The cell behind the last takes in all others, so what is at its place before it is cut off does not matter.
    return Live(Packed(packed(row, 0), F.pad(count, (1, 0)), most), packed(at, behind), packed(place, -1))
