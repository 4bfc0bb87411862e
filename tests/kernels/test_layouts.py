"""The layout of a kernel's arguments changes no bit of its results: rows far apart, odd strides, unaligned addresses.

Every launcher has a case, and a test checks that the list is complete.
"""

from types import SimpleNamespace

import pytest
import torch

from dllm_fast import launchers
from dllm_fast.kernels import reference, reference_rounded
from dllm_fast.kernels.attention import attention
from dllm_fast.kernels.commit import commit
from dllm_fast.kernels.glu import geglu, swiglu
from dllm_fast.kernels.grouped import grouped_linear
from dllm_fast.kernels.gumbel import gumbel, uniform
from dllm_fast.kernels.linear import linear
from dllm_fast.kernels.linear_int4 import linear_int4, widen_int4
from dllm_fast.kernels.linear_rope import linear_int4_rope, linear_rope
from dllm_fast.kernels.masked_loss import masked_loss
from dllm_fast.kernels.norm import layer_norm, rms_norm
from dllm_fast.kernels.predict import predict
from dllm_fast.kernels.predict_share import predict_share
from dllm_fast.kernels.reference_rounded import round_rows as rounded
from dllm_fast.kernels.rope import rope
from dllm_fast.kernels.round_rows import round_rows

BF16, FP32 = torch.bfloat16, torch.float32


