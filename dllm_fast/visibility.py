"""Which slots queries see, found once in a forward for all layers with one window."""

from typing import NamedTuple

import torch

from dllm_fast.kernels import reference, reference_states


class Both(NamedTuple):
    """What the queries of states see, and behind them those of one further state of each row."""

    states: tuple
    also: tuple
    queries: int  # of states
    own: int  # slots of a row's states; those of the further one lie behind them


def visible(
    like, slots, start=None, end=None, slot=None, window=None, packed=None, impl="torch", block=None, origin=None
) -> tuple:
    """Which of ``slots`` each query sees, for `attention`: made once in a forward for all layers with one window.

    ``like`` [B, T, ...] gives the batch, the number of queries and the device. ``start`` and ``slot`` [B] default to 0,
    ``end`` to ``slots``; these, ``block`` and ``origin`` are as in `reference.attention`. With ``packed``, a
    `rows.Packed`, ``like`` is [N, 1, ...] and ``slot`` [N].

    With `rows.States` the packed queries are those of several states; attention is then given their keys and values.
    With one further state behind them, see `rows.Packed`, what is returned is `Both`.

    For Triton the last item says whether the queries are all slots and see all slots: PyTorch's attention may then
    serve. For PyTorch it is (near, mask, blind, places). near [B, W] are the slots that a window can reach, so that a
    few queries do not read the whole buffer; None for all slots. mask [B, T or 1, W or S] says which of them each query
    sees. blind [B, T or 1] marks queries that see none. places: `places_of` of packed queries, which T is the most of.
    """
    ranges = () if packed is None else (None, packed.first, packed.most)
    if block is not None:
        ranges = (*(ranges or (None, None, 0)), None, 0, None, None, block, origin)
    if packed is not None and packed.also is not None:
        return _both(slots, start, end, slot, window, packed, impl)
    if packed is not None and packed.states is not None:
        return _visible_to_states(slots, start, end, slot, window, packed, impl)
    if impl == "cpp":
        return start, end, slot, window, *ranges
    batch, queries = like.shape[:2]
    places = None
    if packed is not None:
        batch, queries = len(packed.first) - 1, packed.most
        if impl == "torch":
            places = places_of(packed)
            slot = slot[places[0]]
    free = start is None and end is None and window is None and block is None  # all queries see all slots
    if impl == "torch" and free:
        return None, None, None, places
    whole = free and packed is None and queries == slots
    zero = torch.zeros(batch, dtype=torch.int64, device=like.device)
    start, end, slot = (zero if x is None else x for x in (start, zero + slots if end is None else end, slot))
    if impl == "triton":
        return start, end, slot, window, *ranges, whole
    near = None
    if window is None and block is None:
        queries = 1  # all queries see the same slots
    elif window is not None and block is None and packed is None and queries + 2 * window < slots:
        reach = queries + 2 * window
        first = (slot - window).clamp(0, slots - reach)
        near = first[:, None] + torch.arange(reach, device=like.device)
        # From here on slots count from the first one in reach.
        slots = reach
        start = start - first
        end = end - first
        slot = slot - first
    mask = reference.visible_slots(queries, slots, start, end, slot, window, block, origin)
    return near, mask, ~mask.any(-1), places


def _visible_to_states(slots, start, end, slot, window, packed, impl) -> tuple:
    """`visible` for the queries of states."""
    hole, length, states = packed.states
    if impl == "cpp":
        return start, end, slot, window, None, packed.first, packed.most, hole, length
    start, end = (
        (torch.zeros_like(hole) if start is None else start),
        (torch.full_like(hole, slots) if end is None else end),
    )
    if impl == "triton":
        return start, end, slot, window, None, packed.first, packed.most, hole, length, False
    places = places_of(packed)
    seen = reference_states.visible(slots, states * length, start, end, slot[places[0]], window, hole, length)
    return None, seen, ~seen.any(-1), places


def _both(slots, start, end, slot, window, packed, impl) -> Both:
    """`visible` for the queries of states, and of one further state."""
    also, own = packed.also, packed.states.length * packed.states.number
    first = also.length * torch.arange(len(packed.first), device=slot.device)
    queries = len(packed.row) - also.length * (len(first) - 1)
    states = packed._replace(row=packed.row[:queries], also=None)
    further = packed._replace(row=packed.row[queries:], first=first, most=also.length, states=also, also=None)
    return Both(
        _visible_to_states(slots, start, end, slot[:queries], window, states, impl),
        _visible_to_states(slots, start, end, slot[queries:] - own, window, further, impl),
        queries,
        own,
    )


def places_of(packed) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of packed queries: which one is at each place of the rows, [B, most]; the row and the place of each, [N] each.

    Places beyond a row's queries repeat others, as do queries beyond the rows'.
    """
    row, first, most = packed[:3]
    index = torch.arange(len(row), device=row.device)
    at = (first[:-1, None] + torch.arange(most, device=row.device)).clamp(max=max(0, len(row) - 1))
    return at, row, (index - first[row]).clamp(max=max(0, most - 1))
