"""Which models a study keeps (`run.keep_models`), how large they are, and which of its finished trials have none. It
must not know engines or torch.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from sparsemem.accounting import BYTES_PER_PARAMETER
from sparsemem.config import ConfigError, Run, Study, Trial
from sparsemem.results import TrialStatus
from sparsemem.study.ledger import Ledger
from sparsemem.study.plan import PlannedTrial
from sparsemem.study.text import size
from sparsemem.trial_files import MODEL, PACK
from sparsemem.values import brief


def check_kept(study: Study, trials: Collection[Trial]) -> None:
    """
    Raises:
        ConfigError: `run.keep_models` names a share or an id that no trial has, nor may get by a search of the shares.
    """
    names = () if isinstance(study.run.keep_models, bool) or study.searches else study.run.keep_models
    for name in names:
        if any(trial.is_named(name) for trial in trials):
            continue
        shares = dict.fromkeys("dense" if trial.rho is None else f"{trial.rho:g}" for trial in trials)
        raise ConfigError(
            f"field `run.keep_models` names {brief(name)}, which no trial of this study has; its shares are "
            f"{', '.join(shares)}, and `sparsemem plan` shows the ids"
        )


def kept_size(run: Run, planned: Sequence[PlannedTrial]) -> dict[str, int]:
    """Number of the models that are kept, and bytes of their weights: of all together and of the largest."""
    sizes = [
        BYTES_PER_PARAMETER * (p.account.total_params + p.account.embedding_params)
        for p in planned
        if run.keeps(p.trial)
    ]
    return {"models": len(sizes), "bytes": sum(sizes), "largest_bytes": max(sizes, default=0)}


def describe_kept(run: Run, planned: Sequence[PlannedTrial]) -> str:
    """A line of the plan; '' where no model is kept."""
    if not run.keep_models:
        return ""
    found = kept_size(run, planned)
    return (
        f"models kept: {found['models']} of {len(planned)}, {size(found['bytes'])}, the largest "
        f"{size(found['largest_bytes'])}"
    )


def without_model(run: Run, trials: Iterable[Trial], ledger: Ledger) -> list[str]:
    """Says of finished trials that have no model although one is to be kept that they are not trained again, and what
    to type.
    """
    if not run.keep_models:
        return []
    wanted = [trial.id for trial in trials if run.keeps(trial)]
    lacking = [
        id_
        for id_ in wanted
        if ledger.state(id_).status == TrialStatus.FINISHED and not (ledger.trial_folder(id_) / MODEL).is_file()
    ]
    if not lacking:
        return []
    packed = [id_ for id_ in lacking if id_ in ledger.files.packed]
    told = f"{ledger.folder}: {_counted(lacking)} finished before `run.keep_models` named them, so without a model: "
    told += f"{', '.join(lacking)}; they are not trained again"
    lines = [told]
    if loose := [str(ledger.trial_folder(id_) / "result.json") for id_ in lacking if id_ not in packed]:
        there = f", and the same files below {run.storage}" * bool(run.storage)
        lines.append(f"to train them again and keep their models: rm {shlex.join(loose)}{there}; then run the study")
    if packed:
        lines.append(
            f"{_counted(packed)} of these in {PACK}: run the study with --results and another folder to keep their "
            "models"
        )
    return lines


def _counted(ids: Sequence[Any]) -> str:
    return f"{len(ids)} trial{'s' * (len(ids) > 1)}"
