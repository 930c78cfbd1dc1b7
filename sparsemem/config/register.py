"""Mechanisms from outside of the package, by name."""

from __future__ import annotations

import os
from importlib.metadata import EntryPoint

from sparsemem.config.model import add_fields
from sparsemem.config.trial import Trial
from sparsemem.mechanisms import GROUP, VARIABLE, load


def register(name: str) -> None:
    """Make a mechanism known here, and to the worker processes that start from now on.

    Args:
        name: `module:object`, of an instance of a `sparsemem.mechanisms.Mechanism`. Workers import it by this name, so
            its module must be installed, on PYTHONPATH, or in the folder in which the study is run; machines of a
            cluster need it as an entry point.

    Raises:
        ImportError: it cannot be imported, or is no mechanism.
        ValueError: its name is taken.
    """
    add_fields(load(EntryPoint(name, name, GROUP)))
    Trial.model_rebuild(force=True)
    known = filter(None, os.environ.get(VARIABLE, "").split(","))
    os.environ[VARIABLE] = ",".join(dict.fromkeys([*known, name]))
