"""The strict interpreter of these tests finds faults in tiny kernels that the plain one misses."""

import pytest
import torch
import triton
import triton.language as tl
from interpreter import poison, strict
from triton.runtime.interpreter import InterpreterError

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="only the interpreter is strict")


@pytest.fixture
def strict_interpreter():
    """Undo this folder's strictness, until a test asks for it."""


@triton.jit
def _running_sum_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Wrong: relies on the previous program having written."""
    i = tl.program_id(0)
    before = tl.load(out_ptr + i - 1, mask=i > 0, other=0.0)
    tl.store(out_ptr + i, before + tl.load(x_ptr + i))


@triton.jit
def _arrivals_kernel(x_ptr, part_ptr, count_ptr, out_ptr, BLOCK: tl.constexpr):
    """Right in any order: the last program to arrive adds up."""
    i = tl.program_id(0)
    tl.store(part_ptr + i, tl.load(x_ptr + i))
    if tl.atomic_add(count_ptr, 1) == BLOCK - 1:
        tl.store(out_ptr, tl.sum(tl.load(part_ptr + tl.arange(0, BLOCK)), 0))


@triton.jit
def _add_to_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Wrong: reads memory that it has not written."""
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(out_ptr + at) * 0 + tl.load(x_ptr + at))


@triton.jit
def _largest_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.maximum(tl.load(out_ptr + at), tl.load(x_ptr + at)))


@triton.jit
def _stride_kernel(x_ptr, out_ptr, stride, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at * stride.to(tl.int64)))


@triton.jit(do_not_specialize=["stride"])
def _kept_stride_kernel(x_ptr, out_ptr, stride, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at * stride.to(tl.int64)))


@triton.jit
def _copy_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at), mask=at < n)


def test_programs_run_in_any_order():
    x, orders = torch.arange(1.0, 9), set()
    for seed in range(4):
        with pytest.MonkeyPatch.context() as patch:
            strict(patch, seed)
            out = torch.zeros(8)
            _running_sum_kernel[(8,)](x, out, BLOCK=8)
            orders.add(tuple(out.tolist()))
            part, total = torch.zeros(8), torch.zeros(1)
            _arrivals_kernel[(8,)](x, part, torch.zeros(1, dtype=torch.int32), total, BLOCK=8)
            assert total == 36
    assert len(orders) > 1, "a kernel that relies on an order fails"
    out = torch.zeros(8)
    _running_sum_kernel[(8,)](x, out, BLOCK=8)
    assert torch.equal(out, x.cumsum(0)), "which the plain interpreter misses"


def test_every_program_runs_once(monkeypatch):
    @triton.jit
    def _count_kernel(out_ptr, N: tl.constexpr, M: tl.constexpr):
        at = (tl.program_id(0) * N + tl.program_id(1)) * M + tl.program_id(2)
        tl.store(out_ptr + at, tl.load(out_ptr + at) + 1)

    strict(monkeypatch, 0)
    out = torch.zeros(3, 4, 5)
    _count_kernel[(3, 4, 5)](out, N=4, M=5)
    assert (out == 1).all()


@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [(_add_to_kernel, torch.float32), (_largest_kernel, torch.float32), (_largest_kernel, torch.int32)],
    ids=["NaN", "largest", "largest-integer"],
)
def test_scratch_that_is_read_before_it_is_written(kernel, dtype):
    x, out = torch.full((8,), 5, dtype=dtype), torch.empty(8, dtype=dtype)
    kernel[(1,)](x, out, BLOCK=8)
    assert not torch.equal(out, x)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool], ids=str
)
def test_new_memory_is_poisoned(dtype):
    like = torch.zeros(3, dtype=dtype)
    for x in (torch.empty(3, 2, dtype=dtype), torch.empty_like(like), like.new_empty(4)):
        bad = x.float().isnan() | (x.float() == -1) | (x.float() > 400) if dtype != torch.bool else x
        assert bad.all()
    assert poison(torch.zeros(0, dtype=dtype)).shape == (0,)


def test_an_integer_of_one_is_a_constant(monkeypatch):
    x, out = torch.arange(8.0), torch.zeros(8)
    _stride_kernel[(1,)](x, out, 1, BLOCK=8)
    assert torch.equal(out, x), "which the plain interpreter misses"
    strict(monkeypatch, 0)
    with pytest.raises(InterpreterError, match="'int' object has no attribute 'to'"):
        _stride_kernel[(1,)](x, out, 1, BLOCK=8)
    _kept_stride_kernel[(1,)](x, out, 1, BLOCK=8)
    _stride_kernel[(1,)](torch.arange(16.0), out, 2, BLOCK=8)
    assert torch.equal(out, torch.arange(0.0, 16, 2))


def test_an_access_outside_the_arguments_is_an_error(monkeypatch):
    strict(monkeypatch, 0)
    x, out = torch.arange(8.0), torch.zeros(8)
    _copy_kernel[(1,)](x, out[:7], 7, BLOCK=8)
    _copy_kernel[(1,)](x, out[4:], 4, BLOCK=8)
    for source, target, n in ((x[:7].clone(), out, 8), (x, out[:7].clone(), 8), (x[1:], out, 8)):
        with pytest.raises(InterpreterError, match="1 of 8 addresses are outside the arguments' memory"):
            _copy_kernel[(1,)](source, target, n, BLOCK=8)
