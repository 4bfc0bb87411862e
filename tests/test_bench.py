"""The benches on tiny shapes: they measure, they check results, and `make gpu` can be interrupted anywhere."""

import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from needs import needs_backend

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # `bench` is a folder of the checkout, not a package that is installed

pytest.importorskip("triton", reason="the benches of kernels need Triton", exc_type=ImportError)
from bench import floors, gpu
from bench.generation import modernbert, own
from bench.ops import noise, sanitize, timing, tune
from bench.ops.cases import attention, case, loss, predict, small
from bench.report.tables import row
from dllm_fast.decoding.options import CACHES
from dllm_fast.kernels import gumbel as gumbel_kernel
from dllm_fast.kernels import reference

on_cpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="a dry run in the interpreter; on a GPU, make gpu runs it all"
)


def test_floors_are_rates_with_a_spread(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["floors.py", "--quick", "--device", "cpu"])
    floors.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name in ("copy", "bf16", "fp32"):
        assert 0 < found[name]["low"] <= found[name]["median"] <= found[name]["high"] < math.inf


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the levels are those of x86-64")
def test_floors_where_onednn_has_no_bf16():
    """Without AVX-512 oneDNN refuses bf16 matmuls, but every bench measures the machine's floors."""
    held = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    code = "import torch; from bench import floors; print(floors.has_onednn(torch.bfloat16)); floors.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--quick", "--device", "cpu"],
        **{"capture_output": True, "text": True, "timeout": 120, "cwd": ROOT, "env": {**os.environ, **held}},
    )
    assert done.stdout.startswith("False\n"), done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["bf16"]["median"] > 0


def test_modernbert_beside_transformers(capsys):
    arguments = ["--size", "tiny", "--lengths", "16", "40", "--batches", "1", "3", "--rounds", "2"]
    assert modernbert.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.split()[:1] in (["16"], ["40"])]
    assert [line.split()[:3] for line in rows] == [
        [length, batch, padded] for length in ("16", "40") for batch, padded in (("1", "no"), ("3", "no"), ("3", "yes"))
    ]
    assert all("sdpa " in line for line in rows), "each row says how many times as long transformers takes"
    assert [line.split("  ")[0] for line in lines[-4:]] == [
        "plain loop, sdpa",
        "ours, none",
        "ours, prefix",
        "ours, dual",
    ]


