"""The cost model of a step: its floors are the documented ones, its kernels the ones that a step launches."""

import dataclasses
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from needs import needs_triton, needs_watched
from tiny import EOS, make_llada, make_modernbert

import dllm_fast
from dllm_fast.decoding.engine import Engine

sys.path.insert(0, str(Path(__file__).parent.parent))  # `bench` is a folder of the checkout

from bench.generation import cost as paper
from bench.generation.cost import Card, Cost, Kernel, by_group, floor, shape_cost, step_kernels

H200 = Card(copy=4.19e12, matrix=779e12)  # as measured there, bench/results/nvidia-h200
BLOCK, WHOLE = (1, 1024, 32, 32, 32), (1, 1024, 1024, 32, 32)  # batch, slots, positions, live, masked
# Launches of a step on an H200 by kernel, from profiles (bench/results/nvidia-h200/steps.txt and steps-fp8.txt, and a
# run of whole steps only). There the last program merged attention's parts; now a kernel does. A cuBLAS kernel with
# splitK in its name counts twice, for its sums.
PROFILES = {
    ("block", None): {
        "": 128, "splitKreduce": 64, "_attention_kernel": 32, "_norm_kernel": 65, "_combine_kernel": 1,
        "_merge_kernel": 32, "_rope_kernel": 32, "_glu_kernel": 32, "_predict_kernel": 1,
    },
    ("block", "fp8"): {
        "_linear_kernel": 128, "_attention_kernel": 32, "_norm_kernel": 65, "_combine_kernel": 1, "_merge_kernel": 32,
        "_rope_kernel": 32, "_predict_kernel": 1, "_commit_kernel": 1,
    },
    ("whole", None): {
        "": 128, "splitKreduce": 2, "_attention_kernel": 32, "_norm_kernel": 65, "_combine_kernel": 1,
        "_merge_kernel": 1, "_rope_kernel": 32, "_glu_kernel": 32, "_predict_kernel": 1, "_commit_kernel": 1,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def llada_8b():
    return shape_cost("llada-8b")


def launches(kernels: list[Kernel]) -> Counter:
    found = Counter()
    for kernel in kernels:
        found[kernel.name] += kernel.launches
    return found


@needs_triton
def test_floors_are_those_of_the_h200(llada_8b):
    assert floor(llada_8b, H200, *BLOCK) / 1e3 == pytest.approx(3.71, abs=0.005)
    assert floor(llada_8b, H200, *BLOCK, "fp8") / 1e3 == pytest.approx(2.04, abs=0.005)
    # The 19.06 of the whole step runs every row through the last layer, without an LM head.
    assert llada_8b.flops(1024, 1024, 0, 1024) / H200.matrix * 1e3 == pytest.approx(19.06, abs=0.01)
    assert 18.6 < floor(llada_8b, H200, *WHOLE) / 1e3 < 19.06
    assert 9 < floor(llada_8b, H200, *WHOLE, "fp8") / 1e3 < 11


@needs_triton
@pytest.mark.parametrize(("kind", "weights"), PROFILES, ids=str)
def test_launches_are_those_of_the_h200(kind, weights, llada_8b):
    found = launches(step_kernels(llada_8b, H200, *(BLOCK if kind == "block" else WHOLE), weights))
    expected = PROFILES[kind, weights]
    assert {name: found[name] for name in expected} == expected
    # Kernels so short that a profile of the longest ones leaves them out.
    assert found.keys() - expected.keys() <= {"_compact_kernel", "_commit_kernel"}


@needs_triton
@needs_watched
@pytest.mark.skipif(torch.cuda.is_available(), reason="counts launches of the interpreter")
@pytest.mark.parametrize("weights", [None, "fp8", "int4"])
@pytest.mark.parametrize("family", ["llada", "modernbert"])
def test_a_step_launches_these_kernels(family, weights, monkeypatch):
    """In the interpreter: a change to a layer's kernels must be made in `bench.generation.cost._layer` too."""
    from triton.runtime.interpreter import InterpretedFunction

    if family == "llada":
        model = make_llada(d_model=128, n_heads=2, n_layers=2, mlp_hidden_size=128).half()
    else:
        model = make_modernbert(hidden_size=128, num_hidden_layers=2, intermediate_size=128).half()
    monkeypatch.setattr("dllm_fast.families.linears.pays", lambda weight: True)  # as on a GPU
    dllm_fast.patch(model, impl="triton", weights=weights)
    found, steps, run, run_step = Counter(), {}, InterpretedFunction.run, Engine.run_step

    def counted(self, *args, **options):
        found[self.fn.__name__] += 1
        return run(self, *args, **options)

    def watched(self, step):
        found.clear()
        before = matmul.call_count
        run_step(self, step)
        steps[step.kind] = self, found + Counter({"": matmul.call_count - before})

    monkeypatch.setattr(InterpretedFunction, "run", counted)
    monkeypatch.setattr(Engine, "run_step", watched)
    ids = torch.randint(0, EOS, (1, 6), generator=torch.Generator().manual_seed(0))
    with mock.patch.object(F, "linear", wraps=F.linear) as matmul:
        dllm_fast.generate(model, ids, gen_length=4, block_length=4, schedule=dllm_fast.Uniform(2))
    for kind, (engine, launched) in steps.items():
        positions = engine.block_size if kind == "block" else engine.slots
        shape = 1, engine.slots, positions, engine.block_size, engine.block_size
        expected = launches(step_kernels(Cost.of(model), H200, *shape, weights))
        del expected["splitKreduce"]  # cuBLAS's own
        assert launched == +expected
    assert steps.keys() == {"full", "block"}


@needs_triton
def test_a_kernel_takes_its_bytes_or_its_flops_and_its_launches():
    card = Card(copy=1e12, matrix=1e13, launch=2e-6)
    assert Kernel("", "_norm_kernel", 3, 1e6).microseconds(card) == pytest.approx(1 + 3 * 2)
    assert Kernel("", "", 1, 1e6, 1e8).microseconds(card) == pytest.approx(10 + 2)
    assert Kernel("", "", 1, 1e6, 1e8, narrow=True).microseconds(card) == pytest.approx(5 + 2)
    kernels = [Kernel("a", "_norm_kernel", 1, 1e6), Kernel("b", "_rope_kernel", 1, 1e6), Kernel("c", "", 1, 0)]
    assert by_group(kernels, card) == pytest.approx({"norm, rope, gate": 6, "matmuls": 2})


@needs_triton
def test_bytes_of_rounded_weights(llada_8b):
    """A layer's weights take half or a quarter of the bytes, plus 3 %; the head is in bf16."""
    layers = 32 * (4 * 4096**2 + 3 * 4096 * 12288)
    own, fp8, int4 = (sum(k.bytes for k in step_kernels(llada_8b, H200, *BLOCK, w)) for w in (None, "fp8", "int4"))
    # And what separate kernels move: that of the gate, and that of the rotation, which only int4's matmul does too.
    assert own - fp8 == pytest.approx(layers + 32 * 4 * 32 * 12288 * 2)
    assert fp8 - int4 == pytest.approx(layers * (0.5 - 3 / 128) + 32 * 2 * 32 * 3 * 4096 * 2)


@needs_triton
def test_a_head_in_e4m3(llada_8b):
    """A block's rows read half the bytes and a scale a row; many rows widen the weight and scale the logits first."""

    def kernels(step, head):
        return {kernel.what: kernel for kernel in step_kernels(llada_8b, H200, *step, None, head)}

    own, rounded = (kernels(BLOCK, head)["LM head, selection"] for head in (None, "fp8"))
    assert own.bytes - rounded.bytes == 126464 * (4096 - 4)
    assert (own.microseconds(H200), rounded.microseconds(H200)) == pytest.approx((247, 124), abs=0.5)
    least = floor(llada_8b, H200, *BLOCK, "fp8") - floor(llada_8b, H200, *BLOCK, "fp8", "fp8")
    assert least == pytest.approx(1e6 * 126464 * 4096 / H200.copy)
    many = 8, 1024, 32, 32, 256
    own, rounded = (kernels(many, head) for head in (None, "fp8"))
    assert rounded.keys() - own.keys() == {"LM head from e4m3", "logits times scales"}
    assert all(rounded[what] == kernel for what, kernel in own.items())


@needs_triton
def test_it_prints_both_steps(capsys):
    assert paper.main(["--copy", "4.19e12", "--matrix", "779e12", "--batch", "8", "--weights", "int4"]) == 0
    out = capsys.readouterr().out
    assert "a block step: 8 x 32 positions of 1024 slots, int4 weights" in " ".join(out.split())
    assert out.count("floor ") == 2


@needs_triton
def test_modernberts_windows():
    """A sliding layer's queries see 17 slots, and its block of 8 reaches 24; nothing of the others' is left out."""
    cost = Cost.of(dllm_fast.patch(make_modernbert(), impl="torch"))
    wide = dataclasses.replace(cost, windows=(None,) * 5)
    found, whole = (
        next(kernel for kernel in step_kernels(one, H200, 1, 512, 8, 8, 8) if kernel.what == "attention")
        for one in (cost, wide)
    )
    sliding = len([window for window in cost.windows if window is not None])
    assert sliding == 3 and set(cost.windows) == {None, 8}
    assert whole.flops - found.flops == sliding * 4 * 8 * 64 * (512 - 17)
    kernels = step_kernels(cost, H200, 1, 512, 8, 8, 8)
    assert sum(kernel.flops for kernel in kernels) == cost.flops(8, 8, 8, 512)
