"""Models of transformers that run their own forward: their logits, and the tokens of a plain loop over it."""

import functools

import pytest
import transformers
from others import OTHERS, SHIFTED, OwnMemory, make
from test_skip_committed import check_plain_loop

from dllm_fast import backend

pytestmark = pytest.mark.skipif(
    not backend.is_available(), reason=f"transformers {transformers.__version__} asks for masks in another way"
)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("seed", range(6))
def test_tokens_of_the_plain_loop(name, seed):
    options = {"skip_committed": False} if name in SHIFTED else {}
    check_plain_loop(name, seed, functools.partial(make, name), OwnMemory, **options)
