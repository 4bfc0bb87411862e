"""DiffusionGemma: the patched denoising step beside transformers' own, on random weights of its architecture."""

import copy
import pickle
import re

import pytest
import torch
from tiny import SEED
from torch.utils._python_dispatch import TorchDispatchMode

import dllm_fast
from dllm_fast.families import canvas, diffusion_gemma

transformers = pytest.importorskip("transformers")
own = pytest.importorskip("transformers.models.diffusion_gemma.generation_diffusion_gemma")

LENGTH = 8
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "global_head_dim": 16, "sliding_window": 8,
    "max_position_embeddings": 512, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16,
    "layer_types": ["sliding_attention", "full_attention"], "initializer_range": 0.6,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8, "patch_size": 4, "position_embedding_size": 16,
}  # fmt: skip


def make(seed: int = 0, vocabulary: int = 1500, length: int = LENGTH, **fields):
    torch.manual_seed(SEED + seed)
    text = transformers.DiffusionGemmaTextConfig(vocab_size=vocabulary, **{**SIZES, **fields})
    config = transformers.DiffusionGemmaConfig(
        text_config=text, canvas_length=length, vision_config=transformers.Gemma4VisionConfig(**VISION)
    )
    return transformers.DiffusionGemmaForBlockDiffusion(config).eval()


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Three tiles, of which the last ends within a group."""
    monkeypatch.setattr(canvas, "TILE", {"cpu": 1})


def draw(probabilities, num_samples):  # [N, V] fp32
    """A sample of each row as `canvas.denoise` defines it, plainly, in the place of ``torch.multinomial``."""
    assert num_samples == 1
    rows, vocabulary = probabilities.shape
    width = canvas.tile_width(rows, vocabulary, probabilities.device)
    uniform = torch.rand(-(-vocabulary // width), rows, dtype=torch.float64)
    token = torch.zeros(rows, dtype=torch.int64)
    for row in range(rows):
        total = 0.0
        for n, tile in enumerate(probabilities[row].double().split(width)):
            total += float(tile.sum())
            if (target := float(uniform[n, row]) * total) < float(tile.sum()):
                token[row] = n * width + int((tile.cumsum(0) > target).nonzero()[0])
    return token[:, None]


class Drafts:
    """A streamer that keeps each step's argmax canvas."""

    def __init__(self):
        self.canvases = []

    def put(self, value):
        self.canvases.append(value)

    put_draft = put

    def end(self):
        pass


def run(model, ids, seed=1, **options):
    """(output, argmax canvases of every step) of ``model.generate``."""
    torch.manual_seed(seed)
    drafts = Drafts()
    return model.generate(ids, streamer=drafts, **options), drafts.canvases


def prompts(batch: int = 3, length: int = 5, vocabulary: int = 1500):
    return torch.randint(3, vocabulary, (batch, length), generator=torch.Generator().manual_seed(batch))


RUNS = {
    "defaults": {},
    "one canvas": {"max_new_tokens": LENGTH, "max_denoising_steps": 5},
    "loose": {"sampler_config": own.EntropyBoundSamplerConfig(entropy_bound=20.0), "confidence_threshold": 4.0},
    "stable for two": {"stability_threshold": 2, "confidence_threshold": 4.5, "t_min": 0.1, "t_max": 0.3},
    "any order": {"stability_threshold": 0, "confidence_threshold": 1.0, "t_min": 0.2, "t_max": 1.5},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "padded": {"attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])},
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("seed", range(2))
def test_canvases_and_steps_of_the_unpatched_loop(name, seed, monkeypatch):
    model, ids = make(seed), prompts()
    options = {"max_new_tokens": 2 * LENGTH, "max_denoising_steps": 12, **RUNS[name]}
    with monkeypatch.context() as patches:
        patches.setattr(torch, "multinomial", draw)
        expected, canvases = run(model, ids, **options)
    found, ours = run(dllm_fast.patch(model), ids, **options)
    assert len(ours) == len(canvases) and all(map(torch.equal, ours, canvases))
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.tokens_per_forward, expected.tokens_per_forward)
    print(name, len(ours), found.tokens_per_forward)
