"""Which version of this package numbers were made with."""

from __future__ import annotations

import subprocess
from pathlib import Path


def checkout() -> tuple[str | None, bool | None]:
    """Commit of this package's checkout, and whether its tracked files but results, or its code, differ from it; None
    outside of one.
    """
    here = Path(__file__).resolve().parents[1]
    if not (here / ".git").exists():
        return None, None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        tracked = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)results")
        return git("rev-parse", "HEAD"), bool(tracked or git("status", "--porcelain", "--", "sparsemem", "analysis"))
    except (OSError, subprocess.SubprocessError):
        return None, None
