"""A results folder as DataFrames, and DataFrames as text for a terminal. Reads files only; knows no fit
and no figure.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.columns import floats
from analysis.errors import AnalysisError, require_columns
from sparsemem.mechanisms import EXPERTS, MEMORY_POOLS, label
from sparsemem.results import COLUMNS, FINAL, NUMBERS, TrialStatus
from sparsemem.trial_files import TrialFiles
from sparsemem.values import ConfigError

TPP = "tokens_per_active_param"
"""Training tokens over activated parameters as planned for the trial's own model; made at reading, so old tables have
it too.
"""
RHO = "\N{GREEK SMALL LETTER RHO}"
"""The share of the sparse parameters held by routed experts, as readers see it."""
REQUIRED = ("trial_id", "status", "seed", "rho", "share_moe", "total_params", "active_params", "tokens", "val_loss")


def load_trials(results_dir: Path | str) -> pd.DataFrame:
    """`trials.csv`, typed, with `TPP`: one row a planned trial, in the order of the plan; losses in nats per token, NaN
    where not finished. Those that learned nothing are among the finished; `Results.trials` sets them aside.

    Raises:
        AnalysisError: the file is missing, empty or not CSV, lacks a column, holds text in place of a number, repeats a
            trial id, or names an unknown status.
    """
    path = Path(results_dir) / "trials.csv"
    if not path.is_file():
        raise AnalysisError(f"{path}: no such file; give the folder of a study, the one that holds trials.csv")
    return typed_trials(_read_csv(path, path, dtype=str), path)


def typed_trials(frame: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The text of a `trials.csv`, typed; errors as of `load_trials`, under this path."""
    require_columns(frame.columns, REQUIRED, str(path))
    if frame.empty:
        raise AnalysisError(f"{path}: holds no trial")
    repeated = frame["trial_id"][frame["trial_id"].duplicated()].unique()
    if len(repeated):
        raise AnalysisError(
            f"{path}: trial id {', '.join(map(str, repeated))} stands in several rows; keep one of each"
        )
    unknown = sorted(set(frame["status"].fillna("")) - set(TrialStatus))
    if unknown:
        raise AnalysisError(f"{path}: column `status` holds {unknown[0]!r}; known: {', '.join(TrialStatus)}")
    for name in frame.columns:
        if name in NUMBERS:
            frame[name] = floats(frame[name], lambda row: f"{path}: line {row + 2}")
        elif name not in COLUMNS:
            typed = pd.to_numeric(frame[name], errors="coerce")
            if (typed.notna() == frame[name].notna()).all():
                frame[name] = typed
    finished = frame["status"] == TrialStatus.FINISHED
    broken = frame["trial_id"][finished & ~np.isfinite(frame["val_loss"])]
    if len(broken):
        raise AnalysisError(
            f"{path}: trial {', '.join(broken)} is finished but its val_loss is not a number; set its result aside and "
            "run it again"
        )
    if frame["seed"].isna().any():
        raise AnalysisError(f"{path}: trial {frame['trial_id'][frame['seed'].isna()].iloc[0]} has no seed")
    return frame.assign(**{TPP: frame["tokens"] / frame["active_params"]}).astype({"seed": int})


def varied_fields(trials: pd.DataFrame) -> list[str]:
    """Dotted paths of the fields in which the trials differ, other than seed and token budget's own column."""
    fields = [str(name) for name in trials.columns if name not in (*COLUMNS, TPP) and not name.startswith("share_")]
    return [name for name in fields if trials[name][uses(trials, name)].nunique(dropna=False) > 1]


def holds(trials: pd.DataFrame, pool: str) -> np.ndarray:
    """Whether each trial has this memory, by a share or on top -> bool [trials]."""
    columns = [name for name in trials.columns if name.startswith(f"model.{pool}.")]
    known = f"share_{pool}" in trials
    share = trials[f"share_{pool}"].to_numpy() > 0 if known else np.zeros(len(trials), bool)
    set_up = trials[columns].notna().to_numpy().any(axis=1)
    if known and f"model.{pool}.rows" not in columns and (set_up & ~share).any():
        return np.ones(len(trials), bool)  # its rows are given in the base, so every trial has it on top
    return np.asarray(share | set_up)


