"""The launcher of processes that share a vocabulary, played one after the other, against the fp64 definition."""

import pytest
import torch
from test_predict import MASK, double, noise_key, problem
from test_vocabulary_shares import played

from dllm_fast.kernels import predict_share, reference
from dllm_fast.kernels.checks import CONFIDENCES

ROWS, VOCAB, WIDTH = 5, 192, 24


@pytest.mark.parametrize("confidence", CONFIDENCES)
@pytest.mark.parametrize("size", [3, *(pytest.param(size, marks=pytest.mark.long) for size in (1, 4))])
def test_it_is_the_definition(size, confidence, device, monkeypatch):
    monkeypatch.setattr(predict_share, "CHUNK_ELEMENTS", ROWS * 32)  # two tiles of 16 at a time, or one of 64
    hidden, weight, _ = problem(ROWS, VOCAB, WIDTH, torch.float32, device)
    uncond = problem(ROWS, VOCAB, WIDTH, torch.float32, device, seed=1)[0]
    candidate = torch.tensor([True, True, False, True, True], device=device)
    seeds = torch.arange(ROWS, device=device) << 31
    cases = (
        {},
        {"temperature": 0.7, "candidate": candidate, "banned": (2, 100), "deferred": (64, 65, 191), "seed": seeds},
        {"uncond": uncond, "cfg_scale": 0.5, "softcap": 20.0},
    )
    for more in cases:
        options = {"mask_id": MASK, "confidence": confidence, **noise_key(ROWS, device), **more}
        truth = reference.predict(double(hidden), double(weight), **{k: double(x) for k, x in options.items()})
        ids = VOCAB // size
        for found in played(
            size, ids, lambda r, o=options, n=ids: predict_share.predict_share(hidden, weight[r.first :][:n], r, **o)
        ):
            assert [x.dtype for x in found] == [torch.int64, torch.float32, torch.float32]
            assert torch.equal(found[0], truth[0])
            for ours, exact in zip(found[1:], truth[1:], strict=True):
                torch.testing.assert_close(ours.double(), exact, rtol=2e-5, atol=2e-6)


def test_tiles_are_whole():
    assert [predict_share.tile_of(ids) for ids in (63232, 31616, 15808, 4096, 52)] == [256, 128, 64, 2048, 4]
    assert predict_share.fits_share(15808) and not predict_share.fits_share(52)
