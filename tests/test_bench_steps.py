"""bench.generation.steps: what each variant of a block step replaces, and the bytes of its floor."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from needs import needs_triton
from tiny import make_llada

import dllm_fast
from dllm_fast.patch import bound_family

pytestmark = needs_triton
sys.path.insert(0, str(Path(__file__).parent.parent))  # `bench` is a folder of the checkout, not a package


@pytest.fixture
def steps():
    from bench.generation import steps

    return steps


def served(weights):
    """Whether the few-rows kernel serves 32 rows of bf16 with such weights."""
    from dllm_fast.kernels import linear, linear_int4

    x = torch.empty(32, 256, dtype=torch.bfloat16)
    if weights == "int4":
        return linear_int4.fits_int4(x, torch.empty(128, 128, dtype=torch.uint8))
    return linear.fits(x, torch.empty(128, 256, dtype=torch.float8_e4m3fn if weights == "fp8" else torch.bfloat16))


@pytest.mark.parametrize("weights", [None, "fp8", "int4"])
def test_a_way_is_in_force_within_it_and_gone_after_it(steps, weights):
    from dllm_fast.kernels import linear, linear_int4, linear_rope

    module = linear_int4 if weights == "int4" else linear

    def configs():
        return module.CONFIGS if weights == "int4" else module.CONFIGS[steps.SIZES[weights]]

    before = served(weights), dict(configs()), module.PROGRAMS, module.chained
    with steps.way({"own": False}, False, 32, weights):
        assert not served(weights) and module.chained is steps.unchained
    for tiles in steps.TILES[weights]:
        with steps.way(tiles, True, 32, weights):
            assert served(weights) and module.chained is before[3]
            own = {name: value for name, value in tiles.items() if name not in ("programs", "rope")}
            assert steps.ROPE[tiles.get("rope")] == linear_rope.ROPE
            assert configs()[32] == before[1][32] | own and configs()[64] == before[1][64]
            programs = module.PROGRAMS if weights == "int4" else module.PROGRAMS[steps.SIZES[weights]]
            assert programs == tiles.get("programs", programs)
    assert (served(weights), configs(), module.PROGRAMS, module.chained) == before and steps.ROPE[
        None
    ] == linear_rope.ROPE


@pytest.mark.parametrize("head", [None, "fp8"])
@pytest.mark.parametrize("weights", [None, "fp8", "int4"])
def test_the_floor_is_the_bytes_that_are_held(steps, weights, head):
    """Bytes of weights (bf16, or rounded without e4m3's scales per row), and of keys and values."""
    model = make_llada(d_model=128, mlp_hidden_size=256).bfloat16()
    family = bound_family(dllm_fast.patch(model, weights=weights, head=head))
    if weights is None:
        held = sum(linear.weight.nbytes for group in family.groups() for linear in group)
    else:
        matrices = [vars(kept.matrix) for kept in family.matmuls.copies.values()]
        held = sum(x.nbytes for matrix in matrices for name, x in matrix.items()
                   if isinstance(x, torch.Tensor) and (weights, name) != ("fp8", "scale"))  # fmt: skip
    held += family.head_operands()[0].nbytes
    engine = SimpleNamespace(cache=SimpleNamespace(buffers=torch.empty(1000, dtype=torch.uint8)))
    assert steps.floor(family, engine, weights, head, rate=1e3) == held + 1000


@pytest.mark.parametrize("weights", [[], ["--weights", "fp8", "--quick"]], ids=["bf16", "fp8"])
def test_every_variant_is_replayed_from_a_masked_block(steps, weights, capsys, monkeypatch):
    """A dry run on the CPU: steps are run instead of recorded."""

    class Eager:
        def __init__(self, engine, step):
            self.engine, self.step = engine, step

        def replay(self):
            self.engine.run_step(self.step)

    def replay(graph, engine, mask_id):
        steps.mask_block(engine, mask_id)
        graph.replay()
        at = engine.slot[:, None] + engine.offsets
        left.append(int((engine.canvas.gather(1, at) == mask_id).sum()))
        return 1.0

    left = []
    for name, value in {"DEVICE": "cpu", "record": Eager, "replay": replay}.items():
        monkeypatch.setattr(steps, name, value)
    for name in ("copy_rate", "profile"):
        monkeypatch.setattr(steps, name, lambda *_: 1e10)
    monkeypatch.setattr(steps.floors, "product_rate", lambda *_: SimpleNamespace(median=1e12))
    monkeypatch.setattr(steps.floors, "launch_seconds", lambda _: 1e-6)
    assert steps.main(["--shape", "quick", "--rounds", "1", "--batch", "2", *weights]) == 0
    assert left[0] == 2 * 16 - 2 * 2
    lines = [line for line in capsys.readouterr().out.splitlines() if ", hidden" in line]
    assert len(lines) == 3 + 2 * (2 if weights else len(steps.TILES[None]))
