"""All GPU checks and benches, in pieces: ``make gpu``, or ``python -m bench.gpu [--minutes 9] [piece ...]``.

Runs each piece under its time limit, with the Python that has torch and CUDA, from the uninstalled checkout. Writes
each one's whole output, as it is printed, to ``bench/results/<device>/<piece>.txt`` (or under ``--out``). A piece that
has already run on this commit is skipped unless it is named, so a round can run in slices: ``--minutes`` starts only
pieces whose limits fit into the minutes left.
"""

import argparse
import datetime
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from bench import checkout
from bench.checkout import ROOT

RESULTS = ROOT / "bench" / "results"

PYTEST = "-m pytest -q -p no:cacheprovider"
PARALLEL = f"{PYTEST} -n 8" if importlib.util.find_spec("xdist") else PYTEST
# Clones of other people's generators in peers/, named as in bench/peers.py, run beside ours.
PEERS = "".join(f" --peer {path.name}={path}" for path in sorted((ROOT / "peers").glob("*")) if path.is_dir())
NFE = "-m bench.generation.nfe --model llada-8b"
ENGINE = "-m bench.generation.engine --shape llada-8b --force"
# 32 GB of weights. Exits with 1 unless a short job's tokens equal each peer's.
FP32 = f"-m bench.generation.engine --shape llada-8b-short --dtype float32 --rounds 1 --force{PEERS}"
THROUGHPUT = "-m bench.generation.throughput --model llada-8b --dtype bfloat16 --rounds 1 --force"
DRAFTS = f"{THROUGHPUT} --lengths 768+128 --ways all drafts-1 drafts-3 drafts-7 drafts-auto"
INT4 = "'ours dual, int4' 'ours dual, window=32,0' 'ours dual, window=32,0, int4'"
LAYERS = ("attention", "rope", "norm", "glu", "linear", "linear_rope", "linear_int4", "round_rows")
PREDICT = ("predict", "predict_e4m3", "batch_invariance")
BENCH = f"{PYTEST} --import-mode=importlib bench/ops/kernels.py -k"


def tests(*names: str) -> str:
    return " ".join([PARALLEL, *(f"tests/kernels/test_{name}.py" for name in names)])


# A piece per line: its limit in seconds and its command. The most important come first.
PIECES = {
    "correctness-attention": (480, tests(*LAYERS)),
    "correctness-predict": (480, tests(*PREDICT, "gumbel", "commit", "masked_loss", "end_to_end")),
    "steps": (150, "-m bench.generation.steps"),
    "steps-fp8": (150, "-m bench.generation.steps --weights fp8"),
    "steps-int4": (150, "-m bench.generation.steps --weights int4"),
    "steps-head": (150, "-m bench.generation.steps --weights fp8 --head fp8 --quick"),
    "floors": (60, "-m bench.floors"),
    "engine": (480, f"{ENGINE} --refresh window=32,0 --weights fp8{PEERS}"),
    "throughput": (300, f"{THROUGHPUT} --batch 1 8{PEERS}"),
    "throughput-32": (200, f"{THROUGHPUT} --batch 32 --ways all both"),
    "throughput-32-fp8": (200, f"{THROUGHPUT} --batch 32 --weights fp8 --ways all both 'all three'"),
    "throughput-most": (480, f"{THROUGHPUT} --lengths 768+128 --batch auto --ways all both"),
    "speculate": (150, f"{DRAFTS} --batch 1"),
    "speculate-fp8": (150, f"{DRAFTS} --batch 1 --weights fp8"),
    "speculate-batches": (420, f"{DRAFTS} --batch 2 4 8"),
    "gsm8k": (
        360,
        "-m bench.generation.gsm8k --batch 64 --refresh window=32,0 --skip-committed --suffix-length 32 --weights fp8",
    ),
    "engine-int4": (240, f"{ENGINE} --refresh window=32,0 --weights int4 --only {INT4}"),
    "fp32": (300, FP32),
    "cold": (120, "-m bench.generation.cold --shape llada-8b"),
    "attention-llada": (300, f"{BENCH} 'attention and llada'"),
    "backend": (200, "-m bench.generation.backend --batch 16"),
    "own": (300, "-m bench.generation.own --size large --rounds 3 --caches dual"),
    "modernbert-base": (300, "-m bench.generation.modernbert"),
    "modernbert-large": (400, "-m bench.generation.modernbert --size large"),
    "predict": (300, f"{BENCH} predict"),
    "crossover": (240, "-m bench.ops.tune crossover"),
    "whole-attention": (120, "-m bench.ops.tune whole-attention"),
    "small": (420, f"{BENCH} 'norm or rope or glu'"),
    "loop-drafts": (480, f"{PARALLEL} tests/test_speculate.py tests/test_pace.py tests/test_warmup.py"),
    "loop": (480, f"{PARALLEL} tests/test_generate.py tests/test_patch.py tests/test_loop_kernels.py"),
    "loop-options": (480, f"{PARALLEL} tests/test_refresh.py tests/test_remask.py tests/test_engine.py"),
    "loop-rounded": (480, f"{PARALLEL} tests/test_rounded.py tests/test_rows.py tests/test_fast_dllm.py"),
    "nfe-8b": (480, f"{NFE} --schedule uniform=88 uniform=32 --batch 1 8 --rounds 2 --force"),
    "attention-base": (480, f"{BENCH} 'attention and base'"),
    "noise": (240, "-m bench.ops.noise"),
    "tune-llada": (420, "-m bench.ops.tune attention-llada"),
    "tune-base": (480, "-m bench.ops.tune attention-base"),
    "tune-predict": (420, "-m bench.ops.tune predict"),
    "tune-small": (400, "-m bench.ops.tune small loss"),
    "engine-batches": (480, f"{ENGINE} --batch 8 32 128 --rounds 2 --only 'ours dual'"),
    "attention-large": (480, f"{BENCH} 'attention and large'"),
    "others": (240, f"{BENCH} 'loss or gumbel or commit'"),
    "compile": (480, tests("resources")),
    "sanitizer": (480, "-m bench.ops.sanitize"),
}


