"""A row's bits do not depend on the number of rows in its batch, wherever docs/batch-invariance.md promises it."""

import pytest
import torch
from test_predict import MASK, noise_key, problem

from dllm_fast.kernels.predict import predict


@pytest.mark.parametrize("confidence", ["probability", "margin"])
def test_predict_at_batch_1_to_4(confidence, device):
    """Blocks of 32 rows, up to 128 rows: the fused kernel always has the same vocabulary tiles and steps over D."""
    hidden, weight, bias = problem(128, 200, 130, torch.bfloat16, device)
    options = {"mask_id": MASK, "confidence": confidence, "temperature": 0.5}
    alone = None
    for batch in (1, 2, 3, 4):
        rows = 32 * batch
        key = {name: x[:rows] if isinstance(x, torch.Tensor) else x for name, x in noise_key(128, device).items()}
        found = [x[:32] for x in predict(hidden[:rows], weight, bias, **options, **key)]
        alone = found if alone is None else alone
        assert all(torch.equal(x, own) for x, own in zip(found, alone, strict=True))
