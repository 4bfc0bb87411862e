"""Schedules, refreshes, remasks and pipelines as text, ``name=value,value``: read by the command line and by
evaluations, and written to ``generation_config.json``."""

import argparse
from dataclasses import astuple

from dllm_fast.decoding.pipeline import D2F, MultiBlock, Pipeline
from dllm_fast.decoding.refresh import Drift, Every, Refresh, Window
from dllm_fast.decoding.remask import P2, Edit, Remask, ReMDM, Verify
from dllm_fast.decoding.schedules import (
    Ancestral,
    Dynamic,
    EntropyBound,
    Factor,
    FirstHitting,
    Pyramid,
    Schedule,
    Sequential,
    Static,
    Threshold,
    Uniform,
)

SCHEDULES = {
    "uniform": (Uniform, int),
    "pyramid": (Pyramid, int),
    "static": (Static, int),
    "sequential": (Sequential, int),
    "threshold": (Threshold, float),
    "dynamic": (Dynamic, float, int),
    "factor": (Factor, float),
    "entropy-bound": (EntropyBound, float),
    "ancestral": (Ancestral, int, str),
    "first-hitting": (FirstHitting,),
}
REFRESHES = {"every": (Every, int), "window": (Window, int, int), "drift": (Drift, float)}
PIPELINES = {"d2f": (D2F, float, float, int), "multi-block": (MultiBlock, float, int, int, int)}
REMASKS = {"remdm": (ReMDM, float), "verify": (Verify, float), "p2": (P2, float), "edit": (Edit, float, int)}


class Misspelled(argparse.ArgumentTypeError, ValueError):
    """Text that names no policy. argparse shows its message; elsewhere it is a ValueError."""


def spelled(choices: dict, text: str):
    """``name=value,value`` of one of ``choices``: {name: (class, the type of each of its arguments)}. An empty value is
    None."""
    name, _, values = text.partition("=")
    if name not in choices:
        known = ", ".join(f"{name}{'=N' * bool(types)}" for name, (_, *types) in choices.items())
        raise Misspelled(f"{text!r} is none of {known}")
    cls, *types = choices[name]
    given = values.split(",") if values else []
    if len(given) > len(types):
        raise Misspelled(f"{text!r}: {name} takes {len(types) or 'no'} value{'s' * (len(types) != 1)}")
    try:
        arguments = [kind(value) if value else None for kind, value in zip(types, given)]
    except ValueError as error:
        raise Misspelled(f"{text!r}: {values!r} is not a number") from error
    try:
        return cls(*arguments)
    except ValueError as error:
        raise Misspelled(f"{text!r}: {error}") from error
    except TypeError as error:
        raise Misspelled(f"{text!r}: {name} needs a value") from error


def schedule_of(text: str) -> Schedule:
    """``uniform=32``, ``threshold=0.9``, ``ancestral=64,cosine``, ``first-hitting``, ..."""
    return spelled(SCHEDULES, text)


def refresh_of(text: str) -> str | Refresh:
    """``block``, ``every=4``, ``window=32,0`` or ``drift=0.2``."""
    return text if text == "block" else spelled(REFRESHES, text)


def remask_of(text: str) -> Remask:
    """``remdm=0.1``, ``verify=0.7``, ``p2=1`` or ``edit=0.5,16``."""
    return spelled(REMASKS, text)


def pipeline_of(text: str) -> Pipeline:
    """``d2f=0.1,0.95``, ``d2f=0.1,0.95,4``, ``multi-block=0.1`` or ``multi-block=0.1,,2,10``."""
    return spelled(PIPELINES, text)


# `generate`'s arguments
SPELLED = {"schedule": schedule_of, "refresh": refresh_of, "remask": remask_of, "pipeline": pipeline_of}


def policy_of(name: str, text: str):
    """What ``text`` spells for `generate`'s argument ``name``. Raises ValueError that names it."""
    try:
        return SPELLED[name](text)
    except Misspelled as error:
        raise ValueError(f"{name}: {error}") from error


def spell(policy: Schedule | Refresh | Remask | Pipeline) -> str:
    """The text that `schedule_of`, `refresh_of`, `remask_of` or `pipeline_of` reads as ``policy``."""
    for name, (cls, *_) in {**SCHEDULES, **REFRESHES, **REMASKS, **PIPELINES}.items():
        if type(policy) is cls:
            values = ",".join("" if value is None else str(value) for value in astuple(policy)).rstrip(",")
            return f"{name}={values}" if values else name
    raise ValueError(f"{policy!r} is no schedule, refresh, remask or pipeline of dllm_fast")
