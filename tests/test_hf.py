"""transformers' interfaces: `model.generate`, pipelines, `custom_generate`, generation configs."""

import copy
import functools
import pickle
from pathlib import Path

import pytest
import torch
import transformers
from tiny import EOS, MASK, VOCAB, make_llada, make_modernbert
from transformers import AutoTokenizer, GenerationConfig, GenerationMixin, ModernBertForMaskedLM, pipeline

import dllm_fast
from dllm_fast import DiffusionGenerationConfig, DiffusionOutput, Threshold, Uniform

HUB = str(Path(dllm_fast.__file__).parent / "hub")
FREE = {"eos_token_id": None}  # write every position
FIVE = int(transformers.__version__.split(".")[0]) >= 5


def plain(model, ids, **options):
    """`dllm_fast.generate`'s sequences."""
    with dllm_fast.patched(model):
        return dllm_fast.generate(model, ids, **{"gen_length": 8, "block_length": 8, **options}).sequences


# The right tokens, patched and not


@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 2}, {"weight_tying": True}], ids=["llada", "gqa", "tied"])
def test_the_native_class_generates_by_diffusion_patched_or_not(changes, ids, padded):
    model = make_llada(**changes)
    weights = [(p.data_ptr(), p.clone()) for p in model.parameters()]
    for mask in (None, padded):
        expected = plain(model, ids, attention_mask=mask, schedule=Uniform(4))
        call = functools.partial(model.generate, ids, attention_mask=mask, max_new_tokens=8, schedule=Uniform(4))
        assert torch.equal(call(**FREE).sequences, expected)
        with dllm_fast.patched(model):
            assert torch.equal(call(**FREE).sequences, expected)
        assert torch.equal(call(**FREE).sequences, expected)
    assert "_dllm_fast" not in model.__dict__ and "forward" not in model.__dict__
    assert all(torch.equal(p, was) for p, (_, was) in zip(model.parameters(), weights))


def test_calling_an_unpatched_model_moves_no_weight(llada, ids):
    before = {name: p.data_ptr() for name, p in llada.named_parameters()}
    llada.to(torch.bfloat16).generate(ids, max_new_tokens=8)  # in bf16, weights are fused on a CPU too
    before = {name: p.data_ptr() for name, p in llada.named_parameters()}
    llada.generate(ids, max_new_tokens=8)
    assert before == {name: p.data_ptr() for name, p in llada.named_parameters()}


def test_a_model_of_any_class_generates_while_it_is_patched(modernbert, ids):
    before = dict(modernbert.__dict__)
    expected = plain(modernbert, ids)
    assert not hasattr(modernbert, "generate")
    dllm_fast.patch(modernbert)
    assert modernbert.can_generate()
    assert torch.equal(modernbert.generate(ids, max_new_tokens=8, **FREE).sequences, expected)
    modernbert.generation_config.block_length = 4
    dllm_fast.patch(modernbert, impl="torch")
    assert modernbert.generation_config.block_length == 4
    blocks = plain(modernbert, ids, block_length=4)
    assert torch.equal(modernbert.generate(ids, max_new_tokens=8, **FREE).sequences, blocks)
    copied, loaded = copy.deepcopy(modernbert), pickle.loads(pickle.dumps(modernbert))
    dllm_fast.unpatch(modernbert)
    assert not hasattr(modernbert, "generate") and not modernbert.can_generate()
    assert modernbert.__dict__.keys() == before.keys()
    assert copied.generation_config.block_length == 4 and not hasattr(loaded, "generate")
    dllm_fast.patch(loaded).generation_config.block_length = 4
    for other in (copied, loaded):
        other.decoder.bias.data += 3 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(3))
        changed = plain(other, ids, block_length=4)
        assert not torch.equal(changed, blocks)
        assert torch.equal(other.generate(ids, max_new_tokens=8, **FREE).sequences, changed)


def test_what_stood_on_the_instance_comes_back(modernbert):
    own, config = (lambda *a: "own"), GenerationConfig(max_new_tokens=3)
    modernbert.generate, modernbert.generation_config = own, config
    dllm_fast.patch(modernbert)
    assert modernbert.generate is not own and modernbert.generation_config.max_new_tokens == 3
    modernbert.generation_config.seed = 5
    copied = copy.deepcopy(modernbert)
    assert copied.generation_config.seed == 5 and copied.generation_config is not modernbert.generation_config
    dllm_fast.unpatch(modernbert)
    assert modernbert.generate is own and modernbert.generation_config is config


