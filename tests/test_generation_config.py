"""A generation config's fields are honoured or refused by name, and the config survives its file."""

import copy
import functools
import json

import pytest
import torch
import transformers
from tiny import EOS, MASK, VOCAB, make_llada
from transformers import GenerationConfig, TextStreamer

import dllm_fast
from dllm_fast import D2F, DiffusionGenerationConfig, ReMDM, Uniform, Window
from dllm_fast.generation_config import FIELDS, HONOURED, NEUTRAL, NO_PART

FREE = {"eos_token_id": None}  # write every position
FIVE = int(transformers.__version__.split(".")[0]) >= 5


def plain(model, ids, **options):
    """`dllm_fast.generate`'s sequences."""
    with dllm_fast.patched(model):
        return dllm_fast.generate(model, ids, **{"gen_length": 8, "block_length": 8, **options}).sequences


ASKED = {  # for refused fields, a value that users may give
    "min_p": 0.1, "top_h": 0.4, "typical_p": 0.9, "epsilon_cutoff": 3e-4, "eta_cutoff": 3e-4,
    "repetition_penalty": 1.2, "encoder_repetition_penalty": 1.2, "length_penalty": 2.0, "no_repeat_ngram_size": 2,
    "bad_words_ids": [[3]], "begin_suppress_tokens": [3], "forced_bos_token_id": 3, "forced_eos_token_id": 3,
    "min_new_tokens": 4, "min_length": 30, "num_beams": 2, "output_scores": True, "output_logits": True,
    "output_attentions": True, "output_hidden_states": True, "stop_strings": ["a"], "cache_implementation": "static",
    "guidance_scale": 1.5, "max_time": 1.0, "exponential_decay_length_penalty": (3, 1.1), "sequence_bias": [[[3], 1.0]],
    "token_healing": True, "penalty_alpha": 0.6, "prompt_lookup_num_tokens": 3, "remove_invalid_values": True,
    "diversity_penalty": 0.5, "num_beam_groups": 2, "early_stopping": True, "watermarking_config": {"bias": 2.0},
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(FIELDS | set(HONOURED)))
def test_no_field_is_dropped(name, llada, ids):
    """With any version of transformers, a field is honoured (below), irrelevant, or refused by name."""
    free = llada.generate(ids, max_new_tokens=8).sequences
    if name in HONOURED:
        assert any(name in asked for asked, _ in HONOURED_CASES)
        return
    value = ASKED.get(name, "asked")
    config = GenerationConfig()
    setattr(config, name, value)  # a constructor might refuse it first
    if name in NO_PART:
        assert torch.equal(llada.generate(ids, generation_config=config, max_new_tokens=8).sequences, free)
        return
    calls = (
        functools.partial(llada.generate, ids, max_new_tokens=8),
        functools.partial(llada.generate, ids, max_new_tokens=8, custom_generate=dllm_fast.custom_generate),
        functools.partial(dllm_fast.custom_generate, llada, ids, max_new_tokens=8),
    )
    for call in calls:
        for arguments in ({name: value}, {"generation_config": config}):
            with pytest.raises(ValueError, match=f"{name}="):
                call(**arguments)
    llada.generation_config = config  # as from a hub's file
    with pytest.raises(ValueError, match=f"generation_config: {name}="):
        llada.generate(ids, max_new_tokens=8)


def test_fields_that_ask_for_nothing_are_no_hindrance(llada, ids):
    free = llada.generate(ids, max_new_tokens=8).sequences
    for name, value in NEUTRAL.items():
        if name in HONOURED:
            continue
        config = GenerationConfig()
        setattr(config, name, value)
        assert torch.equal(llada.generate(ids, generation_config=config, max_new_tokens=8).sequences, free), name


