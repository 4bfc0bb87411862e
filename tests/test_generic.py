"""Models of transformers that run their own forward: their logits, and the tokens of a plain loop over it."""

import copy
import functools
import inspect
import json
import re
import threading

import pytest
import torch
import transformers
from needs import needs_backend, needs_cpp, needs_triton
from others import GROUPED, OTHERS, SHIFTED, SIZES, OwnMemory, make, moved
from test_skip_committed import check_plain_loop
from tiny import EOS, MASK, SEED, VOCAB

import dllm_fast
from dllm_fast import Threshold
from dllm_fast.patch import bound_pool

pytestmark = needs_backend


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("seed", [pytest.param(n, marks=() if n < 3 else pytest.mark.long) for n in range(6)])
def test_tokens_of_the_plain_loop(name, seed):
    options = {"skip_committed": False} if name in SHIFTED else {}
    check_plain_loop(name, seed, functools.partial(make, name), OwnMemory, **options)


MORE = {  # of other heads, which generate nothing
    "modernbert-classifier": (
        "ModernBertForSequenceClassification", "ModernBertConfig",
        {**SIZES, "local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": EOS, "sep_token_id": EOS},
    ),
    "bert-tokens": ("BertForTokenClassification", "BertConfig", SIZES),
}  # fmt: skip


def make_more(name: str):
    cls, config, fields = MORE[name]
    torch.manual_seed(SEED)
    return getattr(transformers, cls)(getattr(transformers, config)(**fields)).eval()


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("name", [*OTHERS, *MORE])
def test_its_own_logits(name, padding, ids, padded):
    model = make_more(name) if name in MORE else make(name)
    given = {"input_ids": ids.where(padded.bool(), EOS), "attention_mask": padded}
    if not padding:
        given = {"input_ids": ids}
    with torch.no_grad():
        expected = model(**given).logits
        found = dllm_fast.patch(model)(**given).logits
        again = dllm_fast.unpatch(model)(**given).logits
    there = padded.bool() if padding and expected.dim() == 3 else ...
    scale = expected[there].abs().max()
    assert (found - expected)[there].abs().max() <= 2e-5 * scale
    assert torch.equal(again, expected)


@needs_cpp
@pytest.mark.parametrize("name", OTHERS)
def test_alone_in_any_batch_and_without_a_cache(name):
    model = make(name)
    prompts = [torch.randint(0, EOS, (n,), generator=torch.Generator().manual_seed(n)) for n in (5, 11, 17)]
    options = {"gen_length": 16, "block_length": 8, "mask_id": MASK, "seed": 3, "schedule": Threshold(0.2)}
    plain = make(name)
    if name == "qwen2-shifted":  # as its users shift: the plain loop takes logits that predict their own position
        plain.forward = functools.partial(shifted, type(plain).forward, plain)
    expected = [dllm_fast.generate_plain(plain, row[None], **options).sequences[0, len(row) :] for row in prompts[:1]]
    dllm_fast.patch(model)
    assert torch.equal(
        dllm_fast.generate(model, prompts[0][None], cache="none", **options).sequences[0, 5:], expected[0]
    )
    together = {c.index: c for c in dllm_fast.generate_many(model, prompts, batch_size=2, **options)}
    for n, row in enumerate(prompts):
        alone = next(iter(dllm_fast.generate_many(model, [row], **options)))
        if n == 0:  # noise depends on the prompt's number
            assert torch.equal(together[n].sequence, alone.sequence)
    drafted = {c.index: c for c in dllm_fast.generate_many(model, prompts, batch_size=2, speculate=3, **options)}
    assert all(torch.equal(drafted[n].sequence, together[n].sequence) for n in together)


def shifted(forward, model, *args, **kwargs):
    out = forward(model, *args, **kwargs)
    out.logits = moved(out.logits)
    return out


