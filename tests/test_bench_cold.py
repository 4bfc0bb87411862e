"""The bench of cold starts, and the piece of the GPU round that compares tokens in fp32 at the real size."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # `bench` is a folder of the checkout, not a package that is installed

from bench import common, gpu
from bench.generation import cold, engine
from dllm_fast.decoding.spelling import schedule_of


def test_phases_follow_one_another_in_a_process_of_its_own(capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert cold.main(["--shape", "quick", "--dtype", "float32", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    ends = list(found["ends"].values())
    assert list(found["ends"]) == list(cold.PHASES) and ends[0] > 0 and ends == sorted(ends)
    assert found["compiled_after"] == found["recorded_after"] == 0
    assert [line.split(" s  ")[1].split(":")[0] for line in lines[2:-1]] == [*cold.PHASES, "in all"]
    assert float(lines[-2].split(" s")[0]) == pytest.approx(ends[-1], abs=0.006)


def test_a_start_that_fails_is_an_error():
    with pytest.raises(SystemExit, match="the new process ended with"):
        cold.start(["--shape", "no such shape"])


def test_kernels_are_counted_by_what_triton_keeps_of_each(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert cold.compiled() == 0
    for name in ("A/_norm_kernel.json", "A/__grp___norm_kernel.json", "A/_norm_kernel.cubin", "B/_rope_kernel.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert cold.compiled() == 2


def test_the_fp32_piece_asks_for_a_short_job_at_the_real_size():
    options = engine.parse(gpu.FP32.split()[2:])
    short, usual = common.SHAPES[options.shape], common.SHAPES["llada-8b"]
    assert options.dtype == "float32" and options.rounds == 1
    assert short.config == usual.config and short.gen_length < usual.gen_length
    assert schedule_of(short.schedule).steps % (short.gen_length // short.block_length) == 0
