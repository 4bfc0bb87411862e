"""``attn_implementation="dllm_fast"``: this package's attention in any transformers model that takes such backends.

It is asked for with ``from_pretrained(..., attn_implementation="dllm_fast")`` or with
``model.set_attn_implementation("dllm_fast")``. transformers wants a mask once in a forward, and attention in each
layer. A bidirectional mask, with padding on either side, and with a window or without, becomes `Ranges`, and attention
goes to the kernels: Triton's on a GPU, compiled ones on a CPU. Everything else goes to transformers' own ``sdpa``:
other masks (causal, with holes, packed sequences), gradients, dropout, a position bias. `why_not` says what, and
transformers' log does so once.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from transformers import masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface
from transformers.utils import logging

from dllm_fast import ops
from dllm_fast.families import running
from dllm_fast.families.forward import span_of
from dllm_fast.families.generic import BACKEND as NAME
from dllm_fast.families.running import is_available
from dllm_fast.visibility import visible

WIDEST = 256  # a head
UNSERVED = ("position_bias", "softcap", "s_aux", "head_mask")  # what a model may ask of attention besides

logger = logging.get_logger(__name__)


@dataclass
class Ranges:
    """Which keys each query sees: those from ``start`` to ``end`` of its row, no farther away than ``window``.

    start, end: [B] int64; None: all. offset: of the first query's position from the first key's. shape: (batch,
    queries, keys). seen: of `visible`, by impl, once it was asked for.
    """

    start: torch.Tensor | None
    end: torch.Tensor | None
    window: int | None
    offset: int
    shape: tuple[int, int, int]
    device: torch.device
    seen: dict[str, tuple] = field(default_factory=dict)

    def visible(self, q: torch.Tensor, impl: str) -> tuple:
        """What `ops.attention` takes for queries q [B, Q, H, D]."""
        if impl not in self.seen:
            slot = None
            if self.offset or impl != "cpp":
                slot = torch.full((len(q),), self.offset, dtype=torch.int64, device=self.device)
            self.seen[impl] = visible(q, self.shape[2], self.start, self.end, slot, self.window, impl=impl)
        return self.seen[impl]

    def dense(self) -> torch.Tensor | None:
        """The same as a mask for ``sdpa``, [B, 1, Q, K] bool; None if all see all."""
        batch, queries, keys = self.shape
        if self.start is None and self.window is None:
            return None
        key = torch.arange(keys, device=self.device)
        seen = torch.ones(batch, 1, queries, keys, dtype=torch.bool, device=self.device)
        if self.start is not None and self.end is not None:
            seen &= ((key >= self.start[:, None]) & (key < self.end[:, None]))[:, None, None]
        if self.window is not None:
            query = torch.arange(queries, device=self.device)[:, None] + self.offset
            seen &= (query - key).abs() <= self.window
        return seen


def is_bidirectional(mask_function: Callable | None, window: int | None) -> bool:
    """Whether ``mask_function``, one of transformers' own, lets a query see every key, or without exception those up to
    ``window`` away.

    A function with more in it, such as packed sequences or blocks, is told by its code, and is not called: it may agree
    with a window at some positions, and may index tensors of the length of the input.
    """
    if window is None or mask_function is None:
        return mask_function is masking_utils.bidirectional_mask_function
    if not is_same(mask_function, masking_utils.sliding_window_bidirectional_mask_function(window)):
        return False
    ends = (window, 0), (0, window), (window + 1, 0), (0, window + 1)  # another transformers may mean less by a window
    numbers = ([torch.tensor(n, dtype=torch.int64, device="cpu") for n in (0, 0, *pair)] for pair in ends)
    return [bool(mask_function(*each)) for each in numbers] == [True, True, False, False]


def is_same(one: Any, other: Any) -> bool:
    """Whether two functions have the same code, and what they enclose is the same; or two numbers are equal."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(is_same, one, other))
    if isinstance(one, FunctionType) and isinstance(other, FunctionType):
        enclosed = ([cell.cell_contents for cell in each.__closure__ or ()] for each in (one, other))
        return one.__code__ is other.__code__ and is_same(*map(tuple, enclosed))
    return isinstance(one, int) and isinstance(other, int) and one == other


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: torch.Tensor | None = None,  # [B, keys], 0 = padding
    local_size: int | None = None,
    use_vmap: bool = False,  # a caller has put more into the function
    device: torch.device | str = "cpu",
    **kwargs,
) -> Ranges | torch.Tensor | None:
    """`Ranges`, or what ``sdpa`` takes where the mask is none."""
    device = torch.device(device)
    if running.current() is not None and (use_vmap or not is_bidirectional(mask_function, local_size)):
        raise running.Unserved("a layer's mask is neither bidirectional nor a window")
    if not use_vmap and is_bidirectional(mask_function, local_size):
        span: tuple[torch.Tensor | None, torch.Tensor | None] | None = (None, None)
        if attention_mask is not None:
            whole = attention_mask.shape[-1] == kv_length + kv_offset
            span = span_of(attention_mask[:, kv_offset:]) if whole else None
        if span is not None:
            start, end = span
            return Ranges(start, end, local_size, q_offset - kv_offset, (batch_size, q_length, kv_length), device)
    given = {} if mask_function is None else {"mask_function": mask_function}
    return sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        attention_mask=attention_mask, local_size=local_size, use_vmap=use_vmap, device=device, **given, **kwargs,
    )  # fmt: skip


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [B, H, Q, D]
    key: torch.Tensor,  # [B, G, K, D]
    value: torch.Tensor,  # [B, G, K, D]
    attention_mask: Ranges | torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it: [B, Q, H, D], and no weights. Queries that see no key get 0."""
    run = running.current()
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and run is None and (not causal or query.shape[2] == 1):
        shape = (query.shape[0], query.shape[2], key.shape[2])
        attention_mask = Ranges(None, None, None, key.shape[2] - query.shape[2], shape, query.device)
    reason = why_not(query, key, value, dropout, kwargs)
    if run is not None:
        if reason:
            raise running.Unserved(f"the kernels do not serve attention with {reason}")
        window = attention_mask.window if isinstance(attention_mask, Ranges) else None
        q, k, v = (x.transpose(1, 2) for x in (scaled(query, scaling), key, value))
        return run.attend(q, k, v, window), None
    if reason or not isinstance(attention_mask, Ranges):
        reason = reason or "a mask that is not a range of keys for each row, or a causal one"
        logger.warning_once(f"attn_implementation={NAME!r}: transformers' sdpa serves where there is {reason}")
        if isinstance(attention_mask, Ranges):
            attention_mask, is_causal = attention_mask.dense(), False
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    q, k, v = (x.transpose(1, 2) for x in (scaled(query, scaling), key, value))
    impl = ops.resolve("auto", q.device, q.dtype)
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():  # Triton launches on the current GPU
        return ops.attention(q, k, v, attention_mask.visible(q, impl), impl=impl), None


def scaled(query: torch.Tensor, scaling: float | None) -> torch.Tensor:
    """Queries [B, H, Q, D] for kernels that scale by D^-1/2, where a model asks for ``scaling``."""
    factor = 1.0 if scaling is None else scaling * query.shape[-1] ** 0.5
    return query if math.isclose(factor, 1.0, rel_tol=1e-6) else query * factor


def why_not(query, key, value, dropout: float, others: dict) -> str | None:
    """What the kernels do not serve, whatever the mask; None if they do."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return "a gradient"
    if dropout:
        return "dropout"
    if unknown := sorted(name for name in UNSERVED if others.get(name) is not None):
        return " and ".join(unknown)
    if value.shape[-1] != key.shape[-1] or query.shape[-1] > WIDEST:
        return f"a head of {query.shape[-1]} and {value.shape[-1]}"
    if not query.dtype == key.dtype == value.dtype:
        return f"queries in {query.dtype}, keys in {key.dtype} and values in {value.dtype}"
    impl, obstacle = ops.auto(query.device, query.dtype)
    return obstacle if impl == "torch" and running.current() is None else None


def register() -> None:
    """Tell transformers of the backend, if it `is_available`."""
    if is_available():
        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, mask)
