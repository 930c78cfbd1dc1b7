"""The files that training leaves of each trial, read alike where each trial has a folder and where `sparsemem pack` put
them into one.

    <study>/trials/<id>/trial.yaml  curve.csv  usage.csv  val_losses.csv  result.json    until it is packed
    <study>/trials.parquet                    a row a finished trial, a column a file    from then on

A column holds the files' text, to the byte: whatever reads it finds the same numbers in both forms. Pages carry
checksums, and the file one of all that it holds: the sizes at its end, which say how many rows there are, have none.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from sparsemem.values import ConfigError

RECORDS = ("trial.yaml", "curve.csv", "usage.csv", "val_losses.csv", "result.json")
PACK = "trials.parquet"
CONFIG, TOKENIZER, MODEL = MODEL_FILES = ("config.json", "tokenizer.json", "model.safetensors")
"""Of a kept model (`run.keep_models`), the weights last. They are no records: `pack` leaves them where they are."""
DIGEST = b"records_sha256"
COMPRESSION_LEVEL = 16  # of zstd: the smallest of the committed studies' packs, at 3 MB of text a second

Records = Mapping[str, Mapping[str, bytes]]
"""Trial id -> name -> content."""


class TrialFiles:
    """The files of a study's trials. Those of a packed trial are the pack's, whatever lies in its folder.

    Every method raises `ConfigError` where the pack is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._packed: Records = {}
        self._seen: tuple[int, int, int] | None = None

    @property
    def packed(self) -> Records:
        """What the pack holds, read again when it has changed."""
        path = self.folder / PACK
        try:
            stat = path.stat()
            now = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        if now != self._seen:
            self._packed, self._seen = read_pack(path), now
        return self._packed

    def begun(self) -> list[str]:
        """Ids of the trials that were made ready for a worker at least, sorted."""
        folders = (path.parent.name for path in self.folder.glob("trials/*/trial.yaml"))
        return sorted({*folders, *self.packed})

    def path(self, trial_id: str, name: str) -> Path:
        """Names the file for people: within the pack, it is no path of the disk."""
        packed = name in RECORDS and trial_id in self.packed
        return self.folder / (PACK if packed else "trials") / trial_id / name

    def read(self, trial_id: str, name: str) -> bytes:
        """
        Raises:
            FileNotFoundError: there is no such file.
            OSError: it cannot be read.
        """
        packed = self.packed.get(trial_id) if name in RECORDS else None
        if packed is None:
            try:
                return (self.folder / "trials" / trial_id / name).read_bytes()
            except FileNotFoundError:
                if name not in RECORDS or trial_id not in self.packed:
                    raise
                packed = self.packed[trial_id]  # packed meanwhile
        if name not in packed:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path(trial_id, name)))
        return packed[name]


def read_pack(path: Path) -> Records:
    """
    Raises:
        ConfigError: it is damaged.
    """
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read(["trial_id", *RECORDS])
        ids = table["trial_id"].to_pylist()
        columns = {name: table[name].cast(pa.binary()).to_pylist() for name in RECORDS}
        if not ids or ids != sorted(set(ids)):
            raise ValueError("not the trial ids that were written")
        records = {
            id_: {name: column[row] for name, column in columns.items() if column[row] is not None}
            for row, id_ in enumerate(ids)
        }
        whole = (file.metadata.metadata or {}).get(DIGEST)  # packs of before have none
        if whole not in (None, _digest(records)):
            raise ValueError("its checksum is that of another content")
    except (pa.ArrowException, OSError, ValueError, KeyError, NotImplementedError) as error:
        raise damaged(path, " ".join(str(error).split())) from None
    return records


def _digest(records: Records) -> bytes:
    digest = hashlib.sha256()
    for id_ in sorted(records):
        for name in RECORDS:
            content = records[id_].get(name)
            digest.update(f"{id_} {name} {-1 if content is None else len(content)}\n".encode() + (content or b""))
    return digest.hexdigest().encode()


def damaged(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"{path}: is damaged ({why}); bring it back from git (`git checkout -- {path}`) or a copy: it is the only "
        "place of its trials' results, and if you move it away `sparsemem run` trains them again"
    )


def write_pack(file: BinaryIO, records: Records) -> None:
    """The same bytes for the same records and version of pyarrow, which a Parquet file names; nothing of time, machine
    or pandas.
    """
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    ids = sorted(records)
    columns = {
        name: pa.array([records[id_].get(name) for id_ in ids], pa.binary()).cast(pa.string()) for name in RECORDS
    }
    table = pa.table({"trial_id": pa.array(ids, pa.string()), **columns})
    with ParquetWriter(
        file,
        table.schema,
        version="2.6",
        compression="zstd",
        compression_level=COMPRESSION_LEVEL,
        use_dictionary=False,
        write_statistics=False,
        store_schema=False,
        write_page_checksum=True,
    ) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({DIGEST: _digest(records)})
