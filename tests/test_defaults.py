"""A script's process-wide settings change no result: default dtypes, default devices, determinism.

On a CPU, the default device "meta" exposes every tensor that follows the setting instead of its model.
"""

import ast
import contextlib
import copy
import functools
from pathlib import Path

import pytest
import torch
from needs import needs_cpp, needs_triton
from tiny import MASK, make_llada, make_modernbert

import dllm_fast
from dllm_fast import (
    P2,
    Ancestral,
    Drift,
    EntropyBound,
    Every,
    Factor,
    FirstHitting,
    Pyramid,
    ReMDM,
    Threshold,
    Uniform,
    Verify,
    Window,
)
from dllm_fast.evaluate.likelihood import are_greedy, log_likelihoods
from dllm_fast.families.native import TRANSFORMERS_5
from dllm_fast.train import losses

MAKERS = {"llada": make_llada, "modernbert": make_modernbert}
ROOT = Path(dllm_fast.__file__).parent
GENERATE = [
    {"schedule": Uniform(6), "cache": "none", "temperature": 0.7},
    {"schedule": Pyramid(2), "cache": "prefix", "cfg_scale": 0.5, "remask": ReMDM(0.5)},
    {"schedule": Threshold(0.05), "remask": Verify(0.1), "confidence": "margin"},
    {"schedule": Factor(1.0), "remask": P2(0.7), "refresh": Drift(0.1), "confidence": "entropy"},
    {"schedule": Uniform(6), "remask": P2(0.7), "refresh": Drift(0.1), "confidence": "random"},
    {"schedule": EntropyBound(3.0), "refresh": Window(4, 4), "temperature": 0.5, "cfg_scale": 1.0},
    {"schedule": FirstHitting(), "refresh": Every(2), "temperature": 1.0, "cache_dtype": "e4m3"},
    {"schedule": Ancestral(12, "cosine"), "temperature": 1.0},
]
ALL, FEW = tuple(range(len(GENERATE))), (3, 6)
LENGTHS = {"gen_length": 16, "block_length": 8}


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)
        if getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", 0) is None:
            del torch._GLOBAL_DEVICE_CONTEXT.device_context  # PyTorch 2.8 fails at the None that it left there


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: default_device("meta"),
    "with-meta": lambda: torch.device("meta"),
    "deterministic": deterministic,
}


QUICK = ("bfloat16", "meta")  # scripts' most common settings


@pytest.fixture(params=[pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in SETTINGS])
def setting(request):
    return SETTINGS[request.param]


def prompts(device="cpu"):
    draw = torch.Generator(device=device).manual_seed(1)
    ids = torch.randint(0, 99, (2, 12), generator=draw, device=device)
    mask = torch.ones(2, 12, dtype=torch.int64, device=device)
    mask[1, :4] = 0
    return ids, mask


def run(model, impl, weights=None, cases=ALL):
    """The result of every public function on a new copy of the model."""
    ids, mask = prompts()
    gap = ids[0].masked_fill(ids[0] == ids[0, 4], MASK)
    model, found = copy.deepcopy(model), {}
    dllm_fast.patch(model, impl, weights)
    torch.manual_seed(3)
    for number in cases:
        options = GENERATE[number]
        out = dllm_fast.generate(model, ids, mask, **LENGTHS, **options)
        found[f"generate {number}"] = out.sequences, out.nfe
        served = dllm_fast.generate_many(model, [[1, 2, 3], gap, [4]], batch_size=2, **LENGTHS, **options)
        found[f"generate_many {number}"] = tuple(completion.sequence for completion in served)
    answer = model.generate(ids, attention_mask=mask, max_new_tokens=12, temperature=0.7, eos_token_id=[5, 9], seed=2)
    found["model.generate"] = answer.sequences, answer.nfe, answer.tokens_per_forward
    with torch.no_grad():
        found["forward"] = model(ids).logits, model(input_ids=ids[:1, :7]).logits
    pairs = [([1, 2, 3], [4, 5, 6]), (ids[0, :2], ids[1, 5:9]), ([], [7])]
    for cfg_scale in (0.0, 0.5):
        found[f"bounds {cfg_scale}"] = tuple(log_likelihoods(model, pairs, 6, None, 4, cfg_scale))
        found[f"greedy {cfg_scale}"] = tuple(are_greedy(model, pairs, 2, cfg_scale))
    copied = copy.deepcopy(model)
    found["copied"] = dllm_fast.generate(copied, ids, mask, **LENGTHS).sequences
    with dllm_fast.patched(model, "torch"):
        found["patched"] = dllm_fast.generate(model, ids, mask, **LENGTHS).sequences
    dllm_fast.unpatch(model)
    found["unpatched"] = model.state_dict()
    return found


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


@functools.cache
def plain_run(family, *how):
    """(`run`'s results with PyTorch's defaults, the model)."""
    model = MAKERS[family]()
    return run(model, *how), model


