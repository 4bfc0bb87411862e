"""The package's files: it imports without Triton, `kernels/` is not a top-level package, trees in pages are right."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from environments import has_compiler

from dllm_fast.cpu import compiled

ROOT = Path(__file__).parent.parent

WITHOUT_TRITON = """
import sys

sys.modules["triton"] = None  # as if it were not installed: imports fail, and a search finds nothing
import torch
import dllm_fast

config = dllm_fast.LLaDAConfig(d_model=32, n_heads=2, n_layers=2, mlp_hidden_size=48, vocab_size=20, mask_token_id=19)
model = dllm_fast.patch(dllm_fast.LLaDAModelLM(config).eval())
out = dllm_fast.generate(model, torch.arange(4)[None], gen_length=8, block_length=4, temperature=0.5, seed=1)
assert out.sequences.shape == (1, 12) and not (out.sequences == 19).any()
assert not any(name.startswith("triton.") for name in sys.modules), "triton was imported"
print("used without triton")
"""


def test_the_package_works_without_triton():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.stdout.strip() == "used without triton", done.stderr


MISSING = """
import warnings
import torch
from dllm_fast import ops
from dllm_fast.cpu import compiled

compiled._library = lambda: (_ for _ in ()).throw(ImportError("not built"))
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    assert [ops.resolve("auto", torch.device("cpu"), torch.float32) for _ in range(2)] == ["torch"] * 2
print([str(w.message) for w in seen])
"""


def test_without_the_compiled_extension_pytorch_is_used_and_that_is_said_once():
    done = subprocess.run([sys.executable, "-c", MISSING], capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.stdout.strip() == "['dllm_fast runs on PyTorch alone: not built']", done.stderr


def test_the_compiled_extension_is_built_where_there_is_a_compiler():
    """An installation may lack the extension only if it could not be compiled; a bare checkout has none."""
    installed = any(True for _ in importlib.metadata.distributions(name="dllm_fast"))
    if installed and has_compiler():
        assert compiled.missing() is None


LEVEL = """
import torch
from dllm_fast.cpu import compiled

try:
    print(*compiled.levels())
    print(compiled.linear(torch.ones(1, 3), torch.ones(2, 3)).tolist())
except ValueError as error:
    print(error)
"""


@pytest.mark.skipif(bool(compiled.missing()), reason=str(compiled.missing()))
@pytest.mark.parametrize(
    ("level", "printed"),
    [
        pytest.param("plain", "plain\n[[3.0, 3.0]]", marks=pytest.mark.long),
        ("", " ".join(compiled.levels()) + "\n[[3.0, 3.0]]" if not compiled.missing() else ""),
        ("sse", "DLLM_FAST_LEVEL='sse' in the environment; expected one of plain, avx2, avx512, avx512bf16"),
    ],
)
def test_a_lower_instruction_set_is_taken_from_the_environment(level, printed):
    environment = {**os.environ, "DLLM_FAST_LEVEL": level or os.environ.get("DLLM_FAST_LEVEL", "")}
    command = [sys.executable, "-c", LEVEL]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.stdout.strip() == printed, done.stderr


def test_kernels_is_a_plain_folder_behind_a_relative_link():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    if os.path.islink(ROOT / "dllm_fast" / "kernels"):  # a wheel and an unpacked sdist have files instead of the link
        assert os.readlink(ROOT / "dllm_fast" / "kernels") == "../kernels"
    import dllm_fast.kernels.reference as reference

    assert Path(reference.__file__).read_text() == (ROOT / "kernels" / "reference.py").read_text()
    assert (ROOT / "dllm_fast" / "py.typed").exists()


def test_a_checkout_without_symbolic_links_says_what_to_do(tmp_path):
    """git writes a link as a text file if the file system or its settings forbid links."""
    ignored = shutil.ignore_patterns("kernels", "models", "*.so", "__pycache__")
    shutil.copytree(ROOT / "dllm_fast", tmp_path / "dllm_fast", ignore=ignored)
    (tmp_path / "dllm_fast" / "kernels").write_text("../kernels")
    command = [sys.executable, "-c", "import dllm_fast"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert done.returncode == 1 and "git config core.symlinks true" in done.stderr


def test_no_file_is_over_400_lines():
    long = {}
    for folder in ("dllm_fast", "kernels", "tests", "bench", "csrc"):
        for path in (ROOT / folder).rglob("*.py"):
            lines = len(path.read_text().splitlines())
            if lines > 400:
                long[str(path.relative_to(ROOT))] = lines
    assert not long


def entries(page: Path) -> set[str]:
    """The files and folders that the tree of a page names."""
    named, folder = set(), ""
    for line in page.read_text().split("```text\n")[1].split("```")[0].splitlines():
        names = line.strip().split("  ")[0].split(" ")
        if line.startswith("  "):
            named |= {folder + name for name in names if name}
        else:
            folder = names[0]
            named.add(folder)
    return named


def test_the_trees_are_true():
    """README's tree has the rooms, docs/architecture.md's has every module; all of it exists."""
    readme, pages = entries(ROOT / "README.md"), entries(ROOT / "docs" / "architecture.md")
    assert not [name for name in readme | pages if not (ROOT / name).exists()]
    rooms = {f"dllm_fast/{path.parent.name}/" for path in (ROOT / "dllm_fast").glob("*/__init__.py")}
    assert rooms <= {re.sub(r"^(dllm_fast/\w+/).*", r"\1", name) for name in readme}
    modules = {str(p.relative_to(ROOT)) for f in ("dllm_fast", "kernels", "bench") for p in (ROOT / f).rglob("*.py")}
    linked = ("dllm_fast/kernels/", "dllm_fast/hub/")  # files that are elsewhere too
    assert not [m for m in modules - pages if not m.startswith(linked) and not m.endswith("/__init__.py")]


def test_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 8192
