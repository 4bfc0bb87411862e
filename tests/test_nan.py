"""Even one NaN logit is an error, never a token, in every implementation."""

import functools
import math

import pytest
import torch
from needs import needs_triton
from tiny import MASK, make_llada, make_modernbert

import dllm_fast
from dllm_fast import P2, Drift, EntropyBound, FirstHitting, ReMDM, Threshold, Uniform, Verify, ops
from dllm_fast.cpu import compiled
from dllm_fast.evaluate.likelihood import are_greedy, log_likelihoods
from dllm_fast.kernels import reference

NAN, INF = float("nan"), float("inf")
# Arithmetic gives 0x7FC00000; unwritten memory, or memory full of ones, holds the others.
PATTERNS = [0x7FC00000, 0xFFFFFFFF, 0x7FFFFFFF, 0x7FC00101, 0xFFC00001]
LENGTHS = {"gen_length": 16, "block_length": 8}
ERROR = "logits are NaN or infinite at step"


def nan_of(bits: int) -> torch.Tensor:
    return torch.tensor([bits - (1 << 32) if bits >> 31 else bits], dtype=torch.int32).view(torch.float32)


MISSING = compiled.obstacle(torch.device("cpu"), torch.float32)
BUILT = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
IMPLS = [
    ("torch", torch.float32),
    ("torch", torch.bfloat16),
    pytest.param("triton", torch.float32, marks=needs_triton),
    pytest.param("cpp", torch.float32, marks=BUILT),
    pytest.param("cpp", torch.bfloat16, marks=BUILT),
]


@pytest.mark.parametrize("impl, dtype", IMPLS)
@pytest.mark.parametrize("bits", PATTERNS, ids=hex)
def test_ops_hand_on_nan(impl, dtype, bits):
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    rows, weight, bad = draw(5, 48).to(dtype), draw(40, 48).to(dtype), nan_of(bits).to(dtype)
    rows[1, 17] = bad
    expected = torch.tensor([False, True, False, False, False])
    norm_weight = torch.ones(48, dtype=dtype)
    results = {
        "linear": ops.linear(rows, weight, impl=impl),
        "rms_norm": ops.rms_norm(rows, norm_weight, 1e-5, impl=impl)[0],
        "layer_norm": ops.layer_norm(rows, norm_weight, None, 1e-5, impl=impl)[0],
        "swiglu": ops.swiglu(rows, rows, impl=impl),
        "geglu": ops.geglu(rows, rows, impl=impl),
    }
    for name, result in results.items():
        assert torch.equal(result.isnan().any(1), expected), name
    q, k, v = (draw(1, 9, 2, 16).to(dtype) for _ in range(3))
    for name, tensor in (("q", q), ("k", k)):
        kept, tensor[0, 4, 1, 3] = tensor[0, 4, 1, 3].clone(), bad
        out = ops.attention(q, k, v, ops.visible(q, 9, impl=impl), impl=impl)
        seen = torch.zeros(9, 2, dtype=torch.bool)  # every query of its head sees a key's NaN
        seen[4 if name == "q" else slice(None), 1] = True
        assert torch.equal(out[0].isnan().all(-1), seen) and torch.equal(out[0].isnan().any(-1), seen), name
        tensor[0, 4, 1, 3] = kept


LOGITS = {  # id: logit, where a row has others than finite ones
    "finite": {},
    "-inf": {7: -INF, 600: -INF},
    "nan": {650: NAN},
    "inf": {3: INF},
    "nan and inf": {0: NAN, 699: INF},
    "the last alone": {699: NAN},
    "nan among -inf": {**dict.fromkeys(range(700), -INF), 300: NAN},
}


@pytest.mark.parametrize("impl, dtype", IMPLS)
@pytest.mark.parametrize(
    "confidence, temperature", [("probability", 0.0), ("margin", 0.0), ("entropy", 0.0), ("random", 0.7)]
)
def test_lse_tells_nan_and_infinite_logits(impl, dtype, confidence, temperature):
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    hidden, weight = draw(2, 16).to(dtype), draw(700, 16).to(dtype)
    keys = {"seed": 3, "step": 1, "row": torch.zeros(2, dtype=torch.int64), "position": torch.arange(2)}
    options = {"mask_id": 5, "confidence": confidence, "temperature": temperature, "impl": impl, **keys}
    for name, logits in LOGITS.items():
        bias = torch.zeros(700, dtype=dtype)
        for i, value in logits.items():
            bias[i] = value
        _, _, lse = ops.predict(hidden, weight, bias, **options)
        assert lse.isfinite().tolist() == [name in ("finite", "-inf")] * 2, name
    weight[650, 3] = NAN
    for uncond in (None, hidden.flip(0)):
        assert not ops.predict(hidden, weight, uncond=uncond, cfg_scale=0.5, **options)[2].isfinite().any()
    candidate = torch.tensor([True, False])
    assert ops.predict(hidden, weight, candidate=candidate, **options)[2].isfinite().tolist() == [False, True]


