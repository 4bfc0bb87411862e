"""``speculate``: the same tokens in fewer forwards."""

import random

import pytest
from rows import batched, draw_request
from tiny import MAKERS

import dllm_fast


@pytest.mark.parametrize("name", ["llada-gqa", "modernbert"])
@pytest.mark.parametrize("seed", range(25))
def test_the_same_tokens_as_without(name, seed):
    """In fp64, where more rows in a matmul make no candidates change places."""
    model = dllm_fast.patch(MAKERS[name]().double(), impl="torch")
    rng = random.Random(seed)
    request = draw_request(rng, rows=(1, 3), most_blocks=2, longest=12, windows=name == "modernbert")
    request.options |= {"skip_committed": False, "speculate": None}
    without, _ = batched(model, request)
    request.options["speculate"] = rng.choice([1, 2, 3, 7])
    with_drafts, _ = batched(model, request)
    assert [ids for ids, _ in with_drafts] == [ids for ids, _ in without], str(request)
    assert all(mine <= its for (_, mine), (_, its) in zip(with_drafts, without, strict=True))
