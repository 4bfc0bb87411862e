"""The decoding loop on the kernels gives PyTorch's tokens, on a GPU or else in Triton's interpreter.

Rounding may decide between two candidates that are nearly equal. If a row differs, this must be the reason: on PyTorch,
weights changed by a rounding error must give it the same tokens.
"""

import functools
import random

import pytest
import torch
from needs import needs_triton
from rows import Request, alone, draw_request, is_level, seated, together
from tiny import EOS, MASK, make_llada, make_modernbert

import dllm_fast
from dllm_fast import Drift, Every, ReMDM, Threshold, Uniform, Verify, Window, launchers
from dllm_fast.decoding.request import plan_blocks

pytestmark = [needs_triton, pytest.mark.usefixtures("strict_interpreter", "poisoned_outputs")]

# By how much weights are changed: about a unit in the last place.
ROUNDINGS = {torch.float32: 2.0**-22, torch.float16: 2.0**-10}
# In the interpreter a position of a layer takes milliseconds.
FAMILIES = {
    "llada": lambda seed: make_llada(seed, n_layers=2, d_model=32, n_heads=2, mlp_hidden_size=32),
    "llada-gqa": lambda seed: make_llada(seed, n_layers=2, d_model=32, n_heads=2, n_kv_heads=1, mlp_hidden_size=32),
    "modernbert": lambda seed: make_modernbert(seed, num_hidden_layers=2, hidden_size=32, intermediate_size=32),
}


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def pair(name: str, seed: int, device: str, dtype: torch.dtype = torch.float32):
    """The same model on the kernels and on PyTorch."""
    ours, plain = (FAMILIES[name](seed).to(device, dtype) for _ in range(2))
    return dllm_fast.patch(ours, impl="triton"), dllm_fast.patch(plain, impl="torch")


def check(ours, plain, request: Request, run, rounding: float = ROUNDINGS[torch.float32]) -> None:
    expected = alone(plain, request)
    for row, (found, own) in enumerate(zip(run(ours, request), expected, strict=True)):
        level = found == own or is_level(plain, request, row, found, rounding)
        assert level, f"row {row}: {found}, not {own}: {request}"


def draw(seed: int, rows: tuple[int, ...], **limits) -> tuple[str, Request]:
    """A family and a request. Half of the requests for several rows have one length, and so no padding."""
    rng = random.Random(seed)
    name = rng.choice(sorted(FAMILIES))
    request = draw_request(rng, rows, **limits, windows=name == "modernbert")
    if not torch.cuda.is_available():  # the interpreter has no e4m3
        request.options.pop("cache_dtype", None)
    if rng.random() < 0.5:
        width = min(map(len, request.prompts))
        cut = [prompt[:width].clone() for prompt in request.prompts]
        if request.options["gen_length"] == 0:
            cut[0][0] = MASK
        if fits(cut, request.options):
            request.prompts = cut
    return name, request


def fits(prompts: list[torch.Tensor], options: dict) -> bool:
    """Whether the schedule's steps suit each prompt's number of blocks."""
    new = torch.ones(options["gen_length"], dtype=torch.bool)
    try:
        for blocks in (plan_blocks(torch.cat((p == MASK, new)), options["block_length"]) for p in prompts):
            if blocks:
                options["schedule"].check(len(blocks), max(masked for _, masked in blocks))
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long)])
def test_any_request(seed, rows, device):
    name, request = draw(10 * seed + rows, (rows,), blocks=(2, 4), most_blocks=1, longest=4)
    check(*pair(name, seed, device), request, together)


@pytest.mark.long
@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("seed", range(100, 140))
def test_many_requests(seed, rows, device):
    name, request = draw(10 * seed + rows, (rows,), blocks=(2, 4, 8), most_blocks=2, longest=8)
    check(*pair(name, seed, device), request, together)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("seed", [302, 303, 309])
def test_a_request_through_seats(seed, dtype, device):
    """Three rows through two seats of `generate_many`, so that one is seated beside a row that has already begun."""
    name, request = draw(seed, (3,), blocks=(4,), most_blocks=1, longest=4)
    run = functools.partial(seated, seats=2)
    check(*pair(name, seed, device, dtype), request, run, ROUNDINGS[dtype])


