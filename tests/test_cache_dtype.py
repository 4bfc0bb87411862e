"""``cache_dtype="e4m3"``: keys and values rounded as defined, in PyTorch's and the compiled ops, and the tokens of the
plain loop."""

import re

import packs
import pytest
import torch
from e4m3 import E4M3, EVERY, assert_nearest, hard_cases, nearest
from needs import needs_cpp
from test_compiled import SHAPES, assert_as_exact
from test_compiled import inputs as attention_inputs
from test_skip_committed import check_plain_loop
from tiny import EOS, MAKERS

import dllm_fast
from dllm_fast import Drift, Threshold, Uniform, launchers, ops
from dllm_fast.cpu import compiled, elementwise
from dllm_fast.decoding import memory
from dllm_fast.decoding.engine import Engine
from dllm_fast.decoding.options import Options
from dllm_fast.families.rows import Packed
from dllm_fast.kernels import reference
from dllm_fast.kernels.reference_rounded import as_bytes, rounded
from dllm_fast.patch import bound_family

BF16, FP32 = torch.bfloat16, torch.float32
LEVELS = ["torch", *(() if compiled.missing() else compiled.levels())]
NEAR = 2.0**-21  # relative error of a rotation in fp32

every_level = pytest.mark.parametrize("level", LEVELS)
both_dtypes = pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)


@pytest.fixture
def impl(level, monkeypatch):
    if level == "torch":
        return "torch"
    monkeypatch.setattr(compiled, "_level", compiled.LEVELS.index(level))
    return "cpp"


def narrow(arguments):
    """Of attention's arguments: keys and values in e4m3."""
    q, keys, values, *rest = arguments
    return q, keys.to(E4M3), values.to(E4M3), *rest


# The definition


@pytest.mark.parametrize("dtype", [torch.float64, FP32, BF16, torch.float16], ids=str)
def test_rounding_is_to_the_nearest(dtype):
    x = torch.cat((hard_cases(), torch.randn(2000), 300 * torch.randn(2000), torch.randn(2000) / 100)).to(dtype)
    assert_nearest(rounded(x, E4M3), x.double())
    assert torch.equal(rounded(torch.tensor([1e9, -1e9, torch.inf]), E4M3).float(), torch.tensor([448.0, -448.0, 448]))
    assert rounded(x, dtype) is x


def test_bytes_are_the_tensor_itself():
    x = torch.zeros(3, 4, dtype=E4M3)
    as_bytes(x)[1] = as_bytes(torch.ones(4).to(E4M3))
    assert x.float().tolist() == [[0] * 4, [1] * 4, [0] * 4]
    assert as_bytes(wide := torch.zeros(3)) is wide


# Attention


@every_level
@pytest.mark.usefixtures("poisoned_outputs")
@both_dtypes
@pytest.mark.parametrize("name", SHAPES)
def test_attention(name, dtype, impl):
    poisoned, clean = (narrow(arguments) for arguments in attention_inputs(SHAPES[name], dtype))
    q, keys, values, *ranges = clean
    truth = reference.attention(q.double(), keys, values, *ranges)
    seen = ops.visible(q, keys.shape[1], *ranges)
    eager = ops.attention(q, keys.to(dtype), values.to(dtype), seen)
    if impl == "torch":
        assert torch.equal(ops.attention(q, keys, values, seen), eager)
        return
    q, keys, values, *ranges = poisoned  # PyTorch multiplies what no query sees by 0
    assert_as_exact(compiled.attention(q, keys, values, *ranges), eager, truth)


@every_level
@pytest.mark.usefixtures("poisoned_outputs")
@both_dtypes
@pytest.mark.parametrize("name", packs.SHAPES)
def test_packed_attention(name, dtype, impl):
    poisoned, clean, first, most, total = packs.inputs(packs.SHAPES[name], dtype)
    poisoned, clean = narrow(poisoned), narrow(clean)
    q, keys, values, *ranges = clean
    truth = reference.attention(q.double(), keys, values, *ranges, first=first)[:total]
    seen = ops.visible(q, keys.shape[1], *ranges, Packed(reference.row_of(first, len(q)), first, most))
    eager = ops.attention(q, keys.to(dtype), values.to(dtype), seen)[:total]
    if impl == "torch":
        assert torch.equal(ops.attention(q, keys, values, seen)[:total], eager)
        return
    q, keys, values, *ranges = poisoned
    out = compiled.attention(q, keys, values, *ranges, None, first, most)
    assert_as_exact(out[:total].contiguous(), eager, truth)


