"""What a step should cost, computed from a model's shapes alone: bytes, FLOPs, launches and microseconds.

    python -m bench.generation.cost --copy 4.19e12 --matrix 779e12 [--weights fp8] [--head fp8] [--batch 8]

`Cost` has lower bounds of a step's bytes and FLOPs. A step over n positions runs every matmul of the layers on n rows,
attention of n queries over the slots that they see, and the LM head on the masked positions; in the last layer, only
keys and values are computed for all n positions, the rest for the block's alone. It reads the weights once and, with a
cache, the keys and values of all slots. Norms, rotations, gates and activations count as free. A multiplication and an
addition count as two FLOPs.

`step_kernels` lists every kernel of a step on an NVIDIA card, under its name in a profile. Each takes the longer
of its bytes at the copy rate and its FLOPs at the matrix rate, plus the cost of a launch. Here activations count too.
This is a prediction: `bench.generation.steps` prints it beside the measured times.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from bench.common import SHAPES
from bench.generation.breakdown import kernel_group
from dllm_fast import LLaDAConfig, LLaDAModelLM
from dllm_fast.cli.view import print_table
from dllm_fast.families.llada import LLaDA
from dllm_fast.patch import bound_family


@dataclass(frozen=True)
class Cost:
    """A model's numbers. Weights are counted in elements."""

    every: int  # of one layer, multiplying all rows: keys and values
    rest: int  # of one layer, multiplying all rows except in the last layer
    transform: int  # between the last layer and the head, multiplying the block's rows
    head: int
    windows: tuple[int | None, ...]  # of each layer: how far a query sees to either side; None: everything
    heads: int
    kv_heads: int
    head_dim: int
    item: int  # bytes of an element

    @classmethod
    def of(cls, model) -> "Cost":
        """The numbers of a patched LLaDA or ModernBERT."""
        return cls.of_family(bound_family(model))

    @classmethod
    def of_family(cls, family) -> "Cost":
        head = family.head()[0]
        width, ffn, key_width = head.shape[1], family.ffn_width, family.kv_heads * family.head_dim
        heads = width // family.head_dim
        return cls(
            every=2 * width * key_width, rest=2 * width * heads * family.head_dim + 3 * width * ffn,
            transform=width * width if "dense" in family.calls.names else 0, head=head.numel(),
            windows=tuple(family.windows), heads=heads, kv_heads=family.kv_heads, head_dim=family.head_dim,
            item=head.element_size(),
        )  # fmt: skip

    def flops(self, positions: float, live: int, masked: int, slots: int) -> float:
        """FLOPs of a step over ``positions`` of all rows, ``live`` of them in blocks, in sequences of ``slots``."""
        total = 2 * (self.head * masked + self.transform * live)
        for layer, window in enumerate(self.windows):
            queries = live if layer == len(self.windows) - 1 else positions
            seen = slots if window is None else min(slots, 2 * window + 1)
            total += 2 * (self.every * positions + self.rest * queries)
            total += 4 * queries * seen * self.heads * self.head_dim
        return total

    def bytes(self, rows: int, slots: int, cached: bool) -> int:
        """The weights and, if ``cached``, the keys and values of every slot, which are written or read."""
        weights = (self.every + self.rest) * len(self.windows) + self.transform + self.head
        pairs = 2 * rows * slots * self.kv_heads * self.head_dim * len(self.windows) if cached else 0
        return self.item * (weights + pairs)


FP32 = 4  # bytes of an fp32 number
# Bytes per rounded weight, scales included: int4 has a bf16 scale and a byte for each 128 weights.
BYTES = {"fp8": 1.0, "int4": 0.5 + 3 / 128}


@dataclass(frozen=True)
class Card:
    """An NVIDIA card's rates, and the cost of launching a kernel of a recorded step."""

    copy: float  # bytes read and written, `bench.floors`
    matrix: float  # FLOPs in bf16, `bench.floors`
    launch: float = 0.0  # seconds
    multiprocessors: int = 132

    @property
    def narrow(self) -> float:
        """FLOPs/s in e4m3: twice those in bf16, as in every data sheet. Not measured."""
        return 2 * self.matrix


