"""Gumbel and uniform noise: within a few fp32 ulp of the definition, both tails, the distribution, the contract."""

import math

import pytest
import torch
import triton
import triton.language as tl

from dllm_fast.kernels import gumbel as kernel
from dllm_fast.kernels import reference
from dllm_fast.kernels.gumbel import gumbel, gumbel_from_words, gumbel_tile, uniform

BOUND = 4 * 2.0**-24  # of max(1, |G|): two logarithms of 2 ulp
KEYS = {
    "zero": (0, 0),
    "small": (5, 3),
    "64-bit-seed": ((1 << 64) - 12345, 7),
    "signed-seed": (-3, 7),
    "32-bit-step": (1 << 40, (1 << 32) - 1),
}


@triton.jit
def _words_kernel(out_ptr, high_ptr, low_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    high, low = tl.load(high_ptr + at).to(tl.uint32), tl.load(low_ptr + at).to(tl.uint32)
    tl.store(out_ptr + at, gumbel_from_words(high, low))


@triton.jit
def _tile_kernel(out_ptr, seed_ptr, step_ptr, row_ptr, position_ptr, first, BV: tl.constexpr, BN: tl.constexpr):
    n, v = tl.arange(0, BN), tl.arange(0, BV)
    row = tl.load(row_ptr + n).to(tl.uint32)[None, :]
    position = tl.load(position_ptr + n).to(tl.uint32)[None, :]
    seed = tl.load(seed_ptr + n)[None, :]
    tile = gumbel_tile(seed, tl.load(step_ptr).to(tl.uint32), row, position, first, BV, BN)
    tl.store(out_ptr + n[None, :] * BV + v[:, None], tile)


@pytest.fixture
def poison(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))


def indices(n, device, dtype=torch.int64):
    """Different rows and positions, some at the ends of their ranges."""
    row = torch.arange(n, device=device, dtype=dtype) % 3
    position = torch.arange(n, device=device, dtype=dtype) * 5 + 2
    position[-1] = (1 << 31) - 1
    return row, position


def assert_close(noise, truth):
    assert noise.dtype == torch.float32 and noise.shape == truth.shape
    error = (noise.double() - truth).abs() / truth.abs().clamp(min=1)
    assert error.max() <= BOUND, f"{error.max() / 2.0**-24:.2f} * 2^-24"


def test_words_at_the_extremes(device):
    top = (1 << 32) - 1
    ends = [0, 1, 2, 255, (1 << 24) - 1, 1 << 24, (1 << 24) + 1, (1 << 31) - 1]
    third = ((1 << 64) // 3) >> 32
    highs = [*ends, *(top - x for x in ends), *(x + i for x in (third, top - third) for i in (-1, 0, 1))]
    highs += [int((1 << 32) * math.exp(-1)) + i for i in (-1, 0, 1)]  # G changes sign at U = 1/e
    pairs = [(h, low) for h in highs for low in (0, 1, 1 << 31, top - 1, top)]
    pairs += [(0, 0)] * (128 - len(pairs) % 128)
    high, low = (torch.tensor(x, device=device) for x in zip(*pairs, strict=True))
    out = torch.full(high.shape, float("nan"), device=device)
    for i in range(0, len(pairs), 128):
        _words_kernel[(1,)](out[i : i + 128], high[i : i + 128], low[i : i + 128], BLOCK=128)

    def exact(h, low):
        bits = h << 32 | low
        small = min(bits, (1 << 64) - 1 - bits) + 0.5  # below 2^63, so fp64 rounds it by a relative 2^-53
        small *= 2.0**-64
        return -math.log(-math.log1p(-small) if bits >= 1 << 63 else -math.log(small))

    truth = torch.tensor([exact(*pair) for pair in pairs], device=device, dtype=torch.float64)
    assert_close(out, truth)
    assert truth.max() > 45.05 and out.max() > 45.05  # far beyond 16.6, the end of 24-bit uniforms
    assert truth.min() < -3.8 and (truth > 16.7).sum() > 10


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS.keys())
def test_matches_definition(device, key, poison):
    row, position = indices(2, device)
    columns = torch.cat((torch.arange(1030), torch.tensor([126463, 126462, 5, 5, (1 << 31) + 7]))).to(device)
    noise = gumbel(*key, row, position, columns)
    assert_close(noise, reference.gumbel(*key, row, position, columns))
    assert torch.equal(uniform(*key, row, position), reference.uniform(*key, row, position).float())


