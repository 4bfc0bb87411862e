"""Source distribution and wheel, built and installed in a path with spaces, using this Python's torch."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from environments import borrow, copy_tree, has_compiler

pytestmark = pytest.mark.long
SDIST = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
WHEEL = ("-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", ".")
FEW = ("tests/test_schedules.py", "tests/test_values.py", "tests/kernels/test_glu.py")
HERE = "import dllm_fast, sys; print(dllm_fast.__file__); from dllm_fast.cpu import compiled; print(compiled.missing())"


def run(*command, cwd, **environment) -> str:
    """The output of a command that must succeed."""
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def install(folder: Path, wheel: Path) -> Path:
    """The Python of a new environment that has the wheel and this Python's packages."""
    run(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    borrow(python)
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", "--force-reinstall", wheel, cwd=folder.parent)
    return python


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    here = tmp_path_factory.mktemp("a path with spaces")
    tree = here / "the tree"
    copy_tree(tree)
    printed = run(sys.executable, "-c", SDIST, cwd=tree)
    [archive] = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(here / "un packed")
    [unpacked] = (here / "un packed").iterdir()
    printed += run(sys.executable, *WHEEL, cwd=unpacked)
    [wheel] = (unpacked / "dist").glob("*.whl")
    python = install(here / "environ ment", wheel)
    return SimpleNamespace(here=here, tree=tree, unpacked=unpacked, printed=printed, wheel=wheel, python=python)


def generate(python: Path, cwd: Path, *before) -> str:
    """The shipped model's text, in a folder without the package."""
    command = python.with_name("dllm-fast")
    return run(
        *before,
        python,
        command,
        "generate",
        "--model",
        "llada-gsm8k",
        "--prompt",
        "Tom has 3 apples.",
        "--plain",
        cwd=cwd,
    )


def test_setuptools_has_nothing_to_warn_of(built):
    for warning in ("would be ignored", "is absent from the `packages` configuration", "no files found", "Deprecat"):
        assert warning not in built.printed


def test_a_source_distribution_holds_what_the_tests_and_benches_need(built):
    for folder in ("tests", "kernels", "csrc", "bench", "dllm_fast"):
        files = {path.relative_to(built.tree) for path in (built.tree / folder).rglob("*") if path.is_file()}
        files = {path for path in files if path.suffix != ".so" and path.parts[:2] != ("bench", "results")}
        assert not [path for path in sorted(files) if not (built.unpacked / path).exists()]


def test_tests_pass_in_an_unpacked_source_distribution(built):
    assert " passed" in run(sys.executable, "-m", "pytest", "-q", *FEW, cwd=built.unpacked)


def test_an_installed_wheel_generates(built):
    place, missing = run(built.python, "-c", HERE, cwd=built.here).splitlines()
    assert Path(place).is_relative_to(built.here / "environ ment")
    assert missing == "None" if has_compiler() else missing
    assert len(generate(built.python, built.here).split()) > 5


def test_without_a_compiler_the_extension_is_left_out_and_pytorch_generates(built):
    without = built.here / "without a compiler"
    copy_tree(without)
    run(sys.executable, *WHEEL, cwd=without, CC="false", CXX="false")
    [wheel] = (without / "dist").glob("*.whl")
    python = install(built.here / "no compiler", wheel)
    assert run(python, "-c", HERE, cwd=built.here).splitlines()[1] != "None"
    assert "dllm_fast runs on PyTorch alone" in generate(python, built.here)


def test_nothing_is_written_to_site_packages(built):
    """Root can write anywhere, so it gives up that capability first."""
    before = ()
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("root can write anywhere, and there is no setpriv to take that from it")
        before = ("setpriv", "--bounding-set", "-dac_override", "--inh-caps", "-dac_override")
    [packages] = (built.here / "environ ment" / "lib").glob("*/site-packages")
    places = [packages, *(path for path in packages.rglob("*") if path.is_dir())]
    for place in places:
        place.chmod(0o555)
    try:
        refused = subprocess.run([*before, "touch", packages / "new"], capture_output=True, check=False)
        assert refused.returncode != 0
        assert len(generate(built.python, built.here, *before).split()) > 5
    finally:
        for place in places:
            place.chmod(0o755)
