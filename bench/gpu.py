"""The whole GPU round: ``python bench/gpu.py [piece ...]``, or ``make gpu``.

Runs each piece with the Python that has torch and CUDA, the checkout uninstalled, each under its time limit, and writes
what it printed, whole, to ``bench/results/<device>/<piece>.txt`` (or under $OUT where that is set). Pieces that have
run are run again only when they are named.
"""

import datetime
import os
import subprocess
import sys
from pathlib import Path

import torch
import transformers
import triton

ROOT = Path(__file__).parent.parent
# The most telling first: are the kernels right there?
PIECES = {
    "correctness": (500, ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels"]),
    "loop": (300, ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_generate.py", "tests/test_patch.py"]),
}


def main() -> int:
    if not torch.cuda.is_available():
        print("no CUDA device: this is the GPU round", file=sys.stderr)
        return 2
    device = torch.cuda.get_device_name().lower().replace(" ", "-")
    out = Path(os.environ.get("OUT", ROOT / "bench" / "results")) / device
    out.mkdir(parents=True, exist_ok=True)
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    versions = f"torch {torch.__version__}, triton {triton.__version__}, transformers {transformers.__version__}"
    failed = []
    for name in sys.argv[1:] or [name for name in PIECES if not (out / f"{name}.txt").exists()]:
        limit, command = PIECES[name]
        head = f"{device}, {versions}, {datetime.date.today()}, commit {commit}\n{' '.join(['python', *command])}\n"
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        try:
            done = subprocess.run(
                [sys.executable, *command], cwd=ROOT, env=environment, text=True, timeout=limit,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            text, code = done.stdout, done.returncode
        except subprocess.TimeoutExpired as error:
            text, code = (error.stdout or b"").decode() + f"\nstopped after {limit} s\n", 124
        (out / f"{name}.txt").write_text(head + text)
        print(head + text[-2000:])
        failed += [name] if code else []
    print(f"failed: {', '.join(failed)}" if failed else "all pieces passed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