@dataclass(frozen=True)
class Kernel:
    """One kernel of a step, or several identical launches."""

    what: str
    name: str  # a part of its name in a profile; "" for a cuBLAS matmul
    launches: int
    bytes: float  # bytes and FLOPs of all launches
    flops: float = 0.0
    narrow: bool = False  # multiplies e4m3 by e4m3

    @property
    def group(self) -> str:
        """Its group in `bench.generation.breakdown`."""
        return kernel_group(self.name) if self.name else "matmuls"

    def microseconds(self, card: Card) -> float:
        rate = card.narrow if self.narrow else card.matrix
        return 1e6 * (max(self.bytes / card.copy, self.flops / rate) + self.launches * card.launch)


def step_kernels(
    cost: Cost,
    card: Card,
    batch: int,
    slots: int,
    positions: int,
    live: int,
    masked: int,
    weights: str | None = None,
    head: str | None = None,
) -> list[Kernel]:
    """The kernels of one step: ``positions`` of each of ``batch`` sequences of ``slots``, ``live`` of them in a block.

    ``masked`` rows, of all sequences together, go to the LM head. ``weights``: None, "fp8" or "int4", ``head``: None
    or "fp8".
    """
    found, last = [], len(cost.windows) - 1
    for layer, window in enumerate(cost.windows):
        found += _layer(cost, card, batch, slots, positions, live if layer == last else positions, window, weights)
    merged: dict[tuple, Kernel] = {}
    for kernel in [*found, *_head(cost, batch * live, masked, head)]:
        key = kernel.what, kernel.name, kernel.narrow
        one = merged.get(key, Kernel(*key[:2], 0, 0.0, 0.0, kernel.narrow))
        merged[key] = Kernel(
            *key[:2], one.launches + kernel.launches, one.bytes + kernel.bytes, one.flops + kernel.flops, kernel.narrow
        )
    return list(merged.values())


def _layer(cost, card, batch, slots, positions, queries, window, weights) -> Iterator[Kernel]:
    """A layer's kernels in order. Change this whenever `families/` or the kernels change.

    Of each sequence's ``positions``, ``queries`` need more than keys and values. ModernBERT's first norm is that of the
    embeddings, and its gate always has a kernel of its own.
    """
    from dllm_fast.kernels.attention import _plan

    width, inner, pairs = _width(cost), cost.heads * cost.head_dim, cost.kv_heads * cost.head_dim
    ffn = (cost.rest - 2 * width * inner) // (3 * width)
    every, rows = batch * positions, batch * queries
    yield _norm(cost, every)
    yield from _product("q, k, v", cost, card, every, inner + 2 * pairs, width, weights)
    if not _rotates(cost, every, weights):
        yield Kernel("rope", "_rope_kernel", 1, 2 * every * (inner + 2 * pairs) * cost.item)
    group = cost.heads // cost.kv_heads
    splits = _plan(batch, queries, cost.kv_heads, group, cost.head_dim, slots, window, cost.item, True)[2]
    reached = slots if window is None else min(slots, queries + 2 * window)
    seen_by_each = slots if window is None else min(slots, 2 * window + 1)
    seen, results = 2 * batch * reached * pairs * cost.item, rows * inner
    yield Kernel("attention", "_attention_kernel", 1, seen + 2 * results * cost.item, 4 * results * seen_by_each)
    if splits > 1:
        yield Kernel("merge of attention", "_merge_kernel", 1, results * (splits * FP32 + cost.item))
    yield from _product("attention's output", cost, card, rows, width, inner, weights)
    yield _norm(cost, rows)
    yield from _product("gate, up", cost, card, rows, 2 * ffn, width, weights, gated=not cost.transform)
    if cost.transform or not _streams(cost, rows, weights):
        yield Kernel("gate", "_glu_kernel", 1, 3 * rows * ffn * cost.item)
    yield from _product("down", cost, card, rows, width, ffn, weights)


def _width(cost: Cost) -> int:
    return cost.every // (2 * cost.kv_heads * cost.head_dim)


def _norm(cost: Cost, rows: int) -> Kernel:
    return Kernel(
        "norm", "_norm_kernel", 1, 4 * rows * _width(cost) * cost.item
    )  # reads x and the residual, writes y and the sum


def _streams(cost: Cost, rows: int, weights: str | None) -> bool:
    """Whether our own matmul serves: it has the gate in its epilogue."""
    from dllm_fast.kernels import linear

    return rows <= linear.ROWS and (weights == "int4" or BYTES.get(weights, cost.item) in linear.AHEAD)


