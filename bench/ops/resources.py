"""What every kernel compiles to; needs no GPU. ``python -m bench.ops.resources [arch ...]``

For each shipped configuration: registers per thread, bytes spilled, bytes of shared memory, matrix instructions.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "kernels"))

from resources import MODULES, SHARED_LIMIT, measured

from dllm_fast.cli.view import print_table


def main() -> None:
    for arch in map(int, sys.argv[1:] or SHARED_LIMIT):
        rows = []
        for module in MODULES:
            for name, used in measured(module, arch).items():
                rows.append([name, *(str(x) for x in (used.registers, used.spill, used.shared, used.matrix(arch)))])
        columns = ["kernel", "registers", "spilled bytes", "shared bytes", "matrix instructions"]
        print_table(columns, rows, f"sm_{arch}")


if __name__ == "__main__":
    main()
