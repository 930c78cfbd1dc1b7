"""The corpus `hub`: a data set of the Hugging Face hub, streamed. It must not know tokens."""

from __future__ import annotations

from pathlib import Path

from sparsemem.config import ConfigError, Data
from sparsemem.data.corpus import Corpus, Document, refused
from sparsemem.data.files import READ_AHEAD, SPLIT
from sparsemem.data.readers import text_of


def open_hub(config: Data, base: Path) -> Corpus:
    name, revision, remarks = str(config.dataset), str(config.revision), list[str]()

    def documents() -> list[Document]:
        try:
            import datasets
        except ImportError:
            raise refused(
                "corpus", "hub", "it needs the package `datasets`; install it with `pip install 'sparsemem[hub]'`"
            ) from None
        limit = round(config.max_bytes * READ_AHEAD)
        found, empty = [], 0
        try:
            rows = datasets.load_dataset(name, config.subset, split=config.split, revision=revision, streaming=True)
            for number, row in enumerate(rows, 1):
                text = text_of(row, config.text_field, f"row {number} of {name}")
                if text is None:
                    empty += 1
                    continue
                if text.strip():
                    found.append(Document(name, name, f":{number}", len(text), text))
                limit -= len(text)
                if limit <= 0:
                    break
        except ConfigError:
            raise
        except Exception as error:  # the library and its network raise dozens of kinds
            remedy = "check `dataset`, `subset`, `split` and `revision`, and the network"
            raise refused("dataset", name, f"it cannot be read ({type(error).__name__}: {error}); {remedy}") from error
        if empty and not found:
            raise refused(
                "text_field", config.text_field, f"all {empty} rows of {name} are null there; name the column of text"
            )
        if empty:
            remarks.append(f"{name}: {empty} rows skipped whose `{config.text_field}` is null")
        return found

    return Corpus([SPLIT, name, config.subset, revision, config.split], {name: revision}, documents, remarks=remarks)
