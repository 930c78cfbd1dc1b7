"""The probes of one kept model, written into its trial's folder.

<trial>/probes/logit_lens.csv     what each layer would predict
<trial>/probes/gates.csv          how far gates open, and at what
<trial>/probes/gate_text.csv      gates at each token of a passage
<trial>/probes/suppression.csv    the loss without a pool's sparse parameters
<trial>/probes/usage.csv          of experts and rows, and what n-grams share
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from sparsemem.config import Probe
from sparsemem.data import Tokens
from sparsemem.files import write_text
from sparsemem.probes.gates import gate_rows, text_rows
from sparsemem.probes.logit_lens import MEASURES, logit_lens
from sparsemem.probes.reading import read
from sparsemem.probes.sample import Sample
from sparsemem.probes.suppression import suppression_rows
from sparsemem.probes.use import usage_rows
from sparsemem.train.kept import KeptModel, load_model

FOLDER = "probes"
LENS, GATES, SUPPRESSION, USAGE = PROBES = get_args(Probe)


SEQUENCES = 256
"""Held-out sequences that are read, at most, unless another number is asked for."""


def probe_folder(trial_folder: Path, tokens_folder: Path, device: str, probes: bool | Sequence[str]) -> None:
    """Probe the model that was kept in a trial's folder.

    Args:
        tokens_folder: what `data.prepare` built.
        probes: names of the files to write; True: all.
    """
    kept, tokens = load_model(trial_folder, device), Tokens.load(tokens_folder)
    held_out = np.array(tokens.val[: kept.trial.data.validation_tokens])
    probe_trial(kept, Sample.of(kept, held_out, lambda: tokens.train, SEQUENCES), trial_folder, probes)


def probe_trial(
    kept: KeptModel, sample: Sample, trial_folder: Path, probes: bool | Sequence[str] = True
) -> Tensor | None:
    """Write the files of these probes. One of which the model has nothing (a dense one has no gates, pools or rows) is
    left out.

    Returns:
        The area under KL(final || layer) against relative depth (`under_lens`); None without a lens.
    """
    folder, chosen, under_S = trial_folder / FOLDER, PROBES if isinstance(probes, bool) else probes, None
    if LENS in chosen:
        parts = list(logit_lens(kept.model, *sample.windows, kept.precision))
        sums_SL3, counts_S = (torch.cat(part) for part in zip(*parts, strict=True))
        write_rows(folder / f"{LENS}.csv", lens_rows(sums_SL3, counts_S))
        under_S = under_lens(sums_SL3)
    if set(chosen) - {LENS}:
        losses_ST, readings = read(kept.model, *sample.windows, kept.precision)
        if GATES in chosen:
            write_rows(folder / f"{GATES}.csv", gate_rows(sample, readings))
            write_rows(folder / "gate_text.csv", text_rows(sample, readings))
        if SUPPRESSION in chosen:
            rows = suppression_rows(kept.model, sample, losses_ST, readings, kept.precision)
            write_rows(folder / f"{SUPPRESSION}.csv", rows)
        if USAGE in chosen:
            write_rows(folder / f"{USAGE}.csv", usage_rows(readings))
    return under_S


def under_lens(sums_SL3: Tensor) -> Tensor:
    """The area under the first of `MEASURES` against depth from 0 to 1, by trapezoids; summed over the tokens of each
    sequence, (S,).

    >>> under_lens(torch.tensor([[[4.0], [1.0], [0.0]]]))
    tensor([1.5000])
    """
    kl_SL = sums_SL3[..., 0]
    return (kl_SL.sum(1) - (kl_SL[:, 0] + kl_SL[:, -1]) / 2) / (kl_SL.shape[1] - 1)


def lens_rows(sums_SL3: Tensor, counts_S: Tensor) -> list[dict[str, Any]]:
    """Of each layer, `MEASURES` in nats per token, each with its standard error over sequences."""
    means_SL3 = sums_SL3 / counts_S.double().mean()
    rows = []
    for layer in range(means_SL3.shape[1]):
        row: dict[str, Any] = {"layer": layer}
        for place, name in enumerate(MEASURES):
            of_S = means_SL3[:, layer, place]
            row[name] = float(of_S.mean())
            row[f"{name}_se"] = float(of_S.std() / math.sqrt(len(of_S))) if len(of_S) > 1 else None
        rows.append(row | {"sequences": len(means_SL3), "tokens": int(counts_S.sum())})
    return rows


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A CSV, or none where there are no rows; a value that is missing or not a number is empty."""
    rows = list(rows)
    if not rows:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        missing = {name: "" for name, value in row.items() if isinstance(value, float) and math.isnan(value)}
        writer.writerow({**row, **missing})
    path.parent.mkdir(exist_ok=True)
    write_text(path, text.getvalue())