def test_arguments_that_cannot_be_honoured_are_named(llada, ids):
    processor = transformers.LogitsProcessorList([transformers.TopKLogitsWarper(5)])
    criteria = transformers.StoppingCriteriaList([transformers.MaxLengthCriteria(30)])
    asks_logits = TextStreamer(None)
    asks_logits._takes_logits = True
    for arguments, message in (
        ({"logits_processor": processor}, "logits_processor: TopKLogitsWarper"),
        ({"stopping_criteria": criteria}, "stopping_criteria: MaxLengthCriteria"),
        ({"assistant_model": llada}, "assistant_model="),
        ({"prefix_allowed_tokens_fn": print}, "prefix_allowed_tokens_fn="),
        ({"negative_prompt_ids": ids}, "negative_prompt_ids"),
        ({"past_key_values": object()}, "past_key_values="),
        ({"inputs_embeds": torch.zeros(3, 24, 64)}, "inputs_embeds"),
        ({"position_ids": torch.arange(24)[None]}, "position_ids"),
        ({"synced_gpus": True}, "synced_gpus=True"),
        ({"max_new_token": 8}, "max_new_token=8"),
        ({"token_type_ids": torch.ones_like(ids)}, "token_type_ids: has values other than 0"),
        ({"input_ids": ids}, "inputs and input_ids: both"),
        ({"streamer": asks_logits}, "streamer: asks for logits"),
        ({"eos_token_id": VOCAB}, "eos_token_id=101 is not an id"),
        ({"eos_token_id": [3, MASK]}, "the mask id, 100, ends no text"),
        ({"pad_token_id": VOCAB}, "pad_token_id=101 is not an id"),
        ({"num_return_sequences": 0}, "num_return_sequences=0 is not a positive"),
        ({"use_cache": False, "cache": "dual"}, "use_cache=False and cache='dual'"),
        ({"schedule": "uniform=0"}, "schedule: 'uniform=0': Uniform: steps=0"),
        ({"custom_generate": print}, "custom_generate=<built-in function print>"),
    ):
        with pytest.raises(ValueError, match=message):
            llada.generate(ids, **arguments)
    with pytest.raises(ValueError, match="input_ids: None is an empty prompt"):
        llada.generate(max_new_tokens=8)
    empty = {"logits_processor": transformers.LogitsProcessorList(), "stopping_criteria": [], "synced_gpus": False}
    zeros = torch.zeros_like(ids)
    out = llada.generate(ids, max_new_tokens=8, assistant_model=None, token_type_ids=zeros, **empty)
    assert torch.equal(out.sequences, llada.generate(ids, max_new_tokens=8).sequences)


SAMPLED = {"temperature": 0.7, "seed": 3}
HONOURED_CASES = [  # fields, and the same as `dllm_fast.generate`'s arguments
    ({"max_new_tokens": 16}, {"gen_length": 16, "block_length": 16}),
    ({"max_length": 40}, {"gen_length": 16, "block_length": 16}),
    ({"eos_token_id": [3, EOS]}, {"eos_id": [3, EOS]}),
    ({"eos_token_id": (3,), "pad_token_id": 4}, {"eos_id": 3, "pad_id": 4}),
    ({"suppress_tokens": list(range(0, 80))}, {"suppress_tokens": list(range(0, 80))}),
    ({"defer_tokens": list(range(0, 80))}, {"defer_tokens": list(range(0, 80))}),
    ({"do_sample": True, **SAMPLED}, SAMPLED),
    ({"do_sample": True, "seed": 3}, {"temperature": 1.0, "seed": 3}),
    ({"do_sample": False, **SAMPLED, "top_k": 3, "top_p": 0.5}, {}),
    ({"do_sample": True, **SAMPLED, "top_k": 3}, {"top_k": 3, **SAMPLED}),
    ({"do_sample": True, **SAMPLED, "top_k": 0, "top_p": 0.2}, {"top_p": 0.2, **SAMPLED}),
    ({"block_length": 4}, {"block_length": 4}),
    ({"schedule": Uniform(2)}, {"schedule": Uniform(2)}),
    ({"schedule": "uniform=2", "cache": "none"}, {"schedule": Uniform(2), "cache": "none"}),
    ({"confidence": "entropy", "schedule": "uniform=4"}, {"confidence": "entropy", "schedule": Uniform(4)}),
    ({"cfg_scale": 1.5}, {"cfg_scale": 1.5}),
    ({"use_cache": False, "block_length": 4}, {"cache": "none", "block_length": 4}),
    ({"cache": "prefix", "refresh": "window=4,0", "block_length": 4},
     {"cache": "prefix", "refresh": Window(4, 0), "block_length": 4}),
    ({"pipeline": "d2f=0.5,0.5", "block_length": 4}, {"pipeline": D2F(0.5, 0.5), "block_length": 4}),
    ({"remask": "remdm=0.5", "schedule": Uniform(4)}, {"remask": ReMDM(0.5), "schedule": Uniform(4)}),
    ({"skip_committed": True, "schedule": Uniform(4)}, {"skip_committed": True, "schedule": Uniform(4)}),
    ({"suffix_length": 2, "block_length": 4}, {"suffix_length": 2, "block_length": 4}),
    ({"speculate": 2}, {"speculate": 2}),
    *[(given, given) for given in [{"suffix_length": 0, "suffix_sample": 2, "block_length": 4, "seed": 3}]],
    ({"cache_dtype": "e4m3", "schedule": Uniform(4)}, {"cache_dtype": "e4m3", "schedule": Uniform(4)}),
    ({"mask_id": 7, "suppress_tokens": [MASK]}, {"mask_id": 7, "suppress_tokens": [MASK]}),
    ({"num_return_sequences": 1}, {}),
    ({"return_dict_in_generate": True}, {}),
]  # fmt: skip


