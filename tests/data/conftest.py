"""Small texts made here: words drawn at random, so that no two documents share a shingle by accident."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sparsemem.config import Data

SYLLABLES = np.array(["ka", "Lo", "mi", "ré", "tu", "san", "dor", "vel", "qui", "ß", "na", "po"])


def prose(seed: int, size: int) -> str:
    """About `size` bytes of lines of made-up words, some with accents and capitals."""
    rows = np.random.default_rng(seed).choice(SYLLABLES, (size // 6, 3))
    words = ["".join(row) for row in rows]
    return "\n".join(" ".join(words[i : i + 9]) for i in range(0, len(words), 9))[:size] + "\n"


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    """A folder `corpus/` of twelve text files of 4 to 15 kB."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i}.txt").write_text(prose(i, 4000 + 1000 * i), encoding="utf-8")
    return tmp_path


@pytest.fixture
def small() -> Callable[..., Data]:
    """The settings that fit `text_folder`; keywords replace them."""

    def make(**fields: object) -> Data:
        return Data.model_validate(
            {
                "corpus": "files",
                "files": ["corpus/*"],
                "vocab_size": 400,
                "context": 16,
                "validation_tokens": 2000,
                **fields,
            }
        )

    return make
