"""DiffusionGemma: the patched denoising step beside transformers' own, on random weights of its architecture."""

import copy
import pickle
import re
import threading

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


def make(seed: int = 0, vocabulary: int = 1500, length: int = LENGTH, bidirectional: str | None = None):
    """Weights with which canvases come to rest after some steps, rows at different ones."""
    torch.manual_seed(SEED + seed)
    text = transformers.DiffusionGemmaTextConfig(
        vocab_size=vocabulary, use_bidirectional_attention=bidirectional, **SIZES
    )
    config = transformers.DiffusionGemmaConfig(
        text_config=text, canvas_length=length, vision_config=transformers.Gemma4VisionConfig(**VISION)
    )
    model = transformers.DiffusionGemmaForBlockDiffusion(config).eval()
    with torch.no_grad():
        model.model.decoder.norm.weight.mul_(32)
        for layer in model.model.decoder.layers:
            layer.post_attention_layernorm.weight.mul_(0.35)
            layer.post_feedforward_layernorm.weight.mul_(0.35)
    return model


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Three tiles, of which the last ends within a group."""
    monkeypatch.setattr(canvas, "TILE", {"cpu": 1})


def draw(probabilities, num_samples):  # [N, V] fp32
    """A sample of each row as `canvas.denoise` defines it, plainly, in the place of ``torch.multinomial``."""
    assert num_samples == 1
    probabilities = probabilities.detach()
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


SETTINGS = {
    "max_new_tokens": 2 * LENGTH, "max_denoising_steps": 14, "confidence_threshold": 0.6,
    "sampler_config": own.EntropyBoundSamplerConfig(entropy_bound=0.3),
}  # fmt: skip
RUNS = {
    "plain": {},
    "no step left": {"max_denoising_steps": 3},
    "stable for two": {"stability_threshold": 2, "t_min": 0.1, "t_max": 0.3},
    "confident alone": {"stability_threshold": 0, "confidence_threshold": 1.0, "t_max": 1.5},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "padded": {"attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])},
}


def stopping_steps(out) -> list[float]:
    return (2 * LENGTH / out.tokens_per_forward).tolist()


@pytest.mark.parametrize("name", RUNS)
def test_canvases_and_steps_of_the_unpatched_loop(name, monkeypatch):
    model, ids = make(), prompts()
    options = {**SETTINGS, **RUNS[name]}
    with monkeypatch.context() as patches:
        patches.setattr(torch, "multinomial", draw)
        expected, canvases = run(model, ids, **options)
    found, ours = run(dllm_fast.patch(model), ids, **options)
    assert len(ours) == len(canvases) and all(map(torch.equal, ours, canvases))
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.tokens_per_forward, expected.tokens_per_forward)
    if name == "plain":  # rows stop by themselves, at steps of their own
        assert len(set(stopping_steps(found))) > 1 and max(stopping_steps(found)) < 28


@pytest.mark.parametrize("length", [5, 12])
def test_a_prompt_of_a_model_that_sees_images_whole_in_the_attention_backend(length):
    """Its blocks of image tokens are laid over a causal window, shorter or longer than the prompt."""
    model, ids = make(bidirectional="vision"), prompts(length=length)
    given = {"input_ids": ids, "mm_token_type_ids": (torch.arange(length) < 9).long().expand_as(ids)}
    with torch.no_grad():
        model.set_attn_implementation("sdpa")
        expected = model.model.encoder(**given).last_hidden_state
        model.set_attn_implementation("dllm_fast")
        found = model.model.encoder(**given).last_hidden_state
    assert torch.equal(found, expected)


def one_step(model, dtype, batch=2, **options):
    """The arguments of a canvas' second step."""
    model = model.to(dtype)
    kept = {}

    def keep(self, *args, **kwargs):
        if isinstance(kwargs["self_conditioning_logits"], torch.Tensor):
            kept.update(kwargs)
            raise StopIteration
        return type(self)._denoising_step(self, *args, **kwargs)

    model._denoising_step = keep.__get__(model)
    with pytest.raises(StopIteration):
        run(model, prompts(batch, vocabulary=700), **SETTINGS, **options)
    del model._denoising_step
    return kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_and_its_soft_embedding(dtype, monkeypatch):
    model = make()
    given = one_step(model, dtype)
    embedding = model.model.decoder.embed_tokens
    monkeypatch.setattr(torch, "multinomial", draw)
    given["diffusion_stopping_criteria"].reset()
    torch.manual_seed(4)
    expected = model._denoising_step(**given)
    accepted = given["sampler"].accepted_token_mask
    given["diffusion_stopping_criteria"].reset()
    torch.manual_seed(4)
    found = dllm_fast.patch(model)._denoising_step(**given)
    assert torch.equal(given["sampler"].accepted_token_mask, accepted) and 0 < accepted.sum() < accepted.numel()
    assert all(torch.equal(found[n], expected[n]) for n in (0, 1, 3))
    # The next step's soft embedding, against fp64, beside the decoder's own.
    logits = expected[2].double()
    truth = (logits.softmax(-1) @ embedding.weight.double()) * embedding.embed_scale.double()
    theirs = (expected[2].softmax(-1, dtype=torch.float32).to(dtype) @ embedding.weight) * embedding.embed_scale.to(
        dtype
    )
    assert truth.shape == found[2].value.shape and found[2].value.dtype == dtype
    assert (found[2].value - truth).abs().max() <= 2 * (theirs - truth).abs().max()


