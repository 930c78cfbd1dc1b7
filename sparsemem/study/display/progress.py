"""How far a study is, read from its ledger's files alone: the same lines for both engines and for
`sparsemem status`.
"""

from __future__ import annotations

import csv
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from sparsemem.results import COLUMNS, FINAL, TrialStatus
from sparsemem.study.ledger import Ledger
from sparsemem.study.plan import START_SECONDS
from sparsemem.study.text import count, duration, table

if TYPE_CHECKING:
    from rich.console import RenderableType

REFRESH_SECONDS = 0.5
LINE_SECONDS = 15.0
OWN_SHARE = 0.02  # of a processor core that the display may take: with thousands of trials it is drawn less often
BAR_WIDTH = 24
SHOWN_TRIALS = 16  # bars of running trials at most; more do not fit a terminal


@dataclass(frozen=True)
class TrialProgress:
    """One trial as its last files show it."""

    trial_id: str
    label: str
    """What distinguishes it in its study, such as `rho 0.75, seed 1`."""
    status: TrialStatus
    message: str
    tokens_done: int
    tokens: int
    flops_per_token: float
    speed: float
    """FLOP/s of its training steps on average; 0 before its first row."""
    tokens_per_second: float
    """At the moment, of a running trial; 0 before its first row."""
    loss: float | None
    """Validation loss, nats per token: the result, or the last one so far."""
    core_seconds: float
    """Of training, on all its processor cores together."""
    node: str = ""
    """Where a running trial is."""


def look(ledger: Ledger) -> list[TrialProgress]:
    """Every planned trial, in the order of the plan."""
    axes = axes_of(ledger.rows)
    found = []
    for row in ledger.rows:
        state = ledger.state(row["trial_id"])
        curve = [] if state.status in (TrialStatus.PENDING, *FINAL) else _curve(ledger, row["trial_id"])
        last: Mapping[str, Any] = curve[-1] if curve else state.result
        done, seconds = int(last.get("tokens") or 0), float(last.get("seconds") or 0)
        losses = [line["val_loss"] for line in curve if line.get("val_loss")]
        flops = float(row["flops_per_token_head"])
        found.append(
            TrialProgress(
                trial_id=row["trial_id"],
                label=label(row, axes),
                status=state.status,
                message=state.message,
                tokens_done=done,
                tokens=int(row["tokens"]),
                flops_per_token=flops,
                speed=done * flops / seconds if seconds else 0.0,
                tokens_per_second=float(last.get("tokens_per_second") or 0)
                if state.status == TrialStatus.RUNNING
                else 0.0,
                loss=state.result.get("val_loss") if state.status in FINAL else float(losses[-1]) if losses else None,
                core_seconds=seconds * int(state.result.get("threads") or ledger.cpus_per_trial),
                node=ledger.node(row["trial_id"]) if state.status == TrialStatus.RUNNING else "",
            )
        )
    return found


def on_nodes(trials: Sequence[TrialProgress]) -> bool:
    """Whether trials are running on more than one node, so that it is worth saying which."""
    return len({trial.node for trial in trials if trial.node}) > 1


