"""`Layered`: a family whose forward is written here, over `ops`, layer by layer."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from dllm_fast import ops
from dllm_fast.families.bypass import Calls, Departure, departure, known_classes, require_nothing_left_out
from dllm_fast.families.family import Family
from dllm_fast.families.linears import Matmuls, matmuls, require_weights
from dllm_fast.families.rounded import RoundedHead
from dllm_fast.families.rows import RopeTables, first_position, is_span, take


class Layered(Family):
    """A model's forward over `ops`. Weights are read from the model's own modules at each call."""

    model_class: type[PreTrainedModel]  # what `from_pretrained` loads
    # From a config's auto_map and `from_pretrained`'s arguments to the published config and class; None where no remote
    # code is needed.
    remote_code: Callable | None = None
    # Modules whose classes the forward may bypass, beside the model's own and PyTorch's.
    files: tuple[str, ...]
    eps: float
    thetas: list[float]  # a layer's rotary base
    rotated: int | None = None  # channels of a head that are rotated, the first ones; None: all
    shared = False  # whether processes can share the model, see `tensor_parallel`

    def __init__(
        self, model: nn.Module, impl: str, matmuls: Matmuls = matmuls, rounded_head: RoundedHead | None = None
    ):
        super().__init__(model, impl, matmuls, rounded_head)
        config: Any = model.config
        self._read_config(config)
        require_weights(self._read_modules())
        self.known = known_classes(model, self.calls, self.files)
        self._settle()
        self._tables = RopeTables(self.positions, self.head_dim, self.thetas, self.head()[0].device, self.rotated)

    @property
    @abstractmethod
    def calls(self) -> Calls:
        """The modules that `hidden` calls, so that hooks and adapters on them act, see `bypass`."""

    def require_whole(self) -> None:
        require_nothing_left_out(self.model, self.calls, self.known)

    def departure(self) -> Departure | None:
        return departure(self.model, self.calls, self.known, modes=True)

    def groups(self) -> Iterator[tuple[nn.Module, ...]]:
        return self.linears(self.model)

    # What `loading` asks of the family, whose forward is not needed for it.

    @staticmethod
    @abstractmethod
    def linears(model: nn.Module) -> Iterator[tuple[nn.Module, ...]]:
        """The linears of the layers, those that multiply one input together. Their weights need not be there."""

    # What the forward is made of: x and delta are [B, T, d], ``x + delta`` is the residual stream.

    @abstractmethod
    def _read_config(self, config: PretrainedConfig) -> None:
        """Set the sizes above. Raises ValueError for an architecture that the forward is not written for."""

    @abstractmethod
    def _read_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """(name, module) of those whose weights are read without a call: the norms and the head."""

    @property
    @abstractmethod
    def blocks(self) -> nn.ModuleList: ...

    @abstractmethod
    def _embed(self, input_ids):
        """What enters the first layer, [B, T, d]."""

    def _norm(self, x, delta, norm):
        """``norm(x + delta)`` and the sum; ``delta`` None: of x alone. An RMSNorm, unless a family has another."""
        if delta is None:
            return ops.rms_norm(x, norm.weight, self.eps, impl=self.impl)
        return ops.rms_norm(delta, norm.weight, self.eps, residual=x, impl=self.impl)

    @staticmethod
    @abstractmethod
    def _qkv(block):
        """The linears of q, k and v: three, or one that has q's rows, then k's, then v's."""

    @abstractmethod
    def _after_attention(self, block, attended, x, impl):
        """The rest of a layer, from attended [B, T, H D]: the next delta, and the x to which it is added."""

    @abstractmethod
    def _finish(self, x, delta):
        """The input of the head, [B, T, d], from x and delta of the last layer."""

    def hidden(
        self, input_ids, start=None, end=None, cache=None, slot=None, rows=None, from_layer=0, kept=None, packed=None,
        own=None, padding_counts=False, origin=None,
    ):  # fmt: skip
        impl = self.impl
        slots = input_ids.shape[1] if cache is None else cache[0][0].shape[1]
        ranges = slots, start, end
        blocks = {"impl": impl, "block": self.block, "origin": origin}
        seen = {w: ops.visible(input_ids, *ranges, slot, w, packed, **blocks) for w in set(self.windows)}
        to_row = None if packed is None else packed.row
        position = first_position(start, slot, packed, padding_counts)
        written = cache if own is None else own
        # A row that is not kept writes behind the buffers, where nothing is stored.
        write_at = slot if kept is None else slot.where(kept, slots)
        x = self._embed(input_ids) if from_layer == 0 else cache.state(from_layer, to_row, slot)
        delta = None
        for layer, block in enumerate(self.blocks[from_layer:], from_layer):
            window = self.windows[layer]
            last = layer == self.layers - 1
            # 1. Norm, q, k and v; keys and values go into the cache.
            y, x = self._norm(x, delta, block.attn_norm)
            if cache is not None:
                written.keep_state(layer, x, slot, kept, to_row)
            tables = self._tables(self.thetas[layer], x.device)
            rope = *tables, position, write_at, *((*written[layer], to_row) if written else ())
            q, k, v = self._rotated(block, y, rope, kept is not None, impl)
            beside = None
            if own is not None:
                beside, (k, v) = (k, v), cache[layer]
            # 2. Attention. In the last layer only the chosen rows go on: consecutive ones are not attended for others.
            if last and is_span(rows):
                q = take(q, rows)
                x = take(x, rows)
                first_slot = rows[:, 0] + (0 if slot is None else slot)
                seen[window] = ops.visible(q, *ranges, first_slot, window, **blocks)
                rows = None
            attended = ops.attention(q, k, v, seen[window], beside, impl=impl).flatten(2)
            if last:
                attended = take(attended, rows)
                x = take(x, rows)
            # 3. The output's linear, a norm and the gated linears.
            delta, x = self._after_attention(block, attended, x, impl)
        return self._finish(x, delta)

    def _rotated(
        self, block: nn.Module, y: torch.Tensor, rope: tuple, outside: bool, impl: str
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [B, T, H, D] and the keys and values to attend to; ``rope``: `ops.rope`'s arguments from ``cos`` on."""
        linears, buffers = self._qkv(block), rope[4:6]
        if buffers and impl == "triton" and (q := self.matmuls(y, *linears, impl=impl, rope=rope)) is not None:
            return q, *buffers
        return ops.rope(*self._projected(block, y, impl), *rope, outside=outside, impl=impl)

    def _projected(self, block: nn.Module, y: torch.Tensor, impl: str) -> Iterator[torch.Tensor]:
        """q [B, T, H, D], k and v [B, T, G, D] before the rotation."""
        parts: Any = self.matmuls(y, *self._qkv(block), impl=impl)
        if len(parts) == 1:
            parts = parts[0].split([n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)], -1)
        return (part.unflatten(-1, (-1, self.head_dim)) for part in parts)


class Trained(Layered):
    """A family whose models are trained here."""

    @staticmethod
    @abstractmethod
    def labelled(
        model: nn.Module, input_ids: torch.Tensor | None, chosen: torch.Tensor, embeds: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, nn.Module]:
        """Hidden states [N, d] at ``chosen`` [B, L] bool by the modules of a `model_class`, and its head. The input is
        ``input_ids`` [B, L], or ``embeds`` [B, L, d] in their place."""

    @staticmethod
    @abstractmethod
    def new(width, heads, kv_heads, layers, ffn, positions, tie, **tokens):
        """A model of these sizes to be trained; ``tokens``: ``vocab_size`` and ids, as a config names them."""
