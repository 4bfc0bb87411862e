"""How many kernels Triton would compile for LLaDA's generation loop; needs no GPU.

    python -m bench.generation.compilations [--quick]

Triton sees a stand-in for an H100. The launchers run with tensors of the model's sizes, and Triton finds which kernels
each launch would compile, by the same rules as on that card: dtypes, constants, alignments, integers equal to 1 or
divisible by 16. Nothing is compiled, launched or computed. The steps are those of `dllm_fast.warmup`, and the jobs are
warmed up one after the other. Prints how many kernels each job adds, and how each kernel's compilations differ. Ends
with one JSON line.
"""

import argparse
import contextlib
import json
import os
import sys
from collections import defaultdict
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import dllm_fast
from dllm_fast import LLaDAConfig, LLaDAModelLM, Threshold, Uniform, Window, launchers
from dllm_fast.decoding.graphs import Graphs
from dllm_fast.kernels import chain, predict

QUICK = {"d_model": 512, "n_heads": 4, "mlp_hidden_size": 1536, "vocab_size": 2528, "mask_token_id": 2527}
USUAL = {"gen_length": 256, "block_length": 32, "schedule": Uniform(88)}
JOBS = {  # prompt lengths, batch size, options
    "768 + 256, dual cache": (768, 1, {}),
    "other lengths": ([30, 90, 200, 300, 500, 1000, 2000], 1, {}),
    "batch 8": (768, 8, {}),
    "batch 3": (768, 3, {}),
    "window 32,0": (768, 1, {"refresh": Window(32, 0)}),
    "prefix cache": (768, 1, {"cache": "prefix"}),
    "threshold 0.9": (768, 1, {"schedule": Threshold(0.9)}),
    "temperature 0.7": (768, 1, {"temperature": 0.7}),
    "guidance": (768, 1, {"cfg_scale": 1.0}),
    "blocks of 64": (768, 1, {"block_length": 64}),
    "blocks of 24": (768, 1, {"block_length": 24, "gen_length": 240, "schedule": Uniform(80)}),
}


class Card:
    """A stand-in for the driver of a GPU with compute capability 9.0."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def chained(device, programs: int) -> dict:
    """`chain.chained` on that card."""
    return {"CHAINED": True, "launch_pdl": True} if programs <= chain.PROGRAMS else {"CHAINED": False}


@contextlib.contextmanager
def noted(found: dict[str, list[dict]]):
    """Make launches do nothing but add what they would compile to ``found``, by kernel."""
    run = JITFunction.run

    def only_compile(self, *args, grid, warmup, **options):
        return run(self, *args, grid=grid, warmup=True, **options)

    def compile_nothing(self, key, signature, device, constexprs, options, attrs, warmup):
        names = list(self.signature.parameters)
        facts = {name: kind for name, kind in signature.items() if kind != "constexpr"}
        facts |= {names[at[0]]: value for at, value in constexprs.items()}
        facts |= {f"{names[at[0]]} % 16": "0" for at, kinds in attrs.items() if kinds}
        facts["warps"] = options.num_warps
        found[f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}"].append(facts)
        kernel = self.device_caches[device][0][key] = object()
        return kernel

    def empty_product(x, weight, bias=None):
        return x.new_empty(*x.shape[:-1], weight.shape[0])

    # In the package: kernels are chosen, steps are laid out as for recording but never recorded, and nothing reads the
    # weights' values.
    modules = [m for name, m in sys.modules.items() if name.startswith("dllm_fast.kernels.") and hasattr(m, "chained")]
    warmup, server, patch = (sys.modules[f"dllm_fast.{name}"] for name in ("warmup", "decoding.server", "patch"))
    stand_ins = [(JITFunction, "run", only_compile), (JITFunction, "_do_compile", compile_nothing)]
    stand_ins += [(module, "chained", chained) for module in modules]
    stand_ins += [(torch.nn.functional, "linear", empty_product), (predict, "_logits", empty_product)]
    stand_ins += [(launchers, "obstacle", lambda *_: None), (patch, "_check_weights", lambda model: None)]
    stand_ins += [(module, "records", lambda *_: True) for module in (warmup, server)]
    stand_ins += [(Graphs, "run", lambda self, key, step: step()), (warmup, "kernels", lambda: [])]
    with contextlib.ExitStack() as stack:
        for owner, name, value in stand_ins:
            stack.enter_context(mock.patch.object(owner, name, value))
        driver.set_active(Card())
        yield


def differences(compilations: list[dict]) -> list[str]:
    """The arguments that differ, with their values."""
    names = sorted({name for facts in compilations for name in facts})
    values = {name: sorted({str(facts.get(name, "")) for facts in compilations}) for name in names}
    return [f"{name}: {' '.join(kinds)}" for name, kinds in values.items() if len(kinds) > 1]


def count(quick: bool) -> dict:
    found: dict[str, list[dict]] = defaultdict(list)
    added, total = {}, 0
    with torch.device("meta"):
        model = LLaDAModelLM(LLaDAConfig(n_layers=2, **(QUICK if quick else {}))).to(torch.bfloat16).eval()
    model.to_empty(device="cpu")
    launchers.triton()  # imports the kernels
    with noted(found):
        dllm_fast.patch(model, impl="triton")
        for name, (lengths, batch, options) in JOBS.items():
            dllm_fast.warmup(model, lengths, batch, progress=False, **{**USUAL, **options})
            before, total = total, sum(map(len, found.values()))
            added[name] = total - before
            print(f"{name:<24}{added[name]:>3} more, {total:>3} in all", flush=True)
    for kernel, compilations in sorted(found.items()):
        print(f"{kernel}: {len(compilations)}")
        for line in differences(compilations):
            print(f"    {line}")
    return {"added": added, "kernels": {kernel: len(compilations) for kernel, compilations in found.items()}}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a narrow model with a small vocabulary")
    options = parser.parse_args(arguments)
    print(json.dumps({"bench": "compilations", "quick": options.quick, **count(options.quick)}))


if __name__ == "__main__":
    main()