@pytest.mark.parametrize("seed", [303, 305, 309])
def test_half_precision(seed, device):
    name, request = draw(seed, (1, 2), blocks=(4,), most_blocks=1, longest=4)
    check(*pair(name, seed, device, torch.float16), request, together, ROUNDINGS[torch.float16])


@pytest.mark.long
@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("seed", range(400, 412))
def test_many_requests_in_half_precision(seed, rows, device):
    name, request = draw(10 * seed + rows, (rows,), blocks=(2, 4, 8), most_blocks=2, longest=8)
    check(*pair(name, seed, device, torch.float16), request, together, ROUNDINGS[torch.float16])


@pytest.mark.long
@pytest.mark.parametrize("seats", [1, 2])
@pytest.mark.parametrize("seed", range(200, 212))
def test_many_requests_through_seats(seed, seats, device):
    name, request = draw(seed, (3,), blocks=(4,), most_blocks=2, longest=8)
    check(*pair(name, seed, device), request, lambda model, request: seated(model, request, seats))


def fixed(options: dict, rows: int = 1) -> Request:
    words = torch.randint(0, EOS, (rows, 5), generator=torch.Generator().manual_seed(2))
    return Request([line[: 5 - row] for row, line in enumerate(words)], {"seed": 3, **options}, right=False)


@pytest.mark.parametrize("name", ["llada", "modernbert"])
@pytest.mark.parametrize("drawn", [{"temperature": 0.8}, {"confidence": "random"}], ids=str)
def test_one_row_that_draws(name, drawn, device):
    options = {"gen_length": 4, "block_length": 4, "schedule": Uniform(2), **drawn}
    check(*pair(name, 0, device), fixed(options), together)


# Wide enough for the matmuls of few rows, which rotate q and k and write k and v where they make them.
WIDE = {
    "llada": lambda: make_llada(n_layers=2, d_model=128, n_heads=2, mlp_hidden_size=128),
    "llada-gqa": lambda: make_llada(n_layers=2, d_model=256, n_heads=4, n_kv_heads=2, mlp_hidden_size=128),
    "modernbert": lambda: make_modernbert(num_hidden_layers=2, hidden_size=128, intermediate_size=128),
}


@pytest.mark.parametrize(
    ("name", "weights", "rows"),
    [
        ("llada", "fp8", 1),
        pytest.param("llada-gqa", "int4", 3, marks=pytest.mark.long),
        pytest.param("modernbert", "fp8", 2, marks=pytest.mark.long),
    ],
)
def test_rotation_in_the_matmul(name, weights, rows, device, monkeypatch):
    """The tokens of PyTorch, and those of a matmul and a rotation by themselves."""
    calls = []

    def counted(op):
        return lambda *arguments: calls.append(1) or op(*arguments)

    for op in ("linear_rope", "linear_int4_rope"):
        monkeypatch.setattr(launchers.triton(), op, counted(getattr(launchers.triton(), op)))
    ours, plain = (WIDE[name]().to(device, torch.float16) for _ in range(2))
    dllm_fast.patch(ours, impl="triton", weights=weights)
    dllm_fast.patch(plain, impl="torch", weights=weights)
    options = {"gen_length": 4, "block_length": 4, "schedule": Uniform(2), "refresh": Drift(0.3), "temperature": 0.5}
    request = fixed(options, rows)
    monkeypatch.setattr("dllm_fast.kernels.linear_rope.ROPE", (torch.float8_e4m3fn, torch.uint8))
    rotated = together(ours, request)
    assert calls
    check(ours, plain, request, lambda *_: rotated, ROUNDINGS[torch.float16])
    calls.clear()
    monkeypatch.setattr("dllm_fast.kernels.linear_rope.ROPE", ())
    assert together(ours, request) == rotated and not calls


EVERY = [
    *[{"cache": cache, "cfg_scale": 1.0, "temperature": 0.5} for cache in ("none", "prefix", "dual")],
    *[{"refresh": refresh, "schedule": Threshold(0.05)} for refresh in (Every(2), Window(2, 1), Drift(0.3))],
    *[{"remask": remask, "confidence": "margin"} for remask in (ReMDM(1.0), Verify(0.3))],
]


@pytest.mark.long
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("options", EVERY, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_each_kind_of_option(name, options, rows, device):
    """Every kernel must have run: chance may not leave one out."""
    request = fixed({"gen_length": 8, "block_length": 4, "schedule": Uniform(4), **options}, rows)
    check(*pair(name, 0, device), request, together)
