"""sparsemem: where should a fixed number of sparse parameters live, in routed experts or in memory tables?

>>> from sparsemem import Study
>>> study = Study.from_yaml("sweeps/allocation-quick.yaml")  # doctest: +SKIP
>>> study.plan()  # a DataFrame, one row a trial; nothing is trained  # doctest: +SKIP
>>> study.run()  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsemem.study import Study

__all__ = ["Study"]


def __getattr__(name: str) -> Any:
    """Load `Study` on first use: `import sparsemem.config` alone stays fast."""
    if name == "Study":
        from sparsemem.study import Study

        return Study
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
