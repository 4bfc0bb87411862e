"""RMSNorm, SwiGLU and RoPE of the compiled extension, on every instruction set that this CPU has, against fp64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import make_llada

import dllm_fast
from dllm_fast import ops
from dllm_fast.cpu import compiled
from dllm_fast.cpu import elementwise as elementwise
from dllm_fast.kernels import reference

BF16, FP32 = torch.bfloat16, torch.float32
EPS = 1e-5
NEAR = 2.0**-20  # relative error of fp32 arithmetic before rounding to bf16

pytestmark = pytest.mark.skipif(bool(compiled.missing()), reason=str(compiled.missing()))
every_level = pytest.mark.parametrize("level", () if compiled.missing() else compiled.levels())
both_dtypes = pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
every_shape = pytest.mark.parametrize(
    "shape", [(rows, dim) for rows in (1, 5, 50) for dim in (1, 33, 768)], ids="{0[0]}rows-{0[1]}wide".format
)


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """Fill new memory, so that an unwritten result cannot be right by luck."""
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda x, **options: empty_like(x, **options).fill_(float("nan")))


def randn(*shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(ours, eager, truth):
    """Error at most twice eager PyTorch's, or three roundings of the largest: PyTorch may be exact by luck on few."""
    assert ours.dtype == eager.dtype and ours.shape == truth.shape and ours.isfinite().all()
    error, allowed = ((x.double() - truth).abs().max() for x in (ours, eager))
    assert error <= max(2 * allowed, 1.5 * torch.finfo(ours.dtype).eps * truth.abs().max())


def between(x, a, b):
    return ((torch.minimum(a, b) <= x) & (x <= torch.maximum(a, b))).all()


def around(truth, scale=None):
    """The bf16 that fp32 arithmetic may round ``truth`` [...] to, from ``NEAR`` below it to ``NEAR`` above."""
    slack = NEAR * (truth if scale is None else scale).abs()
    return (truth - slack).to(BF16), (truth + slack).to(BF16)


def check_rms_norm(x, weight, residual):
    y, h = elementwise.rms_norm(x, weight, EPS, residual)
    eager, eager_h = reference.rms_norm(x, weight, EPS, residual)
    assert h is x if residual is None else torch.equal(h, eager_h)
    truth, _ = reference.rms_norm(eager_h.double(), weight.double(), EPS)
    check(y, eager, truth)
    if x.dtype == BF16:
        normed, _ = reference.rms_norm(eager_h.double(), torch.ones_like(weight).double(), EPS)
        assert between(y, *(rounded * weight for rounded in around(normed)))


def check_swiglu(gate, up):
    out = elementwise.swiglu(gate, up)
    truth = reference.swiglu(gate.double(), up.double())
    check(out, F.silu(gate) * up, truth)
    if gate.dtype == BF16:
        assert between(out, *around(truth))


@every_level
@both_dtypes
@every_shape
def test_rms_norm(shape, dtype, level, use):
    use(level)
    weight = randn(shape[1], dtype=dtype, seed=2)
    for scale in (1, 1e-3, 1e4):
        x, residual = (randn(*shape, dtype=dtype, seed=seed) * scale for seed in (0, 1))
        check_rms_norm(x, weight, None)
        check_rms_norm(x, weight, residual)


@every_level
@both_dtypes
def test_rms_norm_of_exact_rows(dtype, level, use):
    """If the sum of squares and its root are exact, everything is: equal to the definition, bit for bit."""
    use(level)
    weight = randn(96, dtype=dtype)
    sign = randn(7, 96, dtype=dtype, seed=1).sign()
    x = sign * (2.0 ** torch.arange(-3, 4)[:, None]).to(dtype)
    y, _ = elementwise.rms_norm(x, weight, 0.0)
    assert torch.equal(y, sign * weight)
    assert (elementwise.rms_norm(x * 0, weight, EPS)[0] == 0).all()
    x[3, 95] = float("nan")
    x[4, 0] = float("inf")
    expected, _ = reference.rms_norm(x, weight, 0.0, residual=x)
    torch.testing.assert_close(elementwise.rms_norm(x, weight, 0.0, residual=x)[0], expected, equal_nan=True)