@every_level
@both_dtypes
@pytest.mark.parametrize("dim", [64, 34, 7])
def test_every_number_is_widened_exactly(dim, dtype, impl):
    """A query that sees one slot gets its value; NaN is NaN, and a key's shows too."""
    values = EVERY[: 256 // dim * dim].view(1, -1, 1, dim)
    slots = values.shape[1]
    keys = torch.zeros(1, slots, 1, dim).to(E4M3)
    for slot in range(slots):
        q, own = torch.randn(1, 5, 1, dim).to(dtype), slice(slot, slot + 1)
        out = ops.attention(q, keys[:, own], values[:, own], ops.visible(q, 1, impl=impl), impl=impl)
        expected = values[:, slot].to(dtype).expand_as(out[:, :, 0])
        torch.testing.assert_close(out[:, :, 0], expected, rtol=0, atol=0, equal_nan=True)
    keys = as_bytes(keys).clone()
    keys[0, 0, 0, dim // 2] = 0xFF
    q = torch.ones(1, 3, 1, dim, dtype=dtype)
    values = torch.ones(1, slots, 1, dim).to(E4M3)
    assert ops.attention(q, keys.view(E4M3), values, ops.visible(q, slots, impl=impl), impl=impl).isnan().all()


# Rotation into the buffers


def rope_arguments(name, dtype):
    """Arguments of `reference.rope` with e4m3 buffers, and what it should leave in fp64 ones."""
    mine = packs.rope_inputs(packs.SHAPES[name], dtype)
    exact = [x.double() if x.is_floating_point() else x.clone() for x in mine]
    mine[7:9] = [nearest(x.double()).to(E4M3) for x in mine[7:9]]
    exact[7:9] = [x.double() for x in mine[7:9]]
    return mine, exact


@every_level
@both_dtypes
@pytest.mark.parametrize("name", packs.SHAPES)
def test_rope_into_packed_slots(name, dtype, impl):
    mine, exact = rope_arguments(name, dtype)
    truth = reference.rope(*exact)
    q, keys, values = ops.rope(*mine, impl=impl)
    assert keys is mine[7] and values is mine[8]
    assert_as_exact(q, truth.to(dtype), truth)
    assert_nearest(keys, exact[7], NEAR * exact[1].abs().max())
    assert_nearest(values, exact[8])


@every_level
@both_dtypes
@pytest.mark.parametrize("dim", [2, 34, 64])
def test_rope_into_rows_of_slots(dim, dtype, impl):
    """One row, and one that lies behind the buffers; other slots keep what they hold."""
    make = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(2, 5, 9, dim, generator=make).to(dtype).split((4, 3, 2), 2)
    v = torch.cat((v, v[:, :, :1]), 2)
    tables = reference.rope_table(30, dim, 1e4)
    position, slot = torch.tensor([-2, 7]), torch.tensor([1, 11])
    before = torch.randn(2, 2, 11, 3, dim, generator=make).to(E4M3)
    mine, exact = before.clone(), before.double()
    wide = [x.double() for x in (q, k, v, *tables)]
    reference.rope(*wide, position, slot, *exact)
    ops.rope(q, k, v, *tables, position, slot, *mine, outside=True, impl=impl)
    assert_nearest(mine[0], exact[0], NEAR * wide[1].abs().max())
    assert_nearest(mine[1], exact[1])


@every_level
@both_dtypes
def test_what_is_hard_to_round(dtype, impl):
    """Ties, subnormal numbers, numbers beyond 448 and NaN. An angle of 0 leaves keys as they are, but for infinity."""
    v = torch.nn.functional.pad(hard_cases(), (0, -len(hard_cases()) % 14)).to(dtype).view(1, -1, 1, 14)
    k = v.where(v.isfinite(), 1.0)
    slots = v.shape[1]
    keys, values = torch.zeros(2, 1, slots, 1, 14).to(E4M3)
    tables = torch.ones(slots, 7), torch.zeros(slots, 7)
    zero = torch.zeros(1, dtype=torch.int64)
    ops.rope(k, k, v, *tables, zero, zero, keys, values, impl=impl)
    assert_nearest(values, v.double())
    assert_nearest(keys, k.double())
    k[0, 2, 0, 3] = torch.nan
    ops.rope(k, k, v, *tables, zero, zero, keys, values, impl=impl)
    assert_nearest(keys[:, 3:], k[:, 3:].double())
    assert keys[0, 2, 0].float()[[3, 10]].isnan().all()


# The compiled ops alone


@needs_cpp
def test_buffers_of_one_kind_are_asked_for():
    row, at = torch.zeros(2, 4, 2, 16), torch.zeros(2, dtype=torch.int64)
    narrow, wide = torch.zeros(2, 9, 2, 16).to(E4M3), torch.zeros(2, 9, 2, 16)
    tables = torch.zeros(9, 8), torch.zeros(9, 8)
    for call in (
        lambda keys, values: compiled.attention(row, keys, values),
        lambda keys, values: elementwise.rope(row, row, row, *tables, at, at, keys, values),
    ):
        call(narrow, narrow.clone())
        with pytest.raises(ValueError, match=r"values is torch.float32 .*expected torch.float8_e4m3fn"):
            call(narrow, wide)
        with pytest.raises(ValueError, match=r"values is torch.float8_e4m3fn .*expected torch.float32"):
            call(wide, narrow)


@needs_cpp
def test_threads_change_nothing():
    q, keys, values, *ranges = narrow(attention_inputs(SHAPES["long-ragged"], BF16)[0])
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(compiled.attention(q, keys, values, *ranges))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@needs_cpp
def test_opcheck():
    """But for the schema's own test, which multiplies arguments by numbers: PyTorch cannot in e4m3."""
    clean = narrow(attention_inputs(SHAPES["gqa-2"], FP32)[1])
    torch.library.opcheck(compiled.attention, clean, test_utils="test_faketensor")
    mine, _ = rope_arguments("rows-apart", FP32)
    torch.library.opcheck(elementwise._rope_op, tuple(mine), test_utils="test_faketensor")


@pytest.mark.parametrize("impl", ["torch", pytest.param("cpp", marks=needs_cpp)])
def test_a_compiled_graph_sees_what_it_has_written(impl):
    def step(q, k, v, cos, sin, position, slot, keys, values, row):
        q, keys, values = ops.rope(q, k, v, cos, sin, position, slot, keys, values, row, impl=impl)
        return q, keys.float() + 1, values.float() + 1

    mine, theirs = (rope_arguments("rows-apart", FP32)[0] for _ in range(2))
    whole = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, whole(*mine), step(*theirs)))
    assert all(torch.equal(*map(as_bytes, pair)) for pair in zip(mine[7:9], theirs[7:9]))


