"""The LM head and its cross entropy, with no [N, V] logits kept for the backward pass.

On the GPUs that Triton's kernels are for, these are `kernels/masked_loss.py`. Elsewhere PyTorch computes the logits a
chunk of rows at a time, once for the loss and once more for its gradients (p = softmax(z), g the gradient of nll):

    nll = logsumexp(z) - z[target],   dz = g (p - onehot(target)),   dh = dz W,   dW = sum over chunks of dz^T h
"""

import torch
import torch.nn.functional as F
from torch import nn

from dllm_fast import ops
from dllm_fast.kernels.reference import widened

ELEMENTS = 1 << 25  # logits at once: 128 MB in fp32


def head_nll(hidden: torch.Tensor, head: nn.Module, target: torch.Tensor) -> torch.Tensor:
    """-ln p(target) [N], in fp32 or fp64, of hidden states [N, d] through a linear or tied ``head``; target [N] int64.

    Under autocast the operands have its dtype, as in `torch.nn.functional.linear`.
    """
    weight: torch.Tensor = head.weight  # type: ignore[assignment]
    bias = getattr(head, "bias", None)
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    with torch.autocast(kind, enabled=False):
        if hidden.is_cuda and ops.auto(hidden.device, weight.dtype)[0] == "triton":
            return ops.masked_loss(hidden, weight, bias, target, None, impl="triton")
        if len(target) * len(weight) <= ELEMENTS:
            return ops.masked_loss(hidden, weight, bias, target, None)
        return _ChunkedNLL.apply(hidden, weight, bias, target)  # type: ignore[no-any-return]


class _ChunkedNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target):
        lse, found = [], []
        for part in _parts(target, weight):
            z = widened(F.linear(hidden[part], weight, bias))
            lse.append(z.logsumexp(1))
            found.append(z.gather(1, target[part, None])[:, 0])
        total = torch.cat(lse)
        ctx.save_for_backward(hidden, weight, bias, target, total)
        return total - torch.cat(found)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden, weight, bias, target, lse = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        sums = torch.float64 if weight.dtype == torch.float64 else torch.float32
        d_weight = torch.zeros(weight.shape, dtype=sums, device=weight.device)
        d_bias = None if bias is None else torch.zeros(bias.shape, dtype=sums, device=bias.device)
        for part in _parts(target, weight):
            dz = widened(F.linear(hidden[part], weight, bias)).sub_(lse[part, None]).exp_()
            dz.scatter_add_(1, target[part, None], torch.full_like(lse[part, None], -1))
            dz.mul_(grad[part, None])
            if d_bias is not None:
                d_bias += dz.sum(0)
            dz = dz.to(hidden.dtype)
            d_hidden[part] = dz @ weight
            if d_weight.dtype == weight.dtype:
                d_weight.addmm_(dz.T, hidden[part])
            else:
                d_weight += dz.T @ hidden[part]
        return d_hidden, d_weight.to(weight.dtype), None if d_bias is None else d_bias.to(bias.dtype), None


def _parts(target: torch.Tensor, weight: torch.Tensor) -> list[slice]:
    rows = max(1, ELEMENTS // len(weight))
    return [slice(first, first + rows) for first in range(0, len(target), rows)]
