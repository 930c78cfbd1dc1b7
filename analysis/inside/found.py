"""The probes' files of a results folder as tables, each row with the share and the seed of its trial.

Trials that differ in more than their shares and seed are not drawn together: of several such groups, the one with the
most probed trials is taken, the first of them if several have as many. Settings of a pool say nothing of a trial
without it, and each share may have a training of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import t as student

from analysis.errors import AnalysisError
from analysis.interval import ends
from analysis.results import Results
from analysis.table import memories, varied_fields
from sparsemem.mechanisms import POOLS, label

DENSE = "dense"
OF_PAIRS, OF_TRIALS = ("lens_area", "cka", "alignment"), ("logit_lens", "gates", "gate_text", "suppression", "usage")

OF_ENDS = {
    "first_id": "first_share",
    "second_id": "second_share",
    "reference_id": "reference_share",
    "trial_id": "share",
}


@dataclass(frozen=True)
class Found:
    """Every table is empty where its file is missing."""

    results: Results

    @cached_property
    def trials(self) -> pd.DataFrame:
        """The probed trials of the group that is drawn -> trial_id, share, seed; shares falling, dense last."""
        probed = [trial for trial in self.results.trials["trial_id"] if self._path(trial, "logit_lens").is_file()]
        trials = self.results.trials[self.results.trials["trial_id"].isin(probed)]
        if trials.empty:
            return pd.DataFrame(columns=["trial_id", "share", "seed"])
        trials = trials.assign(share=_shares(trials))
        fields = [name for name in varied_fields(trials) if "." in name]
        training = [name for name in fields if name.startswith("train.")]
        own = {pool: [name for name in fields if name.startswith(f"model.{pool}.")] for pool in POOLS}
        trials = _largest(trials, sorted(set(fields).difference(training, *own.values())))
        for settings in own.values():
            without = trials[settings].isna().all(axis=1) if settings else trials["seed"].notna()
            kept = _largest(trials[~without], settings)
            trials = trials[without | trials.index.isin(kept.index)]
        if trials[["share", *training]].drop_duplicates()["share"].duplicated().any():  # a share may have a tuned rate
            trials = _largest(trials, training)
        trials = trials.sort_values(["rho", "seed"], ascending=[False, True], na_position="last")
        return trials[["trial_id", "seed", "share"]].reset_index(drop=True)

    @property
    def shares(self) -> list[str]:
        """In the order of `trials`."""
        return list(dict.fromkeys(self.trials["share"]))

    @property
    def reference(self) -> str:
        """What other shares are held against: the most experts."""
        return self.shares[0]

    @property
    def left_out(self) -> int:
        """Probed trials of other groups."""
        return sum(self._path(trial, "logit_lens").is_file() for trial in self.results.trials["trial_id"]) - len(
            self.trials
        )

    def of_trials(self, name: str) -> pd.DataFrame:
        """A file of each trial, one below the other, with `trial_id`, `share` and `seed`."""
        tables = [
            _read(self._path(trial["trial_id"], name)).assign(**trial) for trial in self.trials.to_dict("records")
        ]
        tables = [table for table in tables if len(table)]
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()

    def of_pairs(self, name: str) -> pd.DataFrame:
        """A file of pairs, of those that are drawn, with shares as `trials` names them."""
        table = _read(self.results.folder / "probes" / f"{name}.csv")
        share = self.trials.set_index("trial_id")["share"]
        for column, named in OF_ENDS.items():
            if column in table:
                table = table[table[column].isin(share.index)]
                table = table.assign(**{named: table[column].map(share)})
        return table.reset_index(drop=True)

    def _path(self, trial: str, name: str) -> Path:
        return self.results.folder / "trials" / trial / "probes" / f"{name}.csv"


def _read(path: Path) -> pd.DataFrame:
    if not path.is_file():
        return pd.DataFrame()
    texts = dict.fromkeys(("first_share", "second_share", "reference_share", "share", "text"), str)
    try:
        return pd.read_csv(path, dtype=texts, keep_default_na=False, na_values=[""])
    except (ValueError, OSError) as error:
        raise AnalysisError(f"{path}: cannot be read ({error}); write it again by `sparsemem probe`") from None


def _shares(trials: pd.DataFrame) -> list[str]:
    """Rho or `dense`; where trials differ in which memories they hold, with these, and of several with their shares."""
    pools = {pool: trials[f"share_{pool}"].fillna(0) for pool in memories(trials) if f"share_{pool}" in trials}
    pools = {pool: share for pool, share in pools.items() if (share > 0).any()}
    names = trials["rho"].map(lambda rho: DENSE if np.isnan(rho) else f"{rho:g}").tolist()
    if len(pools) < 2:
        return names
    for place in range(len(names)):
        held = {label(pool): share.iloc[place] for pool, share in pools.items() if share.iloc[place] > 0}
        names[place] += "".join(f", {name}" + f" {share:g}" * (len(held) > 1) for name, share in held.items())
    return names


def _largest(trials: pd.DataFrame, fields: list[str]) -> pd.DataFrame:
    """Those that agree in these fields; of several such groups the one with the most trials."""
    if not fields or trials.empty:
        return trials
    group = trials.groupby(fields, sort=False, dropna=False).ngroup()
    return trials[group == group.loc[group.map(group.value_counts()).idxmax()]]


def over_seeds(values: pd.Series) -> tuple[float, float, float]:
    """Mean and its Student interval; the ends are not numbers for fewer than two."""
    values = values.dropna()
    if len(values) < 2:
        return (float(values.mean()) if len(values) else np.nan), np.nan, np.nan
    reach = float(student.ppf(ends()[1], len(values) - 1) * values.std() / np.sqrt(len(values)))
    return float(values.mean()), float(values.mean()) - reach, float(values.mean()) + reach


def by_seed(table: pd.DataFrame, groups: list[str], value: str) -> pd.DataFrame:
    """Mean over seeds of a value -> groups, seeds, mean, low, high (Student's interval), least, most."""
    rows = []
    for names, part in table.groupby(groups, sort=False, dropna=False):
        mean, low, high = over_seeds(part[value])
        known = dict(zip(groups, names if isinstance(names, tuple) else (names,), strict=True))
        reach = {"least": part[value].min(), "most": part[value].max()}
        rows.append(known | {"seeds": part[value].notna().sum(), "mean": mean, "low": low, "high": high} | reach)
    numbers = ["mean", "low", "high", "least", "most"]
    found = pd.DataFrame(rows, columns=[*groups, "seeds", *numbers])
    return found.astype(dict.fromkeys(numbers, float))  # also of no rows, which other tables are put below
