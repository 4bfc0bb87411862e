"""The benches of fewer positions: what they run and count, at their smallest."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent))
import dllm_fast
from bench.common import SHAPES, build_model
from bench.generation import gsm8k, throughput
from bench.quality import evaluated


@pytest.fixture
def model():
    shape = SHAPES["quick"]
    config = shape.config | {"max_sequence_length": 512}
    return dllm_fast.patch(build_model(dataclasses.replace(shape, config=config), torch.float32, torch.device("cpu")))


def test_ways_evaluate_fewer_positions_and_take_as_many_forwards(model):
    rows = throughput.measure(model, SHAPES["quick"], "20+64", 2, 8, 1, list(throughput.WAYS))
    assert len(rows) == 2 * len(throughput.WAYS) and {row.tokens for row in rows} == {128}
    for refresh in {row.refresh for row in rows}:
        of = {row.way: row for row in rows if row.refresh == refresh}
        assert of["skip"].positions < of["all"].positions and of["both"].positions < of["suffix"].positions
        assert {row.nfe for row in of.values()} == {24} and of["all"].ratios == [1.0]


def test_prompts_have_gsm8ks_lengths(model):
    asked = gsm8k.prompts(model.config, extra=7, limit=None)
    assert [len(prompt) - 7 for prompt in asked] == gsm8k.LENGTHS and len(asked) == 1319
    low, high = 0, model.config.mask_token_id
    assert all(low <= int(prompt.min()) and int(prompt.max()) < high for prompt in asked)


def test_an_evaluation_counts_its_padding(model):
    asked = [torch.zeros(n, dtype=torch.int64) for n in (40, 40, 30, 20)]
    found = gsm8k.run(model, asked, 2, 64, False, refresh="block")
    assert found["prompts"] == 4 and found["tokens"] == 256 and found["nfe"] == 22
    assert found["padding"] == 0.0 and gsm8k.Whole(own=3, computed=4).padding == 0.25


def test_the_same_problems_are_compared(tmp_path):
    rows = evaluated.run("llada-steps", 6, 3, ["uniform 4"], ["block", "window"])
    assert [(row.refresh, row.way) for row in rows] == [(r, w) for r in ("block", "window") for w in evaluated.WAYS]
    assert all(len(row.right) == 6 for row in rows) and rows[1].positions < rows[0].positions
    lines = evaluated.table(rows)
    assert lines[0][4] == "" and lines[0][5] == "100%" and "points" in lines[1][4]
    evaluated.draw(rows, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text().count("<svg") == 1
    options = evaluated.options_of("both", "uniform 2", "window", 52, 13)
    assert options["schedule"] == dllm_fast.Uniform(28) and options["suffix_length"] == 13
    assert options["skip_committed"] and options["refresh"] == dllm_fast.Window(13)
