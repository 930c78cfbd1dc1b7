"""The texts of a study's trials, prepared: a study goes on with the text that it began with, whatever has become of
packages and files.

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
from sparsemem.data.batches import token_frequency_loss
from sparsemem.data.cache import cache_folder, kept_folder, whole_folder
from sparsemem.data.corpus import Corpus
from sparsemem.data.prepare import check_context, named_corpus, open_corpus, prepare_named
from sparsemem.results import FINAL
from sparsemem.study.ledger import Ledger
from sparsemem.study.ledger.provenance import data_id
from sparsemem.study.plan.texts import repetition, text_id

GONE = "cannot be read any more"
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


def texts_begun(ledger: Ledger, trials: Iterable[Trial]) -> dict[str, Begun]:
    """What the planned trials of a study were begun with, by `text_id`."""
    trials = list(trials)
    finished = Counter(data_id(trial.data) for trial in trials if ledger.state(trial.id).status in FINAL)
    return begun_with([trial.data for trial in trials], ledger.texts(), finished, ledger.folder)


def begun_with(
    texts: Iterable[Data], digests: Mapping[str, str], finished: Mapping[str, int], where: Path
) -> dict[str, Begun]:
    """The same from digest and number of finished trials by data id."""
    begun: dict[str, Begun] = {}
    for name, text in {data_id(data): text_id(data) for data in texts}.items():
        if name in digests:
            before = begun[text].trials if text in begun else 0
            begun[text] = Begun(digests[name], before + finished.get(name, 0), where)
    return begun


def prepare_corpora(
    trials: Sequence[Trial],
    base: Path,
    begun: Mapping[str, Begun],
    say: Callable[[str], None],
    fetch: Fetch | None = None,
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
    manifests: dict[str, Mapping[str, Any]] = {}
    for name, data in {data_id(trial.data): trial.data for trial in trials}.items():
        text = text_id(data)
        if text not in found:
            found[text], files = _text(data, base, begun.get(text), say, fetch)
            manifests[text] = _manifest(Tokens.load(found[text]), files)
        check_context(data, found[text])
        folders[name] = found[text].resolve()
    tokens = {name: Tokens.load(folder) for name, folder in folders.items()}
    for trial in trials:
        Batches(tokens[data_id(trial.data)].train, trial.data.context, trial.train.batch_tokens, trial.seed)
    for text in found:
        own = [trial for trial in trials if text_id(trial.data) == text]
        if note := repetition(own, tokens[data_id(own[0].data)].manifest):
            say(note)
    return folders, {data_id(trial.data): manifests[text_id(trial.data)] for trial in trials}


def _manifest(tokens: Tokens, files: Mapping[str, str]) -> dict[str, Any]:
    """What a study says of its text: that of the cache, which other names of the same files may have made.

    Args:
        files: content -> name, of the files as they are now; empty where the study goes on without them.
    """
    packages = [each | {"name": files.get(each["version"], each["name"])} for each in tokens.manifest["packages"]]
    return tokens.manifest | {"packages": packages, "token_frequency_loss": token_frequency_loss(tokens)}


def text_notes(
    trials: Iterable[Trial], base: Path, begun: Mapping[str, Begun], fetch: Fetch | None
) -> tuple[list[str], dict[str, str]]:
    """What `prepare_corpora` would say of texts that have changed since the study began; reads no text and brings none
    here.

    Returns:
        The notes, and text id -> digest of the tokens that the study goes on with in place of its text.

    Raises:
        ConfigError: as `prepare_corpora`, where the text cannot be had.
    """
    notes, digests = [], {}
    for text, data in {text_id(trial.data): trial.data for trial in trials}.items():
        change = _changed(data, base, begun[text].digest) if text in begun else None
        kept = _kept(data, begun[text], change, fetch) if change else None
        if kept:
            notes.append(kept.note)
            digests[text] = begun[text].digest
        else:
            open_corpus(data, base)
            notes += _begins_anew(change)
    return notes, digests


def finished_notes(
    trials: Sequence[Trial], waiting: Iterable[str], base: Path, begun: Mapping[str, Begun], ledger: Ledger
) -> tuple[list[str], dict[str, str]]:
    """`text_notes` of own files that no waiting trial reads, never refused; and of finished trials under other names of
    the same text.
    """
    left, notes, digests = set(waiting), [], {}
    read = {text_id(trial.data) for trial in trials if trial.id in left}
    for text, data in {text_id(trial.data): trial.data for trial in trials if trial.data.corpus == "files"}.items():
        if (
            text in begun
            and text not in read
            and begun[text].trials
            and (change := _changed(data, base, begun[text].digest))
        ):
            notes.append(_note(begun[text], change))
            digests[text] = begun[text].digest
    return [*notes, *_renamed_notes(trials, base, ledger)], digests


def _renamed_notes(trials: Iterable[Trial], base: Path, ledger: Ledger) -> list[str]:
    """Of trials that are about to begin: those that are finished on the same text under other names of its files.

    A trial's id holds the names as the study writes them; the digest of its text does not.
    """
    own = [trial for trial in trials if trial.data.corpus == "files" and ledger.state(trial.id).status not in FINAL]
    waiting, digests = {data_id(trial.data): trial.data for trial in own}, ledger.texts()
    if not waiting or not digests.keys() - waiting.keys():
        return []
    now = {name: digest for name, data in waiting.items() if (digest := _digest_now(data, base)) in digests.values()}
    ids, found = {trial.id for trial in own}, Counter[tuple[str, str]]()
    for id_ in ledger.files.begun() if now else ():
        old = None if id_ in ids or ledger.state(id_).status not in FINAL else ledger.trial(id_)
        for name, digest in now.items():
            names = {each: getattr(waiting[name], each) for each in ("files", "validation_files")}
            if old and digests.get(data_id(old.data)) == digest:
                found[_names(old.data), _names(waiting[name])] += (
                    old.model_copy(update={"data": old.data.model_copy(update=names)}).id in ids
                )
    return [
        f"note: {count} finished trial{'s' * (count != 1)} in {ledger.folder} read the same text under another name "
        f"({before}; now {after}); a trial's id holds the names, so under the new ones they are trained again; to keep "
        f"them write `{before}` into the study and give the files those names again"
        for (before, after), count in found.items()
        if count
    ]


def _digest_now(data: Data, base: Path) -> str | None:
    try:
        return named_corpus(data, base)[1]
    except ConfigError:
        return None


def _names(data: Data) -> str:
    fields = {name: list(getattr(data, name)) for name in ("files", "validation_files")}
    return ", ".join(
        f"{name}: [{', '.join(json.dumps(each) for each in value)}]" for name, value in fields.items() if value
    )


def _text(
    data: Data, base: Path, begun: Begun | None, say: Callable[[str], None], fetch: Fetch | None
) -> tuple[Path, Mapping[str, str]]:
    """Folder of the tokens, and content -> name of own files that they were made of."""
    change = _changed(data, base, begun.digest) if begun else None
    kept = _kept(data, begun, change, fetch) if begun and change else None
    if kept is None:
        for note in _begins_anew(change):
            say(note)
        corpus, digest = named_corpus(data, base)
        names = {version: name for name, version in corpus.versions.items()} if data.corpus == "files" else {}
        return prepare_named(data, base, corpus, digest, report=say), names
    say(kept.note)
    return kept.bring(), {}


def _begins_anew(change: str | None) -> list[str]:
    """A note where the text has changed and nothing is finished on what it was, so that trials begin anew."""
    return [
        f"note: the text of `data` {change}; no trial is finished on what it was, so trials begin anew with the text "
        "as it is now"
    ] * bool(change)


@dataclass(frozen=True)
class _Kept:
    """The tokens that a study began with, where its text has changed since."""

    bring: Callable[[], Path]
    note: str


def _kept(data: Data, begun: Begun, change: str, fetch: Fetch | None) -> _Kept | None:
    """None where the text may be prepared as it is now.

    Raises:
        ConfigError: trials are finished, and neither the tokens nor the text that they were trained on is to be had.
    """
    digest = begun.digest
    if not (begun.trials or data.corpus == "python-source"):  # own files that were mended before anything was finished
        return None
    note = _note(begun, change)
    if folder := kept_folder(digest):
        return _Kept(lambda: folder, note)
    if fill := fetch(digest) if fetch else None:
        return _Kept(lambda: whole_folder(digest, fill), note)
    if not begun.trials:
        return None
    trained = f"{begun.trials} finished trial{'s were' if begun.trials != 1 else ' was'}"
    raise ConfigError(
        f"{begun.where}: its {trained} trained on the corpus {digest}; the text of `data` {change}, and those tokens "
        f"are not in the cache {cache_folder()}; run it where it began, copy the folder {digest} from the cache there "
        "into this one, bring the text back as it was, or begin anew with another `study` name"
    )


def _note(begun: Begun, change: str) -> str:
    trials = f" as its {begun.trials} finished trial{'s' * (begun.trials != 1)} did" if begun.trials else ""
    remedy = (
        "keep those tokens in the cache, or bring the text back as it was"
        if change.startswith(GONE)
        else "no curve mixes two texts; for the new text give the study another `study` name"
    )
    return (
        f"note: the text of `data` {change}; it goes on with the tokens that it began with, {begun.digest}{trials}; "
        f"{remedy}"
    )


def _changed(data: Data, base: Path, digest: str) -> str | None:
    """What has become of the text that had this digest, in words; None where it has it still."""
    try:
        corpus, now = named_corpus(data, base)
    except ConfigError as error:
        return f"{GONE} ({error})"
    if now == digest:
        return None
    folder = kept_folder(digest)
    differences = _differences(folder, corpus, data.corpus != "files") if folder else ""
    return f"has changed since the study began (it comes to {now}{differences})"


def _differences(folder: Path, corpus: Corpus, released: bool) -> str:
    packages = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["packages"]
    before = {package["name"]: package["version"] for package in packages}
    now = {version for version in corpus.versions.values() if not released}  # a file may only have another name
    words = [
        f"{name} {version} is {f'now {corpus.versions[name]}' if name in corpus.versions else 'gone'}"
        for name, version in before.items()
        if corpus.versions.get(name) != version and version not in now
    ]
    words += [f"{name} is new" for name in corpus.versions if name not in before] if not words else []
    more = [f"and {len(words) - MOST_NAMES} more"] if len(words) > MOST_NAMES else []
    return "".join(f", {word}" for word in [*words[:MOST_NAMES], *more])
