"""The PyTorch path of `ops`: at most twice the error, against fp64, of the plain definition in the same dtype."""

import importlib.metadata

import pytest
import torch
from needs import needs_triton
from torch.torch_version import TorchVersion

from dllm_fast import launchers, ops
from dllm_fast.cpu import compiled
from dllm_fast.kernels import reference

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def check(got, eager, truth):
    """The error of ``got`` against fp64 is at most twice the plain definition's in the same dtype, plus half an ulp."""
    for g, e, t in zip(got, eager, truth, strict=True):
        assert g.dtype == e.dtype and g.shape == t.shape
        ulp = torch.finfo(g.dtype).eps * t.abs().amax().item()
        allowed = 2 * (e.double() - t).abs().amax().item() + ulp / 2
        assert (g.double() - t).abs().amax().item() <= allowed


@DTYPES
def test_norms_and_gates(dtype):
    torch.manual_seed(0)
    x, r = torch.randn(2, 3, 7, 40, dtype=dtype)
    weight, bias = torch.randn(2, 40, dtype=dtype)
    wide = [t.double() for t in (x, weight, bias, r)]
    check(ops.rms_norm(x, weight, 1e-5, r), reference.rms_norm(x, weight, 1e-5, r),
          reference.rms_norm(wide[0], wide[1], 1e-5, wide[3]))  # fmt: skip
    check(ops.layer_norm(x, weight, bias, 1e-5, r), reference.layer_norm(x, weight, bias, 1e-5, r),
          reference.layer_norm(*wide[:3], 1e-5, wide[3]))  # fmt: skip
    for name in ("swiglu", "geglu"):
        rounded = {"swiglu": torch.nn.functional.silu, "geglu": torch.nn.functional.gelu}[name](x) * r
        truth = getattr(reference, name)(wide[0], wide[3])
        check([getattr(ops, name)(x, r)], [rounded], [truth])


@DTYPES
@pytest.mark.parametrize("window", [None, 3], ids="window-{}".format)
@pytest.mark.parametrize("ranged", [False, True], ids=["whole", "ragged"])
def test_attention(dtype, window, ranged):
    torch.manual_seed(0)
    q, keys, values = torch.randn(3, 6, 4, 16, dtype=dtype), *torch.randn(2, 3, 20, 2, 16, dtype=dtype)
    start, end, slot = torch.tensor([0, 5, 6]), torch.tensor([20, 9, 6]), torch.tensor([3, 4, 0])
    full = torch.zeros(3, dtype=torch.int64), torch.full((3,), 20)
    arguments = (start, end) if ranged else full
    seen = ops.visible(q, 20, *(arguments if ranged else (None, None)), slot, window)
    got = ops.attention(q, keys, values, seen)
    eager = reference.attention(q, keys, values, *arguments, slot, window)
    truth = reference.attention(q.double(), keys.double(), values.double(), *arguments, slot, window)
    if dtype == torch.float32:
        check([got], [eager], [truth])
    else:  # the definition keeps fp32 scores; SDPA's bf16 probabilities are the eager path to compare with
        mask = reference.visible_slots(6, 20, *arguments, slot, window)[:, None]
        k, v = (x.repeat_interleave(2, 2).transpose(1, 2) for x in (keys, values))
        score = (q.transpose(1, 2) @ k.transpose(2, 3) * 16**-0.5).masked_fill(~mask, float("-inf"))
        plain = (torch.softmax(score, -1).nan_to_num() @ v).transpose(1, 2)
        check([got], [plain], [truth])


def block_in_a_window():
    """5 queries against 64 slots with a window of 6 on either side: at the left end, inside, at the right end."""
    torch.manual_seed(0)
    q = torch.randn(4, 5, 4, 16)
    keys, values = torch.randn(2, 4, 64, 2, 16)
    start, end, slot = torch.tensor([0, 25, 3, 64]), torch.tensor([64, 64, 62, 64]), torch.tensor([0, 30, 59, 20])
    return q, keys, values, start, end, slot, 6


def test_a_short_block_reads_no_further_than_its_window():
    q, keys, values, start, end, slot, window = block_in_a_window()
    seen = ops.visible(q, 64, start, end, slot, window)
    wide = [x.double() for x in (q, keys, values)]
    eager = reference.attention(q, keys, values, start, end, slot, window)
    truth = reference.attention(*wide, start, end, slot, window)
    assert (truth[3] == 0).all()  # sees nothing
    far = (torch.arange(64) - slot[:, None]).abs() > 5 + 2 * window
    keys[far] = values[far] = float("nan")
    check([ops.attention(q, keys, values, seen)], [eager], [truth])


