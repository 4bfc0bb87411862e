"""`warmup`: what the first calls of `generate` and `generate_many` would have to wait for, done beforehand."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator

import torch

from dllm_fast.decoding.compiling import kernels, side_by_side
from dllm_fast.decoding.device import on_host
from dllm_fast.decoding.engine import RESUME, Engine
from dllm_fast.decoding.graphs import records
from dllm_fast.decoding.options import Options
from dllm_fast.decoding.request import Row, plan_row
from dllm_fast.decoding.server import Server, rounded_up
from dllm_fast.decoding.steps import Step, Steps
from dllm_fast.decoding.values import require, whole
from dllm_fast.families.bypass import unwrapped
from dllm_fast.patch import bound_family, bound_pool

Plan = list[tuple[str, int]]  # the kind of a step, and the number of a block that has it
MIXED = "mixed"  # the kind of a step at which rows differ, which is never recorded
Report = Callable[[str, int, int], None]


def warmup(
    model: torch.nn.Module,
    prompt_lengths: int | Iterable[int],
    batch_size: int = 1,
    progress: bool | Report = True,
    **options,
) -> None:
    """Compile and record what calls of these options need, so that the first of them is as fast as the others.

    On a GPU: the kernels that Triton has not compiled yet, side by side in threads, then a CUDA graph of each kind of
    step, for each length of prompts rounded up to 64 positions, and for ``batch_size`` rows and the halves of it that
    remain as rows finish. A call of the same options and of prompts of these lengths then compiles and records
    nothing. The model keeps its recordings within a share of the GPU's memory (`Pool.SHARE`), those of the longest
    prompts if not all fit. On a CPU one step of each kind runs, which makes what a first step needs: the table of
    `matmuls`, rotary tables, what libraries set up.

    Nothing is generated, and no random number is drawn.

    Args:
        model: a patched model.
        prompt_lengths: tokens of the prompts to come, an int or several; without padding.
        batch_size: rows of `generate`'s batches; or `generate_many`'s ``batch_size``, or its prompts if they are fewer.
        progress: True shows a bar on stderr, rich's where rich is installed and the terminal is one, else a line; a
            callable is given (what is being done, steps done, steps in all); False is silent.
        options: those of `generate_many`: ``gen_length``, ``block_length``, ``schedule``, ``cache``, ``refresh``,
            ``temperature`` and so on, as in the calls to come. ``seed``, ``eos_id`` and ``pad_id`` may differ there.

    Raises:
        ValueError: as `generate_many`, or ``prompt_lengths`` holds something other than numbers from 1 up.
        MemoryError: a batch of these does not fit what memory the device has left.
    """
    family, model = bound_family(model), unwrapped(model)
    lengths = list(prompt_lengths) if isinstance(prompt_lengths, Iterable) else [prompt_lengths]
    if family.ranks is not None:
        family.ranks.require_same(options, batch_size, lengths)
    given = {**options, "seed": options.get("seed") or 0}  # drawn where it is None
    asked = Options.of_call("warmup", given, family.block).resolved(model, family)
    require(asked.gen_length > 0, f"gen_length={asked.gen_length}: there is nothing to fill")
    batch_size = whole("batch_size", batch_size)
    lengths = _lengths(lengths)
    word = int(asked.mask_id == 0)  # an id that is not [MASK]
    recorded = records(family.head()[0].device, family.impl)
    block = family.block if family.after_prompt and family.block else 1  # what an answer is filled up to
    answer = -(-asked.gen_length // block) * block
    batches = [
        [plan_row(asked, family, n, [word] * length, "prompt_lengths") for n in range(seats)]
        for length in (_representatives(lengths, answer) if recorded else lengths[-1:])
        for seats in (_halves(batch_size) if recorded else [batch_size])
    ]
    plans = [_plan(asked, rows, family.shifted) for rows in batches]
    total, before = sum(len(plan) + 1 for plan in plans), 0
    with _reporting(progress) as report:
        for rows, plan in zip(batches, plans, strict=True):
            work = _Work(plan, report, before, total)
            before += len(plan) + 1
            with Server(model, family, bound_pool(model), asked, rows, len(rows)).seated_engine() as engine:
                work.compile(engine, rows)
                work.take(engine, rows)


def _lengths(lengths: list[int]) -> list[int]:
    """Sorted, each once."""
    require(bool(lengths), "prompt_lengths: there are none")
    return sorted({whole("prompt_lengths", length) for length in lengths})


def _representatives(lengths: list[int], gen_length: int) -> list[int]:
    """A length for each recording: of those that share an engine the longest, and where that fills the engine's slots,
    so that attention may have no range to mind, another too."""
    engines: dict[int, list[int]] = {}
    for length in lengths:
        engines.setdefault(rounded_up(length + gen_length), []).append(length)
    found = []
    for slots, shared in engines.items():
        padded = len(shared) > 1 and shared[-1] + gen_length == slots
        found += [shared[0], shared[-1]] if padded else shared[-1:]
    return found


def _halves(seats: int) -> list[int]:
    """``seats`` and what `Server` makes of it as rows leave, the fewest first."""
    found = [seats]
    while found[-1] > 1:
        found.append(found[-1] // 2)
    return found[::-1]


def _plan(options: Options, rows: list[Row], shifted: bool = False) -> Plan:
    """Every step that blocks of these rows, all alike, can have, once. What is not recorded comes last."""
    row, refresh = rows[0], options.refresh
    found: dict[Step, tuple[str, int]] = {}
    # The steps of a pipeline are those of its first block.
    for number, (first, _) in enumerate(row.blocks if options.pipeline is None else row.blocks[:1]):
        steps = Steps.of(options, len(row.ids), max(0, first), max(0, first), shifted=shifted)
        if not options.has_cache or refresh.full(number):
            found.setdefault(steps.full, ("full", number))
        elif not refresh.layerwise:
            found.setdefault(steps.window, ("window", number))
        found.setdefault(steps.block, ("block", number))  # without a cache or drafts it is the full one
    plan = list(found.values())
    mixes = len(rows) > 1 and options.pipeline is None
    if options.has_cache and (mixes or refresh.layerwise):
        plan.append((MIXED, len(row.blocks) - 1))
    return plan


@dataclasses.dataclass
class _Work:
    """The steps of one engine, reported one by one after those ``before`` it."""

    plan: Plan
    report: Report
    before: int
    total: int

    def compile(self, engine: Engine, rows: list[Row]) -> None:
        """Compile the kernels of every step side by side. Nothing else comes of it."""
        self._say("compiling", engine, 0)
        if engine.family.impl != "triton" or not kernels():
            return
        recording, options = engine.graphs.enabled, engine.options
        # A remask looks up words that are not there, as no kernel is launched; it launches none of its own.
        engine.graphs.enabled, engine.options = False, dataclasses.replace(options, remask=None)
        try:
            with side_by_side():
                for kind, number in self.plan:
                    _take(engine, rows[0], kind, number)
        finally:
            engine.graphs.enabled, engine.options = recording, options
            engine.load(rows)

    def take(self, engine: Engine, rows: list[Row]) -> None:
        """Take every step: on a GPU twice, as the second time is recorded."""
        for done, (kind, number) in enumerate(self.plan, 1):
            self._say(f"{'recording' if engine.graphs.enabled else 'taking'} {kind} steps", engine, done)
            for _ in range(2 if engine.graphs.enabled and kind != MIXED else 1):
                _take(engine, rows[0], kind, number)

    def _say(self, what: str, engine: Engine, done: int) -> None:
        self.report(f"{what}, {engine.rows} x {engine.slots}", self.before + done, self.total)


def _take(engine: Engine, row: Row, kind: str, number: int) -> None:
    """A step of block ``number`` of rows like ``row``, which counts for none of them."""
    slot = row.slot(engine.slots, number)
    steps = engine.prepare(on_host([slot] * engine.rows), on_host([number] * engine.rows))
    engine.quota.zero_()
    engine.step.zero_()
    nobody = on_host([False] * engine.rows, torch.bool)
    if kind != MIXED:
        for drafting in engine.draftings:
            engine.drafting = drafting
            for step in engine.recorded(getattr(steps, kind)):
                engine.take(step)
        if kind == "block" and engine.looks_ahead:
            engine.graphs.run(RESUME, engine.resume)
        return
    one = nobody.clone()
    one[0] = True
    whole = on_host([engine.block_size] * engine.rows)
    if engine.rows > 1:
        engine.take_mixed_step(steps, ~nobody, one, ~nobody, whole)
    if not engine.options.refresh.full(1):
        engine.take_mixed_step(steps, ~nobody, one, nobody, whole)


@contextlib.contextmanager
def _reporting(progress: bool | Report) -> Iterator[Report]:
    if progress is not True:
        yield progress or (lambda what, done, total: None)
        return
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield _line
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _line
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("warmup")
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def _line(what: str, done: int, total: int) -> None:
    print(f"warmup {done}/{total}: {what}", file=sys.stderr, flush=True)
