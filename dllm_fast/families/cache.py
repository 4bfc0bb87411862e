"""K and V of every position, kept between the steps of a block."""

import torch

from dllm_fast import ops


class BlockCache:
    """Static buffers of post-RoPE keys and of values, [B, S, G, D] each; `cache[layer]` is a layer's pair.

    A full forward writes every slot; a block step overwrites its own slots and reads the others as they are. With a
    ``width``, `states` keeps the hidden states [B, S, width] that enter each layer.
    """

    def __init__(
        self, layers: int, batch: int, slots: int, kv_heads: int, head_dim: int, dtype, device, width: int = 0
    ):
        shape = (layers, 2, batch, slots, kv_heads, head_dim)
        # Zeros, because a slot that is never written is padding: attention multiplies it by 0, and 0 x NaN is NaN.
        self.buffers = torch.zeros(shape, dtype=dtype, device=device)
        self.states = torch.zeros((layers, batch, slots, width), dtype=dtype, device=device) if width else None

    @property
    def nbytes(self) -> int:
        return self.buffers.nbytes + (0 if self.states is None else self.states.nbytes)

    def __getitem__(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.buffers[layer]
        return keys, values

    def keep_state(
        self,
        layer: int,
        x: torch.Tensor,  # [B, T, width]
        slot: torch.Tensor,  # [B]
        kept: torch.Tensor | None = None,  # [B] bool: rows of x to keep; None: all
        to_row: torch.Tensor | None = None,  # [B]: their rows here; None: each its own
    ) -> None:
        """Keep x, which enters ``layer`` at the slots from ``slot`` on. Does nothing in a cache without states."""
        if self.states is None:
            return
        states = self.states[layer]
        if to_row is not None:
            source = ops.stored(slot, states.shape[1])
            x, slot, to_row = x[source], slot[source], to_row[source]
        row = (torch.arange(x.shape[0], device=x.device) if to_row is None else to_row)[:, None]
        slots = slot[:, None] + torch.arange(x.shape[1], device=x.device)
        if kept is not None:
            x = x.where(kept[:, None, None], states[row, slots])
        states[row, slots] = x

    def state(self, layer: int, row: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        """What `keep_state` kept for ``layer`` at the rows ``row`` [N] and their slots ``slot`` [N]: [N, 1, width]."""
        assert self.states is not None
        return self.states[layer][row, slot][:, None]

    def take_over(self, other: "BlockCache", index: torch.Tensor, shift: int, slots: int) -> None:
        """Fill slots 0 to ``slots`` from the rows ``index`` [N] of a larger cache, whose slots begin at ``shift``."""
        self.buffers[:, :, :, :slots] = other.buffers[:, :, index, shift : shift + slots]
        if self.states is not None and other.states is not None:
            self.states[:, :, :slots] = other.states[:, index, shift : shift + slots]

    def first(self, slots: int) -> "BlockCache":
        """A view of the first ``slots``."""
        part = object.__new__(BlockCache)
        part.buffers = self.buffers[:, :, :, :slots]
        part.states = None if self.states is None else self.states[:, :, :slots]
        return part

    def take_slots(self, to: torch.Tensor, other: "BlockCache", source: torch.Tensor, kept: torch.Tensor) -> None:
        """Take another cache's slots ``source`` [B, T] to the slots ``to``, in the rows that are ``kept`` [B] bool."""
        row = torch.arange(len(to), device=to.device)[:, None]
        pairs = [(self.buffers.flatten(0, 1), other.buffers.flatten(0, 1))]  # [2 L, B, S, G, D] each
        if self.states is not None and other.states is not None:
            pairs.append((self.states, other.states))
        for mine, its in pairs:
            there = kept.view(-1, *[1] * (mine.dim() - 2))
            mine[:, row, to] = torch.where(there, its[:, row, source], mine[:, row, to])
