"""Every kernel, compiled for chips that are not here: no spills, no more shared memory than there is, matrix units."""

import importlib

import pytest
from resources import MODULES, SHARED_LIMIT, measured


@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize("module", MODULES)
def test_fits(module, arch):
    cases = {case.name: case for case in importlib.import_module(module).CASES if arch in case.archs}
    complaints = []
    for name, used in measured(module, arch).items():
        instructions = used.matrix(arch)
        # The big matrix instructions of sm_90 and sm_100 take 64 rows; smaller tiles do without.
        rows = cases[name].constexprs.get("BM", 64)
        if used.spill:
            complaints.append(f"{name}: {used.spill} bytes spilled")
        if used.shared > SHARED_LIMIT[arch]:
            complaints.append(f"{name}: {used.shared} bytes of shared memory")
        if cases[name].matrix and (arch == 80 or rows >= 64) and not instructions:
            complaints.append(f"{name}: no matrix instructions")
    assert not complaints, "\n".join([f"sm_{arch}", *complaints])
