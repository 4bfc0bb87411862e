"""e4m3 weights: rounded as defined, multiplied within what rounding allows, and always of the weights as they are."""

import copy

import pytest
import torch
from tiny import MAKERS
from torch import nn

import dllm_fast
from dllm_fast import fp8
from dllm_fast.kernels import reference
from dllm_fast.patch import bound_family

E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
VALUES = E4M3[E4M3.isfinite()].unique()  # every number that e4m3 has, sorted; those with an even last bit are even here
ZERO = int((VALUES == 0).nonzero())


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def nearest(x, scale):
    """x [N, K], a row over its scale in fp32 put to the nearest number of e4m3, ties to even; and back, in fp64."""
    values, scaled = VALUES.to(x.device), (x.float() / scale).contiguous()
    above = torch.searchsorted(values, scaled).clamp(1, len(values) - 1)
    to_low, to_high = scaled.double() - values[above - 1], values[above] - scaled.double()
    low = (to_low < to_high) | ((to_low == to_high) & ((above - 1 - ZERO) % 2 == 0))
    return values[torch.where(low, above - 1, above)].double() * scale.double()


def scale_of(x):
    return x.float().abs().amax(1, keepdim=True) / 448


def linears_of(model):
    return [linear for group in bound_family(model).groups() for linear in group]


