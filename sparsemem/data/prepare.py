"""From a study's `data` to a folder of tokens: built once, in a cache named by a digest of the settings and the text.

    train.npy val.npy val_bytes.npy canonical.npy tokenizer.json manifest.json

The folder appears whole or not at all, also when two processes build it at once. It must not know models.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from sparsemem.config import Data, nearest_path
from sparsemem.data.account import accounts, describe_text
from sparsemem.data.cache import STORED, whole_folder
from sparsemem.data.canonical import canonical_table
from sparsemem.data.corpus import Corpus, Document, refused
from sparsemem.data.files import is_undivided, open_files
from sparsemem.data.hub import open_hub
from sparsemem.data.ngrams import overlap
from sparsemem.data.python_source import open_python_source
from sparsemem.data.selection import Selection, fair_share, hold_out_by_size, select
from sparsemem.data.tokenizer import SEPARATOR, load_tokenizer, tokenize, train_tokenizer
from sparsemem.files import write_json
from sparsemem.values import listed

FORMAT = 1  # part of the digest: raise it when the same settings give other tokens
VALIDATION_BYTES_A_TOKEN = (
    6  # text looked at per held-out token: more than a token stands for, as some of it turns out to be duplicates
)
MORE_TEXT = "use more text that differs"
VALIDATION_REMEDY = f"{MORE_TEXT}, or name texts to hold out by `validation_files`"
NOT_IN_TOKENS = ("context", "mask_document_start")  # fields of `data` that studies vary over the same tokens
OVERLAP_ORDERS = (2, 3, 4, 5, 8)

Encoded = tuple[
    Document, npt.NDArray[Any], npt.NDArray[np.int64]
]  # a document, its token ids, the separator last, and their bytes


def prepare(
    config: Data, base: Path, cache: Path | None = None, report: Callable[[str], None] = lambda line: None
) -> Path:
    """Build the tokens of a study, or find them.

    Args:
        config: the study's data. `context` and `mask_document_start` do not enter the digest: studies that vary them
            share their tokens.
        base: the folder of the study's file; globs and the tokenizer's path are relative to it.
        cache: folder of prepared corpora; default `$SPARSEMEM_CACHE` or `~/.cache/sparsemem`.
        report: takes a line of progress now and then.

    Returns:
        The folder, for `Tokens.load`.

    Raises:
        ConfigError: the text is empty, unreadable or too short for `vocab_size`, `context` or `validation_tokens`.
    """
    folder = prepare_named(config, base, *named_corpus(config, base), cache, report)
    check_context(config, folder)
    return folder


def prepare_named(
    config: Data,
    base: Path,
    corpus: Corpus,
    digest: str,
    cache: Path | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """`prepare`, of what `named_corpus` returned, for any context."""
    return whole_folder(digest, lambda temporary: _build(config, corpus, base, temporary, digest, report), cache)


def open_corpus(config: Data, base: Path) -> Corpus:
    """Name the corpus of a study: quick, and all that can be refused without reading much of it.

    Args:
        config: the study's data.
        base: the folder that relative globs start from.

    Raises:
        ConfigError: no file matches, a file has another suffix or cannot be read, a row lacks the text field, the `hub`
            extra is missing.
    """
    return {"python-source": open_python_source, "files": open_files, "hub": open_hub}[config.corpus](config, base)


def named_corpus(config: Data, base: Path) -> tuple[Corpus, str]:
    """The corpus of a study, and the digest that its tokens have in the cache.

    Raises:
        ConfigError: as `open_corpus`, or the tokenizer cannot be read.
    """
    corpus = open_corpus(config, base)
    return corpus, _digest(config, corpus, base)


def check_context(config: Data, folder: Path) -> None:
    """Refuse a context that no document, or not all held-out text of a prepared corpus fills.

    Raises:
        ConfigError: naming both.
    """
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    if manifest["longest_document"] <= config.context:
        remedy = (
            f"the longest document has {manifest['longest_document']} tokens; use a context below that, or longer "
            "documents"
        )
        raise refused("context", config.context, remedy)
    check_held_out(manifest["validation_tokens"], config)


def check_held_out(tokens: int, config: Data) -> None:
    """Refuse a context that all held-out text, of so many tokens or, before they are counted, bytes, does not fill.

    Raises:
        ConfigError: naming both.
    """
    if tokens <= config.context:
        remedy = f"the text held out has {tokens} tokens, no whole sequence; use a context below that, or"
        raise refused("context", config.context, f"{remedy} {VALIDATION_REMEDY}")


def _digest(config: Data, corpus: Corpus, base: Path) -> str:
    named = {"files", "validation_files"} if config.corpus == "files" else set()  # these are named by what they hold
    settings = config.model_dump(mode="json", exclude={*NOT_IN_TOKENS, "tokenizer", *named, *config.unnamed})
    tokenizer = hashlib.sha256(_tokenizer_file(config, base).read_bytes()).hexdigest() if config.tokenizer else None
    text = json.dumps([FORMAT, tokenizers.__version__, settings, tokenizer, corpus.identity], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def given_tokenizer(config: Data, base: Path) -> tuple[tokenizers.Tokenizer, int] | None:
    """The user's tokenizer and its token between documents; None where one is to be trained.

    Raises:
        ConfigError: it cannot be used, whatever the text.
    """
    return (
        load_tokenizer(_tokenizer_file(config, base), config.vocab_size, config.separator) if config.tokenizer else None
    )


def _tokenizer_file(config: Data, base: Path) -> Path:
    path = base / str(config.tokenizer)
    try:
        if not path.is_file():  # a device would never end
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        path.open("rb").close()
    except OSError as error:
        near = nearest_path(path / "tokenizer.json" if path.is_dir() else str(config.tokenizer), base)
        remedy = (
            f"did you mean {near}?" if near else "give the path of a `tokenizer.json`, relative to the study's file"
        )
        raise refused("tokenizer", config.tokenizer, f"it cannot be read ({error.strerror}); {remedy}") from None
    return path


def _build(config: Data, corpus: Corpus, base: Path, folder: Path, digest: str, report: Callable[[str], None]) -> None:
    given = given_tokenizer(config, base)  # the quick check first
    text, total = select_text(config, corpus, report)
    if given:
        tokenizer, separator = given
        padding = config.vocab_size - len(tokenizer.get_vocab())
        report(
            f"tokenizer: {config.tokenizer}, documents end in {tokenizer.id_to_token(separator)}"
            + f", {padding} ids are padding" * (padding > 0)
        )
    else:
        report(f"tokenizer: training a vocabulary of {config.vocab_size}")
        tokenizer = train_tokenizer([kept.text for kept in text.train], config.vocab_size)
        separator = tokenizer.get_vocab()[SEPARATOR]
    name = config.tokenizer or "trained"
    report(f"tokenizer: encoding {sum(len(kept.text) for kept in text.train) / 1e6:.1f} MB")
    held_out = zip(
        text.validation, tokenize(tokenizer, separator, [kept.text for kept in text.validation], name), strict=True
    )
    val = _cut(config, [(kept.document, *encoded) for kept, encoded in held_out], text.near_held_out, separator)
    train = [ids for ids, _ in tokenize(tokenizer, separator, [kept.text for kept in text.train], name)]
    arrays: dict[str, npt.NDArray[Any]] = {
        "train": np.concatenate(train),
        "val": np.concatenate([ids for _, ids, _ in val]),
        "val_bytes": np.concatenate([sizes for _, _, sizes in val]),
        "canonical": canonical_table(tokenizer, config.vocab_size),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=False)
    tokenizer.save(str(folder / "tokenizer.json"))

    report("corpus: measuring how many held-out n-grams occur in the training text")
    sides = {
        "validation": [(document, int(sizes.sum())) for document, _, sizes in val],
        "train": [(kept.document, len(kept.text)) for kept in text.train],
    }
    packages = _packages(sides, corpus.versions)
    manifest = {
        "corpus": config.corpus,
        "digest": digest,
        "packages": packages,
        "documents": len({(document.package, document.name) for side in sides.values() for document, _ in side}),
        "bytes": sum(package["bytes"] for package in packages),
        "text": accounts(
            total, text, sum(package["bytes"] for package in packages if package["split"] == "validation")
        ),
        "remarks": corpus.remarks,
        "duplicates_exact": text.duplicates_exact,
        "duplicates_near": text.duplicates_near,
        "longest_document": max(map(len, train)) - 1,
        "train_tokens": len(arrays["train"]),
        "validation_tokens": len(arrays["val"]),
        "bytes_per_token": sum(len(kept.text) for kept in text.train) / len(arrays["train"]),
        "vocab_size": config.vocab_size,
        "separator_id": separator,
        "canonical_size": int(arrays["canonical"].max()) + 1,
        "overlap": {str(order): overlap(arrays["train"], arrays["val"], order, separator) for order in OVERLAP_ORDERS},
        "stored": {name: (folder / name).stat().st_size for name in STORED},
    }
    write_json(folder / "manifest.json", manifest)
    report(f"corpus {config.corpus}: {describe_text(manifest)}")


def select_text(
    config: Data, corpus: Corpus, report: Callable[[str], None] = lambda line: None
) -> tuple[Selection, int]:
    """What is trained on and what may be held out, and the bytes of all text there is, where that is known.

    Raises:
        ConfigError: as `prepare`, but for what only tokens show.
    """
    report(f"corpus {config.corpus}: reading up to {config.max_bytes / 1e6:.1f} MB")
    documents = corpus.documents()
    if not documents:
        field = "files" if config.corpus == "files" else "dataset"
        value = list(config.files) if config.files else config.dataset
        raise refused(
            field, value, f"no text in {listed(corpus.versions, most=4)}; name files or a data set with text in them"
        )
    held_out = corpus.validation() if corpus.validation else None
    total = sum(document.size for document in (*documents, *(held_out or ())))
    wanted = config.validation_tokens * VALIDATION_BYTES_A_TOKEN
    if held_out is None:
        wanted = min(wanted, int(min(total, config.max_bytes) * config.most_held_out))
        if config.corpus != "python-source":
            documents, held_out = hold_out_by_size(documents, wanted)
    elif not held_out:
        raise refused(
            "validation_files", list(config.validation_files), "no text in them; name files with text in them"
        )
    text = select(documents, config.max_bytes, wanted, held_out, level=config.corpus == "files")
    for line in corpus.remarks:
        report(f"corpus {config.corpus}: {line}")
    report(
        f"corpus {config.corpus}: {text.counts()}"
        + (
            f", {text.held:,} bytes of training text since they are in `validation_files`"
            if config.validation_files and text.held
            else ""
        )
    )
    if not text.train:
        raise refused(
            "corpus",
            config.corpus,
            f"no text is left to train on beside the held-out text{_dropped_of(config, text)}; {MORE_TEXT}",
        )
    if not text.validation:
        raise refused(
            "corpus",
            config.corpus,
            f"no text is left to hold out{_dropped(text.near_held_out, config)}; {VALIDATION_REMEDY}",
        )
    return text, total + sum(corpus.unread.values())


def _dropped_of(config: Data, text: Selection) -> str:
    """Why no training text is left."""
    if config.validation_files and text.held:
        return f", since {text.held:,} bytes are copies or near-copies of `validation_files` and were dropped"
    return _dropped(text.exact + text.near, config)


def _dropped(size: int, config: Data) -> str:
    """Why text is missing, where copies are the reason."""
    whole = "; a text file is one document until `document_separator` divides it, such as `blank lines`" * is_undivided(
        config
    )
    copies = "copies or near-copies of other text (over half of their runs of six words)"
    return f", since {size:,} bytes were {copies} and were dropped{whole}" if size else ""


def _cut(config: Data, encoded: Sequence[Encoded], near_held_out: int, separator: int) -> list[Encoded]:
    """The held-out tokens asked for, no unit giving more than its fair share; a document that is cut still ends in a
    separator.
    """
    sizes: Counter[str] = Counter()
    for document, ids, _ in encoded:
        sizes[document.unit] += len(ids)
    total = config.validation_tokens
    if sizes.total() < total:
        if config.most_held_out >= 0.5:
            remedy = f"write `validation_tokens: {sizes.total()}` or fewer, or {VALIDATION_REMEDY}"
            raise refused(
                "validation_tokens",
                total,
                f"the text held out has {sizes.total()} tokens{_dropped(near_held_out, config)}; {remedy}",
            )
        total = sizes.total()
    room = dict.fromkeys(sizes, fair_share(sizes.values(), total))
    cut = []
    for document, ids, bytes_of_ids in encoded:
        size = min(len(ids), room[document.unit], total)
        if size == len(ids):
            cut.append((document, ids, bytes_of_ids))
        elif size:  # the separator in place of a token stands for no text
            cut.append(
                (
                    document,
                    np.append(ids[: size - 1], ids.dtype.type(separator)),
                    np.append(bytes_of_ids[: size - 1], 0),
                )
            )
        if size:
            room[document.unit] -= size
            total -= size
    return cut


def _packages(sides: Mapping[str, Sequence[tuple[Document, int]]], versions: Mapping[str, str]) -> list[dict[str, Any]]:
    """Files and bytes of each package on each side."""
    entries = []
    for split, documents in sides.items():
        files: dict[str, list[int]] = {}
        for document, size in documents:
            files.setdefault(document.package, []).append(size)
        for name, counts in sorted(files.items()):
            entries.append(
                {"name": name, "version": versions[name], "files": len(counts), "bytes": sum(counts), "split": split}
            )
    return entries
