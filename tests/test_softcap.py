"""Logits under a softcap: the definition, PyTorch's and compiled prediction, and models that have one."""

import functools
import re

import pytest
import torch
import torch.nn.functional as F
from needs import needs_backend
from others import OwnMemory, make
from test_compiled_predict import ULP, double, every_level, noise_key, problem
from test_skip_committed import check_plain_loop

import dllm_fast
from dllm_fast import ops
from dllm_fast.cpu import compiled
from dllm_fast.kernels import reference

BF16, FP32 = torch.bfloat16, torch.float32
SHAPES = {"1row-300vocab-40wide": (1, 300, 40), "19rows-700vocab-101wide": (19, 700, 101)}
OPTIONS = {
    "probability": {},
    "margin": {"confidence": "margin"},
    "entropy-banned": {"confidence": "entropy", "banned": (2, 3, 260), "deferred": (7, 200)},
    "noise": {"temperature": 0.7},
    "guided": {"cfg_scale": 1.5},
}


def capped_logits(hidden, weight, bias, softcap):
    z = F.linear(hidden, weight, bias)
    return softcap * torch.tanh(z / softcap)


def by_hand(hidden, weight, bias, softcap, cfg_scale=None, uncond=None, **options):
    """What the models' own code would give, with guidance of what they return."""
    z = capped_logits(hidden, weight, bias, softcap)
    if uncond is not None:
        base = capped_logits(uncond, weight, bias, softcap)
        z = base + (cfg_scale + 1) * (z - base)
    return reference.select(z if z.dtype == torch.float64 else z.float(), **options)


def asked(name, shape, dtype):
    options = {"mask_id": 1, "softcap": 4.0, **noise_key(shape[0]), **OPTIONS[name]}
    if name == "guided":
        options["uncond"] = problem(*shape, dtype, seed=9)[0]
    return options


@pytest.mark.parametrize("name", OPTIONS)
def test_definition(name):
    shape = (7, 300, 16)
    hidden, weight, bias = map(double, problem(*shape, FP32))
    options = {key: double(x) for key, x in asked(name, shape, FP32).items()}
    for found, truth in zip(
        reference.predict(hidden, weight, bias, **options), by_hand(hidden, weight, bias, **options), strict=True
    ):
        torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)


def assert_matches(predict, hidden, weight, bias, **options):
    """Tokens equal; the rest at most twice as far from fp64 as eager PyTorch in this dtype, or 8 ulp of the logits."""
    found = predict(hidden, weight, bias, **options)
    wide = {name: double(x) for name, x in options.items()}
    truth = by_hand(*map(double, (hidden, weight, bias)), **wide)
    rough = by_hand(hidden, weight, bias, **options)
    assert torch.equal(found[0], truth[0])
    for ours, theirs, exact in zip(found[1:], rough[1:], truth[1:], strict=True):
        finite = exact.isfinite()
        assert torch.equal(ours[~finite].double(), exact[~finite])
        error, allowed = (ours - exact)[finite].abs().max(), (theirs - exact)[finite].abs().max()
        assert error <= 2 * allowed + 8 * ULP * truth[2].abs().max().clamp(1, 64)


@pytest.mark.skipif(bool(compiled.missing()), reason=str(compiled.missing()))
@pytest.mark.usefixtures("poisoned_outputs")
@every_level
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("name", OPTIONS)
def test_compiled(name, shape, dtype, level, use):
    use(level)
    hidden, weight, bias = problem(*shape, dtype)
    bias = None if name == "margin" else bias
    assert_matches(compiled.predict, hidden, weight, bias, **asked(name, shape, dtype))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_torch(name, dtype):
    shape = (19, 300, 40)
    hidden, weight, bias = problem(*shape, dtype)
    options = asked(name, shape, dtype)
    found = ops.predict(hidden, weight, bias, **options)
    truth = by_hand(*map(double, (hidden, weight, bias)), **{key: double(x) for key, x in options.items()})
    rough = by_hand(hidden, weight, bias, **options)
    same = (found[0] == truth[0]) & (rough[0] == truth[0])  # bf16 may make two logits level
    assert same.sum() >= 15
    for ours, theirs, exact in zip(found[1:], rough[1:], truth[1:], strict=True):
        there = same & exact.isfinite()
        assert (ours - exact)[there].abs().max() <= 2 * (theirs - exact)[there].abs().max()


@pytest.mark.skipif(bool(compiled.missing()), reason=str(compiled.missing()))
@every_level
def test_compiled_tanh(level, use):
    """The log-sum-exp over a single id that counts is its capped logit."""
    use(level)
    z = torch.cat((torch.logspace(-30, 2, 4000), torch.linspace(0.4, 0.7, 2000), torch.tensor([0.0, 1e30, torch.inf])))
    z = torch.cat((z, -z))
    weight = torch.tensor([[0.0], [1.0], [0.0]])
    _, _, lse = compiled.predict(z[:, None], weight, mask_id=0, banned=(2,), deferred=(0,), softcap=1.0)
    truth = torch.tanh(z.double())
    assert ((lse - truth).abs() <= 4 * ULP * truth.abs() + 2**-149).all()
    nan = torch.full((1, 1), torch.nan)
    assert compiled.predict(nan, weight, mask_id=0, softcap=1.0)[2].isnan().all()


def test_probabilities_of_given_tokens():
    shape = (9, 200, 16)
    hidden, weight, bias = problem(*shape, FP32)
    options = asked("guided", shape, FP32)
    token, confidence, lse = reference.predict(hidden, weight, bias, **options)
    guided = {name: options[name] for name in ("uncond", "cfg_scale", "softcap")}
    found = ops.token_logprob(hidden, weight, bias, token=token, lse=lse, **guided)
    torch.testing.assert_close(found.exp(), confidence, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("softcap", [0.0, -1.0, float("inf"), float("nan")])
def test_a_cap_that_is_none_is_refused(softcap):
    hidden, weight, _ = problem(2, 8, 8, FP32)
    with pytest.raises(ValueError, match=re.escape(f"softcap={softcap} is neither None nor a positive finite number")):
        compiled.predict(hidden, weight, mask_id=0, softcap=softcap)


# Models


def make_capped(name):
    """Gemma 2 has a cap; Gemma 3's config may have one. The cap changes logits, so that leaving it out would show."""
    model = make(name)
    model.config.final_logit_softcapping = None
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert model(ids).logits.abs().max() > 3.0
        model.config.final_logit_softcapping = 3.0
        assert model(ids).logits.abs().max() < 3.0
    return model


@needs_backend
@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
@pytest.mark.parametrize("seed", range(3))
def test_tokens_of_the_plain_loop(name, seed):
    check_plain_loop(name, seed, functools.partial(make_capped, name), OwnMemory)


@needs_backend
def test_a_cap_that_the_model_does_not_apply_is_refused():
    model = make("qwen3")
    model.config.final_logit_softcapping = 3.0
    with pytest.raises(ValueError, match="its logits before its head differ from its own by"):
        dllm_fast.patch(model)
