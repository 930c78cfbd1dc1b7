"""Texts before they are prepared: which bytes a study's trials read, whether those are enough, and how often they are
read.

It must not know what a study was begun with.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsemem.config import ConfigError, Data, Trial
from sparsemem.data.account import accounts, describe_text
from sparsemem.data.batches import check_batch
from sparsemem.data.cache import kept_folder
from sparsemem.data.prepare import NOT_IN_TOKENS, check_held_out, named_corpus, select_text
from sparsemem.study.ledger.provenance import data_id


def text_id(data: Data) -> str:
    """Names a text as prepared: `data_id` without what leaves its tokens the same."""
    return data_id(data.model_copy(update={name: Data.model_fields[name].default for name in NOT_IN_TOKENS}))


def describe_texts(
    trials: Iterable[Trial], base: Path, kept: Mapping[str, str] | None = None, finished: Collection[str] = ()
) -> tuple[list[dict[str, Any]], str]:
    """What the trials read, before it is prepared: a record a text, and in words; its tokens are counted where the
    cache has them.

    Of a text that is not prepared, own files are read and split as they will be; of others only the sizes are known.

    Args:
        kept: text id -> digest of the tokens that a study goes on with, whatever has become of the text.
        finished: trial ids. A text that no other trial reads may be gone: it is left out.

    Raises:
        ConfigError: `run` will refuse: a text cannot be read, or is too short.
    """
    records, lines = [], []
    texts: dict[str, list[Trial]] = {}
    for trial in trials:
        texts.setdefault(text_id(trial.data), []).append(trial)
    for text, own in texts.items():
        data = own[0].data
        going_on = (kept or {}).get(text)
        try:
            manifest, digest = _foreseen(data, base, going_on)
        except ConfigError:
            if all(trial.id in finished for trial in own):
                continue
            raise
        if "text" in manifest:
            lines.append(
                f"{data.corpus}: "
                f"{describe_text(manifest)}{''.join(f'; {remark}' for remark in manifest.get('remarks', ()))}"
            )
        elif going_on:
            lines.append(f"{data.corpus}: the tokens {digest}, which are not in this cache")
        else:
            lines.append(f"{data.corpus}: up to {data.max_bytes:,} bytes of text, which `run` prepares")
        _check_sizes(own, manifest)
        lines += filter(None, [repetition(own, manifest)])
        counted = {name: manifest[name] for name in ("train_tokens", "validation_tokens") if name in manifest}
        times = {"repetition": often} if (often := _times_read(own, manifest)) else {}
        records.append({"corpus": data.corpus, "digest": digest, **manifest.get("text", {}), **counted, **times})
    return records, "\n".join(lines)


def _foreseen(data: Data, base: Path, going_on: str | None) -> tuple[dict[str, Any], str]:
    """What is known of a text before it is prepared, and the digest of its tokens.

    Args:
        going_on: digest of the tokens that are used in place of the text.

    Raises:
        ConfigError: the text cannot be read.
    """
    corpus, digest = (None, going_on) if going_on else named_corpus(data, base)
    if folder := kept_folder(digest):
        return json.loads((folder / "manifest.json").read_text(encoding="utf-8")), digest
    if not corpus or data.corpus != "files":
        return {}, digest
    selection, total = select_text(data, corpus)
    held = min(
        sum(len(kept.text) for kept in selection.validation), round(data.validation_tokens * _bytes_a_token(data))
    )
    return {"text": accounts(total, selection, held), "remarks": corpus.remarks}, digest


def _check_sizes(trials: Sequence[Trial], manifest: Mapping[str, Any]) -> None:
    """Refuse what `run` would: a text too short for a sequence or a batch. A token has a byte at least, where they are
    not counted yet.

    Raises:
        ConfigError: naming the field.
    """
    text = manifest.get("text", {})
    held, train = (manifest.get(f"{side}_tokens", text.get(side)) for side in ("validation", "train"))
    for data, batch_tokens in dict.fromkeys((trial.data, trial.train.batch_tokens) for trial in trials):
        if held is not None:
            check_held_out(held, data)
        if train is not None:
            check_batch(train, data.context, batch_tokens)


def _bytes_a_token(data: Data) -> float:
    """About, before there are tokens: one with the bytes themselves for a vocabulary, three with 4,096 entries."""
    return max(1.0, 1 + math.log2(data.vocab_size / 256) / 2)


def _times_read(trials: Sequence[Trial], manifest: Mapping[str, Any]) -> float | None:
    """How often the longest trial reads its text; about, where its tokens are not counted yet, and None where nothing
    is known of it.
    """
    tokens = manifest.get("train_tokens") or manifest.get("text", {}).get("train", 0) / _bytes_a_token(trials[0].data)
    return round(max(trial.budget.tokens for trial in trials) / tokens, 2) if tokens else None


def repetition(trials: Sequence[Trial], manifest: Mapping[str, Any]) -> str:
    """A warning where text is read more than once."""
    times = _times_read(trials, manifest) or 0.0
    if times <= 1:
        return ""
    about = "" if "train_tokens" in manifest else "about "
    more = (
        "`data.max_bytes` admits more"
        if "over max_bytes" in manifest.get("text", {}).get("unused", {})
        else "use more text"
    )
    return (
        f"note: trials read their text up to {about}{times:.3g} times, which favours memory; {more}, or fewer "
        "`budget.tokens`"
    )
