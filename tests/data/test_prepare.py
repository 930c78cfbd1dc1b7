"""From settings to a folder of tokens, and every bad input on the way."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer

from sparsemem.config import ConfigError, Data
from sparsemem.data import Tokens, prepare
from sparsemem.data.ngrams import occurrences_in, overlap

from .conftest import prose

Settings = Callable[..., Data]
WIKITEXT = Path(__file__).parents[3] / "shared/data/text/wikitext-2-valid.txt"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_folder_holds_the_text(text_folder: Path, small: Settings) -> None:
    lines: list[str] = []
    tokens = Tokens.load(prepare(small(), text_folder, text_folder / "cache", lines.append))
    assert len(tokens.val) == 2000
    assert tokens.train.dtype == tokens.val.dtype == np.uint16
    assert tokens.canonical.shape == (400,)
    assert tokens.val_bytes.shape == tokens.val.shape
    assert tokens.canonical_size == len(set(tokens.canonical.tolist())) < 400
    assert not tokens.val_bytes[tokens.val == tokens.separator_id].any()
    assert tokens.manifest["vocab_size"] == tokens.vocab_size == 400
    assert len(lines) >= 4

    files = {path.name: path.read_bytes() for path in (text_folder / "corpus").iterdir()}
    text = tokens.manifest["text"]
    assert (
        text["train"] + text["validation"] + sum(text["unused"].values())
        == text["total"]
        == sum(map(len, files.values()))
    )
    assert text["train"] >= 0.9 * text["total"]
    tokenizer = Tokenizer.from_file(str(text_folder / "cache" / tokens.digest / "tokenizer.json"))
    begins = tokenizer.decode(tokens.train.tolist(), skip_special_tokens=False).split("<|endoftext|>")[:-1]
    assert len(begins) == len(files)
    rests = [
        next(content for content in files.values() if content.startswith(begin.encode()))[len(begin.encode()) :]
        for begin in begins
    ]
    assert tokens.val[-1] == tokens.separator_id
    held = tokenizer.decode(tokens.val[:-1].tolist(), skip_special_tokens=False).split("<|endoftext|>")
    assert len(held) >= 4
    assert all(any(rest.startswith(part.rstrip("\ufffd").encode()) for rest in rests) for part in held)


def test_two_builds_give_the_same_bytes(text_folder: Path, small: Settings) -> None:
    first, second = (prepare(small(), text_folder, text_folder / name) for name in ("a", "b"))
    assert first.name == second.name
    assert contents(first) == contents(second)


def test_a_prepared_folder_is_found_again_whatever_the_context(text_folder: Path, small: Settings) -> None:
    folder = prepare(small(), text_folder, text_folder / "cache")
    lines: list[str] = []
    assert prepare(small(context=64), text_folder, text_folder / "cache", lines.append) == folder
    assert not lines


def test_other_text_or_settings_go_to_another_folder(text_folder: Path, small: Settings) -> None:
    folders = [
        prepare(small(), text_folder, text_folder / "cache"),
        prepare(small(vocab_size=300), text_folder, text_folder / "cache"),
    ]
    (text_folder / "corpus" / "0.txt").write_text(prose(99, 4000))
    folders.append(prepare(small(), text_folder, text_folder / "cache"))
    assert len(set(folders)) == 3


@pytest.mark.parametrize("harm", ["truncate", "no manifest", "corrupt manifest", "missing array"])
def test_a_damaged_folder_is_built_again(text_folder: Path, small: Settings, harm: str) -> None:
    folder = prepare(small(), text_folder, text_folder / "cache")
    whole = contents(folder)
    if harm == "truncate":
        (folder / "train.npy").write_bytes(whole["train.npy"][:-2])
    elif harm == "no manifest":
        (folder / "manifest.json").unlink()
    elif harm == "corrupt manifest":
        (folder / "manifest.json").write_text("[")
    else:
        (folder / "canonical.npy").unlink()
    assert prepare(small(), text_folder, text_folder / "cache") == folder
    assert contents(folder) == whole


def test_builders_at_once_agree_and_leave_nothing_behind(text_folder: Path, small: Settings) -> None:
    cache = text_folder / "cache"
    (cache / ".stale").mkdir(parents=True)
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        folders = pool.starmap(prepare, [(small(), text_folder, cache)] * 3)
    assert len(set(folders)) == 1
    digest = folders[0].name
    assert sorted(path.name for path in cache.iterdir()) == sorted([".stale", digest, f"{digest}.lock"])


def test_a_failed_build_leaves_nothing_and_the_rests_of_a_killed_one_go(text_folder: Path, small: Settings) -> None:
    cache = text_folder / "cache"
    digest = prepare(small(), text_folder, cache).name
    shutil.rmtree(cache / digest)
    (cache / f".{digest}.killed").mkdir()
    prepare(small(), text_folder, cache)
    with pytest.raises(ConfigError):
        prepare(small(vocab_size=60_000), text_folder, cache)
    assert [path.name for path in cache.iterdir() if path.suffix != ".lock"] == [digest]


def test_the_environment_names_the_cache(text_folder: Path, small: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEMEM_CACHE", str(text_folder / "elsewhere"))
    assert prepare(small(), text_folder).parent == text_folder / "elsewhere"


def test_a_given_tokenizer_is_used(text_folder: Path, small: Settings) -> None:
    folder = prepare(small(), text_folder, text_folder / "cache")
    shutil.copy(folder / "tokenizer.json", text_folder / "mine.json")
    given = prepare(small(tokenizer="mine.json"), text_folder, text_folder / "cache")
    assert given != folder
    assert (given / "train.npy").read_bytes() == (folder / "train.npy").read_bytes()


def test_rows_of_jsonl_and_parquet_are_documents(tmp_path: Path, small: Settings) -> None:
    rows = [prose(i, 3000) for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"body": row, "n": 1}) for row in rows[:20]) + "\n\n")
    pyarrow.parquet.write_table(pyarrow.table({"n": [1] * 20, "body": rows[20:]}), tmp_path / "b.parquet")
    config = small(files=["*.jsonl", "b.parquet"], text_field="body")
    manifest = Tokens.load(prepare(config, tmp_path, tmp_path / "cache")).manifest
    assert {p["name"] for p in manifest["packages"] if p["split"] == "train"} == {"a.jsonl", "b.parquet"}
    assert sum(p["files"] for p in manifest["packages"] if p["split"] == "validation") >= 4
    assert manifest["duplicates_exact"] == 0


def test_one_file_is_cut_in_two(tmp_path: Path, small: Settings) -> None:
    if not WIKITEXT.is_file():
        pytest.skip("needs shared/data/text/wikitext-2-valid.txt beside the checkout")
    config = small(files=[str(WIKITEXT)], vocab_size=1024, validation_tokens="50k")
    tokens = Tokens.load(prepare(config, tmp_path, tmp_path / "cache"))
    assert tokens.manifest["documents"] == 1
    assert len(tokens.val) == 50_000
    assert 0.8 < tokens.manifest["overlap"]["2"] < 1
    assert {p["split"]: p["bytes"] for p in tokens.manifest["packages"]}["validation"] == tokens.val_bytes.sum()


def test_installed_packages_are_text(tmp_path: Path) -> None:
    config = Data.model_validate({"max_bytes": "600k", "validation_tokens": "20k", "vocab_size": 1024})
    manifest = Tokens.load(prepare(config, tmp_path, tmp_path)).manifest
    names = {
        split: {p["name"] for p in manifest["packages"] if p["split"] == split} for split in ("train", "validation")
    }
    assert not names["train"] & names["validation"]
    assert len(names["validation"]) >= 4
    assert "sparsemem" not in names["train"] | names["validation"]
    assert all(p["version"] for p in manifest["packages"])
    assert manifest["bytes"] <= 600_000
    assert (
        0
        < manifest["overlap"]["8"]
        < manifest["overlap"]["5"]
        < manifest["overlap"]["3"]
        < manifest["overlap"]["2"]
        < 1
    )
    assert str(Path.home()) not in json.dumps(manifest)


def test_overlap_by_hand() -> None:
    train = np.array([1, 2, 3, 4, 0, 5, 6], dtype=np.uint16)
    val = np.array([1, 2, 3, 0, 5, 6, 9, 2, 3], dtype=np.uint16)
    # Pairs that hold no separator (0): 12 yes, 23 yes, 56 yes, 69 no, 92 no, 23 yes.
    assert overlap(train, val, 2, separator=0) == pytest.approx(4 / 6)
    # Triples: 123 yes, 569 no, 692 no, 923 no.
    assert overlap(train, val, 3, separator=0) == pytest.approx(1 / 4)
    assert overlap(train, val, 8, separator=0) == 0


@pytest.mark.parametrize("chunk", [2, 1 << 24])
def test_occurrences_by_hand(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr("sparsemem.data.ngrams.CHUNK", chunk)
    train = np.array([1, 2, 1, 2, 0, 1, 2, 3, 0], dtype=np.uint16)
    text = np.array([1, 2, 3, 0, 2, 9], dtype=np.uint16)
    assert occurrences_in(train, text, 1, separator=0).tolist() == [3, 3, 1, -1, 3, 0]
    assert occurrences_in(train, text, 2, separator=0).tolist() == [-1, 3, 1, -1, -1, 0]
    assert occurrences_in(train, text, 3, separator=0).tolist() == [-1, -1, 1, -1, -1, -1]
    assert occurrences_in(train, text, 7, separator=0).tolist() == [-1] * 6
    assert occurrences_in(train, np.zeros(3, np.uint16), 2, separator=0).tolist() == [-1] * 3


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"files": ["nothing/*.txt"]}, r"`data.files` has the value 'nothing/\*.txt': no file matches"),
        ({"files": ["bda/blnk.txt"]}, r"no file matches it in .*; did you mean 'bad/blank.txt'\?"),
        ({"validation_files": ["bda/*.txt"]}, r"`data.validation_files` .*; did you mean 'bad/\*.txt'\?"),
        ({"tokenizer": "bad/blnk.txt"}, r"`data.tokenizer` .*it cannot be read .*; did you mean bad/blank.txt\?"),
        ({"files": ["bad/image.png"]}, r"`data.files` has the value 'bad/image.png': the suffix is none of .txt"),
        ({"files": ["bad/latin.txt"]}, r"'latin.txt': byte 3 is not UTF-8"),
        ({"files": ["bad/broken.jsonl"]}, r"'broken.jsonl': line 2 is not JSON"),
        ({"files": ["bad/broken.parquet"]}, r"'broken.parquet': not a Parquet file"),
        (
            {"files": ["bad/rows.jsonl"]},
            r"`data.text_field` has the value 'text': line 1 of rows.jsonl has no such column; it has body, n",
        ),
        ({"files": ["bad/list.jsonl"]}, r"`data.text_field`.*element 1 of list.jsonl has no such column; it has none"),
        ({"files": ["bad/rows.jsonl"], "text_field": "n"}, r"line 1 of rows.jsonl holds int there"),
        (
            {"files": ["bad/rows.parquet"]},
            r"`data.text_field` has the value 'text': rows.parquet has no such column; it has body",
        ),
        ({"files": ["bad/blank.txt"]}, r"`data.files` .*: no text in bad/blank.txt; name files"),
        ({"vocab_size": 60_000}, r"`data.vocab_size` has the value 60000: the training text supports \d+ entries"),
        ({"context": 100_000}, r"`data.context` has the value 100000: the longest document has \d+ tokens"),
        (
            {"validation_tokens": "10M"},
            r"`data.validation_tokens` has the value 10000000: the text held out has \d+ tokens",
        ),
        ({"files": ["bad/word.txt"]}, r"`data.vocab_size` has the value 400: .*or more text"),
        ({"tokenizer": "none.json"}, r"`data.tokenizer` has the value 'none.json': it cannot be read \(No such file"),
        ({"tokenizer": "bad/blank.txt"}, r"`data.tokenizer` has the value 'blank.txt': not a tokenizer"),
    ],
)
def test_bad_input_is_named_and_nothing_stays(
    text_folder: Path, small: Settings, fields: dict[str, object], message: str
) -> None:
    bad = text_folder / "bad"
    bad.mkdir()
    (bad / "image.png").write_bytes(b"\x89PNG")
    (bad / "latin.txt").write_bytes(b"caf\xe9 au lait\n" * 50)
    (bad / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (bad / "broken.parquet").write_bytes(b"no parquet")
    (bad / "rows.jsonl").write_text('{"body": "a", "n": 1}\n')
    (bad / "list.jsonl").write_text("[1]\n")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), bad / "rows.parquet")
    (bad / "blank.txt").write_text(" \n")
    (bad / "word.txt").write_text("word")
    with pytest.raises(ConfigError, match=message):
        prepare(small(**fields), text_folder, text_folder / "cache")
    if "context" not in fields:
        assert not [path for path in text_folder.glob("cache/*") if path.suffix != ".lock"]


def test_a_cache_that_cannot_be_made_is_named(text_folder: Path, small: Settings) -> None:
    (text_folder / "file").write_text("")
    with pytest.raises(ConfigError, match="set SPARSEMEM_CACHE"):
        prepare(small(), text_folder, text_folder / "file" / "cache")


def test_hub_without_its_extra_names_the_remedy(
    tmp_path: Path, small: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"`data.corpus` has the value 'hub'.*sparsemem\[hub\]"):
        prepare(small(corpus="hub", dataset="a/b", revision="main"), tmp_path, tmp_path / "cache")
