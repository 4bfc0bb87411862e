"""K and V of every position, kept between the steps of a block."""

import torch

from dllm_fast import launchers, ops
from dllm_fast.kernels.reference_rounded import E4M3, as_bytes


def no_e4m3(impl: str, device: torch.device) -> str | None:
    """Why a cache cannot keep keys and values in e4m3; None if it can."""
    if impl == "triton":
        return launchers.no_e4m3(device)
    try:
        torch.zeros(1, dtype=torch.float32, device=device).to(E4M3).float()
    except (RuntimeError, TypeError):
        return f"PyTorch {torch.__version__} has no float8_e4m3fn on {device}"
    return None


class BlockCache:
    """Static buffers of post-RoPE keys and of values, [B, S, G, D] each; `cache[layer]` is a layer's pair.

    A full forward writes every slot; a block step overwrites its own slots and reads the others as they are. With a
    ``width``, `states` keeps the hidden states [B, S, width] that enter each layer. ``rounded``: keys and values are
    kept in e4m3, states as they are.
    """

    def __init__(
        self, layers: int, batch: int, slots: int, kv_heads: int, head_dim: int, dtype, device, width: int = 0,
        rounded: bool = False,
    ):  # fmt: skip
        shape = (layers, 2, batch, slots, kv_heads, head_dim)
        # Zeros, because a slot that is never written is padding: attention multiplies it by 0, and 0 x NaN is NaN.
        self.buffers = torch.zeros(shape, dtype=E4M3 if rounded else dtype, device=device)
        self.states = torch.zeros((layers, batch, slots, width), dtype=dtype, device=device) if width else None

    @property
    def nbytes(self) -> int:
        return self.buffers.nbytes + (0 if self.states is None else self.states.nbytes)

    def __getitem__(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.buffers[layer]
        return keys, values

    def values(self, layer: int, slot: torch.Tensor) -> torch.Tensor:
        """The values of ``layer`` at ``slot`` [B, T], [B, T, G D] fp32."""
        row = torch.arange(len(slot), device=slot.device)
        return as_bytes(self.buffers[layer, 1])[row[:, None], slot].view(self.buffers.dtype).flatten(2).float()

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
        """Copy ``slots`` slots of the rows ``index`` [N] of another cache, whose slot ``shift`` is slot 0 here; it is
        below 0 where the other has fewer."""
        to, source = slice(max(0, -shift), max(0, -shift) + slots), slice(max(0, shift), max(0, shift) + slots)
        as_bytes(self.buffers)[:, :, :, to] = as_bytes(other.buffers)[:, :, index, source]
        if self.states is not None and other.states is not None:
            self.states[:, :, to] = other.states[:, index, source]

    def first(self, slots: int) -> "BlockCache":
        """A view of the first ``slots``."""
        part = object.__new__(BlockCache)
        part.buffers = self.buffers[:, :, :, :slots]
        part.states = None if self.states is None else self.states[:, :, :slots]
        return part

    def take_slots(self, to: torch.Tensor, other: "BlockCache", source: torch.Tensor, kept: torch.Tensor) -> None:
        """Take another cache's slots ``source`` [B, T] to the slots ``to``, in the rows that are ``kept`` [B] bool."""
        row = torch.arange(len(to), device=to.device)[:, None]
        pairs = [(as_bytes(self.buffers).flatten(0, 1), as_bytes(other.buffers).flatten(0, 1))]  # [2 L, B, S, G, D]
        if self.states is not None and other.states is not None:
            pairs.append((self.states, other.states))
        for mine, its in pairs:
            there = kept.view(-1, *[1] * (mine.dim() - 2))
            mine[:, row, to] = torch.where(there, its[:, row, source], mine[:, row, to])