@pytest.mark.parametrize("family, impl", [pytest.param("llada", "cpp", marks=needs_cpp), ("modernbert", "torch")])
def test_results_are_the_same_under_any_setting(family, impl, setting):
    expected, model = plain_run(family, impl)
    with setting():
        same(run(model, impl), expected)


@pytest.mark.long
@pytest.mark.parametrize(
    "family, impl, weights",
    [
        ("llada", "torch", "fp8"),
        ("modernbert", "torch", "fp8"),
        ("llada", "torch", "int4"),
        ("llada", "torch", None),
        pytest.param("modernbert", "cpp", None, marks=needs_cpp),
    ],
)
def test_other_implementations_do_not_follow_the_default(family, impl, weights, setting):
    expected, model = plain_run(family, impl, weights, FEW)
    with setting():
        same(run(model, impl, weights, FEW), expected)


@pytest.mark.long
@pytest.mark.parametrize("family", MAKERS)
def test_a_half_precision_model_does_not_follow_the_default(family, setting):
    model = MAKERS[family]().bfloat16()
    expected = run(model, "auto", None, FEW)
    with setting():
        same(run(model, "auto", None, FEW), expected)


@needs_triton
@pytest.mark.parametrize("name", [pytest.param("bfloat16", marks=pytest.mark.long), "meta"])
def test_triton_launchers_do_not_follow_the_default(name):
    model = dllm_fast.patch(make_llada(n_layers=1), "triton")
    options = {"gen_length": 4, "block_length": 4, "schedule": Uniform(2), "temperature": 0.5, "seed": 0}
    ids = prompts()[0][:, :3]
    expected = dllm_fast.generate(model, ids, **options).sequences
    with SETTINGS[name]():
        assert torch.equal(dllm_fast.generate(model, ids, **options).sequences, expected)


def training_losses(model):
    ids, _ = prompts()
    length = torch.tensor([3, 5], dtype=torch.int64, device="cpu")
    loss, found = losses.DiffusionLoss(model, MASK), []
    for prompt_length in (None, length):
        model.zero_grad()
        value = loss(ids, prompt_length)
        value.backward()
        found.append((value.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    return {"losses": found}


@pytest.mark.parametrize("family", MAKERS)
def test_losses_are_the_same_under_any_setting(family, setting):
    if family == "modernbert" and setting in (SETTINGS["meta"], SETTINGS["with-meta"]) and not TRANSFORMERS_5:
        pytest.skip("transformers 4's ModernBERT makes its mask on the default device")
    model = MAKERS[family]()
    expected = training_losses(model)
    with setting():
        same(training_losses(model), expected)


@pytest.mark.parametrize("name", ["llada-gsm8k", "modernbert-kjv"])
@pytest.mark.parametrize("dtype", ["auto", pytest.param(torch.float32, marks=pytest.mark.long)], ids=["auto", "fp32"])
def test_loading_puts_weights_where_it_was_asked_to(name, dtype, setting):
    expected = dllm_fast.from_pretrained(name, dtype=dtype)
    with setting():
        model = dllm_fast.from_pretrained(name, dtype=dtype)
    same({"weights": model.state_dict()}, {"weights": expected.state_dict()})
    same({"buffers": dict(model.named_buffers())}, {"buffers": dict(expected.named_buffers())})
    with setting():
        options = {"gen_length": 32, "seed": 0, "temperature": 0.5}
        ids = prompts()[0].clamp(max=90)
        found = dllm_fast.generate(model, ids, **options).sequences
    assert torch.equal(found, dllm_fast.generate(expected, ids, **options).sequences)


def test_a_drawn_seed_is_the_same_under_any_setting(llada, ids, setting):
    dllm_fast.patch(llada)
    torch.manual_seed(11)
    expected = dllm_fast.generate(llada, ids, temperature=1.0, **LENGTHS).sequences
    torch.manual_seed(11)
    with setting():
        assert torch.equal(dllm_fast.generate(llada, ids, temperature=1.0, **LENGTHS).sequences, expected)


FLOATING = {"tensor", "zeros", "ones", "empty", "full", "rand", "randn", "linspace", "eye", "scalar_tensor"}
MODULES = {
    ("native.py", "torch.ones(size)"),
    ("decoder_layers.py", "torch.empty(config.num_experts, config.hidden_size)"),
    ("decoder_layers.py", "torch.zeros(config.num_experts, dtype=torch.float32)"),
}
PLACED = FLOATING | {"arange", "randint", "randperm", "as_tensor", "asarray", "Generator"}


def test_every_tensor_says_its_dtype_and_its_device():
    """Except in the native models' modules: like any module, they follow PyTorch's defaults."""
    found = []
    for path in sorted([*ROOT.rglob("*.py"), *(ROOT / "kernels").glob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if not name.startswith("torch.") or name[6:] not in PLACED or any(k.arg is None for k in node.keywords):
                continue
            given = {keyword.arg for keyword in node.keywords}
            wanted = {"device", "dtype"} if name[6:] in FLOATING else {"device"}
            if not wanted <= given and (path.name, ast.unparse(node)) not in MODULES:
                found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    assert not found
