"""Keys and values in e4m3: the kernels that write them and the one that reads them, against the fp64 definitions."""

import packs
import pytest
import torch
from e4m3 import E4M3, EVERY, assert_nearest, hard_cases, nearest
from test_attention import SHAPES, split_over
from test_attention import inputs as attention_inputs
from test_linear_rope import apart, copied, weights
from test_linear_rope import inputs as linear_inputs
from test_rope import SHAPES as ROPES
from test_rope import inputs as rope_inputs
from tiny import MAKERS
from truth import assert_as_exact, average_ulps

import dllm_fast
import dllm_fast.kernels.attention as module
from dllm_fast import Drift, Uniform, Window, launchers
from dllm_fast.kernels import reference
from dllm_fast.kernels.attention import attention
from dllm_fast.kernels.linear import linear
from dllm_fast.kernels.linear_int4 import linear_int4
from dllm_fast.kernels.linear_rope import linear_int4_rope, linear_rope
from dllm_fast.kernels.reference_rounded import as_bytes
from dllm_fast.kernels.rope import rope

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NEAR = 2.0**-21  # relative error of a rotation in fp32
LACKS = launchers.no_e4m3(torch.device("cuda")) if torch.cuda.is_available() else None

pytestmark = pytest.mark.skipif(LACKS is not None, reason=str(LACKS))


def narrow(arguments):
    q, keys, values, *rest = arguments
    return q, keys.to(E4M3), values.to(E4M3), *rest


def check_attention(poisoned, clean, total=None, first=None, most=0):
    poisoned, (q, keys, values, *ranges) = narrow(poisoned), narrow(clean)
    truth = reference.attention(q.double(), keys, values, *ranges, first=first)[:total]
    eager = reference.attention(q, keys.to(q.dtype), values.to(q.dtype), *ranges, first=first)[:total]
    out = attention(*poisoned, first=first, most=most)
    assert out.dtype == q.dtype and out.is_contiguous()
    size = values.float().abs().max().item() if q.dtype == FP32 else None
    assert_as_exact(out[:total], eager, truth, average_ulps(out), size)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("name", ["block-left-padded", "gqa-3", "dim-40", "long", "long-gqa-dim-96", "window-5"])
def test_attention(name, dtype, device):
    check_attention(*attention_inputs(SHAPES[name], dtype, device))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("splits", [None, 3])
@pytest.mark.parametrize("name", packs.SHAPES)
def test_packed_attention(name, splits, dtype, device, monkeypatch):
    if splits:
        split_over(splits, monkeypatch)
    poisoned, clean, first, most, total = packs.inputs(packs.SHAPES[name], dtype, device)
    check_attention(poisoned, clean, total, first, most)


def test_many_rows_have_tiles_of_their_own():
    def tiles(queries, window=None, widened=True, size=2, big=True):
        return module._plan(1, queries, 32, 1, 128, 2048, window, size, big, widened)[0]

    for big in (True, False):
        assert (tiles(8, big=big), tiles(2048, big=big)) == module.WIDENED[128, big]
    assert tiles(2048, widened=False) == module.CONFIGS[2, 128, True][1]
    assert tiles(32) == tiles(2048, window=9) == module.CONFIGS[2, 128, True][0]
    assert tiles(2048, size=4) == module.CONFIGS[4, 128, True][1]


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_every_number_is_widened_exactly(dtype, device):
    values = EVERY.view(1, 4, 1, 64).to(device)
    rows = torch.zeros(1, dtype=torch.int64, device=device)
    q, keys = torch.randn(1, 3, 1, 64).to(device, dtype), torch.zeros(1, 4, 1, 64, device=device).to(E4M3)
    for slot in range(4):
        out = attention(q, keys, values, rows + slot, rows + slot + 1, rows)
        expected = values[:, slot].to(dtype).expand_as(out[:, :, 0])
        torch.testing.assert_close(out[:, :, 0], expected, rtol=0, atol=0, equal_nan=True)
    as_bytes(keys)[0, 0, 0, 5] = 0xFF
    assert attention(q, keys, keys, rows, rows + 4, rows).isnan().all()


def both(mine, at=7):
    """Arguments of `reference.rope` with e4m3 buffers, and the same in fp64."""
    exact = [x.double() if x.is_floating_point() else x.clone() for x in mine]
    mine = list(mine)
    mine[at : at + 2] = [nearest(x.double()).to(E4M3) for x in mine[at : at + 2]]
    exact[at : at + 2] = [x.double() for x in mine[at : at + 2]]
    return mine, exact


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("name", ROPES)
def test_rope(name, dtype, device):
    mine, exact = both(rope_inputs(ROPES[name], dtype, device))
    truth = reference.rope(*exact)
    assert_as_exact(rope(*mine), truth.to(dtype), truth, ulps=2)
    assert_nearest(mine[7], exact[7], NEAR * exact[1].abs().max().item())
    assert_nearest(mine[8], exact[8])


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("name", packs.SHAPES)
def test_packed_rope(name, dtype, device):
    mine, exact = both(packs.rope_inputs(packs.SHAPES[name], dtype, device))
    truth = reference.rope(*exact)
    assert_as_exact(rope(*mine), truth.to(dtype), truth, ulps=2)
    assert_nearest(mine[7], exact[7], NEAR * exact[1].abs().max().item())
    assert_nearest(mine[8], exact[8])


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_what_is_hard_to_round(dtype, device):
    v = torch.nn.functional.pad(hard_cases(), (0, -len(hard_cases()) % 14)).to(device, dtype).view(1, -1, 1, 14)
    k = v.where(v.isfinite(), 1.0)
    slots = v.shape[1]
    keys, values = torch.zeros(2, 1, slots, 1, 14, device=device).to(E4M3)
    tables = torch.ones(slots, 7, device=device), torch.zeros(slots, 7, device=device)
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    rope(k, k, v, *tables, zero, zero, keys, values)
    assert_nearest(values, v.double())
    assert_nearest(keys, k.double())
    k[0, 2, 0, 3] = torch.nan
    rope(k, k, v, *tables, zero, zero, keys, values)
    assert keys[0, 2, 0].float()[[3, 10]].isnan().all()


