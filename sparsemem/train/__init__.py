"""One trial from its config to its result, without studies and without Ray."""

from sparsemem.train.loop import measure_step, run_trial

__all__ = ["measure_step", "run_trial"]