def test_samples_have_the_unpatched_steps_distribution():
    """Two-sample chi-squared tests, of every position of a canvas; bounds for one false alarm in ten thousand runs."""
    model = make(vocabulary=700, length=4)
    given = one_step(model, torch.float32, batch=1, t_min=1.5, t_max=3.0)
    rows = 2000
    wide = {
        name: x.expand(rows, *x.shape[1:]) if isinstance(x, torch.Tensor) and name != "decoder_position_ids" else x
        for name, x in given.items()
    }
    wide |= {"diffusion_stopping_criteria": None, "sampler": copy.copy(given["sampler"])}
    wide["sampler"].entropy_bound = 1e9  # all samples are accepted
    cache = given["cache" if "cache" in given else "past_key_values"]  # the first in newer versions
    cache.batch_repeat_interleave(rows)
    wide["mask_mapping"] = {
        k: m if m is None else m.expand(rows, *m.shape[1:]) for k, m in given["mask_mapping"].items()
    }
    torch.manual_seed(SEED + 5)
    theirs, best, *_ = model._denoising_step(**wide)
    ours, ours_best, *_ = dllm_fast.patch(model)._denoising_step(**wide)
    assert torch.equal(best, ours_best)
    for position in range(4):
        counts = torch.stack([torch.bincount(x[:, position], minlength=700).double() for x in (theirs, ours)])
        counts = counts[:, counts.sum(0).argsort(descending=True)]
        common = int((counts.sum(0) >= 10).sum())
        counts = torch.cat((counts[:, :common], counts[:, common:].sum(1, keepdim=True)), 1)
        counts = counts[:, counts.sum(0) > 0]
        statistic = float(((counts[0] - counts[1]) ** 2 / counts.sum(0)).sum())
        degrees = counts.shape[1] - 1
        # Wilson and Hilferty: the cube root of chi-squared over its degrees is nearly normal.
        score = ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / (2 / (9 * degrees)) ** 0.5
        assert degrees > 40 and score < 4.1, (position, statistic, degrees)


def test_rare_tokens_are_drawn_as_often_as_they_should_be():
    """Of a token's mass 1 and 1,599 masses of e**-18 after it, a cumulative sum in fp32 never gets past 1."""
    rows, vocabulary, width, share = 1 << 15, 1600, 512, 1e-4
    weight = torch.zeros(vocabulary, 1)
    weight[0] = 1.0
    uniform = torch.rand(4, rows, dtype=torch.float64, generator=torch.Generator().manual_seed(SEED)) * share
    uniform[0] += 1 - share  # only numbers that may end at a rare token
    hidden = torch.full((rows, 1), 18.0)
    tokens = canvas.denoise(hidden, weight, None, 1e9, lambda z: z, uniform=uniform, width=width).token
    rare = float(torch.tensor(-18.0, dtype=torch.float64).exp()) / share
    counts = torch.bincount(tokens, minlength=vocabulary).double()[1:]
    stays, expected = 1.0, []
    for tile in counts.split([width - 1, width, width, 64])[::-1]:
        expected.append(torch.full_like(tile, rows * rare * stays))
        stays *= 1 - rare * len(tile)
    expected = torch.cat(expected[::-1])
    statistic, degrees = float(((counts - expected) ** 2 / expected).sum()), len(counts)
    assert abs(statistic - degrees) < 5 * (2 * degrees) ** 0.5


class Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def test_no_tensor_of_all_logits_is_made():
    model, ids = make(), prompts(batch=16)
    options = {"max_new_tokens": LENGTH, "max_denoising_steps": 3}
    logits = 16 * LENGTH * 1500
    with Largest() as unpatched:
        run(model, ids, **options)
    with Largest() as patched:
        run(dllm_fast.patch(model), ids, **options)
    assert patched.elements < logits / 2 < logits <= unpatched.elements


def test_another_thread_calls_the_decoder_meanwhile():
    """It gets no soft embedding, while the first thread's forward is under way with one."""
    model, ids = dllm_fast.patch(make()), prompts()
    options = {**SETTINGS, "max_new_tokens": LENGTH}
    encoded = model.model.encoder(ids).past_key_values
    canvas_ids = prompts(length=LENGTH)

    def decode():
        with torch.no_grad():
            return model.model(decoder_input_ids=canvas_ids, past_key_values=encoded).last_hidden_state

    expected, (alone, _) = decode(), run(model, ids, **options)
    found, threads = [], []

    def other(*args) -> None:
        """In the midst of the first decoder's forward with a soft embedding, one in another thread."""
        if not threads and model.model.decoder.self_conditioning._forward_pre_hooks:
            threads.append(threading.Thread(target=lambda: found.append(decode())))
            threads[0].start()
            threads[0].join(60)

    handle = model.model.decoder.embed_tokens.register_forward_pre_hook(other)
    out, _ = run(model, ids, **options)
    handle.remove()
    assert len(found) == 1 and torch.equal(found[0], expected)
    assert torch.equal(out.sequences, alone.sequences)


