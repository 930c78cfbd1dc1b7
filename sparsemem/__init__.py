"""sparsemem: where should a fixed number of sparse parameters live, in routed experts or in memory tables?

>>> from sparsemem import Study
>>> study = Study.from_yaml("sweeps/allocation-quick.yaml")  # doctest: +SKIP
>>> study.plan()  # a DataFrame, one row a trial; nothing is trained  # doctest: +SKIP
>>> study.run()  # doctest: +SKIP

A mechanism of your own is made known by `sparsemem.register("module:object")` or by an entry point, see
CONTRIBUTING.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsemem.api import Study
    from sparsemem.config.register import register
    from sparsemem.train.kept import load_model

__all__ = ["Study", "load_model", "register"]


def __getattr__(name: str) -> Any:
    """Load on first use: `import sparsemem.config` alone stays fast."""
    if name == "Study":
        from sparsemem.api import Study

        return Study
    if name == "register":
        from sparsemem.config.register import register

        return register
    if name == "load_model":
        from sparsemem.train.kept import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
