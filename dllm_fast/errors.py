"""How every command reports an error: one line instead of a traceback, and an exit code."""

import os
import signal
import sys
from collections.abc import Callable

import torch

BAD = 2  # argparse's exit code too
USERS = (ValueError, OSError, MemoryError, ImportError, torch.OutOfMemoryError)


def exit_code(run: Callable[[], int | None]) -> int:
    """Call ``run`` and return the command's exit code: its result, or 0 for None.

    An error that the user can do something about (a bad value, or a missing file, package or device, or too little
    memory) prints a line ``error: ...`` on standard error and returns 2. Ctrl-C returns 130. A pipe that its reader has
    closed (``| head``) returns 0. Any other error is a bug in the program and keeps its traceback.

    Characters that the terminal's encoding lacks are printed as ``?``.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        code = run() or 0
        sys.stdout.flush()  # now, because a closed pipe cannot be caught once Python is exiting
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
    """Its message on one line, or its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def require_utf8(name: str, text: str) -> str:
    """``text``. Raises ValueError if it holds undecodable bytes, which Python represents as lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{name} is not valid UTF-8") from None
    return text
