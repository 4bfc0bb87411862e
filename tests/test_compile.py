"""`torch.compile` of a patched model: one graph without a mask, the same logits, always with the current weights.

The backend is ``aot_eager``, which traces, functionalises and runs without a compiler; one case goes through Inductor.
"""

import pytest
import torch
from environments import has_compiler
from tiny import make_llada, make_modernbert

import dllm_fast
from dllm_fast.cpu import compiled as compiled_ops
from dllm_fast.patch import bound_family

MAKERS = {
    "llada": lambda: make_llada(n_layers=2, n_kv_heads=2),
    "modernbert": lambda: make_modernbert(num_hidden_layers=2, global_attn_every_n_layers=2),
}
LINEARS = {("llada", None): 7, ("modernbert", None): 4}  # a layer
LINEARS |= {(family, weights): 4 for family in MAKERS for weights in ("fp8", "int4")}
REST = {"llada": 1, "modernbert": 2}  # the head
PRODUCTS = (torch.nn.functional.linear, compiled_ops.linear)


class Counting:
    """``aot_eager``, counting graphs and their matmuls."""

    def __init__(self):
        self.graphs = self.linears = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        self.linears += sum(node.target in PRODUCTS for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def close(got, expected):
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("weights", [None, "fp8", "int4"])
@pytest.mark.parametrize("family", MAKERS)
def test_a_patched_model_compiles_to_one_graph(family, weights, ids):
    model = dllm_fast.patch(MAKERS[family](), weights=weights)
    backend = Counting()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    close(compiled(ids).logits, model(ids).logits)
    assert (backend.graphs, backend.linears) == (1, 2 * LINEARS[family, weights] + REST[family])
    if weights is None:
        close(compiled(ids[:, :16]).logits, model(ids[:, :16]).logits)  # another length


@torch.no_grad()
@pytest.mark.parametrize("family", MAKERS)
def test_a_mask_costs_a_graph_break_and_nothing_else(family, ids, padded):
    """The host reads whether a row has a hole, but the layers are compiled all the same."""
    model = dllm_fast.patch(MAKERS[family]())
    backend = Counting()
    compiled = torch.compile(model, backend=backend)
    valid = padded.bool()
    close(compiled(ids, attention_mask=padded).logits[valid], model(ids, attention_mask=padded).logits[valid])
    assert backend.linears == 2 * LINEARS[family, None] + REST[family]


@torch.no_grad()
@pytest.mark.parametrize("weights", [None, "fp8", "int4"])
def test_a_compiled_model_follows_its_weights(weights, ids):
    """Weights written in place, moved apart, fused again: no stale value is compiled in. e4m3 copies follow a patch."""
    model = dllm_fast.patch(MAKERS["llada"](), weights=weights)
    compiled = torch.compile(model, backend="aot_eager")
    before = compiled(ids).logits
    for parameter in model.parameters():
        parameter.mul_(1.1)
    dllm_fast.patch(model, weights=weights)
    assert not torch.allclose(compiled(ids).logits, before, atol=1e-3)
    close(compiled(ids).logits, model(ids).logits)
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.1
    if weights is None:
        close(compiled(ids).logits, model(ids).logits)
    bound_family(dllm_fast.patch(model, weights=weights))
    close(compiled(ids).logits, model(ids).logits)


@torch.no_grad()
def test_compiling_survives_patching_and_unpatching(ids):
    model = MAKERS["llada"]()
    own = model(ids).logits
    compiled = torch.compile(model, backend="aot_eager")
    close(compiled(ids).logits, own)
    dllm_fast.patch(model, weights="fp8")
    rounded = model(ids).logits
    assert not torch.allclose(rounded, own, atol=1e-3)
    close(compiled(ids).logits, rounded)
    dllm_fast.unpatch(model)
    close(compiled(ids).logits, own)


@pytest.mark.long
@torch.no_grad()
@pytest.mark.skipif(not has_compiler(), reason="Inductor needs a C++ compiler, and none answers")
@pytest.mark.skipif(" " in torch.__file__, reason="Inductor does not quote the path of PyTorch, which has a space here")
def test_inductor_compiles_a_patched_model(ids, tmp_path, monkeypatch):
    # Inductor's cache ignores ATEN_CPU_CAPABILITY: cached code for longer vectors fails or gives wrong results.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = dllm_fast.patch(make_llada(n_layers=1))
    close(torch.compile(model, fullgraph=True)(ids).logits, model(ids).logits)
