"""A Hugging Face data set, read from a local folder as the library allows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsemem.config import ConfigError, Data
from sparsemem.data import Tokens, prepare

from .conftest import prose

pytest.importorskip("datasets", reason="needs the extra: pip install 'sparsemem[hub]'")
Settings = Callable[..., Data]


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(json.dumps({"text": prose(i, 3000)}) for i in range(40)))
    return folder


def test_rows_are_documents(dataset: Path, tmp_path: Path, small: Settings) -> None:
    config = small(corpus="hub", dataset=str(dataset), revision="main", files=[])
    tokens = Tokens.load(prepare(config, tmp_path, tmp_path / "cache"))
    assert {p["version"] for p in tokens.manifest["packages"]} == {"main"}
    assert sum(p["files"] for p in tokens.manifest["packages"] if p["split"] == "train") > 20
    assert len(tokens.val) == 2000


def test_no_more_rows_are_streamed_than_needed(dataset: Path, tmp_path: Path, small: Settings) -> None:
    config = small(corpus="hub", dataset=str(dataset), revision="main", files=[], max_bytes="40k")
    assert Tokens.load(prepare(config, tmp_path, tmp_path / "cache")).manifest["bytes"] <= 40_000


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": "/no/such/set"}, r"`data.dataset` has the value '/no/such/set': it cannot be read"),
        ({"split": "absent"}, r"`data.dataset`.*absent"),
        (
            {"text_field": "body"},
            r"`data.text_field` has the value 'body': row 1 of .* has no such column; it has text",
        ),
    ],
)
def test_bad_names_are_refused(
    dataset: Path, tmp_path: Path, small: Settings, fields: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(
            small(**{"corpus": "hub", "dataset": str(dataset), "revision": "main", "files": [], **fields}),
            tmp_path,
            tmp_path / "cache",
        )
