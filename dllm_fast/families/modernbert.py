"""ModernBERT (arXiv:2412.13663): transformers' own `ModernBertForMaskedLM`, 4.57 or 5.x."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn
from transformers import ModernBertForMaskedLM

from dllm_fast import ops
from dllm_fast.families.bypass import Calls, known_classes
from dllm_fast.families.cache import BlockCache
from dllm_fast.families.linears import Products, products, require_weights
from dllm_fast.families.rounded import RoundedHead
from dllm_fast.families.rows import Impl, RopeTables, is_span, take

FILES = (ModernBertForMaskedLM.__module__, "torch.nn.modules.normalization", "transformers.activations")
CALLED = frozenset(("tok_embeddings", "Wqkv", "Wo", "Wi", "dense"))


class ModernBert:
    """A ModernBERT's forward over `ops`. Weights are read from the model's own modules at each call."""

    calls = Calls(CALLED, None)

    def __init__(
        self, model: nn.Module, impl: str, products: Products = products, rounded_head: RoundedHead | None = None
    ):
        config = model.config
        for name in ("hidden_activation", "classifier_activation"):
            if getattr(config, name) != "gelu":
                raise ValueError(f"model.config.{name}={getattr(config, name)!r} is not supported, only 'gelu'")
        require_weights(
            (name, module)
            for name, module in model.named_modules()
            if (name.endswith("norm") and not isinstance(module, nn.Identity)) or name == "decoder"
        )
        self.model, self.products, self.rounded_head = model, products, rounded_head
        self.known = known_classes(model, self.calls, FILES)
        self._impl = Impl(impl, self.head()[0])
        self.positions = config.max_position_embeddings
        self.heads = self.kv_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.layers = config.num_hidden_layers
        self.ffn_width = config.intermediate_size
        self.eps = config.norm_eps
        # A sliding layer sees |i - j| <= local_attention // 2, whatever number its attention function is handed.
        self.windows = [config.local_attention // 2 if sliding else None for sliding in sliding_layers(config)]
        self.thetas = [rope_theta(config, window is not None) for window in self.windows]
        self._tables = RopeTables(self.positions, self.head_dim, self.thetas, self.head()[0].device)

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
        """What the decoder multiplies, [B, T, d] or the chosen rows of it; arguments as in `LLaDA.hidden`."""
        backbone, impl, products = self.model.model, self.impl, self.products
        slots = input_ids.shape[1] if cache is None else cache[0][0].shape[1]
        seen = {w: ops.visible(input_ids, slots, start, end, slot, w, impl=impl) for w in set(self.windows)}
        position = slot if start is None or padding_counts else (slot if slot is not None else 0) - start
        to = slot if kept is None else slot.where(kept, slots)  # behind the buffers, which is nowhere
        if from_layer == 0:
            x = self._norm(backbone.embeddings.tok_embeddings(input_ids), None, backbone.embeddings.norm)[0]
        else:
            x = cache.states[from_layer][:, : input_ids.shape[1]].clone()
        delta = None
        for layer, block in enumerate(backbone.layers[from_layer:], from_layer):
            y, x = self._norm(x, delta, block.attn_norm)
            if cache is not None:
                cache.keep_state(layer, x, slot, kept)
            (qkv,) = products(y, block.attn.Wqkv, impl=impl)
            qkv = qkv.unflatten(-1, (3, self.heads, self.head_dim))
            cos, sin = self._tables(self.thetas[layer], x.device)
            buffers = cache[layer] if cache else ()
            q, k, v = ops.rope(*qkv.unbind(-3), cos, sin, position, to, *buffers, outside=kept is not None, impl=impl)
            window = self.windows[layer]
            if layer == self.layers - 1 and is_span(rows):
                q, x, begin = take(q, rows), take(x, rows), rows[:, 0] + (0 if slot is None else slot)
                seen[window], rows = ops.visible(q, slots, start, end, begin, window, impl=impl), None
            attended = ops.attention(q, k, v, seen[window], impl=impl).flatten(2)
            if layer == self.layers - 1:
                attended, x = take(attended, rows), take(x, rows)
            y, x = self._norm(x, *products(attended, block.attn.Wo, impl=impl), block.mlp_norm)
            (gate_up,) = products(y, block.mlp.Wi, impl=impl)
            (delta,) = products(ops.geglu(*gate_up.chunk(2, -1), impl=impl), block.mlp.Wo, impl=impl)
        x = self._norm(x, delta, backbone.final_norm)[0]
        return self._norm(F.gelu(self.model.head.dense(x)), None, self.model.head.norm)[0]

    def _norm(self, x, delta, norm):
        if isinstance(norm, nn.Identity):  # the first layer's attn_norm
            x = x if delta is None else x + delta
            return x, x
        if delta is None:
            return ops.layer_norm(x, norm.weight, norm.bias, self.eps, impl=self.impl)
        return ops.layer_norm(delta, norm.weight, norm.bias, self.eps, residual=x, impl=self.impl)

    @property
    def impl(self) -> str:
        """The implementation of the ops, see `ops.resolve`."""
        return self._impl(self.head()[0])

    def head(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Decoder weight [V, d] and bias [V]."""
        return self.model.decoder.weight, self.model.decoder.bias

    def head_operands(self) -> tuple[torch.Tensor | None, ...]:
        """What `ops.predict` and `ops.logits` multiply by: `head`, or its weight in e4m3, the bias and a scale [V]."""
        return self.head() if self.rounded_head is None else self.rounded_head(*self.head())

    @property
    def vocab_size(self) -> int:
        """Words that have a logit: `resize_token_embeddings` changes it."""
        return self.head()[0].shape[0]

    def groups(self) -> Iterator[tuple[nn.Module, ...]]:
        """The linears of the layers, each alone: ``Wqkv`` and ``Wi`` are fused as they come."""
        return self.linears(self.model)

    @staticmethod
    def linears(model: nn.Module) -> Iterator[tuple[nn.Module, ...]]:
        """`groups` of a model, whose weights need not be there."""
        for block in model.model.layers:
            for linear in (block.attn.Wqkv, block.attn.Wo, block.mlp.Wi, block.mlp.Wo):
                yield (linear,)


