"""What every command line ends in: one line for a user, where Python would print a traceback, and an exit code."""

import os
import signal
import sys
from collections.abc import Callable

import torch

BAD = 2  # as argparse has it
USERS = (ValueError, OSError, MemoryError, ImportError, torch.OutOfMemoryError)


def exit_code(run: Callable[[], int | None]) -> int:
    """What ``run`` returns, or 0 for None.

    2, and a line ``error: ...`` on standard error, for an error that a user can do something about: a bad value, or a
    file, memory, a package or a device that is not there. 130 for Ctrl-C. 0 where the reader of a pipe has closed it
    (``| head``). Any other error is the program's own, and keeps its traceback.

    What a terminal's encoding cannot show is printed as ``?``.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        code = run() or 0
        sys.stdout.flush()  # here, not as Python ends, where a closed pipe could no longer be caught
        return code
    except BrokenPipeError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        if not isinstance(error, USERS) and "can't allocate memory" not in str(error):
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        return BAD


def one_line(error: BaseException) -> str:
    """Its message, lines joined; its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def require_utf8(name: str, text: str) -> str:
    """``text``, or ValueError if it holds bytes that could not be decoded, which Python keeps as lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{name} is not valid UTF-8") from None
    return text
