"""`Family`: what `patch`, `loading` and training ask of a family of models, and the forward that all families share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput, ModelOutput

from dllm_fast import ops
from dllm_fast.families.bypass import Calls, known_classes
from dllm_fast.families.cache import BlockCache
from dllm_fast.families.linears import Matmuls, matmuls, require_weights
from dllm_fast.families.rounded import RoundedHead
from dllm_fast.families.rows import Impl, Packed, RopeTables, is_span, take


class Family(ABC):
    """A model's forward over `ops`. Weights are read from the model's own modules at each call.

    Each subclass is one family and an entry of `families.FAMILIES`. Only it knows the names of its modules.
    """

    model_class: type[PreTrainedModel]  # what `from_pretrained` loads
    # From a config's auto_map and `from_pretrained`'s arguments to the published config and class; None where no remote
    # code is needed.
    remote_code: Callable | None = None
    # Modules whose classes the forward may bypass, beside the model's own and PyTorch's.
    files: tuple[str, ...]
    positions: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    ffn_width: int
    eps: float
    windows: list[int | None]  # a layer's: it sees |i - j| <= window; None: all slots
    thetas: list[float]  # a layer's rotary base

    def __init__(
        self, model: nn.Module, impl: str, matmuls: Matmuls = matmuls, rounded_head: RoundedHead | None = None
    ):
        self.model: Any = model  # each family knows its modules' names
        self.matmuls = matmuls
        self.rounded_head = rounded_head
        config: Any = model.config
        self._read_config(config)
        require_weights(self._read_modules())
        self.known = known_classes(model, self.calls, self.files)
        weight = self.head()[0]
        self._impl = Impl(impl, weight)
        self._tables = RopeTables(self.positions, self.head_dim, self.thetas, weight.device)

    @property
    @abstractmethod
    def calls(self) -> Calls:
        """The modules that `hidden` calls, so that hooks and adapters on them act, see `bypass`."""

    # What `patch`, `loading` and training ask of the family, whose forward is not needed for it.

    @staticmethod
    @abstractmethod
    def matches(model: nn.Module) -> bool:
        """Whether the forward is written for this model, whose config has the family's ``model_type``."""

    @staticmethod
    def output_type(model: nn.Module) -> type[ModelOutput]:
        """What the model's own forward returns."""
        return MaskedLMOutput

    @staticmethod
    def repaired_buffers(model: nn.Module) -> list[tuple[nn.Module, str, torch.Tensor]]:
        """(module, name, value) of every buffer with a wrong value, which `patch` replaces until `unpatch`."""
        return []

    @staticmethod
    @abstractmethod
    def linears(model: nn.Module) -> Iterator[tuple[nn.Module, ...]]:
        """The linears of the layers, those that multiply one input together. Their weights need not be there."""

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
    def head(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """LM head weight [V, d] and bias [V]."""

    @abstractmethod
    def _embed(self, input_ids):
        """What enters the first layer, [B, T, d]."""

    @abstractmethod
    def _norm(self, x, delta, norm):
        """``norm(x + delta)`` and the sum; ``delta`` None: of x alone."""

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
        self,
        input_ids: torch.Tensor,  # [B, T] int64
        start: torch.Tensor | None = None,  # [B] int: first valid slot
        end: torch.Tensor | None = None,  # [B] int: one past the last
        cache: BlockCache | None = None,
        slot: torch.Tensor | None = None,  # [B] int: slot of each row's first id
        rows: torch.Tensor | None = None,  # see `rows.take`
        from_layer: int = 0,
        kept: torch.Tensor | None = None,  # [B] bool: rows whose keys and values are written; None: all
        packed: Packed | None = None,  # the ids are [N, 1], those that it says; slot is [N], start and end its rows'
        own: BlockCache | None = None,  # the states' keys and values, see `rows.States`; ``slot`` is then in it
        padding_counts: bool = False,  # positions are slots, as in the models' own forwards; else padding has none
    ) -> torch.Tensor:
        """The input of the LM head, [B, T, d], or its chosen rows.

        Without a cache the T ids are the whole sequence. With a cache they are its slots ``slot`` to ``slot + T``:
        their keys and values are written there, and all valid slots are attended to, stale ones too. Rows that are not
        ``kept``, and packed ids with a slot behind the last, do not change the cache, and their results are
        meaningless. With ``from_layer`` above 0 the ids are packed, and not read: the forward starts at that layer,
        from the hidden states in the cache.
        """
        impl = self.impl
        slots = input_ids.shape[1] if cache is None else cache[0][0].shape[1]
        seen = {w: ops.visible(input_ids, slots, start, end, slot, w, packed, impl=impl) for w in set(self.windows)}
        to_row = None if packed is None else packed.row
        begin = start if start is None or to_row is None else start[to_row]
        position = slot if begin is None or padding_counts else (slot if slot is not None else 0) - begin
        if packed is not None and packed.position is not None:
            position = packed.position
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
                seen[window] = ops.visible(q, slots, start, end, first_slot, window, impl=impl)
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
        parts = self.matmuls(y, *linears, impl=impl)
        if len(parts) == 1:
            parts = parts[0].split([n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)], -1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        return ops.rope(q, k, v, *rope, outside=outside, impl=impl)

    def groups(self) -> Iterator[tuple[nn.Module, ...]]:
        """`linears` of this model."""
        return self.linears(self.model)

    @property
    def impl(self) -> str:
        """The implementation of the ops, see `ops.resolve`."""
        return self._impl(self.head()[0])

    def head_operands(self) -> tuple[torch.Tensor | None, ...]:
        """The head for `ops.predict` and `ops.logits`: `head`, or its weight in e4m3, the bias and a scale [V]."""
        return self.head() if self.rounded_head is None else self.rounded_head(*self.head())

    @property
    def vocab_size(self) -> int:
        """The number of tokens that have a logit; `resize_token_embeddings` changes it."""
        return self.head()[0].shape[0]