# Through the engine


@pytest.mark.parametrize("name", ["llada-gqa", "modernbert"])
@pytest.mark.parametrize("seed", [pytest.param(n, marks=() if n < 38 else pytest.mark.long) for n in range(30, 50)])
def test_tokens_of_the_plain_loop(name, seed):
    check_plain_loop(name, seed, cache_dtype="e4m3")


@pytest.fixture
def engines(monkeypatch):
    """Every engine that is made."""
    made, init = [], Engine.__init__

    def noted(self, *args):
        init(self, *args)
        made.append((self, args))

    monkeypatch.setattr(Engine, "__init__", noted)
    return made


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("impl", ["torch", pytest.param("cpp", marks=needs_cpp)])
def test_every_forward_attends_to_what_it_has_rounded(impl, dtype, ids, padded, engines):
    """A full forward too: whatever a step computed is in the cache, so nothing else is left to attend to."""
    model = dllm_fast.patch(MAKERS["llada-gqa"]().to(dtype), impl=impl)
    asked = []
    attention = ops.attention

    def noted(q, keys, values, *rest, **options):
        asked.append((keys.dtype, values.dtype))
        return attention(q, keys, values, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "attention", noted)
        dllm_fast.generate(model, ids, padded, gen_length=8, block_length=4, cache_dtype="e4m3", refresh=Drift(0.1))
    assert set(asked) == {(E4M3, E4M3)}
    (engine, _), *_ = engines
    assert engine.cache.buffers.dtype == E4M3 and engine.cache.states.dtype == dtype
    assert engine.cache.buffers.float().abs().amax((2, 3, 4, 5)).min() > 0


def test_what_is_kept_changes_tokens(ids):
    model = dllm_fast.patch(MAKERS["llada"]())
    options = {"gen_length": 24, "block_length": 8, "schedule": Uniform(12)}
    plain, narrow = (dllm_fast.generate(model, ids, **options, cache_dtype=kept) for kept in (None, "e4m3"))
    assert not torch.equal(plain.sequences, narrow.sequences)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("options", [{}, {"cache": "prefix", "cfg_scale": 1.0}, {"refresh": Drift(0.3)}], ids=str)
