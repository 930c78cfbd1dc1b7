"""`sparsemem probe`: the probes of all kept models of a study, from its results folder and the text in the cache.

<study>/probes/lens_area.csv                 of pairs of models, the area between their lens curves
<study>/probes/cka.csv                       of pairs of models, by layers of both
<study>/probes/alignment.csv                 soft alignment index of pairs, less that of another seed

Those of one model: `probes.trial`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparsemem.config import ConfigError, Run, Trial
from sparsemem.probes.bootstrap import named, ratio
from sparsemem.probes.cka import CKA, KINDS, LEAST_TOKENS
from sparsemem.probes.pairs import SEEDS, alignments, by_share, pairs, share_of
from sparsemem.probes.sample import Sample
from sparsemem.probes.trial import FOLDER, probe_trial, write_rows
from sparsemem.results import TrialStatus
from sparsemem.study.ledger import Ledger
from sparsemem.study.plan.kept import without_model
from sparsemem.study.text import table
from sparsemem.train.kept import KeptModel, load_model
from sparsemem.train.text_loss import held_out_text, read_text, training_ids
from sparsemem.trial_files import MODEL
from sparsemem.values import parse_kept

ALL, UNIT_ENDS = "all", "unit_ends"
"""Positions: all, or those at which a word or identifier of several tokens ends."""
TOKENS_AT_ONCE = 2048  # whose streams of all layers of both models are held, in float64; a minibatch of CKA

Say = Callable[[str], object]


def probe_study(
    folder: Path, names: Sequence[str], sequences: int, device: str, say: Say, texts: Sequence[str] = ()
) -> str:
    """Write the probes' files; returns what came out, for people.

    Args:
        names: shares or ids of the trials to probe; none: all.
        sequences: of the text, at most.
        say: is told of each step.
        texts: files or globs to read in place of the held-out text.

    Raises:
        ConfigError: no model was kept of these trials, one is damaged, the cache lacks their text, or its sequences are
            too short for CKA.
    """
    if sequences < 1:
        raise ConfigError(f"--sequences {sequences}: write 1 or more sequences of the text")
    trials = kept_trials(Ledger.read(folder), names)
    chosen = list(pairs(trials))
    for _, first, _ in chosen:
        if first.data.context < LEAST_TOKENS:
            raise ConfigError(
                f"`data.context` of trial {first.id} is {first.data.context}, and CKA needs {LEAST_TOKENS} "
                "tokens; name by --trial one trial, which is compared with none"
            )
    steps, done = len(trials) + len(chosen), 0
    loaded = lru_cache(maxsize=2)(lambda id_: load_model(folder / "trials" / id_, device))
    samples, under = Samples(sequences, texts), dict[str, npt.NDArray[np.float64]]()
    for trial in trials:
        done += 1
        say(f"[{done}/{steps}] lens, gates, suppression and usage of {_named(trial)}")
        kept = loaded(trial.id)
        area_S = probe_trial(kept, samples.of(kept), folder / "trials" / trial.id)
        assert area_S is not None
        under[trial.id] = area_S.numpy()
    rows, areas, compared = list[dict[str, Any]](), list[dict[str, Any]](), list[tuple[str, Trial, Trial, Tensor]]()
    for kind, first, second in chosen:
        done += 1
        say(f"[{done}/{steps}] CKA of {_named(first)} and {_named(second)}")
        found = compare(loaded(first.id), loaded(second.id), samples)
        for positions, cka in found.items():
            rows += [{"pair": kind, "positions": positions, **row} for row in cka_rows(first, second, cka)]
        compared.append((kind, first, second, found[ALL].matrix("unbiased")[1:, 1:]))
        scored_S = (samples.of(loaded(first.id)).windows[1] >= 0).sum(1).double().numpy()
        between = named("area", ratio(under[second.id] - under[first.id], scored_S))
        areas.append({"pair": kind, **of_pair(first, second), **between})
    if not chosen:
        return f"{len(trials)} probed; no two of them differ in their shares or their seed alone, so none are compared"
    write_rows(folder / FOLDER / "lens_area.csv", areas)
    write_rows(folder / FOLDER / "cka.csv", rows)
    aligned = alignments(compared)
    if aligned:
        write_rows(folder / FOLDER / "alignment.csv", aligned)
    return _summary(aligned, any(kind == SEEDS for kind, *_ in chosen))


def kept_trials(ledger: Ledger, names: Sequence[str]) -> list[Trial]:
    """The trials of these names, or all, whose model was kept, in the order of the plan.

    Raises:
        ConfigError: there is none; says what to type.
    """
    ids = [row["trial_id"] for row in ledger.rows]
    trials = [trial for id_ in ids if (trial := ledger.trial(id_)) is not None]
    if names:
        try:
            wanted = parse_kept(list(names))
        except ValueError as error:
            raise ConfigError(f"--trial: {error}") from None
        for name in wanted:
            if not any(trial.is_named(name) for trial in trials):
                known = ", ".join(f"{trial.id} (share {share_of(trial)})" for trial in trials)
                raise ConfigError(f"--trial {name}: no trial that was begun has it; these were: {known or 'none'}")
        trials = [trial for trial in trials if any(map(trial.is_named, wanted))]
    kept = [trial for trial in trials if (ledger.trial_folder(trial.id) / MODEL).is_file()]
    if not kept or (names and len(kept) < len(trials)):
        lacking = [trial for trial in trials if trial not in kept]
        told = without_model(Run(keep_models=True), lacking, ledger)
        unfinished = [trial.id for trial in lacking if ledger.state(trial.id).status != TrialStatus.FINISHED]
        if unfinished or not trials:
            told.append(f"not finished: {', '.join(unfinished) or 'any trial'}; run the study")
        of = ", ".join(trial.id for trial in lacking) if names else "its trials"
        remedy = "write `run: {keep_models: true}` into the study's file before they are trained"
        raise ConfigError("\n".join([f"{ledger.folder}: holds no kept model ({MODEL}) of {of}; {remedy}", *told]))
    return kept


def _named(trial: Trial) -> str:
    return f"{trial.id} (share {share_of(trial)}, seed {trial.seed})"


class Samples:
    """The sequences that models read, of their held-out text or of files; trials of one text share what is known of
    it.
    """

    def __init__(self, sequences: int, texts: Sequence[str] = ()) -> None:
        self._sequences, self._texts = sequences, texts
        self._found: dict[tuple[Any, ...], Sample] = {}

    def of(self, kept: KeptModel) -> Sample:
        data = kept.trial.data
        key = (kept.corpus, data.context, data.validation_tokens, data.mask_document_start)
        if key not in self._found:
            self._found.clear()
            text = read_text(kept, self._texts, Path(), "--text") if self._texts else held_out_text(kept)
            ids = text.ids
            if len(ids) <= data.context:
                raise ConfigError(
                    f"the text has {len(ids):,} tokens, which fill no sequence of `data.context` {data.context}; name "
                    "more text"
                )
            self._found[key] = Sample.of(kept, ids, lambda: training_ids(kept, (), Path()), self._sequences)
        return self._found[key]


def compare(first: KeptModel, second: KeptModel, samples: Samples) -> dict[str, CKA]:
    """CKA of what enters the first block and what leaves each: at `ALL` positions of the held-out sequences and at
    `UNIT_ENDS`, where the text has enough of those.

    Raises:
        ConfigError: they were trained on different texts.
    """
    if first.corpus != second.corpus:
        raise ConfigError(
            f"trials {first.trial.id} and {second.trial.id} were trained on different texts ({first.corpus} and "
            f"{second.corpus}); name trials of one text by --trial"
        )
    sample = samples.of(first)
    inputs_ST, ends_ST = sample.windows[0], torch.from_numpy(sample.unit_ends_P).view(sample.sequences, -1)
    found, at_once = {ALL: CKA(), UNIT_ENDS: CKA()}, max(1, TOKENS_AT_ONCE // inputs_ST.shape[1])
    for inputs_BT, ends_BT in zip(inputs_ST.split(at_once), ends_ST.split(at_once), strict=True):
        streams, ends_N = [_streams(kept, inputs_BT) for kept in (first, second)], ends_BT.flatten()
        found[ALL].add(*streams)
        if int(ends_N.sum()) >= LEAST_TOKENS:
            found[UNIT_ENDS].add(*([each[ends_N.to(each.device)] for each in layers] for layers in streams))
    return {positions: cka for positions, cka in found.items() if cka.tokens}


@torch.inference_mode()
def _streams(kept: KeptModel, inputs_BT: Tensor) -> list[Tensor]:
    device, precision = kept.model.embedding.device, kept.precision
    with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
        return [each.flatten(0, 1) for each in kept.model.residual_streams(inputs_BT.to(device))]


def of_pair(first: Trial, second: Trial) -> dict[str, Any]:
    """Columns that name two trials."""
    return {
        **{"first_id": first.id, "second_id": second.id},
        **{"first_share": share_of(first), "second_share": share_of(second)},
        **{"first_seed": first.seed, "second_seed": second.seed},
    }


def cka_rows(first: Trial, second: Trial, cka: CKA) -> Iterator[dict[str, Any]]:
    """One for each layer of the first and each of the second, 0 being what enters the first block."""
    values = {kind: cka.matrix(kind).tolist() for kind in KINDS}
    for layer, row in enumerate(values[KINDS[0]]):
        for other in range(len(row)):
            yield {
                **of_pair(first, second),
                "first_layer": layer,
                "second_layer": other,
                **{kind: values[kind][layer][other] for kind in KINDS},
                "tokens": cka.tokens,
            }


def _summary(aligned: Sequence[Mapping[str, Any]], with_null: bool) -> str:
    lines = list[str]()
    if aligned and with_null:
        cells = [
            [
                f"{share} in {reference}",
                *("-" if each is None else f"{each:+.3f}" for each in (mean, error)),
                str(seeds),
            ]
            for reference, share, mean, error, seeds in by_share(aligned)
        ]
        lines += [
            "soft alignment index less that of the reference's own other seeds, mean over layers (positive: as deep as",
            "later layers of the reference), with its standard error over seeds, whose nulls share models:",
            table(["share in reference", "layers", "error", "seeds"], cells),
        ]
    elif aligned:
        lines += [
            "the soft alignment index has no null to be held against: train a second seed of each share "
            "(`vary: {seed: [0, 1]}`) and keep its model"
        ]
    return "\n".join([*lines, "CKA between layers stands in probes/cka.csv of the study, the index in alignment.csv"])
