"""No kernel's int32 index overflows at the sizes of LLaDA-8B and iLLaDA, in batches of over 2^31 elements.

Runs in the interpreter. Only the last program of each launch's grid runs, because it has the largest indices, over
memory that nothing else touches. Any int32 sum or product that overflows is an error.
"""

import numpy as np
import pytest
import torch
from needs import needs_triton

pytestmark = [
    needs_triton,
    pytest.mark.skipif(torch.cuda.is_available(), reason="checks the interpreter's arithmetic"),
]
BF16 = torch.bfloat16
SIZES = {  # width, heads, K/V heads, FFN, positions, vocabulary
    "llada-8b": (4096, 32, 32, 12288, 4096, 126464),
    "illada-8b": (4096, 32, 8, 14336, 8192, 155136),
}


def lazy(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    """Zeros that take up memory only in the pages that are touched."""
    return torch.from_numpy(np.zeros(shape, np.int16)).view(dtype)


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
    watched("create_mul", np.multiply)
    watched("create_add", np.add)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("op", ["rms_norm", "swiglu", "rope", "attention", "gumbel", "predict", "linear"])
def test_last_program(op, name, last_program):
    from dllm_fast.kernels.attention import attention
    from dllm_fast.kernels.glu import swiglu
    from dllm_fast.kernels.gumbel import gumbel
    from dllm_fast.kernels.linear import linear
    from dllm_fast.kernels.norm import rms_norm
    from dllm_fast.kernels.predict import predict
    from dllm_fast.kernels.rope import rope

    width, heads, kv_heads, ffn, positions, vocabulary = SIZES[name]
    if op in ("rms_norm", "swiglu"):
        channels = width if op == "rms_norm" else ffn
        x = lazy(2**31 // (positions * channels) + 1, positions, channels)
        assert x.numel() > 2**31
        rms_norm(x, torch.ones(width, dtype=BF16), 1e-5) if op == "rms_norm" else swiglu(x, x)
    elif op in ("rope", "attention"):
        batch = 2**31 // (positions * kv_heads * 128) + 1
        keys = lazy(batch, positions, kv_heads, 128)
        assert keys.numel() > 2**31
        q, k = lazy(batch, 32, heads, 128), lazy(batch, 32, kv_heads, 128)
        slot = torch.full((batch,), positions - 32)
        if op == "rope":
            table = torch.zeros(positions, 64)
            rope(q, k, k, table, table, slot, slot, keys, keys)
        else:
            attention(q, keys, keys, slot - 64, slot + 32, slot)
    elif op == "gumbel":
        row = torch.zeros(2**31 // vocabulary + 2, dtype=torch.int64)  # the last program begins beyond 2^31
        gumbel(0, 0, row, row, torch.arange(vocabulary))
    elif op == "predict":
        predict(lazy(64, width, dtype=torch.float16), lazy(vocabulary, width, dtype=torch.float16), mask_id=5)
    else:
        linear(lazy(64, width, dtype=torch.float16), lazy(2 * ffn, width, dtype=torch.float16), gated=True)


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
