"""Which matmul serves on a CPU: measured once, kept, printed, and set by the environment."""

import pytest
import torch
import torch.nn.functional as F

from dllm_fast import ops
from dllm_fast.cpu import compiled, matmuls

BF16, FP32 = torch.bfloat16, torch.float32
CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(bool(compiled.missing()), reason=str(compiled.missing()))


@pytest.fixture(autouse=True)
def unsettled(monkeypatch):
    """As in a new process, with no table measured or set."""
    monkeypatch.setattr(matmuls, "pytorch_from", {})
    monkeypatch.delenv("DLLM_FAST_MATMUL", raising=False)


def clock(monkeypatch, faster_from):
    """PyTorch's matmul takes half of the extension's time from so many rows on, and all of it below; the calls."""
    calls = []

    def times(ours, theirs):
        x = ours.__defaults__[0]
        calls.append(x.shape[0])
        return 1.0, 0.5 if x.shape[0] >= faster_from else 1.0

    monkeypatch.setattr(matmuls, "_times", times)
    return calls


@pytest.mark.parametrize("faster_from, first", [(1, 16), (17, 32), (256, 256), (300, 512), (1025, matmuls.NEVER)])
def test_it_is_measured_once(faster_from, first, monkeypatch):
    calls = clock(monkeypatch, faster_from)
    for _ in range(3):
        assert ops.resolve("cpp", CPU, BF16) == "cpp"
        assert matmuls.pytorch_from == {BF16: first}
    assert calls == list(matmuls.ROWS[: len(calls)])


def test_what_is_a_little_faster_does_not_serve(monkeypatch):
    monkeypatch.setattr(matmuls, "_times", lambda ours, theirs: (1.0, 0.91))
    matmuls.settle(FP32)
    assert matmuls.pytorch_from == {FP32: matmuls.NEVER}


def test_the_table_that_is_printed_fixes_it(monkeypatch):
    monkeypatch.setattr(matmuls, "_measured", lambda dtype: {BF16: 128, FP32: matmuls.NEVER}[dtype])
    printed = matmuls.table()
    assert printed == "float32:never,bfloat16:128"
    monkeypatch.setattr(matmuls, "_measured", lambda dtype: pytest.fail("it is fixed"))
    monkeypatch.setattr(matmuls, "pytorch_from", {})
    monkeypatch.setenv("DLLM_FAST_MATMUL", printed)
    assert matmuls.table() == printed


@pytest.mark.parametrize(
    "text", ["bf16:3", "bfloat16", "bfloat16:0", "float32:-1", "float32:many", "never", "float32:1,"]
)
def test_what_does_not_fit_is_refused(text, monkeypatch):
    monkeypatch.setenv("DLLM_FAST_MATMUL", text)
    with pytest.raises(ValueError, match=f"DLLM_FAST_MATMUL='{text}' in the environment; expected DTYPE:ROWS"):
        ops.resolve("auto", CPU, FP32)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_linear_goes_where_the_table_says(dtype, monkeypatch):
    monkeypatch.setenv("DLLM_FAST_MATMUL", "float32:5,bfloat16:9")
    matmuls.settle(dtype)
    served = []
    monkeypatch.setattr(compiled, "linear", lambda x, *rest: served.append(x.numel() // 6) or F.linear(x, *rest))
    weight, bias = torch.randn(7, 6).to(dtype), torch.randn(7).to(dtype)
    for shape in ((1, 6), (4, 6), (2, 2, 6), (5, 6), (8, 6), (2, 4, 6), (9, 6), (3, 3, 6), (40, 6)):
        x = torch.randn(shape).to(dtype)
        assert torch.equal(ops.linear(x, weight, bias, impl="cpp"), F.linear(x, weight, bias))
    assert served == ([1, 4, 4] if dtype == FP32 else [1, 4, 4, 5, 8, 8])


def test_a_measurement_leaves_no_trace():
    """Nor does it change or depend on random numbers, a default device, a default dtype, autocast or gradients."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with torch.device("meta"), torch.autocast("cpu", dtype=BF16):
        matmuls.settle(FP32)
    assert torch.equal(torch.get_rng_state(), before)
    assert matmuls.pytorch_from[FP32] in (*matmuls.ROWS, matmuls.NEVER)
    assert torch.is_grad_enabled()
