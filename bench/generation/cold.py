"""How long a cold start takes, by phase: from a new process with an empty Triton cache to the first block.

    python -m bench.generation.cold --shape llada-8b
    python -m bench.generation.cold --model PATH --dtype bfloat16

A new process starts Python, imports packages, puts a model on the device (random weights of the shape, or a folder's),
compiles and records with `dllm_fast.warmup`, and runs the shape's default job. The clock starts before the process
does. A folder's weights may be on disk or already in the system's file cache. Kernels and graphs that `warmup` missed
are counted: there should be none. Ends with one JSON line.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
AIM = 20.0  # seconds to the first block of LLaDA-8B on a GPU
PHASES = {
    "import": "Python starts and imports torch, transformers, dllm_fast",
    "weights": "model made or read, moved to the device, patched",
    "compile": "warmup compiles kernels",
    "record": "warmup runs and records steps",
    "first step": "generate's first step",
    "first block": "the rest of its first block",
}


class FirstBlock:
    """A streamer that notes when the first step and the first block end."""

    def __init__(self, wait):
        self.wait, self.step, self.block, self.calls = wait, None, None, 0

    def put_draft(self, value, sequence) -> None:
        if self.step is None:
            self.wait()
            self.step = time.time()

    def put(self, value) -> None:
        self.calls += 1
        if self.calls == 2:  # the first call brings the prompt
            self.wait()
            self.block = time.time()

    def end(self) -> None:
        pass


def child(options: argparse.Namespace) -> dict:
    """When each phase ends, in seconds since ``options.began``."""
    import torch

    import dllm_fast
    from bench.common import SHAPES, build_model, machine, make_job
    from dllm_fast.decoding.graphs import Graphs

    device, dtype, shape = torch.device(options.device), getattr(torch, options.dtype), SHAPES[options.shape]
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    ends = {"import": time.time()}
    if options.model:
        model = dllm_fast.from_pretrained(options.model, dtype=dtype, device=device)
    else:
        model = dllm_fast.patch(build_model(shape, dtype, device))
    job = make_job(shape, model, options.schedule or shape.schedule, 1)
    asked = {"gen_length": job.gen_length, "block_length": job.block_length, "schedule": job.schedule}
    wait()
    ends["weights"] = time.time()

    def note(what: str, done: int, total: int) -> None:
        if done == 1:  # the first recording: compiling is over
            ends["compile"] = time.time()

    dllm_fast.warmup(model, job.ids.shape[1], progress=note, **asked)
    wait()
    ends["record"] = time.time()
    kernels, recordings = compiled(), Graphs.recordings
    first = FirstBlock(wait)
    dllm_fast.generate(model, job.ids, streamer=first, seed=0, **asked)
    ends |= {"first step": first.step, "first block": first.block}
    return {
        "machine": machine(device, dtype), "kernels": kernels, "recordings": recordings,
        "compiled_after": compiled() - kernels, "recorded_after": Graphs.recordings - recordings,
        "ends": {phase: ends[phase] - options.began for phase in PHASES},
    }  # fmt: skip


def compiled() -> int:
    """The number of kernels in Triton's cache, where each has one file of metadata."""
    return len([path for path in Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.json") if "__grp__" not in path.name])


def start(arguments: list[str]) -> dict:
    """The results of `child`, in a new process with its own Triton cache."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "bench.generation.cold", *arguments, "--began", repr(time.time())]
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"the new process ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="cpu-768", help="see bench/common.py")
    parser.add_argument("--model", help="a folder with a LLaDA's weights, instead of the shape's random ones")
    parser.add_argument("--schedule", help="uniform=32, threshold=0.9, ...; default: the shape's")
    parser.add_argument("--device", help="default: cuda if there is one")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.began is not None:
        if options.device is None:
            import torch

            options.device = "cuda" if torch.cuda.is_available() else "cpu"
        print(json.dumps(child(options)))
        return 0
    found = start(arguments)
    print(found["machine"])
    counts = f"{found['kernels']} kernels compiled, {found['recordings']} steps recorded"
    print(
        f"{options.model or options.shape}: {counts}; after warmup {found['compiled_after']}, {found['recorded_after']}"
    )
    before = 0.0
    for phase, end in found["ends"].items():
        print(f"{end - before:8.2f} s  {phase}: {PHASES[phase]}")
        before = end
    aim = f"; the aim for llada-8b on a GPU is {AIM:g}" if options.shape == "llada-8b" else ""
    print(f"{before:8.2f} s  in all{aim}")
    print(json.dumps({"bench": "cold", "shape": options.shape, "model": options.model, **found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
