"""What a fit over the mixes of three pools (`simplex`) gives back: its numbers and its words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from analysis.errors import AnalysisError
from analysis.fits.mixture import Quadratics, grid, within
from analysis.fits.runs import Runs
from analysis.fits.types import Estimate, Fit, banded, noise_of_a_run, with_doubt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = np.ndarray
JOIN = " + "


@dataclass(frozen=True)
class Surface:
    """One law as fitted to the same runs, reported whether or not it is the one used."""

    law: str
    left_out_error: float | None
    """Root mean square error of the loss predicted for each point when it is left out, nats per token; corners of the
    region are kept.
    """
    aicc: float | None
    """Akaike's criterion with the small-sample correction over runs, seed effects counted; None where too few runs
    allow it.
    """
    lack_of_fit_p: float | None
    argmin: tuple[float, ...]
    """Mix of the least loss, on a grid of hundredths of the sampled region."""


@dataclass(frozen=True, kw_only=True)
class SimplexFit(Fit):
    """A fitted surface with its status. Intervals are 95% percentile intervals over resamples; losses are in nats per
    token.

    `converged` means that the best mix holds all three pools; where it lies on an edge or in a corner the status is
    `no_interior_minimum` and the mix is still given: two pools, or one, are then as good as three.
    """

    pools: tuple[str, ...]
    points: tuple[tuple[float, ...], ...]
    """Distinct mixes, shares in the order of `pools`."""
    seeds: int
    argmin: dict[str, Estimate] = field(default_factory=dict)
    """Pool -> its share at the least loss of the surface over the sampled region; empty without a surface."""
    places: dict[str, float] = field(default_factory=dict)
    """Which pools the best mix holds, joined by ` + ` -> part of the resamples."""
    loss_at_best: Estimate | None = None
    tied_part: float | None = None
    """Part of the sampled region that is tied with the best mix: neither its loss nor the slope there rules out that it
    is the best itself. The true best is tied with 95% confidence.
    """
    tied_shares: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Pool -> least and largest share among the tied mixes."""
    tied: tuple[tuple[float, ...], ...] = ()
    """Points that may be the best: Gupta's subset at 95% joint confidence, on paired differences with pooled noise."""
    corner_gains: dict[str, Estimate] = field(default_factory=dict)
    """Pool -> its loss alone less the least loss; only for corners that were sampled."""
    edge_gains: dict[str, Estimate] = field(default_factory=dict)
    """Two pools, joined by ` + ` -> the loss of their best mix less the least loss; only for edges that
    were sampled.
    """
    edge_bests: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """Two pools -> their best mix."""
    third_pool_gain: Estimate | None = None
    """Least loss of any two pools less that of three. Its interval has the least of the edges' bounds, so it excludes 0
    only where that of every edge does.
    """
    paired_sd: float | None = None
    """Standard deviation of one run once the effect common to its seed is off, nats per token."""
    seed_sd: float | None = None
    """Standard deviation between the seeds of one point, pooled over points, nats per token."""
    lack_of_fit_p: float | None = None
    """Chance of so poor a fit of the point means if the law were true (F test against the paired noise)."""
    candidates: tuple[Surface, ...] = ()
    means: tuple[float, ...] = ()
    """Loss of each point for the average seed; empty without a surface."""
    _runs: Runs = field(repr=False, compare=False)
    _surfaces: Quadratics | None = field(default=None, repr=False, compare=False)

    def runs(self) -> pd.DataFrame:
        """The runs used -> share_POOL of each pool, loss, seed, trial_id."""
        each = self._runs
        shares = pd.DataFrame(each.x_NK, columns=list(self.predictors))
        return shares.assign(loss=each.y_N, seed=each.seeds_N, trial_id=each.rows)

    @property
    def predictors(self) -> tuple[str, ...]:
        """The shares of the pools, inside the sampled region; `predict` adds `tie`, up to 1 of which a mix is tied with
        the best (`tied_part`).
        """
        return tuple(f"share_{pool}" for pool in self.pools)

    def _predict(self, places: pd.DataFrame) -> dict[str, Array]:
        assert self._surfaces
        x_X3 = places.to_numpy(float)
        if not (within(self._surfaces.corners_S3, x_X3) & (np.abs(x_X3.sum(1) - 1) < 1e-6)).all():
            raise AnalysisError(
                "a mix lies outside the sampled region or its shares do not sum to 1; train trials there to say more"
            )
        return banded(self._surfaces.at(x_X3)) | {"tie": self._surfaces.tie(x_X3)}

    def region(self, steps: int = 50) -> pd.DataFrame:
        """The mixes of the sampled region that are multiples of 1/steps, and its corners -> the pools, loss, tie; empty
        without a surface.

        tie: up to 1 the mix is tied with the best (`tied_part`).
        """
        if self._surfaces is None:
            return pd.DataFrame(columns=[*self.pools, "loss", "tie"])
        x_X3 = grid(self._surfaces.corners_S3, steps)
        shares = dict(zip(self.pools, x_X3.T, strict=True))
        return pd.DataFrame({**shares, "loss": self._surfaces.at(x_X3)[0], "tie": self._surfaces.tie(x_X3)})

    def summary(self, names: Mapping[str, str] | None = None) -> str:
        """What the fit says in sentences, with words of doubt wherever the status or the intervals ask for them.

        Args:
            names: pool -> what readers call it; default: as it is.
        """
        names = {pool: (names or {}).get(pool, pool) for pool in self.pools}

        def called(pools: str) -> str:
            return JOIN.join(names[pool] for pool in pools.split(JOIN))

        lines = []
        if self.argmin:
            mix = [
                f"{best.value:.2f} {names[pool]} ({best.low:.2f} to {best.high:.2f})"
                for pool, best in self.argmin.items()
            ]
            lines.append(
                f"The loss is least at {', '.join(mix[:-1])} and {mix[-1]} (95% intervals; {self.law} surface)."
            )
        if self.third_pool_gain:
            gain, edge = self.third_pool_gain, min(self.edge_gains, key=lambda edge: self.edge_gains[edge].value)
            size = f"{gain.value:.4f} nats/token (95% interval {gain.low:.4f} to {gain.high:.4f})"
            verdict = "a third pool helps" if gain.low > 0 else "a third pool is not shown to help"
            lines.append(f"It gains {size} on the best mix of two, {called(edge)}: {verdict}.")
        if self.corner_gains:
            alone = [
                f"{gain.value:.4f} ({gain.low:.4f} to {gain.high:.4f}) over {names[pool]}"
                for pool, gain in self.corner_gains.items()
            ]
            lines.append(f"Against one pool alone the best mix gains {', '.join(alone)}.")
        if self.tied_part is not None:
            spans = [f"{names[pool]} {low:.2f} to {high:.2f}" for pool, (low, high) in self.tied_shares.items()]
            part = f"{self.tied_part:.0%}" if self.tied_part >= 0.01 else "under 1%"
            lines.append(f"Statistically tied with it: {part} of the sampled mixes, {', '.join(spans)}.")
        return with_doubt(self.status, self.message, [*lines, *noise_of_a_run(self.paired_sd)])

    def drawn(self) -> pd.DataFrame:
        """What `plot` draws -> status, series, share_POOL of each pool, loss, tie, runs (losses in nats per token).

        Series: `surface` (the fit on a lattice), `tie` (on a finer one around the mixes tied with the best, which are
        those up to 1), `mean` (of a mix, for the average seed, over so many runs), `two` (the best mix of two pools),
        `best`.
        """
        names = list(self.predictors)
        means = self.runs().groupby(names, sort=False)["loss"].agg(loss="mean", runs="count").reset_index()
        if not self.means:  # nothing fitted yet: the runs as they are
            return means.assign(series="mean", status=str(self.status))
        runs = means.set_index(names)["runs"]
        best = {f"share_{pool}": [share.value] for pool, share in self.argmin.items()}
        parts = {
            "surface": self.region(50).drop(columns="tie").rename(columns=dict(zip(self.pools, names, strict=True))),
            "tie": self._near().rename(columns=dict(zip(self.pools, names, strict=True))),
            "mean": pd.DataFrame(self.points, columns=names).assign(
                loss=self.means, runs=[int(runs[point]) for point in self.points]
            ),
            "two": pd.DataFrame(list(self.edge_bests.values()), columns=names),
            "best": pd.DataFrame({**best, "loss": [self.loss_at_best.value if self.loss_at_best else np.nan]}),
        }
        return pd.concat([part.assign(series=series, status=str(self.status)) for series, part in parts.items()])

    def _near(self) -> pd.DataFrame:
        """The lattice around the tied mixes, the finer the fewer they are."""
        steps = 200 if max(high - low for low, high in self.tied_shares.values()) < 0.3 else 100
        lattice = self.region(steps).drop(columns="loss")
        for pool, (low, high) in self.tied_shares.items():
            lattice = lattice[lattice[pool].between(low - 2.5 / steps, high + 2.5 / steps)]
        return lattice

    def _draw(self, ax: Axes, data: pd.DataFrame) -> None:
        from analysis.figures.simplex import draw_fit

        draw_fit(ax, data)
