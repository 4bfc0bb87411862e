"""The training loss and its gradients against autograd of the fp64 definition."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from dllm_fast.kernels import masked_loss as kernel
from dllm_fast.kernels import reference
from dllm_fast.kernels.masked_loss import masked_loss

SHAPES = {  # rows, vocabulary, width
    "1row-130vocab-8wide": (1, 130, 8),
    "7rows-257vocab-40wide": (7, 257, 40),
    "130rows-128vocab-24wide": (130, 128, 24),
    "5rows-1100vocab-16wide": (5, 1100, 16),
    "3rows-1vocab-5wide": (3, 1, 5),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ULP = 2.0**-24


@pytest.fixture
def poison(monkeypatch):
    """Fill tensors that kernels allocate with NaN; return a list with the largest number of elements asked for."""
    empty, largest = torch.empty, [0]

    def filled(*args, **options):
        x = empty(*args, **options)
        largest[0] = max(largest[0], x.numel())
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", filled)
    return largest


def problem(rows, vocabulary, width, dtype, device, seed=0):
    """hidden, weight, bias, target and loss_weight."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator).to(device, dtype)
    weight = (torch.randn(vocabulary, width, generator=generator) * 2 / width**0.5).to(device, dtype)
    bias = torch.randn(vocabulary, generator=generator).to(device, dtype)
    target = torch.randint(0, vocabulary, (rows,), generator=generator).to(device)
    target[-1] = vocabulary - 1
    return hidden, weight, bias, target, torch.rand(rows, generator=generator).to(device)


def gradients(function, hidden, weight, bias, target, loss_weight, dtype=None):
    """The loss, then the gradients of the four differentiable arguments (None for a missing bias)."""
    leaves = [
        None if x is None else x.detach().to(dtype or x.dtype).requires_grad_()
        for x in (hidden, weight, bias, loss_weight)
    ]
    loss = function(*leaves[:3], target, leaves[3])
    (loss * 1.5).backward()
    return [loss.detach(), *(None if x is None else x.grad for x in leaves)]


def assert_matches(*arguments):
    """Each result is at most twice as far from the truth as eager's in the same dtype, or 16 ulp of its largest."""
    truth = gradients(reference.masked_loss, *arguments, dtype=torch.float64)
    eager = gradients(reference.masked_loss, *arguments)
    ours = gradients(masked_loss, *arguments)
    for name, x, rough, exact in zip(
        ("loss", "hidden", "weight", "bias", "loss_weight"), ours, eager, truth, strict=True
    ):
        if exact is None:
            assert x is None
            continue
        assert x.shape == exact.shape and x.dtype == rough.dtype, name
        error, allowed = (x - exact).abs().max(), (rough - exact).abs().max()
        assert error <= 2 * allowed + 16 * ULP * exact.abs().max().clamp(min=1), name


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_matches_autograd(shape, dtype, device, monkeypatch, poison):
    monkeypatch.setattr(kernel, "CHUNK_ELEMENTS", shape[0] * 300)  # the largest vocabulary in four chunks
    hidden, weight, bias, target, loss_weight = problem(*shape, dtype, device)
    assert_matches(hidden, weight, bias, target, loss_weight)
    if dtype == torch.bfloat16:
        assert_matches(hidden, weight, None, target, loss_weight)


def test_extreme_logits(device, poison):
    hidden, weight, _, target, loss_weight = problem(4, 200, 8, torch.float32, device)
    at = torch.arange(200, device=device)
    target[:] = torch.tensor([3, 150, 199, 0])
    for bias in (
        torch.where((at < 128) & (at > 3), -torch.inf, 0.0),
        torch.where(at % 2 == 0, 1e4, 0.0),
        torch.where(at < 190, -1e30, 0.0),
    ):
        assert_matches(hidden, weight, bias.to(torch.float32), target, loss_weight)


@pytest.mark.parametrize("needed", ("hidden", "weight", "bias", "loss_weight"))
def test_one_gradient_alone(needed, device, poison):
    names = ("hidden", "weight", "bias", "target", "loss_weight")
    arguments = dict(zip(names, problem(3, 140, 8, torch.float32, device), strict=True))
    arguments[needed].requires_grad_()
    masked_loss(**arguments).backward()
    ours, arguments[needed].grad = arguments[needed].grad, None
    reference.masked_loss(**arguments).backward()
    torch.testing.assert_close(ours, arguments[needed].grad, rtol=1e-5, atol=1e-6)
    assert all(arguments[name].grad is None for name in names if name != needed)


