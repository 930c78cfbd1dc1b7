"""The user's own text: what names, sizes and kinds of files make of it."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer

from sparsemem.config import ConfigError, Data
from sparsemem.data import Tokens, prepare
from sparsemem.data.files import open_files
from sparsemem.data.prepare import named_corpus, select_text

from .conftest import prose

Settings = Callable[..., Data]


def prepared(base: Path, config: Data) -> Tokens:
    return Tokens.load(prepare(config, base, base / "cache"))


@pytest.mark.parametrize(
    "texts", [[70_000], [40_000, 9_000, 3_000], [6_000] * 9, [500] * 60, [30_000, *[400] * 40]], ids=len
)
def test_names_decide_nothing_and_at_most_a_tenth_is_held_out(
    tmp_path: Path, small: Settings, texts: list[int]
) -> None:
    found = []
    for names in ("abcdefghij", "zyxwvutsrq"):
        base = tmp_path / names
        (base / "corpus").mkdir(parents=True)
        for i, size in enumerate(texts):
            (base / "corpus" / f"{names[i % 10]}{i}.txt").write_text(prose(i, size), encoding="utf-8")
        found.append(prepared(base, small(validation_tokens=131_072, vocab_size=300)))
        text = found[-1].manifest["text"]
        assert 0.03 * text["total"] < text["validation"] <= 0.1 * text["total"]
        assert text["train"] + text["validation"] >= 0.97 * text["total"]
        assert text["train"] + text["validation"] + sum(text["unused"].values()) == text["total"]
    assert found[0].digest == found[1].digest
    for name in ("train", "val"):
        assert np.array_equal(getattr(found[0], name), getattr(found[1], name))


def test_a_number_of_held_out_tokens_is_met_or_refused_with_the_number_there_is(
    text_folder: Path, small: Settings
) -> None:
    assert len(prepared(text_folder, small(validation_tokens="9k")).val) == 9000  # more than a tenth, as asked
    with pytest.raises(
        ConfigError, match=r"the text held out has (\d+) tokens; write `validation_tokens: \1` or fewer"
    ):
        prepare(small(validation_tokens="1M"), text_folder, text_folder / "cache")


def test_text_that_repeats_itself_is_named_as_the_reason(tmp_path: Path, small: Settings) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "log.txt").write_text(prose(0, 6000) * 10)
    near = (
        r"since [\d,]+ bytes were copies or near-copies of other text .*; a text file is one document until "
        r"`document_separator` "
    )
    near += "divides it, such as `blank lines`; use more text that differs"
    with pytest.raises(ConfigError, match=rf"no text is left to train on .*{near}"):
        prepare(small(), tmp_path, tmp_path / "cache")
    (tmp_path / "corpus" / "log.txt").write_text(prose(0, 40_000) + prose(0, 9000))
    with pytest.raises(
        ConfigError, match=rf"no text is left to hold out, {near}, or name texts to hold out by `validation_files`"
    ):
        prepare(small(), tmp_path, tmp_path / "cache")


@pytest.mark.parametrize(
    ("again", "separator", "told"),
    [(3, None, True), (0, None, False), (3, "blank lines", False)],
    ids=["copies", "none", "divided"],
)
def test_paragraphs_that_stand_again_in_one_document_are_told(
    tmp_path: Path, small: Settings, again: int, separator: str | None, told: bool
) -> None:
    paragraphs = [prose(i, 1000) for i in range(40)]
    (tmp_path / "a.txt").write_text("\n\n".join([*paragraphs, *["* * *"] * 40, *paragraphs[:again]]), encoding="utf-8")
    corpus = open_files(small(files=["a.txt"], document_separator=separator), tmp_path)
    corpus.documents()
    copied = sum(len(paragraph.strip().encode()) for paragraph in paragraphs[:again])
    words = f"{copied:,} bytes of paragraphs stand again in one document, a.txt; copies are dropped by document"
    assert [words in remark for remark in corpus.remarks] == [True] * told


def test_files_to_hold_out_can_be_named(text_folder: Path, small: Settings) -> None:
    (text_folder / "val[1].txt").write_text(prose(50, 5000), encoding="utf-8")
    tokens = prepared(text_folder, small(validation_files=["corpus/3.txt", "val[1].txt"], validation_tokens=131_072))
    packages = {(p["name"], p["split"]) for p in tokens.manifest["packages"]}
    assert {name for name, split in packages if split == "validation"} == {"corpus/3.txt", "val[1].txt"}
    assert ("corpus/3.txt", "train") not in packages
    assert tokens.manifest["text"]["validation"] == sum(
        (text_folder / name).stat().st_size for name in ("corpus/3.txt", "val[1].txt")
    )
    with pytest.raises(ConfigError, match=r"`validation_files` holds all of these out"):
        prepare(small(validation_files=["corpus/*.txt"]), text_folder, text_folder / "cache")


@pytest.mark.parametrize(
    ("separator", "join"),
    [("<|endoftext|>", "<|endoftext|>\n"), ("blank lines", " \n\n"), (r"/^= \w+ =$/", " = Heading =\n")],
)
def test_a_separator_makes_documents(tmp_path: Path, small: Settings, separator: str, join: str) -> None:
    (tmp_path / "a.txt").write_text(join.join(prose(i, 3000) for i in range(30)), encoding="utf-8")
    assert prepared(tmp_path, small(files=["a.txt"])).manifest["documents"] == 1  # on both sides
    tokens = prepared(tmp_path, small(files=["a.txt"], document_separator=separator))
    whole = Tokenizer.from_file(str(tmp_path / "cache" / tokens.digest / "tokenizer.json")).decode(
        tokens.train.tolist()
    )
    assert 27 <= tokens.manifest["documents"] <= 60
    assert (join.strip() in whole) == separator.startswith("/") or not join.strip()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"corpus": "python-source", "document_separator": "x"}, "`document_separator` is for corpus 'files'"),
        ({"corpus": "python-source", "validation_files": ["x"]}, "`validation_files` is for corpus 'files'"),
        ({"corpus": "files", "files": ["x"], "document_separator": "/(/"}, r"no regular expression"),
    ],
)
def test_what_separates_nothing_is_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Data.model_validate(fields)


# --- kinds of files ---------------------------------------------------------------------------------------------------


def json_lines(field: str = "text") -> bytes:
    return "\n".join(json.dumps({field: prose(i, 1500)}, ensure_ascii=False) for i in range(20)).encode()


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


NESTED = b"\n".join(json.dumps({"text": {"body": prose(i, 1500)}}, ensure_ascii=False).encode() for i in range(20))
KINDS: dict[str, tuple[bytes, dict[str, object]]] = {
    "a.jsonl.gz": (gzip.compress(json_lines()), {}),
    "a.json.gz": (gzip.compress(json_lines()), {}),
    "a.jsonl.zst": (zstd(json_lines()), {}),
    "a.ndjson": (json_lines(), {}),
    "A.JSONL": (json_lines(), {}),
    "a.json": (b"[" + json_lines().replace(b"\n", b",\n") + b"]", {}),
    "b.jsonl": (NESTED, {"text_field": "text.body"}),
    "c.jsonl": (json_lines("text.body"), {"text_field": "text.body"}),
    "d.jsonl": (json_lines() + b'\n{"text": null}\n', {}),
    "e.jsonl": (b"\xef\xbb\xbf" + json_lines(), {}),
    "f.jsonl": (json_lines().decode().encode("utf-16"), {}),
}


@pytest.mark.parametrize("name", KINDS)
def test_rows_are_read_as_people_keep_them(tmp_path: Path, small: Settings, name: str) -> None:
    content, fields = KINDS[name]
    (tmp_path / name).write_bytes(content)
    (tmp_path / "plain.jsonl").write_bytes(json_lines())
    first = prepared(tmp_path, small(files=[name], **fields, validation_tokens=1000))
    second = prepared(tmp_path, small(files=["plain.jsonl"], validation_tokens=1000))
    assert np.array_equal(first.train, second.train)
    assert np.array_equal(first.val, second.val)
    assert first.manifest["remarks"] == (["d.jsonl: 1 rows skipped whose `text` is null"] if name == "d.jsonl" else [])


@pytest.mark.parametrize(
    ("suffix", "encoding"), [(".txt", "utf-16"), (".TXT", "utf-8-sig"), (".txt.gz", "utf-8"), (".md.zst", "utf-32")]
)
def test_plain_text_is_read_as_people_keep_it(tmp_path: Path, small: Settings, suffix: str, encoding: str) -> None:
    text = prose(0, 30_000)
    content = text.encode(encoding)
    (tmp_path / f"a{suffix}").write_bytes(
        {".gz": gzip.compress, ".zst": zstd}.get(Path(f"a{suffix}").suffix, bytes)(content)
    )
    (tmp_path / "plain.txt").write_text(text, encoding="utf-8")
    first, second = (
        prepared(tmp_path, small(files=[file], validation_tokens=1000)) for file in (f"a{suffix}", "plain.txt")
    )
    assert np.array_equal(first.train, second.train)


def test_a_nested_column_of_parquet_is_read(tmp_path: Path, small: Settings) -> None:
    rows = [{"body": prose(i, 1500)} for i in range(20)]
    pyarrow.parquet.write_table(pyarrow.table({"text": rows, "n": [1] * 20}), tmp_path / "a.PARQUET")
    assert (
        prepared(tmp_path, small(files=["a.PARQUET"], text_field="text.body", validation_tokens=1000)).manifest[
            "documents"
        ]
        >= 18
    )


def test_a_stray_zero_makes_no_utf_16_of_a_text(text_folder: Path, small: Settings) -> None:
    one = text_folder / "corpus" / "stray.txt"
    one.write_text("a\0b")
    assert prepared(text_folder, small()).manifest


def test_a_folder_with_a_pattern_in_its_name_is_no_pattern(text_folder: Path, small: Settings) -> None:
    base = text_folder / "study [v1]*"
    shutil.copytree(text_folder / "corpus", base / "corpus")
    assert prepared(base, small()).digest == prepared(text_folder, small()).digest


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["corpus"], r"'corpus': it is a folder; write the files in it, such as 'corpus/\*\*/\*.txt'"),
        (["link.txt"], r"it is a link to 'nowhere.txt', where there is no file; mend the link"),
        (["nulls.jsonl"], r"`data.text_field` has the value 'text': all 3 rows of nulls.jsonl are null there"),
        (
            ["nested.jsonl"],
            r"`data.text_field` has the value 'text': line 1 of nested.jsonl has no such column; it has meta.body, n",
        ),
        (["wide.txt"], r"byte 0 is not UTF-8; it looks like UTF-16 without .*such as `iconv -f UTF-16LE"),
        (["ascii.txt"], r"byte 1 is not UTF-8; it looks like UTF-16 without .*such as `iconv -f UTF-16LE"),
        (["big.txt"], r"byte 0 is not UTF-8; it looks like UTF-16 without .*such as `iconv -f UTF-16BE"),
        (["cut.txt"], r"byte 6 is not UTF-16-LE; the file is damaged there, .*; write it again, as UTF-8"),
        (["archive.txt"], r"byte 1 is not UTF-8; it holds zero bytes, so it is no text; .* ends in .gz or .zst"),
        (
            ["latin.jsonl"],
            r"'latin.jsonl': byte 13 is not UTF-8; convert the file to UTF-8 \(such as `iconv -f LATIN1 -t UTF-8",
        ),
        (["half.txt.gz"], r"'half.txt.gz': the file cannot be read \("),
        (["none.txt.gz"], r"'none.txt.gz': the file cannot be read \("),
    ],
)
def test_what_cannot_be_read_names_the_remedy(
    text_folder: Path, small: Settings, files: list[str], message: str
) -> None:
    (text_folder / "link.txt").symlink_to("nowhere.txt")
    (text_folder / "nulls.jsonl").write_text('{"text": null}\n' * 3)
    (text_folder / "nested.jsonl").write_text('{"meta": {"body": "a"}, "n": 1}\n')
    (text_folder / "wide.txt").write_bytes("é\u0435".encode("utf-16-le") * 100)
    (text_folder / "ascii.txt").write_bytes("plain words\n".encode("utf-16-le") * 100)
    (text_folder / "big.txt").write_bytes("words".encode("utf-16-be") * 100)
    (text_folder / "cut.txt").write_bytes("ab".encode("utf-16")[:-1] + b"\0\xd8\xd8")
    (text_folder / "archive.txt").write_bytes(gzip.compress(prose(0, 9000).encode(), mtime=0))
    (text_folder / "latin.jsonl").write_bytes(b'{"text": "caf\xe9 au lait"}\n')
    (text_folder / "half.txt.gz").write_bytes(gzip.compress(prose(0, 9000).encode())[:-900])
    (text_folder / "none.txt.gz").write_bytes(b"no archive")
    with pytest.raises(ConfigError, match=message):
        prepare(small(files=files), text_folder, text_folder / "cache")


def test_training_text_that_is_held_out_is_named_as_the_reason(tmp_path: Path, small: Settings) -> None:
    (tmp_path / "corpus").mkdir()
    for name in ("a.txt", "same.txt"):
        (tmp_path / "corpus" / name).write_text(prose(0, 20_000))
    with pytest.raises(
        ConfigError,
        match=r"no text is left to train on .* since [\d,]+ bytes are copies or near-copies of `validation_files`",
    ):
        prepare(small(files=["corpus/a.txt"], validation_files=["corpus/same.txt"]), tmp_path, tmp_path / "cache")
    (tmp_path / "corpus" / "b.txt").write_text(prose(1, 40_000))
    (tmp_path / "corpus" / "near.txt").write_text(prose(0, 19_000) + "other end")
    said: list[str] = []
    settings = small(files=["corpus/[abn]*.txt"], validation_files=["corpus/same.txt"])
    prepare(settings, tmp_path, tmp_path / "cache", said.append)
    dropped = sum((tmp_path / "corpus" / name).stat().st_size for name in ("a.txt", "near.txt"))
    assert [line for line in said if f"{dropped:,} bytes of training text since they are in `validation_files`" in line]


def test_the_text_counts_and_not_its_file(tmp_path: Path, small: Settings) -> None:
    """Rows with another wide column are larger than their text, compressed columns smaller."""
    texts = {name: [prose(seed, 2_000) for seed in range(start, start + 10)] for name, start in (("a", 0), ("b", 50))}
    for name, rows in texts.items():
        wide = "\n".join(json.dumps({"text": row, "other": "x" * 4_000}) for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(wide)
    config = small(files=("*.jsonl",), max_bytes=60_000)
    assert "levelled" not in named_corpus(config, tmp_path)[0].identity  # 40 kB of text in 120 kB of files
    rows = [prose(0, 400) for _ in range(200)] + [prose(seed, 400) for seed in range(1, 40)]
    for name, each in (("big", rows), ("small", rows[-20:])):
        pyarrow.parquet.write_table(pyarrow.table({"text": each}), tmp_path / f"{name}.parquet", compression="zstd")
    config = small(files=("*.parquet",), max_bytes=60_000)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.parquet")) < 60_000 < sum(map(len, rows))
    corpus, _ = named_corpus(config, tmp_path)
    assert "levelled" in corpus.identity
    assert select_text(config, corpus)[1] == sum(len(row.encode()) for row in [*rows, *rows[-20:]])


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_no_file_fills_max_bytes_alone_and_what_is_not_read_is_counted(
    tmp_path: Path, small: Settings, suffix: str
) -> None:
    found = []
    sizes = {"large": 400_000, "small": 5_000, "middle": 30_000}
    for names in (("a", "b", "c"), ("c", "a", "b")):
        base = tmp_path / "".join(names)
        (base / "corpus").mkdir(parents=True)
        for seed, (name, size) in enumerate(zip(names, sizes.values(), strict=True)):
            text = prose(seed, size).encode()
            (base / "corpus" / f"{name}.txt{suffix}").write_bytes(gzip.compress(text, mtime=0) if suffix else text)
        found.append(prepared(base, small(max_bytes=60_000)))
        text = found[-1].manifest["text"]
        assert text["total"] == sum(len(prose(seed, size).encode()) for seed, size in enumerate(sizes.values()))
        assert text["train"] + text["validation"] + sum(text["unused"].values()) == text["total"]
        assert text["train"] + text["validation"] == pytest.approx(60_000, rel=0.05)
        used = {
            name: sum(p["bytes"] for p in found[-1].manifest["packages"] if p["name"].endswith(f"{name}.txt{suffix}"))
            for name in names
        }
        large, little, middle = (used[name] for name in names)
        assert little == pytest.approx(5_000, rel=0.2)
        assert middle == pytest.approx(27_500, rel=0.2)
        assert large == pytest.approx(27_500, rel=0.2)
    assert found[0].digest == found[1].digest
    assert np.array_equal(found[0].train, found[1].train)
