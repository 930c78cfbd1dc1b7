"""The texts of a study's trials, prepared: a study goes on with the text that it began with, whatever has become of packages and files.

Its tokens are kept in the cache by their digest, which the study's folder names. It must not know engines.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsemem.config import ConfigError, Data, Trial
from sparsemem.data import Batches, Tokens
from sparsemem.data.corpus import Corpus
from sparsemem.data.prepare import cache_folder, check_context, kept_folder, named_corpus, open_corpus, prepare_named, whole_folder
from sparsemem.study.ledger import FINAL, Ledger, data_id

MOST_NAMES = 4  # of what has changed, in a message

Fetch = Callable[[str], Callable[[Path], None] | None]
"""Digest -> what writes that prepared corpus into a folder; None where it is not to be had."""


@dataclass(frozen=True)
class Begun:
    """The text that trials were begun with."""

    digest: str
    trials: int
    """Finished on it."""
    where: Path
    """Their folder, for messages."""


def text_id(data: Data) -> str:
    """Names a text as prepared: `data_id` of one context for all, as its tokens are the same."""
    return data_id(data.model_copy(update={"context": Data.model_fields["context"].default}))


def texts_begun(ledger: Ledger, trials: Iterable[Trial]) -> dict[str, Begun]:
    """What the planned trials of a study were begun with, by `text_id`."""
    trials = list(trials)
    finished = Counter(data_id(trial.data) for trial in trials if ledger.state(trial.id).status in FINAL)
    return begun_with([trial.data for trial in trials], ledger.texts(), finished, ledger.folder)


def begun_with(texts: Iterable[Data], digests: Mapping[str, str], finished: Mapping[str, int], where: Path) -> dict[str, Begun]:
    """The same from digest and number of finished trials by data id."""
    begun: dict[str, Begun] = {}
    for name, text in {data_id(data): text_id(data) for data in texts}.items():
        if name in digests:
            before = begun[text].trials if text in begun else 0
            begun[text] = Begun(digests[name], before + finished.get(name, 0), where)
    return begun


def prepare_corpora(
    trials: Sequence[Trial], base: Path, begun: Mapping[str, Begun], say: Callable[[str], None], fetch: Fetch | None = None
) -> tuple[Mapping[str, Path], Mapping[str, Mapping[str, Any]]]:
    """Folder and manifest of each text that the trials read, by data id.

    Args:
        begun: see `texts_begun`.
        fetch: where tokens may be that the cache lacks.

    Raises:
        ConfigError: the text cannot be had, or is too short for a trial.
    """
    found: dict[str, Path] = {}
    folders: dict[str, Path] = {}
    for name, data in {data_id(trial.data): trial.data for trial in trials}.items():
        text = text_id(data)
        if text not in found:
            found[text] = _text(data, base, begun.get(text), say, fetch)
        check_context(data, found[text])
        folders[name] = found[text].resolve()
    tokens = {name: Tokens.load(folder) for name, folder in folders.items()}
    for trial in trials:
        Batches(tokens[data_id(trial.data)].train, trial.data.context, trial.train.batch_tokens, trial.seed)
    epochs = max((trial.budget.tokens / len(tokens[data_id(trial.data)].train) for trial in trials), default=0.0)
    if epochs > 1:
        say(f"note: trials read their text up to {epochs:.1f} times, which favours memory; `data.max_bytes` admits more")
    return folders, {name: each.manifest for name, each in tokens.items()}


def text_notes(trials: Iterable[Trial], base: Path, begun: Mapping[str, Begun], fetch: Fetch | None) -> list[str]:
    """What `prepare_corpora` would say of texts that have changed since the study began; reads no text and brings none here.

    Raises:
        ConfigError: as `prepare_corpora`, where the text cannot be had.
    """
    notes = []
    for text, data in {text_id(trial.data): trial.data for trial in trials}.items():
        kept = _kept(data, base, begun[text], fetch) if text in begun else None
        if kept:
            notes.append(kept.note)
        else:
            open_corpus(data, base)
    return notes


def _text(data: Data, base: Path, begun: Begun | None, say: Callable[[str], None], fetch: Fetch | None) -> Path:
    kept = _kept(data, base, begun, fetch) if begun else None
    if kept is None:
        return prepare_named(data, base, *named_corpus(data, base), report=say)
    say(kept.note)
    return kept.bring()


@dataclass(frozen=True)
class _Kept:
    """The tokens that a study began with, where its text has changed since."""

    bring: Callable[[], Path]
    note: str


def _kept(data: Data, base: Path, begun: Begun, fetch: Fetch | None) -> _Kept | None:
    """None where the text may be prepared as it is now.

    Raises:
        ConfigError: trials are finished, and neither the tokens nor the text that they were trained on is to be had.
    """
    digest, change = begun.digest, _changed(data, base, begun.digest)
    if change is None or not (begun.trials or data.corpus == "python-source"):  # own files that were mended before anything was finished
        return None
    note = (
        f"note: the text of `data` has changed since the study began ({change}); it goes on with the tokens that it began with, {digest}; "
        "for the new text give the study another `study` name"
    )
    if folder := kept_folder(digest):
        return _Kept(lambda: folder, note)
    if fill := fetch(digest) if fetch else None:
        return _Kept(lambda: whole_folder(digest, fill), note)
    if not begun.trials:
        return None
    raise ConfigError(
        f"{begun.where}: its {begun.trials} finished trials were trained on the corpus {digest}; the text of `data` has changed since "
        f"({change}), and those tokens are not in the cache {cache_folder()}; run it where it began, copy the folder {digest} from the "
        "cache there into this one, bring the text back as it was, or begin anew with another `study` name"
    )


def _changed(data: Data, base: Path, digest: str) -> str | None:
    """How a text differs from the one that has this digest, in words; None where it does not."""
    try:
        corpus, now = named_corpus(data, base)
    except ConfigError as error:
        return str(error)
    if now == digest:
        return None
    folder = kept_folder(digest)
    return f"it comes to {now}" + (_differences(folder, corpus) if folder else "")


def _differences(folder: Path, corpus: Corpus) -> str:
    packages = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["packages"]
    before = {package["name"]: package["version"] for package in packages}
    words = [
        f"{name} {version} is {f'now {corpus.versions[name]}' if name in corpus.versions else 'gone'}"
        for name, version in before.items()
        if corpus.versions.get(name) != version
    ]
    words += [f"{name} is new" for name in corpus.versions if name not in before] if not words else []
    more = [f"and {len(words) - MOST_NAMES} more"] if len(words) > MOST_NAMES else []
    return "".join(f", {word}" for word in [*words[:MOST_NAMES], *more])
