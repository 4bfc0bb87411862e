"""e4m3 and 4-bit weights: rounded as defined, matmuls within rounding, always copies of the current weights."""

import copy

import pytest
import torch
from tiny import MAKERS
from torch import nn

import dllm_fast
from dllm_fast.families import fp8, int4
from dllm_fast.families.rounded import KINDS, Copies
from dllm_fast.kernels import reference_rounded
from dllm_fast.patch import bound_family

E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
VALUES = E4M3[E4M3.isfinite()].unique()  # all e4m3 numbers, sorted; an even last bit means an even index
ZERO = int((VALUES == 0).nonzero())


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def nearest(x, scale):
    """x [N, K] rounded: each row over its fp32 scale to the nearest e4m3 number, ties to even, and back, in fp64."""
    values, scaled = VALUES.to(x.device), (x.float() / scale).contiguous()
    above = torch.searchsorted(values, scaled).clamp(1, len(values) - 1)
    to_low, to_high = scaled.double() - values[above - 1], values[above] - scaled.double()
    low = (to_low < to_high) | ((to_low == to_high) & ((above - 1 - ZERO) % 2 == 0))
    return values[torch.where(low, above - 1, above)].double() * scale.double()


def scale_of(x):
    return x.float().abs().amax(1, keepdim=True) / 448


def nearest_of_16(weight):
    """weight [N, K] with each group of 128 inputs rounded to 16 equal steps that include 0, in fp64."""
    groups = []
    for group in weight.float().split(128, 1):
        low, high = group.amin(1, keepdim=True).clamp(max=0), group.amax(1, keepdim=True).clamp(min=0)
        step = ((high - low) / 15).bfloat16().float()
        step[step == 0] = 1
        zero = (-low / step).round()
        groups.append(step.double() * ((group / step).round() + zero).clamp(0, 15).sub(zero).double())
    return torch.cat(groups, 1)


ROUNDED = {"fp8": lambda weight: nearest(weight, scale_of(weight)), "int4": nearest_of_16}


@pytest.fixture(params=list(ROUNDED))
def kind(request):
    return request.param


def linears_of(model):
    return [linear for group in bound_family(model).groups() for linear in group]