CASES = [
    {"schedule": Uniform(8), "cache": "none"},
    {"schedule": Uniform(8), "remask": ReMDM(0.5), "temperature": 0.5},
    {"schedule": Threshold(0.05), "cache": "prefix", "cfg_scale": 0.5},
    {"schedule": Threshold(0.05), "remask": Verify(0.1), "confidence": "margin"},
    {"schedule": EntropyBound(3.0), "refresh": Drift(0.1), "remask": P2(0.5)},
    {"schedule": FirstHitting(), "confidence": "random", "temperature": 1.0},
    {"schedule": Uniform(8), "temperature": 0.5, "top_k": 3, "top_p": 0.9},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("impl", ["torch", "auto"])
def test_a_nan_row_of_the_head_is_an_error(either, ids, padded, impl, case):
    model = dllm_fast.patch(either, impl)
    options = {**LENGTHS, **case, "seed": 0}
    expected = dllm_fast.generate(model, ids, padded, **options).sequences
    head = model.get_output_embeddings().weight.data
    for value in (NAN, INF):
        kept, head[41] = head[41].clone(), value  # infinite: NaN or +inf, by the signs of what it multiplies
        with pytest.raises(ValueError, match=f"{ERROR} 0 of block 0 of row 0"):
            dllm_fast.generate(model, ids, padded, **options)
        with pytest.raises(ValueError, match=ERROR):
            list(dllm_fast.generate_many(model, list(ids), batch_size=2, **options))
        head[41] = kept
    assert torch.equal(dllm_fast.generate(model, ids, padded, **options).sequences, expected)


@pytest.mark.parametrize("where", ["embedding", "norm", "query", "key", "value", "mlp"])
@pytest.mark.parametrize("impl", ["torch", "auto"])
def test_a_nan_weight_anywhere_is_an_error(llada, ids, impl, where):
    model = dllm_fast.patch(llada, impl)
    block = model.model.transformer.blocks[1]
    weight = {
        "embedding": model.get_input_embeddings(),
        "norm": block.ff_norm,
        "query": block.q_proj,
        "key": block.k_proj,
        "value": block.v_proj,
        "mlp": block.up_proj,
    }[where].weight
    weight.data[MASK if where == "embedding" else 3] = NAN
    for prompt in (ids, ids[:1, :1]):
        with pytest.raises(ValueError, match=ERROR):
            dllm_fast.generate(model, prompt, **LENGTHS)


@pytest.mark.parametrize("impl", ["torch", "auto"])
def test_the_row_and_the_step_are_named(llada, ids, impl):
    model = dllm_fast.patch(llada, impl)
    ids, options = ids.clamp(max=90), {"schedule": Uniform(16), "suppress_tokens": [91], **LENGTHS}
    out = dllm_fast.generate(model, ids, cache="none", **options).sequences
    # A token that some step writes first: from the next step, its row's logits are NaN.
    embedding = model.get_input_embeddings().weight.data
    ids[1, 5] = 91
    embedding[91] = NAN
    with pytest.raises(ValueError, match=f"{ERROR} 0 of block 0 of row 1:"):
        dllm_fast.generate(model, ids, **options)
    found = dllm_fast.generate(model, ids[::2], cache="none", **options).sequences
    assert torch.equal(found[0], out[0])
    head = model.get_output_embeddings().weight.data
    head.zero_()  # all logits are equal: the lowest id is chosen, from left to right
    embedding[0] = NAN
    with pytest.raises(ValueError, match=f"{ERROR} 1 of block 0 of row 0:"):
        dllm_fast.generate(model, ids[:1].clamp(min=1), schedule=Uniform(16), **LENGTHS)


@pytest.mark.parametrize("make", [make_llada, make_modernbert])
def test_half_precision_that_overflows_is_an_error(make, ids):
    model = make().half()
    dllm_fast.patch(model)
    model.get_output_embeddings().weight.data.mul_(60000.0).nan_to_num_(0.0, 60000.0, -60000.0)
    assert model.get_output_embeddings().weight.isfinite().all()
    with pytest.raises(ValueError, match=f"{ERROR} 0 .*torch.float16"):
        dllm_fast.generate(model, ids, **LENGTHS)


@pytest.mark.parametrize("impl", ["torch", "auto"])
@pytest.mark.parametrize("cfg_scale", [0.0, 0.5])
def test_likelihoods_of_nan_logits_are_an_error(impl, cfg_scale):
    model = dllm_fast.patch(make_modernbert(tie_word_embeddings=False), impl)
    pairs = [([1, 2], [3, 4, 5]), ([1, 9], [3, 4]), ([6], [7])]
    options = {"batch_size": 2, "cfg_scale": cfg_scale}
    model.get_input_embeddings().weight.data[9] = NAN
    for run in (functools.partial(log_likelihoods, samples=4, seed=0), are_greedy):
        with pytest.raises(ValueError, match=r"model: logits are NaN or infinite for pairs\[1\]"):
            list(run(model, pairs, **options))
        assert len(list(run(model, pairs[::2], **options))) == 2
    model.decoder.bias.data[11] = INF
    with pytest.raises(ValueError, match=r"pairs\[0\]"):
        list(log_likelihoods(model, pairs[:1], 4, 0, **options))


@pytest.mark.parametrize("impl", ["torch", "auto"])
def test_a_logit_of_minus_infinity_is_no_error(modernbert, ids, impl):
    model = dllm_fast.patch(modernbert, impl)
    expected = dllm_fast.generate(model, ids, suppress_tokens=[11, 12], **LENGTHS).sequences
    model.decoder.bias.data[11:13] = -INF
    assert torch.equal(dllm_fast.generate(model, ids, **LENGTHS).sequences, expected)
    impossible, possible = log_likelihoods(model, [([1, 2], [11]), ([1, 2], [3])], 4, 0)
    assert impossible == -INF and math.isfinite(possible)


def test_reference_tells_as_the_kernels_do():
    logits = torch.tensor([[0.0, NAN, 1.0], [0.0, INF, 1.0], [-INF, 0.0, 1.0]])
    assert reference.select(logits, 0)[2].isfinite().tolist() == [False, False, True]
