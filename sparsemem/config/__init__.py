"""Every field of a study: its unit, its default, its bounds. YAML in, typed and frozen objects out.

This package must not know torch or Ray: `analysis` reads it, and a study is refused here before anything heavy is
loaded.

- `Study` is what the user writes: one base trial, the axes to `vary`, and how to run.
- `Trial` is one point of it, fully resolved. Its identity is the hash of its fields (`Trial.id`), so a finished trial
  is recognised in whatever study asks for it, and an edited one is a new trial.
- `ConfigError` names the file, the field, the value and the remedy.
"""

from sparsemem.config.data import Data
from sparsemem.config.model import Model
from sparsemem.config.nearest import nearest_path, study_around
from sparsemem.config.optimum import FIRST_SHARES, GRID_SHARES, Optimum
from sparsemem.config.run import Probe, Run
from sparsemem.config.study import Study, changed, load_study, load_tuned
from sparsemem.config.trial import WIDEST_TOLERANCE, Budget, Train, Trial
from sparsemem.config.tune import Search, Tune, Tuned, Winner, named, point, settings
from sparsemem.mechanisms import MEMORY_POOLS, POOLS
from sparsemem.values import BudgetError, ConfigError, parse_quantity, parse_real, parse_share

__all__ = [
    "FIRST_SHARES",
    "GRID_SHARES",
    "MEMORY_POOLS",
    "POOLS",
    "WIDEST_TOLERANCE",
    "Budget",
    "BudgetError",
    "ConfigError",
    "Data",
    "Model",
    "Optimum",
    "Probe",
    "Run",
    "Search",
    "Study",
    "Train",
    "Trial",
    "Tune",
    "Tuned",
    "Winner",
    "changed",
    "load_study",
    "load_tuned",
    "named",
    "nearest_path",
    "parse_quantity",
    "parse_real",
    "parse_share",
    "point",
    "settings",
    "study_around",
]
