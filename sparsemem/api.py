"""The Python interface: what the `sparsemem` command is for a shell. Beside that command the only place that knows
`analysis`.

Training knows nothing of fits and reports. What it needs of them (whether a plan can be read, which share to train
next) is handed in here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsemem import config
from sparsemem.config import ConfigError
from sparsemem.results import TrialStatus

if TYPE_CHECKING:
    import pandas

    from sparsemem.study.ledger import Ledger
    from sparsemem.study.plan import PlannedTrial
    from sparsemem.study.tune.adapt import Judgement


class Study:
    """A study read from its file: look at its plan, then run it."""

    def __init__(self, settings: config.Study, base: Path) -> None:
        self.config = settings
        self.base = base
        """The folder of the YAML file; relative paths of its `data` start here."""

    @classmethod
    def from_yaml(cls, path: Path | str, overrides: Mapping[str, Any] | None = None) -> Study:
        """Read and validate a study.

        Args:
            overrides: dotted path -> value, such as `{"budget.tokens": "100k", "vary.rho": [1, 0.5]}`.

        Raises:
            sparsemem.config.ConfigError: naming file, field, value and remedy.
        """
        return cls(config.load_study(path, overrides), Path(path).resolve().parent)

    def plan(self) -> pandas.DataFrame:
        """Every trial with its solved sizes, one row each, in the columns of `analysis.load_trials` that are known
        before training.

        Raises:
            sparsemem.config.ConfigError: a trial misses its budget.
        """
        import pandas

        from sparsemem.study.plan import plan

        planned = plan(self.config)
        return pandas.DataFrame([p.row() for p in planned]).assign(
            tokens_per_active_param=[p.tokens_per_active_param for p in planned]
        )

    def run(self, results: Path | str = "runs", engine: str = "ray") -> Path:
        """Train what is not finished yet and return the results folder; see `run_study`."""
        return run_study(self.config, self.base, Path(results), engine).folder


def run_study(
    study: config.Study,
    base: Path,
    results: Path,
    engine: str = "ray",
    say: Callable[[str], None] | None = None,
    address: str | None = None,
) -> Ledger:
    """`train_study` with the analysis of this package, then the report.

    Args:
        say: takes remarks, one line each; None: they go to stderr.
    """
    from sparsemem.study.console import to_stderr
    from sparsemem.study.launch import train_study

    ledger = train_study(study, base, results, foresee, judge, engine, say or to_stderr, address)
    if ledger.counts()[TrialStatus.FINISHED]:
        _report(ledger.folder, say or to_stderr)
    return ledger


def _report(folder: Path, say: Callable[[str], None]) -> None:
    from analysis.errors import AnalysisError
    from analysis.report import write_report

    try:
        write_report(folder)
    except AnalysisError as error:
        say(f"no report: {error}")


def foresee(study: config.Study, planned: Sequence[PlannedTrial]) -> list[str]:
    """What the study's `analysis` will make of the trials, as far as can be said before they are trained.

    Raises:
        ConfigError: it will not be able to read them; names the kinds that will.
    """
    from analysis.errors import AnalysisError
    from analysis.results import Results
    from analysis.studies import analyse, readable_by
    from sparsemem.study.plan import few_steps

    described = {
        "study": study.study,
        "analysis": study.analysis,
        "vary": [dict(grid) for grid in study.vary],
        "model": study.base.get("model"),
    }
    results = Results.planned(Path(study.study), described, [p.row() for p in planned])
    try:
        analysis = analyse(results)
        analysis.check()
        elsewhere = study.tuned.elsewhere([p.trial for p in planned]) if study.tuned else ""
        return [*few_steps(planned), *filter(None, [elsewhere]), *(analysis.foresee() if len(planned) > 1 else ())]
    except AnalysisError as error:
        problem = str(error).removeprefix(f"{results.folder}: ")
        others = ", ".join(f"`analysis: {kind}`" for kind in readable_by(results))
        raise ConfigError(
            f"field `analysis` has the value {study.analysis!r}, which could not read these trials: {problem} "
            f"({others} could)"
        ) from None


def judge(runs: pandas.DataFrame) -> Judgement:
    """The interval of the best share that the report would give for these runs, and a way to choose the shares that
    shorten it most.

    Raises:
        ConfigError: nothing can be said of the best share, as where nearly all runs have diverged.
    """
    import numpy as np

    from analysis.errors import AnalysisError
    from analysis.fits.allocation import fit_allocation
    from analysis.fits.placement import next_shares
    from analysis.results import learned_nothing
    from sparsemem.study.tune.adapt import Judgement

    def choose(free: Sequence[float], count: int, seeds: int) -> list[float]:
        try:
            return next_shares(fit, free, count, seeds)
        except AnalysisError as error:
            raise ConfigError(str(error)) from None

    try:
        fit = fit_allocation(runs[~learned_nothing(runs, np.log(runs["data.vocab_size"]))])
        return Judgement(fit.interval_of_best, fit.shares, choose)
    except (AnalysisError, KeyError) as error:
        raise ConfigError(str(error)) from None
