"""Noise and prediction with a seed for each row: the definition, and what each row gets alone."""

import pytest
import torch
from test_gumbel import assert_close
from test_predict import MASK, PATHS, assert_matches, poison, problem  # noqa: F401

from dllm_fast.kernels import reference
from dllm_fast.kernels.gumbel import gumbel, uniform
from dllm_fast.kernels.predict import predict


def test_noise(device):
    """It may differ in either half of its 64 bits."""
    row, position = torch.full((2, 5), 7, device=device)
    columns, seed = torch.arange(9, device=device), torch.tensor([3, -3, 3 + (1 << 40), 3, 1 << 62], device=device)
    together = gumbel(seed, 4, row, position, columns), uniform(seed, 4, row, position)
    for found, definition in zip(together, (reference.gumbel, reference.uniform), strict=True):
        assert len(found.unique(dim=0)) == 4 and torch.equal(found[0], found[3])
        more = (columns,) if found.dim() == 2 else ()
        assert_close(found, definition(seed, 4, row, position, *more))
    for n, own in enumerate(seed.tolist()):
        assert torch.equal(together[0][n], gumbel(own, 4, row[:1], position[:1], columns)[0])
        assert together[1][n] == uniform(own, 4, row[:1], position[:1])


@pytest.mark.parametrize("path", PATHS)
def test_predictions(path, device, poison):  # noqa: F811
    hidden, weight, bias = problem(7, 130, 24, torch.bfloat16, device)
    hidden, keys = hidden[:1].repeat(7, 1), {"row": torch.full((7,), 5, device=device), "step": 2}
    keys["position"] = keys["row"]
    seeds = torch.tensor([3, -3, 3 + (1 << 40), 3, 1 << 62, 9, 0], device=device)
    candidate = torch.arange(7, device=device) != 1
    for confidence in ("probability", "random"):
        options = {"mask_id": MASK, "confidence": confidence, "temperature": 1.5, **keys}
        found = assert_matches(hidden, weight, bias, path, **options, seed=seeds, candidate=candidate)
        assert found[0][0] == found[0][3] and len(found[0][candidate].unique()) > 3
        for n in (0, 4):
            own = options | {"row": keys["row"][:1], "position": keys["row"][:1], "seed": int(seeds[n])}
            assert predict(hidden[:1], weight, bias, _path=path, **own)[0] == found[0][n]
