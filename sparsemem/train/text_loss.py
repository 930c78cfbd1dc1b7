"""The loss of a kept model on a text: of all of it, of each document, and by how often n-grams occur in the training
text.

A text is read, divided and cut into sequences as a held-out set is, so the files that a study holds out give its
trials' `val_loss` again. What fills no whole sequence at the end is not scored; a text shorter than one sequence is.

Shape letters: N tokens of a text, S sequences, T positions, P targets in whole sequences (S x T).
"""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sparsemem.config import ConfigError, nearest_path
from sparsemem.data import Tokens, validation_windows
from sparsemem.data.cache import kept_folder
from sparsemem.data.ngrams import occurrences_in
from sparsemem.data.prepare import open_corpus
from sparsemem.data.selection import levelled
from sparsemem.data.tokenizer import MOST_UNKNOWN, encode
from sparsemem.train.evaluate import sequences_at_once, token_losses
from sparsemem.train.kept import KeptModel

BATCHES_AT_ONCE = 64  # whose windows are held at a time
EVERY_BYTE = 10**15  # of a text: none is left out
ORDERS = (1, 2, 3)  # and those of the model's memories
LEAST = (0, 1, 2, 10, 100, 1000)  # occurrences from which a bin begins


@dataclass(frozen=True)
class Text:
    """Documents in tokens, each with a separator at its end.

    Attributes:
        ids: [N].
        sizes: UTF-8 bytes that each token stands for, [N].
        names: of the documents.
        lengths: tokens of each document.
        remarks: a line each.
    """

    ids: npt.NDArray[Any]
    sizes: npt.NDArray[np.int64]
    names: list[str]
    lengths: list[int]
    remarks: list[str]


def read_text(kept: KeptModel, files: Sequence[str], base: Path, option: str) -> Text:
    """The text of files, as the trial's own would be read.

    Args:
        files: paths or globs.
        base: the folder that relative ones start from.
        option: that gives them, for a refusal.

    Raises:
        ConfigError: there is no such file, or no text in it, or it cannot be read.
    """
    for name in files:
        if not os.path.isfile(base / name) and not glob.glob(str(base / name), recursive=True):
            near = nearest_path(name, base)
            raise ConfigError(f"{option} {name}: no such file" + (f"; did you mean {near}?" if near else ""))
    data = kept.trial.data.model_copy(
        update={"corpus": "files", "files": tuple(files), "validation_files": (), "max_bytes": EVERY_BYTE}
    )
    try:
        documents = [each for each in levelled(open_corpus(data, base).documents()) if each.read()]
    except ConfigError as error:
        words = str(error).replace("field `data.files` has the value", option)
        if "`data.text_field`" in words:
            words = f"{option}: {words}; the model's study reads that column, so give files that have it"
        raise ConfigError(words) from None
    texts = [document.read() or b"" for document in documents]
    if not texts:
        raise ConfigError(f"{option} {' '.join(files)}: no text in there; name files with text in them")
    encoded = list(encode(kept.tokenizer, texts))
    unknown = sum(each.unknown for each in encoded) / sum(map(len, texts))
    remarks = [f"{unknown:.1%} of the text is unknown to the model's tokenizer"] if unknown > MOST_UNKNOWN else []
    return Text(
        np.concatenate([np.append(each.ids, kept.separator_id) for each in encoded]),
        np.concatenate([each.sizes for each in encoded]),
        [f"{document.package}{document.name}" for document in documents],
        [len(each.sizes) for each in encoded],
        remarks,
    )


def held_out_text(kept: KeptModel) -> Text:
    """What the trial was evaluated on, where the cache has its corpus; documents are numbered.

    Raises:
        ConfigError: it has not.
    """
    tokens = _corpus(kept)
    if tokens is None:
        raise ConfigError(
            f"the cache does not hold the corpus {kept.corpus} of this model, and with it its held-out text; set "
            "SPARSEMEM_CACHE to the folder that holds it, or (`sparsemem evaluate`) name texts by --text FILES"
        )
    count = min(kept.trial.data.validation_tokens, len(tokens.val))
    ids, sizes = np.array(tokens.val[:count]), np.array(tokens.val_bytes[:count])
    ends = np.append(np.flatnonzero(ids[:-1] == kept.separator_id) + 1, count)
    names = [f"held-out document {number + 1}" for number in range(len(ends))]
    return Text(ids, sizes, names, np.diff(ends, prepend=0).tolist(), [])


def training_ids(kept: KeptModel, files: Sequence[str], base: Path) -> npt.NDArray[Any] | None:
    """Tokens of the training text: of these files, else of the trial's own, where the cache has it; else None."""
    if files:
        return read_text(kept, files, base, "--train").ids
    tokens = _corpus(kept)
    return None if tokens is None else tokens.train


