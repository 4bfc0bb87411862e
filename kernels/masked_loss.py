"""LM head and cross entropy of masked rows, with no [N, V] tensor in memory, forward or backward.

    z = h W^T + b,  nll[n] = logsumexp(z[n]) - z[n, target[n]],  loss = sum_n loss_weight[n] nll[n]

Forward: every program multiplies a tile of rows by a tile of weights. For each row it stores the tile's peak m,
S = sum e^(z - m), and the target's logit if it is in the tile. A second kernel merges them: M = max m_i and
lse = M + ln sum S_i e^(m_i - M). Logits stay in fp32; they are never rounded to the model's dtype.

Backward, with g the gradient of nll and p = e^(z - lse) = softmax(z):

    dz = g (p - onehot(target)),  dh = dz W,  dW = dz^T h,  db = sum_n dz

z is computed again by cuBLAS, a chunk of the vocabulary at a time: training has thousands of rows, for which its
matmuls are the fastest, and memory is rows x chunk. Between the matmuls one kernel turns the fp32 logits into dz in the
model's dtype, which the tensor cores need and PyTorch's own backward uses too. A chunk's dW and db are complete and
rounded once; dh sums the chunks in fp32 and is rounded at the end. The gradient of loss_weight is nll itself, so
PyTorch computes the weighted sum and differentiates it.
"""

import torch
import triton
import triton.language as tl

from dllm_fast.kernels.checks import FLOATS, check_tensors, one_device

# Large matmuls: 128 x 128 tiles read half as much from L2 as 64 x 64 ones.
CONFIGS = {
    2: {"BN": 128, "BV": 128, "BK": 64, "num_warps": 8, "num_stages": 3},
    4: {"BN": 32, "BV": 64, "BK": 32, "num_warps": 4, "num_stages": 2},  # fp32, without tensor cores
}
GROUP = 8  # vocabulary tiles that go through all rows together, so that rows and weights stay in L2
GRADIENT = {"BV": 2048, "num_warps": 8}
CHUNK_ELEMENTS = 1 << 25  # logits at once in the backward: 128 MB of fp32