def test_attention_compiles_whole_and_follows_ranges_that_change_in_place():
    q, keys, values, start, end, slot, window = block_in_a_window()

    def forward(q, keys, values, start, end, slot):
        out = [ops.attention(q, keys, values, ops.visible(q, 64, start, end, slot, w)) for w in (window, None)]
        return torch.stack(out)

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    for shift in (0, 1, 7):
        start += shift
        slot -= shift
        arguments = [q, keys, values, start, end, slot]
        expected = torch.stack([reference.attention(*arguments, w) for w in (window, None)])
        torch.testing.assert_close(forward(*arguments), expected)
        torch.testing.assert_close(compiled(*arguments), expected)


@DTYPES
@pytest.mark.parametrize("kind", ["probability", "margin", "entropy", "random"])
@pytest.mark.parametrize("some", [False, True], ids=["all", "some-candidates"])
def test_predict(dtype, kind, some):
    torch.manual_seed(0)
    n, d, v = 13, 32, 77
    hidden, uncond, weight, bias = (torch.randn(s, dtype=dtype) for s in ((n, d), (n, d), (v, d), (v,)))
    candidate = torch.rand(n) < 0.5 if some else None
    at = torch.arange(n)
    options = {"mask_id": 5, "confidence": kind, "seed": 9, "step": 4, "row": at % 3, "position": at, "banned": (8,)}
    for extra in ({}, {"temperature": 0.7}, {"uncond": uncond, "cfg_scale": 1.0}):
        extra = {**options, **extra}
        got = ops.predict(hidden, weight, bias, candidate=candidate, **extra)
        wide = {**extra, "uncond": uncond.double()} if "uncond" in extra else extra
        truth = reference.predict(hidden.double(), weight.double(), bias.double(), candidate=candidate, **wide)
        logits = torch.nn.functional.linear(hidden, weight, bias).float()
        if "uncond" in extra:
            base = torch.nn.functional.linear(uncond, weight, bias).float()
            logits = base + 2.0 * (logits - base)
        names = {k: x for k, x in extra.items() if k not in ("uncond", "cfg_scale")}
        eager = reference.select(logits, candidate=candidate, **names)
        # A token may differ from fp64's only if eager's does too, or if rounding decides a near tie.
        agree = got[0] == truth[0]
        assert agree.all() or dtype != torch.float32
        keep = agree & (eager[0] == truth[0]) & (truth[1] > float("-inf"))
        assert keep.any() and torch.equal(got[1] == float("-inf"), truth[1] == float("-inf"))
        for g, e, t in zip(got[1:], eager[1:], truth[1:]):
            error = (g.double() - t)[keep].abs().amax()
            assert error <= 2 * (e.double() - t)[keep].abs().amax() + 4e-7 * (1 + t[keep].abs().amax())


def test_predict_without_a_candidate_and_in_chunks(monkeypatch):
    torch.manual_seed(0)
    hidden, weight = torch.randn(10, 8), torch.randn(30, 8)
    none = ops.predict(hidden, weight, mask_id=3, candidate=torch.zeros(10, dtype=torch.bool))
    assert none[0].tolist() == [3] * 10 and (none[1] == float("-inf")).all()
    whole = ops.predict(hidden, weight, mask_id=3)
    monkeypatch.setattr(ops, "CHUNK", 3)
    for a, b in zip(ops.predict(hidden, weight, mask_id=3), whole):
        torch.testing.assert_close(a, b)


@needs_triton
def test_an_implementation_that_cannot_be_had_raises(monkeypatch):
    with pytest.raises(ValueError, match=r"impl='cuda-graphs' is not one of"):
        ops.resolve("cuda-graphs", torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match=r"impl='triton': the model is on meta"):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        ops.resolve("triton", torch.device("meta"), torch.float32)
    with pytest.raises(ValueError, match=r"impl='triton': the model's dtype is torch.float64"):
        ops.resolve("triton", torch.device("cuda"), torch.float64)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(
        ValueError, match=r"impl='triton': the model's dtype is torch.bfloat16, and Triton's interpreter"
    ):
        ops.resolve("triton", torch.device("cpu"), torch.bfloat16)
    assert ops.resolve("triton", torch.device("cpu"), torch.float16) == "triton"


