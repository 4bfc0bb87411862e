"""Finds the best tiles, warps and crossovers for this machine: ``python -m bench.ops.tune [piece ...]``.

A knob is a value pinned in a kernel's file. Its candidates replace it while they are timed, in turns, on the shapes
that the knob affects. Prints every candidate's times, and for each knob the geometric mean over its shapes relative to
the pinned value. ``crossover`` times predict's two paths by number of rows, beside compiled cuBLAS and softmax;
``whole-attention`` times our attention over whole sequences and PyTorch's, and prints the entry for
`dllm_fast.attentions`. Nothing is written: pin values by hand, after running the tests with them. Ends with one JSON
line.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Iterator
from unittest import mock

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from bench.ops.cases import attention, loss, predict, small
from bench.ops.cases.case import BASE, LLADA, TINY, Case, Model, dtype_of
from bench.ops.timing import measure
from bench.report.tables import duration
from dllm_fast.kernels import attention as attention_kernel
from dllm_fast.kernels import glu as glu_kernel
from dllm_fast.kernels import masked_loss as loss_kernel
from dllm_fast.kernels import norm as norm_kernel
from dllm_fast.kernels import predict as predict_kernel
from dllm_fast.kernels import rope as rope_kernel
from dllm_fast.kernels.checks import dtype_name

PINNED = "pinned"
AHEAD = 0.95  # PyTorch's attention is ahead if it takes less than this share of our time


@dataclasses.dataclass
class Knob:
    name: str
    module: object
    candidates: dict[str, dict]  # label -> replacement values of the module's attributes
    cases: list[Case]


def with_values(function: Callable, module, values: dict) -> Callable:
    def run(*inputs):
        with mock.patch.multiple(module, **values):
            return function(*inputs)

    return run


def candidate_case(case: Case, variants: dict[str, Callable]) -> Case:
    """The case with variants of ours and torch.compile instead of its peers; each is checked before it is timed."""
    return dataclasses.replace(case, run=variants, strict=tuple(set(variants) - {"compile"}), unchecked=())


def attention_knobs(model: Model, device: str, quick: bool) -> Iterator[Knob]:
    itemsize = dtype_of(device).itemsize
    few = [(64, 32, 4, 3, True), (64, 64, 4, 2, True), (64, 64, 4, 4, True), (64, 128, 4, 2, True),
           (64, 128, 4, 3, True), (64, 128, 8, 2, True), (32, 64, 4, 3, True), (16, 64, 4, 3, True),
           (16, 128, 4, 3, True)]  # fmt: skip
    unmasked = [(64, 64, 4, 3, False), (64, 128, 4, 3, False), (32, 64, 4, 3, False), (16, 128, 4, 3, False)]
    many = [(128, 64, 8, 3, False), (128, 64, 4, 3, False), (128, 128, 8, 2, False), (128, 128, 8, 3, True),
            (64, 64, 4, 3, False), (64, 128, 4, 3, False), (128, 32, 4, 4, False), (256, 64, 8, 2, False)]  # fmt: skip
    if quick:
        few, unmasked, many = [(16, 16, 4, 1, True)], [(32, 16, 4, 1, False)], [(16, 16, 4, 1, False)]

    def table(position: int, config: tuple) -> dict:
        changed = {}
        for key, pair in attention_kernel.CONFIGS.items():
            changed[key] = tuple(config if i == position and key[0] == itemsize else x for i, x in enumerate(pair))
        return {"CONFIGS": changed}

    def labels(position: int, configs: list[tuple]) -> dict:
        return {"x".join(map(str, config)): table(position, config) for config in configs}

    keys, lengths, batches, block = ((40,), (12,), (1,), 4) if quick else ((512, 4096, 16384), (512, 4096), (1, 8), 32)
    model = TINY[model.window is not None] if quick else model
    for window in (None,) if model.window is None else (None, model.window):
        name = model.name + " window" * (window is not None)
        blocks = [attention.one(model, window, f"block{block}x{n}", b, block, n, device) for n in keys for b in batches]
        whole = [attention.one(model, window, f"full{n}", b, n, n, device) for n in lengths for b in batches]
        tiles = few if window is not None else few + unmasked
        yield Knob(f"{name}: tiles of a block", attention_kernel, labels(0, tiles), blocks)
        choices = (1, many) if window is None else (0, few)
        yield Knob(f"{name}: tiles of a sequence", attention_kernel, labels(*choices), whole)
        if window is None:
            splits = {f"SPLIT_SLOTS={n}": {"SPLIT_SLOTS": n} for n in (64, 256, 512)}
            splits |= {f"THREADS=132*{n}": {"THREADS": 132 * n} for n in (128, 512, 1024)}
            yield Knob(f"{name}: splits of a block", attention_kernel, splits, blocks)


def predict_knobs(device: str, quick: bool) -> Iterator[Knob]:
    size = dtype_of(device).itemsize
    table = "FLOAT32" if size == 4 else "FUSED"
    tiles = [(64, 64, 4, 4), (64, 128, 4, 4), (128, 64, 4, 3), (128, 64, 4, 5), (128, 64, 8, 4), (128, 128, 4, 3),
             (256, 64, 8, 3)]  # fmt: skip
    groups = [(group, max(8, group - 8)) for group in getattr(predict_kernel, table)]  # and rows
    for model in TINY[:1] if quick else (LLADA, BASE):
        for group, rows in groups:
            candidates = {}
            for bv, bk, warps, stages in tiles:
                config = {"BN": group, "BV": bv, "BK": bk, "num_warps": warps, "num_stages": stages}
                value = {**getattr(predict_kernel, table), group: config}
                candidates[f"{bv}x{bk} {warps} warps {stages} stages"] = {table: value, "CROSSOVER": {size: 1 << 20}}
            yield Knob(f"{model.name}: fused, groups of {group}", predict_kernel, candidates,
                       [predict.one(model, rows, False, device)])  # fmt: skip
        chunks = {f"CHUNK_ELEMENTS=2^{n}": {"CHUNK_ELEMENTS": 1 << n, "CROSSOVER": {size: 0}} for n in (22, 24, 25, 27)}
        for bv, warps in ((1024, 4), (2048, 4), (4096, 8), (4096, 16)):
            chunks[f"SELECT {bv}, {warps} warps"] = {"SELECT": {"BV": bv, "num_warps": warps}, "CROSSOVER": {size: 0}}
        many = [predict.one(model, rows, False, device) for rows in ((5,) if quick else (256, 2048))]
        yield Knob(f"{model.name}: streamed", predict_kernel, chunks, many)


def small_knobs(device: str, quick: bool) -> Iterator[Knob]:
    def some(cases: Iterator[Case]) -> list[Case]:
        wanted = ("full5", "block3") if quick else ("full4096-batch8", "block32-batch8")
        return [x for x in cases if any(name in x.name for name in wanted)]

    warps = {f"{n} warps": {"WARPS": dict.fromkeys(norm_kernel.WARPS, n)} for n in (2, 4, 8, 16)}
    yield Knob("norm", norm_kernel, warps | {f"ELEMENTS={n}": {"ELEMENTS": n} for n in (2048, 4096)},
               some(small.norm_cases(device, quick)))  # fmt: skip
    pairs = {f"PAIRS={n}, {w} warps": {"PAIRS": n, "WARPS": w} for n in (256, 512, 1024, 2048) for w in (1, 2, 4)}
    yield Knob("rope", rope_kernel, pairs, some(small.rope_cases(device, quick)))
    blocks = {f"BLOCK={n}, {w} warps": {"BLOCK": n, "WARPS": w} for n in (512, 1024, 2048, 4096) for w in (2, 4, 8)}
    yield Knob("glu", glu_kernel, blocks, some(small.glu_cases(device, quick)))


def loss_knobs(device: str, quick: bool) -> Iterator[Knob]:
    size = dtype_of(device).itemsize
    shapes = [(128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 4, 3), (256, 128, 64, 8, 3),
              (64, 128, 64, 4, 4)]  # fmt: skip
    candidates = {}
    for bn, bv, bk, warps, stages in shapes:
        config = {"BN": bn, "BV": bv, "BK": bk, "num_warps": warps, "num_stages": stages}
        candidates[f"{bn}x{bv}x{bk} {warps} warps {stages} stages"] = {"CONFIGS": {**loss_kernel.CONFIGS, size: config}}
    candidates |= {f"GROUP={n}": {"GROUP": n} for n in (4, 16)}
    yield Knob("loss", loss_kernel, candidates, [x for x in loss.cases(device, quick) if "backward" not in x.name])


def tune(knob: Knob, device: str, quick: bool) -> dict:
    """Times of every candidate on every case, and mean ratios to the pinned value for candidates that ran on all."""
    print(f"\n{knob.name}", flush=True)
    if quick:
        knob = dataclasses.replace(knob, cases=knob.cases[:1], candidates=dict(list(knob.candidates.items())[-2:]))
    times: dict[str, list[float]] = {}
    for case in knob.cases:
        ours = case.run["ours"]
        variants = {PINNED: ours} | {
            label: with_values(ours, knob.module, values) for label, values in knob.candidates.items()
        }
        results = measure(candidate_case(case, variants), device, quick)
        print(f"  {case.name}")
        base = results[PINNED].median
        for label, result in sorted(results.items(), key=lambda item: item[1].median):
            said = result.error or f"{duration(result.median):>9}  {base / result.median:5.2f} of pinned's speed"
            print(f"    {label:<28} {said}", flush=True)
            times.setdefault(label, []).append(result.median / base)
    means = {
        label: math.exp(sum(map(math.log, ratios)) / len(ratios))
        for label, ratios in times.items()
        if len(ratios) == len(knob.cases) and all(map(math.isfinite, ratios))
    }
    best = min(means, key=means.get) if means else None
    print(f"  best over {len(knob.cases)} shapes: {best}", f"{1 / means[best]:.3f} of pinned's speed" if best else "")
    return {"knob": knob.name, "best": best, "relative_time": means}


def crossover(device: str, quick: bool) -> dict:
    """The largest number of rows at which predict's fused path is at least as fast as its streamed one."""
    found = {}
    for model in TINY[:1] if quick else (LLADA, BASE):
        for noisy in (False, True):
            name = model.name + " with noise" * noisy
            print(f"\ncrossover, {name}: {'rows':>6} {'fused':>10} {'streamed':>10} {'compile':>10}", flush=True)
            rows_of: dict[int, dict[str, float]] = {}
            for rows in (1, 5) if quick else (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512):
                case = predict.one(model, rows, noisy, device)
                variants = {path: functools.partial(case.run["ours"], path=path) for path in ("fused", "streamed")}
                variants["compile"] = case.run["compile"]
                results = measure(candidate_case(case, variants), device, quick)
                rows_of[rows] = {label: result.median for label, result in results.items()}
                said = "".join(f" {result.error or duration(result.median):>10}" for result in results.values())
                print(f"{'':>{len(name) + 13}} {rows:>6}{said}", flush=True)
            ahead = [rows for rows, x in rows_of.items() if x["fused"] <= x["streamed"]]
            behind = [rows for rows, x in rows_of.items() if x["fused"] > x["streamed"]]
            last = max((rows for rows in ahead if rows < min(behind, default=1 << 30)), default=0)
            print(f"fused is ahead up to {last} rows; streamed from {min(behind, default=None)}")
            found[name] = {"fused_up_to": last, "seconds": rows_of}
    return found


