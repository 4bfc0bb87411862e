"""The pieces of make test and make test-all: budgets, selection, and the table's lines for failed or late pieces."""

import sys
from pathlib import Path

import all as every
import pytest
from environments import SETTINGS, Setting, find_python, obstacle

PIECES = every.pieces()


def test_the_parts_of_make_test_have_budgets_within_its_45_minutes():
    daily = [PIECES[name] for name in every.choose(PIECES, ["test"])]
    assert daily[0].name == "suite"
    assert sum(piece.minutes for piece in daily) <= every.DAILY_MINUTES


def test_make_test_runs_every_lower_level_of_this_processor_and_test_all_every_level():
    levels = every.compiled_levels()
    daily = every.choose(PIECES, ["test"])
    assert [name for name in daily if name.startswith("cpu-")] == [f"cpu-{level}" for level in levels[:-1]]
    assert {f"bench-{level}" for level in levels[:-1]} <= set(daily)
    assert {f"level-{level}" for level in levels} <= set(every.choose(PIECES, []))


def test_every_run_of_the_whole_suite_has_a_seed_of_its_own():
    whole = [piece for piece in PIECES.values() if piece.command == every.SUITE]
    seeds = [int(piece.environment.get("DLLM_TEST_SEED", "0")) for piece in whole]
    assert whole[0].daily and seeds[0] == 0 and len(set(seeds)) == len(whole) > 5


def test_the_parts_of_the_long_tests_are_there():
    paths = [path for paths in every.LONG.values() for path in paths]
    assert all((every.ROOT / path).exists() for path in paths)
    assert {f"--ignore={path}" for path in paths} < set(PIECES["long-others"].command)


def test_the_oldest_versions_are_those_that_pyproject_allows():
    text = (every.ROOT / "pyproject.toml").read_text()
    pins = dict(package.split("==") for package in SETTINGS["oldest"].packages)
    for name, version in pins.items():
        assert f'"{name}>={version.removesuffix(".*")}' in text
    assert f'requires-python = ">={SETTINGS["oldest"].python}"' in text and set(pins) >= {"torch", "transformers"}


def test_the_piece_of_extras_runs_what_they_unlock():
    assert {"tests/test_lm_eval.py", "tests/test_humaneval.py", "tests/test_adapters.py"} <= set(every.EXTRAS)


def test_a_name_that_is_no_piece_is_refused():
    with pytest.raises(ValueError, match="no such piece: level-sse; there are suite"):
        every.choose(PIECES, ["level-sse"])


@pytest.mark.parametrize(("code", "outcome", "line"), [
    ("print('== 3 passed in 0.1s ==')", "passed", "3 passed in 0.1s"),
    ("print('FAILED x'); print('1 failed, 2 passed in 0.1s'); exit(1)", "failed", "1 failed, 2 passed in 0.1s"),
    ("raise ValueError('no such thing')", "failed", "ValueError: no such thing"),
])  # fmt: skip
def test_what_a_piece_leaves_in_the_table(tmp_path, monkeypatch, capsys, code, outcome, line):
    monkeypatch.setattr(every, "RUNS", tmp_path)
    result = every.run(every.Piece("one", ("-c", code), 1), tmp_path)
    assert (result["outcome"], result["line"]) == (outcome, line)
    assert ("FAILED x" in capsys.readouterr().out) == ("FAILED" in code)
    assert line in (tmp_path / "one.txt").read_text()
    row = every.table({"one": result | {"date": "2026-01-02", "commit": "abc"}}).splitlines()[1]
    assert row.split()[:5] == ["one", outcome, "0.0", "2026-01-02", "abc"]
    assert f"{line}; Python {sys.version.split()[0]}" in row


def test_a_piece_that_cannot_be_run_here_says_why(tmp_path):
    result = every.run(every.Piece("one", ("-c", "exit(1)"), 1, obstacle="the processor lacks it"), tmp_path)
    assert (result["outcome"], result["line"]) == ("skipped", "the processor lacks it")
    assert obstacle("old", Setting(python="3.1"), tmp_path) == "there is no Python 3.1"


def test_this_python_is_found_by_its_version():
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert Path(find_python(version)).samefile(sys.executable)


def test_the_table_keeps_the_lines_of_other_pieces():
    result = {"outcome": "passed", "minutes": 1.0, "date": "2026-01-01", "line": "3 passed", "versions": ""}
    before = every.table({"arm": result | {"commit": "aaaaaaa"}, "ray": result | {"commit": "aaaaaaa"}})
    kept = every.table({"ray": result | {"commit": "bbbbbbb"}}, before).splitlines()
    assert kept[1] == before.splitlines()[1]
    assert [line.split()[:1] + line.split()[4:5] for line in kept[1:]] == [["arm", "aaaaaaa"], ["ray", "bbbbbbb"]]
