"""Studies: from a YAML file to a results folder. `Study` is the same thing for Python that the `sparsemem` command is for a shell."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsemem import config

if TYPE_CHECKING:
    import pandas


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
        """Every trial with its solved sizes, one row each, in the columns of `analysis.load_trials` that are known before training.

        Raises:
            sparsemem.config.ConfigError: a trial misses its budget.
        """
        import pandas

        from sparsemem.study.plan import plan

        planned = plan(self.config)
        return pandas.DataFrame([p.row() for p in planned]).assign(tokens_per_active_param=[p.tokens_per_active_param for p in planned])

    def run(self, results: Path | str = "runs", engine: str = "ray") -> Path:
        """Train what is not finished yet and return the results folder; see `launch.run_study`."""
        from sparsemem.study.launch import run_study

        return run_study(self.config, self.base, Path(results), engine).folder
