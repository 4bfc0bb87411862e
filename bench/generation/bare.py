"""The bare operations of a dual-cache run: its matmuls and attentions back to back, and nothing else.

The same weights, inputs prepared in advance; no norm, rotation, gate, residual, selection or schedule. A block's first
step is a whole forward, whose last layer computes keys and values for all rows and everything else for the block's rows
alone, because no more is needed. The LM head multiplies the rows that are still masked.
"""

import itertools
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from bench import floors
from bench.common import Job
from dllm_fast import LLaDAModelLM

RACE = 5  # repetitions; the fastest counts
CACHES = 1 << 29  # bytes of keys and values: too many for any cache


def _linear(x, weight, out):
    return F.linear(x, weight)


def _into(x, weight, out):
    return torch.mm(x, weight.t(), out=out)


def _weight_left(x, weight, out):
    return weight @ x.t()


def _onednn(x, weight, out):
    return floors.onednn(x, weight)


def _sdpa(q, keys, values, score):  # [B, H, T, D], [B, H, S, D]
    return F.scaled_dot_product_attention(q, keys, values)


def _three(q, keys, values, score):
    """Two matmuls and a softmax in preallocated buffers; it rounds the scores to the model's dtype."""
    torch.matmul(q, keys.transpose(2, 3), out=score)
    return torch.softmax(score, -1, out=score) @ values


class Bare:
    """``run()`` runs the operations of a whole run. Grouped keys are repeated in advance, untimed.

    ``fastest`` False: each matmul is F.linear and each attention SDPA. True: the fastest of the forms that PyTorch has
    for a matmul or an attention of that shape on this device, found by timing them here.
    """

    def __init__(self, model: LLaDAModelLM, job: Job, steps: int, fastest: bool):
        """``steps`` of the whole run, shared by the blocks as `dllm_fast.Uniform` shares them."""
        config, transformer = model.config, model.model.transformer
        self.blocks, self.head = list(transformer.blocks), transformer.ff_out.weight
        self.weight, self.fastest = self.blocks[0].q_proj.weight, fastest
        (batch, prompt), self.live = job.ids.shape, job.block_length
        self.slots = prompt + job.gen_length
        self.batch, self.heads, self.head_dim = batch, config.n_heads, config.d_model // config.n_heads
        blocks = job.gen_length // job.block_length
        share = min(self.live, max(1, round(steps / blocks)))
        base, extra = divmod(self.live, share)
        # Masked rows at each step of a block. The first step is a whole forward.
        self.masked = [batch * (self.live - n * base - min(n, extra)) for n in range(share)]
        self.plan = [(self.slots if n == 0 else self.live, rows) for n, rows in enumerate(self.masked)] * blocks
        self._make_inputs(model)
        self.forms: dict[tuple, Callable] = {}

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.weight.device).to(self.weight.dtype)

    def _make_inputs(self, model: LLaDAModelLM) -> None:
        products = [weight for block in self.blocks[:1] for weight in self._weights(block)]
        rows = {self.batch * self.slots, self.batch * self.live}
        self.x, self.out = {}, {}
        for m, weight in itertools.chain(itertools.product(rows, products), ((m, self.head) for m in self.masked)):
            n, k = weight.shape
            if (m, k) not in self.x:
                self.x[m, k] = self._random(m, k)
            if (m, n) not in self.out:
                self.out[m, n] = self._random(m, n)
        size = (self.batch, self.heads)
        self.q = {t: self._random(*size, t, self.head_dim) for t in (self.slots, self.live)}
        self.score = {t: self._random(*size, t, self.slots) for t in (self.slots, self.live)} if self.fastest else {}
        # Enough layers' buffers to exceed any cache. One for each layer, at a large batch, would not fit beside a run's
        # own.
        pair = 2 * self.q[self.slots].numel() * self.weight.element_size()
        count = min(len(self.blocks), max(1, CACHES // pair))
        self.kv = [[self._random(*size, self.slots, self.head_dim) for _ in range(2)] for _ in range(count)]

    @staticmethod
    def _weights(block) -> list[torch.Tensor]:
        names = ("k_proj", "v_proj", "q_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
        return [getattr(block, name).weight for name in names]

    @torch.no_grad()
    def run(self) -> None:
        for queries, masked in self.plan:
            self.forward(queries)
            self._product(masked, self.head)

    @torch.no_grad()
    def forward(self, queries: int) -> None:
        """The operations of one forward over ``queries`` positions of each row, without the head."""
        for n, block in enumerate(self.blocks):
            weights = self._weights(block)
            last = n == len(self.blocks) - 1
            for weight in weights[:2]:
                self._product(self.batch * queries, weight)
            rows = self.live if last else queries
            self._product(self.batch * rows, weights[2])
            self._attention(rows, *self.kv[n % len(self.kv)])
            for weight in weights[3:]:
                self._product(self.batch * rows, weight)

    def flops(self, queries: int, masked: int) -> int:
        """FLOPs of one step: a multiplication and an addition count as two."""
        total = 2 * masked * self.head.numel()
        for n, block in enumerate(self.blocks):
            rows = self.live if n == len(self.blocks) - 1 else queries
            for i, weight in enumerate(self._weights(block)):
                total += 2 * self.batch * (queries if i < 2 else rows) * weight.numel()
            total += 4 * self.batch * rows * self.slots * self.heads * self.head_dim
        return total

    def weight_bytes(self) -> int:
        """Bytes of the model that a step reads: every layer and the head."""
        weights = [weight for block in self.blocks for weight in self._weights(block)] + [self.head]
        return sum(weight.numel() * weight.element_size() for weight in weights)

    # Forms

    def _product(self, m: int, weight: torch.Tensor) -> None:
        n, k = weight.shape
        forms = [_linear, _into, _weight_left]
        if weight.device.type == "cpu" and floors.has_onednn(weight.dtype):
            forms.append(_onednn)
        self._race((m, n, k), forms, self.x[m, k], weight, self.out[m, n])

    def _attention(self, rows: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._race((rows, "attention"), [_sdpa, _three], self.q[rows], keys, values, self.score.get(rows))

    def _race(self, key: tuple, forms: list[Callable], *operands) -> None:
        if key not in self.forms:
            self.forms[key] = _fastest(forms, operands) if self.fastest else forms[0]
        self.forms[key](*operands)

    def chosen(self) -> str:
        """Which forms won: ``896x768x768 _weight_left, ...``."""
        return ", ".join(f"{'x'.join(map(str, key))} {form.__name__[1:]}" for key, form in self.forms.items())


def _fastest(forms: list[Callable], operands: tuple) -> Callable:
    """The fastest form. A form that is far behind runs once: in bf16 some take 100 times as long as the best."""
    wait = torch.cuda.synchronize if operands[0].is_cuda else lambda: None
    best = dict.fromkeys(forms, float("inf"))
    for _ in range(RACE):
        for form in forms:
            if 3 * min(best.values()) < best[form] < float("inf"):
                continue
            wait()
            begin = time.perf_counter()
            form(*operands)
            wait()
            best[form] = min(best[form], time.perf_counter() - begin)
    return min(forms, key=best.get)
