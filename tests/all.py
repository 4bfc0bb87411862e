"""Pieces of the tests: `make test` runs its own, `make test-all` all others, or those that ARGS names.

    python tests/all.py levels                          # the CPU's tests at each lower instruction set
    make test-all ARGS="level-avx2 seed-1"              # some pieces; --list names them

A piece is one command in one environment. Its output goes to runs/test-all, what came out to the table
bench/results/<machine>/test-all.txt, a line a piece, with date and commit: a piece that was run at this commit is not
run again unless it is named.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "test-all"
# What holds oneDNN, ATen and MKL down to a level of the extension.
HELD = {
    "avx512bf16": {},
    "avx512": {
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "ATEN_CPU_CAPABILITY": "avx512",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "plain": {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
}
SUITE = ("-m", "pytest", "-q", "-n", "2", "--dist", "loadfile")
CPU_TESTS = ("-m", "pytest", "-q", "-n", "2", "tests/test_compiled.py", "tests/test_compiled_predict.py",
             "tests/test_compiled_elementwise.py")  # fmt: skip
# As if it were not installed: imports fail, and a search finds nothing.
WITHOUT_TRITON = "import sys\nsys.modules['triton'] = None\n"


@dataclass
class Piece:
    """A command of this Python, its environment, and the minutes that two cores should take at most."""

    name: str
    command: tuple[str, ...]
    minutes: int
    environment: dict[str, str] = field(default_factory=dict)
    obstacle: str | None = None  # why it cannot be run here


def _held(level: str) -> dict[str, str]:
    return {**HELD[level], "DLLM_FAST_LEVEL": level}


def pieces() -> dict[str, Piece]:
    """Every piece by its name, what cannot be run here included."""
    sys.path.insert(0, str(ROOT))
    from dllm_fast import compiled

    obstacle = compiled.missing()
    here = () if obstacle else compiled.levels()
    every = []
    for level in reversed(HELD):
        lacks = None if level in here else obstacle or "the processor lacks it"
        every.append(Piece(f"level-{level}", SUITE, 45, _held(level), lacks))
        every.append(Piece(f"cpu-{level}", CPU_TESTS, 6, _held(level), lacks))
    every += [Piece(f"seed-{seed}", SUITE, 45, {"DLLM_TEST_SEED": str(seed)}) for seed in (1, 2, 3)]
    every.append(Piece("long", (*SUITE, "-m", "long"), 180))
    installed = importlib.util.find_spec("triton") is not None
    every.append(
        Piece("no-triton", SUITE, 45, {"PYTHONPATH": str(_blocked())}, None if installed else "there is no Triton here")
    )
    return {piece.name: piece for piece in every}


def _blocked() -> Path:
    folder = RUNS / "without-triton"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(WITHOUT_TRITON)
    return folder


def run(piece: Piece) -> dict:
    """What came out: seconds, pytest's last line, whether it passed."""
    if piece.obstacle:
        return {"outcome": "skipped", "line": piece.obstacle, "minutes": 0.0}
    RUNS.mkdir(parents=True, exist_ok=True)
    path, began = RUNS / f"{piece.name}.txt", time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **piece.environment}
    with path.open("w") as out:
        done = subprocess.run(
            [sys.executable, *piece.command],
            cwd=ROOT,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            check=False,
        )
    text = path.read_text(errors="replace")
    minutes = (time.monotonic() - began) / 60
    for line in text.splitlines():
        if line.startswith(("FAILED", "ERROR", "SKIPPED")):
            print(f"    {line}")
    closing = re.findall(r"^.*\b(?:passed|failed|error)\b.* in .*s.*$", text, re.MULTILINE)
    outcome = "passed" if done.returncode == 0 else "failed"
    return {"outcome": outcome, "line": closing[-1].strip("= ") if closing else text[-200:], "minutes": minutes}


def commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    changed = "+" * bool(git("status", "--porcelain", "--", ".", ":!bench/results"))
    return (git("rev-parse", "--short", "HEAD") or "unknown") + changed


def versions() -> str:
    names = ("torch", "triton", "transformers", "numpy")
    found = [f"{name} {importlib.metadata.version(name)}" for name in names if importlib.util.find_spec(name)]
    return ", ".join([f"Python {platform.python_version()}", *found])


def table(results: dict[str, dict]) -> str:
    """The results as lines of columns."""
    lines = [f"{'piece':18} {'outcome':8} {'minutes':>7}  {'date':10} {'commit':9} pytest's last line; versions"]
    for name, result in results.items():
        what = f"{result['line']}; {result['versions']}"
        lines.append(
            f"{name:18} {result['outcome']:8} {result['minutes']:7.1f}  {result['date']:10} {result['commit']:9} {what}"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="pieces; `levels` is what make test runs; none: all but cpu-*")
    parser.add_argument("--list", action="store_true", help="name the pieces and why some cannot be run here")
    parser.add_argument("--machine", default=f"cpu-{os.cpu_count()}-cores", help="folder of bench/results")
    options = parser.parse_args()
    known = pieces()
    if options.list:
        for piece in known.values():
            print(f"{piece.name:18} {piece.minutes:4} minutes  {piece.obstacle or ''}")
        return
    names = [name for name in known if not name.startswith("cpu-")]
    if options.names == ["levels"]:
        # The best level is what the suite has just run.
        names = [name for name in known if name.startswith("cpu-") and not known[name].obstacle][:-1]
    elif options.names:
        names = options.names
        unknown = [name for name in names if name not in known]
        if unknown:
            parser.error(f"no such piece: {', '.join(unknown)}; there are {', '.join(known)}")
    kept = RUNS / "results.json"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    failed = False
    for name in names:
        if not options.names and results.get(name, {}).get("commit") == commit():
            print(f"{name}: run at this commit already, {results[name]['outcome']}", flush=True)
            failed |= results[name]["outcome"] == "failed"
            continue
        result = run(known[name])
        result |= {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "versions": versions()}
        results[name] = result
        late = f" of {known[name].minutes}" + ", OVER ITS BUDGET" * (result["minutes"] > known[name].minutes)
        print(f"{name}: {result['outcome']}, {result['minutes']:.1f}{late} minutes: {result['line']}", flush=True)
        failed |= result["outcome"] == "failed"
        RUNS.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(results, indent=1))
        if options.names != ["levels"]:
            path = ROOT / "bench" / "results" / options.machine / "test-all.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(table(results))
    sys.exit(failed)


if __name__ == "__main__":
    main()
