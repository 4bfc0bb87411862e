"""Prediction: from rows of hidden states, through the LM head, to token, confidence and log-sum-exp."""

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from bench.ops.cases.case import MODELS, TINY, Case, Model, Run, compare, compiled, dtype_of
from dllm_fast.kernels import reference
from dllm_fast.kernels.predict import predict

ROWS = (1, 8, 32, 256, 2048)
NOISE_ROWS = (32, 256)
SAMPLES = 16  # rows that are compared with the truth
SEED = 7


def count(rows: int, model: Model, itemsize: int) -> tuple[int, int]:
    """Bytes: the head, its bias, the rows, and 16 bytes of output per row. FLOPs: the matmul."""
    elements = model.vocabulary * (model.width + model.bias) + rows * model.width
    return elements * itemsize + 16 * rows, 2 * rows * model.width * model.vocabulary


def make(generator: torch.Generator, rows: int, model: Model) -> tuple:
    """hidden [N, D], weight [V, D], bias [V] or None, row [N], position [N]; logits with a spread of about 2."""
    device, dtype = generator.device, dtype_of(generator.device.type)
    options = {"generator": generator, "device": device, "dtype": dtype}
    hidden = torch.randn(rows, model.width, **options)
    weight = torch.randn(model.vocabulary, model.width, **options) * (2 / model.width**0.5)
    bias = torch.randn(model.vocabulary, **options) if model.bias else None
    at = torch.arange(rows, device=device)
    return hidden, weight, bias, at // 32, at % 32


def check(inputs: tuple, mask_id: int, noisy: bool):
    """Compare some rows' token, confidence and log-sum-exp with fp64.

    A token is right if its score is the largest. Peers draw their own noise, so with noise only the confidence of the
    token that they drew can be checked: the relative error is of that.
    """
    hidden, weight, bias, row, position = inputs
    at = torch.linspace(0, hidden.shape[0] - 1, min(SAMPLES, hidden.shape[0]), device=hidden.device).long()
    exact = torch.cat([hidden[at].double() @ part.double().T for part in weight.split(1 << 14)], 1)  # [n, V]
    exact = exact if bias is None else exact + bias.double()
    eager = F.linear(hidden[at], weight, bias).float()
    allowed = exact.clone()
    if noisy:
        columns = torch.arange(weight.shape[0], device=hidden.device)
        allowed += reference.gumbel(SEED, 1, row[at], position[at], columns)
    allowed[:, mask_id] = -torch.inf
    best = allowed.amax(1)

    def said(logits: torch.Tensor, token: torch.Tensor, fields: int) -> list[torch.Tensor]:
        lse = torch.logsumexp(logits, 1)
        return [torch.exp(logits.gather(1, token)[:, 0] - lse), lse][:fields]

    def judge(out: tuple) -> tuple[float, float]:
        token, fields = out[0][at, None], len(out) - 1
        results = [x[at] for x in out[1:]], said(eager, token, fields), said(exact, token, fields)
        excess, relative = compare(*results, ulps=8)
        missed = (best - allowed.gather(1, token)[:, 0]).max() / best.abs().max()
        if not noisy:
            relative = max(relative, float(missed))  # bf16 logits may rank a close one first
        return max(excess, float(missed) / (8 * torch.finfo(torch.float32).eps)), relative

    return judge


def implementations(model: Model, noisy: bool, device: str) -> dict[str, Run]:
    temperature = 1.0 if noisy else 0.0

    def ours(hidden, weight, bias, row, position, path="auto"):
        return predict(
            hidden, weight, bias, mask_id=model.mask_id, temperature=temperature, seed=SEED, step=1, row=row,
            position=position, _path=path,
        )  # fmt: skip

    def eager(hidden, weight, bias, *_):
        logits = F.linear(hidden, weight, bias).float()
        p = torch.softmax(logits, -1)
        if noisy:
            u = torch.rand(logits.shape, device=logits.device)
            logits = logits - torch.log(-torch.log(u))
        token = logits.index_fill(1, mask_id, float("-inf")).argmax(-1)
        return token, p.gather(1, token[:, None])[:, 0]

    def published(hidden, weight, bias, *_):
        """As in LLaDA's generate: Gumbel noise and softmax in fp64."""
        logits = F.linear(hidden, weight, bias).double()
        noise = torch.rand(logits.shape, dtype=torch.float64, device=logits.device)
        token = (logits.index_fill(1, mask_id, float("-inf")).exp() / -torch.log(noise)).argmax(-1)
        p = torch.softmax(logits, -1)
        return token, p.gather(1, token[:, None])[:, 0].float()

    mask_id = torch.tensor([model.mask_id], device=device)
    run = {"ours": ours, "eager": eager, "compile": compiled(eager, device)}
    return run | ({"published": published} if noisy else {})


def one(model: Model, rows: int, noisy: bool, device: str) -> Case:
    size, flops = count(rows, model, dtype_of(device).itemsize)
    return Case(
        op="predict",
        name=f"{model.name}{'-noise' * noisy}-rows{rows}",
        inputs=functools.partial(make, rows=rows, model=model),
        run=implementations(model, noisy, device),
        check=functools.partial(check, mask_id=model.mask_id, noisy=noisy),
        bytes=size,
        flops=flops,
        aim_ratio=1.0,
        aim_share=0.85 if rows <= 64 else None,
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    for model in TINY if quick else MODELS:
        for noisy in (False, True):
            for rows in (1, 5) if quick else NOISE_ROWS if noisy else ROWS:
                yield one(model, rows, noisy, device)
