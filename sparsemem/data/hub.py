"""The corpus `hub`: a data set of the Hugging Face hub, streamed. It must not know tokens."""

from __future__ import annotations

from pathlib import Path

from sparsemem.config import ConfigError, Data
from sparsemem.data.corpus import Corpus, Document, refused
from sparsemem.data.files import READ_AHEAD, text_of


def open_hub(config: Data, base: Path) -> Corpus:
    name, revision = str(config.dataset), str(config.revision)

    def documents() -> list[Document]:
        try:
            import datasets
        except ImportError:
            raise refused("corpus", "hub", "it needs the package `datasets`; install it with `pip install 'sparsemem[hub]'`") from None
        limit = round(config.max_bytes * READ_AHEAD)
        found = []
        try:
            rows = datasets.load_dataset(name, config.subset, split=config.split, revision=revision, streaming=True)
            for number, row in enumerate(rows, 1):
                text = text_of(row, config.text_field, f"row {number} of {name}")
                if text.strip():
                    found.append(Document(name, f"{name}:{number}", "", len(text), text))
                limit -= len(text)
                if limit <= 0:
                    break
        except ConfigError:
            raise
        except Exception as error:  # the library and its network raise dozens of kinds
            remedy = "check `dataset`, `subset`, `split` and `revision`, and the network"
            raise refused("dataset", name, f"it cannot be read ({type(error).__name__}: {error}); {remedy}") from error
        return found

    return Corpus([name, config.subset, revision, config.split], {name: revision}, documents)
