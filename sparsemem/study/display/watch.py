"""`sparsemem status --watch` and `--log`: a study from another terminal, by its files alone."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparsemem.config import ConfigError
from sparsemem.locks import is_held
from sparsemem.results import TrialStatus as S
from sparsemem.study.display.progress import (
    LINE_SECONDS,
    REFRESH_SECONDS,
    TrialProgress,
    headline,
    look,
    on_nodes,
    overview,
)
from sparsemem.study.ledger import Ledger
from sparsemem.study.ledger.state import has_heartbeat
from sparsemem.study.text import count, duration

if TYPE_CHECKING:
    from rich.console import RenderableType

ORDER = (S.RUNNING, S.FAILED, S.OUT_OF_MEMORY, S.INTERRUPTED, S.DIVERGED, S.FINISHED, S.PENDING)
COLOURS = {
    S.RUNNING: "cyan",
    S.FAILED: "red",
    S.OUT_OF_MEMORY: "red",
    S.INTERRUPTED: "yellow",
    S.DIVERGED: "yellow",
    S.FINISHED: "green",
}
# lines of a screen that are not trials: headings, the rest in words, a spare one; the headline takes more where it
# wraps
AROUND = 5
BESIDE_LABEL = 52  # characters of the other columns
LEAST_LABEL = 10
NODE = 16


def watch(folder: Path) -> None:
    """Show a study until no process runs it any more: live in a terminal, else a line now and then and the whole table
    at the end.

    One that has not begun is waited for: a driver reads the text before it makes the folder.

    Raises:
        ConfigError: the folder holds something else.
    """
    from rich.console import Console
    from rich.live import Live

    table = folder / "trials.csv"
    if not folder.exists():
        print(f"{folder}: waiting for a study to begin there; Ctrl-C leaves", file=sys.stderr, flush=True)
    while not folder.exists() or (is_held(folder / "lock") and not table.exists()):
        time.sleep(REFRESH_SECONDS)
    console, ledger = Console(), Ledger.read(folder)
    if not console.is_terminal:
        said = 0.0
        while _is_run(ledger):
            if time.monotonic() - said > LINE_SECONDS:
                print(headline(look(ledger)), flush=True)
                said = time.monotonic()
            time.sleep(REFRESH_SECONDS)
        print(overview(look(Ledger.read(folder))))
        return
    read = table.stat().st_mtime_ns
    with Live(console=console, auto_refresh=False) as live:
        while True:
            if table.stat().st_mtime_ns != read:  # a run with an edited study plans other trials
                ledger, read = Ledger.read(folder), table.stat().st_mtime_ns
            runs = _is_run(ledger)
            live.update(render(look(ledger), console.width, console.height, ledger.most_trials), refresh=True)
            if not runs:
                return
            time.sleep(REFRESH_SECONDS)


def _is_run(ledger: Ledger) -> bool:
    """Whether a driver holds the study, or a worker that outlived its driver a trial."""
    return (
        is_held(ledger.folder / "lock")
        or has_heartbeat(ledger.folder / "driver.json")
        or ledger.counts()[S.RUNNING] > 0
    )


def render(trials: Sequence[TrialProgress], width: int, height: int, most: int | None = None) -> RenderableType:
    """The headline and as many trials as fit the screen, those first that something is to be known of."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    above = headline(trials, most=most)
    ordered = sorted(
        trials, key=lambda trial: (ORDER.index(trial.status) if trial.status in ORDER else 0, trial.loss or 0.0)
    )
    fit = max(1, height - AROUND - len(above) // width - sum(bool(trial.message) for trial in trials))
    shown, left = ordered[:fit], Counter(trial.status for trial in ordered[fit:])
    grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    nodes = on_nodes(trials)
    for name in ("state", "trial", *(("node",) if nodes else ()), "done", "tokens/s", "left", "val loss"):
        grid.add_column(name, justify="left" if name in ("state", "trial", "node") else "right", no_wrap=True)
    for trial in shown:
        rate = trial.tokens_per_second
        grid.add_row(
            Text(trial.status, style=COLOURS.get(trial.status, "")),
            _cut(f"{trial.trial_id[:6]}  {trial.label}", max(LEAST_LABEL, width - BESIDE_LABEL - (NODE + 2) * nodes)),
            *((_cut(trial.node, NODE),) if nodes else ()),
            f"{trial.tokens_done / trial.tokens:.0%}",
            count(rate) if rate else "",
            duration((trial.tokens - trial.tokens_done) / rate) if rate else "",
            f"{trial.loss:.4f}" if trial.loss is not None else "",
        )
    below = [
        f"{trial.trial_id[:6]} {trial.status}: {trial.message.splitlines()[0]}" for trial in shown if trial.message
    ]
    if left:
        below.append(f"and {left.total()} more: {', '.join(f'{number} {status}' for status, number in left.items())}")
    return Group(Text(above, style="bold"), grid, *(Text(_cut(line, width)) for line in below))


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def trial_log(folder: Path, trial_id: str) -> str:
    """What a trial's process said, and why it failed; '' where nothing is kept.

    Raises:
        ConfigError: the study, and its tuning, have no such trial; the beginning of an id will do if it is the only
            one.
    """
    ledgers = (Ledger(folder, []), Ledger(folder / "tune", []))
    known = [(ledger, id_) for ledger in ledgers for id_ in ledger.files.begun() if id_.startswith(trial_id)]
    if not known:
        raise ConfigError(f"{folder}: has no trial {trial_id!r} that was begun; `sparsemem status {folder}` lists them")
    if len(known) > 1:
        raise ConfigError(
            f"{folder}: {trial_id!r} begins the ids of {', '.join(id_ for _, id_ in known)}; give more of one"
        )
    ((ledger, id_),) = known
    trial, parts = ledger.trial_folder(id_), []
    if why := ledger.state(id_).result.get("why"):
        parts.append(f"diverged: {why}")
    try:
        failure = json.loads((trial / "failure.json").read_text(encoding="utf-8"))
        parts.append(f"{failure['status']}: {failure['message']}\n{failure['traceback']}".rstrip())
    except (OSError, ValueError, TypeError, KeyError):
        pass  # it did not fail, or is about to leave word of it
    if (trial / "log.txt").exists():
        parts.append((trial / "log.txt").read_text(encoding="utf-8", errors="replace").rstrip())
    return "\n\n".join(filter(None, parts))