def memories(trials: pd.DataFrame) -> list[str]:
    """Pools of memory that trials may hold: those known here, and those of mechanisms that are not installed here."""
    told = [str(name).removeprefix("share_") for name in trials.columns if str(name).startswith("share_")]
    return [pool for pool in dict.fromkeys([*MEMORY_POOLS, *told]) if pool != EXPERTS.name]


def uses(trials: pd.DataFrame, name: str) -> np.ndarray:
    """Whether each trial has a use for a field -> bool [trials].

    The settings of a memory say nothing of a trial without it, which leaves them empty; anywhere else an empty value is
    a value.
    """
    pool = name.split(".")[1] if name.startswith("model.") else ""
    return holds(trials, pool) if pool in memories(trials) else np.ones(len(trials), bool)


def load_curves(results_dir: Path | str) -> pd.DataFrame:
    """The training curves of every trial that finished or diverged, one row a record, with the trial's columns beside
    it.

    The curve's own columns keep their names; a trial's column of the same name, such as `val_loss`, gets the prefix
    `final_`.

    Raises:
        AnalysisError: a curve is missing, lacks a column or holds text in place of a number.
    """
    trials = load_trials(results_dir)
    ended = trials["trial_id"][trials["status"].isin(FINAL)]
    rows = _read_each(results_dir, ended, "curve.csv", ("step", "tokens", "train_loss", "val_loss"))
    clashes = {name: f"final_{name}" for name in trials.columns if name in rows.columns and name != "trial_id"}
    return rows.merge(trials.rename(columns=clashes), on="trial_id", validate="many_to_one")


def load_sequence_losses(results_dir: Path | str) -> pd.DataFrame:
    """Held-out loss of every finished trial: nats per token, index sequence, one column a trial id; empty where only
    trials of other `data` have that sequence.

    Raises:
        AnalysisError: a file is missing or holds text in place of a number, or a trial was evaluated on other sequences
            than the first of the same `data`.
    """
    trials = load_trials(results_dir).set_index("trial_id")
    finished = trials[trials["status"] == TrialStatus.FINISHED]
    data = finished[[name for name in finished if name.startswith("data.")]].astype(str)
    rows = _read_each(results_dir, pd.Series(finished.index), "val_losses.csv", ("sequence", "nats_per_token"))
    columns: dict[str, pd.Series] = {}
    of_data: dict[tuple[str, ...], np.ndarray] = {}
    for trial_id, own in rows.groupby("trial_id", sort=False):
        sequences = of_data.setdefault(tuple(data.loc[trial_id]), own["sequence"].to_numpy())
        if not np.array_equal(own["sequence"], sequences):
            path = trial_files(results_dir).path(str(trial_id), "val_losses.csv")
            raise AnalysisError(
                f"{path}: not the {len(sequences)} held-out sequences of the other trials; run this trial again"
            )
        columns[str(trial_id)] = own.set_index("sequence")["nats_per_token"]
    return pd.DataFrame(columns).rename_axis("sequence")


def trial_files(results_dir: Path | str) -> TrialFiles:
    """The files of the trials, packed or not.

    Raises:
        AnalysisError: the pack is damaged.
    """
    files = TrialFiles(Path(results_dir))
    try:
        _ = files.packed
    except ConfigError as error:
        raise AnalysisError(str(error)) from None
    return files


