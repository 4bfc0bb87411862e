"""The bench of training steps: all ways that run here have the same losses."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # `bench` is a folder of the checkout, not an installed package

pytest.importorskip("triton", reason="the benches of kernels need Triton", exc_type=ImportError)
from bench.ops import training

SMALL = ["--device", "cpu", "--vocabulary", "300", "--width", "32", "--batch", "2", "--length", "16", "--steps", "3"]


def test_all_ways_have_the_same_losses(monkeypatch, capsys):
    found = {}
    for way in ("ours", "masked rows", "all rows"):
        monkeypatch.setattr(sys, "argv", ["training", *SMALL, "--way", way])
        training.main()
        found[way] = json.loads(capsys.readouterr().out)
        assert len(found[way]["seconds"]) == 2 and found[way]["losses"][0] > 0
    for way, result in found.items():
        torch.testing.assert_close(result["losses"], found["ours"]["losses"], atol=1e-5, rtol=1e-5, msg=way)
    assert training.obstacle("liger", "cpu") == "its kernels need a GPU"
