"""Compiles kernels for GPUs that need not be present, and reads their registers, spills, shared memory and
instructions.

`measure` needs a process without TRITON_INTERPRET; `measured` starts one for a module of cases:

    CASES = [Case("name", _kernel, {"x_ptr": "*bf16", "n": "i32"}, {"BLOCK": 128}, num_warps=4, num_stages=2)]

Pointers count as 16-byte aligned, like PyTorch's allocations. An integer of type "i32:16" counts as a multiple of 16,
as if a launch had found that.
"""

import dataclasses
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

MODULES = ("compile_cases_attention", "compile_cases_predict")  # all shipped kernels
SHARED_LIMIT = {  # bytes that a block may use, by architecture
    80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024,
}  # fmt: skip
INEXACT = r"\b[a-z0-9]+\.(?:approx|full)\.(?:ftz\.)?f32\b"
BIG = (90, 100)  # launchers use other tiles on these
SMALL = tuple(arch for arch in SHARED_LIMIT if arch not in BIG)


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    fn: object  # the @triton.jit function
    signature: dict  # argument name -> Triton type, without constexprs
    constexprs: dict  # argument name -> value
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None  # registers a thread, at most
    matrix: bool = False  # whether it must use matrix units; their instructions are counted only then
    archs: tuple = tuple(SHARED_LIMIT)  # architectures to compile for


@dataclasses.dataclass(frozen=True)
class Resources:
    registers: int  # a thread
    spill: int  # bytes a thread
    shared: int  # bytes a block
    hgmma: int  # warp-group matrix instructions (sm_90)
    hmma: int  # warp matrix instructions
    tcgen05: int  # tensor-memory matrix instructions (sm_100)
    inexact: list[str]  # PTX instructions that approximate an fp32 function, without ".ftz"

    def matrix(self, arch: int) -> int:
        """The matrix instructions that a kernel should use on ``arch``."""
        return {90: self.hgmma, 100: self.tcgen05}.get(arch, self.hmma)


def measure(case: Case, arch: int) -> Resources:
    """Compile ``case`` for compute capability ``arch`` (80, 90, 100, ...) and read the result."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dllm_fast.kernels.chain import WAITS

    signature, attrs = {}, {}
    constexprs = dict(case.constexprs)
    if "CHAINED" in case.fn.arg_names:
        constexprs["CHAINED"] = arch >= 90 and WAITS  # the same as in `chain.chained`
    for i, name in enumerate(case.fn.arg_names):
        kind, _, multiple = case.signature.get(name, "constexpr").partition(":")
        if (kind == "constexpr") != (name in constexprs):
            raise ValueError(f"{case.name}: argument {name} must be in exactly one of signature and constexprs")
        signature[name] = kind
        if kind.startswith("*") or multiple == "16":
            attrs[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(case.fn, signature, constexprs, attrs)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "maxnreg": case.maxnreg}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)

    tool = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = pathlib.Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        # Disassembling takes longer than the rest of a cached compilation, so only on request.
        command = [tool, "-res-usage", *["-sass"] * case.matrix, cubin]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", listing)}
    return Resources(
        registers=used["REG"],
        spill=used["STACK"] + used["LOCAL"],
        shared=compiled.metadata.shared,
        hgmma=len(re.findall(r"\b[HQ]GMMA\b", listing)),
        hmma=len(re.findall(r"\bHMMA\b", listing)),
        tcgen05=len(re.findall(r"\bUTC[A-Z]*MMA\b", listing)),
        inexact=sorted({name.replace(".ftz", "") for name in re.findall(INEXACT, compiled.asm["ptx"])}),
    )


def measured(module: str, arch: int, share: int = 1) -> dict[str, Resources]:
    """`measure` of every ``share``-th case in ``module.CASES`` (a module of this folder), in a new process."""
    here = pathlib.Path(__file__).resolve()
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # The repository too: a child process does not inherit pytest's sys.path, which finds an uninstalled package.
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(here.parents[2]), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(here), module, str(arch), str(share)]
    child = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    if child.returncode:
        raise RuntimeError(f"{module} did not compile for sm_{arch}:\n{child.stderr[-4000:]}")
    return {name: Resources(**row) for name, row in json.loads(child.stdout.splitlines()[-1]).items()}


if __name__ == "__main__":
    arch, share = int(sys.argv[2]), int(sys.argv[3])
    cases = [case for case in importlib.import_module(sys.argv[1]).CASES if arch in case.archs]
    # Each architecture starts with another case, so that together they cover more cases.
    cases = cases[arch % share :: share]
    print(json.dumps({case.name: dataclasses.asdict(measure(case, arch)) for case in cases}))
