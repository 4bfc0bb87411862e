"""Folders and files that have their names only once they are whole: a kill or a full disk costs no older one."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

STAGE = "unfinished"  # of a run's folder: what is still being written, and what is left of a run that was killed


def stage(out: Path) -> Path:
    """An empty folder inside ``out``, to write in. Whatever a killed run has left there is deleted."""
    shutil.rmtree(out / STAGE, ignore_errors=True)
    (out / STAGE).mkdir(parents=True)
    return out / STAGE


def publish(made: Path, target: Path) -> None:
    """Rename a staged file or folder to ``target``, once its bytes are on the disk."""
    for path in [*made.rglob("*"), made]:
        _sync(path)
    if target.is_dir():  # a rename replaces no folder that holds something
        target.rename(made.parent / f"replaced-{target.name}")
    made.rename(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows opens no folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rotate(out: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints above ``limit``, but never the last one or ``best``."""
    steps = sorted(int(path.name[11:]) for path in out.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name))
    for step in steps[: -max(1, limit)] if limit else ():
        if best is None or Path(best).name != f"checkpoint-{step}":
            shutil.rmtree(out / f"checkpoint-{step}")


@contextlib.contextmanager
def writing(what: str, out: Path) -> Iterator[None]:
    """Raises OSError, which names ``what``, ``out`` and the reason, if the disk refuses a file within."""
    try:
        yield
    except Exception as error:
        # safetensors and torch.save have errors of their own for a full disk.
        writer = any(name in str(error) for name in ("PytorchStreamWriter", "inline_container", "iostream"))
        refused = isinstance(error, OSError | SafetensorError) or writer
        if not refused or isinstance(error, BrokenPipeError):
            raise
        shutil.rmtree(out / STAGE, ignore_errors=True)
        free = shutil.disk_usage(out).free / 2**20
        reason = str(error).strip().splitlines()[0]
        raise OSError(
            f"{what} could not be written to {out}, which has {free:.0f} MiB free ({reason}); "
            "what was saved before is whole: make room and continue with --resume"
        ) from error
