"""Which text a trial reads, how it is cut into tokens and what is held out."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, StrictBool, model_validator

from sparsemem.values import Quantity, Size, Strict, brief

Location = Annotated[str, Field(pattern=r"^[^\x00]+$")]
"""A path, or a glob; no system has one with a zero byte in it."""


SMALLEST_BPE = 260
"""Entries: 256 bytes, the separator, some pairs."""

FIRST_DATA_FIELDS = frozenset(
    [
        "corpus",
        "vocab_size",
        "context",
        "max_bytes",
        "validation_tokens",
        "tokenizer",
        "files",
        "text_field",
        "dataset",
        "subset",
        "revision",
        "split",
    ]
)


BLANK_LINES = "blank lines"


def separating_pattern(separator: str | None) -> str | None:
    """The regular expression of a `document_separator` between slashes; None of any other."""
    return separator[1:-1] if separator and len(separator) > 2 and separator[0] == separator[-1] == "/" else None


class Data(Strict):
    """Which text, how it is cut into tokens, and what is held out."""

    corpus: Literal["python-source", "files", "hub"] = "python-source"
    """`python-source`: Python's standard library and the packages that this one requires, where they are the same on
    every platform; `files`: your own; `hub`: Hugging Face `datasets`.
    """
    vocab_size: Annotated[Size, Field(ge=2)] = 4096
    """Entries of the byte-level BPE trained on the corpus, specials included, at least 260; with `tokenizer`, the size
    of that tokenizer, or more: the ids beyond it are padding.
    """
    context: Annotated[Size, Field(ge=2)] = 128
    """Tokens a training sequence."""
    max_bytes: Quantity = 32_000_000
    """Text kept after de-duplication. More is not read: a study needs `budget.tokens` tokens of about 3 bytes."""
    validation_tokens: Quantity = 131_072
    """Size of the fixed held-out set, whole packages or documents never seen in training; of a document longer than
    a quarter of it, the end. The default holds out at most a tenth of the text; another number is met or refused."""
    tokenizer: Location | None = None
    """A `tokenizer.json` to use in place of a trained one; relative to the study's file. Its truncation, padding,
    templates and dropout are not applied. Refused where over 1% of the text is unknown to it.
    """
    separator: Annotated[str, Field(min_length=1)] | None = None
    """The token of `tokenizer` that ends a document, such as `</s>`; by default one of a common name."""
    mask_document_start: StrictBool = False
    """The first token of a document, which follows a separator, is no target, neither in training nor held out; it
    counts as a token of the budget. Attention reaches across documents in any case, within a sequence.
    """
    files: tuple[Location, ...] = ()
    """Globs of `.txt`, `.py`, `.md`, `.jsonl`, `.ndjson`, `.json` or `.parquet` files, also compressed (`.gz`, `.zst`),
    relative to the study's file (corpus `files`).
    """
    validation_files: tuple[Location, ...] = ()
    """Globs of files to hold out in place of a part of `files`, up to `validation_tokens`; what also matches `files` is
    not trained on.
    """
    document_separator: str | None = None
    """What divides a `.txt`, `.py` or `.md` file into documents: a line that reads so, such as `<|endoftext|>`; a
    pattern between slashes, such as `/^= [^=]+ =$/`, whose lines begin a document; or `blank lines`. Without it a file
    is one document.
    """
    text_field: str = "text"
    """The column that holds the text (JSON, Parquet, hub), or its dotted path, such as `meta.body`."""
    dataset: str | None = None
    """Hub data set, `owner/name` (corpus `hub`)."""
    subset: str | None = None
    """Named configuration of the hub data set, if it has several."""
    revision: str | None = None
    """Branch, tag or commit of the hub data set; required, so that the text cannot change under a study."""
    split: str = "train"
    """Split of the hub data set that is streamed."""

    @model_validator(mode="after")
    def _complete(self) -> Data:
        if self.vocab_size < SMALLEST_BPE and not self.tokenizer:
            raise ValueError(
                f"`vocab_size` is {self.vocab_size}; a byte-level BPE takes at least {SMALLEST_BPE}; only a "
                "`tokenizer` may have fewer"
            )
        if self.separator and not self.tokenizer:
            raise ValueError(
                f"`separator` {brief(self.separator)} names a token of `tokenizer`, which is not given; give both or "
                "leave it out"
            )
        if self.corpus == "files" and not self.files:
            raise ValueError("corpus 'files' needs `files`: a list of globs such as ['corpus/*.txt']")
        if self.corpus == "hub" and not (self.dataset and self.revision):
            raise ValueError("corpus 'hub' needs `dataset` (owner/name) and `revision` (a branch, tag or commit)")
        if self.corpus != "files" and (self.validation_files or self.document_separator):
            name = "validation_files" if self.validation_files else "document_separator"
            raise ValueError(f"`{name}` is for corpus 'files', and the corpus is '{self.corpus}'; leave it out")
        if pattern := separating_pattern(self.document_separator):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"`document_separator` {pattern!r} is no regular expression ({error})") from None
        return self

    @property
    def most_held_out(self) -> float:
        """Share of the text that is held out at most."""
        return 0.1 if self.validation_tokens == type(self).model_fields["validation_tokens"].default else 0.5

    @property
    def unnamed(self) -> set[str]:
        """Fields younger than the first results that keep their default: ids and digests leave them out, and stay what
        they were.
        """
        fields = {name: field for name, field in type(self).model_fields.items() if name not in FIRST_DATA_FIELDS}
        return {name for name, field in fields.items() if getattr(self, name) == field.get_default()}
