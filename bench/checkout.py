"""The commit that a result was measured at."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent


def commit(digits: int = 7) -> str:
    """The checkout's commit, with a "+" if it has changes outside the results; without git, $COMMIT or "unknown"."""
    head = _git("rev-parse", f"--short={digits}", "HEAD")
    if not head:
        return os.environ.get("COMMIT", "unknown")
    return head + "+" * bool(_git("status", "--porcelain", "--", ".", ":!bench/results"))


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
