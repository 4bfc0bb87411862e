"""bench/generation/nfe.py: what it counts, what it refuses, what it writes; the claims' rules; the page of results."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import make_llada, make_modernbert
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import dllm_fast
from dllm_fast.decoding.options import Options
from dllm_fast.decoding.request import plan_row

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # `bench` is a folder of the checkout, not a package that is installed

from bench import task  # noqa: E402
from bench.common import SHAPES, build_model, interleave, make_job, plain_ids  # noqa: E402
from bench.generation import nfe  # noqa: E402
from bench.generation.bare import Bare  # noqa: E402
from bench.generation.cost import Cost  # noqa: E402
from bench.generation.settings import Setting, short_names, study, swept  # noqa: E402
from bench.generation.stack import PARTS, stacked  # noqa: E402
from bench.generation.watch import watching  # noqa: E402
from bench.quality import accuracy, claims  # noqa: E402
from bench.report import results as page_of_results  # noqa: E402

CPU = torch.device("cpu")
# PyTorch's counter knows only the flash attention of GPUs.
FLASH = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, **_: sdpa_flop_count(q, k, v)}


# Runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A dry run of the study's few settings on two problems, with the published sampler as a peer."""
    out = tmp_path_factory.mktemp("nfe")
    command = [sys.executable, "-m", "bench.generation.nfe", "--device", "cpu", "--model", "llada-steps", "--few"]
    command += ["--task", "steps", "--quick", "--seeds", "2", "--problems", "2", "--peer", "published"]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), out


def test_a_run_counts_evaluations_and_tokens(run):
    result, _ = run
    rows = {row["setting"]["name"]: row for row in result["speed"]["rows"]}
    assert {name: (row["nfe_full"], row["nfe_block"]) for name, row in rows.items() if "uniform" in name} == {
        "uniform=64 none": (64, 0), "uniform=16 none": (16, 0), "uniform=8 none": (8, 0), "uniform=64 dual": (2, 62),
    }  # fmt: skip
    for row in rows.values():
        assert row["new_tokens"] == 64 and row["tokens_per_nfe"] == 64 / row["nfe"]
        assert sum(kind["steps"] for kind in row["kinds"].values()) == row["nfe"]
        assert all(kind["floor_ms"] > 0 and min(kind["ms"]) > 0 for kind in row["kinds"].values())
        assert row["tokens_per_s"] == pytest.approx(64 / row["seconds"][0])
        assert set(row["ms_per_nfe"]) == set(PARTS) and min(row["ms_per_nfe"].values()) >= 0
    peers = {row["schedule"]: row for row in result["speed"]["peers"]}
    assert {"uniform=64", "uniform=16", "pyramid=1", "threshold=0.9"} <= peers.keys()
    for row in peers.values():  # in fp32 the published sampler gives our tokens in as many forwards
        assert row["same_tokens"] == row["new_tokens"] == 64 and row["same_algorithm"]
        assert row["nfe"] == rows[row["ours"]]["nfe"]


def test_a_run_is_scored_on_each_seeds_problems(run):
    result, _ = run
    for row in result["accuracy"]["rows"]:
        assert row["problems"] == 4 and [len(one["right"]) for one in row["seeds"]] == [2, 2]
        assert row["exact"] == sum(one["right"].count("1") for one in row["seeds"]) / 4
        low, high = row["interval"]
        assert 0 <= low <= row["exact"] <= high <= 1
    said = {claim["said"]: claim["verdict"] for claim in result["accuracy"]["claims"]}
    assert {"pyramid beats uniform at low NFE", "token by token is exact", "threshold 0.9 costs no accuracy"} <= set(
        said
    )
    assert set(said.values()) <= {"holds", "fails", "undecided"}