def paired_differences(trials: pd.DataFrame, sequence_losses: pd.DataFrame | None = None) -> pd.DataFrame:
    """Loss of each finished trial less that of the trial with rho = 1 of the same cell and seed, nats per token.

    Args:
        trials: of one cell (see `split_cells`), one learning rate a share.
        sequence_losses: from `load_sequence_losses`; both trials read the same sequences, so the standard error is that
            of the differences.

    Returns:
        trial_id, reference_id, rho, share_moe, seed, difference, difference_se (NaN without sequence losses). Seeds
        without rho = 1 are left out.
    """
    finished = trials[trials["status"] == TrialStatus.FINISHED]
    references = finished[finished["rho"] == 1].set_index("seed")["trial_id"]
    loss = finished.set_index("trial_id")["val_loss"]
    losses = pd.DataFrame() if sequence_losses is None else sequence_losses
    by_sequence = {name: losses[name].to_numpy() for name in losses}
    rows = []
    for trial in finished[finished["rho"] != 1].to_dict("records"):
        if trial["seed"] not in references.index:
            continue
        reference = references[trial["seed"]]
        error = float("nan")
        if {trial["trial_id"], reference} <= by_sequence.keys():
            apart = by_sequence[trial["trial_id"]] - by_sequence[reference]
            apart = apart[~np.isnan(apart)]  # sequences of other data
            error = float(np.std(apart, ddof=1) / np.sqrt(len(apart)))
        point = (trial[name] for name in ("rho", "share_moe", "seed"))
        rows.append((trial["trial_id"], reference, *point, trial["val_loss"] - loss[reference], error))
    names = ["trial_id", "reference_id", "rho", "share_moe", "seed", "difference", "difference_se"]
    return pd.DataFrame(rows, columns=names)


def average_differences(differences: pd.DataFrame) -> pd.DataFrame:
    """`paired_differences` over seeds -> rho, share_moe, seeds, difference, se_seeds (between seeds; NaN for one),
    se_sequences (from the held-out sequences; the seeds share those, so it does not shrink with their number).
    """
    grouped = differences.groupby("rho", sort=False, dropna=False)
    return grouped.agg(
        share_moe=("share_moe", "first"),
        seeds=("seed", "count"),
        difference=("difference", "mean"),
        se_seeds=("difference", "sem"),
        se_sequences=("difference_se", "mean"),
    ).reset_index()


# --- text -------------------------------------------------------------------------------------------------------------


def si(value: float) -> str:
    """Three or four digits and a decimal unit; '' for NaN.

    >>> si(1_240_000), si(135_168), si(62), si(5.7e9)
    ('1.24M', '135.2k', '62', '5.7B')
    """
    if pd.isna(value):
        return ""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def shown(value: Any) -> str:
    """A varied field's value as a reader writes it; '' where the trial does not use the field.

    >>> shown(2_000_000), shown(0.01), shown(float("nan"))
    ('2M', '0.01', '')
    """
    if isinstance(value, str):
        return value
    return "" if pd.isna(value) else si(value) if abs(value) >= 10_000 else f"{value:.10g}"


def fixed(value: Any, form: str = ".4f") -> str:
    """A number in the given form; '' for none.

    >>> fixed(0.01234), fixed(0.5, "+.2f"), fixed(None)
    ('0.0123', '+0.50', '')
    """
    return "" if value is None or pd.isna(value) else format(value, form)


def _duration(seconds: float) -> str:
    if pd.isna(seconds):
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def _error(value: float) -> str:
    """A part as percent, without a negative zero.

    >>> _error(-0.000004), _error(-0.0012)
    ('+0.00%', '-0.12%')
    """
    return fixed(value, "+z.2%")


_WRITTEN: dict[str, Callable[[Any], str]] = {
    "rho": lambda value: fixed(value, ".4g") or "dense",
    "seed": str,
    "status": lambda value: value.replace("_", " "),
    "budget_error_total": _error,
    "budget_error_active": _error,
    **dict.fromkeys(("memory_flops_share", "val_loss", "val_loss_se", "val_bpb"), fixed),
    TPP: lambda value: fixed(value, ".3g"),
    "peak_memory_bytes": lambda value: fixed(value / 1e9, ".2f"),
    "seconds": _duration,
}
"""Column -> how a value is written, where that is not `si` of a column of `trials.csv`, nor `shown` of a
varied field.
"""
READ = (
    *("rho", "seed", "status", "total_params", "active_params", "routed_experts", "memory_rows", "tokens", TPP),
    *("val_loss", "val_loss_se", "val_bpb", "tokens_per_second", "peak_memory_bytes", "seconds"),
)
"""Columns of the table of trials."""