def prompts_that_end_early(model, mask, options):
    """(prompts [3, 24], four [MASK]s in the middle one; end-of-text ids). Row 0 ends in its answer's first block, row 1
    never ends, and has two more blocks to fill."""
    for draw in range(40):
        ids = torch.randint(0, EOS, (3, 24), generator=torch.Generator().manual_seed(draw))
        ids[1, 10:14] = MASK
        free = model.generate(ids, attention_mask=mask, **options, **FREE)
        assert isinstance(free, DiffusionOutput) and free.sequences.shape == (3, 40)
        lasting = free.sequences[1, 10:].tolist()
        ends = [t for t in free.sequences[[0, 2], 24:].flatten().tolist() if t not in lasting]
        if set(ends) & set(free.sequences[0, 24:32].tolist()):
            return ids, ends
    raise AssertionError("row 1 writes what row 0 writes, whatever the prompts")


def test_the_output_counts_each_row(llada, padded):
    """A row's NFE and tokens: those for its [MASK]s and for its text up to the end; or only sequences, on request."""
    dllm_fast.patch(llada)
    options = {"max_new_tokens": 16, "block_length": 8, "cache": "none", "schedule": Threshold(0.05)}
    gaps, options["eos_token_id"] = prompts_that_end_early(llada, padded, options)
    out = llada.generate(gaps, attention_mask=padded, pad_token_id=5, **options)
    for row in range(3):
        mine = slice(row, row + 1)
        alone = llada.generate(gaps[mine], attention_mask=padded[mine], pad_token_id=5, **options)
        assert torch.equal(alone.sequences, out.sequences[mine])
        assert int(alone.nfe) <= int(out.nfe[row])
        written = [*out.sequences[row, 10:14].tolist()] * (row == 1) + out.sequences[row, 24:].tolist()
        ends = [at for at, token in enumerate(written) if token in options["eos_token_id"]]
        filled = ends[0] + 1 if ends else len(written)
        assert written[filled:] == [5] * (len(written) - filled)
        assert float(out.tokens_per_forward[row]) == pytest.approx(filled / int(out.nfe[row]))
    free = llada.generate(gaps, attention_mask=padded, **{**options, "eos_token_id": None})
    assert out.nfe[0] < free.nfe[0]  # it ends in the first of two blocks
    alone = llada.generate(gaps, attention_mask=padded, pad_token_id=5, **options, return_dict_in_generate=False)
    assert torch.equal(alone, out.sequences)


# Lengths


@pytest.mark.parametrize("new,block", [(1, 8), (13, 8), (8, 8), (17, None), (40, None), (5, 32)])
def test_any_number_of_tokens(either, ids, new, block):
    """The last block may be shorter, with the result of `dllm_fast.generate` for so many [MASK]s in the prompt."""
    dllm_fast.patch(either)
    open_ = torch.cat((ids, ids.new_full((3, new), MASK)), 1)
    expected = plain(either, open_, gen_length=0, block_length=block or min(32, new), cache="none")
    options = {"cache": "none", **FREE, **({"block_length": block} if block else {})}
    for length in ({"max_new_tokens": new}, {"max_length": 24 + new}, {"gen_length": new}):
        assert torch.equal(either.generate(ids, **length, **options).sequences, expected)
    both = either.generate(ids, max_new_tokens=new, max_length=24 + new, **options).sequences
    assert torch.equal(both, expected)


def test_a_prompts_masks_alone(llada, ids):
    gaps = ids.clone()
    gaps[:, 3:7] = MASK
    expected = plain(llada, gaps, gen_length=0, block_length=32)
    assert torch.equal(llada.generate(gaps, max_length=24, **FREE).sequences, expected)
    assert torch.equal(llada.generate(gaps, gen_length=0, **FREE).sequences, expected)


