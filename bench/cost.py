"""Bytes and FLOPs that a step needs at the least, from a model's shapes alone.

Of a step over n positions: every matrix product of the layers on n rows, attention of n queries over the slots that
they see, in the last layer what lies behind keys and values for the live positions alone, and the LM head on the
positions that are masked. Bytes: the weights once, and against a cache the keys and values of all slots. Norms,
rotations, gates and activations are taken to cost nothing. A multiplication and an addition count two.
"""

from dataclasses import dataclass

from dllm_fast.patch import bound_family


@dataclass(frozen=True)
class Cost:
    """A model's numbers. Weights are counted in elements."""

    every: int  # of one layer, on all rows: keys and values
    rest: int  # of one layer, on all rows but in the last layer
    transform: int  # between the last layer and the head, on live rows
    head: int
    windows: tuple[int | None, ...]  # of each layer, how far a query sees to either side; None: everything
    heads: int
    kv_heads: int
    head_dim: int
    item: int  # bytes of an element

    @classmethod
    def of(cls, model) -> "Cost":
        """Of a patched LLaDA or ModernBERT."""
        family = bound_family(model)
        head = family.head()[0]
        width, ffn, key_width = head.shape[1], family.ffn_width, family.kv_heads * family.head_dim
        bert = hasattr(family, "windows")
        heads = width // family.head_dim
        return cls(
            every=2 * width * key_width, rest=2 * width * heads * family.head_dim + 3 * width * ffn,
            transform=width * width if bert else 0, head=head.numel(),
            windows=tuple(family.windows) if bert else (None,) * family.layers,
            heads=heads, kv_heads=family.kv_heads, head_dim=family.head_dim, item=head.element_size(),
        )  # fmt: skip

    def flops(self, positions: float, live: int, masked: int, slots: int) -> float:
        """Of a step over ``positions`` of all rows, ``live`` of them in blocks, in sequences of ``slots``."""
        total = 2 * (self.head * masked + self.transform * live)
        for layer, window in enumerate(self.windows):
            queries = live if layer == len(self.windows) - 1 else positions
            seen = slots if window is None else min(slots, 2 * window + 1)
            total += 2 * (self.every * positions + self.rest * queries)
            total += 4 * queries * seen * self.heads * self.head_dim
        return total

    def bytes(self, rows: int, slots: int, cached: bool) -> int:
        """Weights; where ``cached``, the keys and values of every slot, which are written or read."""
        weights = (self.every + self.rest) * len(self.windows) + self.transform + self.head
        pairs = 2 * rows * slots * self.kv_heads * self.head_dim * len(self.windows) if cached else 0
        return self.item * (weights + pairs)
