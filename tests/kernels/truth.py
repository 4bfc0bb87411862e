"""Shared by the tests in this folder: bounds on a kernel's error, and tensors with indices beyond 2^31."""

import numpy as np
import torch

# The largest relative errors of the approximate fp32 instructions in the kernels' PTX, from the PTX ISA manual, section
# "Floating Point Instructions". A unit in the last place is at most 2^-23 of a number. `test_resources.py` compiles
# every kernel and finds no other such instruction. Logarithms and erf are polynomials of libdevice, sine and cosine
# PyTorch's own tables; lg2, sin and cos, whose errors are absolute, are in no kernel.
INSTRUCTIONS = {
    "div.rn.f32": 2**-24,  # correctly rounded
    "div.full.f32": 2 * 2**-23,  # 2 units
    "ex2.approx.f32": 2.5 * 2**-23,  # 2 units from the correctly rounded result
    "rsqrt.approx.f32": 2**-22.9,
}
ROUNDED = 2**-24  # relative error of one fp32 addition, multiplication or fused pair of them


def exp_error(x: float | torch.Tensor) -> float | torch.Tensor:
    """Relative error of ``tl.exp(x)``, which is ex2.approx of a rounded product of x and a rounded log2(e).

    A relative error in the exponent multiplies x, and adds the result to the relative error of exp.
    """
    return INSTRUCTIONS["ex2.approx.f32"] + 2 * ROUNDED * abs(x)


def average_ulps(out: torch.Tensor) -> float:
    """For `assert_as_exact` of averages weighted by exponentials: rounding, and on a GPU the error of its exponential,
    which counts in fp32."""
    return 1 + INSTRUCTIONS["ex2.approx.f32"] / torch.finfo(out.dtype).eps if out.is_cuda else 1


def assert_within(out: torch.Tensor, truth: torch.Tensor, bound: torch.Tensor) -> None:
    """Every element of ``out`` is within ``bound`` of ``truth`` (both fp64), plus rounding to out's dtype."""
    assert out.shape == truth.shape == bound.shape
    limits = torch.finfo(out.dtype)
    allowed = bound + limits.eps / 2 * (truth.abs() + bound) + limits.smallest_normal * limits.eps / 2
    error = (out.double() - truth).abs()
    worst = (error - allowed).argmax()
    assert (error <= allowed).all(), (
        f"element {worst.item()}: {out.flatten()[worst].item():.9g}, exactly {truth.flatten()[worst].item():.9g}; "
        f"{error.flatten()[worst].item():.3g} apart, {allowed.flatten()[worst].item():.3g} allowed"
    )


# For few-row matmuls: rows, output channels, input channels. The interpreter has 4 programs, so tiles belong to one
# program, to two or to all.
LINEARS = {
    "one-row": (1, 128, 256),
    "a-tile-for-all": (5, 128, 1024),
    "a-tile-a-program": (32, 512, 128),
    "tiles-cut-anywhere": (17, 384, 640),
    "most-rows": (64, 256, 256),
}


def linear_inputs(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, K] and a weight [N, K], fp32, for one of `LINEARS`."""
    rows, n, k = LINEARS[name]
    make = torch.Generator().manual_seed(0)
    return torch.randn(rows, k, generator=make), torch.randn(n, k, generator=make) * k**-0.5


def assert_as_exact(
    out: torch.Tensor,
    eager: torch.Tensor,  # the same by PyTorch in the same dtype
    truth: torch.Tensor,  # the same in fp64
    ulps: float = 1.0,
    size: float | None = None,
) -> None:
    """The largest error is at most twice eager's, or ``ulps`` units in the last place of ``size``, by default the
    largest true value.

    The second limit is for eager results that happen to be exact. If the terms of a sum cancel, it has rounding errors
    of the terms' size, which ``size`` then is.
    """
    assert out.shape == truth.shape
    assert out.dtype == eager.dtype
    assert out.isfinite().all(), f"{(~out.isfinite()).sum()} of {out.numel()} elements are not finite"
    error, eager_error = ((x.double() - truth).abs().max().item() for x in (out, eager))
    limit = max(
        2 * eager_error, ulps * torch.finfo(out.dtype).eps * (truth.abs().max().item() if size is None else size)
    )
    assert error <= limit, f"error {error:.3g}, eager's {eager_error:.3g}, limit {limit:.3g}"


def far_apart(x: torch.Tensor) -> torch.Tensor:
    """A copy of bfloat16 x whose two entries in the first dimension are more than 2^31 elements apart.

    On a CPU only the pages that hold x take up memory.
    """
    assert x.dtype == torch.bfloat16
    assert x.shape[0] == 2
    apart = 2**31 + 64
    if x.is_cuda:
        base = torch.zeros(apart + x[0].numel(), dtype=x.dtype, device=x.device)
    else:
        base = torch.from_numpy(np.zeros(apart + x[0].numel(), dtype=np.int16)).view(x.dtype)
    return base.as_strided(x.shape, (apart, *x[0].contiguous().stride())).copy_(x)
