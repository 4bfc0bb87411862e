"""How good our Gumbel noise is for sampling: ``python -m bench.ops.noise [--device cuda|cpu]``.

Four kinds of noise are compared with the Gumbel distribution: the kernel's (fp32 from 64 bits), its fp64 definition,
and the two that samplers usually use, ``-log(-log(rand))`` in fp32 and in fp64. Measured are:

- the Kolmogorov-Smirnov distance of ten million draws;
- chi-squared of the argmax of logits plus noise, over 16 tokens, and over 126,464 tokens in groups;
- the tail: draws beyond 16.6, where 24-bit uniforms end, and draws conditional on U > 1 - 2^-20;
- the effective temperature: the T at which ``softmax(z / T)`` gives the drawn tokens the highest likelihood, which
would
  be 1 without error. At this T the model's mean logit equals the drawn tokens', and 1 / T has the standard error
  ``1 / sqrt(n var z)``.

The logits of the large vocabulary follow Zipf and Mandelbrot, in 64 groups of equal logits, like those of a masked
position whose surroundings are masked too. For the temperature, the largest noise of a group of m tokens is drawn at
once, as the sampler's transform of the largest of m uniforms, ``U^(1/m)``. Each transform is monotonic, so this has the
same distribution, and a million draws from the vocabulary become possible. All samplers get the same uniforms, so the
differences between them are more precise than the temperatures. Without a GPU the kernel runs in Triton's interpreter.
Ends with one JSON line.
"""

import argparse
import datetime
import json
import math
import os
from collections.abc import Callable, Iterator

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import triton
import triton.language as tl

from bench import checkout
from dllm_fast.kernels import gumbel as kernel
from dllm_fast.kernels import reference

VOCABULARY, GROUPS, SINGLE = 126_464, 64, 16  # the first ranks are groups of one
END_OF_24_BITS = -math.log(-math.log1p(-(2.0**-24)))  # 16.6355: the largest of -log(-log(u)) with 24 bits
TAIL_BITS = 20  # in the tail, this many leading bits of U are ones
SEED = 20_240_902
TOP = (1 << 32) - 1
SAMPLERS = ("kernel fp32", "definition fp64", "naive fp32", "naive fp64")