def test_tile_is_the_launchers_noise(device):
    row, position = indices(8, device)
    for first in (0, 64, 126464 - 64):
        out = torch.full((8, 32), float("nan"), device=device)
        seed, step = torch.arange(8, device=device) % 3 << 33, torch.tensor([2], device=device)
        _tile_kernel[(1,)](out, seed, step, row, position, first, BV=32, BN=8)
        assert torch.equal(out, gumbel(seed, 2, row, position, torch.arange(first, first + 32, device=device)))


def test_distribution(device):
    row, position = indices(24, device)
    noise = gumbel(17, 1, row, position, torch.arange(4096, device=device)).double().flatten().sort().values
    n = noise.numel()  # 98,304
    cdf = torch.exp(-torch.exp(-noise))
    rank = torch.arange(n, device=device, dtype=torch.float64)
    distance = torch.maximum(cdf - rank / n, (rank + 1) / n - cdf).max()
    assert distance * n**0.5 < 1.63  # Kolmogorov, 1 %
    assert abs(noise.mean() - 0.5772156649) < 3 * (math.pi**2 / 6 / n) ** 0.5
    assert abs(noise.var() / (math.pi**2 / 6) - 1) < 3 * (4.4 / n) ** 0.5  # kurtosis 5.4
    # E exp(G / 3) = Gamma(2/3) weights the upper tail as a sampler does, and changes with the temperature.
    heavy = torch.exp(noise / 3)
    assert abs(heavy.mean() - math.gamma(2 / 3)) < 3 * heavy.std() / n**0.5


def test_neighbours_are_uncorrelated(device):
    row, position = indices(4, device)
    noise = gumbel(3, 1, row, position, torch.arange(2048, device=device)).double()
    noise = (noise - noise.mean()) / noise.std()
    along = (noise[:, 1:] * noise[:, :-1]).mean().abs()
    across = (noise[1:] * noise[:-1]).mean().abs()
    assert along < 3 / (4 * 2047) ** 0.5 and across < 3 / (3 * 2048) ** 0.5


def test_device_scalars_and_int32(device):
    row, position = indices(3, device)
    columns = torch.arange(6, device=device)
    seed, step = torch.tensor([9], device=device), torch.tensor(4, device=device)
    expected = gumbel(9, 4, row, position, columns)
    assert torch.equal(gumbel(seed, step, row.int(), position.int(), columns.int()), expected)
    assert torch.equal(uniform(seed, step, row, position), uniform(9, 4, row, position))
    step += 1  # as between replays of a captured graph
    assert not torch.equal(gumbel(seed, step, row, position, columns), expected)


def test_empty(device):
    none = torch.zeros(0, dtype=torch.int64, device=device)
    some = torch.arange(3, device=device)
    assert gumbel(0, 0, none, none, some).shape == (0, 3)
    assert gumbel(0, 0, some, some, none).shape == (3, 0)
    assert uniform(0, 0, none, none).shape == (0,)


def test_bad_arguments(device):
    row = torch.arange(3, device=device)
    for message, arguments in {
        "seed=": (1 << 64, 0, row, row, row),
        "step is torch.int32": (0, torch.zeros(1, dtype=torch.int32, device=device), row, row, row),
        r"seed is torch.int64 \[2\] .*one int64, or one for each of 3 rows": (row[:2], 0, row, row, row),
        "row is torch.float32": (0, 0, row.float(), row, row),
        r"position is torch.int64 \[2\]": (0, 0, row, row[:2], row),
        "columns is": (0, 0, row, row, torch.arange(6, device=device)[::2]),
    }.items():
        with pytest.raises(ValueError, match=message):
            gumbel(*arguments)
    with pytest.raises(ValueError, match="position"):
        uniform(0, 0, row, row.float())


def test_custom_ops(device):
    row, position = indices(3, device)
    seed, step, columns = (torch.tensor(x, device=device) for x in ([1, 2, 3], [2], [3, 8, 5]))
    each = step.expand(3).contiguous()
    torch.library.opcheck(kernel._gumbel, (seed, each, row, position, columns))
    torch.library.opcheck(kernel._uniform, (seed, each, row, position))
    compiled = torch.compile(gumbel, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(1, step, row, position, columns), gumbel(1, step, row, position, columns))