@pytest.mark.parametrize("name", ["left-padded", "gqa", "outside", "most-rows"])
@pytest.mark.parametrize("kind", ["bf16", "e4m3", "int4"])
def test_a_matmul_that_rotates(name, kind, device):
    """The bits of a matmul and a rotation, as in test_linear_rope.py, and the definition's numbers."""
    x, weight, mine = linear_inputs(name, BF16, device)
    mine[4:] = [buffer.to(E4M3) for buffer in mine[4:]]
    given, exact, four_bits = weights(kind, weight, BF16, device)
    others, truths = copied(mine), copied(mine, wide=True)
    q = (linear_int4_rope if four_bits else linear_rope)(x, *given, *mine)
    assert torch.equal(q, apart((linear_int4 if four_bits else linear)(x, *given), rope, others))
    assert all(torch.equal(*map(as_bytes, pair)) for pair in zip(mine[4:], others[4:]))
    y = reference.linear(x.double(), exact[0].double(), None if exact[1] is None else exact[1].double())
    apart(y, reference.rope, truths)
    slack = 2.0**-8 * y.abs().max().item()  # of the matmul's result in bf16, in both halves
    assert_nearest(mine[4], truths[4], slack)
    assert_nearest(mine[5], truths[5], slack)


@pytest.mark.parametrize("which", ["rope", "attention", "linear_rope"])
def test_buffers_of_one_kind_are_asked_for(which):
    row, at = torch.zeros(2, 4, 2, 16), torch.zeros(2, dtype=torch.int64)
    narrow, wide = torch.zeros(2, 9, 2, 16).to(E4M3), torch.zeros(2, 9, 2, 16)
    x, weight, (cos, sin, position, slot, keys, values) = linear_inputs("left-padded", BF16, "cpu")
    calls = {
        "rope": lambda k, v: rope(row, row, row, torch.zeros(9, 8), torch.zeros(9, 8), at, at, k, v),
        "attention": lambda k, v: attention(row, k, v, at, at + 9, at),
        "linear_rope": lambda k, v: linear_rope(x, weight.to(BF16), None, cos, sin, position, slot, k, v),
    }
    if which == "linear_rope":
        narrow, wide = keys.to(E4M3), values
    with pytest.raises(ValueError, match=r"values is torch\.(float32|bfloat16) .*expected torch.float8_e4m3fn"):
        calls[which](narrow, wide)
    with pytest.raises(ValueError, match=r"values is torch.float8_e4m3fn .*expected torch\.(float32|bfloat16)"):
        calls[which](wide, narrow)


def test_opcheck(device):
    """But for the schema's own test, which multiplies arguments by numbers: PyTorch cannot in e4m3."""
    faketensor = {"test_utils": "test_faketensor"}
    torch.library.opcheck(attention, narrow(attention_inputs(SHAPES["gqa-2"], FP32, device)[1]), **faketensor)
    torch.library.opcheck(rope, tuple(both(rope_inputs(ROPES["gqa"], FP32, device))[0]), **faketensor)
    x, weight, mine = linear_inputs("left-padded", BF16, device)
    mine[4:] = [buffer.to(E4M3) for buffer in mine[4:]]
    torch.library.opcheck(linear_rope, (x, weight.to(device, BF16), None, *mine), **faketensor)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("llada-gqa", {"skip_committed": True, "schedule": Uniform(4), "gen_length": 8, "refresh": Window(4)}),
        pytest.param("modernbert", {"cfg_scale": 1.0, "temperature": 0.7}, marks=pytest.mark.long),
        ("llada-gqa", {"cache": "prefix", "refresh": Drift(0.1), "gen_length": 8}),
    ],
    ids=["packed", "guided", "drift"],
)
def test_kernels_give_the_tokens_of_pytorch(name, more, device, monkeypatch):
    """In this folder's interpreter, which rounds as a GPU does."""
    monkeypatch.setattr(launchers, "no_e4m3", lambda device: None)
    model = MAKERS[name]().to(device)
    ids = torch.randint(0, 99, (2, 8), generator=torch.Generator().manual_seed(1)).to(device)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    options = {"schedule": Uniform(2), "gen_length": 4, "block_length": 4, "seed": 3, "cache_dtype": "e4m3", **more}
    expected = dllm_fast.generate(dllm_fast.patch(model, impl="torch"), ids, mask, **options)
    got = dllm_fast.generate(dllm_fast.patch(model, impl="triton"), ids, mask, **options)
    assert torch.equal(got.sequences, expected.sequences) and got.nfe == expected.nfe


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may have it")
def test_the_plain_interpreter_is_refused():
    model = dllm_fast.patch(MAKERS["llada"](), impl="triton")
    with pytest.raises(ValueError, match="cache_dtype='e4m3': Triton's interpreter rounds small numbers to 0"):
        dllm_fast.generate(model, torch.zeros(1, 5, dtype=torch.int64), cache_dtype="e4m3")