@every_level
@both_dtypes
@every_shape
def test_swiglu(shape, dtype, level, use):
    use(level)
    for scale in (1, 6, 18):  # a gate below -87 counts as -inf
        check_swiglu(*(randn(*shape, dtype=dtype, seed=seed) * s for seed, s in ((0, scale), (1, 1))))


@every_level
@both_dtypes
def test_swiglu_of_extremes(dtype, level, use):
    use(level)
    gate = torch.tensor([0.0, -0.0, 87.0, 89.0, 1e30, 3e38, -60.0, -86.5, -88.5, -1e3, -1e30, -3e38]).to(dtype)
    gate = torch.cat((gate, torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0], dtype=dtype)))
    up = torch.ones_like(gate)
    truth = reference.swiglu(gate.double(), up.double())
    torch.testing.assert_close(
        elementwise.swiglu(gate, up).double(), truth, rtol=torch.finfo(dtype).eps, atol=1e-35, equal_nan=True
    )
    huge = elementwise.swiglu(gate[9:12], torch.full_like(gate[9:12], 3e38))
    assert (huge == 0).all()


# Rotation


def inputs(batch, queries, heads, kv_heads, head_dim, slots, dtype):
    """q, k, v as slices of one matmul's output; cos, sin; poisoned keys and values."""
    widths = [n * head_dim for n in (heads, kv_heads, kv_heads)]
    qkv = randn(batch, queries, sum(widths), dtype=dtype)
    q, k, v = (x.unflatten(-1, (-1, head_dim)) for x in qkv.split(widths, -1))
    cos, sin = reference.rope_table(40, head_dim, 1e4)
    keys, values = torch.full((2, batch, slots, kv_heads, head_dim), float("nan"), dtype=dtype)
    return q, k, v, cos, sin, keys, values


def check_rotated(ours, x, cos, sin, position):
    """``ours`` is x [B, T, H, D] rotated; ``position`` a list of [B]."""
    at = (torch.tensor(position)[:, None] + torch.arange(x.shape[1])).clamp(0, len(cos) - 1)
    c, s = (table.double()[at][:, :, None] for table in (cos, sin))
    x1, x2 = x.double().chunk(2, -1)
    truth = torch.cat((x1 * c - x2 * s, x2 * c + x1 * s), -1)
    p1, p2 = x.float().chunk(2, -1)
    eager = torch.cat((p1 * c.float() - p2 * s.float(), p2 * c.float() + p1 * s.float()), -1).to(x.dtype)
    check(ours, eager, truth)
    if x.dtype == BF16:
        scale = torch.cat(((x1 * c).abs() + (x2 * s).abs(), (x2 * c).abs() + (x1 * s).abs()), -1)
        assert between(ours, *around(truth, scale))


HEADS = {  # batch, queries, heads, kv heads, head dim, slots, position, slot
    "1row-1query": (1, 1, 1, 1, 2, 3, [5], [2]),
    "12heads-dim-64": (1, 50, 12, 12, 64, 60, [0], [3]),
    "gqa-dim-66": (2, 5, 6, 2, 66, 20, [7, 0], [0, 15]),
    "dim-10": (3, 5, 2, 1, 10, 9, [0, 1, 2], [0, 2, 4]),
    "left-padded": (2, 9, 2, 2, 32, 12, [-4, 0], [0, 0]),
    "past-the-table": (1, 9, 2, 2, 32, 12, [35], [0]),
    "all-padding": (1, 4, 1, 1, 128, 4, [-40], [0]),
    "out-of-the-buffers": (3, 6, 2, 2, 16, 8, [0, 9, 3], [-2, 5, 99]),
}
every_head = pytest.mark.parametrize("case", HEADS.values(), ids=HEADS.keys())


@every_level
@both_dtypes
@every_head
def test_rope(case, dtype, level, use):
    use(level)
    *sizes, position, slot = case
    q, k, v, cos, sin, keys, values = inputs(*sizes, dtype)
    before = [x.clone() for x in (q, k, v)]
    rotated, *returned = elementwise.rope(q, k, v, cos, sin, torch.tensor(position), torch.tensor(slot), keys, values)
    assert returned[0] is keys and returned[1] is values
    assert all(map(torch.equal, (q, k, v), before))
    check_rotated(rotated, q, cos, sin, position)
    turned = elementwise.rope(q, k, v, cos, sin, torch.tensor(position))[1]
    check_rotated(turned, k, cos, sin, position)
    for b, first in enumerate(slot):
        for s in range(keys.shape[1]):
            written = 0 <= s - first < q.shape[1]
            assert written or (keys[b, s].isnan().all() and values[b, s].isnan().all())
            if written:
                assert torch.equal(keys[b, s], turned[b, s - first])
                assert torch.equal(values[b, s], v[b, s - first])


