"""Shows a sequence as it un-masks: live with rich on a terminal, as a few plain lines elsewhere."""

import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from dllm_fast.decoding.request import before_end

HIDDEN = "░"


def spans(tokenizer, ids: list[int], mask_id: int, new: set[int]) -> list[tuple[str, str]]:
    """(text, kind) of each run of ids of one kind: "mask", "new" (positions just committed) or "text".

    A run is decoded as a whole, because one id of a byte-level vocabulary may be only part of a character.
    """
    kinds = ["mask" if i == mask_id else "new" if position in new else "text" for position, i in enumerate(ids)]
    runs = []
    begin = 0
    for kind, group in itertools.groupby(kinds):
        end = begin + len(list(group))
        runs.append((HIDDEN * (end - begin) if kind == "mask" else tokenizer.decode(ids[begin:end]), kind))
        begin = end
    return runs


class Plain:
    """A `generate` streamer that prints the sequence each time another quarter of it is known.

    Nothing is shown from the first of ``eos_ids``, since `generate` drops what follows it.
    """

    def __init__(self, tokenizer, mask_id: int, eos_ids: Sequence[int] = ()):
        self.tokenizer = tokenizer
        self.mask_id = mask_id
        self.eos_ids = eos_ids
        self.total = 0
        self.quarter = -1  # the last one printed
        self.text = ""  # likewise

    def put(self, value: torch.Tensor) -> None:
        pass

    def put_draft(self, value: torch.Tensor, sequence: torch.Tensor) -> None:
        hidden = sequence.tolist().count(self.mask_id)
        self.total = max(self.total, hidden + 1)
        quarter = 4 * (self.total - hidden) // self.total
        shown = before_end(sequence.tolist(), self.eos_ids)
        text = "".join(text for text, _ in spans(self.tokenizer, shown, self.mask_id, set()))
        if (quarter > self.quarter or hidden == 0) and text != self.text:
            self.quarter = quarter
            self.text = text
            print(f"{hidden:>4} masked | {' '.join(text.split())}")

    def end(self) -> None:
        pass


class Live:
    """A `generate` streamer that redraws the sequence after each step, up to the first of ``eos_ids``.

    Newly committed tokens are green for one step.
    """

    def __init__(
        self, tokenizer, mask_id: int, console, title: str = "", eos_ids: Sequence[int] = (), pause: float = 0.0
    ):
        from rich.live import Live as RichLive

        self.tokenizer = tokenizer
        self.mask_id = mask_id
        self.title = title
        self.eos_ids = eos_ids
        self.pause = pause
        self.before: list[int] = []
        self.step = 0
        self.live = RichLive(console=console, refresh_per_second=24, transient=False)
        self.live.start()

    def put(self, value: torch.Tensor) -> None:
        pass

    def put_draft(self, value: torch.Tensor, sequence: torch.Tensor) -> None:
        ids = before_end(sequence.tolist(), self.eos_ids)
        new = {i for i, (before, now) in enumerate(zip(self.before, ids)) if before == self.mask_id != now}
        self.before = ids
        self.step += 1
        self._draw(ids, new)
        time.sleep(self.pause)

    def end(self) -> None:
        self._draw(self.before, set())
        self.live.stop()

    def _draw(self, ids: list[int], new: set[int]) -> None:
        from rich.panel import Panel
        from rich.text import Text

        text = Text()
        styles = {"mask": "dim", "new": "bold green", "text": ""}
        for run, kind in spans(self.tokenizer, ids, self.mask_id, new):
            text.append(run, style=styles[kind])
        hidden = ids.count(self.mask_id)
        self.live.update(Panel(text, title=self.title, subtitle=f"step {self.step}, {hidden} masked", width=100))


@contextmanager
def watching(
    tokenizer, mask_id: int, plain: bool = False, title: str = "", eos_ids: Sequence[int] = (), pause: float = 0.0
) -> Iterator[Live | Plain]:
    """A streamer: `Live` if rich is installed and standard output is a terminal, else `Plain`.

    ``pause``: seconds that `Live` shows each step.
    Leaving the block restores the terminal's cursor, even after an interrupt.
    """
    if plain or not sys.stdout.isatty():
        yield Plain(tokenizer, mask_id, eos_ids)
        return
    try:
        from rich.console import Console
    except ImportError:
        yield Plain(tokenizer, mask_id, eos_ids)
        return
    streamer = Live(tokenizer, mask_id, Console(), title, eos_ids, pause)
    try:
        yield streamer
    finally:
        streamer.live.stop()


def print_table(columns: list[str], rows: list[list[str]], title: str) -> None:
    """Print with rich if it is installed, else as aligned text."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
        print(title)
        for row in [columns, *rows]:
            print("  ".join(cell.rjust(width) for cell, width in zip(row, widths)))
        return
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < 2 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
