"""The probes' files of a results folder as tables, each row with the share and the seed of its trial.

Trials that differ in more than their shares and seed are not drawn together: of several such groups, the one with the
most probed trials is taken, the first of them if several have as many.
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
from analysis.table import varied_fields
from sparsemem.mechanisms import POOLS

DENSE = "dense"
OF_PAIRS, OF_TRIALS = ("lens_area", "cka", "alignment"), ("logit_lens", "gates", "gate_text", "suppression", "usage")


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
        own = tuple(f"model.{pool}." for pool in POOLS)
        others = [name for name in varied_fields(trials) if not name.startswith(own) and "." in name]
        if others:
            sizes = trials.groupby(others, sort=False, dropna=False)["trial_id"].transform("size")
            first = trials.loc[sizes.idxmax(), others]
            same = [(trials[name] == first[name]) | (trials[name].isna() & pd.isna(first[name])) for name in others]
            trials = trials[np.all(same, axis=0)]
        trials = trials.sort_values(["rho", "seed"], ascending=[False, True], na_position="last")
        share = trials["rho"].map(lambda rho: DENSE if np.isnan(rho) else f"{rho:g}")
        return trials[["trial_id", "seed"]].assign(share=share).reset_index(drop=True)

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
        """A file of pairs, of those that are drawn."""
        table = _read(self.results.folder / "probes" / f"{name}.csv")
        ids = set(self.trials["trial_id"])
        for column in ("first_id", "second_id", "reference_id", "trial_id"):
            if column in table:
                table = table[table[column].isin(ids)]
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
    return pd.DataFrame(rows, columns=[*groups, "seeds", "mean", "low", "high", "least", "most"])
