"""Prediction from a head with e4m3 weights, fused and streamed, against the fp64 definition."""

import pytest
import torch
import triton
import triton.language as tl
from test_predict import MASK, PATHS, ULP, definition, noise_key, problem

from dllm_fast.kernels import linear, reference_rounded
from dllm_fast.kernels import predict as kernel
from dllm_fast.kernels.predict import predict


@triton.jit
def _widen(words):
    """`linear._widen` in plain Triton, because the interpreter cannot run its GPU instructions."""
    words = words.to(tl.uint32, bitcast=True)
    return _byte(words), _byte(words >> 8), _byte(words >> 16), _byte(words >> 24)


@triton.jit
def _byte(word):
    return (word & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32).to(tl.bfloat16)


@pytest.fixture
def widened(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setattr(linear, "_widen", _widen)
        monkeypatch.setattr(kernel, "_packs", lambda hidden, weight: hidden.dtype == torch.bfloat16)


@pytest.mark.parametrize("path", PATHS)
def test_e4m3_weights(path, device, widened):
    """Against fp64 with widened weights, which are exact for bf16 rows; eager rounds them to bf16."""
    for shape, confidence in (((1, 300, 40), "margin"), ((19, 130, 100), "entropy")):
        hidden, weight, bias = problem(*shape, torch.bfloat16, device)
        weight *= torch.logspace(-3, 0, shape[1], device=device)[:, None]  # each row has its own scale
        weight8, scale = reference_rounded.round_rows(weight)
        options = {"mask_id": MASK, "confidence": confidence, "temperature": 0.7, **noise_key(shape[0], device)}
        if shape[0] == 19:
            options |= {"uncond": problem(19, 1, 100, torch.bfloat16, device, seed=5)[0], "cfg_scale": 1.5}
            options["candidate"] = torch.arange(19, device=device) % 3 > 0
        token, *rest = predict(hidden, weight8, bias, scale[:, 0], **options, _path=path)
        truth = definition(hidden, weight8, bias, scale=scale[:, 0], **options)
        assert torch.equal(token, truth[0])
        for ours, exact in zip(rest, truth[1:], strict=True):
            finite = exact.isfinite()
            assert torch.equal(ours[~finite].double(), exact[~finite])
            # The error of fp32 sums. Rounding a logit or a weight to bf16 would give a thousand times as much.
            assert (ours - exact)[finite].abs().max() <= 64 * ULP * exact[finite].abs().max().clamp(min=1)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=("fp32", "fp16"))
def test_e4m3_weights_under_other_rows_are_streamed(dtype, device):
    hidden, weight, bias = problem(5, 257, 30, dtype, device)
    weight8, scale = reference_rounded.round_rows(weight)
    token, score, lse = predict(hidden, weight8, bias, scale[:, 0], mask_id=MASK)
    truth = definition(hidden, weight8, bias, scale=scale[:, 0], mask_id=MASK)
    assert torch.equal(token, truth[0])
    torch.testing.assert_close(score.double(), truth[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(lse.double(), truth[2], rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match=r"_path='fused' takes e4m3 weights .* bf16 rows on a GPU"):
        predict(hidden, weight8, bias, scale[:, 0], mask_id=MASK, _path="fused")