@needs_triton
@pytest.mark.usefixtures("strict_interpreter")
@pytest.mark.parametrize(
    "name", ["gpt2-shifted", *(pytest.param(name, marks=pytest.mark.long) for name in ("bert", "qwen3"))]
)
def test_triton_gives_the_tokens_of_pytorch(name):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = torch.randint(0, EOS, (2, 7), generator=torch.Generator().manual_seed(0)).to(device)
    options = {"gen_length": 8, "block_length": 4, "schedule": Threshold(0.3), "mask_id": MASK}
    expected = dllm_fast.generate(dllm_fast.patch(make(name).to(device), impl="torch"), ids, **options)
    found = dllm_fast.generate(dllm_fast.patch(make(name).to(device), impl="triton"), ids, **options)
    assert torch.equal(found.sequences, expected.sequences)


@pytest.mark.parametrize("name", ["bert", "qwen3", "gpt2-shifted"])
def test_a_folder_is_loaded_and_patched(name, tmp_path, ids):
    """With the config's word that a decoder's causal mask is off, and that its logits are shifted."""
    model = make(name)
    model.save_pretrained(tmp_path)
    options = {"gen_length": 8, "block_length": 4, "schedule": Threshold(0.3), "mask_id": MASK}
    expected = dllm_fast.generate(dllm_fast.patch(model), ids, **options).sequences
    loaded = dllm_fast.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(dllm_fast.generate(loaded, ids, **options).sequences, expected)
    with pytest.raises(ValueError, match="weights='fp8': the model runs its own forward"):
        dllm_fast.from_pretrained(tmp_path, weights="fp8")


def test_a_dream_is_loaded_without_its_code(tmp_path, ids):
    """Its published config.json names a class that transformers does not have, and no position is to the left of the
    first, whose own output predicts it."""
    model = make("qwen2-shifted")
    model.save_pretrained(tmp_path)
    sizes = {name: getattr(model.config, name) for name in GROUPED}
    published = {"model_type": "Dream", "architectures": ["DreamModel"], "auto_map": {"AutoModel": "no.DreamModel"}}
    published |= {"attention_dropout": 0.0, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_scaling": None}
    published |= {"rope_theta": 10000.0, "sliding_window": None, "use_sliding_window": False, "max_window_layers": 3}
    published |= {"tie_word_embeddings": False, "mask_token_id": MASK, "use_mrope": False}
    (tmp_path / "config.json").write_text(json.dumps({**sizes, **published}))
    loaded = dllm_fast.from_pretrained(tmp_path)
    options = {"gen_length": 8, "block_length": 4, "schedule": Threshold(0.3), "cache": "none"}
    expected = dllm_fast.generate(dllm_fast.patch(model), ids, **options).sequences
    assert torch.equal(dllm_fast.generate(loaded, ids, **options).sequences, expected)
    loaded.save_pretrained(tmp_path / "again")
    again = dllm_fast.from_pretrained(tmp_path / "again")
    assert torch.equal(dllm_fast.generate(again, ids, **options).sequences, expected)
    with pytest.raises(ValueError, match=r"weights='fp8': the model runs its own forward"):
        dllm_fast.from_pretrained(tmp_path, weights="fp8")


@pytest.mark.parametrize(("kind", "name"), [("llama", "llama"), ("qwen2", "qwen2-shifted"), ("qwen3", "qwen3")])
def test_an_a2d_model_is_loaded_without_its_code(kind, name, tmp_path, ids):
    """Of ZHZisZZ/dllm: the modules of a causal model, whose window, if it had one, plays no part."""
    model = make(name)
    model.config.shifted = False
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields = {key: value for key, value in fields.items() if key not in ("is_causal", "shifted")}
    fields |= {"model_type": f"a2d-{kind}", "architectures": [f"A2D{kind.title()}LMHeadModel"]}
    if kind != "llama":
        windows = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0}
        fields |= {**windows, "layer_types": ["sliding_attention"] * model.config.num_hidden_layers}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    options = {"gen_length": 8, "block_length": 4, "schedule": Threshold(0.3), "mask_id": MASK}
    expected = dllm_fast.generate(dllm_fast.patch(model), ids, **options).sequences
    loaded = dllm_fast.from_pretrained(tmp_path)
    assert type(loaded) is type(model) and loaded.config.is_causal is False
    assert torch.equal(dllm_fast.generate(loaded, ids, **options).sequences, expected)


