"""Watching a sequence un-mask: live with rich on a terminal, a few plain lines elsewhere."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from dllm_fast.decoding.request import before_end

HIDDEN = "░"


def spans(tokenizer, ids: list[int], mask_id: int, new: set[int]) -> list[tuple[str, str]]:
    """(text, kind) of runs of ids, kind "mask", "new" (positions just committed) or "text".

    A run is decoded whole: single ids of a byte-level vocabulary need not be characters.
    """
    kinds = ["mask" if i == mask_id else "new" if at in new else "text" for at, i in enumerate(ids)]
    runs, begin = [], 0
    for at in range(1, len(ids) + 1):
        if at == len(ids) or kinds[at] != kinds[begin]:
            text = HIDDEN * (at - begin) if kinds[begin] == "mask" else tokenizer.decode(ids[begin:at])
            runs.append((text, kinds[begin]))
            begin = at
    return runs


class Plain:
    """A `generate` streamer that prints the sequence each time another quarter of it is known.

    Nothing is shown from the first of ``eos_ids`` on: it is dropped when the row is finished.
    """

    def __init__(self, tokenizer, mask_id: int, eos_ids: Sequence[int] = ()):
        self.tokenizer, self.mask_id, self.eos_ids = tokenizer, mask_id, eos_ids
        self.total, self.printed, self.last = 0, -1, ""

    def put(self, value: torch.Tensor) -> None:
        pass

    def put_draft(self, value: torch.Tensor, sequence: torch.Tensor) -> None:
        hidden = sequence.tolist().count(self.mask_id)
        self.total = max(self.total, hidden + 1)
        quarter = 4 * (self.total - hidden) // self.total
        shown = before_end(sequence.tolist(), self.eos_ids)
        text = "".join(text for text, _ in spans(self.tokenizer, shown, self.mask_id, set()))
        if (quarter > self.printed or hidden == 0) and text != self.last:
            self.printed, self.last = quarter, text
            print(f"{self.total - hidden:>4} known | {' '.join(text.split())}")

    def end(self) -> None:
        pass


class Live:
    """A `generate` streamer that redraws the sequence, up to the first of ``eos_ids``, after each step.

    New tokens are green for one step.
    """

    def __init__(self, tokenizer, mask_id: int, console, title: str = "", eos_ids: Sequence[int] = ()):
        from rich.live import Live as RichLive

        self.tokenizer, self.mask_id, self.title, self.eos_ids = tokenizer, mask_id, title, eos_ids
        self.before: list[int] = []
        self.step = 0
        self.live = RichLive(console=console, refresh_per_second=24, transient=False)
        self.live.start()

    def put(self, value: torch.Tensor) -> None:
        pass

    def put_draft(self, value: torch.Tensor, sequence: torch.Tensor) -> None:
        ids = before_end(sequence.tolist(), self.eos_ids)
        new = {at for at, (old, now) in enumerate(zip(self.before, ids)) if old == self.mask_id != now}
        self.before, self.step = ids, self.step + 1
        self._draw(ids, new)

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
    tokenizer, mask_id: int, plain: bool = False, title: str = "", eos_ids: Sequence[int] = ()
) -> Iterator[Live | Plain]:
    """A streamer: `Live` where rich is installed and standard output is a terminal, else `Plain`.

    Leaving the block, by an interrupt too, gives the terminal its cursor back.
    """
    if plain or not sys.stdout.isatty():
        yield Plain(tokenizer, mask_id, eos_ids)
        return
    try:
        from rich.console import Console
    except ImportError:
        yield Plain(tokenizer, mask_id, eos_ids)
        return
    streamer = Live(tokenizer, mask_id, Console(), title, eos_ids)
    try:
        yield streamer
    finally:
        streamer.live.stop()


def print_table(columns: list[str], rows: list[list[str]], title: str) -> None:
    """With rich where it is installed; aligned text elsewhere."""
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