def test_its_bytes_are_counted(dtype, options, ids, engines):
    model = dllm_fast.patch(MAKERS["llada-gqa"]().to(dtype))
    family, needed, taken = bound_family(model), [], []
    for kept in (None, "e4m3"):
        engines.clear()
        dllm_fast.generate(model, ids, gen_length=8, block_length=4, cache_dtype=kept, **options)
        ((engine, (_, resolved, rows, slots, spare, _)),) = engines
        assert resolved.cache_dtype == kept
        needed.append(memory.need(family, resolved, rows, slots, spare))
        taken.append(engine.nbytes)
    assert needed[0] - needed[1] == taken[0] - taken[1] == engine.cache.buffers.numel() * (dtype.itemsize - 1)


def test_more_rows_fit(llada, monkeypatch):
    family = bound_family(dllm_fast.patch(llada))
    options = [Options(cache_dtype=kept, block_length=32) for kept in (None, "e4m3")]
    monkeypatch.setattr(memory, "available", lambda device: 64 * 2**20)
    plain, narrow = (memory.most_rows(family, asked, 256, 500, 0) for asked in options)
    assert narrow > plain > 1


def test_nan_is_an_error():
    """A value that is NaN stays NaN in e4m3."""
    ids = torch.zeros(1, 5, dtype=torch.int64)
    for impl in ("torch", "auto"):
        model = dllm_fast.patch(MAKERS["llada"](), impl=impl)
        with torch.no_grad():
            model.model.transformer.blocks[1].v_proj.weight[3, 5] = torch.nan
        with pytest.raises(ValueError, match="logits are NaN or infinite at step"):
            dllm_fast.generate(model, ids, gen_length=8, block_length=4, cache_dtype="e4m3")


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_dtype": "e4m3", "cache": "none"}, "cache_dtype='e4m3': with cache='none'"),
        ({"cache_dtype": "e5m2"}, "cache_dtype='e5m2' is not one of None, 'e4m3'"),
        ({"cache_dtype": E4M3}, "cache_dtype=torch.float8_e4m3fn is not one of None, 'e4m3'"),
    ],
)
def test_refused(options, message):
    model = dllm_fast.patch(MAKERS["llada"]())
    ids = torch.zeros(1, 5, dtype=torch.int64)
    given = {"gen_length": 16, "block_length": 8, **options}
    with pytest.raises(ValueError, match=re.escape(message)):
        dllm_fast.generate(model, ids, **given)
    with pytest.raises(ValueError, match=re.escape(message)):
        dllm_fast.generate_many(model, [ids[0]], **given)


@pytest.mark.parametrize(("capability", "has"), [((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_kernels_need_a_gpu_that_has_it(capability, has, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = launchers.no_e4m3(torch.device("cuda:1"))
    number = ".".join(map(str, capability))
    assert found == (None if has else f"cuda:1 has compute capability {number}; Triton has e4m3 from 8.9 on")


def test_a_device_that_lacks_it_is_refused_before_anything_runs(llada, monkeypatch):
    family = bound_family(dllm_fast.patch(llada))
    monkeypatch.setattr(launchers, "no_e4m3", lambda device: f"{device} is too old")
    monkeypatch.setattr(type(family), "impl", "triton")
    ids = torch.zeros(1, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match="cache_dtype='e4m3': cpu is too old"):
        dllm_fast.generate(llada, ids, cache_dtype="e4m3")
    assert Options(schedule=Threshold(0.5)).resolved(llada, family)
    monkeypatch.undo()
    monkeypatch.setattr(torch, "zeros", lambda *shape, **given: (_ for _ in ()).throw(TypeError("no float8")))
    with pytest.raises(ValueError, match=r"cache_dtype='e4m3': PyTorch .* has no float8_e4m3fn on cpu"):
        Options(cache_dtype="e4m3").resolved(llada, family)


def test_options_that_differ_in_it_have_engines_of_their_own():
    assert Options(cache_dtype="e4m3") != Options()


def test_prompts_of_any_kind_keep_their_tokens(ids, padded):
    """Through seats, where engines shrink and take over each other's caches."""
    model = dllm_fast.patch(MAKERS["llada-gqa"]().double(), impl="torch")
    options = {"gen_length": 24, "block_length": 8, "schedule": Threshold(0.02), "cache_dtype": "e4m3"}
    options |= {"refresh": dllm_fast.Every(3), "temperature": 0.5, "seed": 2}
    prompts = [torch.randint(0, EOS, (n,), generator=torch.Generator().manual_seed(n)) for n in (4, 40, 13, 9)]
    served = list(dllm_fast.generate_many(model, prompts, batch_size=3, **options))
    for row, prompt in enumerate(prompts):
        (alone,) = dllm_fast.generate_many(model, [prompt], noise_rows=[row], **options)
        assert torch.equal(alone.sequence, served[row].sequence) and alone.nfe == served[row].nfe