def test_a_folder_of_a_causal_model_is_refused(tmp_path):
    make("llama", bidirectional=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="it attends causally"):
        dllm_fast.from_pretrained(tmp_path)


def refused(model, message: str) -> None:
    """`patch` refuses the model, and leaves it alone."""
    before, attention = set(model.__dict__), model.config._attn_implementation
    with pytest.raises(ValueError, match=re.escape(message)):
        dllm_fast.patch(model)
    assert (set(model.__dict__), model.config._attn_implementation) == (before, attention)


def test_what_attends_causally_is_refused():
    refused(make("llama", bidirectional=False), "model_type 'llama' is not supported: it attends causally. If it was")


def test_encoders_with_decoders_are_refused():
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=VOCAB)
    model = transformers.T5ForConditionalGeneration(config)
    refused(model, "model_type 't5' is not supported: it is an encoder with")
    with pytest.raises(ValueError, match=r"Supported are llada, .*, a DiffusionGemmaForBlockDiffusion, a Dream"):
        dllm_fast.patch(model)


def test_attention_with_a_softcap_is_refused():
    config = transformers.Gemma2Config(**{**GROUPED, "head_dim": 16})
    model = transformers.Gemma2ForCausalLM(config).eval()
    model.config.is_causal = False
    refused(model, "is not supported: the kernels do not serve attention with softcap")


def test_logits_that_are_not_its_heads_are_refused():
    model = make("qwen3")
    forward = type(model).forward

    def doubled(*args, **kwargs):
        out = forward(model, *args, **kwargs)
        out.logits = 2 * out.logits
        return out

    model.forward = doubled
    doubled.__signature__ = inspect.signature(forward)
    refused(model, "is not supported: its logits before its head differ from its own by 5.0e-01 of the largest")


def test_a_forward_that_wants_another_mask_is_refused():
    """Doge's adds to the mask, as a tensor."""
    model = transformers.DogeForCausalLM(transformers.DogeConfig(**GROUPED))
    model.config.is_causal = False
    refused(
        model,
        "model: a DogeForCausalLM of model_type 'doge' is not supported: a trial of 8 tokens raises AttributeError: "
        "'Ranges' object has no attribute 'dtype'. Supported are models of transformers 5",
    )
    assert model.training


def test_layers_that_remember_the_past_are_refused():
    class Summed(torch.nn.Module):
        def forward(self, x):
            return x + x.cumsum(1)

    model = make("eurobert")
    model.model.norm = torch.nn.Sequential(model.model.norm, Summed())
    refused(model, "is not supported: its logits against a cache differ from its own by")


