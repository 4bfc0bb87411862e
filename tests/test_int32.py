"""No kernel's int32 index overflows at the sizes of LLaDA-8B and iLLaDA, in batches of over 2^31 elements.

Runs in the interpreter. Only the last program of each launch's grid runs, because it has the largest indices, over
memory that nothing else touches. Any int32 sum or product that overflows is an error.
"""

import functools
import importlib
import math
import mmap

import numpy as np
import pytest
import torch
from needs import needs_triton, needs_watched

from dllm_fast import launchers

pytestmark = [
    needs_triton,
    needs_watched,
    pytest.mark.skipif(torch.cuda.is_available(), reason="checks the interpreter's arithmetic"),
]
BF16, FP16, E4M3 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
UNRESERVED = 0x4000  # Linux's MAP_NORESERVE, for which Python has no name before 3.13: allows more than the memory
SIZES = {  # width, heads, K/V heads, FFN, positions, vocabulary
    "llada-8b": (4096, 32, 32, 12288, 4096, 126464),
    "illada-8b": (4096, 32, 8, 14336, 8192, 155136),
}


def lazy(*shape: int, dtype: torch.dtype = BF16, device=None) -> torch.Tensor:
    """Zeros that take up memory only in the pages that are touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | UNRESERVED
    memory = mmap.mmap(-1, (math.prod(shape) or 1) * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype)[: math.prod(shape)].view(shape)


@pytest.fixture
def last_program(monkeypatch):
    """Make launches run only the last program of their grid, and check its int32 arithmetic."""
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

    run, set_dim, set_idx = InterpretedFunction.run, InterpreterBuilder.set_grid_dim, InterpreterBuilder.set_grid_idx
    whole: list[int] = []

    def launch(self, *args, grid, **options):
        whole[:] = [*grid, 1, 1][:3]
        return run(self, *args, grid=(1, 1, 1), **options)

    def watched(name: str, exact):
        build = getattr(InterpreterBuilder, name)

        def checked(self, lhs, rhs, *rest):
            scalar = lhs.dtype.scalar
            if scalar.is_int() and scalar.is_int_signed() and scalar.primitive_bitwidth == 32:
                found = exact(np.asarray(lhs.data, np.int64), np.asarray(rhs.data, np.int64))
                if found.size and np.abs(found).max() >= 2**31:
                    raise OverflowError(f"{name} in int32 makes {found.max()}")
            return build(self, lhs, rhs, *rest)

        monkeypatch.setattr(InterpreterBuilder, name, checked)

    monkeypatch.setattr(InterpretedFunction, "run", launch)
    monkeypatch.setattr(InterpreterBuilder, "set_grid_dim", lambda self, *_: set_dim(self, *whole))
    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", lambda self, *_: set_idx(self, *(n - 1 for n in whole)))
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: lazy(*np.ravel(shape).tolist(), **options))
    watched("create_mul", np.multiply)
    watched("create_add", np.add)


def batch_of(*row: int) -> tuple[int, ...]:
    """The shape of so many such rows that there are more than 2^31 elements."""
    return 2**31 // math.prod(row) + 1, *row


class Calls:
    """An op a method, at the sizes of a model."""

    def __init__(self, name: str):
        self.width, self.heads, self.kv_heads, self.ffn, self.positions, self.vocabulary = SIZES[name]

    def rms_norm(self, norm):
        norm.rms_norm(lazy(*batch_of(self.positions, self.width)), torch.ones(self.width, dtype=BF16), 1e-5)

    def layer_norm(self, norm):
        ones = torch.ones(self.width, dtype=BF16)
        norm.layer_norm(lazy(*batch_of(self.positions, self.width)), ones, ones, 1e-5)

    def swiglu(self, glu):
        x = lazy(*batch_of(self.positions, self.ffn))
        glu.swiglu(x, x)

    def geglu(self, glu):
        x = lazy(*batch_of(self.positions, self.ffn))
        glu.geglu(x, x)

    def grouped_linear(self, grouped):
        x = lazy(*batch_of(self.width))
        grouped.grouped_linear(x, lazy(2, self.ffn, self.width), torch.tensor([1, len(x)]))

    def round_rows(self, round_rows):
        round_rows.round_rows(lazy(*batch_of(self.ffn)))

    def _queries(self, rows: int | None = None):
        """Buffers, and what is written to their ends; of ``rows`` sequences."""
        shape = batch_of(self.positions, self.kv_heads, 128)
        rows = shape[0] if rows is None else rows
        keys = lazy(rows, *shape[1:], dtype=FP16)
        table = torch.zeros(self.positions, 64)
        return keys, table, torch.full((rows,), self.positions - 32)

    def rope(self, rope):
        keys, table, slot = self._queries()
        q, k = lazy(len(keys), 32, self.heads, 128, dtype=FP16), lazy(len(keys), 32, self.kv_heads, 128, dtype=FP16)
        rope.rope(q, k, k, table, table, slot, slot, keys, keys)

    def attention(self, attention):
        keys, _, slot = self._queries()
        attention.attention(lazy(len(keys), 32, self.heads, 128, dtype=FP16), keys, keys, slot - 64, slot + 32, slot)

    def linear(self, linear):
        linear.linear(lazy(64, self.width, dtype=FP16), lazy(2 * self.ffn, self.width, dtype=FP16), gated=True)

    def linear_e4m3(self, linear):
        weight, scale = lazy(2 * self.ffn, self.width, dtype=E4M3), torch.ones(2 * self.ffn)
        linear.linear(lazy(64, self.width, dtype=FP16), weight, scale, gated=True)

    def _four_bits(self, n: int):
        packed = lazy(n, self.width // 2, dtype=torch.uint8)
        return packed, lazy(self.width // 128, n), lazy(self.width // 128, n, dtype=torch.uint8)

    def linear_int4(self, linear_int4):
        linear_int4.linear_int4(lazy(64, self.width, dtype=FP16), *self._four_bits(self.width), gated=True)

    def widen_int4(self, linear_int4):
        linear_int4.widen_int4(*self._four_bits(2 * self.ffn), self.width, BF16)

    def linear_rope(self, linear_rope):
        keys, table, slot = self._queries(64)
        weight = lazy((self.heads + 2 * self.kv_heads) * 128, self.width, dtype=FP16)
        x = lazy(64, 1, self.width, dtype=FP16)
        linear_rope.linear_rope(x, weight, None, table, table, slot, slot, keys, keys)

    def linear_int4_rope(self, linear_rope):
        keys, table, slot = self._queries(32)  # a tile of more rows is half a head
        weights = self._four_bits((self.heads + 2 * self.kv_heads) * 128)
        x = lazy(32, 1, self.width, dtype=FP16)
        linear_rope.linear_int4_rope(x, *weights, table, table, slot, slot, keys, keys)

    def gumbel(self, gumbel):
        row = torch.zeros(2**31 // self.vocabulary + 2, dtype=torch.int64)  # the last program begins beyond 2^31
        gumbel.gumbel(0, 0, row, row, torch.arange(self.vocabulary))

    def uniform(self, gumbel):
        row = lazy(2**31 + 1, dtype=torch.int64)
        gumbel.uniform(row, row, row, row)  # a number would be written out for each row

    def predict(self, predict):
        predict.predict(lazy(64, self.width, dtype=FP16), lazy(self.vocabulary, self.width, dtype=FP16), mask_id=5)

    def select(self, predict):
        """Of so many rows that a chunk of the logits has 2^31 elements; they are not computed."""
        rows = 2**31 // predict.SELECT["BV"] + 1
        weight = lazy(self.vocabulary, self.width, dtype=FP16)
        predict.predict(lazy(rows, self.width, dtype=FP16), weight, mask_id=5, _path="streamed")

    def commit(self, commit):
        sequence = lazy(*batch_of(self.positions), dtype=torch.int64)
        token = lazy(len(sequence), 32, dtype=torch.int64)
        slot = torch.full((len(sequence),), self.positions - 32)
        commit.commit(sequence, token, token.float(), token == 0, slot, threshold=0.5)

    def masked_loss(self, masked_loss):
        hidden = lazy(*batch_of(self.width), dtype=FP16)
        target = lazy(len(hidden), dtype=torch.int64)
        weight = lazy(self.vocabulary, self.width, dtype=FP16)
        masked_loss.masked_loss(hidden, weight, None, target, target.float())


FILES = {  # of an op whose file has another name
    "rms_norm": "norm", "layer_norm": "norm", "swiglu": "glu", "geglu": "glu",
    "linear_e4m3": "linear", "widen_int4": "linear_int4", "linear_int4_rope": "linear_rope", "uniform": "gumbel",
    "select": "predict", "grouped_linear": "grouped",
}  # fmt: skip
OPS = [name for name in vars(Calls) if not name.startswith("_")]


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("op", OPS)
def test_last_program(op, name, last_program, monkeypatch):
    module = importlib.import_module(f"dllm_fast.kernels.{FILES.get(op, op)}")
    if op == "select":
        logits = functools.cache(lambda *shape: lazy(*shape, dtype=torch.float32))
        monkeypatch.setattr(module, "_logits", lambda hidden, weight: logits(len(hidden), len(weight)))
    getattr(Calls(name), op)(module)


def test_no_op_is_left_out():
    called = {name for names in launchers.KERNELS.values() for name in names}
    # `predict_share` launches the kernels of "select".
    assert called - {"counters", "fits", "fits_int4", "fits_rope", "fits_share", "predict_share"} <= set(OPS)


def test_int32_is_watched(last_program):
    """The overflow of a kernel with row offsets in int32."""
    import triton
    import triton.language as tl

    @triton.jit
    def _planted_kernel(x_ptr, stride):
        tl.store(x_ptr + tl.program_id(0) * stride * 0, 1.0)

    x = torch.zeros(4)
    _planted_kernel[(2**11,)](x, 2**20)
    with pytest.raises(Exception, match="int32"):
        _planted_kernel[(2**11 + 1,)](x, 2**20)
