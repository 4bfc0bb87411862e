"""Without a GPU, kernels run in Triton's interpreter on CPU tensors; with one, the same tests run on it.

Without Triton (on Windows, on macOS, with only a CPU build of torch), or if its interpreter does not work with this
NumPy, every module here that needs it is skipped, and prints why.
"""

import importlib.util

import pytest
import torch
from needs import missing


def _repair_interpreter():
    """bfloat16 and e4m3 as in hardware: the plain interpreter multiplies bit patterns, and its casts truncate.

    Dots are summed in fp64 and rounded once. The interpreter sums them by a BLAS, in an order that depends on the
    processor and on the matrices' shapes, so that a row's bits would depend on the number of rows.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl
    fp_to_fp = InterpreterBuilder.create_fp_to_fp

    def widen(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def cast_impl(self, src, dst_type):
        kinds = src.dtype.scalar, dst_type.scalar
        if kinds == (tl.bfloat16, tl.float32):
            return widen(src)
        if kinds == (tl.float32, tl.bfloat16):
            bits = np.ascontiguousarray(src.data).view(np.uint32)
            nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # ties to even
            quiet = (bits >> 16) | 0x40  # rounding a NaN must not carry into its sign bit
            return TensorHandle(np.where(np.isnan(src.data), quiet, nearest).astype(np.uint16), tl.bfloat16)
        return cast(self, src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        kinds = src.dtype.scalar, dst_type.scalar
        if kinds == (tl.float32, tl.float8e4nv):
            rounded = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.float8_e4m3fn)
            return TensorHandle(rounded.view(torch.uint8).numpy(), tl.float8e4nv)
        if kinds[0] == tl.float8e4nv:
            wide = TensorHandle(exact(src).astype(np.float32), tl.float32)
            if kinds[1] == tl.bfloat16:
                return cast_impl(self, wide, dst_type)
            return TensorHandle(wide.data.astype({tl.float32: np.float32, tl.float16: np.float16}[kinds[1]]), kinds[1])
        return fp_to_fp(self, src, dst_type, rounding_mode)

    def exact(handle):
        if handle.dtype.scalar == tl.float8e4nv:
            return torch.from_numpy(np.ascontiguousarray(handle.data)).view(torch.float8_e4m3fn).double().numpy()
        return widen(handle).data.astype(np.float64)

    def create_dot(self, a, b, d, *rest):
        return TensorHandle(np.matmul(exact(a), exact(b)).astype(d.data.dtype) + d.data, d.dtype.scalar)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp


HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON and not torch.cuda.is_available():
    _repair_interpreter()


class Skipped(pytest.Module):
    def collect(self):
        pytest.skip(missing("triton"), allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    compiles_only = HAS_TRITON and module_path.name == "test_resources.py"
    return None if compiles_only or not missing("triton") else Skipped.from_parent(parent, path=module_path)


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def as_on_a_gpu(poisoned_outputs, strict_interpreter):
    """For every test here."""
