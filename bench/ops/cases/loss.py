"""The training loss: LM head and cross entropy of masked rows, with and without gradients."""

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from bench.ops.cases.case import MODELS, TINY, Case, Model, compare, compiled, dtype_of, installed
from bench.ops.cases.predict import make as make_head
from dllm_fast.kernels import reference
from dllm_fast.kernels.masked_loss import masked_loss

ROWS = (2048,)
SAMPLES = 16  # rows of each gradient that are compared with the truth


def count(rows: int, model: Model, itemsize: int, backward: bool) -> tuple[int, int]:
    """Bytes: head, bias and rows, twice with gradients. FLOPs: one matmul, and two more for gradients."""
    elements = model.vocabulary * (model.width + model.bias) + rows * model.width
    product = 2 * rows * model.width * model.vocabulary
    return elements * itemsize * (2 if backward else 1) + 12 * rows, product * (3 if backward else 1)


def make(generator: torch.Generator, rows: int, model: Model) -> tuple:
    """hidden, weight, bias, target [N], loss_weight [N] of ones, because some peers have no weights."""
    hidden, weight, bias, *_ = make_head(generator, rows, model)
    target = torch.randint(0, model.vocabulary, (rows,), generator=generator, device=generator.device)
    return hidden, weight, bias, target, torch.ones(rows, device=generator.device)


def with_gradients(loss, hidden, weight, bias, target, loss_weight) -> tuple[torch.Tensor, ...]:
    """The loss and the gradients of hidden, weight and bias."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in (hidden, weight, bias)]
    with torch.enable_grad():
        value = loss(*leaves, target, loss_weight)
        return value.detach(), *torch.autograd.grad(value, [x for x in leaves if x is not None])


def implementations(device: str, backward: bool) -> dict:
    def eager(hidden, weight, bias, target, loss_weight):
        logits = F.linear(hidden, weight, bias)
        return (F.cross_entropy(logits.float(), target, reduction="none") * loss_weight).sum()

    losses = {"ours": masked_loss, "eager": eager, "compile": compiled(eager, device)}
    if installed("liger_kernel"):

        def liger(hidden, weight, bias, target, loss_weight):
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

            return liger_fused_linear_cross_entropy(hidden, weight, target, bias, reduction="sum")

        losses["liger"] = liger
    if installed("cut_cross_entropy"):

        def cut(hidden, weight, bias, target, loss_weight):
            from cut_cross_entropy import linear_cross_entropy

            more = {} if bias is None else {"bias": bias}
            return linear_cross_entropy(hidden, weight, target, reduction="sum", **more)

        losses["cut-cross-entropy"] = cut
    if backward:
        return {name: functools.partial(with_gradients, loss) for name, loss in losses.items()}

    def alone(loss, *arguments):
        with torch.no_grad():
            return (loss(*arguments),)

    return {name: functools.partial(alone, loss) for name, loss in losses.items()}


def check(inputs: tuple, backward: bool):
    """Compare the loss, and rows of the gradients, with the fp64 definition."""

    def results(dtype):
        hidden, weight, bias, target, loss_weight = inputs
        wide = [None if x is None else x.to(dtype) for x in (hidden, weight, bias)]
        if backward:
            return with_gradients(reference.masked_loss, *wide, target, loss_weight)
        return (reference.masked_loss(*wide, target, loss_weight),)

    def few(results):
        return [x.reshape(1) if x.dim() == 0 else x[:SAMPLES] for x in results]

    exact, eager = few(results(torch.float64)), few(results(inputs[0].dtype))
    # A sum over thousands of rows: allow rounding of its terms, not only of the sum's last place.
    return lambda out: compare([x.to(y.dtype) for x, y in zip(few(out), eager)], eager, exact, ulps=16)


def cases(device: str, quick: bool) -> Iterator[Case]:
    for model in TINY if quick else MODELS:
        for rows in (6,) if quick else ROWS:
            for backward in (False, True):
                size, flops = count(rows, model, dtype_of(device).itemsize, backward)
                yield Case(
                    op="loss",
                    name=f"{model.name}-rows{rows}{'-backward' * backward}",
                    inputs=functools.partial(make, rows=rows, model=model),
                    run=implementations(device, backward),
                    check=functools.partial(check, backward=backward),
                    bytes=size,
                    flops=flops,
                )