def test_without_weights_it_is_the_terms(device, poison):
    *arguments, target, loss_weight = problem(3, 140, 8, torch.float32, device)
    gradients = []
    for loss in (masked_loss, reference.masked_loss):
        leaves = [x.clone().requires_grad_() for x in arguments]
        terms = loss(*leaves, target, None)
        gradients.append((terms, *torch.autograd.grad(terms, leaves, loss_weight)))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_no_logits_in_memory(device, monkeypatch, poison):
    monkeypatch.setattr(kernel, "CHUNK_ELEMENTS", 4 * 256)
    hidden, weight, bias, target, loss_weight = problem(4, 2000, 2, torch.bfloat16, device)
    masked_loss(hidden.requires_grad_(), weight, bias, target, loss_weight).backward()
    assert poison[0] == 4 * 256  # a chunk's dz, in the backward


def test_target_outside_the_vocabulary_shows(device, poison):
    hidden, weight, bias, target, loss_weight = problem(4, 200, 8, torch.float32, device)
    for wrong in (-1, 200, 1 << 40):
        target[2] = wrong
        assert masked_loss(hidden, weight, bias, target, loss_weight).isnan()


def test_no_rows(device):
    hidden, weight, bias, target, loss_weight = problem(1, 20, 8, torch.bfloat16, device)
    leaves = [x.requires_grad_() for x in (hidden[:0].clone(), weight, bias)]
    loss = masked_loss(*leaves, target[:0], loss_weight[:0])
    loss.backward()
    assert loss == 0 and all((x.grad == 0).all() and x.grad.shape == x.shape for x in leaves)


@hypothesis.settings(max_examples=8, deadline=None, derandomize=True)
@hypothesis.given(
    rows=st.integers(1, 20), vocabulary=st.integers(1, 150), width=st.integers(1, 70), seed=st.integers(0, 99)
)
def test_any_shape(rows, vocabulary, width, seed):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert_matches(*problem(rows, vocabulary, width, torch.float32, device, seed))


def test_bad_arguments(device):
    hidden, weight, bias, target, loss_weight = problem(4, 40, 8, torch.bfloat16, device)
    for message, arguments in {
        "hidden is": (hidden[0], weight, bias, target, loss_weight),
        "weight is torch.float32": (hidden, weight.float(), bias, target, loss_weight),
        "hidden is torch.float64": (hidden.double(), weight.double(), bias, target, loss_weight),
        r"weight is torch.bfloat16 \[40, 7\]": (hidden, weight[:, :7], bias, target, loss_weight),
        r"bias is torch.bfloat16 \[39\]": (hidden, weight, bias[1:], target, loss_weight),
        "target is torch.int32": (hidden, weight, bias, target.int(), loss_weight),
        r"loss_weight is torch.float32 \[3\]": (hidden, weight, bias, target, loss_weight[:3]),
        "weight has 0 rows": (hidden, weight[:0], bias[:0], target, loss_weight),
    }.items():
        with pytest.raises(ValueError, match=message):
            masked_loss(*arguments)


def test_custom_op(device):
    hidden, weight, bias, target, loss_weight = problem(4, 40, 8, torch.float32, device)
    for x in (hidden, weight, bias):
        x.requires_grad_()
    torch.library.opcheck(kernel._masked_loss, (hidden, weight, bias, target))
    detached = [x.detach() for x in (hidden, weight, bias)]
    lse = reference.select(detached[0] @ detached[1].T + detached[2], 0)[2]
    for needs in ([True, True, True], [False, True, False]):
        torch.library.opcheck(kernel._masked_loss_backward, (loss_weight, *detached, target, lse, needs))
    compiled = torch.compile(masked_loss, fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(compiled(hidden, weight, bias, target, loss_weight), (hidden, weight, bias))
    expected = torch.autograd.grad(masked_loss(hidden, weight, bias, target, loss_weight), (hidden, weight, bias))
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
