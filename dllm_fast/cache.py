"""K and V of every position, kept between the steps of a block."""

import torch


class BlockCache:
    """Static buffers of post-RoPE keys and of values, [B, S, G, D] a layer; `cache[layer]` is the pair.

    A full forward writes every slot; a block step overwrites its own slots and reads the rest as they are.
    """

    def __init__(self, layers: int, batch: int, slots: int, kv_heads: int, head_dim: int, dtype, device):
        shape = (layers, 2, batch, slots, kv_heads, head_dim)
        # Zeros, not empty: a slot that is never written is padding, and 0 x NaN would still be NaN.
        self.buffers = torch.zeros(shape, dtype=dtype, device=device)

    def __getitem__(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.buffers[layer]
        return keys, values