@every_level
@both_dtypes
def test_rope_without_buffers_or_positions(dtype, level, use):
    use(level)
    q, k, v, cos, sin, keys, values = inputs(2, 7, 4, 2, 48, 9, dtype)
    rotated, turned, same = elementwise.rope(q, k, v, cos, sin)
    assert same is v
    check_rotated(rotated, q, cos, sin, [0, 0])
    check_rotated(turned, k, cos, sin, [0, 0])
    assert torch.equal(elementwise.rope(q, k, v, cos, sin, keys=keys, values=values)[0], rotated)
    assert torch.equal(keys[:, :7], turned) and torch.equal(values[:, :7], v) and keys[:, 7:].isnan().all()


# Strides, threads, dispatch


def layouts(x):
    """x [2, N, d] with other strides: a slice of rows at odd addresses, dimensions permuted, a stray stride."""
    yield F.pad(x, (1, 2))[..., 1:-2]
    yield F.pad(x, (0, 0, 3, 1))[:, 3:-1]
    yield x.transpose(0, 1).contiguous().transpose(0, 1)
    yield x[:1].expand(2, -1, -1)
    yield x[:, :1].as_strided((2, 1, x.shape[2]), (x.stride(0), 7, 1))
    yield x[0, :2, None].as_strided((2, 1, x.shape[2]), (x.shape[2], 7, 1))  # contiguous all the same


@both_dtypes
def test_any_strides_but_the_last(dtype):
    a, b = randn(2, 2, 5, 33, dtype=dtype)
    weight = randn(33, dtype=dtype)
    for x, y in zip(layouts(a), layouts(b), strict=True):
        plain = x.clone(memory_format=torch.contiguous_format), y.clone(memory_format=torch.contiguous_format)
        assert torch.equal(elementwise.swiglu(x, y), elementwise.swiglu(*plain))
        ours, expected = (elementwise.rms_norm(u, weight, EPS, w) for u, w in ((x, y), plain))
        assert all(map(torch.equal, ours, expected)) and all(out.is_contiguous() for out in ours)
    assert elementwise.swiglu(a[0, 0], b[0, 0]).shape == (33,)
    assert torch.equal(elementwise.rms_norm(a[0, 0], weight, EPS)[0], elementwise.rms_norm(a, weight, EPS)[0][0, 0])


def test_rope_into_buffers_of_any_strides():
    q, k, v, cos, sin, keys, values = inputs(2, 5, 2, 2, 16, 9, BF16)
    at = torch.tensor([1, 4])
    rotated, *_ = elementwise.rope(q, k, v, cos, sin, at, at, keys, values)
    moved = [torch.full((2, 2, 9, 20), float("nan"), dtype=BF16).transpose(1, 2)[..., 3:-1] for _ in range(2)]
    tables = F.pad(cos, (1, 0))[:, 1:], F.pad(sin, (0, 5))[:, :-5]
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(elementwise.rope(*apart, *tables, at, at, *moved)[0], rotated)
    for ours, expected in zip(moved, (keys, values)):
        assert torch.equal(ours.isnan(), expected.isnan()) and torch.equal(ours.nan_to_num(), expected.nan_to_num())


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 70), width=st.integers(1, 200), seed=st.integers(0, 99), data=st.data())
def test_any_shape(rows, width, seed, data, use):
    use(data.draw(st.sampled_from(compiled.levels())))
    a, b = (randn(rows, width, dtype=BF16, seed=seed + i) * 3 for i in range(2))
    check_rms_norm(a, randn(width, dtype=BF16, seed=seed), data.draw(st.sampled_from((None, b))))
    check_swiglu(a, b)


