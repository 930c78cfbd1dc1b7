"""What a study's folder says of its making: the study as it was run, its texts and the versions of what ran it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sparsemem.checkout import checkout
from sparsemem.config import Data, Study


def study_fields(study: Study) -> dict[str, Any]:
    """A study's fields as its file holds them, what `tuned` names included: `load_study` reads the same study again."""
    written = json.loads(json.dumps(study.model_dump(mode="json")))
    vary = written["vary"]
    kept = {
        "study": written["study"],
        "question": written["question"],
        "analysis": written["analysis"],
        **written["base"],
    }
    kept |= {"vary": vary[0] if len(vary) == 1 else vary, "run": written["run"]}
    return kept | {name: written[name] for name in ("tune", "tuned") if written[name]}


def data_id(data: Data) -> str:
    """Names a way of preparing text, so that trials that vary `data` can be told apart by it."""
    return hashlib.sha256(data.model_dump_json(exclude=data.unnamed).encode()).hexdigest()[:12]


def versions() -> dict[str, Any]:
    """What the numbers were made with. No host names, no paths, nothing of the environment's variables."""
    commit, dirty = checkout()
    return {
        "sparsemem": _version("sparsemem"),
        "python": platform.python_version(),
        "torch": _version("torch"),
        "ray": _version("ray"),
        "platform": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
        "git_commit": commit,
        "git_dirty": dirty,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
