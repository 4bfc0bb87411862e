"""An extension that was built from other sources than those of the checkout is not used."""

import ctypes
import shutil
from types import SimpleNamespace

import pytest
from needs import needs_cpp

from dllm_fast.cpu import compiled, sources


@needs_cpp
def test_a_changed_file_makes_it_stale(tmp_path, monkeypatch):
    folder = tmp_path / "cpu"
    shutil.copytree(sources.SOURCES, folder)
    monkeypatch.setattr(sources, "SOURCES", folder)
    library = compiled._library()
    sources.require_current(library, "_cpu.so")
    with open(folder / "api.h", "a") as file:
        file.write("\n")
    with pytest.raises(
        ImportError, match=r"_cpu.so was built from other files than those of .*cpu; `pip install -e .`"
    ):
        sources.require_current(library, "_cpu.so")


def test_one_that_says_nothing_is_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SOURCES", tmp_path)
    with pytest.raises(ImportError, match=r"old\.so was built from other files"):
        sources.require_current(ctypes.CDLL(None), "old.so")


def test_an_installed_package_has_no_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SOURCES", tmp_path / "none")
    sources.require_current(SimpleNamespace(), "_cpu.so")
