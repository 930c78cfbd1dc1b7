"""Files in a place that several machines share, and what they survive there."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from sparsemem.config import ConfigError, load_study
from sparsemem.study.remote.storage import Storage, StorageAway


@pytest.fixture
def storage(place: str) -> Storage:
    storage = Storage(place, "tiny", patience=20.0)
    storage.create()
    return storage


def test_files_come_back_as_they_were_put(storage: Storage, tmp_path: Path) -> None:
    content = bytes(range(256)) * 50_000  # more than a piece of an upload
    (tmp_path / "here").write_bytes(content)
    storage.put(tmp_path / "here", "trials/a/checkpoint.pt")
    storage.write("study.yaml", b"one")
    storage.write("study.yaml", b"another")
    storage.get("trials/a/checkpoint.pt", tmp_path / "there" / "again")
    assert (tmp_path / "there" / "again").read_bytes() == content
    assert storage.read("study.yaml") == b"another"
    assert {name: size for name, (size, _) in storage.list().items()} == {
        "study.yaml": 7,
        "trials/a/checkpoint.pt": len(content),
    }
    assert set(storage.list("trials/a")) == {"trials/a/checkpoint.pt"}
    assert storage.list("trials/b") == {}


def test_files_are_renamed_and_deleted(storage: Storage) -> None:
    storage.write("a/new", b"new")
    storage.write("a/old", b"old")
    storage.move("a/new", "a/old")
    assert {name: storage.read(name) for name in storage.list()} == {"a/old": b"new"}
    storage.delete("a/old")
    storage.delete("a/old")
    assert storage.list() == {}
    with pytest.raises(FileNotFoundError):
        storage.read("a/old")


def test_the_address_of_a_study_is_that_of_the_storage_with_its_name(place: str) -> None:
    root, question, options = place.partition("?")
    assert Storage.at(f"{root}/tiny{question}{options}") == Storage(place, "tiny")


def test_a_folder_that_is_away_for_a_while_only_delays(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    storage = Storage(str(tmp_path / "shared"), "tiny", patience=20.0)
    storage.create()
    (tmp_path / "shared").rename(tmp_path / "unmounted")
    with pytest.raises(StorageAway, match="could not be reached"):
        storage.at_once().write("a", b"a")
    with pytest.raises(StorageAway):
        storage.at_once().list()  # not: there are no files
    back = threading.Timer(1.0, lambda: (tmp_path / "unmounted").rename(tmp_path / "shared"))
    back.start()
    storage.write("a", b"a")
    assert (tmp_path / "shared" / "tiny" / "a").read_bytes() == b"a"
    assert len(list(tmp_path.rglob("*"))) == 3  # nothing else is left behind


def test_a_server_that_does_not_answer_is_given_up_in_time() -> None:
    storage = Storage("s3://bucket/x?scheme=http&region=us-east-1&endpoint_override=127.0.0.1:9", "tiny", patience=1.0)
    began = time.monotonic()
    with pytest.raises(StorageAway, match=r"127\.0\.0\.1:9"):
        storage.write("a", b"a")
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(
    ("value", "remedy"),
    [
        ("s3://AKIAXYZ:hush@bucket/studies", "credentials come from the environment"),
        ("s3://bucket/studies?secret_key=hush", "credentials come from the environment"),
        ("s3://bucket/studies?session_token=hush", "credentials come from the environment"),
        ("https://bucket.example/hush", "s3://, gs:// or file://"),
        ("hdfs://hush/studies", "s3://, gs:// or file://"),
        ("s3://", "name a folder or a bucket"),
        ("", "name a folder or a bucket"),
        ("7", "write a text"),
    ],
)
def test_an_address_that_cannot_be_is_refused_and_no_secret_is_repeated(
    tmp_path: Path, value: str, remedy: str
) -> None:
    yaml = Path("sweeps/allocation-quick.yaml").read_text(encoding="utf-8")
    (tmp_path / "study.yaml").write_text(yaml)
    with pytest.raises(ConfigError, match=r"run\.storage") as refused:
        load_study(tmp_path / "study.yaml", {"run.storage": int(value) if value == "7" else value})
    assert remedy in str(refused.value)
    if value.startswith("s3"):
        assert "hush" not in str(refused.value)


def test_addresses_of_folders_and_buckets_are_taken(tmp_path: Path) -> None:
    for value in (
        "shared",
        "/shared/studies",
        "file:///shared",
        "s3://bucket",
        "s3://bucket/a/b?region=eu-central-1",
        "gs://bucket/a",
    ):
        assert load_study("sweeps/allocation-quick.yaml", {"run.storage": value}).run.storage == value
