"""``skip_committed``: the tokens, forwards and positions of the plain loop that defines it."""

import random

import plain_loop
import pytest
from rows import batched, draw_request
from tiny import MAKERS, MASK

import dllm_fast
from dllm_fast import Ancestral, Drift
from dllm_fast.decoding.options import Options
from dllm_fast.patch import bound_family


@pytest.mark.parametrize("name", ["llada-gqa", "modernbert"])
@pytest.mark.parametrize("seed", range(30))
def test_tokens_of_the_plain_loop(name, seed):
    """Random requests, each row alone by the plain loop and all rows as one batch: in fp64, where nothing is level but
    positions that see [MASK]s alone."""
    model = dllm_fast.patch(MAKERS[name]().double(), impl="torch")
    rng = random.Random(seed)
    while True:
        request = draw_request(rng, rows=(1, 3), most_blocks=2, longest=12)
        options = request.options
        planless = isinstance(options["schedule"], Ancestral) or isinstance(options.get("refresh"), Drift)
        suffix = options.get("suffix_length")
        seen = 40 if suffix is None else options["block_length"] + suffix
        level = any((prompt[:seen] == MASK).all() for prompt in request.prompts)
        if options["cache"] != "none" and not planless and not level:  # the plain loop has neither of the two
            break
    request.options["skip_committed"] = True
    resolved = Options(**options).resolved(model, bound_family(model))
    expected = [plain_loop.run(bound_family(model), ids, resolved, row) for row, ids in enumerate(request.prompts)]
    done, positions = batched(model, request)
    assert done == [(plain.ids.tolist(), plain.nfe) for plain in expected], str(request)
    assert positions == sum(plain.positions for plain in expected)
