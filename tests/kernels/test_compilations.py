"""How many kernels Triton compiles over LLaDA's loop, for a card that is not here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent.parent
# Integers that may be multiples of 16 at one launch of a run and not at another: of the block length alone.
VARY = {"commit._commit_kernel T % 16", "predict._compact_kernel N % 16"}


def test_what_a_run_is_asked_for_changes_few_compilations():
    command = [sys.executable, "-m", "bench.generation.compilations", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    found = json.loads(lines[-1])
    added = found["added"]
    assert added["768 + 256, dual cache"] > 0 and set(found["kernels"]) >= {"norm._norm_kernel", "rope._rope_kernel"}
    assert added["batch 3"] == 0, "beside batches of 1 and 8 none has kernels of its own"
    # A rule, a sampler, a guided product and a block length: one kernel each, and two where blocks are ragged.
    for name in ("threshold 0.9", "temperature 0.7", "guidance", "blocks of 64"):
        assert added[name] <= 1, name
    assert added["blocks of 24"] <= 2
    kernel, varying = None, set()
    for line in lines[len(added) : -1]:
        if not line.startswith(" "):
            kernel = line.partition(":")[0]
        elif "_ptr" not in line and "% 16" in line:
            varying.add(f"{kernel} {line.strip().partition(':')[0]}")
    assert varying <= VARY