def whole_attention(device: str, quick: bool) -> dict:
    """The least number of queries from which PyTorch's attention is ahead of ours at every size tried."""
    found = {}
    for model in TINY[:1] if quick else (LLADA, BASE):
        print(f"\nattention of whole sequences, heads of {model.head_dim}: {'queries':>9} {'ours':>10} {'SDPA':>10}")
        ahead = {}
        for queries in (12, 24) if quick else (256, 512, 768, 1024, 2048, 4096, 8192):
            case = attention.one(model, None, f"full{queries}", 1, queries, queries, device)
            results = measure(candidate_case(case, {"ours": case.run["ours"], "SDPA": pytorchs}), device, quick)
            said = "".join(f" {result.error or duration(result.median):>10}" for result in results.values())
            print(f"{queries:>55}{said}", flush=True)
            ahead[queries] = results["SDPA"].median < AHEAD * results["ours"].median
        behind = max((queries for queries, is_ahead in ahead.items() if not is_ahead), default=0)
        first = min((queries for queries in ahead if queries > behind), default=None)
        dtype = dtype_name(dtype_of(device))
        table = "never" if first is None else f"{dtype}:{model.head_dim}:{first}"
        print(f"DLLM_FAST_ATTENTION={table}")
        found[model.name] = table
    return found


def pytorchs(q, keys, values, *_):
    q, keys, values = (x.transpose(1, 2) for x in (q, keys, values))
    return torch.nn.functional.scaled_dot_product_attention(q, keys, values).transpose(1, 2)


KNOBS = {
    "attention-llada": functools.partial(attention_knobs, LLADA),
    "attention-base": functools.partial(attention_knobs, BASE),
    "predict": predict_knobs,
    "small": small_knobs,
    "loss": loss_knobs,
}
TABLES = {"crossover": crossover, "whole-attention": whole_attention}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pieces", nargs="*", default=[*TABLES, *KNOBS], help=", ".join((*TABLES, *KNOBS)))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, for a dry run")
    options = parser.parse_args()
    unknown = set(options.pieces) - {*TABLES, *KNOBS}
    if unknown:
        parser.error(f"no piece {', '.join(sorted(unknown))}; there are {', '.join((*TABLES, *KNOBS))}")
    found: dict = {"knobs": []}
    for piece in options.pieces:
        if piece in TABLES:
            found[piece] = TABLES[piece](options.device, options.quick)
        else:
            for knob in KNOBS[piece](options.device, options.quick):
                found["knobs"].append(tune(knob, options.device, options.quick))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
