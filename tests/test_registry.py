"""requirements.txt and the extras can be installed: pip resolves them against the registry, without installing.

A requirement that only this machine's local builds meet fails here, as it would on any other machine.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from environments import PINS, find_python, registry_answers

ROOT = Path(__file__).parent.parent
VERSIONS = ("3.12", "3.13", "3.11", "3.10")
FIRST = next((version for version in VERSIONS if find_python(version)), None)
EXTRAS = ("cli", "train", "bench", "eval", "dev", "docs", "lora", "serve", "ray")
# Requirements of the registry's torch on Linux, as in docs/install.md.
TRITON = {"2.8": "3.4.0", "2.9": "3.5", "2.10": "3.6.0", "2.11": "3.6.0", "2.12": "3.7", "2.13": "3.7.1", "2.14": "3.8"}


def resolve(tmp_path, version: str, *requirements: str) -> dict[str, str]:
    """The versions that pip would install in an empty environment of this Python, by lower-case name."""
    python = find_python(version)
    if not python:
        pytest.skip(f"there is no Python {version}")
    if not registry_answers():
        pytest.skip("no package registry answers")
    report = tmp_path / "report.json"
    command = [python, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    done = subprocess.run(
        [*command, "--report", report, *requirements], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {
        item["metadata"]["name"].lower(): item["metadata"]["version"]
        for item in json.loads(report.read_text())["install"]
    }


def required(extra: str) -> list[str]:
    """The package's own requirements and those of an extra."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read pyproject.toml")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *project["optional-dependencies"][extra]]


def assert_pinned(found: dict[str, str]) -> None:
    here = [pin for pin in PINS if sys.platform == "linux" or "Linux" not in pin]
    wanted = dict(pin.split(";")[0].strip().split("==") for pin in here)
    # A local build of the pinned version, such as 2.13.0+cpu, is that version.
    assert {name: found[name].partition("+")[0] for name in wanted} == wanted


@pytest.mark.long
@pytest.mark.skipif(FIRST is None, reason=f"there is none of Python {', '.join(VERSIONS)}")
def test_the_pins_belong_together(tmp_path):
    assert_pinned(resolve(tmp_path, FIRST, *PINS))


@pytest.mark.long
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_resolves_with_the_pins(tmp_path, version, extra):
    assert_pinned(resolve(tmp_path, version, *PINS, *required(extra)))


@pytest.mark.long
@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_resolves_by_itself(tmp_path, extra):
    assert {"torch", "transformers"} <= set(resolve(tmp_path, FIRST, *required(extra)))


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="torch demands Triton on Linux alone")
@pytest.mark.parametrize("torch", TRITON)
def test_each_torch_has_the_triton_that_the_page_names(tmp_path, torch):
    # All of them support Python 3.12, and local builds for it are unlikely.
    assert resolve(tmp_path, "3.12", f"torch=={torch}.*", *required("cli"))["triton"].startswith(TRITON[torch])
    assert TRITON[torch] in (ROOT / "docs" / "install.md").read_text()


def test_every_extra_is_tried():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read pyproject.toml")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(project["optional-dependencies"]) == set(EXTRAS)