def has_run(path: Path, at: str) -> bool:
    """Whether ``path`` holds a piece's complete output from that commit."""
    if not path.exists():
        return False
    lines = path.read_text(errors="replace").splitlines()
    return len(lines) > 1 and lines[0].endswith(f"commit {at}") and lines[-1].startswith("exit ")


def run(name: str, limit: float, command: list[str], path: Path, head: str) -> int:
    """Run a command with this Python; its output goes to ``path`` and the terminal, line by line."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    # Most of the tests' time is compiling, so the cache is in the tree, to be copied to the next machine of this kind.
    environment.setdefault("TRITON_CACHE_DIR", str(ROOT / "runs" / "triton"))
    start = time.monotonic()
    with path.open("w") as file:

        def say(text: str) -> None:
            file.write(text)
            file.flush()
            sys.stdout.write(text)
            sys.stdout.flush()

        say(f"{head}\n{shlex.join(['python', *command])}\n")
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environment, text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        stopped = threading.Event()

        def stop() -> None:
            stopped.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(limit, stop)
        timer.start()
        try:
            for line in process.stdout:
                say(line)
            code = process.wait()
        finally:
            timer.cancel()
        if stopped.is_set():
            say(f"\nstopped: {name} ran past its {limit:g} s")
        say(f"\nexit {code} after {time.monotonic() - start:.0f} s\n")
    return code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pieces", nargs="*", metavar="piece", help=", ".join(PIECES))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start only pieces that fit")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args()
    if unknown := [name for name in options.pieces if name not in PIECES]:
        parser.error(f"no piece {', '.join(unknown)}; there are {', '.join(PIECES)}")
    end = time.monotonic() + 60 * options.minutes

    import torch
    import transformers
    import triton

    if not torch.cuda.is_available():
        print("no CUDA device: these checks and benches need one", file=sys.stderr)
        return 2
    device, at = torch.cuda.get_device_name().lower().replace(" ", "-"), checkout.commit(12)
    out = options.out / device
    out.mkdir(parents=True, exist_ok=True)
    versions = f"torch {torch.__version__}, triton {triton.__version__}, transformers {transformers.__version__}"
    head = f"{device}, {versions}, {datetime.date.today()}, commit {at}"
    failed, left = [], []
    for name, (limit, command) in PIECES.items():
        if options.pieces and name not in options.pieces:
            continue
        if not options.pieces and any(has_run(folder / f"{name}.txt", at) for folder in (out, RESULTS / device)):
            print(f"{name}: has run")
            continue
        if time.monotonic() + limit > end:
            left.append(name)
            continue
        failed += [name] if run(name, limit, shlex.split(command), out / f"{name}.txt", head) else []
    print(f"failed: {', '.join(failed) or 'none'}; not started: {', '.join(left) or 'none'}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
