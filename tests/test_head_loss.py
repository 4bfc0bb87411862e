"""The trainers' head and cross entropy: values, gradients, and that no [N, V] tensor is kept."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dllm_fast.kernels import reference
from dllm_fast.train import head_loss
from dllm_fast.train.head_loss import head_nll

ROWS, WIDTH, VOCAB = 37, 16, 101


def job(dtype, bias, seed=0):
    """(hidden, head, target, the gradient of each row's loss)."""
    draw = torch.Generator().manual_seed(seed)
    head = nn.Linear(WIDTH, VOCAB, bias=bias)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(generator=draw)
    hidden = torch.randn(ROWS, WIDTH, generator=draw).to(dtype).requires_grad_()
    return hidden, head.to(dtype), torch.randint(0, VOCAB, (ROWS,), generator=draw), torch.randn(ROWS, generator=draw)


def gradients(loss, hidden, head, grad):
    loss.backward(grad.to(loss.dtype))
    return [x.grad.clone() for x in (hidden, *head.parameters())]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("elements", [VOCAB, 5 * VOCAB + 7, 1 << 25], ids=["a-row", "five-rows", "whole"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
def test_chunks_are_the_definition(dtype, elements, bias, monkeypatch):
    """Error against fp64 at most twice that of plain PyTorch in the same dtype."""
    monkeypatch.setattr(head_loss, "ELEMENTS", elements)
    hidden, head, target, grad = job(dtype, bias)
    got = head_nll(hidden, head, target)
    got = [got.detach(), *gradients(got, hidden, head, grad)]
    hidden, head, target, grad = job(dtype, bias)
    eager = reference.masked_loss(hidden, head.weight, head.bias, target, None)
    eager = [eager.detach(), *gradients(eager, hidden, head, grad)]
    hidden, head, target, grad = job(dtype, bias)
    wide, head = hidden.detach().double().requires_grad_(), head.double()
    exact = reference.masked_loss(wide, head.weight, head.bias, target, None)
    exact = [exact.detach(), *gradients(exact, wide, head, grad.double())]
    for name, mine, plain, truth in zip(("nll", "hidden", "weight", "bias"), got, eager, exact, strict=False):
        assert mine.dtype == plain.dtype, name
        error, allowed = ((x.double() - truth).norm() for x in (mine, plain))
        assert float(error) <= 2 * float(allowed) + 1e-12 * float(truth.norm()), name


def test_autocast_multiplies_in_its_dtype():
    hidden, head, target, grad = job(torch.float32, True)
    with torch.autocast("cpu", torch.bfloat16):
        got = head_nll(hidden, head, target)
        expected = torch.nn.functional.cross_entropy(head(hidden).float(), target, reduction="none")
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
    got.backward(grad)
    assert hidden.grad.dtype == head.weight.grad.dtype == torch.float32


def test_no_logits_are_kept(monkeypatch):
    """No tensor that an operation makes has more elements than a chunk of logits or the weight."""
    monkeypatch.setattr(head_loss, "ELEMENTS", 4 * VOCAB)
    largest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest[0] = max(largest[0], result.numel())
            return result

    hidden, head, target, grad = job(torch.float32, True)
    with Watch():
        head_nll(hidden, head, target).backward(grad)
    assert largest[0] <= max(4 * VOCAB, WIDTH * VOCAB) < ROWS * VOCAB