def test_threads_change_nothing():
    a, b = randn(2, 300, 768, dtype=BF16)
    weight = randn(768, dtype=BF16)
    q, k, v, cos, sin, keys, values = inputs(2, 100, 12, 12, 64, 110, BF16)
    at = torch.tensor([-3, 7])
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            buffers = torch.zeros_like(keys), torch.zeros_like(values)
            rotated = elementwise.rope(q, k, v, cos, sin, at, at, *buffers)
            results.append((*elementwise.rms_norm(a, weight, EPS, b), elementwise.swiglu(a, b), *rotated))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other))


@both_dtypes
def test_ops_dispatch(dtype, monkeypatch):
    """A model's forward calls these kernels, and no others."""
    called = []
    run = elementwise._run
    monkeypatch.setattr(elementwise, "_run", lambda kernel, *rest: (called.append(kernel), run(kernel, *rest)))
    a, b = randn(2, 5, 33, dtype=dtype)
    weight = randn(33, dtype=dtype)
    q, k, v, cos, sin, keys, values = inputs(2, 5, 2, 2, 16, 9, dtype)
    at = torch.tensor([0, 3])
    results = []
    for impl in ("cpp", "torch"):
        buffers = torch.zeros_like(keys), torch.zeros_like(values)
        normed = *ops.rms_norm(a, weight, EPS, b, impl=impl), *ops.rms_norm(a, weight, EPS, impl=impl)
        rotated = *ops.rope(q, k, v, cos, sin, at, at, *buffers, impl=impl), *ops.rope(q, k, v, cos, sin, impl=impl)
        results.append((*normed, ops.swiglu(a, b, impl=impl), *rotated))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)
    assert called == [f"dllm_{name}" for name in ("rms_norm", "rms_norm", "rope", "rope", "swiglu")]


def test_under_autocast():
    """Under autocast, matmuls give bf16, and the residual stream is fp32."""
    x, residual, weight = randn(5, 33, dtype=BF16), randn(5, 33, dtype=FP32, seed=1), randn(33, dtype=FP32, seed=2)
    for pair in ((x, residual), (residual, x)):
        ours, expected = (f(pair[0], weight, EPS, pair[1]) for f in (elementwise.rms_norm, reference.rms_norm))
        assert torch.equal(ours[1], expected[1])
        torch.testing.assert_close(ours[0], expected[0])
    model, ids, error = make_llada().requires_grad_(False), torch.arange(24)[None], []
    truth = model(ids).logits
    for impl in ("cpp", "torch"):
        with dllm_fast.patched(model, impl=impl), torch.autocast("cpu", BF16):
            error.append((model(ids).logits - truth).abs().max())
    assert error[0] <= 2 * error[1]


def test_nothing_to_do():
    weight = torch.ones(8)
    for shape in ((0, 8), (2, 0, 8)):
        y, h = elementwise.rms_norm(torch.zeros(shape), weight, EPS, torch.zeros(shape))
        assert y.shape == h.shape == elementwise.swiglu(y, h).shape == shape
    assert elementwise.rms_norm(torch.zeros(3, 0), weight[:0], EPS)[0].shape == (3, 0)
    q, k, v, cos, sin, keys, values = inputs(2, 0, 2, 2, 16, 9, FP32)
    assert elementwise.rope(q, k, v, cos[:0], sin[:0], keys=keys, values=values)[0].shape == q.shape
    assert keys.isnan().all() and values.isnan().all()


