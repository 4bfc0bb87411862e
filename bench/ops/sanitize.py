"""Runs compute-sanitizer's memcheck and racecheck on a small case of every kernel: ``python -m bench.ops.sanitize``.

If the tool is missing or fails on this device, prints why and passes: the kernels are not at fault.
``--cases`` runs the cases without the tool; without a GPU, in Triton's interpreter.
"""

import os
import shutil
import subprocess
import sys

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from bench.ops.cases import loss, small
from bench.ops.cases.case import TINY, dtype_of
from dllm_fast.kernels.attention import attention
from dllm_fast.kernels.checks import CONFIDENCES
from dllm_fast.kernels.gumbel import uniform
from dllm_fast.kernels.predict import predict

TOOLS = ("memcheck", "racecheck")
LIMIT = 220  # seconds per tool
FOUND = 9  # the exit status for findings, as given to the tool
PROBE = "import torch; torch.ones(1, device='cuda').sum().item()"
# batch, queries, heads, kv heads, head dim, slots, window: few rows, many, split over slots, ragged
ATTENTION = ((2, 5, 4, 2, 64, 70, None), (1, 130, 2, 2, 128, 259, None), (1, 8, 2, 2, 64, 600, None),
             (2, 40, 2, 2, 40, 80, 5), (1, 70, 2, 2, 64, 200, 64))  # fmt: skip


def run_cases(device: str) -> None:
    """Run every kernel, with sizes that no tile size divides."""
    generator = torch.Generator(device).manual_seed(0)
    options = {"generator": generator, "device": device, "dtype": dtype_of(device)}
    for batch, queries, heads, kv_heads, dim, slots, window in ATTENTION:
        q = torch.randn(batch, queries, heads, dim, **options)
        keys, values = torch.randn(2, batch, slots, kv_heads, dim, **options)
        rows = (torch.full((batch,), n, device=device) for n in (1, slots - 1, slots - queries))
        attention(q, keys, values, *rows, window)
    weight, bias = torch.randn(300, 72, **options), torch.randn(300, **options)
    for path in ("fused", "streamed"):
        for rows in (3, 70):
            hidden, uncond = torch.randn(2, rows, 72, **options)
            at = torch.arange(rows, device=device)
            for confidence in CONFIDENCES if rows == 3 else CONFIDENCES[:1]:
                predict(
                    hidden, weight, bias, mask_id=1, banned=(5, 6), deferred=(9,), confidence=confidence,
                    temperature=0.5, seed=1, row=at, position=at, candidate=at % 3 != 1, uncond=uncond, cfg_scale=1.0,
                    _path=path,
                )  # fmt: skip
            predict(hidden, weight, mask_id=1, _path=path)
    makers = (small.norm_cases, small.rope_cases, small.glu_cases, small.commit_cases, small.gumbel_cases, loss.cases)
    for case in (case for cases in makers for case in cases(device, True)):
        case.run["ours"](*case.inputs(generator))
    at = torch.arange(1030, device=device)
    uniform(3, 1, at, at)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"ran the cases of {len(TINY)} models")


def sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


def under(tool: str, *command: str) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }  # or an overrun would hit the caching allocator's memory
    line = [sanitizer(), "--tool", tool, "--error-exitcode", str(FOUND), sys.executable, *command]
    return subprocess.run(
        line, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=LIMIT
    )


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def main() -> int:
    if "--cases" in sys.argv:
        run_cases("cuda" if torch.cuda.is_available() else "cpu")
        return 0
    if not torch.cuda.is_available() or sanitizer() is None:
        print("skipped:", "no CUDA device" if sanitizer() else "compute-sanitizer is not installed")
        return 0
    failed = 0
    for tool in TOOLS:
        try:
            probe = under(tool, "-c", PROBE)
            if probe.returncode:
                print(f"{tool}: skipped: here it fails even on a sum of one number: {last_line(probe.stdout)}")
                continue
            done = under(tool, "-m", "bench.ops.sanitize", "--cases")
        except subprocess.TimeoutExpired:
            print(f"{tool}: stopped after {LIMIT} s", flush=True)
            failed = 1
            continue
        print(f"{tool}: exit {done.returncode}\n{done.stdout}", flush=True)
        failed |= done.returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
