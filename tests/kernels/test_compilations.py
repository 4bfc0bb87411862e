"""How many kernels Triton compiles for LLaDA's generation loop; needs no GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from needs import needs_watched

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent.parent
# The only integers that may be multiples of 16 in some launches of a run and not in others; they depend on the block.
VARY = {"commit._commit_kernel T % 16", "predict._compact_kernel N % 16"}


@needs_watched
def test_what_a_run_is_asked_for_changes_few_compilations():
    command = [sys.executable, "-m", "bench.generation.compilations", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    found = json.loads(lines[-1])
    added = found["added"]
    assert added["768 + 256, dual cache"] > 0 and set(found["kernels"]) >= {"norm._norm_kernel", "rope._rope_kernel"}
    assert added["batch 3"] == 0, "after batches of 1 and 8, no batch size adds kernels"
    # A schedule, a sampler, a guided head and a block length add one kernel each, or two if blocks are ragged.
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
