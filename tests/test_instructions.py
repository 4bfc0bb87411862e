"""Each level of the compiled extension uses only its processors' instructions, by reading its machine code.

A level that this processor lacks cannot run here, and one instruction that is too new would kill the process on an
older processor.
"""

import platform
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason=f"{platform.machine()} has one level"),
]

AVX = r"^\s+v[a-z]\w*\s"  # every instruction of AVX and later
AVX512 = r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])\b|%k[0-7]"  # its registers, of any width
BF16 = r"^\s+(vdpbf16ps|vcvtneps2bf16|vcvtne2ps2bf16)"
# Instructions that a level's code must have, and ones that it must not have.
CODE = {
    "plain": ([r"^\s+mulps"], [AVX, r"%ymm", AVX512]),
    "avx2": ([r"%ymm", r"^\s+vfmadd\w+ps.*%ymm"], [AVX512, BF16]),
    "avx512": ([r"^\s+vfmadd\w+ps.*%zmm"], [BF16]),
    "avx512bf16": ([r"^\s+vdpbf16ps.*%zmm", r"^\s+vcvtneps2bf16"], []),
}


def build_settings(monkeypatch) -> dict:
    """setup.py's definitions: OPTIONS for every compilation, and INSTRUCTION_SETS."""
    setuptools = pytest.importorskip("setuptools", reason="there is no setuptools, which builds the extension")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    return runpy.run_path("setup.py")


def assembly(compiler: str, source: str, options: list[str]) -> str:
    command = [compiler, *options, "-fPIC", "-S", "-o", "-", f"csrc/cpu/{source}"]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=600).stdout


def lines(pattern: str, text: str) -> list[str]:
    return [line for line in text.splitlines() if re.search(pattern, line)]


@pytest.mark.parametrize("level", CODE)
def test_a_levels_code_is_for_its_processors(level, monkeypatch):
    settings = build_settings(monkeypatch)
    assert settings["INSTRUCTION_SETS"].keys() == CODE.keys()
    options = [*settings["OPTIONS"], *settings["INSTRUCTION_SETS"][level], f"-DTABLE={level}"]
    text = assembly("g++", "kernels.cpp", options)
    has, lacks = CODE[level]
    for pattern in has:
        assert lines(pattern, text), pattern
    for pattern in lacks:
        assert not lines(pattern, text), (pattern, lines(pattern, text)[0])


def test_what_every_processor_runs_is_plain(monkeypatch):
    """library.cpp detects the processor's level, so it must run on all of them."""
    text = assembly("g++", "library.cpp", build_settings(monkeypatch)["OPTIONS"])
    assert "cpuid" in text or "__cpu_model" in text
    assert not lines(AVX, text) and not lines(r"%ymm|%zmm", text)