def _normal(*shape, dtype=BF16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def _rope():
    q, keys = _normal(2, 3, 4, 32), _normal(2, 9, 2, 32)
    k, v = _normal(2, 3, 2, 32), _normal(2, 3, 2, 32, seed=1)
    cos, sin = reference.rope_table(20, 32, 1e4)
    return {"q": q, "k": k, "v": v, "cos": cos, "sin": sin, "position": torch.tensor([0, 5]),
            "slot": torch.tensor([2, 6]), "keys": keys, "values": keys.clone()}  # fmt: skip


def _rows(batch):
    return torch.arange(batch) % 3


def _predict(vocabulary=200, rows=5, width=48):
    return {
        "hidden": _normal(rows, width), "weight": _normal(vocabulary, width), "bias": _normal(vocabulary),
        "candidate": torch.arange(rows) % 3 != 1, "uncond": _normal(rows, width, seed=3), "row": _rows(rows),
        "position": torch.arange(rows), "mask_id": 7, "cfg_scale": 0.5, "temperature": 0.7, "seed": 5, "step": 2,
    }  # fmt: skip


def _predict_share():
    """Of the only process that has a share."""
    ranks = SimpleNamespace(size=1, rank=0, ids=192, first=0, exchange=lambda *share: share)
    return {name: x for name, x in _predict(192).items() if name != "bias"} | {"ranks": ranks}


def _scaled_linear():
    weight, scale = rounded(_normal(128, 256))
    return {"x": _normal(5, 256), "weight": weight, "scale": scale[:, 0].contiguous()}


def _four_bits():
    packed, scale, zero = reference_rounded.round_int4(_normal(128, 256))
    return {"packed": packed, "scale": scale, "zero": zero}


def _linear_rope(weight, scale):
    given = {name: x for name, x in _rope().items() if name in ("position", "slot")}
    given |= dict(zip(("cos", "sin"), reference.rope_table(20, 128, 1e4), strict=True))
    keys = _normal(2, 9, 1, 128)
    return {"x": _normal(2, 3, 256), **weight, "scale": scale, **given, "keys": keys, "values": keys.clone()}


def _linear_int4_rope():
    packed, scale, zero = reference_rounded.round_int4(_normal(512, 256))
    return _linear_rope({"packed": packed, "zero": zero}, scale)


# A launcher, its arguments, and the names of those whose rows may be apart. Others are contiguous, at any address.
CASES = {
    "rms_norm": (rms_norm, lambda: {"x": _normal(3, 40), "weight": _normal(40), "eps": 1e-5,
                                    "residual": _normal(3, 40, seed=1)}, ("x", "residual")),
    "layer_norm": (layer_norm, lambda: {"x": _normal(3, 40), "weight": _normal(40), "bias": _normal(40, seed=2),
                                        "eps": 1e-5, "residual": _normal(3, 40, seed=1)}, ("x", "residual")),
    "swiglu": (swiglu, lambda: {"gate": _normal(3, 40), "up": _normal(3, 40, seed=1)}, ("gate", "up")),
    "geglu": (geglu, lambda: {"gate": _normal(3, 40), "up": _normal(3, 40, seed=1)}, ("gate", "up")),
    "round_rows": (round_rows, lambda: {"x": _normal(3, 40)}, ("x",)),
    "linear": (linear, lambda: {"x": _normal(5, 256), "weight": _normal(128, 256)}, ("x",)),
    "linear e4m3": (linear, _scaled_linear, ("x",)),
    "linear_int4": (linear_int4, lambda: {"x": _normal(5, 256), **_four_bits()}, ("x",)),
    "widen_int4": (widen_int4, lambda: {**_four_bits(), "width": 250, "dtype": BF16}, ()),
    "linear_rope": (linear_rope, lambda: _linear_rope({"weight": _normal(512, 256)}, None), ("x",)),
    "linear_int4_rope": (linear_int4_rope, _linear_int4_rope, ("x",)),
    "rope": (rope, _rope, ("q", "k", "v", "keys", "values")),
    "attention": (attention, lambda: {
        "q": _normal(2, 3, 4, 32), "keys": _normal(2, 9, 2, 32), "values": _normal(2, 9, 2, 32, seed=1),
        "start": torch.tensor([0, 2]), "end": torch.tensor([9, 8]), "slot": torch.tensor([4, 5]),
    }, ("q", "keys", "values")),
    "predict fused": (predict, lambda: _predict() | {"_path": "fused"}, ()),
    "predict streamed": (predict, lambda: _predict() | {"_path": "streamed"}, ()),
    "predict_share": (predict_share, _predict_share, ()),
    "commit": (commit, lambda: {
        "sequence": torch.arange(24).view(2, 12), "token": torch.arange(100, 110).view(2, 5),
        "confidence": _normal(2, 5, dtype=FP32), "candidate": torch.ones(2, 5, dtype=torch.bool),
        "slot": torch.tensor([3, 4]), "count": torch.tensor([2, 3]),
    }, ("sequence",)),
    "masked_loss": (masked_loss, lambda: {
        "hidden": _normal(5, 48), "weight": _normal(200, 48), "bias": _normal(200), "target": torch.arange(5) * 30,
        "loss_weight": _normal(5, dtype=FP32),
    }, ()),
    "grouped_linear": (grouped_linear, lambda: {
        "x": _normal(6, 48), "weight": _normal(2, 40, 48), "ends": torch.tensor([2, 6]),
    }, ("x",)),
    "gumbel": (gumbel, lambda: {"seed": 3, "step": 1, "row": _rows(4), "position": _rows(4) + 1,
                                "columns": torch.arange(50)}, ()),
    "uniform": (uniform, lambda: {"seed": 3, "step": 1, "row": _rows(4), "position": _rows(4) + 1}, ()),
}  # fmt: skip

# A library multiplies them, and may sum in another order at another alignment.
LIBRARY = dict.fromkeys(("predict streamed", "predict_share"), ("hidden", "weight", "uncond"))


def shifted(x):
    """``x``, contiguous, one element after an aligned address; rounded weights are read in words of four bytes."""
    by = 4 if x.dtype in (torch.float8_e4m3fn, torch.uint8) else 1
    base = torch.empty(x.numel() + 2 * by, dtype=x.dtype, device=x.device)
    return base[by : by + x.numel()].view(x.shape).copy_(x)


def apart(x):
    """``x`` with a dense last dimension and odd strides elsewhere, one element after an aligned address."""
    wide = torch.empty([n + 1 for n in x.shape[:-1]] + [x.shape[-1] + 3], dtype=x.dtype, device=x.device)
    return wide[(*[slice(1, None)] * (x.dim() - 1), slice(1, x.shape[-1] + 1))].copy_(x)


def run(name, device, lay=None):
    """Results and tensors written in place, with arguments laid out by ``lay(argument's name, tensor)``."""
    launch, make, _ = CASES[name]
    arguments = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in make().items()}
    if lay:
        arguments = {key: lay(key, x) if isinstance(x, torch.Tensor) else x for key, x in arguments.items()}
    out = launch(**arguments)
    written = [arguments[key] for key in ("keys", "values", "sequence") if key in arguments]
    return [*(out if isinstance(out, tuple) else (out,)), *written]


def same(name, device, lay):
    for odd, plain in zip(run(name, device, lay), run(name, device), strict=True):
        assert torch.equal(odd.float().nan_to_num(1e9), plain.float().nan_to_num(1e9))


@pytest.mark.parametrize("name", CASES)
def test_any_address(name, device):
    same(name, device, lambda key, x: x if key in LIBRARY.get(name, ()) else shifted(x))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[2]])
def test_rows_apart(name, device):
    same(name, device, lambda key, x: apart(x) if key in CASES[name][2] else shifted(x))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if len(case[2]) > 1])
def test_each_argument_has_strides_of_its_own(name, device):
    for one in CASES[name][2]:
        same(name, device, lambda key, x, one=one: apart(x) if key == one else x)


def test_no_launcher_is_forgotten():
    """The launchers that models and the loop call."""
    fitting = {"counters", "fits", "fits_int4", "fits_rope", "fits_share"}
    called = {name for names in launchers.KERNELS.values() for name in names} - fitting
    assert called <= {name.split()[0] for name in CASES}
