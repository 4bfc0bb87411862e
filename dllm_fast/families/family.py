"""`Family`: what `patch` and generation ask of a model, whoever wrote its forward."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import MaskedLMOutput, ModelOutput

from dllm_fast import ops
from dllm_fast.families.bypass import Departure, settings
from dllm_fast.families.cache import BlockCache
from dllm_fast.families.linears import Matmuls, matmuls, place
from dllm_fast.families.ranks import Ranks
from dllm_fast.families.rounded import Copies, RoundedHead
from dllm_fast.families.rows import Impl, Packed

ORIGINS = ("start", "prompt")  # what `config.block_causal_origin` may be


class Family(ABC):
    """A model's forward up to its LM head, with or without a cache of keys and values."""

    positions: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    ffn_width: int
    windows: list[int | None]  # a layer's: it sees |i - j| <= window; None: all slots
    generates = True  # whether the model has an LM head
    runs_own = False  # whether the patched model's forward is its own, with another attention
    keeps_weights: str | None = None  # why there are no rounded weights; None: there are
    layerwise = True  # whether `hidden` can begin at any layer
    softcap: float | None = None  # of the head's logits, see `reference.capped`
    shifted = False  # the head's output at position i predicts token i + 1
    ranks: Ranks | None = None  # the processes that share the model
    block: int | None = None  # of a block-causal model, the length of its blocks
    after_prompt = False  # whether these are counted from the end of the prompt; else from the first position
    own_blocks = False  # whether the model's own forward has them, counted from the first position

    def __init__(
        self, model: nn.Module, impl: str, matmuls: Matmuls = matmuls, rounded_head: RoundedHead | None = None
    ):
        self.asked = impl  # as given to `patch`
        self.model: Any = model  # each family knows its modules' names
        self.matmuls = matmuls
        self.rounded_head = rounded_head

    def _settle(self) -> None:
        """Fix the implementation of the ops."""
        self._impl = Impl(self.asked, self.weight)

    @property
    def weight(self) -> torch.Tensor:
        """One of the dtype and on the device that the forward runs in."""
        return self.head()[0]

    @property
    def impl(self) -> str:
        """The implementation of the ops, see `ops.resolve`."""
        return self._impl(self.weight)

    @abstractmethod
    def require_whole(self) -> None:
        """Raise ValueError naming what is attached to the model and would have no effect."""

    def departure(self) -> Departure | None:
        """Why a patched model must run its own forward, if it does not anyway."""
        return None

    @staticmethod
    @abstractmethod
    def matches(model: nn.Module) -> bool:
        """Whether the forward is written for this model."""

    @staticmethod
    def output_type(model: nn.Module) -> type[ModelOutput]:
        """What the model's own forward returns."""
        return MaskedLMOutput

    @staticmethod
    def repaired_buffers(model: nn.Module) -> list[tuple[nn.Module, str, torch.Tensor]]:
        """(module, name, value) of every buffer with a wrong value, which `patch` replaces until `unpatch`."""
        return []

    def groups(self) -> Iterator[tuple[nn.Module, ...]]:
        """The linears that multiply one input together, whose weights the family may move or round."""
        yield from ()

    def methods(self) -> dict[str, Callable]:
        """Functions that a patched model has as its methods, by name, beside its forward and ``generate``."""
        return {}

    def adopt(self) -> list:
        """Change the model as the forward needs it. Returns what was changed, for `release`."""
        return []

    def release(self, changed: list) -> None:
        """Undo `adopt`."""
        return None

    @abstractmethod
    def head(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """LM head weight [V, d] and bias [V]; of a shared model, those of the rank's own ids."""

    @abstractmethod
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
        origin: torch.Tensor | None = None,  # [B] int: where a model's blocks are counted from; None: ``start``
    ) -> torch.Tensor:
        """The input of the LM head, [B, T, d], or its chosen rows.

        Without a cache the T ids are the whole sequence. With a cache they are its slots ``slot`` to ``slot + T``:
        their keys and values are written there, and all valid slots are attended to, stale ones too. Rows that are not
        ``kept``, and packed ids with a slot behind the last, do not change the cache, and their results are
        meaningless. With ``from_layer`` above 0 the ids are packed, and not read: the forward starts at that layer,
        from the hidden states in the cache. Of a `shifted` model each position gets what its left neighbour among the
        ids has, which predicts it; the first of a sequence has none, and gets its own. Of a model with a `block` no
        position sees one behind its own block, and the slots before ``origin`` are one block.
        """

    def head_operands(self) -> tuple[torch.Tensor | None, ...]:
        """The head for `ops.predict` and `ops.logits`: `head`, or its weight in e4m3, the bias and a scale [V]."""
        return self.head() if self.rounded_head is None else self.rounded_head(*self.head())

    def recorded(self, model: nn.Module) -> tuple:
        """What a recorded step of ``model`` goes by: where weights and what was made from them lie, and the settings of
        modules that it calls. The weights' values it reads anew."""
        made = () if not isinstance(self.matmuls, Copies) else self.matmuls.places(self.groups())
        head = () if self.rounded_head is None else self.rounded_head.places()
        tensors = (*model.parameters(), *model.buffers())
        return tuple(map(place, tensors)), made, head, settings(model)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The head's logits [..., V] of hidden states [..., d], before any softcap."""
        own = ops.logits(hidden, *self.head_operands(), impl=self.impl)
        return own if self.ranks is None else self.ranks.joined(own)

    @property
    def vocab_size(self) -> int:
        """The number of tokens that have a logit; `resize_token_embeddings` changes it."""
        return self.head()[0].shape[0] * (1 if self.ranks is None else self.ranks.size)

    def _read_blocks(self, config: Any) -> None:
        """Set `block` and `after_prompt` as the config says. Raises ValueError that names the field and its value."""
        block, origin = getattr(config, "block_causal", None), getattr(config, "block_causal_origin", "start")
        if block is not None and (type(block) is not int or block < 1):
            raise ValueError(f"model.config.block_causal={block!r} is not a positive number of positions")
        asked = f"model.config.block_causal_origin={origin!r}"
        if origin not in ORIGINS:
            raise ValueError(f"{asked} is not one of {', '.join(map(repr, ORIGINS))}")
        if origin == "prompt" and block is None:
            raise ValueError(f"{asked}: model.config.block_causal does not say how long its blocks are")
        self.block, self.after_prompt = block, origin == "prompt"
