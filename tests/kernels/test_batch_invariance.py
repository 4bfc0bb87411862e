"""What docs/batch-invariance.md promises of a row, whatever the number of rows in its batch."""

import pytest
import torch
from test_predict import MASK, noise_key, problem

from dllm_fast.kernels.predict import predict


@pytest.mark.parametrize("confidence", ["probability", "margin"])
def test_predict_at_batch_1_to_4(confidence, device):
    """Blocks of 32 rows, up to 128 rows: the fused kernel adds up a logit in the same order, so tokens are the same.
    The mass of a tile, and so confidences, are added up in an order that depends on the number of warps."""
    hidden, weight, bias = problem(128, 200, 130, torch.bfloat16, device)
    options = {"mask_id": MASK, "confidence": confidence, "temperature": 0.5}
    alone = None
    for batch in (1, 2, 3, 4):
        rows = 32 * batch
        key = {name: x[:rows] if isinstance(x, torch.Tensor) else x for name, x in noise_key(128, device).items()}
        token, *found = (x[:32] for x in predict(hidden[:rows], weight, bias, **options, **key))
        alone = [token, *found] if alone is None else alone
        assert torch.equal(token, alone[0])
        for x, own in zip(found, alone[1:], strict=True):
            torch.testing.assert_close(x, own, rtol=0, atol=2.0**-20)
