"""LLaDA: the published remote-code class and the native one, which name their modules alike."""

from collections.abc import Iterator

import torch
from torch import nn

from dllm_fast import ops
from dllm_fast.families.bypass import Calls, known_classes
from dllm_fast.families.cache import BlockCache
from dllm_fast.families.linears import Products, products, require_weights
from dllm_fast.families.native import LLaDAConfig, kv_heads
from dllm_fast.families.rounded import RoundedHead
from dllm_fast.families.rows import Impl, RopeTables, is_span, take

CALLED = frozenset(("wte", "q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"))


class LLaDA:
    """A LLaDA's forward over `ops`. Weights are read from the model's own modules at each call."""

    def __init__(
        self, model: nn.Module, impl: str, products: Products = products, rounded_head: RoundedHead | None = None
    ):
        config = model.config
        self._check(config)
        self.transformer = model.model.transformer
        require_weights(
            (f"model.transformer.{name}", module)
            for name, module in self.transformer.named_modules()
            if name.endswith(("attn_norm", "ff_norm", "ln_f")) or name == "ff_out"
        )
        # The head of a tied model is an embedding whose weight is read.
        files = ("dllm_fast.families.native", nn.Embedding.__module__)
        self.known = known_classes(model, self.calls, files) | {nn.Embedding}
        self._impl, self.products, self.rounded_head = Impl(impl, self.head()[0]), products, rounded_head
        self.positions = config.max_sequence_length
        self.head_dim = config.d_model // config.n_heads
        self.heads, self.kv_heads = config.n_heads, kv_heads(config)
        self.layers = config.n_layers
        self.ffn_width = config.mlp_hidden_size or config.mlp_ratio * config.d_model
        self.theta, self.eps = config.rope_theta, config.rms_norm_eps
        self._tables = RopeTables(self.positions, self.head_dim, [self.theta], self.head()[0].device)

    @staticmethod
    def _check(config) -> None:
        for name, supported in LLaDAConfig.architecture.items():
            asked = getattr(config, name, supported)
            if asked is not None and asked != supported:
                raise ValueError(f"model.config.{name}={asked!r} is not supported, only {supported!r}")

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
        padding_counts: bool = False,  # positions are slots, as in the models' own forwards; else padding has none
    ) -> torch.Tensor:
        """What the LM head multiplies, [B, T, d] or the chosen rows of it.

        Without a cache the T ids are the whole sequence. With one they are slots ``slot`` to ``slot + T`` of it:
        their keys and values are written there, and every valid slot is attended to, however old. Rows that are not
        ``kept`` leave the cache as it was, and what comes out of them is of no use. From layer ``from_layer`` on, over
        all slots: the ids are not read, but the hidden states that the cache has of that layer.
        """
        transformer, impl, products = self.transformer, self.impl, self.products
        slots = input_ids.shape[1] if cache is None else cache[0][0].shape[1]
        seen = ops.visible(input_ids, slots, start, end, slot, impl=impl)
        position = slot if start is None or padding_counts else (slot if slot is not None else 0) - start
        to = slot if kept is None else slot.where(kept, slots)  # behind the buffers, which is nowhere
        cos, sin = self._tables(self.theta, input_ids.device)
        x = transformer.wte(input_ids) if from_layer == 0 else cache.states[from_layer][:, : input_ids.shape[1]].clone()
        delta = None
        for layer, block in enumerate(transformer.blocks[from_layer:], from_layer):
            y, x = self._norm(x, delta, block.attn_norm)
            if cache is not None:
                cache.keep_state(layer, x, slot, kept)
            q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in products(y, *_qkv(block), impl=impl))
            buffers = cache[layer] if cache else ()
            q, k, v = ops.rope(q, k, v, cos, sin, position, to, *buffers, outside=kept is not None, impl=impl)
            if layer == self.layers - 1 and is_span(rows):
                q, x, begin = take(q, rows), take(x, rows), rows[:, 0] + (0 if slot is None else slot)
                seen, rows = ops.visible(q, slots, start, end, begin, impl=impl), None
            attended = ops.attention(q, k, v, seen, impl=impl).flatten(2)
            if layer == self.layers - 1:
                attended, x = take(attended, rows), take(x, rows)
            y, x = self._norm(x, *products(attended, block.attn_out, impl=impl), block.ff_norm)
            (gated,) = products(y, *_gate_up(block), gated=True, impl=impl)
            (delta,) = products(gated, block.ff_out, impl=impl)
        return self._norm(x, delta, transformer.ln_f)[0]

    def _norm(self, x, delta, norm):
        if delta is None:
            return ops.rms_norm(x, norm.weight, self.eps, impl=self.impl)
        return ops.rms_norm(delta, norm.weight, self.eps, residual=x, impl=self.impl)

    @property
    def impl(self) -> str:
        """The implementation of the ops, see `ops.resolve`."""
        return self._impl(self.head()[0])

    def head(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """LM head weight [V, d] and bias."""
        head = self.transformer.ff_out
        return head.weight, head._parameters.get("bias")

    def head_operands(self) -> tuple[torch.Tensor | None, ...]:
        """What `ops.predict` and `ops.logits` multiply by: `head`, or its weight in e4m3, the bias and a scale [V]."""
        return self.head() if self.rounded_head is None else self.rounded_head(*self.head())

    @property
    def vocab_size(self) -> int:
        """Words that have a logit: `resize_token_embeddings` changes it."""
        return self.head()[0].shape[0]

    @property
    def calls(self) -> Calls:
        """The modules that `hidden` calls, so that what is attached to them acts, see `bypass`."""
        head = self.transformer.ff_out
        return Calls(CALLED, None if head is self.transformer.wte else head)

    def groups(self) -> Iterator[tuple[nn.Module, ...]]:
        """The linears of the layers that multiply one input, group by group."""
        return self._groups(self.transformer)

    @staticmethod
    def linears(model: nn.Module) -> Iterator[tuple[nn.Module, ...]]:
        """`groups` of a model, whose weights need not be there."""
        return LLaDA._groups(model.model.transformer)

    @staticmethod
    def _groups(transformer: nn.Module) -> Iterator[tuple[nn.Module, ...]]:
        for block in transformer.blocks:
            yield from (_qkv(block), (block.attn_out,), _gate_up(block), (block.ff_out,))


def _qkv(block: nn.Module) -> tuple[nn.Module, ...]:
    return block.q_proj, block.k_proj, block.v_proj


def _gate_up(block: nn.Module) -> tuple[nn.Module, ...]:
    return block.ff_proj, block.up_proj