def test_lengths_that_do_not_agree_are_named(llada, ids):
    for lengths, message in (
        ({"max_new_tokens": 8, "max_length": 41}, "max_new_tokens=8 and max_length=41 after 24 do not agree"),
        ({"max_new_tokens": 8, "gen_length": 9}, "max_new_tokens=8 and 9: two values"),
        ({"max_length": 23}, "max_length=23 is not a whole number from 24 up"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1 is not a whole number from 0 up"),
        ({"max_new_tokens": 8.0}, "max_new_tokens=8.0 is not a whole number"),
        ({"max_new_tokens": 500}, "a prompt of 24 and gen_length=500 exceed the model's 512"),
        ({"max_length": 24}, r"gen_length=0 and no \[MASK\]"),
    ):
        with pytest.raises(ValueError, match=message):
            llada.generate(ids, **lengths)


def test_keywords_come_before_the_config_and_that_before_the_models_own(llada, ids):
    llada.generation_config = DiffusionGenerationConfig(max_new_tokens=4, eos_token_id=EOS)
    given = GenerationConfig(max_length=30)
    assert llada.generate(ids).sequences.shape == (3, 28)
    assert llada.generate(ids, generation_config=given).sequences.shape == (3, 30)
    assert llada.generate(ids, generation_config=given, max_new_tokens=9).sequences.shape == (3, 33)
    assert given.max_new_tokens is None and llada.generation_config.max_new_tokens == 4


# Pipelines and streamers


@pytest.fixture(scope="module")
def shipped():
    def load(name):
        tokenizer = AutoTokenizer.from_pretrained(dllm_fast.model_path(name))
        return dllm_fast.from_pretrained(name, dtype=torch.float32), tokenizer

    return {name: load(name) for name in ("llada-gsm8k", "modernbert-kjv")}


PROMPTS = {"llada-gsm8k": ["Tom has 3 apples.", "Maria buys"], "modernbert-kjv": ["And the LORD said", "In the"]}


@pytest.mark.parametrize("name,patched", [("llada-gsm8k", True), ("llada-gsm8k", False), ("modernbert-kjv", True)])
def test_the_pipeline_writes_by_diffusion(name, patched, shipped):
    model, tokenizer = shipped[name]
    texts, eos = PROMPTS[name], model.generation_config.eos_token_id
    expected = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        out = dllm_fast.generate(model, ids, gen_length=16, block_length=16, eos_id=eos)
        expected.append(text + tokenizer.decode(out.sequences[0, ids.shape[1] :], skip_special_tokens=True))
    if not patched:
        model = copy.deepcopy(model)
        dllm_fast.unpatch(model)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    assert "TextGenerationPipeline" in repr(pipe)
    # Without do_sample, transformers 5.24 samples at the pipeline's own temperature of 0.7.
    greedy = {"max_new_tokens": 16, "do_sample": False, "clean_up_tokenization_spaces": False}
    assert pipe(texts[0], **greedy) == [{"generated_text": expected[0]}]
    batch = pipe(texts, batch_size=2, **greedy)
    assert batch == [[{"generated_text": text}] for text in expected]
    length = len(tokenizer(texts[0])["input_ids"])
    (whole,) = pipe(texts[0], max_length=length + 9, return_tensors=True)
    assert len(whole["generated_token_ids"]) == length + 9
    several = pipe(texts[0], max_new_tokens=16, num_return_sequences=3, do_sample=True)
    assert len({one["generated_text"] for one in several}) > 1
    (likely,) = pipe(texts[0], max_new_tokens=16, do_sample=True, top_k=1, clean_up_tokenization_spaces=False)
    assert likely["generated_text"] == expected[0]
    with pytest.raises(ValueError, match=r"min_p=0\.1"):
        pipe(texts[0], max_new_tokens=16, min_p=0.1)


@pytest.mark.parametrize("kind", ["TextStreamer", "TextDiffusionStreamer"])
def test_transformers_streamers(kind, shipped, capsys):
    if not hasattr(transformers, kind):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    model, tokenizer = shipped["llada-gsm8k"]
    ids = tokenizer("Tom has 3 apples.", return_tensors="pt")
    streamer = getattr(transformers, kind)(tokenizer, skip_prompt=True)
    out = model.generate(**ids, max_new_tokens=16, streamer=streamer, **FREE)
    printed = capsys.readouterr().out
    text = tokenizer.decode(out.sequences[0, ids["input_ids"].shape[1] :])
    assert printed.endswith(text + "\n") if kind == "TextDiffusionStreamer" else printed == text + "\n"
    assert (printed.count("\033[33m") > 1) == (kind == "TextDiffusionStreamer")


def test_what_a_tokenizer_returns_goes_in_as_it_is(shipped):
    """transformers 4.57's tokenizers also return token_type_ids."""
    for name, (model, tokenizer) in shipped.items():
        tokenizer.padding_side = "left"
        inputs = dict(tokenizer(PROMPTS[name], padding=True, return_tensors="pt"))
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        out = dllm_fast.generate(model, **inputs, gen_length=8, block_length=8)
        assert torch.equal(out.sequences, model.generate(**inputs, max_new_tokens=8, **FREE).sequences)
        call = model.generate(**inputs, max_new_tokens=8, custom_generate=dllm_fast.custom_generate, **FREE)
        assert torch.equal(out.sequences, call)
        inputs["token_type_ids"][0, 0] = 1
        with pytest.raises(ValueError, match="token_type_ids: has values other than 0"):
            dllm_fast.generate(model, **inputs, gen_length=8, block_length=8)


# custom_generate


def test_custom_generate_returns_what_it_is_told_to(llada, ids):
    expected = plain(llada, ids)
    call = functools.partial(llada.generate, ids, max_new_tokens=8, **FREE)
    assert torch.equal(call(custom_generate=dllm_fast.custom_generate), expected)
    out = call(custom_generate=dllm_fast.custom_generate, return_dict_in_generate=True)
    assert torch.equal(out.sequences, expected) and out.nfe.shape == (3,)
    seen = []
    bound = functools.partial(dllm_fast.custom_generate, schedule=Uniform(4))
    assert torch.equal(call(custom_generate=bound), plain(llada, ids, schedule=Uniform(4)))
    other = functools.partial(lambda *a, **k: seen.append(k))
    with pytest.raises(ValueError, match="custom_generate="):
        call(custom_generate=other)
    assert not seen


class Causal(ModernBertForMaskedLM, GenerationMixin):
    """Like remote code loaded by transformers' auto classes: its class has transformers' left-to-right generate."""

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        return {"input_ids": input_ids, "attention_mask": attention_mask}


@pytest.fixture
def causal():
    like = make_modernbert()
    model = Causal(like.config).eval()
    model.load_state_dict(like.state_dict())
    return model


def test_transformers_own_generate_calls_custom_generate(causal, ids, padded):
    """A model with transformers' generate: unpatched, patched, with ours bypassed, and with someone else's loop."""
    expected = plain(causal, ids, attention_mask=padded)
    ends, pad = int(expected[0, 24]), int(expected[0, 25]) ^ 1  # at its end the answer changes
    causal.generation_config.eos_token_id, causal.generation_config.pad_token_id = ends, pad
    call = functools.partial(causal.generate, ids, attention_mask=padded, max_new_tokens=8)
    ended = plain(causal, ids, attention_mask=padded, eos_id=ends, pad_id=pad)
    assert not torch.equal(ended, expected)
    assert torch.equal(call(custom_generate=dllm_fast.custom_generate), ended)
    call = functools.partial(call, eos_token_id=None)
    assert torch.equal(call(custom_generate=dllm_fast.custom_generate), expected)
    with pytest.raises(ValueError, match=r"min_p=0\.5"):
        call(custom_generate=dllm_fast.custom_generate, min_p=0.5)
    drawn = {"temperature": 0.7, "top_p": 0.6, "seed": 3}
    sampled = plain(causal, ids, attention_mask=padded, top_k=50, **drawn)
    assert torch.equal(call(custom_generate=dllm_fast.custom_generate, do_sample=True, top_k=50, **drawn), sampled)
    sampled = plain(causal, ids, attention_mask=padded, **drawn)  # transformers' default of 50 is nobody's wish
    assert torch.equal(call(custom_generate=dllm_fast.custom_generate, do_sample=True, **drawn), sampled)
    dllm_fast.patch(causal)
    assert torch.equal(causal.generate(ids, attention_mask=padded, max_new_tokens=8, **FREE).sequences, expected)
    around = GenerationMixin.generate(
        causal, ids, attention_mask=padded, max_new_tokens=8, eos_token_id=None,
        custom_generate=dllm_fast.custom_generate,
    )  # fmt: skip
    assert torch.equal(around, expected)
    loop = lambda model, input_ids, **kwargs: (model, input_ids)  # noqa: E731
    assert causal.generate(ids, max_new_tokens=8, custom_generate=loop)[0] is causal
    pipe_config = causal.generation_config
    dllm_fast.unpatch(causal)
    assert causal.generation_config is not pipe_config and "generate" not in causal.__dict__


class Counter:
    """A streamer."""

    tokens = ended = 0

    def put(self, value):
        self.tokens += value.numel()

    def end(self):
        self.ended += 1


def test_the_folder_is_loaded_as_transformers_does(llada, causal, ids, padded, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    for model in (llada, causal):
        options = {"attention_mask": padded, "max_new_tokens": 8, "eos_token_id": None}
        call = functools.partial(model.generate, custom_generate=HUB, trust_remote_code=True, **options)
        expected = plain(model, ids, attention_mask=padded)
        assert torch.equal(call(ids), expected) and torch.equal(call(input_ids=ids), expected)
        assert call(ids, return_dict_in_generate=True).nfe.shape == (3,)
        seen = Counter()
        row = {**options, "attention_mask": padded[:1]}
        model.generate(ids[:1], custom_generate=HUB, trust_remote_code=True, streamer=seen, **row)
        assert seen.ended == 1 and seen.tokens == 32
        with pytest.raises(ValueError, match=r"min_p=0\.1"):
            call(ids, min_p=0.1)