def test_unpatch_restores_exactly():
    model, ids = make(), prompts()
    before, storages = dict(model.__dict__), [p.data_ptr() for p in model.parameters()]
    expected, _ = run(model, ids, **SETTINGS)
    dllm_fast.patch(dllm_fast.patch(model, impl="torch"))
    assert model._denoising_step.__func__ is diffusion_gemma.denoising_step and "generate" not in model.__dict__
    run(model, ids, **SETTINGS)
    dllm_fast.unpatch(model)
    assert model.__dict__ == before and [p.data_ptr() for p in model.parameters()] == storages
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert torch.equal(run(model, ids, **SETTINGS)[0].sequences, expected.sequences)


def test_a_folder_is_loaded_and_patched(tmp_path):
    model, ids = make(), prompts()
    model.save_pretrained(tmp_path)
    loaded = dllm_fast.from_pretrained(tmp_path)
    assert loaded._denoising_step.__func__ is diffusion_gemma.denoising_step
    expected = run(dllm_fast.patch(model), ids, **SETTINGS)[0].sequences
    assert torch.equal(run(loaded, ids, **SETTINGS)[0].sequences, expected)
    with pytest.raises(ValueError, match="weights='fp8': the model runs its own forward"):
        dllm_fast.from_pretrained(tmp_path, weights="fp8")


def test_copies():
    model, ids = dllm_fast.patch(make()), prompts()
    expected, _ = run(model, ids, **SETTINGS)
    deep, shallow, loaded = copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))
    assert torch.equal(run(deep, ids, **SETTINGS)[0].sequences, expected.sequences)
    assert deep._denoising_step.__self__ is deep
    for twin in (shallow, loaded):
        assert "_denoising_step" not in twin.__dict__
    dllm_fast.unpatch(deep)
    assert "_denoising_step" not in deep.__dict__ and "_denoising_step" in model.__dict__


def custom(model):
    return {"logits_processor": transformers.LogitsProcessorList([transformers.TopKLogitsWarper(5)])}


def hooked(model):
    model.lm_head.register_forward_hook(lambda *args: None)


def in_halves(model):
    model.half()


def other_forward(model):
    model.forward = model.forward.__func__.__get__(model)


@pytest.mark.parametrize("change", [custom, hooked, in_halves, other_forward], ids=lambda f: f.__name__)
def test_what_it_cannot_honour_is_left_to_the_unpatched_step(change):
    model, ids = make(), prompts()
    options = {**SETTINGS, "max_denoising_steps": 3, **(change(model) or {})}
    expected, _ = run(model, ids, **copy.deepcopy(options))
    found, _ = run(dllm_fast.patch(model), ids, **options)
    assert torch.equal(found.sequences, expected.sequences)


def test_logits_that_a_caller_gives_are_honoured(monkeypatch):
    model, ids = make(), prompts()
    given = {**SETTINGS, "max_new_tokens": LENGTH, "self_conditioning_logits": 9 * torch.randn(3, LENGTH, 1500)}
    with monkeypatch.context() as patches:
        patches.setattr(torch, "multinomial", draw)
        expected, _ = run(model, ids, **given)
    found, _ = run(dllm_fast.patch(model), ids, **given)
    assert torch.equal(found.sequences, expected.sequences)


def test_refusals():
    model, ids = make(), prompts()
    for given, message in (
        ({"impl": "triton"}, "impl='triton': the denoising step of a DiffusionGemmaForBlockDiffusion is written in"),
        ({"head": "fp8"}, "head='fp8': a DiffusionGemmaForBlockDiffusion has the head that it embeds with"),
        ({"weights": "int4"}, "weights='int4': the model runs its own forward"),
    ):
        if given.get("impl") == "triton" and not torch.cuda.is_available():
            message = "impl='triton'"
        with pytest.raises(ValueError, match=re.escape(message)):
            dllm_fast.patch(model, **given)
    assert "_denoising_step" not in model.__dict__
    dllm_fast.patch(model)
    with pytest.raises(ValueError, match=re.escape("generates with model.generate(...), transformers' own loop")):
        dllm_fast.generate(model, ids, gen_length=8, block_length=8, mask_id=3)
    streamer = Drafts()
    streamer._takes_logits = True
    with pytest.raises(ValueError, match="streamer: it takes logits, which are never kept"):
        model.generate(ids, streamer=streamer, **SETTINGS)
    with torch.no_grad():
        model.lm_head.weight[700] = float("nan")
    with pytest.raises(ValueError, match="model: its logits are NaN, with 14 steps of a canvas to go"):
        model.generate(ids, **SETTINGS)