@needs_backend
def test_forwards_of_the_families_beside_the_models_own(capsys):
    """In fp64 no near tie changes a token."""
    assert own.main(["--size", "quick", "--dtype", "float64", "--rounds", "2", "--force"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [(row["model"], row["cache"]) for row in rows] == [
        (model, cache) for model in ("llada", "modernbert") for cache in CACHES
    ]
    assert all(row["same"] == 1.0 and row["nfe"] in (16, 32) and len(row["times"]) == 2 for row in rows)


def chosen() -> list[case.Case]:
    """One case for every op."""
    attentions = {x.name: x for x in attention.cases("cpu", True)}
    makers = (predict.cases, small.norm_cases, small.rope_cases, small.glu_cases, small.commit_cases,
              small.gumbel_cases, loss.cases)  # fmt: skip
    one = [next(iter(cases("cpu", True))) for cases in makers]
    names = ("tiny-llada-block4x40-batch2", "tiny-modernbert-window-full12-batch2")
    return [*(attentions[name] for name in names), *one, list(loss.cases("cpu", True))[-1],
            next(x for x in predict.cases("cpu", True) if "noise" in x.name)]  # fmt: skip


@on_cpu
@pytest.mark.parametrize("one", chosen(), ids=lambda x: x.id)
def test_every_op_is_checked_and_timed(one):
    results = timing.measure(one, "cpu", quick=True)
    absent = {"sdpa-cudnn", "sdpa-efficient"}  # on a CPU
    for name, result in results.items():
        assert bool(result.error) == (name in absent), (name, result.error)
        assert name in absent or (len(result.times) == 2 and min(result.times) > 0)
        assert name in absent or name in one.unchecked or result.relative < 1e-5
    rates = floors.Floors("two numbers", 0, *(floors.Rate(x, x, x) for x in (1e9, 1e12, 1e12)))
    line = row(one, results, rates)
    floor = max(one.bytes / 1e9, one.flops / 1e12)
    assert line["share"] == pytest.approx(floor / line["seconds"])
    best = min(x.median for name, x in results.items() if name != "ours")
    assert line["ratio"] == pytest.approx(best / results["ours"].median)
    json.dumps(line, allow_nan=False)


def test_bytes_and_flops_are_those_counted_by_hand():
    at = {x.id: x for x in (*attention.cases("cpu", True), *predict.cases("cpu", True), *small.glu_cases("cpu", True))}
    # fp32; 2 rows, 2 heads of 32: 4 queries in and out, 40 keys and values.
    block = at["attention-tiny-llada-block4x40-batch2"]
    assert block.bytes == 4 * (2 * 2 * 4 * 2 * 32 + 2 * 2 * 40 * 2 * 32)
    assert block.flops == 2 * 2 * (2 * 2 * 4 * 40 * 32)
    # 300 rows of 64 weights, 5 of hidden; out an int64 and two fp32.
    assert at["predict-tiny-llada-rows5"].bytes == 4 * (300 * 64 + 5 * 64) + 5 * 16
    assert at["predict-tiny-llada-rows5"].flops == 2 * 5 * 64 * 300
    assert at["glu-tiny-llada-swiglu-full5-batch2"].bytes == 3 * 4 * 2 * 5 * 96


@pytest.mark.parametrize(("queries", "slots", "window"), [(7, 7, 2), (3, 20, 4), (3, 20, 0), (5, 5, 99), (4, 9, None)])
def test_visible_pairs_are_counted(queries, slots, window):
    start, end, slot = (torch.tensor([n]) for n in (0, slots, slots - queries))
    assert attention.visible_pairs(queries, slots, window) == int(
        reference.visible_slots(queries, slots, start, end, slot, window).sum()
    )


def doubling(**run) -> case.Case:
    """y = 2 x, with the given implementations."""
    return case.Case(
        op="double", name="3", bytes=24, flops=3, run=run, inputs=lambda g: (torch.rand(3, generator=g) + 1,),
        check=lambda inputs: lambda out: case.compare([out], [2 * inputs[0]], [2 * inputs[0].double()]),
    )  # fmt: skip


def test_what_is_wrong_is_not_timed():
    def broken(x):
        raise RuntimeError("no such\ninstruction")

    results = timing.measure(
        doubling(ours=lambda x: x + x, other=lambda x: 2.1 * x, broken=broken, inplace=lambda x: x.mul_(2)), "cpu", True
    )
    assert len(results["ours"].times) == len(results["inplace"].times) == 2
    assert "relative error 0.05" in results["other"].error and not results["other"].times
    assert results["broken"].error == "RuntimeError: no such instruction"
    for wrong in (lambda x: 2.0001 * x, lambda x: x / 0, broken):
        with pytest.raises((timing.WrongResult, RuntimeError)):
            timing.measure(doubling(ours=wrong, other=lambda x: 2 * x), "cpu", True)


class PretendedEvent:
    """A CUDA event; each one is 3 ms after the last."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        PretendedEvent.now += 3
        self.at = self.now

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return other.at - self.at


@pytest.mark.parametrize("captured", [True, False])
def test_timer_on_a_pretended_device(monkeypatch, captured):
    """The code for GPUs, without one: it counts right, and marks what could not be captured."""
    calls = []

    class Graph:
        def replay(self):
            calls.append("replay")

    class Capture:
        def __init__(self, graph, pool):
            pass

        def __enter__(self):
            if not captured:
                raise RuntimeError("operation not permitted when stream is capturing")

        def __exit__(self, *error):
            calls.append("captured")

    for name, value in {"Event": PretendedEvent, "CUDAGraph": Graph, "graph": Capture, "empty_cache": lambda: None,
                        "synchronize": lambda: None}.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(timing, "REPLAY_SECONDS", 8e-3)
    sets = [(torch.tensor([i]),) for i in range(4)]
    timer = timing.Timer(lambda x: calls.append(int(x)), sets, "cuda")
    # A rotation took 3 ms, so three of them are a replay.
    assert timer.how == ("graph" if captured else "stream") and timer.launches == 12
    del calls[:]
    assert timer() == pytest.approx(3e-3 / 12)
    assert calls == (["replay"] if captured else [0, 1, 2, 3] * 3)


def test_turns_are_taken_and_long_ones_are_fewer():
    order = []

    def pretended(name, seconds):
        timer = timing.Timer(lambda: None, [()], "cpu")
        timer.__class__ = type("Pretended", (), {"__call__": lambda self: order.append(name) or seconds})
        return timer

    times = timing.in_turns({"a": pretended("a", 1e-3), "b": pretended("b", 0.3)}, 10)
    assert order[:6] == ["a", "b"] * 3 and len(times["a"]) == 10
    assert len(times["b"]) == timing.FEWEST_ROUNDS


@on_cpu
def test_every_bench_is_imported():
    """In a process of its own: a bench sets what it needs before it imports Triton."""
    files = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "bench").rglob("*.py")]
    names = [".".join(file.parts) for file in files if file.name != "conftest"]
    program = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    command = [sys.executable, "-c", program, *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert len(names) > 40 and done.returncode == 0, done.stderr


def test_pytest_benchmark_gets_the_times(tmp_path):
    pytest.importorskip("pytest_benchmark")
    saved = tmp_path / "saved.json"
    command = "-m pytest -q -p no:cacheprovider --import-mode=importlib bench/ops/kernels.py --quick --device cpu -k"
    # Not in an xdist worker, where pytest-benchmark does nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, *command.split(), "commit", f"--benchmark-json={saved}"],
        cwd=ROOT, env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = json.loads(done.stdout.splitlines()[-1])["rows"]
    found = {x["name"]: x for x in json.loads(saved.read_text())["benchmarks"]}
    assert len(found) == 3
    for name, result in line["implementations"].items():
        stats = found[f"test_kernel[commit-block5-batch2-{name}]"]["stats"]
        assert stats["rounds"] == 2 and stats["median"] == pytest.approx(result["seconds"])


@on_cpu
def test_candidates_replace_what_is_pinned_and_crossovers_are_found(capsys, monkeypatch):
    knob = next(x for x in tune.small_knobs("cpu", True) if x.name == "glu")
    blocks = []
    module, check, pinned = tune.glu_kernel, tune.glu_kernel.check_tensors, tune.glu_kernel.BLOCK
    monkeypatch.setattr(module, "check_tensors", lambda *a, **k: blocks.append(module.BLOCK) or check(*a, **k))
    found = tune.tune(knob, "cpu", True)
    assert set(found["relative_time"]) == {"pinned", "BLOCK=4096, 4 warps", "BLOCK=4096, 8 warps"}
    assert found["relative_time"]["pinned"] == 1 and set(blocks) == {pinned, 4096}
    assert pinned == tune.glu_kernel.BLOCK

    ahead = {"fused": {1: 1.0, 5: 3.0}, "streamed": {1: 2.0, 5: 2.0}, "compile": {1: 9.0, 5: 9.0}}

    def measured(one, device, quick):
        rows = int(one.name.rsplit("rows", 1)[1])
        return {name: timing.Result([ahead[name][rows]]) for name in one.run}

    monkeypatch.setattr(tune, "measure", measured)
    assert {x["fused_up_to"] for x in tune.crossover("cpu", True).values()} == {1}
    assert "fused is ahead up to 1 rows; streamed from 5" in capsys.readouterr().out


@pytest.mark.parametrize(("taken", "table"), [
    ({12: 0.5, 24: 0.5}, "float32:32:12"), ({12: 1.0, 24: 0.5}, "float32:32:24"), ({12: 0.5, 24: 0.96}, "never"),
])  # fmt: skip
def test_whole_attention_is_pytorchs_from_where_it_is_always_ahead(monkeypatch, capsys, taken, table):
    def measured(case, device, quick):
        queries = int(case.name.split("full")[1].split("-")[0])
        return {"ours": timing.Result([1.0]), "SDPA": timing.Result([taken[queries]])}

    monkeypatch.setattr(tune, "measure", measured)
    assert tune.whole_attention("cpu", True) == {"tiny-llada": table}
    assert f"DLLM_FAST_ATTENTION={table}\n" in capsys.readouterr().out


def test_every_knob_names_what_its_kernel_pins():
    for knobs in tune.KNOBS.values():
        for knob in knobs("cpu", False):
            for values in knob.candidates.values():
                for name, value in values.items():
                    pinned = getattr(knob.module, name)
                    assert type(value) is type(pinned)
                    assert not isinstance(pinned, dict) or set(value) <= set(pinned)
            assert knob.cases and len(knob.candidates) > 1, knob.name


@on_cpu
def test_noise_report(capsys, monkeypatch):
    monkeypatch.setattr(gumbel_kernel, "BLOCK", gumbel_kernel.BLOCK)
    monkeypatch.setattr(sys, "argv", ["noise.py", "--quick", "--device", "cpu"])
    noise.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name in noise.SAMPLERS:
        assert found["draws"][name]["ks"] < 1.628 / 16_000**0.5
        assert abs(found["vocabulary"]["grouped"][name]["T"] - 1) < 5 * found["vocabulary"]["grouped"][name]["error"]
    assert found["tail"]["draws"]["naive fp32"]["values"] == 16
    assert found["tail"]["draws"]["naive fp32"]["ks"] > 0.05 > found["tail"]["draws"]["kernel fp32"]["ks"]
    assert max(x["ulps"] for x in found["tail"]["points"]) <= 4 and found["tail"]["points"][-1]["exact"] > 45


def test_temperature_is_the_one_drawn_at():
    logits, many = noise.zipf()
    assert many.sum() == noise.VOCABULARY and len(many) == noise.GROUPS and (logits.diff() < 0).all()
    for t in (0.8, 1.0, 1.25):
        found, error = noise.temperature(logits, many, 1e6 * noise.softmax(logits, many, 1 / t))
        assert abs(found - t) < 1e-9 and 1e-5 < error < 1e-2
    generator = torch.Generator().manual_seed(5)
    drawn = torch.multinomial(noise.softmax(logits, many, 1 / 0.9), 200_000, replacement=True, generator=generator)
    found, error = noise.temperature(logits, many, torch.bincount(drawn, minlength=noise.GROUPS).double())
    assert abs(found - 0.9) < 4 * error


def test_chi_squared_is_the_textbooks():
    statistic, freedom, p = noise.chi_squared(torch.tensor([44.0, 56.0]), torch.tensor([50.0, 50.0]))
    assert (statistic, freedom) == (pytest.approx(1.44), 1) and p == pytest.approx(0.2301, abs=1e-4)
    few = noise.chi_squared(torch.tensor([3.0, 3.0, 20.0, 1.0]), torch.tensor([4.0, 2.0, 20.0, 1.0]))
    assert few[0] == 0 and few[1] == 1  # 4 + 2, 20 + 1


def piece(folder: Path, command: str, limit: float = 60) -> tuple[int, str]:
    code = gpu.run("piece", limit, ["-c", command], folder / "piece.txt", "a device, commit abc")
    return code, (folder / "piece.txt").read_text()


def test_a_piece_is_written_whole_and_known_to_have_run(tmp_path, capsys):
    code, text = piece(tmp_path, "print('one'); import sys; print('two', file=sys.stderr); sys.exit(3)")
    lines = text.splitlines()
    assert code == 3 and lines[0] == "a device, commit abc" and lines[2:4] == ["one", "two"]
    assert lines[-1].startswith("exit 3 after") and capsys.readouterr().out == text
    assert gpu.has_run(tmp_path / "piece.txt", "abc")
    assert not gpu.has_run(tmp_path / "piece.txt", "abd")
    assert not gpu.has_run(tmp_path / "other.txt", "abc")
    (tmp_path / "piece.txt").write_text("".join(text.splitlines(True)[:-1]))  # interrupted together with its machine
    assert not gpu.has_run(tmp_path / "piece.txt", "abc")


def test_a_piece_past_its_limit_keeps_what_it_printed(tmp_path):
    code, text = piece(tmp_path, "import time; print('begun'); time.sleep(60)", limit=1)
    assert code < 0 and "begun" in text and "stopped: piece ran past its 1 s" in text
    assert gpu.has_run(tmp_path / "piece.txt", "abc")


def test_a_round_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    pieces = {"a": (10, "-c 'print(1)'"), "b": (500, "-c 'print(2)'"), "c": (10, "-c 'import sys; sys.exit(1)'")}
    monkeypatch.setattr(gpu, "PIECES", pieces)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Pretended GPU")

    def round_of(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path), *arguments])
        return gpu.main(), capsys.readouterr().out

    code, out = round_of("--minutes", "1")
    assert code == 1 and out.endswith("failed: c; not started: b\n")
    assert sorted(x.name for x in (tmp_path / "pretended-gpu").iterdir()) == ["a.txt", "c.txt"]
    code, out = round_of()
    assert code == 0 and "a: has run" in out and "c: has run" in out and "\n2\n" in out
    code, out = round_of("c")
    assert code == 1 and "a: has run" not in out


def test_every_piece_names_files_that_exist():
    for limit, command in gpu.PIECES.values():
        assert limit < 540
        for word in command.split():
            assert not word.endswith(".py") or (ROOT / word).exists(), word
            assert not word.startswith("bench.") or (ROOT / f"{word.replace('.', '/')}.py").exists(), word


def test_without_a_gpu_the_round_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu.main() == 2 and "no CUDA device" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["sanitize.py"])
    assert sanitize.main() == 0 and "skipped" in capsys.readouterr().out


def test_pieces_of_the_gpu_round_fit_into_slices_of_eight_minutes():
    """Commands name existing files."""
    for name, (limit, command) in gpu.PIECES.items():
        assert limit <= 480, name
        for path in (word for word in command.split() if word.endswith(".py")):
            assert (gpu.ROOT / path).exists(), name
