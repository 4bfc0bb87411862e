"""Triton's prediction under a softcap, fused and streamed, against the fp64 definition."""

import pytest
import torch
from test_predict import MASK, ULP, definition, double, noise_key, problem
from test_predict import poison as poison  # a fixture

from dllm_fast.kernels import reference
from dllm_fast.kernels.predict import predict

OPTIONS = {
    "probability": {},
    "margin": {"confidence": "margin"},
    "entropy-banned": {"confidence": "entropy", "banned": (2, 3, 200), "deferred": (7, 150)},
    "noise": {"temperature": 0.7},
    "guided": {"cfg_scale": 1.5},
}
SHAPE = (5, 230, 40)


def capped(hidden, weight, bias, softcap):
    return softcap * torch.tanh(torch.nn.functional.linear(hidden, weight, bias) / softcap)


@pytest.mark.parametrize("path", ("fused", "streamed"))
@pytest.mark.parametrize("name", OPTIONS)
def test_matches_definition(name, path, device, poison):
    shape, dtype = SHAPE, torch.float32 if name == "margin" else torch.bfloat16
    hidden, weight, bias = problem(*shape, dtype, device)
    bias = None if name == "margin" else bias
    options = {"mask_id": MASK, **noise_key(shape[0], device), **OPTIONS[name]}
    uncond = problem(*shape, dtype, device, seed=9)[0] if name == "guided" else None
    found = predict(hidden, weight, bias, uncond=uncond, softcap=4.0, _path=path, **options)
    truth = definition(hidden, weight, bias, uncond=uncond, softcap=4.0, **options)
    z = capped(hidden, weight, bias, 4.0)
    if uncond is not None:
        z = reference.guided(z, capped(uncond, weight, bias, 4.0), options["cfg_scale"])
    rough = reference.select(z.float(), **{name: x for name, x in options.items() if name != "cfg_scale"})
    assert torch.equal(found[0], truth[0])
    for ours, theirs, exact in zip(found[1:], rough[1:], truth[1:], strict=True):
        finite = exact.isfinite()
        assert torch.equal(ours[~finite].double(), exact[~finite])
        error, allowed = (ours - exact)[finite].abs().max(), (theirs - exact)[finite].abs().max()
        assert error <= 2 * allowed + 8 * ULP * truth[2].abs().max().clamp(1, 64)


@pytest.mark.parametrize("path", ("fused", "streamed"))
@pytest.mark.parametrize("guided", (False, True), ids=("alone", "guided"))
def test_a_rounded_head(path, guided, device):
    """Its scale comes before the cap."""
    if path == "fused" and torch.device(device).type != "cuda":
        pytest.skip("the fused kernel takes e4m3 weights on a GPU alone")
    hidden, weight, bias = problem(5, 256, 64, torch.bfloat16, device)
    scale = weight.float().abs().amax(1) / 448
    rounded = (weight.float() / scale[:, None]).to(torch.float8_e4m3fn)
    uncond = problem(5, 256, 64, torch.bfloat16, device, seed=9)[0] if guided else None
    options = {"mask_id": MASK, "uncond": uncond, "cfg_scale": 0.5, "softcap": 4.0}
    found = predict(hidden, rounded, bias, scale, _path=path, **options)
    truth = reference.predict(
        hidden.double(), rounded, bias.double(), scale.double(), **{name: double(x) for name, x in options.items()}
    )
    assert torch.equal(found[0], truth[0])
    torch.testing.assert_close(found[2].double(), truth[2], rtol=1e-5, atol=0)
    torch.testing.assert_close(found[1].double(), truth[1], rtol=1e-4, atol=0)


@pytest.mark.parametrize("path", ("fused", "streamed"))
def test_tanh(path, device):
    """The log-sum-exp over a single id that counts is its capped logit."""
    z = torch.cat((torch.logspace(-30, 2, 8), torch.linspace(0.45, 0.65, 8), torch.tensor([0.0, 1e30])))
    z = torch.cat((z, -z)).to(device)
    weight = torch.tensor([[0.0], [1.0], [0.0]], device=device)
    _, _, lse = predict(z[:, None], weight, mask_id=0, banned=(2,), deferred=(0,), softcap=1.0, _path=path)
    truth = torch.tanh(z.double())
    # Two fp32 operations and a division, of which a GPU's is within 2 units in the last place, as its exp is.
    assert ((lse - truth).abs() <= 12 * ULP * truth.abs() + 2**-149).all()
    nan = torch.full((1, 1), torch.nan, device=device)
    assert predict(nan, weight, mask_id=0, softcap=1.0, _path=path)[2].isnan().all()
