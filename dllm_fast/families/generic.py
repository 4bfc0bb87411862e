"""`Generic`: any transformers model that takes attention backends. Its own forward runs, with this package's attention.

BERT, RoBERTa, EuroBERT; GPT-2, Llama, Qwen3 and others without their causal mask; ModernBERT's other heads, which
generate nothing. What the LM head multiplies is taken where the head is called, after the layers that transform it.
"""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from dllm_fast import ops
from dllm_fast.families import running
from dllm_fast.families.bypass import Departure, attached, class_name, name_of
from dllm_fast.families.cache import BlockCache
from dllm_fast.families.family import Family
from dllm_fast.families.linears import Matmuls, matmuls
from dllm_fast.families.rounded import RoundedHead
from dllm_fast.families.rows import first_position, take
from dllm_fast.kernels.reference import capped

BACKEND = "dllm_fast"  # `backend.NAME`
TOKENS = 8  # of the sequence that tries a model
TAKEN = (
    "models of transformers 5 that take attention backends and attend in both directions"  # if trying them goes well
)


class _Reached(Exception):
    """The LM head is called: its input."""

    def __init__(self, hidden: torch.Tensor):
        self.hidden = hidden


class Generic(Family):
    runs_own = True
    keeps_weights = "the model runs its own forward, with its own weights"
    layerwise = False

    def __init__(
        self, model: nn.Module, impl: str, matmuls: Matmuls = matmuls, rounded_head: RoundedHead | None = None
    ):
        super().__init__(model, impl, matmuls, rounded_head)
        config: Any = model.config
        self.generates = lm_head(model) is not None
        self.shifted = bool(getattr(config, "shifted", config.model_type.lower() == "dream"))
        self.softcap = getattr(config, "final_logit_softcapping", None)
        self.offset = position_offset(model)
        self.positions = longest(config) - self.offset
        self.ffn_width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        self._settle()
        self._try()
        self._read_blocks(config)  # after it was tried: its own forward has no blocks

    @staticmethod
    def matches(model: nn.Module) -> bool:
        return why_not(model) is None

    @property
    def weight(self) -> torch.Tensor:
        head = lm_head(self.model)
        return next(self.model.parameters()) if head is None else head.weight

    def head(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        head = lm_head(self.model)
        if head is None:
            raise ValueError(f"model: a {type(self.model).__name__} has no LM head, and generates nothing")
        return head.weight, head.bias

    def require_whole(self) -> None:
        """Everything is called but the head."""
        head = lm_head(self.model)
        if head is None:
            self.head()
        reason = f"is a {class_name(head)}" if type(head) is not nn.Linear else attached(head)
        if reason:
            raise ValueError(f"model: {name_of(self.model, head)} {reason}{Departure(head, reason).advice}")
        if self.model.training:
            raise ValueError("model: it is in training mode, with dropout; call model.eval() first")

    def adopt(self) -> list:
        configs = {id(m.config): m.config for m in self.model.modules() if isinstance(m, PreTrainedModel)}
        before = [(config, config._attn_implementation) for config in configs.values()]
        self.model.set_attn_implementation(BACKEND)
        return before

    def release(self, changed: list) -> None:
        for config, name in changed:
            config._attn_implementation_internal = name

    def hidden(
        self, input_ids, start=None, end=None, cache=None, slot=None, rows=None, from_layer=0, kept=None, packed=None,
        own=None, padding_counts=False, origin=None,
    ):  # fmt: skip
        assert from_layer == 0
        first = first_position(start, slot, packed, padding_counts)
        position = torch.arange(input_ids.shape[1], device=input_ids.device)
        position = (position if first is None else first[:, None] + position).expand(input_ids.shape)
        position = position.clamp(0, self.positions - 1)  # of padding, and of what is of no row
        with running.running(running.Run(self.impl, start, end, cache, slot, kept, packed, own, self.block, origin)):
            hidden = self._head_input(input_ids, position + self.offset)
        if self.shifted:
            flat = hidden if packed is None else hidden.transpose(0, 1)
            left = torch.cat((flat[:, :1], flat[:, :-1]), 1)
            left = left if packed is None else left.transpose(0, 1)
            hidden = torch.where((position == 0)[..., None], hidden, left)
        return take(hidden, rows)

    def _head_input(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """What the model's own forward calls its head with, [B, T, d]."""
        head = lm_head(self.model)
        run = running.current()

        def stop(module: nn.Module, inputs: tuple) -> None:
            if running.current() is run:  # another thread may call the model meanwhile
                raise _Reached(inputs[0])

        handle = head.register_forward_pre_hook(stop)
        try:
            self.model(input_ids=input_ids, position_ids=position_ids, **no_cache(self.model))
        except _Reached as reached:
            return reached.hidden
        finally:
            handle.remove()
        raise running.Unserved(f"its forward does not call its {class_name(head)} head")

    # Trying the model

    def _try(self) -> None:
        """Run a short sequence: what its layers ask of attention, and whether its own logits come out, also of its
        second half alone, against a cache. Raises ValueError if they do not or the forward fails, and for layers that
        differ in size."""
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        ids = torch.arange(TOKENS, device=self.weight.device)[None] % vocabulary
        if (pad := getattr(self.model.config, "pad_token_id", None)) is not None:
            ids = ids.where(ids != pad, vocabulary - 1)
        try:
            with torch.no_grad(), in_eval(self.model):
                expected = self.model(input_ids=ids, **no_cache(self.model))[0]
                changed = self.adopt()
                try:
                    with running.running(running.Run(self.impl)) as run:
                        found = self.model(input_ids=ids, **no_cache(self.model))[0]
                    self._compare("", found, expected)
                    self._read_layers(run.layers)
                    if self.generates:
                        self._try_parts(ids, expected)
                finally:
                    self.release(changed)
        except running.Unserved as error:
            raise self._refusal(str(error)) from None
        except Exception as error:  # a layer reads a mask that it expects to be a tensor, for instance
            raise self._refusal(f"a trial of {TOKENS} tokens raises {type(error).__name__}: {error}") from error

    def _read_layers(self, layers: list[running.Layer]) -> None:
        sizes = {layer[:3] for layer in layers}
        if len(sizes) != 1:
            what = "does not call attention" if not sizes else "has layers with heads of different sizes"
            raise running.Unserved(f"it {what}")
        ((self.heads, self.kv_heads, self.head_dim),) = sizes
        self.layers, self.windows = len(layers), [layer.window for layer in layers]

    def _try_parts(self, ids: torch.Tensor, expected: torch.Tensor) -> None:
        if self.shifted and not getattr(self.model, "shifts_logits", False):
            expected = torch.cat((expected[:, :1], expected[:, :-1]), 1)
        shape = self.layers, 1, TOKENS, self.kv_heads, self.head_dim
        cache = BlockCache(*shape, self.weight.dtype, ids.device)
        slot = torch.zeros(1, dtype=torch.int64, device=ids.device)
        whole = self.hidden(ids, cache=cache, slot=slot)
        self._compare(" before its head", self._logits(whole), expected)
        half = TOKENS // 2
        part = self.hidden(ids[:, half:], cache=cache, slot=slot + half)[:, 1:]  # the first may lack its left neighbour
        self._compare(" against a cache", self._logits(part), expected[:, half + 1 :])

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return capped(ops.logits(hidden, *self.head(), impl=self.impl), self.softcap)

    def _compare(self, where: str, found: torch.Tensor, expected: torch.Tensor) -> None:
        """Raise `Unserved` unless they agree, by what rounding may do to many layers.

        In fp64 too transformers' own attention may take its softmax in fp32.
        """
        allowed = max(2 * math.sqrt(torch.finfo(self.weight.dtype).eps), 64 * torch.finfo(torch.float32).eps)
        error = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
        if not error <= allowed:
            raise running.Unserved(
                f"its logits{where} differ from its own by {float(error):.1e} of the largest, more than rounding in "
                f"{self.weight.dtype} explains"
            )

    def _refusal(self, reason: str) -> ValueError:
        kind = self.model.config.model_type
        return ValueError(
            f"model: a {type(self.model).__name__} of model_type {kind!r} is not supported: {reason}. Supported are "
            f"{TAKEN}, with heads of one size, and with logits that are their LM head's, capped or not"
        )


def why_not(model: nn.Module) -> str | None:
    """Why `Generic` does not take a model; None if it does, though trying it may still fail."""
    if not isinstance(model, PreTrainedModel):
        return "it is not a model of transformers"
    if not running.is_available():
        return f"this transformers, {transformers.__version__}, has no attention backends with masks; 5 has"
    config: Any = model.config
    if config.is_encoder_decoder:
        return "it is an encoder with a decoder"
    if not (model._supports_attention_backend and model._can_set_attn_implementation()):
        return "it does not take attention backends"
    if not isinstance(getattr(config, "max_position_embeddings", None), int):
        return "its config has no max_position_embeddings"
    if lm_head(model) is not None and "position_ids" not in inspect.signature(model.forward).parameters:
        return "its forward takes no position_ids"
    if getattr(config, "is_causal", None) is not False and any(getattr(m, "is_causal", False) for m in model.modules()):
        return (
            "it attends causally. If it was trained to fill in masks, set model.config.is_causal = False first, and "
            "model.config.shifted = True if its output at a position predicts the next token"
        )
    return None


def lm_head(model: Any) -> Any:
    """The linear that makes logits of the vocabulary."""
    return model.get_output_embeddings()


def position_offset(model: nn.Module) -> int:
    """The id of the first position: RoBERTa's come after its padding id."""
    for module in model.modules():
        if hasattr(module, "create_position_ids_from_input_ids"):
            padding: Any = module.padding_idx
            return padding + 1
    return 0


def longest(config: Any) -> int:
    """The number of positions whose angles do not depend on a call's length.

    "longrope" has other factors in a call that reaches further: a block would turn its keys by those of its own call,
    and the cache would hold others. "dynamic" changes only from max_position_embeddings.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [kind for kind in (rope, *rope.values()) if isinstance(kind, dict)]  # of all layers, or by their type
    bounds = [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]
    return min((config.max_position_embeddings, *bounds))


def no_cache(model: nn.Module) -> dict[str, bool]:
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


@contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
