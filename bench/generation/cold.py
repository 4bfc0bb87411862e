"""From nothing to a first block: a new process, an empty Triton cache, and what each phase of the start takes.

    python -m bench.generation.cold --shape llada-8b
    python -m bench.generation.cold --model PATH --dtype bfloat16

A process of its own starts Python, imports, gets a model onto the device (random weights of the shape, or those of a
folder), compiles and records with `dllm_fast.warmup`, and generates with the shape's usual job. The clock begins
before that process is started. Weights of a folder come from its disk or from the system's memory, as they happen to
lie. What `warmup` leaves to be compiled or recorded is counted, and should be nothing. Ends with one JSON line.
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
    "import": "Python starts, imports torch, transformers, dllm_fast",
    "weights": "made or read, on the device, patched",
    "compile": "warmup compiles kernels",
    "record": "warmup takes and records steps",
    "first step": "generate's first step",
    "first block": "the rest of its first block",
}


class FirstBlock:
    """A streamer that notes when the first step has ended, and when the first block is there."""

    def __init__(self, wait):
        self.wait, self.step, self.block, self.calls = wait, None, None, 0

    def put_draft(self, value, sequence) -> None:
        if self.step is None:
            self.wait()
            self.step = time.time()

    def put(self, value) -> None:
        self.calls += 1
        if self.calls == 2:  # the first is the prompt
            self.wait()
            self.block = time.time()

    def end(self) -> None:
        pass


def child(options: argparse.Namespace) -> dict:
    """The phases' ends, in seconds since ``options.began``."""
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
        if done == 1:  # of one engine: the compiling is over
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
    """Kernels in Triton's cache: each has a file of metadata there beside its code."""
    return len([path for path in Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.json") if "__grp__" not in path.name])


def start(arguments: list[str]) -> dict:
    """What `child` finds in a new process with a Triton cache of its own."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "bench.generation.cold", *arguments, "--began", repr(time.time())]
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"the process that starts cold ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="cpu-768", help="see bench/common.py")
    parser.add_argument("--model", help="a folder with a LLaDA's weights, instead of random ones of the shape")
    parser.add_argument("--schedule", help="uniform:32, threshold:0.9 and so on; default: the shape's")
    parser.add_argument("--device", help="default: cuda where it is")
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
