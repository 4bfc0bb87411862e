"""Bad input raises an error that names the argument and the value, before any work, and changes nothing."""

import dataclasses
import inspect

import numpy as np
import pytest
import torch
from tiny import EOS, MASK, VOCAB

import dllm_fast
from dllm_fast import Every, Threshold, Uniform
from dllm_fast.decoding.options import OPTIONS, Options

GOOD = torch.arange(12).view(2, 6)


def holed(*rows):
    return torch.tensor(rows)


CASES = {
    "ids-not-a-tensor": ({"input_ids": [[1, 2]]}, "input_ids: a list is not a tensor"),
    "ids-float": ({"input_ids": GOOD.float()}, r"input_ids: dtype torch.float32 is not torch.int64"),
    "ids-int32": ({"input_ids": GOOD.int()}, r"input_ids: dtype torch.int32"),
    "ids-rank-1": ({"input_ids": GOOD[0]}, r"input_ids: shape \(6,\) is not \[B, P\]"),
    "ids-no-rows": ({"input_ids": GOOD[:0]}, r"input_ids: shape \(0, 6\) has no rows"),
    "ids-empty-prompt": ({"input_ids": GOOD[:, :0]}, r"input_ids: shape \(2, 0\) is an empty prompt"),
    "ids-too-large": ({"input_ids": GOOD + VOCAB}, "input_ids: id 106 is outside the vocabulary of 101"),
    "ids-negative": ({"input_ids": GOOD - 1}, "input_ids: id -1 is outside"),
    "prompt-too-long": ({"input_ids": GOOD.repeat(1, 90)}, "a prompt of 540 and gen_length=16 exceed the model's 512"),
    "mask-shape": ({"attention_mask": torch.ones(2, 5)}, r"attention_mask: \(2, 5\) on cpu does not match input_ids"),
    "mask-values": ({"attention_mask": torch.full((2, 6), 2)}, "attention_mask: has values other than 0 and 1"),
    "mask-hole": ({"attention_mask": holed([1] * 6, [1, 1, 0, 1, 1, 1])}, "attention_mask: row 1 has a hole"),
    "mask-empty-row": ({"attention_mask": holed([1] * 6, [0] * 6)}, "attention_mask: row 1 is an empty prompt"),
    "gen-length": ({"gen_length": 20}, "gen_length=20 is not a multiple of block_length=8"),
    "gen-length-negative": ({"gen_length": -8}, "gen_length=-8 is not a whole number"),
    "gen-length-float": ({"gen_length": 16.0}, r"gen_length=16.0 is not a whole number"),
    "nothing-to-fill": ({"gen_length": 0}, r"gen_length=0 and no \[MASK\] in input_ids"),
    "block-length": ({"block_length": 0}, "block_length=0 is not a positive"),
    "mask-id-missing": ({"mask_id": None}, "mask_id: None given, and model.config has no mask_token_id"),
    "mask-id-unknown": ({"mask_id": 101}, "mask_id=101 is not an id of the vocabulary of 101"),
    "eos-id-unknown": ({"eos_id": -2}, "eos_id=-2 is not an id"),
    "eos-id-float": ({"eos_id": 3.0}, "eos_id=3.0 is not an id"),
    "eos-ids-unknown": ({"eos_id": [3, 101]}, r"eos_id\[1\]=101 is not an id of the vocabulary of 101"),
    "eos-is-mask": ({"eos_id": MASK}, "eos_id=100: the mask id, 100, ends no text"),
    "eos-ids-hold-mask": ({"eos_id": (3, MASK)}, r"eos_id=\(3, 100\): the mask id, 100, ends no text"),
    "pad-id-unknown": ({"pad_id": 101}, "pad_id=101 is not an id of the vocabulary of 101"),
    "pad-is-mask": ({"pad_id": MASK}, "pad_id=100 is the mask id"),
    "steps-do-not-divide": ({"schedule": Uniform(7)}, "Uniform: steps=7 is not a multiple of the 2 blocks"),
    "steps-too-many": ({"schedule": Uniform(64)}, "steps=64 over 2 blocks is more than the 8 positions"),
    "threshold": ({"schedule": Threshold(-1)}, "schedule: Threshold: threshold=-1.0 is below every confidence='prob"),
    "schedule": ({"schedule": "uniform"}, "schedule='uniform' is not a schedule"),
    "confidence": ({"confidence": "logit"}, "confidence='logit' is not one of 'probability'"),
    "cache": ({"cache": "full"}, "cache='full' is not one of 'none'"),
    "refresh": ({"refresh": "never"}, "refresh='never' is not one of 'block'"),
    "temperature": ({"temperature": -0.1}, "temperature=-0.1 is not a finite number"),
    "cfg-scale": ({"cfg_scale": float("inf")}, "cfg_scale=inf is not a finite number"),
    "refresh-of-nothing": (
        {"refresh": dllm_fast.Every(2), "cache": "none"},
        r"refresh=Every\(blocks=2\): there is nothing to refresh with cache='none'",
    ),
    "remask": ({"remask": "wino"}, "remask='wino' is not one of ReMDM, Verify, P2"),
    "ancestral-steps": ({"schedule": dllm_fast.Ancestral(7)}, "Ancestral: steps=7 is not a multiple of the 2 blocks"),
    "ancestral-grid": ({"schedule": dllm_fast.Ancestral(2 * 10**30)}, "0 over 2 blocks is more than 1048576 in one"),
    "seed": ({"seed": 1.5}, "seed=1.5 is not a whole number"),
    "seed-large": ({"seed": 2**63}, "seed=9223372036854775808 is not a whole number from 0 to"),
    "streamer": ({"streamer": object()}, "streamer: takes one row, and input_ids has 2"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_arguments_are_named_before_any_work(either, case, monkeypatch):
    changes, message = CASES[case]
    dllm_fast.patch(either)
    if case == "mask-id-missing":
        either.config.mask_token_id = None
    ran = []
    monkeypatch.setattr(type(dllm_fast.patch(either)), "__call__", lambda *a, **k: ran.append(1))
    family = either.__dict__["_dllm_fast"].family
    monkeypatch.setattr(family, "hidden", lambda *a, **k: ran.append(1))
    arguments = {"input_ids": GOOD, "gen_length": 16, "block_length": 8, **changes}
    with pytest.raises(ValueError, match=message):
        dllm_fast.generate(either, **arguments)
    assert not ran


def test_generate_has_every_option_with_its_default():
    arguments = inspect.signature(dllm_fast.generate).parameters
    given = {name: arguments[name].default for name in OPTIONS}
    assert vars(Options(**given)) == vars(Options())
    others = {"model", "input_ids", "attention_mask", "streamer", "token_type_ids"}
    assert arguments.keys() - set(OPTIONS) == others


def test_options_are_checked_whenever_they_are_made():
    made = Options(temperature=np.float32(0.5), gen_length=np.int8(16), seed=np.uint64(3))
    assert [type(value) for value in (made.temperature, made.gen_length, made.seed)] == [float, int, int]
    for bad in ({"temperature": True}, {"cfg_scale": "1"}, {"block_length": 1.5}, {"seed": -1}, {"cache": None}):
        (name,) = bad
        for make in (Options, lambda **bad: dataclasses.replace(made, **bad)):
            with pytest.raises(ValueError, match=f"{name}="):
                make(**bad)


def test_options_are_equal_where_no_step_tells_them_apart():
    """An engine, its graphs included, serves calls whose options are equal."""
    base = Options()
    for same in ({"seed": 1}, {"eos_id": 3}, {"pad_id": 4}, {"gen_length": 64}, {"refresh": Every(1)}):
        assert Options(**same) == base and hash(Options(**same)) == hash(base)
    for name in ("block_length", "temperature", "cfg_scale", "mask_id", "suppress_tokens", "defer_tokens"):
        assert Options(**{name: 7}) != base


def test_an_unpatched_model_is_told_to_be_patched(either):
    with pytest.raises(ValueError, match=r"model: this \w+ is not patched; call dllm_fast.patch"):
        dllm_fast.generate(either, GOOD)
    with pytest.raises(ValueError, match="model: this str is not patched"):
        dllm_fast.generate("llada", GOOD)


def test_a_streamer_takes_one_row_and_right_padding_is_not_taken_for_the_prompt(llada):
    dllm_fast.patch(llada)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    out = dllm_fast.generate(llada, GOOD[:1].where(mask.bool(), EOS), mask, gen_length=8, block_length=8, eos_id=EOS)
    assert out.sequences[0, :6].tolist() == [0, 1, 2, 3, EOS, EOS]