def test_a_run_leaves_its_files(run):
    result, out = run
    assert json.loads((out / "nfe-llada-steps.json").read_text()) == result
    table = list(csv.DictReader((out / "nfe-llada-steps.csv").open()))
    assert len(table) == len(result["speed"]["rows"])
    assert all(float(row["tokens_per_s"]) > 0 and row["exact"] for row in table)
    pictures = {f"nfe-llada-steps-{name}.{kind}" for name in ("speed", "accuracy", "parts") for kind in ("svg", "png")}
    assert pictures <= {path.name for path in out.iterdir()}
    page = (out / "nfe-llada-steps.html").read_text()
    fetched = re.findall(r'(?:src|srcset|href)="([^"]{,40})', page) + re.findall(r"url\(|@import|<script|<link", page)
    assert len(fetched) == 6 and all(target.startswith("data:image/svg+xml;base64,") for target in fetched)
    assert 'name="viewport"' in page and "prefers-color-scheme: dark" in page


def test_scoring_goes_on_where_it_was_cut_off(tmp_path, monkeypatch):
    command = ["--model", "llada-steps", "--task", "steps", "--schedule", "uniform=8", "uniform=16", "--cache", "none"]
    options = nfe.parse([*command, "--seeds", "1", "--problems", "1", "--out", str(tmp_path / "new")])
    subject, settings, *_ = nfe.prepare(options, torch.float32, CPU)
    scored, score = [], nfe.score

    def counted(subject, setting, *rest):
        if len(scored) == 1:
            raise KeyboardInterrupt
        scored.append(setting)
        return score(subject, setting, *rest)

    monkeypatch.setattr(nfe, "score", counted)
    with pytest.raises(KeyboardInterrupt):
        nfe.scores(options, subject, settings)
    (kept,) = (tmp_path / "new").iterdir()
    kept.write_text(kept.read_text() + '{"job": {"mod')  # even if interrupted in the middle of a write
    again = []
    monkeypatch.setattr(nfe, "score", lambda *given: again.append(given[1]) or score(*given))
    found = nfe.scores(options, subject, settings)
    assert (scored, again) == (settings[:1], settings[1:]) and not kept.exists()
    monkeypatch.undo()
    assert found == nfe.scores(options, subject, settings)
    kept.write_text(json.dumps({"job": {"model": "another"}, "row": found["rows"][0]}) + "\n")
    assert nfe.unfinished(kept, {"model": "llada-steps"}) == []


