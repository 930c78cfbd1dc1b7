"""The simplex study: three pools share the sparse parameters. Which mix is best, and does a third pool help?"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import pandas as pd

from analysis import prose
from analysis.cells import Cell
from analysis.figures.simplex import simplex_figure
from analysis.fits.simplex import TIMES, fit_simplex
from analysis.fits.simplex_result import JOIN, SimplexFit
from analysis.studies.tables import facts, interval, of_cells, status_facts
from analysis.studies.types import CellAnalysis, Drawing, Reading, Section, Table
from analysis.table import fixed
from sparsemem.mechanisms import label

SHARE = "share_"


@dataclass(frozen=True)
class Simplex(CellAnalysis[SimplexFit]):
    """One surface over the mixes of three pools a cell."""

    point: ClassVar[str] = "mix"
    terms: ClassVar[str] = "A share is the part of the sparse parameters held by a pool; the shares of a mix sum to 1."

    @cached_property
    def pools(self) -> tuple[str, ...]:
        """The three pools whose shares vary, in the order of the columns."""
        trials = self.results.trials[self.results.trials["rho"].notna()]
        pools = [name.removeprefix(SHARE) for name in trials if name.startswith(SHARE) and trials[name].nunique() > 1]
        problem = (
            f"the shares of {len(pools)} pools vary ({', '.join(pools) or 'none'}), but a simplex study has exactly "
            "three"
        )
        self.require(len(pools) == 3, problem, "vary `shares` over three pools, or give study.yaml another `analysis`")
        off = trials["trial_id"][(trials[[SHARE + pool for pool in pools]].sum(axis=1) - 1).abs() > 1e-6]
        problem = f"the shares of {', '.join(pools)} do not sum to 1 in trial {off.iloc[0] if len(off) else ''}"
        self.require(off.empty, problem, "leave the fourth pool out of the study")
        return tuple(pools)

    @property
    def axis(self) -> tuple[str, ...]:
        return tuple(SHARE + pool for pool in self.pools)

    def fit(self, cell: Cell) -> SimplexFit:
        return fit_simplex(cell.trials, self.pools)

    def readings(self) -> list[Reading]:
        names = {pool: label(pool) for pool in self.pools}
        return [Reading.of(cell.label, fit, names) for cell, fit in self.fitted]

    def drawings(self) -> list[Drawing]:
        data = of_cells([(cell.label, fit.drawn()) for cell, fit in self.fitted if len(cell.trials)])
        if data.empty:
            return []
        measured = [name for name in ("loss", "tie", "runs") if name in data]
        data = data[["cell", "status", "series", *(name for name in data if name.startswith(SHARE)), *measured]]
        return [Drawing("simplex", _caption(set(data["series"])), simplex_figure, data)]

    def sections(self) -> list[Section]:
        return [*(Section(cell.label, self._tables(fit)) for cell, fit in self.fitted), Section("", (), _LAWS)]

    def caveats(self) -> list[str]:
        finished, lines = self.results.finished, []
        if "flops_per_token" in finished and len(finished):
            spread = finished["flops_per_token"].max() / finished["flops_per_token"].min() - 1
            lines = [
                f"P_tot and P_act are held, FLOPs per token are not: they differ by {spread:.1%} between the mixes."
            ]
        return [*lines, *prose.designs(self.results)]

    def _tables(self, fit: SimplexFit) -> tuple[Table, ...]:
        pairs = [
            *status_facts(fit, "runs, mixes, seeds", len(fit.points), fit.seeds, law=fit.law),
            *((f"best share of {_called(pool)}", interval(share, 3)) for pool, share in fit.argmin.items()),
            ("tied with it, part of the sampled mixes", fixed(fit.tied_part, ".1%")),
            ("paired noise, sd (nats/token)", fixed(fit.paired_sd)),
            ("spread between seeds, sd (nats/token)", fixed(fit.seed_sd)),
            ("lack of fit, p", fixed(fit.lack_of_fit_p, ".2g")),
        ]
        gains = [("loss at the best mix", fit.loss_at_best), ("gain of a third pool", fit.third_pool_gain)]
        gains += [(f"gain over the best {_called(edge)}", gain) for edge, gain in fit.edge_gains.items()]
        gains += [(f"gain over {_called(pool)} alone", gain) for pool, gain in fit.corner_gains.items()]
        places = [(_called(place), f"{part:.1%}") for place, part in fit.places.items()]
        laws = [
            {
                "law": f"{law.law} (used)" if law.law == fit.law else law.law,
                "left-out error": fixed(law.left_out_error, ".5f"),
                "AICc": fixed(law.aicc, ".1f"),
                "lack of fit": fixed(law.lack_of_fit_p, ".2g"),
                "best mix": " / ".join(f"{share:.2f}" for share in law.argmin),
            }
            for law in fit.candidates
        ]
        if not laws:
            return (facts(pairs),)
        return (
            facts(pairs),
            facts([(name, interval(gain)) for name, gain in gains], "Loss and gains (nats/token), with 95% intervals."),
            facts(places, "Pools in the best mix, part of the resamples."),
            Table(
                pd.DataFrame(laws),
                f"Laws tried, errors in nats/token; a mix is {' / '.join(map(_called, self.pools))}.",
            ),
            facts(
                [(_called(name), interval(value)) for name, value in fit.parameters.items()],
                "Parameters, with 95% intervals.",
            ),
        )


def _called(pools: str) -> str:
    """Pools as readers call them, also where several are joined."""
    for sign in (JOIN, TIMES):
        if sign in pools:
            return sign.join(_called(pool) for pool in pools.split(sign))
    return label(pools)


_LAWS = (
    "Scheffe's polynomials in the three shares: linear; quadratic, with a product of each two shares; special cubic, "
    "with the product of all three. The quadratic one is used; the others show what it may miss. Left-out error: every "
    "mix but the corners predicted from all others. A mix is tied with the best where neither its loss nor the slope "
    "of the surface there rules out that it is the best itself; the true best is tied with 95% confidence. A third "
    "pool helps where the intervals of the gains over all three edges exclude 0."
)


def _caption(series: set[str]) -> str:
    fitted = (
        "Colours: the fitted quadratic surface. Star: its least loss (white where in doubt). Outline: mixes "
        "statistically tied with it, at 95% confidence. Diamonds: the best mix of each two pools."
    )
    return " ".join(
        (
            "Validation loss over the mixes of three pools, at fixed total and activated parameters. Each corner is "
            "one pool alone; a",
            "pool's share is read on the side with its name, along the lines that leave the ticks.",
            *([fitted] if "surface" in series else []),
            "Circles: trained mixes, coloured by their mean for the average seed.",
        )
    )
