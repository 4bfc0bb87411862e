"""What the families' forwards share: the choice of rows, and rotary tables that outlive no device."""

from collections.abc import Iterable

import torch

from dllm_fast import ops
from dllm_fast.kernels.reference import rope_table


def take(x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """The wanted rows of x [B, T, ...].

    ``rows`` None: all; bool [B, T]: those that are True, flattened to [N, ...]; int [B, R]: R consecutive ones per
    batch row, [B, R, ...].
    """
    if rows is None:
        return x
    if rows.dtype == torch.bool:
        return x[rows]
    return x[torch.arange(x.shape[0], device=x.device)[:, None], rows]


def is_span(rows: torch.Tensor | None) -> bool:
    """Whether ``rows`` are consecutive: then the last layer needs attention for them alone."""
    return rows is not None and rows.dtype != torch.bool


def valid_spans(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """First valid slot, one past the last, and how many are valid, each [B] int64, of a mask [B, S], 0 = padding.

    The third is the difference of the others unless the row has a hole; of a row without any it is 0.
    """
    valid = mask.long()
    return valid.argmax(1), valid.shape[1] - valid.flip(1).argmax(1), valid.sum(1)


class Impl:
    """What ``impl`` stands for where the weights lie now: ``"auto"`` may be another after ``.to()``."""

    def __init__(self, asked: str, weight: torch.Tensor):
        self.asked, self._found = asked, {}
        self(weight)  # torch.compile could not trace the search

    def __call__(self, weight: torch.Tensor) -> str:
        key = weight.device, weight.dtype
        if key not in self._found:
            self._found[key] = ops.resolve(self.asked, *key)
        return self._found[key]


class RopeTables:
    """cos and sin [positions, D/2] fp32 of each theta, made at once and again when the model changes device."""

    def __init__(self, positions: int, head_dim: int, thetas: Iterable[float], device: torch.device):
        self.positions, self.head_dim, self._tables = positions, head_dim, {}
        for theta in set(thetas):
            self(theta, device)

    def __call__(self, theta: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if (theta, device) not in self._tables:
            self._tables = {key: table for key, table in self._tables.items() if key[1] == device}
            with torch.inference_mode(False):  # a later call may want gradients through what they multiply
                self._tables[theta, device] = rope_table(self.positions, self.head_dim, theta, device)
        return self._tables[theta, device]
