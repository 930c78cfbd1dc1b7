"""One trial from its config to its result, without studies and without Ray."""

from sparsemem.train.loop import run_trial
from sparsemem.train.step import measure_step

__all__ = ["measure_step", "run_trial"]
