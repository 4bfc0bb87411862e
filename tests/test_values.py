"""Schedules, refreshes and remasks check their numbers when they are made, and accept any real number type."""

import copy
import dataclasses
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch

import dllm_fast
from dllm_fast import (
    P2,
    Ancestral,
    Drift,
    Dynamic,
    Edit,
    EntropyBound,
    Every,
    Factor,
    Pyramid,
    ReMDM,
    Sequential,
    Static,
    Threshold,
    Uniform,
    Verify,
    Window,
)

NAN, INF = float("nan"), float("inf")
COUNTS = [0, -1, 1.5, 2.0, "8", None, True, NAN, np.float32(2), np.bool_(True), torch.tensor(2), [1]]
NUMBERS = ["0.5", None, True, NAN, np.float64("nan"), np.bool_(False), torch.tensor(0.5), [0.5], 0.5j]
WITHIN = [*NUMBERS, INF, -INF, 10**400]
SHARES = [*WITHIN, -0.1, 1.1, 2, -1]


def rounds_of(rounds):
    return Edit(0.5, rounds)


def least_of(tokens):
    return Dynamic(0.5, tokens)


CASES = [
    (Uniform, "steps", COUNTS),
    (Pyramid, "factor", COUNTS),
    (Static, "tokens", COUNTS),
    (Sequential, "tokens", COUNTS),
    (Ancestral, "steps", COUNTS),
    (Every, "blocks", COUNTS),
    (lambda after: Window(4, after), "after", COUNTS[1:]),
    (Window, "before", COUNTS[1:]),
    (Threshold, "threshold", [*WITHIN, 0, 0.0, -0.0, 2.0, 1.0001, np.float32(2), Fraction(0)]),
    (Factor, "factor", [*WITHIN, 0, 0.0, -1, -0.5]),
    (EntropyBound, "gamma", [*WITHIN, -1, -1e-9]),
    (Drift, "tau", [*NUMBERS, -INF, -1.0, -1e-9, 10**400]),
    (ReMDM, "eta", SHARES),
    (Verify, "threshold", SHARES),
    (P2, "eta", SHARES),
    (Edit, "threshold", SHARES),
    (rounds_of, "rounds", COUNTS[1:]),
    (least_of, "tokens", COUNTS),
]


@pytest.mark.parametrize("make, name, values", CASES, ids=lambda x: getattr(x, "__name__", None))
def test_a_bad_value_is_named_with_its_class_and_argument(make, name, values):
    kind = {"after": "Window", rounds_of: "Edit", least_of: "Dynamic"}
    kind = kind.get(make) or kind.get(name) or make.__name__
    for value in values:
        with pytest.raises(ValueError) as error:
            make(value)
        assert str(error.value).startswith(f"{kind}: {name}={value!r} is not a"), error.value


def test_noise_is_one_of_its_names():
    names = "'linear', 'cosine', 'loglinear', 'polynomial'"
    for noise in ("sine", "Linear", None, 1, ["linear"], np.array(["linear", "cosine"])):
        with pytest.raises(ValueError, match=f"Ancestral: noise=.* is not one of {names}"):
            Ancestral(8, noise)


def test_a_changed_copy_is_checked_as_well():
    with pytest.raises(ValueError, match=r"Threshold: threshold=2\.0"):
        dataclasses.replace(Threshold(0.9), threshold=2.0)
    for policy in (Threshold(0.9), Ancestral(8, "cosine"), Window(3, 5), Drift(INF), P2(1)):
        assert copy.deepcopy(policy) == policy == pickle.loads(pickle.dumps(policy))
        assert hash(policy) == hash(copy.copy(policy))


@pytest.mark.parametrize("kind", [np.int8, np.uint64, np.int64, int])
def test_whole_numbers_of_any_type_are_kept_as_int(kind):
    for policy in (Uniform(kind(8)), Pyramid(kind(8)), Ancestral(kind(8)), Every(kind(8)), Window(kind(8), kind(8))):
        numbers = [value for value in vars(policy).values() if not isinstance(value, str)]
        assert all(type(number) is int and number == 8 for number in numbers)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, float, Fraction])
def test_numbers_of_any_type_are_kept_as_float(kind):
    for make in (Threshold, Factor, EntropyBound, Drift, ReMDM, Verify, P2):
        (number,) = vars(make(kind(0.5))).values()
        assert type(number) is float and number == 0.5


def test_the_ends_of_each_range_are_in_it():
    Threshold(1), Threshold(1e-6), Threshold(-7.5), Factor(1e-6), EntropyBound(0), Drift(0), Drift(INF), Window(0, 0)
    for make in (ReMDM, Verify, P2):
        make(0), make(1)


def test_a_threshold_below_0_is_for_entropy_alone(llada, ids):
    dllm_fast.patch(llada)
    options = {"gen_length": 8, "block_length": 8, "schedule": Threshold(-4.0)}
    for confidence in ("probability", "margin", "random"):
        with pytest.raises(ValueError, match=f"Threshold: threshold=-4.0 is below every confidence='{confidence}'"):
            dllm_fast.generate(llada, ids, confidence=confidence, **options)
    assert dllm_fast.generate(llada, ids, confidence="entropy", **options).nfe >= 1


def test_numbers_of_numpy_decode_as_pythons_do(llada, ids):
    dllm_fast.patch(llada)
    for plain, numpy in (
        ({"schedule": Uniform(4)}, {"schedule": Uniform(np.int64(4))}),
        ({"schedule": Ancestral(8), "seed": 1}, {"schedule": Ancestral(np.int32(8)), "seed": 1}),
        ({"schedule": Threshold(0.5)}, {"schedule": Threshold(np.float32(0.5))}),
        ({"refresh": Window(4, 1)}, {"refresh": Window(np.int64(4), np.int8(1))}),
        ({"remask": Verify(0.5)}, {"remask": Verify(np.float64(0.5))}),
    ):
        expected = dllm_fast.generate(llada, ids, gen_length=16, block_length=8, **plain)
        found = dllm_fast.generate(llada, ids, gen_length=16, block_length=8, **numpy)
        assert torch.equal(found.sequences, expected.sequences) and found.nfe == expected.nfe
