"""Measures the machine's peak rates: ``python -m bench.floors [--device cuda|cpu]``.

Copy bandwidth is bytes read plus bytes written, on a buffer larger than any cache. The matrix rate is that of a square
matmul on random data (zeros would run faster). Each is the median of several runs, with the 10th and 90th percentile.
Ends with one JSON line.
"""

import argparse
import dataclasses
import json
import time

import torch

from dllm_fast.cpu import compiled

COPIES, PRODUCTS = 20, 10


@dataclasses.dataclass(frozen=True)
class Rate:
    median: float  # bytes or operations per second
    low: float  # 10th percentile
    high: float  # 90th


@dataclasses.dataclass(frozen=True)
class Floors:
    device: str
    cache_bytes: int  # the last-level cache; 0 if unknown
    copy: Rate
    bf16: Rate
    fp32: Rate

    @property
    def copy_bandwidth(self) -> float:
        """Bytes per second, read plus written."""
        return self.copy.median

    @property
    def matrix_rate(self) -> float:
        """bf16 FLOPs per second; a multiplication and an addition count as two."""
        return self.bf16.median


def cache_bytes(device: str) -> int:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    try:
        with open("/sys/devices/system/cpu/cpu0/cache/index3/size") as file:
            return int(file.read().strip().removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 0


def seconds(function, device: str, repeats: int) -> list[float]:
    """Times of ``repeats`` calls, after two calls as a warm-up."""
    function(), function()
    times = []
    if torch.device(device).type == "cuda":
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
    else:
        for _ in range(repeats):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
    return times


def percentile(values: list[float], fraction: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(fraction))


def _rate(amount: float, times: list[float]) -> Rate:
    return Rate(*(amount / percentile(times, at) for at in (0.5, 0.9, 0.1)))


def copy_rate(device: str, size: int) -> Rate:
    """Bytes per second when copying ``size`` bytes."""
    source = torch.randint(0, 127, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return _rate(2 * size, seconds(lambda: target.copy_(source), device, COPIES))


def onednn(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x W^T`` by oneDNN, whatever PyTorch would choose."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def has_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN has matmuls in ``dtype`` on this processor: bf16 needs AVX-512."""
    if not torch.backends.mkldnn.is_available():
        return False
    some = torch.ones(1, 1, dtype=dtype)
    try:
        onednn(some, some)
    except RuntimeError:  # "could not create a primitive descriptor"
        return False
    return True


def product_rate(device: str, n: int, dtype: torch.dtype) -> Rate:
    """FLOPs per second of an n x n x n matmul on random data, by the fastest implementation.

    A CPU has up to three, and which is fastest depends on the processor: PyTorch's own (MKL's in fp32), oneDNN's (which
    some processors lack in bf16) and the compiled extension's.
    """
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    ways = [lambda: torch.nn.functional.linear(a, b)]
    if torch.device(device).type == "cpu":
        ways += [lambda: onednn(a, b)] if has_onednn(dtype) else []
        ways += [] if compiled.missing() else [lambda: compiled.linear(a, b)]
    rates = [_rate(2 * n**3, seconds(way, device, PRODUCTS)) for way in ways]
    return max(rates, key=lambda rate: rate.median)


def launch_seconds(device: str, launches: int = 200) -> float:
    """Seconds that an empty kernel in a CUDA graph takes, waiting for the kernel before it."""
    x = torch.zeros(1, device=device)
    x.add_(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            x.add_(1)
    return percentile(seconds(graph.replay, device, COPIES), 0.5) / launches


def measure(device: str, quick: bool = False) -> Floors:
    """Measure the rates. ``quick`` is for dry runs: its rates mean nothing."""
    cache = cache_bytes(device)
    if quick:
        name, size, sides = "quick", 1 << 20, (64, 64)
    elif torch.device(device).type == "cuda":
        name, size, sides = torch.cuda.get_device_name(device), max(1 << 30, 8 * cache), (8192, 4096)
    else:
        # Two buffers of four times the cache; matmuls of about a tenth of a second.
        name, size = f"{torch.get_num_threads()} threads", max(1 << 28, 4 * cache)
        sides = []
        for dtype in (torch.bfloat16, torch.float32):
            trial = product_rate(device, 512, dtype).median
            sides.append(max(256, int((0.1 * trial / 2) ** (1 / 3)) // 64 * 64))
    rates = (product_rate(device, n, dtype) for n, dtype in zip(sides, (torch.bfloat16, torch.float32)))
    return Floors(name, cache, copy_rate(device, size), *rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for a dry run")
    options = parser.parse_args()
    floors = measure(options.device, options.quick)
    print(f"{floors.device}: last cache {floors.cache_bytes / 2**20:.0f} MiB; median (10th to 90th percentile)")
    for name, rate, unit in (("copy", floors.copy, "GB/s"), ("bf16", floors.bf16, "TFLOP/s"),
                             ("fp32", floors.fp32, "TFLOP/s")):  # fmt: skip
        scale = 1e9 if unit == "GB/s" else 1e12
        print(f"{name}: {rate.median / scale:.4g} {unit} ({rate.low / scale:.4g} to {rate.high / scale:.4g})")
    print(json.dumps(dataclasses.asdict(floors)))


if __name__ == "__main__":
    main()