def _corpus(kept: KeptModel) -> Tokens | None:
    folder = kept_folder(kept.corpus)
    return None if folder is None else Tokens.load(folder)


def evaluate(kept: KeptModel, text: Text, train: npt.NDArray[Any] | None) -> dict[str, Any]:
    """
    Args:
        train: tokens of the training text; None: nothing is said of n-grams.

    Returns:
        `loss` and `loss_se` (nats per token), `bits_per_byte`, `documents` and `ngrams` (a mapping for each document
        and for each order and bin), `tokens` of the text and those that were `scored`.

    Raises:
        ConfigError: no token of the text has one before it to predict it from.
    """
    sums_S, losses_P, scored_P = _losses(kept, text.ids)
    count = int(scored_P.sum())
    if not count:
        raise ConfigError("the text is too short: it has no token after another one; name more text")
    means_S = sums_S / (count / len(sums_S))
    bytes_P = text.sizes[1 : len(scored_P) + 1]
    document_P = np.repeat(np.arange(len(text.lengths)), text.lengths)[1 : len(scored_P) + 1]

    def part(chosen_P: npt.NDArray[np.bool_]) -> dict[str, Any]:
        tokens, loss, size = int(chosen_P.sum()), float(losses_P[chosen_P].sum()), int(bytes_P[chosen_P].sum())
        return {
            "tokens": tokens,
            "bytes": size,
            "loss": loss / tokens if tokens else None,
            "bits_per_byte": loss / size / math.log(2) if size else None,
        }

    loss, size = float(means_S.mean()), int(bytes_P[scored_P].sum())
    return {
        "trial_id": kept.trial.id,
        "tokens": len(text.ids),
        "scored": count,
        "bytes": size,
        "loss": loss,
        "loss_se": float(means_S.std() / math.sqrt(len(means_S))) if len(means_S) > 1 else None,
        "bits_per_byte": loss * count / size / math.log(2) if size else None,
        "documents": [
            {"name": name, **part(scored_P & (document_P == number))} for number, name in enumerate(text.names)
        ],
        "ngrams": [] if train is None else list(_by_occurrences(kept, text.ids, train, scored_P, part)),
        "remarks": text.remarks,
    }


def _losses(
    kept: KeptModel, ids: npt.NDArray[Any]
) -> tuple[torch.Tensor, npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Nats of each sequence (S,), nats of each target [P], and which targets count [P]."""
    context = kept.trial.data.context
    unscored_after = kept.separator_id if kept.trial.data.mask_document_start else None
    sequences, beyond = (len(ids) - 1) // context, 0
    if not sequences:
        beyond = context + 1 - len(ids)
        ids, sequences = np.append(ids, [kept.separator_id] * beyond), 1
    sums, losses, scored = list[torch.Tensor](), list[torch.Tensor](), list[torch.Tensor]()
    at_once = BATCHES_AT_ONCE * sequences_at_once(context)
    for first in range(0, sequences, at_once):
        count = min(at_once, sequences - first)
        window = ids[first * context : (first + count) * context + 1]
        inputs_ST, targets_ST = validation_windows(window, context, count, unscored_after)
        of_text_T = torch.arange(context) < context - beyond  # a short text ends before its sequence
        targets_ST = targets_ST.where(of_text_T, -1)
        for losses_BT in token_losses(kept.model, inputs_ST, targets_ST, kept.precision):
            sums.append(losses_BT.double().sum(1).cpu())
            losses.append(losses_BT.double().flatten().cpu())
        scored.append((targets_ST >= 0).flatten())
    end = sequences * context - beyond
    return torch.cat(sums), torch.cat(losses).numpy()[:end], torch.cat(scored).numpy()[:end]


def _by_occurrences(
    kept: KeptModel, ids: npt.NDArray[Any], train: npt.NDArray[Any], scored_P: npt.NDArray[np.bool_], part: Any
) -> Iterator[dict[str, Any]]:
    """For each order, the targets by how often the n-gram before them, which a memory reads there, occurs in the
    training text; first those before which none lies within their sequence and document.
    """
    place_P = np.arange(len(scored_P)) % kept.trial.data.context
    own = (order for fields in kept.trial.model.pools.values() for order in getattr(fields, "orders", ()))
    for order in sorted({*ORDERS, *own}):
        counts_P = occurrences_in(train, ids, order, kept.separator_id)[: len(scored_P)]
        counts_P[place_P < order - 1] = -1
        for least, below in zip((-1, *LEAST), (*LEAST, math.inf), strict=True):
            found = part(scored_P & (counts_P >= least) & (counts_P < below))
            most = None if below == math.inf else int(below) - 1
            yield {"order": order, "least": None if least < 0 else least, "most": most, **found}