@triton.jit
def _words_kernel(out_ptr, high_ptr, low_ptr, N, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    high = tl.load(high_ptr + at, mask=at < N, other=0).to(tl.uint32)
    low = tl.load(low_ptr + at, mask=at < N, other=0).to(tl.uint32)
    tl.store(out_ptr + at, kernel.gumbel_from_words(high, low), mask=at < N)


def block(device: str) -> int:
    return 1024 if device == "cuda" else 1 << 16  # the interpreter's cost is per program


def from_words(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """The kernel's noise, fp32, from 64 random bits in two int64 tensors of 32-bit values."""
    out = torch.empty(high.shape, dtype=torch.float32, device=high.device)
    size = block(high.device.type)
    _words_kernel[(triton.cdiv(high.numel(), size),)](
        out, high.contiguous(), low.contiguous(), high.numel(), BLOCK=size
    )
    return out


def noise(sampler: str, rows: int, columns: int, step: int, generator: torch.Generator) -> torch.Tensor:
    """[rows, columns] numbers; no two steps share any."""
    device = generator.device
    if sampler.startswith("naive"):
        dtype = torch.float32 if sampler.endswith("32") else torch.float64
        return -torch.log(-torch.log(torch.rand(rows, columns, dtype=dtype, generator=generator, device=device)))
    row, column = (torch.arange(n, device=device) for n in (rows, columns))
    function = kernel.gumbel if sampler.startswith("kernel") else reference.gumbel
    return function(SEED, step, row, row, column)


# Draws


def ks_distance(draws: torch.Tensor, cdf: Callable) -> float:
    """The largest distance between the draws' empirical distribution and ``cdf``, in fp64."""
    ordered = draws.double().sort().values
    n = ordered.numel()
    rank = torch.arange(n, dtype=torch.float64, device=draws.device)
    law = cdf(ordered)
    return float(torch.maximum(law - rank / n, (rank + 1) / n - law).max())


def chi_squared(observed: torch.Tensor, expected: torch.Tensor) -> tuple[float, int, float]:
    """(statistic, degrees of freedom, p-value); neighbouring bins are merged until each expects 5."""
    bins, total = [], [0.0, 0.0]
    for pair in zip(observed.tolist(), expected.tolist()):
        total = [a + b for a, b in zip(total, pair)]
        if total[1] >= 5:
            bins.append(total)
            total = [0.0, 0.0]
    bins[-1] = [a + b for a, b in zip(bins[-1], total)]
    statistic, freedom = sum((seen - due) ** 2 / due for seen, due in bins), len(bins) - 1
    halves = (torch.tensor(x / 2, dtype=torch.float64) for x in (freedom, statistic))
    return statistic, freedom, float(torch.special.gammaincc(*halves))


def draws(sampler: str, count: int, generator: torch.Generator) -> dict:
    """KS distance of many draws, chi-squared as a sampler of 16 tokens, and the largest draw."""
    rows = 10
    numbers = noise(sampler, rows, count // rows, 0, generator)
    logits = torch.linspace(3.0, -3.0, 16, dtype=torch.float64, device=generator.device)
    token = (logits + numbers.view(-1, 16)).argmax(1)
    statistic, freedom, p = chi_squared(torch.bincount(token, minlength=16), torch.softmax(logits, 0) * token.numel())
    flat = numbers.flatten()
    return {
        "ks": ks_distance(flat, lambda x: torch.exp(-torch.exp(-x))),
        "chi2": statistic, "freedom": freedom, "p": p, "tokens": token.numel(),
        "beyond": {str(x): int((flat > x).sum()) for x in (12.0, 14.0, END_OF_24_BITS)},
        "largest": float(flat.max()),
    }  # fmt: skip


def beyond(x: float) -> float:
    """The probability of more than x."""
    return -math.expm1(-math.exp(-x))


# The tail


def tail(count: int, generator: torch.Generator) -> dict[str, dict]:
    """Draws with U uniform on [1 - 2^-20, 1), where its leading bits are ones, against that distribution."""
    device = generator.device
    high, low = (torch.randint(0, 1 << 32, (count,), generator=generator, device=device) for _ in range(2))
    high |= ((1 << TAIL_BITS) - 1) << (32 - TAIL_BITS)
    left = ((TOP - high).double() + (TOP - low + 0.5).double() * 2.0**-32) * 2.0**-32  # 1 - U
    unit = 2.0**-TAIL_BITS

    def law(x):
        return 1 + torch.expm1(-torch.exp(-x)) / unit

    def cut(bits: int, dtype: torch.dtype) -> torch.Tensor:
        return -torch.log(-torch.log((1 - torch.ceil(left * 2.0**bits) * 2.0**-bits).to(dtype)))

    found = {
        "kernel fp32": from_words(high, low),
        "definition fp64": -torch.log(-torch.log1p(-left)),
        "naive fp32": cut(24, torch.float32),
        "naive fp64": cut(53, torch.float64),
    }
    return {
        name: {"ks": ks_distance(x, law), "values": int(x.unique().numel()), "largest": float(x.max())}
        for name, x in found.items()
    }


def constructed(device: str) -> list[dict]:
    """The kernel at U = 1 - (1 + 1/2) 2^-k and at the last number below 1, with errors in units of 2^-24 |G|."""
    gaps = [*(1 << (64 - k) for k in (8, 16, 24, 25, 32, 40, 48, 56, 63)), 0]  # 2^64 - 1 - X
    words = [torch.tensor([TOP - (gap >> shift & TOP) for gap in gaps], device=device) for shift in (32, 0)]
    rows = []
    for gap, got in zip(gaps, from_words(*words).tolist()):
        exact = -math.log(-math.log1p(-(gap + 0.5) * 2.0**-64))
        rows.append({"1-U": (gap + 0.5) * 2.0**-64, "exact": exact, "kernel": got,
                     "ulps": abs(got - exact) / (2.0**-24 * max(1, abs(exact)))})  # fmt: skip
    return rows


# Sampling from a vocabulary


def zipf() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [K] fp64 and sizes [K] fp64 of the groups: rank r has p proportional to 1 / (r + 2.7)."""
    edges = torch.logspace(math.log10(SINGLE), math.log10(VOCABULARY), GROUPS - SINGLE + 1, dtype=torch.float64)
    edges = torch.cat((torch.arange(SINGLE, dtype=torch.float64), edges.round()))
    many = edges.diff()
    middle = (edges[:-1] + edges[1:] + 1) / 2
    return -torch.log(middle + 2.7), many


def softmax(logits: torch.Tensor, many: torch.Tensor, inverse: float = 1.0) -> torch.Tensor:
    return torch.softmax(inverse * logits + torch.log(many), 0)


def temperature(logits: torch.Tensor, many: torch.Tensor, counts: torch.Tensor) -> tuple[float, float]:
    """The T with the highest likelihood for the groups drawn, and its standard error."""
    n = counts.sum()
    mean = (counts * logits).sum() / n
    low, high = 0.5, 2.0  # of 1 / T; the mean logit grows with it
    for _ in range(60):
        inverse = (low + high) / 2
        below = (softmax(logits, many, inverse) * logits).sum() < mean
        low, high = (inverse, high) if below else (low, inverse)
    p = softmax(logits, many, inverse)
    variance = (p * logits**2).sum() - (p * logits).sum() ** 2
    return 1 / inverse, float(1 / (n * variance) ** 0.5) / inverse**2


def whole_vocabulary(sampler: str, count: int, generator: torch.Generator) -> torch.Tensor:
    """How often each group is drawn, [K], by the argmax of logits plus noise over the whole vocabulary."""
    device, (logits, many) = generator.device, zipf()
    group = torch.repeat_interleave(torch.arange(GROUPS), many.long()).to(device)  # [V]
    every = logits.to(device)[group]
    counts = torch.zeros(GROUPS, dtype=torch.int64, device=device)
    rows = 8 if device.type == "cpu" else 256
    for step in range(-(-count // rows)):
        token = (every + noise(sampler, rows, VOCABULARY, step + 1, generator)).argmax(1)
        counts += torch.bincount(group[token], minlength=GROUPS)
    return counts.double().cpu()


def largest_of_groups(many: torch.Tensor, rows: int, generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    """The four samplers' noise [rows, K], all from the same uniforms: the largest of ``many`` [K]."""
    e = torch.empty(rows, GROUPS, dtype=torch.float64, device=generator.device).exponential_(generator=generator) / many
    yield "definition fp64", -torch.log(e)
    u, left = torch.exp(-e), -torch.expm1(-e)  # U^(1/m) and 1 - U^(1/m), each with full relative precision
    upper = left < 0.5
    near = torch.where(upper, left, u)
    high = torch.floor(near * 2.0**32)
    low = torch.floor((near * 2.0**32 - high) * 2.0**32)
    words = (torch.where(upper, TOP - x.long(), x.long()) for x in (high, low))
    yield "kernel fp32", from_words(*words).double()
    for name, bits, dtype in (("naive fp32", 24, torch.float32), ("naive fp64", 53, torch.float64)):
        cut = torch.where(upper, 1 - torch.ceil(left * 2.0**bits) * 2.0**-bits, torch.floor(u * 2.0**bits) * 2.0**-bits)
        yield name, -torch.log(-torch.log(cut.to(dtype))).double()


def grouped(count: int, generator: torch.Generator) -> dict[str, dict]:
    """Counts of the groups drawn, and how far their mean logit is from the exact sampler's."""
    logits, many = (x.to(generator.device) for x in zipf())
    rows = 1 << 14 if generator.device.type == "cpu" else 1 << 20
    found: dict[str, dict] = {}
    for _ in range(-(-count // rows)):
        exact = None
        for name, numbers in largest_of_groups(many, rows, generator):
            drawn = (logits + numbers).argmax(1)
            exact = drawn if exact is None else exact
            shift = logits[drawn] - logits[exact]
            mine = found.setdefault(name, {"counts": 0, "shift": 0.0, "square": 0.0, "other": 0})
            mine["counts"] = mine["counts"] + torch.bincount(drawn, minlength=GROUPS).double().cpu()
            mine["shift"] += float(shift.sum())
            mine["square"] += float(shift.square().sum())
            mine["other"] += int((drawn != exact).sum())
    return found


# The report


def head(device: str) -> str:
    where = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} CPU cores, Triton's interpreter"
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    return f"{where}, {datetime.date.today()}, {versions}, commit {checkout.commit()}"


def report_draws(count: int, generator: torch.Generator) -> dict:
    found = {name: draws(name, count, generator) for name in SAMPLERS}
    print(f"\n{count:,} draws against exp(-exp(-x)), kernel and definition from the same bits;")
    print(f"Kolmogorov's 1 % value of the distance is {1.628 / count**0.5:.2e}")
    columns = [f"> {float(x):.4g}" for x in found[SAMPLERS[0]]["beyond"]]
    print(f"{'':<16} {'KS distance':>12} " + " ".join(f"{x:>9}" for x in columns) + f" {'largest':>9}")
    for name, x in found.items():
        counts = " ".join(f"{n:>9}" for n in x["beyond"].values())
        print(f"{name:<16} {x['ks']:>12.2e} {counts} {x['largest']:>9.4f}")
    due = " ".join(f"{beyond(float(x)) * count:>9.3g}" for x in found[SAMPLERS[0]]["beyond"])
    print(f"{'expected':<16} {'':>12} {due}")
    tokens = found[SAMPLERS[0]]["tokens"]
    print(f"\nchi-squared of {tokens:,} tokens of 16, logits from 3 to -3")
    for name, x in found.items():
        print(f"{name:<16} {x['chi2']:>8.2f} of {x['freedom']} degrees of freedom, p = {x['p']:.3f}")
    return found


def report_tail(count: int, generator: torch.Generator) -> dict:
    found = tail(count, generator)
    print(f"\nthe tail: {count:,} draws given U > 1 - 2^-{TAIL_BITS}, that is beyond {TAIL_BITS * math.log(2):.2f};")
    print(f"1 % value of the distance {1.628 / count**0.5:.2e}; 24-bit uniforms end at {END_OF_24_BITS:.4f}")
    for name, x in found.items():
        print(f"{name:<16} KS {x['ks']:.2e}, {x['values']:>9,} different numbers, largest {x['largest']:.4f}")
    points = constructed(generator.device.type)
    print("\nthe kernel at chosen bits: 1 - U, exact value, kernel's, error in units of 2^-24 of it")
    for x in points:
        print(f"  {x['1-U']:.6e}  {x['exact']:>10.6f}  {x['kernel']:>10.6f}  {x['ulps']:.2f}")
    return {"draws": found, "points": points}


def report_vocabulary(rows: int, count: int, generator: torch.Generator) -> dict:
    logits, many = zipf()
    expected = softmax(logits, many)
    rarest = expected[-1] / many[-1]
    print(f"\n{VOCABULARY:,} tokens, Zipf-Mandelbrot in {GROUPS} groups: the rarest has p = {rarest:.2e}")
    print(f"{rows:,} tokens drawn by the argmax over the whole vocabulary: chi-squared over groups, and T")
    found: dict = {"whole": {}, "grouped": {}}
    for name in SAMPLERS:
        counts = whole_vocabulary(name, rows, generator)
        statistic, freedom, p = chi_squared(counts, expected * counts.sum())
        t, error = temperature(logits, many, counts)
        found["whole"][name] = {"chi2": statistic, "freedom": freedom, "p": p, "T": t, "error": error}
        print(f"{name:<16} {statistic:>8.2f} of {freedom}, p = {p:.3f}; T = {t:.4f} +- {error:.4f}", flush=True)
    drawn = grouped(count, generator)
    total = float(drawn["kernel fp32"]["counts"].sum())
    variance = (expected * logits**2).sum() - (expected * logits).sum() ** 2
    rare = expected / many < 1e-6
    print(
        f"\n{total:,.0f} tokens drawn by the largest of each group, from the same uniforms: T; its difference from the"
    )
    print("definition's; tokens that differ from the definition's; chi-squared; share of the tokens below p = 1e-6")
    for name in SAMPLERS:
        x = drawn[name]
        t, error = temperature(logits, many, x["counts"])
        mean = x["shift"] / total
        difference = 0.0 - mean / float(variance)  # of T, as d(1/T) = d(mean z) / var z
        unsure = (max(x["square"] / total - mean**2, 0.0) / total) ** 0.5 / float(variance)
        statistic, freedom, p = chi_squared(x["counts"], expected * total)
        share = float(x["counts"][rare].sum() / (expected[rare].sum() * total))
        found["grouped"][name] = {
            "T": t, "error": error, "difference": difference, "difference_error": unsure, "other_tokens": x["other"],
            "chi2": statistic, "freedom": freedom, "p": p, "rare_share": share,
        }  # fmt: skip
        print(f"{name:<16} T = {t:.5f} +- {error:.5f}; {difference:+.2e} +- {unsure:.1e}; {x['other']:>6} differ; "
              f"{statistic:.1f} of {freedom}, p = {p:.3f}; rare {share:.4f} of their due")  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="few draws, for a dry run")
    options = parser.parse_args()
    generator = torch.Generator(options.device).manual_seed(SEED)
    many, tails, rows, groups = (10_000_000, 1_000_000, 304, 1_000_000)
    if options.device == "cuda":
        rows, groups = 100_000, 20_000_000
    if options.quick:
        many, tails, rows, groups = 16_000, 1_000, 8, 1_000
    if options.device == "cpu":
        kernel.BLOCK = block("cpu")
    print(head(options.device))
    found = {
        "draws": report_draws(many, generator),
        "tail": report_tail(tails, generator),
        "vocabulary": report_vocabulary(rows, groups, generator),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
