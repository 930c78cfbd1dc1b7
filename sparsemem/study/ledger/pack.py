"""Puts the files of a study's finished trials into one, `trials.parquet`. It must not know engines or torch.

Any moment is a good one to be killed in: the new pack takes the place of the old one only after it was read back, and a
trial's own files go after that. What is left of them is the pack's to the byte, or the next call refuses it.
"""

from __future__ import annotations

import contextlib
import csv
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from sparsemem.config import ConfigError
from sparsemem.files import remove_temporaries, write_atomically
from sparsemem.locks import is_held
from sparsemem.results import FINAL
from sparsemem.study.ledger import Ledger, study_lock
from sparsemem.trial_files import PACK, RECORDS, Records, read_pack, write_pack


def pack_study(folder: Path, say: Callable[[str], None]) -> str:
    """Pack all trials that finished or diverged, also those of an earlier plan; the others, and what is no record of a
    trial (a log, a damaged file that was set aside), stay where they are.

    Returns:
        What was done, in a line.

    Raises:
        ConfigError: refused, nothing was changed: no study or none of its trials is finished, it is being run, the pack
            or a file of a trial is damaged, or a trial's file is another one than that of the same trial in the pack.
    """
    ledger = Ledger.read(folder)
    if (folder / "driver.json").exists() or (folder / "data").is_dir():
        raise ConfigError(
            f"{folder}: is the study's place in a storage (`run.storage`), which workers read; pack its results folder"
        )
    with study_lock(folder):
        remove_temporaries(folder)
        packed, new, twice = ledger.files.packed, dict[str, dict[str, bytes]](), list[str]()
        for own in sorted(path for path in folder.glob("trials/*") if path.is_dir()):
            files = {name: (own / name).read_bytes() for name in RECORDS if (own / name).is_file()}
            if own.name in packed:
                _check_same(own, files, packed[own.name])
                twice.append(own.name)
            elif ledger.state(own.name).status in FINAL:
                if is_held(own / "lock"):
                    raise ConfigError(
                        f"{own}: is being held by a process, as if it were trained; wait for it or end it"
                    )
                for name, content in files.items():
                    _check_whole(own / name, content)
                new[own.name] = files
        if not new and not packed:
            raise ConfigError(
                f"{folder}: none of its trials is finished, so there is nothing to pack; `sparsemem run` trains them"
            )
        if left := Counter(ledger.state(id_).status for id_ in ledger.unfinished()):
            say(
                f"{folder}: {', '.join(f'{count} {status}' for status, count in left.items())}: not packed; "
                f"{_named(ledger.unfinished())}"
            )
        if new:
            write_atomically(
                folder / PACK,
                lambda file: write_pack(file, {**packed, **new}),
                lambda path: _check(path, {**packed, **new}),
            )
            _to_disk(folder)
        _remove(folder, [*twice, *new])
    size = (folder / PACK).stat().st_size / 1e6
    if not new:
        return f"{folder / PACK}: holds all {len(packed)} finished trials already, {size:.2f} MB"
    sizes = [len(content) for files in new.values() for content in files.values()]
    before = f"{len(sizes)} files of {len(new)} trials, {sum(sizes) / 1e6:.2f} MB"
    return (
        f"{folder / PACK}: {before}, packed"
        + (f" to the {len(packed)} before" if packed else "")
        + f"; now {size:.2f} MB"
    )


def _named(ids: list[str]) -> str:
    return ", ".join(ids[:5]) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")


def _check_same(own: Path, files: Mapping[str, bytes], packed: Mapping[str, bytes]) -> None:
    """What a killed call left, or a merge brought back."""
    for name, content in files.items():
        if packed.get(name) != content:
            raise ConfigError(
                f"{own / name}: is another file than that of this trial in {PACK}, which is the one that is read; move "
                "one of both away"
            )


def _check_whole(path: Path, content: bytes) -> None:
    try:
        lengths = (
            {len(row) for row in csv.reader(content.decode().splitlines())}
            if path.suffix == ".csv"
            else {len(content.decode())} - {0}
        )
    except (ValueError, csv.Error) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error}); move this trial's folder away and run the study again"
        ) from None
    if len(lengths) != 1:
        raise ConfigError(f"{path}: is cut off or empty; move this trial's folder away and run the study again")


def _check(path: Path, records: Records) -> None:
    """
    Raises:
        OSError: the disk does not give back what was written.
    """
    if read_pack(path) != records:
        raise OSError(f"{path}: does not read back as it was written, so nothing was packed; look after the disk")


def _to_disk(folder: Path) -> None:
    """The renaming too, before what it replaces is removed."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(folder: Path, trial_ids: Iterable[str]) -> None:
    for id_ in trial_ids:
        own = folder / "trials" / id_
        for name in (*RECORDS, "lock"):
            (own / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # more lies in it
            own.rmdir()
    with contextlib.suppress(OSError):
        (folder / "trials").rmdir()
