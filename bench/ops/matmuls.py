"""Compares the compiled extension's matmul with PyTorch's, for many numbers of rows: ``python -m bench.ops.matmuls``.

Each line has a shape of W, a dtype, the number of rows of x, both rates in GFLOP/s (the best of interleaved runs),
which of the two a patched model uses there (`cpu.matmuls`), and its rate as a share of the faster one's. To measure a
lower instruction set, set DLLM_FAST_LEVEL and the variables of oneDNN, ATen and MKL, as tests/all.py does.
"""

import argparse
import time

import torch
import torch.nn.functional as F

from dllm_fast.cpu import compiled, matmuls
from dllm_fast.kernels.checks import dtype_name

SHAPES = ((768, 768), (2048, 768), (768, 2048), (4096, 768))  # outputs, inputs
HEAD = (126464, 768)  # with few rows only: candidates' logits
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def seconds(runs, budget: float) -> list[float]:
    """The least seconds of each, in turns: at least three turns, and more while the budget lasts."""
    for run in runs:
        run()
    best, end, turns = [float("inf")] * len(runs), time.perf_counter() + budget, 0
    while turns < 3 or time.perf_counter() < end:
        for i, run in enumerate(runs):
            began = time.perf_counter()
            run()
            best[i] = min(best[i], time.perf_counter() - began)
        turns += 1
    return best


@torch.inference_mode()
def line(shape: tuple[int, int], rows: int, dtype: torch.dtype, budget: float) -> str:
    """Measure both, after checking that they give the same result."""
    weight, x = torch.randn(shape).to(dtype), torch.randn(rows, shape[1]).to(dtype)
    runs = [lambda: compiled.linear(x, weight), lambda: F.linear(x, weight)]
    ours, theirs = (run().float() for run in runs)
    limit = 16 * torch.finfo(dtype).eps * theirs.abs().max().item()
    if (error := (ours - theirs).abs().max().item()) > limit:
        raise ValueError(f"{shape}, {rows} rows, {dtype}: the results differ by {error:.3g}")
    taken = seconds(runs, budget)
    chosen = int(rows >= matmuls.pytorch_from[dtype])
    rates = [2 * rows * shape[0] * shape[1] / s / 1e9 for s in taken]
    name = dtype_name(dtype)
    return (
        f"{shape[0]:6} x {shape[1]:<5} {name:9} {rows:5} {rates[0]:9.1f} {rates[1]:9.1f}  "
        f"{('ours', 'PyTorch')[chosen]:8} {min(taken) / taken[chosen]:5.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    parser.add_argument("--budget", type=float, default=0.1, help="seconds per line")
    options = parser.parse_args()
    table = matmuls.table()
    print(f"level {compiled.levels()[-1]}, {torch.get_num_threads()} threads, torch {torch.__version__}: {table}")
    print(f"{'W':14} {'dtype':9} {'rows':>5} {'ours':>9} {'PyTorch':>9}  {'chosen':8} of the faster")
    for dtype in compiled.FLOATS:
        for shape in (*SHAPES, HEAD):
            for rows in options.rows:
                if shape != HEAD or rows <= 4:
                    print(line(shape, rows, dtype, options.budget), flush=True)


if __name__ == "__main__":
    main()
