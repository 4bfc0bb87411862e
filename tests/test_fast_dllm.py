"""`generate` with a cache against a plain transcription of Fast-dLLM's algorithms: same tokens, same NFE."""

from functools import cache, partial

import pytest
import torch
from tiny import EOS, MASK, make_llada, make_modernbert

import dllm_fast
from dllm_fast import Factor, Threshold, Uniform
from dllm_fast.decoding.fast_dllm import PlainLLaDA, PlainModernBert, fast_dllm

RULES = {
    "one-a-step": lambda gen, block: ({"steps": gen}, Uniform(gen)),
    "all-at-once": lambda gen, block: ({"steps": gen // block}, Uniform(gen // block)),
    "uneven-shares": lambda gen, block: ({"steps": 3 * gen // block}, Uniform(3 * gen // block)),
    "threshold-0.3": lambda gen, block: ({"threshold": 0.3}, Threshold(0.3)),
    "threshold-0.9": lambda gen, block: ({"threshold": 0.9}, Threshold(0.9)),
    "factor-1": lambda gen, block: ({"factor": 1.0}, Factor(1.0)),
    "factor-0.4": lambda gen, block: ({"factor": 0.4}, Factor(0.4)),
}


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


SHAPES = {"llada": make_llada, "llada-gqa": partial(make_llada, n_kv_heads=2), "modernbert": make_modernbert}


def lively(name, device):
    """A tiny model with sharp attention and high confidence, and its plain twin: the first on which caches differ.

    With the default initialisation, all positions attend to nearly the same average and most predict the same token, so
    a stale cache changes nothing."""
    return sharp(name, device, first_that_tells_the_caches_apart(name, device))


@cache
def first_that_tells_the_caches_apart(name, device):
    """The seed of a model that generates many distinct tokens, and different ones without a cache, with the prefix
    cache and with the dual cache."""
    for seed in range(20):
        model, _ = sharp(name, device, seed)
        dllm_fast.patch(model)
        options = {"gen_length": 32, "block_length": 8, "schedule": Uniform(32)}
        found = [
            dllm_fast.generate(model, prompts(24, device), cache=kind, **options).sequences[:, 24:]
            for kind in ("none", "prefix", "dual")
        ]
        apart = all(((found[a] != found[b]).sum(1) >= 8).all() for a, b in ((0, 1), (0, 2), (1, 2)))
        if apart and all(len(row.unique()) >= 8 for tokens in found for row in tokens):
            return seed
    raise AssertionError(f"none of 20 models of the shape {name} tells the caches apart")


@torch.no_grad()
def sharp(name, device, seed):
    model = SHAPES[name](seed).to(device)
    if hasattr(model, "decoder"):
        for layer in model.model.layers:
            layer.attn.Wqkv.weight[: 2 * model.config.hidden_size] *= 4
            layer.attn.Wo.weight *= 3
        model.decoder.weight.data = 4 * model.decoder.weight  # a new tensor, because it was tied to the embeddings
        return model, PlainModernBert(model)
    for block in model.model.transformer.blocks:
        block.q_proj.weight *= 4
        block.k_proj.weight *= 4
        block.attn_out.weight *= 3
    model.model.transformer.ff_out.weight *= 4
    return model, PlainLLaDA(model)


def prompts(length, device):
    return torch.randint(0, EOS, (2, length), generator=torch.Generator().manual_seed(length)).to(device)


@pytest.mark.parametrize("name", ["llada", "llada-gqa", "modernbert"])
@pytest.mark.parametrize("prompt, gen, block", [(24, 32, 8), (5, 32, 32), (17, 30, 10)])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_tokens_and_evaluations(name, prompt, gen, block, rule, cache, device):
    model, plain = lively(name, device)
    dllm_fast.patch(model)
    options, schedule = RULES[rule](gen, block)
    for ids in prompts(prompt, device):
        expected, whole, cached = fast_dllm(
            plain, ids, gen_length=gen, block_length=block, mask_id=MASK, cache=cache, **options
        )
        out = dllm_fast.generate(model, ids[None], gen_length=gen, block_length=block, schedule=schedule, cache=cache)
        assert torch.equal(out.sequences[0], expected)
        assert (out.nfe_full, out.nfe_block) == (whole, cached)


@pytest.mark.parametrize("name", ["llada", "llada-gqa", "modernbert"])
@torch.no_grad()
def test_the_plain_models_are_the_models(name, device):
    """Logits in fp64 against the model's own (both rotate in fp32), and against a cache of the same ids.

    Not with a `lively` model, whose sharp attention would turn a rounding error into as much as a wrong angle gives
    here."""
    model = SHAPES[name]().to(device).double()
    plain = (PlainModernBert if hasattr(model, "decoder") else PlainLLaDA)(model)
    ids, at = prompts(40, device)[0], torch.arange(40, device=device)
    logits, cache = plain(ids, at)
    own = model(ids[None]).logits[0]
    assert (logits - own).abs().max() < 1e-5 * own.abs().max()
    for rows in (slice(10, 20), slice(30, 40)):
        again, merged = plain(ids[rows], at[rows], cache)
        assert torch.allclose(again, logits[rows], rtol=0, atol=1e-12 * float(own.abs().max()))
        assert all(len(layer[0]) == 40 for layer in merged)
