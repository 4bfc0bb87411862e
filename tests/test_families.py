"""The native LLaDA, and both families' forward against the models' own, with and without a cache."""

import ast
from pathlib import Path

import pytest
import torch
from tiny import make_llada, make_modernbert

import dllm_fast
from dllm_fast import LLaDAConfig, LLaDAModelLM
from dllm_fast.families import FAMILIES
from dllm_fast.families.cache import BlockCache

PUBLISHED = (
    "model.transformer.blocks.{}.attn_norm.weight",
    "model.transformer.blocks.{}.attn_out.weight",
    "model.transformer.blocks.{}.ff_norm.weight",
    "model.transformer.blocks.{}.ff_out.weight",
    "model.transformer.blocks.{}.ff_proj.weight",
    "model.transformer.blocks.{}.k_proj.weight",
    "model.transformer.blocks.{}.q_proj.weight",
    "model.transformer.blocks.{}.up_proj.weight",
    "model.transformer.blocks.{}.v_proj.weight",
)


def family_of(model):
    return FAMILIES[model.config.model_type](model, "torch")


def cache_of(family, batch, slots, dtype=torch.float32):
    return BlockCache(family.layers, batch, slots, family.kv_heads, family.head_dim, dtype, "cpu")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_llada_state_dict_is_the_published_one(tied):
    names = {name.format(layer) for name in PUBLISHED for layer in range(3)}
    names |= {f"model.transformer.{name}.weight" for name in ("wte", "ln_f", "ff_out")}
    assert set(make_llada(weight_tying=tied).state_dict()) == names


def test_llada_8b_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = LLaDAModelLM(LLaDAConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_015_581_184


@pytest.mark.parametrize("field,value", [("rope", False), ("layer_norm_type", "default"), ("include_bias", True)])
def test_llada_config_refuses_what_was_never_published(field, value):
    with pytest.raises(ValueError, match=f"{field}={value!r} is not supported"):
        LLaDAConfig(**{field: value})


def test_llada_forward_refuses_labels(llada, ids):
    with pytest.raises(ValueError, match="does not take labels"):
        llada(ids, labels=ids)


def test_only_the_table_spells_families():
    """But for the yardstick, which takes nothing from `families`, and the default of ``train --family``."""
    names = {"LLaDA", "ModernBert", "ModernBertForMaskedLM", "ModernBertConfig", "llada", "modernbert"}
    package = Path(dllm_fast.__file__).parent
    spelled = set()
    for path in package.rglob("*.py"):
        words = {getattr(node, "id", getattr(node, "value", None)) for node in ast.walk(ast.parse(path.read_text()))}
        if names & {word for word in words if isinstance(word, str)}:
            spelled.add(str(path.relative_to(package)))
    assert {name for name in spelled if not name.startswith("families/")} == {
        "decoding/fast_dllm.py", "train/options.py",
    }  # fmt: skip


@torch.no_grad()
def test_hidden_rows_are_rows_of_hidden(model, ids):
    family = family_of(model)
    whole = family.hidden(ids)
    chosen = torch.rand(ids.shape) < 0.3
    torch.testing.assert_close(family.hidden(ids, rows=chosen), whole[chosen])
    at = torch.tensor([[3, 4, 5], [0, 1, 2], [21, 22, 23]])
    expected = torch.stack([whole[b, rows] for b, rows in enumerate(at)])
    torch.testing.assert_close(family.hidden(ids, rows=at), expected)


@torch.no_grad()
@pytest.mark.parametrize("start", [None, (0, 7, 2)], ids=["whole", "padded"])
def test_a_block_against_a_fresh_cache_is_the_full_forward(model, ids, start):
    """Running a block of unchanged ids against the full forward's cache changes nothing, wherever the block is."""
    family = family_of(model)
    start = None if start is None else torch.tensor(start)
    cache = cache_of(family, 3, 24)
    slot = torch.tensor([8, 8, 16])
    zero = torch.zeros(3, dtype=torch.int64)
    whole = family.hidden(ids, start, None, cache, zero)
    torch.testing.assert_close(whole, family.hidden(ids, start), atol=2e-6, rtol=1e-5)
    block = torch.stack([ids[b, s : s + 8] for b, s in enumerate(slot.tolist())])
    got = family.hidden(block, start, None, cache, slot)
    expected = torch.stack([whole[b, s : s + 8] for b, s in enumerate(slot.tolist())])
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_a_block_reads_stale_neighbours_and_writes_its_own_keys(either, ids):
    """After the block's ids change, each layer of its cached forward matches the definition of "dual"."""
    family = family_of(either)
    cache = cache_of(family, 3, 24)
    zero = torch.zeros(3, dtype=torch.int64)
    family.hidden(ids, None, None, cache, zero)
    before = cache.buffers.clone()
    changed = (ids[:, 8:16] + 1) % 99
    got = family.hidden(changed, None, None, cache, zero + 8)
    assert torch.equal(cache.buffers[:, :, :, :8], before[:, :, :, :8])
    assert torch.equal(cache.buffers[:, :, :, 16:], before[:, :, :, 16:])
    assert not torch.isclose(cache.buffers[:, :, :, 8:16], before[:, :, :, 8:16]).all()
    # A new forward over the whole sequence gives other hidden states than the stale suffix does, but first-layer
    # keys and values depend on the ids alone.
    new = ids.clone()
    new[:, 8:16] = changed
    fresh = cache_of(family, 3, 24)
    whole = family.hidden(new, None, None, fresh, zero)
    torch.testing.assert_close(cache.buffers[0], fresh.buffers[0], atol=2e-6, rtol=1e-5)
    assert not torch.allclose(got, whole[:, 8:16], atol=1e-5)


@torch.no_grad()
def test_modernbert_sliding_layers_see_64_on_either_side():
    """The rule is |i - j| <= local_attention // 2: position 64 away counts, 65 away does not."""
    model = make_modernbert(num_hidden_layers=2, global_attn_every_n_layers=2, local_attention=128)
    model.config.layer_types = ["sliding_attention"] * 2  # both layers slide, so reach is 2 x 64
    family = family_of(model)
    assert family.windows == [64, 64]
    ids = torch.randint(0, 99, (1, 300), generator=torch.Generator().manual_seed(0))
    base = family.hidden(ids)
    ids[0, 150] = (ids[0, 150] + 1) % 99
    moved = (family.hidden(ids) - base).abs().amax(-1)[0] > 0
    assert moved[[150 - 128, 150, 150 + 128]].all() and not moved[[150 - 129, 150 + 129]].any()


def test_a_first_forward_in_inference_mode_leaves_gradients_possible(either, ids):
    """Rotary tables made in inference mode could not be saved for a later backward."""
    family = family_of(either)
    with torch.inference_mode():
        family.hidden(ids)
    family.hidden(ids).square().mean().backward()
    assert all(layer.weight.grad is not None for group in family.groups() for layer in group)