def rounded_twin(model):
    """A copy of an unpatched model whose layers' weights are rounded to e4m3 and back, so that nothing else differs."""
    twin = copy.deepcopy(model)
    for linear in linears_of(dllm_fast.patch(twin)):
        linear.weight.data = nearest(linear.weight.data, scale_of(linear.weight.data)).to(linear.weight.dtype)
    return dllm_fast.patch(twin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_rounding_is_to_the_nearest_of_each_rows_448th(dtype):
    torch.manual_seed(0)
    x = (torch.randn(7, 333) * torch.logspace(-6, 3, 7)[:, None]).to(dtype)
    x[2] = 0
    rounded, scale = reference.round_rows(x)
    assert rounded.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32 and scale.shape == (7, 1)
    alive = x.abs().amax(1) > 0
    assert torch.equal(scale[alive], scale_of(x)[alive]) and (rounded[~alive].float() == 0).all()
    assert torch.equal(rounded.double() * scale.double(), nearest(x, scale))
    assert (rounded.float().abs().amax(1)[alive] == 448).all()


def check_product(y, x, weight, bound):
    """y = x W^T to within ``bound`` of |x| |W|^T."""
    truth = x.double() @ weight.double().T
    assert y.shape == truth.shape and y.isfinite().all()
    assert ((y.double() - truth).abs() <= bound * (x.double().abs() @ weight.double().abs().T) + 1e-30).all()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products_are_those_of_the_rounded_weights(dtype, monkeypatch):
    """Weights of 37 rows in pieces of 16: to the rounding of the weight and of the result in x's dtype."""
    torch.manual_seed(0)
    monkeypatch.setattr(fp8, "CHUNK", 16)
    linears = [nn.Linear(24, 37, bias=False), nn.Linear(24, 5)]
    linears = [linear.to(dtype) for linear in linears]
    x = torch.randn(2, 3, 24).to(dtype)
    one, other = fp8.Fp8()(x, *linears)
    assert one.dtype == dtype and one.shape == (2, 3, 37) and other.shape == (2, 3, 5)
    for y, linear in ((one, linears[0]), (other - linears[1].bias, linears[1])):
        slack = 4 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
        rounded = nearest(linear.weight, scale_of(linear.weight))
        check_product(y.flatten(0, 1), x.flatten(0, 1), rounded, slack)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_the_scaled_product_is_that_of_rounded_rows_and_rounded_weights(dtype, monkeypatch):
    """What runs on Hopper is PyTorch's own op, which its CPU build has too."""
    torch.manual_seed(0)
    monkeypatch.setattr(fp8, "native", lambda device: True)
    linear = nn.Linear(64, 48, bias=False, dtype=dtype)
    for rows in (1, 5, 33):
        x = (torch.randn(rows, 64) * torch.logspace(-2, 2, rows)[:, None]).to(dtype)
        try:
            (y,) = fp8.Fp8()(x, linear)
        except RuntimeError as error:
            pytest.skip(f"torch {torch.__version__} has no scaled product by rows on the CPU: {error}")
        weight, x8 = (nearest(a, scale_of(a)) for a in (linear.weight, x))
        assert y.dtype == dtype
        check_product(y, x8, weight, 2**-8)
    assert fp8.Fp8()(x[:0], linear)[0].shape == (0, 48)


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
def test_an_fp8_model_is_the_model_with_rounded_weights(model, ids, padded, masked):
    """In fp32 to its rounding; the LM head, embeddings and norms are as they were."""
    expected = rounded_twin(model)(ids, attention_mask=padded if masked else None).logits
    own = model(ids, attention_mask=padded if masked else None).logits
    dllm_fast.patch(model, weights="fp8")
    got = model(ids, attention_mask=padded if masked else None).logits
    valid = padded.bool() if masked else torch.ones_like(padded, dtype=torch.bool)
    torch.testing.assert_close(got[valid], expected[valid], atol=2e-5, rtol=1e-4)
    assert (got - own)[valid].abs().max() > 100 * (got - expected)[valid].abs().max()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("cache", ["none", "dual"])
def test_generating_with_fp8_weights(either, ids, dtype, cache):
    model = dllm_fast.patch(either.to(dtype), weights="fp8")
    out = dllm_fast.generate(model, ids, gen_length=8, block_length=4, cache=cache)
    assert torch.equal(out.sequences[:, :24], ids) and not (out.sequences == model.config.mask_token_id).any()


def test_the_copies_take_a_byte_a_weight_and_a_scale_a_channel(llada):
    before = {name: (parameter, parameter.data_ptr()) for name, parameter in llada.named_parameters()}
    dllm_fast.patch(llada, weights="fp8")
    linears = linears_of(llada)
    copies = bound_family(llada).products.copies.values()
    stored = sum(x.untyped_storage().nbytes() for copy_ in copies for x in (copy_.matrix, copy_.scale))
    assert len(linears) == 3 * 7
    assert stored == sum(linear.weight.numel() + 4 * linear.out_features for linear in linears)
    for name, parameter in llada.named_parameters():
        assert parameter is before[name][0] and parameter.data_ptr() == before[name][1]


def train(model, ids):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with torch.enable_grad():
        model.train()(ids).logits.float().logsumexp(-1).mean().backward()
    optimizer.step()
    model.eval()


def load(model, ids):
    torch.manual_seed(5)
    model.load_state_dict({name: torch.randn_like(x) / 8 for name, x in model.state_dict().items()})


def move(model, ids):
    model.double()


def write_data(model, ids):
    """Through ``.data``, which PyTorch does not count: patching again is what sees it."""
    for parameter in model.parameters():
        parameter.data.mul_(1.25)
    dllm_fast.patch(model, weights="fp8")


def replace(model, ids):
    linear = next(bound_family(model).groups())[0]
    linear.weight = nn.Parameter(linear.weight.detach() * 2)


@torch.no_grad()
@pytest.mark.parametrize("change", [train, load, move, write_data, replace])
def test_copies_follow_the_weights(either, ids, change):
    dllm_fast.patch(either, weights="fp8")
    before = either(ids).logits
    change(either, ids)
    got = either(ids).logits
    assert not torch.allclose(got.to(before.dtype), before, atol=1e-4) or change is move
    plain = dllm_fast.unpatch(copy.deepcopy(either))
    torch.testing.assert_close(got, rounded_twin(plain)(ids).logits, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_copies_are_rewritten_where_they_lie(llada, ids):
    """A CUDA graph that was recorded on them goes on reading there."""

    def places():
        copies = bound_family(llada).products.copies.values()
        return [x.data_ptr() for copy_ in copies for x in (copy_.matrix, copy_.scale)]

    with torch.inference_mode():
        dllm_fast.patch(llada, weights="fp8")
    before = places()
    for change in (load, write_data):
        change(llada, ids)
        llada(ids)
        assert places() == before


def test_gradients_are_those_of_the_weights_themselves(llada, ids):
    own = copy.deepcopy(llada)
    bound_family(dllm_fast.patch(llada, impl="torch", weights="fp8")).hidden(ids).square().mean().backward()
    bound_family(dllm_fast.patch(own, impl="torch")).hidden(ids).square().mean().backward()
    for (name, parameter), other in zip(llada.named_parameters(), own.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        assert parameter.grad is None or torch.equal(parameter.grad, other.grad), name


def test_gradients_of_the_input_are_those_of_the_weights_themselves():
    """Where the weights are frozen, as below an adapter."""
    linear = nn.Linear(16, 8, bias=False).requires_grad_(False)
    x = torch.randn(3, 16, requires_grad=True)
    fp8.Fp8()(x, linear)[0].sum().backward()
    torch.testing.assert_close(x.grad, linear.weight.sum(0).expand(3, 16))


@torch.no_grad()
def test_fp8_comes_and_goes_with_patching(either, ids):
    own = either(ids).logits
    plain = dllm_fast.patch(either)(ids).logits
    with dllm_fast.patched(either, weights="fp8"):
        rounded = either(ids).logits
        assert not torch.allclose(rounded, plain, atol=1e-4)
        twin = copy.deepcopy(either)
    assert torch.equal(either(ids).logits, plain) and torch.equal(twin(ids).logits, rounded)
    dllm_fast.patch(either, weights="fp8")
    with torch.inference_mode():
        assert torch.equal(either(ids).logits, rounded)
        dllm_fast.generate(either, ids, gen_length=4, block_length=4)
    assert torch.equal(either(ids).logits, rounded)
    assert torch.equal(dllm_fast.unpatch(either)(ids).logits, own)


def test_what_cannot_be_had_is_refused_by_name(llada, monkeypatch, device):
    with pytest.raises(ValueError, match="weights='int4' is not one of None, 'fp8'"):
        dllm_fast.patch(llada, weights="int4")
    with pytest.raises(ValueError, match="weights='int4'"), dllm_fast.patched(llada, weights="int4"):
        pass
    block = llada.model.transformer.blocks[1]
    own, block.up_proj = block.up_proj, nn.Sequential(block.up_proj)
    message = r"weights='fp8': model.transformer.blocks.1.up_proj is a Sequential, not a plain nn.Linear"
    with pytest.raises(ValueError, match=message):
        dllm_fast.patch(llada, weights="fp8")
    assert "_dllm_fast" not in llada.__dict__
    block.up_proj = own
    dllm_fast.patch(llada, weights="fp8")
    block.up_proj = nn.Sequential(own)
    with torch.no_grad(), pytest.raises(ValueError, match=r"weights='fp8': needs plain .* not a Sequential"):
        llada(torch.zeros(1, 4, dtype=torch.int64, device=device))
    block.up_proj = own
    dllm_fast.unpatch(llada)
    monkeypatch.delattr(torch, "float8_e4m3fn")
    with pytest.raises(ValueError, match=rf"weights='fp8': PyTorch .* has no float8_e4m3fn on {device}"):
        dllm_fast.patch(llada, weights="fp8")
    assert "_dllm_fast" not in llada.__dict__


def test_makers_cover_biases():
    """Fp8 adds a module's own bias; the models above must have some, or nothing here shows it."""
    assert any(linear.bias is not None for linear in linears_of(dllm_fast.patch(MAKERS["modernbert-bias"]())))