def rounded_twin(model, kind):
    """A copy of an unpatched model with its layers' weights rounded and widened, and nothing else changed."""
    twin = copy.deepcopy(model)
    for linear in linears_of(dllm_fast.patch(twin)):
        linear.weight.data = ROUNDED[kind](linear.weight.data).to(linear.weight.dtype)
    return dllm_fast.patch(twin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_rounding_is_to_the_nearest_of_each_rows_448th(dtype):
    torch.manual_seed(0)
    x = (torch.randn(7, 333) * torch.logspace(-6, 3, 7)[:, None]).to(dtype)
    x[2] = 0
    rounded, scale = reference_rounded.round_rows(x)
    assert rounded.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32 and scale.shape == (7, 1)
    alive = x.abs().amax(1) > 0
    assert torch.equal(scale[alive], scale_of(x)[alive]) and (rounded.float()[~alive] == 0).all()
    assert torch.equal(rounded.double() * scale.double(), nearest(x, scale))
    assert (rounded.float().abs().amax(1)[alive] == 448).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("width", [1, 128, 300, 384])
def test_four_bits_are_the_nearest_of_each_groups_16(width, dtype):
    torch.manual_seed(0)
    weight = (torch.randn(9, width) * torch.logspace(-6, 3, 9)[:, None]).to(dtype)
    weight[2], weight[3], weight[4] = 0, weight[3].abs(), -weight[4].abs()
    packed, scale, zero = reference_rounded.round_int4(weight)
    groups = -(-width // 128)
    assert (packed.dtype, scale.dtype, zero.dtype) == (torch.uint8, torch.bfloat16, torch.uint8)
    assert packed.shape == (9, 64 * groups) and scale.shape == zero.shape == (groups, 9)
    widened = reference_rounded.widen_int4(packed, scale, zero, width).double()
    assert torch.equal(widened, nearest_of_16(weight))
    step = scale.t().double().repeat_interleave(128, 1)[:, :width]
    # Half a step, plus at the ends half a rounding of the zero point and 15 half roundings of the step.
    assert ((widened - weight.float()).abs() <= (0.5 + 0.5 + 15 * 2**-9) * step).all()
    assert (widened == 0)[weight == 0].all()


def test_where_the_four_bits_lie():
    """A group's words of 8 weights: input ``16 j + c`` is at bit ``4 j`` of word c."""
    for place in (0, 1, 15, 16, 17, 100, 127, 128, 255):
        weight = torch.zeros(1, 256)
        weight[0, place] = 15
        packed, scale, zero = reference_rounded.round_int4(weight)
        words = packed.view(torch.int32)[0].tolist()
        group, inside = divmod(place, 128)
        expected = [0] * 32
        expected[group * 16 + inside % 16] = 15 << 4 * (inside // 16)
        assert [word & 0xFFFFFFFF for word in words] == expected
        assert scale[group, 0] == 1 and not zero.any()


def check_product(y, x, weight, bound):
    """y = x W^T within ``bound`` times |x| |W|^T."""
    truth = x.double() @ weight.double().T
    assert y.shape == truth.shape and y.isfinite().all()
    assert ((y.double() - truth).abs() <= bound * (x.double().abs() @ weight.double().abs().T) + 1e-30).all()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products_are_those_of_the_rounded_weights(kind, dtype, monkeypatch):
    """Weights of 37 rows in pieces of 16: up to rounding of the weight, and of the result in x's dtype."""
    torch.manual_seed(0)
    for module in (fp8, int4):
        monkeypatch.setattr(module, "CHUNK", 16)
    linears = [nn.Linear(150, 37, bias=False), nn.Linear(150, 5)]
    linears = [linear.to(dtype) for linear in linears]
    x = torch.randn(2, 3, 150).to(dtype)
    one, other = Copies(kind)(x, *linears)
    assert one.dtype == dtype and one.shape == (2, 3, 37) and other.shape == (2, 3, 5)
    for y, linear in ((one, linears[0]), (other - linears[1].bias, linears[1])):
        slack = 4 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
        rounded = ROUNDED[kind](linear.weight)
        check_product(y.flatten(0, 1), x.flatten(0, 1), rounded, slack)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_the_scaled_product_is_that_of_rounded_rows_and_rounded_weights(dtype, monkeypatch):
    """Hopper runs an op of PyTorch's that its CPU build has too."""
    torch.manual_seed(0)
    monkeypatch.setattr(fp8, "native", lambda device: True)
    linear = nn.Linear(64, 48, bias=False, dtype=dtype)
    for rows in (1, 5, 33):
        x = (torch.randn(rows, 64) * torch.logspace(-2, 2, rows)[:, None]).to(dtype)
        try:
            (y,) = Copies("fp8")(x, linear)
        except RuntimeError as error:
            pytest.skip(f"torch {torch.__version__} has no row-scaled matmul on the CPU: {error}")
        weight, x8 = (nearest(a, scale_of(a)) for a in (linear.weight, x))
        assert y.dtype == dtype
        check_product(y, x8, weight, 2**-8)
    assert Copies("fp8")(x[:0], linear)[0].shape == (0, 48)


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
def test_a_model_is_the_one_with_rounded_weights(model, kind, ids, padded, masked):
    """In fp32, up to rounding; the LM head, embeddings and norms are unchanged."""
    expected = rounded_twin(model, kind)(ids, attention_mask=padded if masked else None).logits
    own = model(ids, attention_mask=padded if masked else None).logits
    dllm_fast.patch(model, weights=kind)
    got = model(ids, attention_mask=padded if masked else None).logits
    valid = padded.bool() if masked else torch.ones_like(padded, dtype=torch.bool)
    torch.testing.assert_close(got[valid], expected[valid], atol=2e-5, rtol=1e-4)
    assert (got - own)[valid].abs().max() > 100 * (got - expected)[valid].abs().max()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("cache", ["none", "dual"])
def test_generating_with_rounded_weights(either, kind, ids, dtype, cache):
    model = dllm_fast.patch(either.to(dtype), weights=kind)
    out = dllm_fast.generate(model, ids, gen_length=8, block_length=4, cache=cache)
    assert torch.equal(out.sequences[:, :24], ids) and not (out.sequences == model.config.mask_token_id).any()


def tensors_of(model):
    copies = bound_family(model).matmuls.copies.values()
    return [x for copy_ in copies for x in vars(copy_.matrix).values() if isinstance(x, torch.Tensor)]


def bytes_of(kind, n, k):
    """A byte per weight and a scale per channel; or half a byte per weight and three bytes per group of 128."""
    return n * k + 4 * n if kind == "fp8" else n * -(-k // 128) * (64 + 3)


def test_what_the_copies_take(llada, kind):
    before = {name: (parameter, parameter.data_ptr()) for name, parameter in llada.named_parameters()}
    dllm_fast.patch(llada, weights=kind)
    linears = linears_of(llada)
    stored = sum(x.untyped_storage().nbytes() for x in tensors_of(llada))
    assert len(linears) == 3 * 7
    assert stored == sum(bytes_of(kind, *linear.weight.shape) for linear in linears)
    for name, parameter in llada.named_parameters():
        assert parameter is before[name][0] and parameter.data_ptr() == before[name][1]


@pytest.mark.parametrize("kind, step", [(None, 15.0), ("fp8", 8.0), ("int4", 4.7)])
def test_bytes_that_a_step_of_llada_8b_reads(kind, step):
    """Layers and head in 10^9 bytes, on the meta device, which allocates nothing."""
    with torch.device("meta"):
        model = dllm_fast.LLaDAModelLM(dllm_fast.LLaDAConfig()).bfloat16()
    block, head = model.model.transformer.blocks[0], model.model.transformer.ff_out.weight
    shapes = [linear.weight.shape for linear in block.modules() if isinstance(linear, nn.Linear)]
    found = 0
    for n, k in shapes:
        matrix = None if kind is None else KINDS[kind](n, k, torch.device("meta"))
        found += 2 * n * k if matrix is None else sum(x.nbytes for x in vars(matrix).values() if hasattr(x, "nbytes"))
    assert len(shapes) == 7 and round((32 * found + head.nbytes) / 1e9, 1) == step


@pytest.mark.long
@pytest.mark.parametrize("kind, largest", [("fp8", 0.03), ("int4", 0.11)])
@pytest.mark.parametrize("n, k", [(12288, 4096), (4096, 12288)], ids=["gate", "down"])
def test_error_at_llada_8bs_shapes(kind, largest, n, k):
    """The relative root mean square error of x W^T with normal weights, against fp64; bf16 W has 0.002.

    e4m3 has 3 bits after the first, so errors are uniform within 1/16 of a number's power of two. In int4, 16 steps
    cover the range of 128 normal numbers, 5.2 standard deviations on average; a step / sqrt(12) is 0.10 of a deviation.
    """
    torch.manual_seed(0)
    weight, x = torch.randn(n, k) * k**-0.5, torch.randn(8, k)
    matrix = KINDS[kind](n, k, weight.device)
    matrix.write(0, weight)
    truth = x.double() @ weight.double().T
    error = (matrix.matmul(x, False, "torch").double() - truth).norm() / truth.norm()
    assert 0.5 * largest < error < largest


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
    """Through ``.data``, which PyTorch's version counters miss: patching again notices it."""
    for parameter in model.parameters():
        parameter.data.mul_(1.25)
    dllm_fast.patch(model, weights=bound_family(model).matmuls.kind)


def replace(model, ids):
    linear = next(bound_family(model).groups())[0]
    linear.weight = nn.Parameter(linear.weight.detach() * 2)


@torch.no_grad()
@pytest.mark.parametrize("change", [train, load, move, write_data, replace])
def test_copies_follow_the_weights(either, kind, ids, change):
    dllm_fast.patch(either, weights=kind)
    before = either(ids).logits
    change(either, ids)
    got = either(ids).logits
    assert not torch.allclose(got.to(before.dtype), before, atol=1e-4) or change is move
    plain = dllm_fast.unpatch(copy.deepcopy(either))
    torch.testing.assert_close(got, rounded_twin(plain, kind)(ids).logits, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_copies_are_rewritten_where_they_lie(llada, kind, ids):
    """A CUDA graph recorded on them keeps reading the same memory."""
    with torch.inference_mode():
        dllm_fast.patch(llada, weights=kind)
    before = [x.data_ptr() for x in tensors_of(llada)]
    for change in (load, write_data):
        change(llada, ids)
        llada(ids)
        assert [x.data_ptr() for x in tensors_of(llada)] == before


def test_gradients_are_those_of_the_weights_themselves(llada, kind, ids):
    own = copy.deepcopy(llada)
    bound_family(dllm_fast.patch(llada, impl="torch", weights=kind)).hidden(ids).square().mean().backward()
    bound_family(dllm_fast.patch(own, impl="torch")).hidden(ids).square().mean().backward()
    for (name, parameter), other in zip(llada.named_parameters(), own.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        assert parameter.grad is None or torch.equal(parameter.grad, other.grad), name


def test_gradients_of_the_input_are_those_of_the_weights_themselves(kind):
    """If the weights are frozen, as below an adapter."""
    linear = nn.Linear(16, 8, bias=False).requires_grad_(False)
    x = torch.randn(3, 16, requires_grad=True)
    Copies(kind)(x, linear)[0].sum().backward()
    torch.testing.assert_close(x.grad, linear.weight.sum(0).expand(3, 16))


@torch.no_grad()
def test_rounding_comes_and_goes_with_patching(either, kind, ids):
    own = either(ids).logits
    plain = dllm_fast.patch(either)(ids).logits
    with dllm_fast.patched(either, weights=kind):
        rounded = either(ids).logits
        assert not torch.allclose(rounded, plain, atol=1e-4)
        twin = copy.deepcopy(either)
    assert torch.equal(either(ids).logits, plain) and torch.equal(twin(ids).logits, rounded)
    dllm_fast.patch(either, weights=kind)
    with torch.inference_mode():
        assert torch.equal(either(ids).logits, rounded)
        dllm_fast.generate(either, ids, gen_length=4, block_length=4)
    assert torch.equal(either(ids).logits, rounded)
    assert torch.equal(dllm_fast.unpatch(either)(ids).logits, own)


def test_what_is_attached_to_a_linear_is_named(llada, kind):
    """Only a linear's weight is read, so hooks and other forwards would be ignored."""

    def count_calls(*args):
        pass

    linear = llada.model.transformer.blocks[1].up_proj
    for attach in (linear.register_forward_hook, linear.register_forward_pre_hook):
        handle = attach(count_calls)
        with pytest.raises(ValueError, match=rf"'{kind}': model.transformer.blocks.1.up_proj has a hook .*count_calls"):
            dllm_fast.patch(llada, weights=kind)
        handle.remove()
    linear.forward = lambda x: x
    with pytest.raises(ValueError, match=r"blocks.1.up_proj has a forward of its own"):
        dllm_fast.patch(llada, weights=kind)
    del linear.forward
    assert "_dllm_fast" not in llada.__dict__
    dllm_fast.patch(llada, weights=kind)


def test_what_cannot_be_had_is_refused_by_name(llada, kind, monkeypatch, device):
    with pytest.raises(ValueError, match="weights='int3' is not one of None, 'fp8', 'int4'"):
        dllm_fast.patch(llada, weights="int3")
    with pytest.raises(ValueError, match="weights='int3'"), dllm_fast.patched(llada, weights="int3"):
        pass
    block = llada.model.transformer.blocks[1]
    own, block.up_proj = block.up_proj, nn.Sequential(block.up_proj)
    message = rf"weights='{kind}': model.transformer.blocks.1.up_proj is a Sequential, not a plain nn.Linear"
    with pytest.raises(ValueError, match=message):
        dllm_fast.patch(llada, weights=kind)
    assert "_dllm_fast" not in llada.__dict__
    block.up_proj = own
    dllm_fast.patch(llada, weights=kind)
    block.up_proj = nn.Sequential(own)
    with torch.no_grad(), pytest.raises(ValueError, match=rf"weights='{kind}': a linear of .* is a Sequential"):
        llada(torch.zeros(1, 4, dtype=torch.int64, device=device))
    block.up_proj = own
    dllm_fast.unpatch(llada)

    def lacking(*args):
        raise RuntimeError("not implemented for 'BFloat16'")

    if kind == "fp8":
        monkeypatch.delattr(torch, "float8_e4m3fn")
    else:
        monkeypatch.setattr(reference_rounded, "round_int4", lacking)
    lacks = {"fp8": "has no float8_e4m3fn", "int4": "cannot round to four bits"}[kind]
    with pytest.raises(ValueError, match=rf"weights='{kind}': PyTorch .* {lacks} on {device}"):
        dllm_fast.patch(llada, weights=kind)
    assert "_dllm_fast" not in llada.__dict__


def test_makers_cover_biases():
    """`Copies` adds a module's own bias: some model above must have one, or no test here covers that."""
    assert any(linear.bias is not None for linear in linears_of(dllm_fast.patch(MAKERS["modernbert-bias"]())))
