"""What a trial tells of its way: the rows of `curve.csv` and of `usage.csv`."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsemem.files import write_text

CURVE_COLUMNS = (
    "step",
    "tokens",
    "train_loss",
    "val_loss",
    "lr",
    "grad_norm",
    "expert_load_max",
    "tokens_per_second",
    "seconds",
)
USAGE_COLUMNS = (
    *(
        "step",
        "tokens",
        "layer",
        "pool",
        "coverage",
        "kl_uniform",
        "top1_score",
        "topm_score",
        "output_std",
        "singular_values",
    ),
    "gate_mean",
)
"""Of every `usage.csv`; what else a mechanism logs follows."""


@dataclass
class _Since:
    """What has gathered since the last row of the curve. Part of the checkpoint, so that a resumed curve has the same
    rows.
    """

    loss: float = 0.0
    norm: float = 0.0
    load: float = 0.0
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Curve:
    """Rows so far, and what has gathered for the next."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.usage: list[dict[str, Any]] = []
        self.seconds = 0.0
        self.since = _Since()

    def gather(self, loss: float, norm: float, load: float, seconds: float, tokens: int) -> None:
        """Take in one step.

        Args:
            loss: nats per token.
            norm: of the gradient.
            load: of the busiest expert, next to an even one; NaN where there is none.
            seconds: that the step took.
            tokens: trained on up to its end.
        """
        since = self.since
        since.loss, since.norm, since.steps = since.loss + loss, since.norm + norm, since.steps + 1
        since.load += load
        since.seconds += seconds
        since.tokens = tokens - (self.rows[-1]["tokens"] if self.rows else 0)
        self.seconds += seconds

    def end_row(self, step: int, tokens: int, rate: float, val_loss: float | None) -> None:
        """A row of what has gathered."""
        since, self.since = self.since, _Since()
        self.rows.append(
            {
                "step": step,
                "tokens": tokens,
                "train_loss": since.loss / since.steps,
                "val_loss": val_loss,
                "lr": rate,
                "grad_norm": since.norm / since.steps,
                "expert_load_max": since.load / since.steps,
                "tokens_per_second": since.tokens / since.seconds,
                "seconds": self.seconds,
            }
        )

    def write(self, folder: Path) -> None:
        """Both files, as far as there is something to tell."""
        write_text(folder / "curve.csv", _csv(CURVE_COLUMNS, self.rows))
        if self.usage:
            columns = dict.fromkeys(name for names in (USAGE_COLUMNS, *self.usage) for name in names)
            write_text(folder / "usage.csv", _csv(list(columns), self.usage))
        else:  # what an unusable checkpoint may have left
            (folder / "usage.csv").unlink(missing_ok=True)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"seconds": self.seconds, "since": vars(self.since), "curve": self.rows, "usage": self.usage}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Curve:
        """From a checkpoint that holds, among other things, a `state`."""
        curve = cls()
        curve.since = _Since(**state["since"])
        curve.seconds, curve.rows, curve.usage = state["seconds"], state["curve"], state["usage"]
        return curve


def _csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_shown(row.get(column)) for column in columns] for row in rows)
    return text.getvalue()


def _shown(value: Any) -> str:
    """A number as text that reads back to the same losses in every run; several with spaces; nothing for what was not
    measured.
    """
    if isinstance(value, str | list):
        return value if isinstance(value, str) else " ".join(map(_shown, value))
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(value) if isinstance(value, int) else f"{value:.9g}"