def _rotates(cost: Cost, rows: int, weights: str | None) -> bool:
    """Whether the matmul of q, k and v rotates them, too, and writes k and v into the cache."""
    from dllm_fast.kernels.linear_rope import fits_rope

    if not _streams(cost, rows, weights):
        return False
    kind = {"fp8": torch.float8_e4m3fn, "int4": torch.uint8}.get(weights, torch.bfloat16)
    x = torch.empty(rows, 1, device="meta")
    buffer = torch.empty(1, 1, cost.kv_heads, cost.head_dim, device="meta")
    return fits_rope(x, x.to(kind), cos=x, sin=x, position=x, slot=x, keys=buffer, values=buffer)


def _product(
    what: str, cost: Cost, card: Card, rows: int, n: int, k: int, weights: str | None, gated: bool = False
) -> Iterator[Kernel]:
    """``rows`` [rows, k] times a weight [n, k]; ``gated``: our own matmul's gate halves the output channels."""
    weight, activations, flops = n * k * BYTES.get(weights, cost.item), rows * (n + k) * cost.item, 2.0 * rows * n * k
    if _streams(cost, rows, weights):
        name = "_linear_int4_kernel" if weights == "int4" else "_linear_kernel"
        written = rows * n // 2 * cost.item if gated else 0
        yield Kernel(what, name, 1, weight + activations - written, flops)
    elif weights == "fp8":
        yield Kernel("rows to e4m3", "_round_rows_kernel", 1, rows * k * (cost.item + 1))
        yield Kernel(what, "", 1, weight + rows * (k + n * cost.item), flops, narrow=True)
    else:
        if weights == "int4":
            yield Kernel("weights from int4", "_widen_int4_kernel", 1, weight + n * k * cost.item)
        yield Kernel(what, "", 1, n * k * cost.item + activations, flops)
        if (
            n / 64 * max(1, rows / 64) < card.multiprocessors
        ):  # cuBLAS splits K if the tiles would leave multiprocessors idle
            yield Kernel("cuBLAS's sums over K", "splitKreduce", 1, 0)