def as_text(frame: pd.DataFrame) -> pd.DataFrame:
    """Columns of a table of trials as text under headings with units."""
    text: dict[str, list[str]] = {}
    for name in frame.columns:
        pool = name.removeprefix("share_")
        if pool != name:
            text[f"share of {label(pool)}"] = [fixed(value) for value in frame[name]]
        else:
            heading = COLUMNS[name].heading if name in COLUMNS else "tokens/P_act" if name == TPP else name
            text[heading] = list(map(_WRITTEN.get(name, si if name in COLUMNS else shown), frame[name]))
    return pd.DataFrame(text)


def trials_for_reading(trials: pd.DataFrame) -> pd.DataFrame:
    """The trials as text under headings with units, one row a trial, the varied fields after rho."""
    varied = [name for name in varied_fields(trials) if name not in ("budget.tokens", "shares")]
    shares = [name for name in trials if name.startswith("share_") and trials[name].nunique() > 1]
    shares = [name for name in shares if "shares" in trials and name != "share_moe"]
    first = ["rho", *shares, *varied, "seed", "status"]
    return as_text(trials[[*first, *(name for name in READ if name not in first and name in trials)]])


def format_table(trials: pd.DataFrame) -> str:
    """The trials as aligned plain text for a terminal; never wrapped or cut."""
    text = trials_for_reading(trials)
    lines = [list(text.columns), *text.to_numpy().tolist()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


# --- reading ----------------------------------------------------------------------------------------------------------


def _read_csv(source: Path | io.BytesIO, path: Path, **options: Any) -> pd.DataFrame:
    """A CSV file or its text; `path` is for the messages."""
    try:
        return pd.read_csv(source, **options)
    except pd.errors.EmptyDataError:
        raise AnalysisError(f"{path}: is empty") from None
    except (pd.errors.ParserError, UnicodeDecodeError, OSError) as error:
        raise AnalysisError(f"{path}: cannot be read as CSV: {error}") from None


def _read_each(results_dir: Path | str, trial_ids: pd.Series, name: str, numbers: tuple[str, ...]) -> pd.DataFrame:
    """The file of that name of each trial, one below the other, with a column `trial_id`.

    Files with one heading are parsed as one text: a thousand files one by one would take most of a report's time.

    Raises:
        AnalysisError: a file is missing or cannot be read, or lacks a column of `numbers` or holds text in it.
    """
    files = trial_files(results_dir)
    texts: dict[bytes, dict[str, list[bytes]]] = {}
    for trial_id in trial_ids:
        path = files.path(trial_id, name)
        try:
            heading, *lines = [line for line in files.read(trial_id, name).splitlines() if line.strip()] or [b""]
        except FileNotFoundError:
            raise AnalysisError(
                f"{path}: no such file, though trials.csv says that this trial ended; `sparsemem run` the study again"
            ) from None
        except OSError as error:
            raise AnalysisError(f"{path}: cannot be read: {error}") from None
        if not heading:
            raise AnalysisError(f"{path}: is empty")
        if lines and lines[-1].count(b",") != heading.count(b","):
            raise AnalysisError(f"{path}: its last line is cut off; set this trial's files aside and run it again")
        texts.setdefault(heading, {})[trial_id] = lines

    def parsed(heading: bytes, own: dict[str, list[bytes]], path: Path) -> pd.DataFrame:
        table = _read_csv(io.BytesIO(b"\n".join([heading, *chain.from_iterable(own.values())])), path)
        require_columns(table.columns, numbers, str(path))
        for column in numbers:
            floats(table[column], lambda row: f"{path}: line {row + 2}")
        return table.assign(trial_id=np.repeat(list(own), [len(lines) for lines in own.values()]))

    tables = []
    for heading, own in texts.items():
        try:
            tables.append(parsed(heading, own, files.path("*", name)))
        except AnalysisError:
            for trial_id, lines in own.items():  # which file is it?
                parsed(heading, {trial_id: lines}, files.path(trial_id, name))
            raise
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["trial_id", *numbers])