def test_bad_arguments():
    x, weight = torch.zeros(3, 8), torch.zeros(8)
    norm, gate = elementwise.rms_norm, elementwise.swiglu
    for message, (function, *arguments) in {
        r"x is torch.float32 \[3, 7\]": (norm, x[:, 1:], weight, EPS),
        "x is torch.bfloat16": (norm, x.bfloat16(), weight, EPS),
        "x is .* strides .*last dimension": (norm, x.T.contiguous().T, weight, EPS),
        "weight is torch.float64": (norm, x.double(), weight.double(), EPS),
        r"weight is torch.float32 \[1, 8\]": (norm, x, weight[None], EPS),
        r"residual is torch.float32 \[2, 8\]": (norm, x, weight, EPS, x[1:]),
        "gate is torch.float16": (gate, x.half(), x.half()),
        r"gate is torch.float32 \[\]": (gate, x[0, 0], x[0, 0]),
        "gate is .* strides": (gate, x[:, ::2], x[:, ::2]),
        "up is torch.bfloat16": (gate, x, x.bfloat16()),
        r"up is torch.float32 \[2, 8\]": (gate, x, x[1:]),
    }.items():
        with pytest.raises(ValueError, match=message):
            function(*arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 4, 16)}, r"q is torch.float32 \[2, 4, 16\]"),
        ({"q": torch.zeros(2, 4, 2, 16, dtype=torch.float16)}, "q is torch.float16"),
        ({"q": torch.zeros(2, 4, 2, 15)}, r"q.shape=\(2, 4, 2, 15\): the head dim is odd"),
        ({"k": torch.zeros(2, 4, 16)}, r"k.shape=\(2, 4, 16\)"),
        ({"k": torch.zeros(2, 3, 2, 16)}, r"k is torch.float32 \[2, 3, 2, 16\]"),
        ({"v": torch.zeros(2, 4, 1, 16)}, r"v is torch.float32 \[2, 4, 1, 16\]"),
        ({"cos": torch.zeros(9, 16)}, r"cos is torch.float32 \[9, 16\]"),
        ({"cos": torch.zeros(0, 8), "sin": torch.zeros(0, 8)}, r"cos.shape=\(0, 8\)"),
        ({"sin": torch.zeros(8, 8)}, r"sin is torch.float32 \[8, 8\]"),
        ({"position": torch.zeros(2, dtype=torch.int32)}, "position is torch.int32"),
        ({"slot": torch.zeros(3, dtype=torch.int64)}, r"slot is torch.int64 \[3\]"),
        ({"keys": torch.zeros(2, 9, 1, 16)}, r"keys is torch.float32 \[2, 9, 1, 16\]"),
        ({"values": torch.zeros(2, 8, 2, 16)}, r"values is torch.float32 \[2, 8, 2, 16\]"),
        ({"values": None}, "keys and values"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_rope_refuses(change, message):
    row, rows, buffer = torch.zeros(2, 4, 2, 16), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 9, 2, 16)
    good = {"q": row, "k": row, "v": row, "cos": torch.zeros(9, 8), "sin": torch.zeros(9, 8)}
    good |= {"position": rows, "slot": rows, "keys": buffer, "values": buffer.clone()}
    elementwise.rope(**good)
    with pytest.raises(ValueError, match=message):
        elementwise.rope(**(good | change))


def test_custom_ops():
    x, residual = randn(2, 5, 33, dtype=BF16)
    weight = randn(33, dtype=BF16)
    of = torch.ops.dllm_fast
    for arguments in ((x, weight, EPS), (x, weight, EPS, residual)):
        torch.library.opcheck(of.cpu_rms_norm, arguments)
    torch.library.opcheck(of.cpu_swiglu, (x, residual))
    q, k, v, cos, sin, keys, values = inputs(2, 5, 4, 2, 16, 9, BF16)
    at = torch.tensor([1, 4])
    for optional in ((at, at), (None, None)):
        torch.library.opcheck(of.cpu_rope, (q, k, v, cos, sin, *optional, keys.nan_to_num(), values.nan_to_num()))
        torch.library.opcheck(of.cpu_rotated, (q, k, cos, sin, optional[0]))


def test_compiles_whole():
    """Later operations of the compiled graph see the buffers' new contents too."""
    q, k, v, cos, sin, keys, values = inputs(2, 5, 2, 2, 16, 9, BF16)
    at, weight = torch.tensor([1, 4]), randn(32, dtype=BF16)

    def step(q, k, v, keys, values):
        rotated, *written = elementwise.rope(q * 2, k, v, cos, sin, at, at, keys, values)
        free = elementwise.rope(q, k, v, cos, sin)
        y, h = elementwise.rms_norm(rotated.flatten(2), weight, EPS, residual=q.flatten(2))
        return (elementwise.swiglu(y, h), *free, *(x + 1 for x in written))

    mine, theirs = ([x.nan_to_num().clone() for x in (keys, values)] for _ in range(2))
    whole = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, whole(q, k, v, *mine), step(q, k, v, *theirs)))
    assert all(map(torch.equal, mine, theirs)) and mine[0].any()