@pytest.mark.parametrize("asked,options", HONOURED_CASES, ids=lambda case: "-".join(case))
def test_fields_are_honoured(asked, options, llada, ids):
    """As keywords, in our config, in transformers', in the model's own, and through `custom_generate`."""
    lengths = {} if {"max_new_tokens", "max_length"} & asked.keys() else {"max_new_tokens": 8}
    llada.generation_config = DiffusionGenerationConfig()
    expected = plain(llada, ids, **options)
    assert torch.equal(llada.generate(ids, **lengths, **asked).sequences, expected)
    call = functools.partial(llada.generate, ids, custom_generate=dllm_fast.custom_generate)
    got = call(**lengths, **asked)
    assert torch.equal(got.sequences if asked.get("return_dict_in_generate") else got, expected)
    config = DiffusionGenerationConfig(**lengths, **asked)
    assert torch.equal(llada.generate(ids, generation_config=config).sequences, expected)
    assert torch.equal(llada.generate(ids, generation_config=GenerationConfig(**lengths, **asked)).sequences, expected)
    llada.generation_config = config
    assert torch.equal(llada.generate(ids).sequences, expected)


def test_a_temperature_alone_asks_for_sampling(llada, ids):
    expected, greedy = plain(llada, ids, **SAMPLED), plain(llada, ids)
    assert not torch.equal(expected, greedy)
    base = {"max_new_tokens": 8, **FREE}
    call = lambda **asked: llada.generate(ids, **base, **asked).sequences  # noqa: E731
    assert torch.equal(call(**SAMPLED), expected)
    assert torch.equal(call(generation_config=DiffusionGenerationConfig(**SAMPLED)), expected)
    # transformers 4.57 says of its own config that do_sample is False, and warns that the temperature is ignored.
    assert torch.equal(call(generation_config=GenerationConfig(**SAMPLED)), expected if FIVE else greedy)
    assert torch.equal(call(generation_config=DiffusionGenerationConfig(**SAMPLED), do_sample=False), greedy)
    assert torch.equal(call(temperature=0, generation_config=DiffusionGenerationConfig(**SAMPLED)), greedy)


def test_several_answers_to_each_prompt_are_rows_of_their_own(llada, ids, padded):
    options = {"temperature": 1.0, "seed": 1}
    out = llada.generate(ids, attention_mask=padded, max_new_tokens=8, num_return_sequences=2, **options, **FREE)
    rows = ids.repeat_interleave(2, 0), padded.repeat_interleave(2, 0)
    assert torch.equal(out.sequences, plain(llada, rows[0], attention_mask=rows[1], **options))
    assert out.nfe.shape == (6,) and not torch.equal(out.sequences[0], out.sequences[1])


def test_defaults_of_a_models_config_outside_its_vocabulary_are_no_hindrance(ids):
    """LLaDA-8B's default ids in a smaller model's config are ignored; ids that were chosen raise."""
    model = make_llada(eos_token_id=126081, pad_token_id=126081)
    assert torch.equal(model.generate(ids, max_new_tokens=8).sequences, plain(model, ids))
    with pytest.raises(ValueError, match="eos_token_id=126082 is not an id"):
        model.generate(ids, max_new_tokens=8, eos_token_id=126082)


# Files


def test_the_config_goes_through_generation_config_json(either, ids, tmp_path):
    options = {"block_length": 8, "schedule": Uniform(4), "refresh": Window(8, 0), "max_new_tokens": 16}
    options |= {"top_k": 50, "top_p": 0.9}
    options |= {"temperature": 0.5, "seed": 7, "eos_token_id": [3, 4], "defer_tokens": [3], "remask": ReMDM(0.3)}
    dllm_fast.patch(either).generation_config = DiffusionGenerationConfig(**options)
    expected = either.generate(ids).sequences
    either.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "generation_config.json").read_text())
    assert said["schedule"] == "uniform=4" and said["refresh"] == "window=8,0" and said["remask"] == "remdm=0.3"
    assert "confidence" not in said and said["eos_token_id"] == [3, 4]
    native = isinstance(either, dllm_fast.LLaDAModelLM)
    for load in (dllm_fast.from_pretrained, *[dllm_fast.LLaDAModelLM.from_pretrained] * native):
        assert torch.equal(load(tmp_path).generate(ids).sequences, expected)
    read = DiffusionGenerationConfig.from_pretrained(tmp_path)
    assert read == either.generation_config and read.schedule == Uniform(4)
    assert copy.deepcopy(read).remask == ReMDM(0.3)


def test_a_bad_config_raises_when_it_is_made():
    for bad, message in (
        ({"schedule": "uniform=0"}, "schedule: 'uniform=0'"),
        ({"remask": "never"}, "remask: 'never' is none of"),
        ({"cache": "full"}, "cache='full' is not one of"),
        ({"cache_dtype": "fp8"}, "cache_dtype='fp8' is not one of None, 'e4m3'"),
        ({"confidence": "logit"}, "confidence='logit' is not one of"),
        ({"top_k": 2.5}, "top_k=2.5 is not a whole number|top_k.*2.5"),
        ({"top_p": 1.5}, "top_p=1.5 is not a number above 0 and up to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            DiffusionGenerationConfig(**bad)
    with pytest.raises(ValueError, match="schedule: 'uniform=0'"):
        DiffusionGenerationConfig().update(schedule="uniform=0")