def sliding_layers(config) -> list[bool]:
    """Which layers attend within the window; transformers 4.57 spells it as every n-th layer being global."""
    if getattr(config, "layer_types", None):
        return [kind == "sliding_attention" for kind in config.layer_types]
    return [layer % config.global_attn_every_n_layers != 0 for layer in range(config.num_hidden_layers)]


def rope_theta(config, sliding: bool) -> float:
    """The rotary base of a layer. Raises ValueError for a scaled RoPE, which no published ModernBERT has."""
    parameters = getattr(config, "rope_parameters", None)
    if parameters is None:
        local = config.local_rope_theta
        return local if sliding and local is not None else config.global_rope_theta
    parameters = parameters["sliding_attention" if sliding else "full_attention"]
    if parameters["rope_type"] != "default":
        raise ValueError(f"model.config.rope_parameters: rope_type={parameters['rope_type']!r} is not supported")
    return parameters["rope_theta"]


def fresh_rotary(model: nn.Module) -> list[tuple[nn.Module, str, torch.Tensor]]:
    """(module, buffer name, fp32 values) of every rotary buffer that differs from what the config says.

    ``.to(torch.bfloat16)`` rounds them with the weights, which puts cos off by 0.36 at position 8000.
    """
    config, found = model.config, []
    head_dim = config.hidden_size // config.num_attention_heads
    sliding_of = sliding_layers(config)
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is None or not name.endswith("inv_freq"):
                continue
            if name.startswith(("full_attention", "sliding_attention")):
                sliding = name.startswith("sliding_attention")
            else:  # transformers 4.57: one buffer a layer, at model.layers.N.attn.rotary_emb
                sliding = sliding_of[int(path.split("layers.")[1].split(".")[0])]
            # On the host, as transformers makes them: a GPU's powers differ in the last bit.
            exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
            fresh = (1.0 / rope_theta(config, sliding) ** exponent).to(buffer.device)
            if buffer.dtype != torch.float32 or not torch.equal(buffer, fresh):
                found.append((module, name, fresh))
    return found
