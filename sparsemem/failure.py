"""The last word of a trial that did not end well: `failure.json` in its folder, left by the trial itself or by what ran
it.
"""

from __future__ import annotations

import os
import re
import socket
import sys
from pathlib import Path

from sparsemem.files import or_warn, write_json
from sparsemem.results import TrialStatus

_IP6 = r"(?:(?:[0-9a-fA-F]{1,4}:){7}[0-9a-fA-F]{1,4}|[0-9a-fA-F:]*::[0-9a-fA-F:]*)"
_MACHINE = (
    (re.compile(r"""(?<=["'`])/[^"'`\n]*/(?=[^"'`\n/]+["'`])"""), ".../"),  # the folders of a path between quotes
    (re.compile(r"""(?:(?<![\w/.:*])|(?<=file://))/(?:[^\s"'`:,;()/]+/)+"""), ".../"),
    (re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?!\w|\.\d)"), "an address"),
    (re.compile(rf"(?<![\w:])(?=[a-fA-F:]*\d){_IP6}(?![\w:])"), "an address"),
    (
        re.compile(r"\b[0-9a-f]{28,}\b"),
        "an id",
    ),  # of a node, a process or a job of Ray's; those of trials and texts are shorter
    (re.compile(r"\b(pid|process(?: id)?)[ =:]+\d+\b", re.IGNORECASE), r"\1"),
)


def record_failure(
    trial_folder: Path,
    message: str,
    status: TrialStatus = TrialStatus.FAILED,
    traceback: str = "",
    *,
    unless_known: bool = False,
) -> None:
    """Leave word of what went wrong; where that is impossible too, say so on stderr. Other trials go on.

    Args:
        status: `failed`, `out_of_memory`, `interrupted` or `pruned`.
        unless_known: keep a word that is there already, which was nearer to the cause.
    """

    def write() -> None:
        path = trial_folder / "failure.json"
        if not (unless_known and path.exists()):
            write_json(path, {"status": status, "message": impersonal(message), "traceback": impersonal(traceback)})

    or_warn(write)


def impersonal(text: str) -> str:
    """A text of any library's without what tells of this machine: folders, addresses, long ids, process numbers and its
    name.

    >>> impersonal("No space left on device: '/home/ann/runs/tiny/curve.csv' (node 10.1.2.3, pid=4711)")
    "No space left on device: '.../curve.csv' (node an address, pid)"
    """
    for place in sorted({path for path in sys.path if len(path) > 1}, key=len, reverse=True):  # a module keeps its name
        text = text.replace(f"{place}{os.sep}", "")
    for pattern, instead in _MACHINE:
        text = pattern.sub(instead, text)
    host = socket.gethostname()
    return (
        text if host in ("", "localhost") else re.sub(rf"(?<![\w.-]){re.escape(host)}(?![\w-])", "this machine", text)
    )
