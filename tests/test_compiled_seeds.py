"""Prediction of the compiled extension with a seed for each row, on every instruction set that this CPU has."""

import pytest
import torch
from test_compiled_predict import BF16, MASK, assert_matches, every_level, noise_key, problem

from dllm_fast.cpu import compiled

pytestmark = [
    pytest.mark.skipif(bool(compiled.missing()), reason=str(compiled.missing())),
    pytest.mark.usefixtures("poisoned_outputs"),
]


@every_level
def test_a_seed_for_each_row(level, use):
    use(level)
    hidden, weight, bias = problem(50, 700, 16, BF16)
    seeds = (torch.arange(50) - 20) % 9 << torch.arange(50) % 60  # they differ in either half, also within a vector
    keys = noise_key(50) | {"seed": seeds}
    candidate = torch.arange(50) % 5 != 3
    for confidence in ("probability", "random"):
        options = {"mask_id": MASK, "temperature": 1.5, "confidence": confidence}
        found = assert_matches(hidden, weight, bias, **options, **keys, candidate=candidate)
        for n in (0, 1, 7, 16, 49):
            own = {name: x[n : n + 1] if isinstance(x, torch.Tensor) else x for name, x in keys.items()}
            one = compiled.predict(hidden[n : n + 1], weight, bias, **options, **own | {"seed": int(seeds[n])})
            assert one[0] == found[0][n] and (confidence != "random" or one[1] == found[1][n])


def test_bad_seeds():
    hidden, weight, _ = problem(4, 40, 8, BF16)
    row = torch.arange(4)
    for seed in (row[1:], row.int(), row[:, None]):
        with pytest.raises(ValueError, match="seed is"):
            compiled.predict(hidden, weight, mask_id=MASK, temperature=1.0, row=row, position=row, seed=seed)