def test_options_that_do_not_fit_are_refused(ids):
    model = dllm_fast.patch(make("qwen2-shifted"))
    options = {"gen_length": 16, "block_length": 8}
    for given, message in (
        ({"skip_committed": True}, "skip_committed=True: the model predicts a token from the position before it"),
        ({"refresh": dllm_fast.Drift(0.1)}, "refresh=Drift(tau=0.1): the model runs its own forward"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            dllm_fast.generate(model, ids, **options, **given)
    with pytest.raises(ValueError, match="weights='int4': the model runs its own forward"):
        dllm_fast.patch(model, weights="int4")
    model.train()
    with pytest.raises(ValueError, match=re.escape("model: it is in training mode, with dropout; call model.eval()")):
        dllm_fast.generate(model, ids, **options)
    model.eval().lm_head.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="model: lm_head has a forward hook"):
        dllm_fast.generate(model, ids, **options)


def test_without_a_head_or_a_patch_nothing_is_generated(ids):
    classifier = dllm_fast.patch(make_more("modernbert-classifier"))
    with pytest.raises(ValueError, match="a ModernBertForSequenceClassification has no LM head, and generates nothing"):
        dllm_fast.generate(classifier, ids, gen_length=8, block_length=8, mask_id=MASK)
    with pytest.raises(ValueError, match="this BertForMaskedLM is not patched"):
        dllm_fast.generate(make("bert"), ids, gen_length=8, block_length=8, mask_id=MASK)


def test_patched_again_copied_and_restored(ids):
    model = make("bert").train()
    model.set_attn_implementation("eager")
    dllm_fast.patch(model, impl="torch")
    dllm_fast.patch(model, head=None)
    assert model.training and model.config._attn_implementation == "dllm_fast"
    options = {"gen_length": 8, "block_length": 8, "mask_id": MASK, "schedule": Threshold(0.3)}
    expected = dllm_fast.generate(model.eval(), ids, **options).sequences
    twin = copy.deepcopy(model)
    dllm_fast.unpatch(model)
    assert model.config._attn_implementation == "eager" and "forward" not in model.__dict__
    assert torch.equal(dllm_fast.generate(twin, ids, **options).sequences, expected)
    assert dllm_fast.unpatch(twin).config._attn_implementation == "eager"


def test_positions_whose_angles_depend_on_the_length_of_a_call_are_refused():
    """Phi-3's, from `original_max_position_embeddings` on; up to there it has the tokens of a plain loop."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 6, "long_factor": [4.0] * 6}
    fields = {**GROUPED, "original_max_position_embeddings": 20, "max_position_embeddings": 80}
    torch.manual_seed(SEED)
    model = transformers.Phi3ForCausalLM(transformers.Phi3Config(**fields, rope_parameters=rope)).eval()
    model.config.is_causal = False
    ids = torch.randint(0, EOS, (1, 4), generator=torch.Generator().manual_seed(0))
    options = {"block_length": 8, "mask_id": MASK, "schedule": Threshold(0.2)}
    expected = dllm_fast.generate_plain(model, ids, gen_length=16, **options).sequences
    dllm_fast.patch(model)
    assert torch.equal(dllm_fast.generate(model, ids, gen_length=16, cache="none", **options).sequences, expected)
    with pytest.raises(ValueError, match="exceed the model's 20 positions"):
        dllm_fast.generate(model, ids, gen_length=24, **options)


class Asked:
    """A lock that tells of being asked for, except in one thread."""

    def __init__(self, lock, thread: threading.Thread):
        self.lock, self.thread, self.event = lock, thread, threading.Event()

    def __enter__(self):
        if threading.current_thread() is not self.thread:
            self.event.set()
        return self.lock.__enter__()

    def __exit__(self, *error):
        return self.lock.__exit__(*error)


def test_other_threads_call_the_model_and_generate_meanwhile(ids):
    model = dllm_fast.patch(make("bert"), impl="torch")
    options = {"gen_length": 8, "block_length": 8, "mask_id": MASK, "schedule": Threshold(0.3)}
    inside, go_on = threading.Event(), threading.Event()
    sequences = {}

    def generate(name: str) -> None:
        sequences[name] = dllm_fast.generate(model, ids, **options).sequences

    with torch.no_grad():
        expected = model(ids).logits
    generate("alone")
    first, second = (threading.Thread(target=generate, args=(name,)) for name in ("first", "second"))

    def pause(*args) -> None:
        if threading.current_thread() is first:
            inside.set()
            assert go_on.wait(60)

    pool = bound_pool(model)
    lock = pool.lock = Asked(pool.lock, first)
    model.bert.encoder.layer[0].register_forward_pre_hook(pause)
    first.start()
    assert inside.wait(60)
    try:
        with torch.no_grad():
            assert torch.equal(model(ids).logits, expected)
        second.start()
        assert lock.event.wait(60)
    finally:
        go_on.set()
    first.join()
    second.join()
    assert all(torch.equal(sequences[name], sequences["alone"]) for name in ("first", "second"))


def test_models_own_generate(ids):
    model = dllm_fast.patch(make("qwen3"))
    out = model.generate(ids, max_new_tokens=8, block_length=8, eos_token_id=None)
    expected = dllm_fast.generate(model, ids, gen_length=8, block_length=8)
    assert out.sequences.shape == expected.sequences.shape
