"""The compiled extension on 64-bit Arm, cross-compiled and emulated, against the plain build for this processor.

test_compiled*.py compare the latter with fp64. Needs Debian's g++-aarch64-linux-gnu and qemu-user.
"""

import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from test_instructions import assembly, build_settings, lines

ROOT = Path(__file__).parent.parent
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
NEEDED = [COMPILER, EMULATOR, "g++"]
LACKING = [name for name in NEEDED if shutil.which(name) is None]

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(bool(LACKING), reason=f"there is no {', '.join(LACKING)}"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason=f"it is compared with x86-64, not {platform.machine()}"),
]


def results(compiler: str, options: list[str], folder: Path, *emulator: str) -> dict[str, np.ndarray]:
    """Each result of every_function.cpp by its name, [n] float64."""
    sources = ["tests/every_function.cpp", "csrc/cpu/library.cpp", "csrc/cpu/kernels.cpp"]
    program = folder / compiler
    command = [compiler, *options, "-static", "-DTABLE=plain", *sources, "-o", str(program)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=600)
    done = subprocess.run([*emulator, str(program)], capture_output=True, text=True, check=True, timeout=600)
    rows = (line.split() for line in done.stdout.splitlines())
    return {name: np.array(numbers, dtype=np.float64) for name, *numbers in rows}


def test_every_function_gives_the_same_values_on_arm(tmp_path, monkeypatch):
    """Up to rounding: Arm has fused multiply-add, plain x86-64 does not."""
    options = build_settings(monkeypatch)["OPTIONS"]
    here, arm = results("g++", options, tmp_path), results(COMPILER, options, tmp_path, EMULATOR)
    assert here.keys() == arm.keys() and len(here) == 4 * (4 + 7 + 4 * 3 * 3 + 2 + 1 + 5 + 4)
    for name, expected in here.items():
        assert np.isfinite(expected).all() and len(expected), name
        if name.startswith("token"):
            assert np.array_equal(arm[name], expected), name
            continue
        narrow = "bf16" in name and not name.startswith(("score", "lse"))
        limit = np.abs(expected) * 2.0**-7 + 2e-6 * np.abs(expected).max() if narrow else 4e-6 * np.abs(expected).max()
        assert (np.abs(arm[name] - expected) <= limit).all(), name
    for name in arm:  # independent of the number of threads
        assert np.array_equal(arm[name], arm[name.replace("threads3", "threads1")]), name


def test_arms_code_multiplies_vectors(monkeypatch):
    text = assembly(COMPILER, "kernels.cpp", [*build_settings(monkeypatch)["OPTIONS"], "-DTABLE=plain"])
    assert len(lines(r"^\s+fmla\s+v\d+\.4s", text)) > 100