def _head(cost: Cost, rows: int, masked: int, head: str | None) -> Iterator[Kernel]:
    """From the last norm to commit. The canvas counts no bytes; PyTorch's launches for it and for ModernBERT's GELU are
    not counted."""
    from dllm_fast.kernels.predict import CHUNK_ELEMENTS, CROSSOVER, SELECT

    width = _width(cost)
    vocabulary = cost.head // width
    yield _norm(cost, rows)
    if cost.transform:
        yield Kernel(
            "head's linear", "", 1, (cost.transform + 2 * rows * width) * cost.item, 2.0 * cost.transform * rows
        )
        yield _norm(cost, rows)
    weight = cost.head * BYTES.get(head, cost.item) + (vocabulary * FP32 if head else 0)  # and a scale a row
    read = weight + rows * width * cost.item
    if rows <= CROSSOVER[cost.item]:
        yield Kernel("masked rows", "_compact_kernel", 1, 0)
        yield Kernel("LM head, selection", "_predict_kernel", 1, read, 2.0 * cost.head * masked)
    else:
        tiles = -(-vocabulary // SELECT["BV"])
        chunks = -(-tiles // max(1, CHUNK_ELEMENTS // (rows * SELECT["BV"])))
        logits = rows * vocabulary * FP32
        if head:  # by PyTorch, chunk by chunk
            yield Kernel("LM head from e4m3", "elementwise", chunks, weight + cost.head * cost.item)
            yield Kernel("logits times scales", "elementwise", chunks, 2 * logits)
            read = (cost.head + rows * width) * cost.item
        yield Kernel("LM head", "", chunks, read + logits, 2.0 * cost.head * rows)
        yield Kernel("selection", "_select_kernel", chunks, logits)
    yield Kernel("merge of selection", "_combine_kernel", 1, 0)
    yield Kernel("commit", "_commit_kernel", 1, 0)


def floor(
    cost: Cost, card: Card, batch: int, slots: int, positions: int, live: int, masked: int, weights=None, head=None
) -> float:
    """A lower bound in microseconds: weights, keys and values at the copy rate, or FLOPs at the matrix rate."""
    layers = (cost.every + cost.rest) * len(cost.windows)
    read = cost.bytes(batch, slots, True) + layers * (BYTES.get(weights, cost.item) - cost.item)
    read += cost.head * (BYTES.get(head, cost.item) - cost.item)
    flops = cost.flops(batch * positions, batch * live, masked, slots)
    kernels = step_kernels(cost, card, batch, slots, positions, live, masked, weights, head)
    narrow = sum(kernel.flops for kernel in kernels if kernel.narrow)
    return 1e6 * max(read / card.copy, (flops - narrow) / card.matrix + narrow / card.narrow)


def by_group(kernels: Iterable[Kernel], card: Card) -> Counter:
    """Predicted microseconds by the groups of `bench.generation.breakdown`."""
    found: Counter = Counter()
    for kernel in kernels:
        found[kernel.group] += kernel.microseconds(card)
    return found


def print_beside(measured: dict[str, float], predicted: dict[str, float], unit: str = "us") -> None:
    """Print measured and predicted times of each group of kernels, and their sums."""
    rows = []
    for group in sorted({*measured, *predicted}, key=lambda name: -measured.get(name, 0.0)):
        one, other = measured.get(group, 0.0), predicted.get(group, 0.0)
        rows.append([group, f"{one:.1f}", f"{other:.1f}", f"{one / other:.2f}" if other else ""])
    one, other = sum(measured.values()), sum(predicted.values())
    rows.append(["sum", f"{one:.1f}", f"{other:.1f}", f"{one / other:.2f}" if other else ""])
    print_table(["", f"measured, {unit}", f"predicted, {unit}", "ratio"], rows, "kernels, measured and predicted")


def print_kernels(kernels: list[Kernel], card: Card, least: float, title: str) -> None:
    rows = []
    for kernel in [*kernels, None]:
        some = kernels if kernel is None else [kernel]
        launches, bytes_, flops, us = (
            sum(values)
            for values in zip(*((k.launches, k.bytes, k.flops, k.microseconds(card)) for k in some), strict=True)
        )
        what, name = ("sum", "") if kernel is None else (kernel.what, kernel.name or "cuBLAS")
        rows.append([what, name, str(launches), f"{bytes_ / 1e6:,.1f}", f"{flops / 1e9:,.1f}", f"{us:,.1f}"])
    print_table(["", "kernel", "launches", "MB", "GFLOP", "us"], rows, title)
    print(f"floor {least / 1e3:.2f} ms: weights, keys and values, or FLOPs")


def shape_cost(name: str) -> Cost:
    """The numbers of a shape in `bench.common.SHAPES`, in bf16; holds no weights."""
    with torch.device("meta"):
        model = LLaDAModelLM(LLaDAConfig(**SHAPES[name].config)).to(torch.bfloat16)
    return Cost.of_family(LLaDA(model, "torch"))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="llada-8b")
    parser.add_argument("--copy", type=float, required=True, help="bytes per second, see bench/floors.py")
    parser.add_argument("--matrix", type=float, required=True, help="bf16 FLOPs per second, see bench/floors.py")
    parser.add_argument("--launch", type=float, default=0.0, help="seconds that each launch adds")
    parser.add_argument("--multiprocessors", type=int, default=132)
    parser.add_argument("--weights", choices=list(BYTES))
    parser.add_argument("--head", choices=["fp8"])
    parser.add_argument("--batch", type=int, default=1)
    options = parser.parse_args(arguments)
    card = Card(options.copy, options.matrix, options.launch, options.multiprocessors)
    shape, cost = SHAPES[options.shape], shape_cost(options.shape)
    slots, live = shape.prompt + shape.gen_length, shape.block_length
    for name, positions in (("block", live), ("whole", slots)):
        step = options.batch, slots, positions, live, options.batch * live
        title = f"{options.shape}, a {name} step: {options.batch} x {positions} positions of {slots} slots"
        title += f", {options.weights or 'bf16'} weights, {options.head or 'bf16'} head"
        title += f", {1e6 * card.launch:g} us per launch"
        rounded = options.weights, options.head
        print_kernels(step_kernels(cost, card, *step, *rounded), card, floor(cost, card, *step, *rounded), title)
    return 0


if __name__ == "__main__":
    sys.exit(main())
