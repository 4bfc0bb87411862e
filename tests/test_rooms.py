"""Imports go one way: a room of the package imports only rooms below it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "dllm_fast"
# From the bottom up. A module may import its own room and those before it.
ROOMS = [
    {"kernels"},
    {"environment"},
    {"cpu"},
    {"ops", "attentions", "launchers", "logprobs", "visibility"},
    {"families"},
    {"decoding"},
    {"patch", "backend"},
    {"generation_config", "loading", "config"},
    {"generate"},
    {"hf", "warmup", "flow", "plain", "calibration"},
    {"train", "evaluate", "serve", "ray", "errors"},
    {"cli"},
]
RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms} | {"errors": 0}
# A native model's `generate` is the package's, from a higher room, so it is imported when it is called.
UPWARDS = {("families/mixin.py", "hf"), ("families/mixin.py", "generation_config")}


def imported(path: Path) -> set[str]:
    """The rooms and top-level modules of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "dllm_fast":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dllm_fast."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("dllm_fast.")}
    return found


def upwards(root: Path) -> set[tuple[str, str]]:
    """(file, import) for every import of a higher room."""
    files = [path for path in root.rglob("*.py") if "kernels" not in path.parts and "hub" not in path.parts]
    found = set()
    for path in files:
        name = str(path.relative_to(root))
        room = name.split("/")[0].removesuffix(".py")
        if not room.startswith("__"):
            found |= {(name, other) for other in imported(path) if RANK[other] > RANK[room]}
    return found


def test_imports_go_one_way():
    assert upwards(ROOT) == UPWARDS


def test_every_module_is_in_a_room():
    modules = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert {name for name in modules if not name.startswith("__")} <= RANK.keys()


@pytest.mark.parametrize("line", ["from dllm_fast.decoding.schedules import Uniform", "import dllm_fast.patch"])
def test_an_import_upwards_is_found(tmp_path, line):
    (tmp_path / "families").mkdir()
    (tmp_path / "families" / "model.py").write_text(f"def late():\n    {line}\n")
    assert upwards(tmp_path) == {("families/model.py", line.split(".")[1].split(" ")[0])}