def test_random_weights_are_not_asked_how_sure_they_are(capsys):
    quick = ["--model", "quick", "--quick", "--device", "cpu"]
    for schedule in ("threshold=0.9", "factor=1", "entropy-bound=0.1"):
        assert nfe.main([*quick, "--schedule", "uniform=16", schedule]) == 2
        assert (
            f"--schedule {schedule}: quick has random weights, whose confidences mean nothing"
            in capsys.readouterr().err
        )
    assert nfe.main([*quick, "--task", "steps"]) == 2
    assert "--task: quick has random weights" in capsys.readouterr().err
    assert nfe.main(["--quick", "--device", "cpu", "--model", "llada-9b"]) == 2
    assert "--model: 'llada-9b' is neither a folder nor one of llada-gsm8k" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--schedule", "best=1"], "'best=1' is none of uniform=N"),
        (["--refresh", "never"], "'never' is none of every=N"),
        (["--peer", "vllm=/tmp"], "--peer: 'vllm' is not one of fast-dllm"),
    ],
)
def test_a_command_line_that_is_wrong_is_told_so(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        nfe.main(["--model", "quick", "--quick", *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


# Settings


def test_every_setting_of_the_study_can_be_run():
    model = dllm_fast.from_pretrained("llada-steps", dtype=torch.float32)
    family = model.__dict__["_dllm_fast"].family
    prompt = torch.arange(63) + 40
    names = set()
    for setting in study(64, full=True):
        options = Options(gen_length=64, **setting.options()).resolved(model, family)
        row = plan_row(options, family, 0, prompt)
        assert row.blocks == [(63 + at, setting.block_length) for at in range(0, 64, setting.block_length)]
        names.add(setting.name)
    few = [setting.name for setting in study(64, full=False)]
    assert len(names) == len(study(64, full=True)) and set(few) <= names and len(set(few)) == len(few)
    kinds = {name.partition("=")[0].split()[0] for name in names}
    assert kinds >= {"uniform", "pyramid", "threshold", "factor", "entropy-bound", "first-hitting", "ancestral"}


def test_each_pyramid_has_a_uniform_of_its_evaluations():
    found = {(s.schedule, s.block_length) for s in study(64, full=True)}
    for factor, length in ((1, 32), (2, 32), (4, 32), (1, 64), (2, 64), (4, 64)):
        step = len(dllm_fast.Pyramid(factor).counts(torch.tensor([length]), torch.tensor([1]), None))
        assert (f"pyramid={factor}", length) in found and (f"uniform={step * 64 // length}", length) in found


def test_a_sweep_leaves_out_what_differs_in_nothing():
    found = swept(["uniform=8", "first-hitting"], ["none", "dual"], ["block", "every=2"], ["none"],
                  ["probability", "margin"], [16])  # fmt: skip
    assert [s.name for s in found if s.kind == "first-hitting"] == [
        "first-hitting none blocks=16", "first-hitting dual blocks=16", "first-hitting dual every=2 blocks=16",
    ]  # fmt: skip
    assert not [s for s in found if s.cache == "none" and s.refresh != "block"] and len(found) == 9
    rows = [{"setting": s.facts(), "batch": batch} for s in found[:1] for batch in (1, 8)]
    assert short_names(rows) == ["uniform=8 none batch=1", "uniform=8 none batch=8"]


# Counts


def test_steps_are_watched_and_rows_are_counted_on_their_own():
    """A row of a batch has the NFE that it has alone."""
    model, tokenizer = task.load("llada-steps")
    prompts = tokenizer([prompt for prompt, _ in task.STEPS.problems(4, 7, True)], return_tensors="pt")["input_ids"]
    for extra in ({}, {"remask": dllm_fast.Verify(0.9)}, {"cache": "dual", "refresh": dllm_fast.Drift(0.2)}):
        options = {"gen_length": 64, "block_length": 16, "schedule": dllm_fast.Threshold(0.6), "cache": "none", **extra}
        with watching(look=True) as steps:
            together = dllm_fast.generate(model, prompts, **options)
        alone = [dllm_fast.generate(model, prompts[row : row + 1], **options) for row in range(4)]
        assert sum(step.positions for step in steps) == pytest.approx(together.positions, abs=1)
        assert together.row_nfe == [out.nfe for out in alone] and len({out.nfe for out in alone}) > 1
        assert "refresh" in extra or len(steps) == together.nfe
        kinds = {step.kind for step in steps}
        assert kinds == ({"full", "block", "mixed"} if "refresh" in extra else {"full"})
        assert all(step.seconds > 0 for step in steps) and steps[0].masked == 4 * 16


@pytest.mark.parametrize("steps", [8, 10, 32])
def test_llada_costs_what_its_bare_operations_count(steps):
    shape = SHAPES["quick"]
    model = build_model(shape, torch.float32, CPU)
    job = make_job(shape, model, shape.schedule, 2)
    bare = Bare(model, job, steps, fastest=False)
    cost = Cost.of(dllm_fast.patch(model))
    for queries, masked in bare.plan:
        assert cost.flops(2 * queries, 2 * bare.live, masked, bare.slots) == bare.flops(queries, masked)
    assert cost.bytes(2, bare.slots, cached=False) == bare.weight_bytes()
    cache = 2 * shape.config["n_layers"] * 2 * bare.slots * 64 * 4
    assert cost.bytes(2, bare.slots, cached=True) == bare.weight_bytes() + cache


@pytest.mark.parametrize("make, rows", [(make_llada, 1), (make_modernbert, 2)], ids=["llada", "modernbert"])
def test_a_forward_costs_what_pytorch_counts(make, rows):
    """All FLOPs of a whole forward that is shorter than any window, except those that the last layer may skip."""
    model = dllm_fast.patch(make(), impl="torch")
    cost, family = Cost.of(model), model.__dict__["_dllm_fast"].family
    ids = torch.randint(0, 40, (rows, 6))
    with FlopCounterMode(display=False, custom_mapping=FLASH) as counter, torch.no_grad():
        hidden = family.hidden(ids)
        torch.nn.functional.linear(hidden, *family.head())
    counted = sum(counter.get_flop_counts()["Global"].values())
    assert all(window is None or 2 * window + 1 >= 6 for window in cost.windows)
    assert cost.flops(rows * 6, rows * 6, rows * 6, 6) == counted


def test_a_window_is_seen_and_no_more():
    cost = Cost(every=0, rest=0, transform=0, head=0, windows=(None, 4), heads=2, kv_heads=2, head_dim=8, item=4)
    assert cost.flops(100, 10, 0, 50) == 4 * 100 * 50 * 16 + 4 * 10 * 9 * 16


def test_parts_add_up_to_the_wall():
    shape = SHAPES["quick"]
    model = build_model(shape, torch.float32, CPU)
    job = make_job(shape, model, shape.schedule, 1)
    dllm_fast.patch(model)
    before = torch.nn.functional.linear, dllm_fast.ops.attention
    options = {"gen_length": 32, "block_length": 16, "schedule": job.schedule}
    times = interleave({"run": lambda: dllm_fast.generate(model, job.ids, **options)}, 1, CPU)
    parts = stacked(lambda: dllm_fast.generate(model, job.ids, **options), CPU, times["run"].median)
    assert tuple(parts) == PARTS and all(ms > 0 for ms in parts.values())
    assert (torch.nn.functional.linear, dllm_fast.ops.attention) == before


def test_tied_weights_are_worth_generating_with():
    """Like iLLaDA: grouped keys, tied embeddings, [MASK] among the first ids."""
    config = {**SHAPES["quick"].config, "n_kv_heads": 2, "weight_tying": True, "mask_token_id": 5}
    shape = type(SHAPES["quick"])(config, 24, 32, 16, "uniform=16")
    model = build_model(shape, torch.float32, CPU)
    assert plain_ids(model.config) == (6, 998)
    job = make_job(shape, model, shape.schedule, 1)
    assert int(job.ids.min()) > 5
    dllm_fast.patch(model)
    options = {"gen_length": 32, "block_length": 16, "schedule": job.schedule}
    none, dual = (dllm_fast.generate(model, job.ids, cache=c, **options).sequences[0, -32:] for c in ("none", "dual"))
    assert len(none.unique()) >= 12 and int((none != dual).sum()) >= 10


# Statistics and claims


def test_intervals_of_shares():
    """Wilson's interval at published values; a difference's interval contains the truth in about 95 of 100 samples."""
    assert accuracy.wilson(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert accuracy.wilson(5, 10) == pytest.approx((0.23659, 0.76341), abs=1e-5)
    assert accuracy.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998
    generator = torch.Generator().manual_seed(0)
    for both, mine, its in ((0.8, 0.1, 0.05), (0.97, 0.01, 0.01), (0.5, 0.3, 0.1)):
        draw = torch.rand(2000, 200, generator=generator)
        a = (draw < both + mine).double()
        b = ((draw < both) | ((draw >= both + mine) & (draw < both + mine + its))).double()
        inside = 0
        for x, y in zip(a, b):
            middle, low, high = claims.paired(x, y)
            assert low < high and middle == pytest.approx(float(x.mean() - y.mean()))
            inside += low <= mine - its <= high
        assert 0.93 <= inside / 2000 <= 0.995


def scored(schedule: str, share: float, nfe: float, cache: str = "none", count: int = 600, **changes) -> dict:
    """A row like those of `accuracy.score`, with the first problems right."""
    right = round(share * count)
    bits = "1" * right + "0" * (count - right)
    seeds = [{"seed": 0, "right": bits, "nfe": [nfe] * count, "token": 1.0}]
    return {
        "setting": Setting(schedule, cache, **changes).facts(), "problems": count, "exact": share, "nfe": nfe,
        "interval": list(accuracy.wilson(right, count)), "token": 1.0, "seeds": seeds,
    }  # fmt: skip


def test_a_verdict_comes_with_the_figure_that_decided():
    (said,) = claims.claims([scored("uniform=16", 0.9, 16), scored("uniform=16", 0.6, 16, cache="dual")], 64)
    assert said["because"].startswith("uniform=16 dual minus uniform=16 none: -30.0 points")
    one, random = scored("uniform=64", 0.9, 64), scored("uniform=64", 0.7, 64, confidence="random")
    (said,) = claims.claims([one, random], 64)
    assert said["because"].startswith("in random order, uniform=64 none random: -20.0 points")
    (said,) = claims.claims([one, random, scored("uniform=32", 0.99, 32)], 64)
    assert said["because"].startswith("the best of 2 others, uniform=32 none: +9.0 points")


def verdicts(*rows: dict) -> dict[str, str]:
    return {claim["said"]: claim["verdict"] for claim in claims.claims(list(rows), 64)}


@pytest.mark.parametrize("share, verdict", [(0.8, "holds"), (0.7 + 1 / 600, "undecided"), (0.6, "fails")])
def test_pyramid_is_held_against_uniform_of_its_nfe(share, verdict):
    rows = [scored("pyramid=1", share, 16), scored("pyramid=4", 0.9, 28), scored("uniform=28", 0.5, 28)]
    assert verdicts(*rows, scored("uniform=16", 0.7, 16)) == {"pyramid beats uniform at low NFE": verdict}
    assert "pyramid beats uniform at low NFE" not in verdicts(rows[0], scored("uniform=8", 0.7, 8))


def test_one_token_a_step_is_exact_if_nothing_is_better_and_order_does_not_matter():
    one, said = scored("uniform=64", 0.9, 64), "token by token is exact"
    assert verdicts(one, scored("uniform=32", 0.88, 32))[said] == "holds"
    assert verdicts(one, scored("uniform=32", 0.97, 32))[said] == "fails"
    assert verdicts(one, scored("uniform=64", 0.9, 64, confidence="random"))[said] == "holds"
    assert verdicts(one, scored("uniform=64", 0.7, 64, confidence="random"))[said] == "fails"
    assert verdicts(one, scored("uniform=64", 0.9 - 1 / 60, 64, confidence="random"))[said] == "fails"


def test_a_threshold_costs_nothing_within_a_point():
    one, said = scored("uniform=64", 0.99, 64), "threshold 0.9 costs no accuracy"
    assert verdicts(one, scored("threshold=0.9", 0.99, 6))[said] == "holds"
    assert verdicts(one, scored("threshold=0.9", 0.985, 6))[said] == "undecided"
    assert verdicts(one, scored("threshold=0.9", 0.95, 6))[said] == "fails"


def test_factor_is_held_against_thresholds_curve():
    curve = [scored("threshold=0.5", 0.5, 4), scored("threshold=0.9", 0.9, 8)]
    said = "factor is better than threshold"
    assert verdicts(*curve, scored("factor=1", 0.8, 6))[said] == "holds"  # the curve has 0.7 there
    assert verdicts(*curve, scored("factor=1", 0.7, 6))[said] == "undecided"
    assert verdicts(*curve, scored("factor=1", 0.6, 6))[said] == "fails"
    assert said not in verdicts(*curve, scored("factor=1", 0.9, 12))
    found = claims.Scores(curve)
    at = torch.tensor([4.0, 5.0, 8.0], dtype=torch.float64)
    assert found.curve(["threshold=0.9 none", "threshold=0.5 none"], at)[0].tolist() == pytest.approx([0.5, 0.6, 0.9])


# docs/results.md


def test_the_pages_speeds_are_those_of_the_results(capsys):
    assert page_of_results.main(["--check"]) == 0, capsys.readouterr().err


def test_a_page_that_disagrees_is_found_and_mended(run, tmp_path):
    _, out = run
    results = tmp_path / "bench" / "results" / "cpu-2-cores"
    results.mkdir(parents=True)
    path = results / "nfe-llada-steps.json"
    path.write_text((out / "nfe-llada-steps.json").read_text())
    page = tmp_path / page_of_results.PAGE
    page.parent.mkdir()
    page.write_text(f"before\n{page_of_results.BEGIN}outdated{page_of_results.END}after\n")
    assert page_of_results.main(["--check"], tmp_path) == 1 and page_of_results.main([], tmp_path) == 0
    assert page_of_results.main(["--check"], tmp_path) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "outdated" not in text
    assert "| uniform=64 | dual | 2 + 62 |" in text and "(../bench/results/cpu-2-cores/nfe-llada-steps.csv)" in text
    path.write_text(path.read_text().replace('"trained": true', '"trained": false'))
    assert page_of_results.main(["--check"], tmp_path) == 1
    page.write_text("no marks\n")
    with pytest.raises(ValueError, match="no lines <!-- speed"):
        page_of_results.main([], tmp_path)
