"""Whether the compiled extension is of the sources that lie here: one that a `git pull` has left behind gets other
arguments than it knows, and gives wrong results.
"""

import ctypes
import hashlib
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cpu"  # of a checkout; an installed package has none


def require_current(library: ctypes.CDLL, name: str) -> None:
    """Raise ImportError if ``library``, the file ``name``, was built from others than `SOURCES`, as setup.py hashes
    them."""
    if not SOURCES.is_dir():
        return
    tell, found = getattr(library, "dllm_sources", None), ""
    if tell is not None:
        tell.restype = ctypes.c_char_p
        found = tell().decode()
    expected = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(SOURCES.iterdir()))).hexdigest()
    if found != expected:
        raise ImportError(f"{name} was built from other files than those of {SOURCES}; `pip install -e .` builds it")
