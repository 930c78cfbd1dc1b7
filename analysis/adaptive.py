"""How many trials a search of the best share takes, beside grids: studies simulated from recorded curves.

    python -m analysis.adaptive results/allocation-cpu results/sparsity --out docs/searched-shares

writes `studies.csv` (one row a study, design and number of trials) and the figure `adaptive` with its data. Of each
recorded curve the law that fits it best is taken for the truth, with the noise and the seed effects that were measured;
a study of any design draws the same noise at the same share and seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.cells import split_cells
from analysis.figures.adaptive import adaptive_figure
from analysis.figures.style import save
from analysis.fits.allocation import fit_allocation
from analysis.fits.allocation_result import AllocationFit
from analysis.fits.placement import next_shares
from analysis.results import Results
from sparsemem.config import FIRST_SHARES, GRID_SHARES
from sparsemem.files import write_text

Array = np.ndarray
STEPS = 60  # shares that can be trained lie so many to the unit; quarters, tenths and twelfths are among them
RESAMPLES = 250  # of each fit; a report has 2,000
NEAR = 0.5 / STEPS  # an interval holds the truth to the step between candidates


@dataclass(frozen=True)
class Truth:
    """A curve to draw studies from."""

    name: str
    share_S: Array
    loss_S: Array
    best: float
    noise: float
    """Standard deviation of a run, seed effects off, nats per token."""
    seed_effect: float
    """Standard deviation of what moves all shares of a seed alike."""

    def study(self, number: int, seeds: int) -> pd.DataFrame:
        """Every share with every seed, of which a design takes its rows -> share_moe, seed, val_loss."""
        rng = np.random.default_rng(number)
        effect_J = rng.standard_normal(seeds) * self.seed_effect
        noise_SJ = rng.standard_normal((len(self.share_S), seeds)) * self.noise
        share_SJ, seed_SJ = np.meshgrid(self.share_S, np.arange(seeds), indexing="ij")
        loss_SJ = self.loss_S[:, None] + effect_J + noise_SJ
        return pd.DataFrame({"share_moe": share_SJ.ravel(), "seed": seed_SJ.ravel(), "val_loss": loss_SJ.ravel()})


def recorded(folder: Path) -> list[Truth]:
    """The curves of a results folder that were sampled from end to end."""
    results, found = Results(folder), []
    for cell in split_cells(results.trials):
        fit = fit_allocation(cell.trials)
        if fit.means and (fit.shares[0], fit.shares[-1]) == (0, 1) and fit.paired_sd and fit.seed_sd:
            share_S = np.arange(STEPS + 1) / STEPS
            fine = fit.predict(np.linspace(0, 1, 2001))
            effect = np.sqrt(max(fit.seed_sd**2 - fit.paired_sd**2, 0.0))
            loss_S = fit.predict(share_S)["loss"].to_numpy()
            label = ", ".join(filter(None, (results.name, cell.label)))
            best = float(fine["x"][fine["loss"].idxmin()])
            found.append(Truth(label, share_S, loss_S, best, fit.paired_sd, float(effect)))
    return found


def simulate(truth: Truth, number: int, seeds: int) -> list[dict[str, object]]:
    """One study under every design -> curve, study, seeds, design, trials, low, high, holds."""
    every, rows = truth.study(number, seeds), []

    def judge(design: str, shares: Sequence[float]) -> AllocationFit:
        runs = every[every["share_moe"].isin(shares)]
        fit = fit_allocation(runs, resamples=RESAMPLES)
        low, high = fit.interval_of_best
        holds = low - NEAR <= truth.best <= high + NEAR
        rows.append(
            {"curve": truth.name, "study": number, "seeds": seeds, "design": design, "trials": len(runs)}
            | {"low": low, "high": high, "holds": holds}
        )
        return fit

    for count in range(len(FIRST_SHARES), GRID_SHARES + 1, 2):
        judge("grid", np.unique(np.round(np.linspace(0, 1, count) * STEPS) / STEPS).tolist())
    shares = list(FIRST_SHARES)
    while True:
        fit = judge("search", shares)
        if len(shares) == GRID_SHARES:
            return rows
        shares += next_shares(fit, [share for share in truth.share_S if share not in shares], 1, seeds)


def summary(studies: pd.DataFrame) -> pd.DataFrame:
    """What the figure shows -> curve, seeds, design, trials, length (median, with quartiles low and high), holds,
    needed.

    `needed`: median number of trials at which the interval of the search is first no longer than that of the full grid
    in the same study; infinite where half of the studies do not get there with as many trials.
    """
    studies = studies.assign(length=studies["high"] - studies["low"])
    rows = []
    for (curve, seeds), group in studies.groupby(["curve", "seeds"], sort=False):
        most = group["trials"].max()
        full = group[(group["design"] == "grid") & (group["trials"] == most)].set_index("study")["length"]
        for (design, trials), own in group.groupby(["design", "trials"], sort=False):
            low, median, high = own["length"].quantile([0.25, 0.5, 0.75])
            needed = np.nan
            if design == "search":
                reached = group[(group["design"] == "search") & (group["length"] <= group["study"].map(full) + 1e-9)]
                needed = float(reached.groupby("study")["trials"].min().reindex(full.index).fillna(np.inf).median())
            rows.append(
                {"curve": curve, "seeds": seeds, "design": design, "trials": trials, "length": median}
                | {"low": low, "high": high, "holds": own["holds"].mean(), "needed": needed}
            )
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m analysis.adaptive", description=__doc__.partition("\n")[0])
    folders, out = "results folders with curves over the share", "receives studies.csv, and the figure with its data"
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help=folders)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help=out)
    parser.add_argument("--studies", type=int, default=100, help="simulated of each curve (default: 100)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[2], help="seeds of each share (default: 2)")
    arguments = parser.parse_args()
    truths = [truth for folder in arguments.folders for truth in recorded(folder)]
    rows = [
        row
        for truth in truths
        for seeds in arguments.seeds
        for number in range(arguments.studies)
        for row in simulate(truth, number, seeds)
    ]
    arguments.out.mkdir(parents=True, exist_ok=True)
    studies = pd.DataFrame(rows)
    write_text(arguments.out / "studies.csv", studies.round(6).to_csv(index=False, lineterminator="\n"))
    data = summary(studies)
    save(adaptive_figure(data), data, arguments.out, "adaptive")
    print(data.to_string())


if __name__ == "__main__":
    main()