@triton.jit(do_not_specialize=["N", "S"])
def _masked_loss_kernel(
    hidden_ptr,  # [N, D]
    weight_ptr,  # [V, D]
    bias_ptr,  # [V]
    target_ptr,  # [N] int64
    peak_ptr,  # [N, S] fp32
    mass_ptr,  # [N, S] fp32
    logit_ptr,  # [N] fp32: the target's logit
    N,
    V,
    D,
    S,
    BIAS: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    # 1. This program's tile: bands of GROUP vocabulary tiles, through all rows.
    rows = tl.cdiv(N, BN)
    band = tl.program_id(0) // (rows * GROUP)
    height = tl.minimum(S - band * GROUP, GROUP)
    within = tl.program_id(0) % (rows * GROUP)
    tile = band * GROUP + within % height
    n = (within // height).to(tl.int64) * BN + tl.arange(0, BN)  # [BN]
    column = tile * BV + tl.arange(0, BV)  # [BV]
    # Past the end the last row is read again, which is cheaper than a mask in the loop; its results are not stored.
    source = tl.minimum(column, V - 1).to(tl.int64)
    k = tl.arange(0, BK)
    w_ptr = weight_ptr + source[:, None] * D + k[None, :]
    h_ptr = hidden_ptr + tl.minimum(n, N - 1)[:, None] * D + k[None, :]
    # 2. The logits. Rows are on the M side, of which there are plenty here: a thread then holds many columns of few
    # rows, and reduces mostly over its own registers.
    z = tl.zeros([BN, BV], tl.float32)
    for start in range(0, D, BK):
        inside = (start + k < D)[None, :]  # [1, BK]
        w = tl.load(w_ptr, mask=inside, other=0.0)  # [BV, BK]
        h = tl.load(h_ptr, mask=inside, other=0.0)  # [BN, BK]
        z = tl.dot(h, tl.trans(w), z, input_precision="ieee")
        w_ptr += BK
        h_ptr += BK
    if BIAS:
        z += tl.load(bias_ptr + source).to(tl.float32)[None, :]
    # 3. What the tile contributes to each row.
    z = tl.where(column[None, :] < V, z, float("-inf"))
    peak = tl.max(z, 1)  # [BN]
    # If all of the tile is -inf, z - peak would be NaN.
    mass = tl.sum(tl.exp(z - tl.where(peak == float("-inf"), 0.0, peak)[:, None]), 1)  # [BN]
    tl.store(peak_ptr + n * S + tile, peak, mask=n < N)
    tl.store(mass_ptr + n * S + tile, mass, mask=n < N)
    target = tl.load(target_ptr + n, mask=n < N, other=-1)  # [BN]
    logit = tl.sum(tl.where(column[None, :] == target[:, None], z, 0.0), 1)  # [BN]
    inside = (target >= tile * BV) & (target < tl.minimum((tile + 1) * BV, V))
    tl.store(logit_ptr + n, logit, mask=(n < N) & inside)


@triton.jit(do_not_specialize=["V"])
def _masked_loss_merge_kernel(
    nll_ptr,  # [N] fp32
    lse_ptr,  # [N] fp32
    peak_ptr,  # [N, S] fp32
    mass_ptr,  # [N, S] fp32
    logit_ptr,  # [N] fp32
    target_ptr,  # [N] int64
    V,
    S,
    BS: tl.constexpr,  # at least S
):
    n = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BS)  # [BS]
    peaks = tl.load(peak_ptr + n * S + s, mask=s < S, other=float("-inf"))  # [BS]
    masses = tl.load(mass_ptr + n * S + s, mask=s < S, other=0.0)  # [BS]
    peak = tl.max(peaks, 0)
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    log_mass = tl.log(tl.sum(masses * tl.exp(peaks - shift), 0))
    # Peak minus logit comes first: it is exact where they are close, and peak + log_mass loses digits of log_mass.
    nll = (shift - tl.load(logit_ptr + n)) + log_mass
    target = tl.load(target_ptr + n)
    # No tile has a target outside the vocabulary, and the host does not read targets: make the loss NaN.
    nll = tl.where((target >= 0) & (target < V), nll, float("nan"))
    tl.store(nll_ptr + n, nll)
    tl.store(lse_ptr + n, shift + log_mass)


@triton.jit(do_not_specialize=["first"])
def _masked_loss_gradient_kernel(
    out_ptr,  # [N, C] of the model's dtype: dz
    logits_ptr,  # [N, C] fp32, without the bias
    bias_ptr,  # [C]: the chunk's
    grad_ptr,  # [N] fp32: of nll
    lse_ptr,  # [N] fp32
    target_ptr,  # [N] int64
    first,  # the chunk's first vocabulary id
    C,
    BIAS: tl.constexpr,
    BV: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BV + tl.arange(0, BV)  # [BV]
    z = tl.load(logits_ptr + n * C + c, mask=c < C, other=0.0)  # [BV]
    if BIAS:
        z += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    p = tl.exp(z - tl.load(lse_ptr + n))
    onehot = (first + c == tl.load(target_ptr + n)).to(tl.float32)
    tl.store(out_ptr + n * C + c, tl.load(grad_ptr + n) * (p - onehot), mask=c < C)


def _matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a b`` in fp32, not rounded to the inputs' dtype."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


@torch.library.custom_op("dllm_fast::masked_loss", mutates_args=())
def _masked_loss(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """nll and lse of each row, [N] fp32."""
    rows, width = hidden.shape
    vocabulary = weight.shape[0]
    nll, lse, logit = (torch.empty(rows, dtype=torch.float32, device=hidden.device) for _ in range(3))
    if rows == 0:
        return nll, lse
    config = CONFIGS[hidden.element_size()]
    splits = triton.cdiv(vocabulary, config["BV"])
    peak, mass = torch.empty(2, rows, splits, dtype=torch.float32, device=hidden.device)
    with torch.cuda.device_of(hidden):
        _masked_loss_kernel[(splits * triton.cdiv(rows, config["BN"]),)](
            hidden, weight, bias, target, peak, mass, logit, rows, vocabulary, width, splits,
            BIAS=bias is not None, GROUP=GROUP, **config,
        )  # fmt: skip
        _masked_loss_merge_kernel[(rows,)](
            nll, lse, peak, mass, logit, target, vocabulary, splits, BS=triton.next_power_of_2(splits), num_warps=4
        )
    return nll, lse


@_masked_loss.register_fake
@one_device
def _(hidden, weight, bias, target):
    nll = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    return nll, torch.empty_like(nll)


@torch.library.custom_op("dllm_fast::masked_loss_backward", mutates_args=())
def _masked_loss_backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    lse: torch.Tensor,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of hidden, weight and bias; an empty tensor for each that is not in ``needs``."""
    rows, width = hidden.shape
    vocabulary = weight.shape[0]
    device = hidden.device
    grad_hidden = torch.zeros(rows if needs[0] else 0, width, dtype=torch.float32, device=device)
    grad_weight = torch.zeros(vocabulary if needs[1] else 0, width, dtype=weight.dtype, device=device)
    grad_bias = torch.zeros(
        vocabulary if needs[2] else 0, dtype=weight.dtype if bias is None else bias.dtype, device=device
    )
    if rows == 0:
        return grad_hidden.to(hidden.dtype), grad_weight, grad_bias
    grad = grad.float().contiguous()
    # Multiples of 16 columns keep the rows of a chunk aligned for the tensor cores.
    chunk = max(16, CHUNK_ELEMENTS // rows // 16 * 16)
    for first in range(0, vocabulary, chunk):
        part = slice(first, min(first + chunk, vocabulary))
        logits = _matmul(hidden, weight[part].T)  # [N, C]
        dz = torch.empty(logits.shape, dtype=hidden.dtype, device=device)
        with torch.cuda.device_of(hidden):
            _masked_loss_gradient_kernel[(rows, triton.cdiv(logits.shape[1], GRADIENT["BV"]))](
                dz, logits, None if bias is None else bias[part], grad, lse, target, first, logits.shape[1],
                BIAS=bias is not None, **GRADIENT,
            )  # fmt: skip
        if needs[0]:
            grad_hidden += _matmul(dz, weight[part])
        if needs[1]:
            torch.mm(dz.T, hidden, out=grad_weight[part])
        if needs[2]:
            grad_bias[part] = dz.sum(0, dtype=torch.float32)
    return grad_hidden.to(hidden.dtype), grad_weight, grad_bias


@_masked_loss_backward.register_fake
@one_device
def _(grad, hidden, weight, bias, target, lse, needs):
    rows, vocabulary, width = hidden.shape[0], weight.shape[0], hidden.shape[1]
    return (
        hidden.new_empty(rows if needs[0] else 0, width),
        weight.new_empty(vocabulary if needs[1] else 0, width),
        (weight if bias is None else bias).new_empty(vocabulary if needs[2] else 0),
    )


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    needs = list(ctx.needs_input_grad[:3])
    gradients = _masked_loss_backward(grad, *ctx.saved_tensors, needs)
    return *(x if need else None for x, need in zip(gradients, needs, strict=True)), None


_masked_loss.register_autograd(_backward, setup_context=_setup_context)


def masked_loss(
    hidden: torch.Tensor,  # [N, D]
    weight: torch.Tensor,  # [V, D]
    bias: torch.Tensor | None,  # [V]
    target: torch.Tensor,  # [N] int64
    loss_weight: torch.Tensor | None,  # [N] float
) -> torch.Tensor:
    """`reference.masked_loss` for fp32, bf16 and fp16, differentiable in all but ``target``; in fp32.

    A target outside the vocabulary makes the loss NaN: an error would have to wait for the device.
    """
    check_tensors(hidden.device, hidden=(hidden, [None, None], FLOATS))
    check_tensors(hidden.device, weight=(weight, [None, hidden.shape[1]], (hidden.dtype,)))
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    check_tensors(
        hidden.device,
        bias=(bias, [vocabulary], FLOATS),
        target=(target, [rows], (torch.int64,)),
        loss_weight=(loss_weight, [rows], FLOATS),
    )
    if not 1 <= vocabulary < 1 << 30:
        raise ValueError(f"weight has {vocabulary} rows; expected 1 to 2^30 vocabulary ids")
    nll, _ = _masked_loss(hidden, weight, bias, target)
    return nll if loss_weight is None else (nll * loss_weight).sum()
