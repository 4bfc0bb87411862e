"""The benches of fewer positions: what they run and count, at their smallest."""

import dataclasses
import functools
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent))
import dllm_fast
from bench import floors, peers
from bench.common import SHAPES, build_model
from bench.generation import bare, gsm8k, throughput
from bench.quality import evaluated
from dllm_fast.decoding import memory


@pytest.fixture
def model():
    shape = SHAPES["quick"]
    config = shape.config | {"max_sequence_length": 512}
    return dllm_fast.patch(build_model(dataclasses.replace(shape, config=config), torch.float32, torch.device("cpu")))


def test_ways_evaluate_fewer_positions_and_take_as_many_forwards(model):
    job = throughput.prepare(SHAPES["quick"], model, "20+64", 2)
    rows, lines = throughput.measure(model, job, 8, 1, list(throughput.FEWER), [])
    assert len(rows) == 2 * len(throughput.FEWER) and {row.tokens for row in rows} == {128} and not lines
    for refresh in {row.refresh for row in rows}:
        of = {row.way: row for row in rows if row.refresh == refresh}
        for count in (lambda row: row.positions, lambda row: row.flops):
            assert count(of["skip"]) < count(of["all"]) and count(of["both"]) < count(of["suffix"]) < count(of["all"])
        assert {row.nfe for row in of.values()} == {24} and of["all"].ratios == [1.0]
    operations = bare.Bare(peers.twin(model), job, job.schedule.steps, fastest=False)
    assert rows[0].flops == sum(operations.flops(*step) for step in operations.plan)


def test_drafts_and_a_cache_in_e4m3_are_ways_too(model):
    job = throughput.prepare(SHAPES["quick"], model, "20+64", 1)
    rows, _ = throughput.measure(model, job, 8, 1, ["all", "e4m3", "drafts-3", "drafts-auto"], [])
    of = {row.way: row for row in rows if row.refresh == "block"}
    assert of["e4m3"].positions == of["all"].positions < of["drafts-3"].positions
    assert of["drafts-3"].nfe <= of["all"].nfe == of["e4m3"].nfe
    assert of["drafts-auto"].positions == of["all"].positions  # none on a CPU


def test_others_take_turns_with_ours(model, monkeypatch):
    """On the same job, against the run with their cache; what cannot run says why."""
    base = {"gen_length": 32, "block_length": 16, "schedule": dllm_fast.Uniform(12), "seed": 0}
    asked = []

    def answer(job, nfe=5):
        asked.append(job.ids.shape)
        return dllm_fast.generate(model, job.ids, **base).sequences[:, -32:], nfe

    def found(specs, unpatched, job):
        assert specs == ["llada=x"] and job.schedule == dllm_fast.Uniform(12) and job.block_length == 16
        assert "forward" not in unpatched.__dict__
        others = [
            peers.Peer("dual", "dual", lambda: answer(job)),
            peers.Peer("plain", "none", lambda: answer(job, None)),
        ]
        return [*others, peers.Peer("broken", None, lambda: [][0])], ["another: not run: no such thing"]

    monkeypatch.setattr(throughput, "find_peers", found)
    rows, lines = throughput.measure(
        model, throughput.prepare(SHAPES["quick"], model, "20+32", 2), 8, 2, ["all"], ["llada=x"]
    )
    assert asked == [(2, 20)] * 6 and [(row.refresh, row.way) for row in rows[2:]] == [("", "dual"), ("", "plain")]
    assert [(row.nfe, row.same, row.flops) for row in rows[2:]] == [(5, 64, None), (None, None, None)]
    first, theirs = rows[0].seconds, rows[2].seconds
    assert rows[2].ratios == [a / b for a, b in zip(first, theirs)] and len(first) == 2
    assert lines == ["another: not run: no such thing", "broken: not run: IndexError: list index out of range"]


def test_a_batch_is_as_large_as_memory_allows(model, monkeypatch):
    monkeypatch.setattr(memory, "need", lambda family, options, rows, slots, spare: slots * rows)
    monkeypatch.setattr(memory, "available", lambda device: 345)
    assert throughput.prepare(SHAPES["quick"], model, "20+64", "auto").ids.shape == (3, 20)  # 252 of 345 x 0.9
    job = throughput.prepare(SHAPES["quick"], model, "20+64", 5)
    rows, (line,) = throughput.measure(model, job, 8, 1, ["all"], [])
    assert not rows and line.startswith("batch 5: not run: 5 rows of 84 positions need 0.0 GiB")


def test_a_run_shows_what_it_knows(monkeypatch, capsys):
    monkeypatch.setattr(floors, "measure", functools.partial(floors.measure, quick=True))
    options = ["--model", "quick", "--rounds", "1", "--force", "--device", "cpu", "--suffix", "8", "--ways", "both"]
    throughput.main([*options, "--lengths", "20+32", "40+96", "--batch", "1", "2"])
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert [(row["length"], row["batch"]) for row in result["rows"][::4]] == [
        (length, batch) for length in ("20+32", "40+96") for batch in (1, 2)
    ]
    assert "FLOPs alone" in out and "same tokens" not in out and result["flops_a_second"] > 0
    for wrong, message in ((["--peer", "x=/tmp"], "'x' is not one of"), (["--batch", "most"], "'most'")):
        with pytest.raises(SystemExit):
            throughput.parse(wrong)
        assert message in capsys.readouterr().err


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
