"""The bench of samplers: its laws, and the page that it writes."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # `bench` is a folder of the checkout, not an installed package

pytest.importorskip("triton", reason="the benches of kernels need Triton", exc_type=ImportError)
from bench.ops import noise
from bench.quality import sampling


def test_fp32_lowers_the_temperature_of_steps_and_fp64_does_not():
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, counts in (
        ("own", sampling.at_its_time(4000, generator)),
        ("fp64", sampling.step_by_step(torch.float64, 4000, 64, generator)),
        ("fp32", sampling.step_by_step(torch.float32, 4000, 64, generator)),
    ):
        assert counts.sum() == 4000, "every position is un-masked"
        t, error = noise.temperature(*noise.zipf(), counts)
        found[name] = (t - 1) / error
    assert abs(found["own"]) < 4 and abs(found["fp64"]) < 4 and found["fp32"] < -6, found


def test_the_page_of_samplers(tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "LENGTH", 16)
    monkeypatch.setattr(sampling, "GRIDS", (2,))
    monkeypatch.setattr(sampling, "TIME", sampling.TIME[:1])
    monkeypatch.setattr(sampling, "SCHEDULE", sampling.SCHEDULE[:2])
    result = sampling.measured(200, 3, 4)
    assert [len(row["surprise"]) for row in result["time"] + result["schedule"]] == [3] * 6
    page = tmp_path / "docs" / "sampling.md"
    page.parent.mkdir()
    written = sampling.report.save(result, tmp_path / "results", page)
    assert all(path.stat().st_size for path in written)
    assert "../results/sampling-texts.svg" in page.read_text() and "nan" not in page.read_text()