@needs_triton
def test_auto_is_triton_where_it_can_be_had(monkeypatch):
    """Also for a device that this machine lacks."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "H100")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cuda, cpu = torch.device("cuda:0"), torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert ops.resolve("auto", cuda, dtype) == ops.resolve("triton", cuda, dtype) == "triton"
        assert ops.resolve("torch", cuda, dtype) == ops.resolve("torch", cpu, dtype) == "torch"
    assert ops.resolve("auto", cuda, torch.float64) == "torch"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert ops.resolve("auto", cpu, torch.float32) != "triton"


def test_on_a_cpu_auto_is_the_compiled_extension_where_it_is_built(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for why in ("not built", None):
        monkeypatch.setattr(compiled, "missing", lambda why=why: why)
        for dtype in (torch.float32, torch.bfloat16):
            assert ops.resolve("auto", cpu, dtype) == ("torch" if why else "cpp")
        assert ops.resolve("auto", cpu, torch.float16) == "torch"
        assert ops.resolve("torch", cpu, torch.float32) == "torch"
        with pytest.raises(ValueError, match=r"impl='cpp': the model's dtype is torch\.float16"):
            ops.resolve("cpp", cpu, torch.float16)
        with pytest.raises(ValueError, match="impl='cpp': the model is on cuda"):
            ops.resolve("cpp", cuda, torch.float32)
    assert ops.resolve("cpp", cpu, torch.bfloat16) == "cpp"
    monkeypatch.setattr(compiled, "missing", lambda: "not built")
    with pytest.raises(ValueError, match="impl='cpp': not built"):
        ops.resolve("cpp", cpu, torch.float32)


def test_without_triton_auto_is_pytorch_and_an_explicit_choice_raises(monkeypatch):
    def missing():
        raise ImportError("No module named 'triton'")

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(launchers, "triton", missing)
    assert ops.resolve("auto", torch.device("cuda"), torch.float32) == "torch"
    with pytest.raises(ValueError, match="impl='triton': No module named 'triton'"):
        ops.resolve("triton", torch.device("cuda"), torch.float32)


@needs_triton
@pytest.mark.parametrize("triton,numpy,works", [
    ("3.6.0", "2.4.0", False), ("3.6.0", "2.10.1", False), ("3.4.0", "3.0.0", False),
    ("3.6.0", "2.3.5", True), ("3.7.1", "2.4.6", True), ("3.10.0", "2.5.5", True),
])  # fmt: skip
def test_an_old_triton_is_not_interpreted_with_a_new_numpy(monkeypatch, triton, numpy, works):
    monkeypatch.setattr(launchers.importlib.metadata, "version", {"triton": triton, "numpy": numpy}.get)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    cpu = torch.device("cpu")
    if works:
        assert ops.resolve("triton", cpu, torch.float32) == "triton"
        return
    with pytest.raises(
        ValueError, match=f"the interpreter of Triton {triton} needs NumPy below 2.4, and this is {numpy}"
    ):
        ops.resolve("triton", cpu, torch.float32)


CARDS = {"Tesla T4": (7, 5), "Tesla V100": (7, 0), "Orin": (8, 7), "A100": (8, 0), "A10": (8, 6), "RTX 4090": (8, 9)}
CARDS |= {"H100": (9, 0), "B200": (10, 0), "Thor": (11, 0), "RTX 5090": (12, 0), "a later one": (13, 0)}


@needs_triton
@pytest.mark.parametrize("name", CARDS)
def test_auto_is_triton_on_cards_that_the_kernels_are_compiled_for(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or CARDS[name])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    tested = name in ("A100", "A10", "RTX 4090", "H100", "B200", "RTX 5090")
    if name == "B200" and TorchVersion(importlib.metadata.version("triton")) < "3.6":
        assert "needs Triton 3.6" in ops.auto(torch.device("cuda:1"), torch.bfloat16)[1]
        return
    second = torch.device("cuda:1")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert ops.resolve("auto", second, dtype) == ("triton" if tested else "torch")
        chosen, why = ops.auto(second, dtype)
        if tested:
            assert chosen == ops.resolve("triton", second, dtype) == "triton" and why is None
        else:
            number = ".".join(map(str, CARDS[name]))
            assert chosen == "torch" and f"cuda:1 is a {name} of compute capability {number}" in why
            with pytest.raises(ValueError, match=f"impl='triton': cuda:1 is a {name} of compute capability {number}"):
                ops.resolve("triton", second, dtype)
    assert set(asked) == {second}


def test_on_rocm_auto_is_pytorch_whatever_the_card_calls_itself(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cuda = torch.device("cuda")
    assert ops.resolve("auto", cuda, torch.bfloat16) == "torch"
    with pytest.raises(ValueError, match=r"impl='triton': this PyTorch is built for ROCm 6\.4"):
        ops.resolve("triton", cuda, torch.bfloat16)