def axes_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Columns that tell the trials of a study apart: rho, seed and whatever else it varies."""
    names = [
        "rho",
        "seed",
        *(name for name in rows[0] if name not in COLUMNS and not name.startswith(("share_", "tuned."))),
    ]
    return [name for name in names if len({str(row[name]) for row in rows}) > 1] or ["rho", "seed"]


def label(row: Mapping[str, Any], axes: Sequence[str]) -> str:
    return ", ".join(f"{axis.rpartition('.')[2]} {shown(axis, row[axis])}" for axis in axes)


def shown(axis: str, value: Any) -> str:
    """A varied value for people; a study without a share is the dense baseline."""
    if value in (None, ""):
        return "dense" if axis == "rho" else "-"
    return f"{value}"


def _curve(ledger: Ledger, trial_id: str) -> list[dict[str, str]]:
    try:
        return list(csv.DictReader(ledger.files.read(trial_id, "curve.csv").decode().splitlines()))
    except OSError:
        return []


# --- in one line ------------------------------------------------------------------------------------------------------


def headline(trials: Sequence[TrialProgress], slots: int = 0, most: int | None = None) -> str:
    """Counts, speed, time left, cost and the best so far.

    Args:
        slots: trials at once; by default as many as are running.
        most: `Ledger.most_trials`; the time left is that of the trials asked for so far.
    """
    statuses = [trial.status for trial in trials]
    done, running = sum(status in FINAL for status in statuses), statuses.count(TrialStatus.RUNNING)
    more = f" (of at most {most})" if most and done < len(trials) < most else ""
    parts = [f"{done} of {len(trials)} trials{more} done", f"{running} running", f"{len(trials) - done - running} left"]
    parts += [
        f"{statuses.count(status)} {status}"
        for status in (TrialStatus.DIVERGED, TrialStatus.FAILED, TrialStatus.OUT_OF_MEMORY)
        if status in statuses
    ]
    if rate := sum(trial.tokens_per_second for trial in trials):
        parts.append(f"{count(rate)} tokens/s")
    if (left := seconds_left(trials, slots or running)) is not None:
        parts.append(f"about {duration(left)} left")
    if cost := sum(trial.core_seconds for trial in trials):
        parts.append(f"{cost / 3600:.3g} core-hours")
    finished = [trial for trial in trials if trial.status == TrialStatus.FINISHED and trial.loss is not None]
    if finished:
        best = min(finished, key=lambda trial: trial.loss or 0.0)
        parts.append(f"best single run {best.loss:.4f} nats ({best.label})")
    return " · ".join(parts)


def seconds_left(trials: Sequence[TrialProgress], slots: int) -> float | None:
    """Work left at the mean speed of the trials so far, and the starts of those to come; None while that is unknown."""
    ahead = [trial for trial in trials if trial.status not in FINAL]
    speeds = [trial.speed for trial in trials if trial.speed]
    if not ahead or not speeds or not slots:
        return None
    work = sum((trial.tokens - trial.tokens_done) * trial.flops_per_token for trial in ahead)
    starts = sum(trial.status != TrialStatus.RUNNING for trial in ahead) * START_SECONDS
    return (work * len(speeds) / sum(speeds) + starts) / min(slots, len(ahead))


# --- live -------------------------------------------------------------------------------------------------------------


class Progress:
    """Shows a study's progress on stderr while its body runs: live in a terminal, else a line now and then."""

    def __init__(self, ledger: Ledger, slots: int) -> None:
        self._ledger, self._slots = ledger, slots
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._show, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def _show(self) -> None:
        from rich.console import Console
        from rich.live import Live

        console, spent = Console(file=sys.stderr), 0.0
        if not console.is_terminal:
            while not self._ended.wait(LINE_SECONDS):
                print(headline(look(self._ledger), self._slots, self._ledger.most_trials), file=sys.stderr, flush=True)
            print(headline(look(self._ledger), self._slots, self._ledger.most_trials), file=sys.stderr, flush=True)
            return
        with Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False) as live:
            while not self._ended.wait(max(REFRESH_SECONDS, spent / OWN_SHARE)):
                start = time.perf_counter()
                live.update(_render(look(self._ledger), self._slots, self._ledger.most_trials), refresh=True)
                spent = time.perf_counter() - start
            live.update(_render(look(self._ledger), self._slots, self._ledger.most_trials), refresh=True)


def _render(trials: Sequence[TrialProgress], slots: int, most: int | None) -> RenderableType:
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    running = [trial for trial in trials if trial.status == TrialStatus.RUNNING]
    grid = Table.grid(padding=(0, 2))
    for trial in running[:SHOWN_TRIALS]:
        grid.add_row(
            trial.label,
            ProgressBar(total=trial.tokens, completed=trial.tokens_done, width=BAR_WIDTH),
            f"{trial.tokens_done / trial.tokens:4.0%}",
            f"{count(trial.tokens_per_second)} tokens/s" if trial.tokens_per_second else "starting",
            f"val {trial.loss:.3f}" if trial.loss is not None else "",
        )
    return Group(Text(headline(trials, slots, most), style="bold"), grid)


# --- after ------------------------------------------------------------------------------------------------------------


def overview(trials: Sequence[TrialProgress], most: int | None = None) -> str:
    """Every trial on a line, then the headline."""
    several = on_nodes(trials)
    rows = [
        [
            trial.trial_id,
            trial.label,
            trial.status,
            *([trial.node or "-"] if several else []),
            f"{trial.tokens_done / trial.tokens:.0%}",
            f"{count(trial.tokens_per_second)}" if trial.tokens_per_second else "-",
            f"{trial.loss:.4f}" if trial.loss is not None else "-",
            trial.message.splitlines()[0][:80] if trial.message else "",
        ]
        for trial in trials
    ]
    header = ["trial", "", "status", *(["node"] if several else []), "done", "tokens/s", "val loss", ""]
    return f"{table(header, rows)}\n{headline(trials, most=most)}"


def results_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The trials with what came out, from the rows of `Ledger.table`."""
    axes = axes_of(rows)
    header = [
        "trial",
        *axes,
        "experts",
        "shared width",
        "memory rows",
        "tokens",
        "val loss",
        "± se",
        "bits/byte",
        "tokens/s",
        "status",
    ]

    def number(value: Any, form: str) -> str:
        return "-" if value in (None, "") else format(float(value), form)

    lines = [
        [
            row["trial_id"],
            *(shown(axis, row[axis]) for axis in axes),
            f"{row['routed_experts']}",
            f"{row['shared_width']}",
            number(row["memory_rows"], ",.0f"),
            count(float(row["tokens"])),
            number(row["val_loss"], ".4f"),
            number(row["val_loss_se"], ".4f"),
            number(row["val_bpb"], ".4f"),
            number(row["tokens_per_second"], ",.0f"),
            str(row["status"]),
        ]
        for row in rows
    ]
    return table(header, lines)
