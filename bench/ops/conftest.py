"""pytest hooks for `bench/ops/kernels.py`: options, a test per case and implementation, the table, the JSON line."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from bench.floors import measure as measure_floors
from bench.ops.cases import attention, case, loss, predict, small
from bench.ops.timing import measure
from bench.report import tables

MAKERS = (attention.cases, predict.cases, small.norm_cases, small.rope_cases, small.glu_cases, small.commit_cases,
          small.gumbel_cases, loss.cases)  # fmt: skip
STATE = {"rows": [], "results": {}, "floors": None}


def pytest_addoption(parser):
    parser.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.addoption("--quick", action="store_true", help="tiny shapes, for a dry run")


def pytest_configure(config):
    config.option.benchmark_quiet = True  # our table is the report; without pytest-benchmark this option does nothing
    config.addinivalue_line("markers", "benchmark: pytest-benchmark's")


def pytest_generate_tests(metafunc):
    if "implementation" not in metafunc.fixturenames:
        return
    options = metafunc.config.option
    all_cases = [x for cases in MAKERS for x in cases(options.device, options.quick)]
    clock = metafunc.module.CLOCK
    values = [
        pytest.param(x, name, id=f"{x.id}-{name}", marks=pytest.mark.benchmark(group=x.id, timer=clock))
        for x in all_cases
        for name in x.run
    ]
    metafunc.parametrize(("case", "implementation"), values)


@pytest.fixture
def measured(request):
    """`bench.ops.timing.measure` of a case, run and printed once."""
    device, quick = request.config.option.device, request.config.option.quick
    capture = request.config.pluginmanager.get_plugin("capturemanager")

    def write(text):
        with capture.global_and_fixture_disabled():
            print(text, flush=True)

    def once(one):
        if STATE["floors"] is None:
            STATE["floors"] = measure_floors(device, quick)
            write(f"\n{case.peers_here()}")
        if one.id not in STATE["results"]:
            write(f"\n{one.id}")
            try:
                found = STATE["results"][one.id] = measure(one, device, quick)
            except Exception as error:
                STATE["results"][one.id] = error
                raise
            for name, result in found.items():
                write(tables.line(one, name, result))
            STATE["rows"].append(tables.row(one, found, STATE["floors"]))
            write(tables.verdict(STATE["rows"][-1]))
        if isinstance(STATE["results"][one.id], Exception):
            pytest.fail(f"ours failed: {STATE['results'][one.id]}", pytrace=False)
        return STATE["results"][one.id]

    return once


def pytest_unconfigure(config):
    """Print after pytest's own summary, so that the JSON line comes last."""
    if STATE["rows"]:
        tables.table(STATE["rows"], STATE["results"])
        print(tables.summary(STATE["rows"], STATE["floors"], case.peers_here()))
