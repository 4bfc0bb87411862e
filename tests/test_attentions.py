"""Which attention serves whole sequences on a GPU: chosen by card and shape, printed, set by hand, and recorded."""

import warnings

import pytest
import torch
from needs import needs_triton
from recording import Recorder, launchers_of_pytorch
from test_config import shown
from tiny import make_llada, make_modernbert

import dllm_fast
from dllm_fast import Drift, Uniform, Window, attentions, config, ops
from dllm_fast.kernels import reference
from dllm_fast.patch import bound_pool

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def unsettled(monkeypatch):
    """As in a new process, with no table settled or set."""
    monkeypatch.setattr(attentions, "pytorch_from", {})
    monkeypatch.delenv("DLLM_FAST_ATTENTION", raising=False)


@pytest.fixture
def served(monkeypatch):
    """The (queries, slots) of each call of PyTorch's attention."""
    calls, own = [], torch.nn.functional.scaled_dot_product_attention

    def counted(q, keys, values, **options):
        calls.append((q.shape[2], keys.shape[2]))
        return own(q, keys, values, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    return calls


def card(monkeypatch, name):
    """A stand-in for the device."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)


@pytest.mark.parametrize(
    ("name", "dtype", "heads", "dim", "queries", "expected"),
    [
        ("NVIDIA H200", BF16, (32, 32), 128, 1024, True),
        ("NVIDIA H200", BF16, (32, 32), 128, 16384, True),
        ("NVIDIA H200", BF16, (32, 32), 128, 1023, False),
        ("NVIDIA H200", BF16, (32, 8), 128, 1024, False),
        ("NVIDIA H200", BF16, (12, 12), 64, 1024, False),
        ("NVIDIA H200", FP16, (32, 32), 128, 1024, False),
        ("NVIDIA H200", FP32, (32, 32), 128, 1024, False),
        ("NVIDIA H100 80GB HBM3", BF16, (32, 32), 128, 1024, False),
    ],
)
def test_it_is_pytorchs_where_that_was_measured_and_nowhere_else(
    monkeypatch, name, dtype, heads, dim, queries, expected
):
    card(monkeypatch, name)
    attentions.settle(CUDA)
    assert attentions.serves(CUDA, dtype, *heads, dim, queries) == expected
    assert not attentions.serves(CPU, dtype, *heads, dim, queries)


def test_the_card_is_asked_once_and_what_is_printed_fixes_it_on_any_other(monkeypatch):
    card(monkeypatch, "NVIDIA H200")
    printed = attentions.table(CUDA)
    assert printed == "bfloat16:128:1024"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: pytest.fail("it was asked before"))
    attentions.settle(CUDA)
    monkeypatch.setattr(attentions, "pytorch_from", {})
    card(monkeypatch, "another")
    monkeypatch.setenv("DLLM_FAST_ATTENTION", printed)
    assert attentions.table(CUDA) == printed
    assert attentions.serves(CUDA, BF16, 32, 32, 128, 1024)


@pytest.mark.parametrize("fixed", ["never", "float16:64:256,bfloat16:128:4096"])
def test_what_is_fixed_is_the_whole_table(monkeypatch, fixed):
    card(monkeypatch, "NVIDIA H200")
    monkeypatch.setenv("DLLM_FAST_ATTENTION", fixed)
    assert attentions.table(CUDA) == fixed
    assert not attentions.serves(CUDA, BF16, 32, 32, 128, 1024)
    assert attentions.serves(CUDA, FP16, 4, 4, 64, 256) == (fixed != "never")


@needs_triton
@pytest.mark.parametrize("text", ["bf16:128:1", "bfloat16:128", "bfloat16:0:1", "float32:16:many", "1024", "never,"])
def test_what_does_not_fit_is_refused(monkeypatch, text):
    monkeypatch.setenv("DLLM_FAST_ATTENTION", text)
    expected = f"DLLM_FAST_ATTENTION='{text}' in the environment; expected 'never' or DTYPE:HEAD_DIM:QUERIES"
    with pytest.raises(ValueError, match=expected):
        ops.resolve("triton", CPU, FP32)


def test_show_config_says_which_and_why(monkeypatch, capsys):
    monkeypatch.setattr(config, "_gpus", lambda: [CUDA])
    monkeypatch.setattr(config, "_devices", lambda: [])
    for name, why, table in (
        ("NVIDIA H200", "measured", "bfloat16:128:1024"),
        ("another", "not measured on this card", "never"),
    ):
        monkeypatch.setattr(attentions, "pytorch_from", {})
        card(monkeypatch, name)
        assert f"else in Triton ({why}): DLLM_FAST_ATTENTION={table}\n" in shown(capsys)
    monkeypatch.setattr(attentions, "pytorch_from", {})
    monkeypatch.setenv("DLLM_FAST_ATTENTION", "never")
    assert "else in Triton (set): DLLM_FAST_ATTENTION=never\n" in shown(capsys)
    monkeypatch.setattr(attentions, "pytorch_from", {})
    monkeypatch.setenv("DLLM_FAST_ATTENTION", "ever")
    assert "DLLM_FAST_ATTENTION='ever' in the environment" in shown(capsys)


def inputs(queries=24, slots=24, heads=4, kv_heads=4):
    torch.manual_seed(0)
    return torch.randn(2, queries, heads, 16), *torch.randn(2, 2, slots, kv_heads, 16)


def check(impl, q, keys, values, start=None, end=None, slot=None, window=None):
    """Within twice the reference's own error against fp64."""
    seen = ops.visible(q, keys.shape[1], start, end, slot, window, impl=impl)
    out = ops.attention(q, keys, values, seen, impl=impl)
    zero = torch.zeros(q.shape[0], dtype=torch.int64)
    ranges = [zero if start is None else start, zero + keys.shape[1] if end is None else end]
    ranges += [zero if slot is None else slot, window]
    truth = reference.attention(q.double(), keys.double(), values.double(), *ranges)
    eager = reference.attention(q, keys, values, *ranges)
    allowed = 2 * (eager.double() - truth).abs().max() + torch.finfo(FP32).eps * truth.abs().max()
    assert (out.double() - truth).abs().max() <= allowed


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in is the interpreter's")
def test_whole_sequences_go_where_the_table_says_and_all_else_is_the_kernels(monkeypatch, served):
    monkeypatch.setenv("DLLM_FAST_ATTENTION", "float32:16:20")
    assert ops.resolve("triton", CPU, FP32) == "triton"
    check("triton", *inputs())
    check("triton", *inputs(), slot=torch.tensor([0, 0]))
    q, *buffers = inputs()
    check("triton", q, *(x.to(torch.float8_e4m3fn) for x in buffers))  # widened for it
    assert served == [(24, 24)] * 3
    two = torch.tensor([2, 2])
    check("triton", *inputs(), start=two)
    check("triton", *inputs(), end=two + 20)
    check("triton", *inputs(), window=3, slot=torch.tensor([0, 0]))
    check("triton", *inputs(queries=20), slot=two)
    check("triton", *inputs(kv_heads=2))
    check("triton", *inputs(queries=19, slots=19))
    assert len(served) == 3
    check("torch", *inputs())
    assert len(served) == 4


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in is the interpreter's")
def test_it_is_traced_whole(monkeypatch, served):
    monkeypatch.setenv("DLLM_FAST_ATTENTION", "float32:16:24")
    ops.resolve("triton", CPU, FP32)
    q, keys, values = inputs()

    def forward(q, keys, values):
        return ops.attention(q, keys, values, ops.visible(q, keys.shape[1], impl="triton"), impl="triton")

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, keys, values), reference.attention(q, keys, values, *(
        torch.tensor(pair) for pair in ([0, 0], [24, 24], [0, 0])
    )))  # fmt: skip
    assert served


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's own recordings are tried there")
@pytest.mark.parametrize("options", [
    {}, {"cache": "none"}, {"cache": "prefix"}, {"refresh": Window(8, 0)}, {"refresh": Drift(0.1)},
    {"cfg_scale": 0.5, "temperature": 0.5}, {"cache_dtype": "e4m3"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("make", [make_llada, make_modernbert])
def test_recorded_steps_of_prompts_that_fill_their_slots_and_of_others(monkeypatch, served, make, options):
    """Recorded full steps have ranges or none; a prefix cache of two rows has slots that no row may see."""
    recorder = Recorder(monkeypatch)
    launchers_of_pytorch(monkeypatch, recorder)
    monkeypatch.setattr("dllm_fast.decoding.server.records", lambda device, impl: True)
    ids = torch.randint(0, 99, (2, 40), generator=torch.Generator().manual_seed(1))
    ragged = torch.ones_like(ids)
    ragged[1, :5] = 0
    calls = [(ids, None), (ids, ragged), (ids[:, 3:], None), (ids, None), (ids, ragged)]
    options = {"gen_length": 24, "block_length": 8, "schedule": Uniform(12), "seed": 3, **options}

    def run():
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="steps go on without CUDA graphs")
            model = dllm_fast.patch(make(), impl="triton")
            found = [dllm_fast.generate(model, x, mask, **options).sequences.tolist() for x, mask in calls]
        return found, {whole for *_, whole in next(iter(bound_pool(model)._engines.values())).graphs._graphs}

    monkeypatch.setenv("DLLM_FAST_ATTENTION", "never")
    expected, kinds = run()
    assert not served and kinds == {False}
    monkeypatch.setattr(attentions, "pytorch_from", {})
    monkeypatch.setenv("DLLM_FAST_ATTENTION", "float32:16:64,float32:32:64")
    found, kinds = run()
    assert found == expected
    spare = options.get("cache") == "prefix"
    assert set(served) == (set() if spare else {(64, 64)}) and kinds == ({False} if spare else {False, True})
