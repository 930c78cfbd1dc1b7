"""The corpus `python-source`: the standard library, and what `sparsemem` itself requires.

It must be the same text on every machine with the same versions, whatever else is installed, so that a study can go on
elsewhere:

- Packages are those that the metadata of `sparsemem` requires without extras, and those that they require in turn. A
  requirement that only some platforms or versions of Python have does not count, nor does what comes with an
  environment (`pip`, `setuptools`).
- Of these, only packages published as one wheel for all platforms: a build for one platform writes files of its own.
- Of the standard library, the modules that every installation has: systems put some into packages of their own.
- Of both, `.py` files outside tests. The corpus is named by their content, of packages as their wheels record it.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from sparsemem.config import Data
from sparsemem.data.corpus import Corpus, Document, refused

MIN_SOURCE_BYTES = 256  # shorter modules are licence headers and re-exports
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
}  # tests: tables of near-repeated cases
OWN_DISTRIBUTION = "sparsemem"  # its text would change with every commit
INSTALLERS = {"pip", "setuptools", "wheel"}  # each environment brings its own
OPTIONAL_MODULES = {
    "distutils",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "tkinter",
    "turtle",
    "turtledemo",
    "venv",
}  # as Debian packages Python

_REQUIREMENT = re.compile(r"([\w.-]+)\s*(?:\[([^\]]*)\])?[^;]*(?:;\s*(.*))?")
_EXTRA_MARKER = re.compile(r"""\(?\s*extra\s*==\s*['"]([^'"]+)['"]\s*\)?""")


def open_python_source(config: Data, base: Path) -> Corpus:
    """See `prepare.open_corpus`.

    Raises:
        ConfigError: `sparsemem` is not installed, so that nothing says what it requires.
    """
    distributions = required_distributions(OWN_DISTRIBUTION)
    versions, digests = {}, {}
    documents: list[Document] = []
    for name, distribution in sorted(distributions.items()):
        found = list(_distribution_files(name, distribution))
        if found:
            versions[name] = distribution.version.partition("+")[0]  # a build's own name may follow
            digests[name] = [versions[name], _digest((document.name, digest) for document, digest in found)]
            documents += [document for document, _ in found]
    python = platform.python_version()
    modules = {name: list(_module_files(name, path)) for name, path in _standard_library().items()}
    for found in modules.values():
        documents += [document for document, _ in found]
    library = _digest((document.name, digest) for found in modules.values() for document, digest in found)
    identity = {"python": [python, library], "packages": digests}
    return Corpus(identity, {**versions, **dict.fromkeys(modules, python)}, lambda: documents)


def required_distributions(name: str) -> dict[str, importlib.metadata.Distribution]:
    """Installed distributions that one requires on every platform, and those that they require, by normalised name;
    without itself.

    Editable ones are left out: their text changes under an unchanged version.

    Raises:
        ConfigError: it is not installed.
    """
    found: dict[str, importlib.metadata.Distribution] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [(name, frozenset[str]())]
    while waiting:
        wanted = waiting.pop()
        if wanted in seen:
            continue
        seen.add(wanted)
        try:
            distribution = importlib.metadata.distribution(wanted[0])
        except importlib.metadata.PackageNotFoundError:
            if wanted[0] == name:
                remedy = (
                    f"it is made of what `{name}` requires, which is not installed here; install it, or name texts of "
                    "your own"
                )
                raise refused("corpus", "python-source", f"{remedy} (`corpus: files`)") from None
            continue
        found[wanted[0]] = distribution
        waiting += _requirements(distribution.requires or (), wanted[1])
    return {key: value for key, value in found.items() if key not in {name, *INSTALLERS} and not _is_editable(value)}


def _requirements(lines: Iterable[str], extras: frozenset[str]) -> Iterator[tuple[str, frozenset[str]]]:
    """Name and extras of each requirement without a condition, or with that of one of these extras alone."""
    for line in lines:
        if match := _REQUIREMENT.fullmatch(line.strip()):
            required, own, marker = match.groups()
            extra = _EXTRA_MARKER.fullmatch(marker.strip()) if marker else None
            if not marker or (extra and _normalised(extra[1]) in extras):
                yield (
                    _normalised(required),
                    frozenset(_normalised(each.strip()) for each in (own or "").split(",") if each.strip()),
                )


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _is_editable(distribution: importlib.metadata.Distribution) -> bool:
    try:
        return bool(json.loads(distribution.read_text("direct_url.json") or "{}").get("dir_info", {}).get("editable"))
    except (ValueError, AttributeError):
        return False


def _distribution_files(name: str, distribution: importlib.metadata.Distribution) -> Iterator[tuple[Document, str]]:
    """The modules of a distribution that is one wheel for all platforms, each with its digest."""
    if not re.search(
        r"^Root-Is-Purelib:\s*true\s*$", distribution.read_text("WHEEL") or "", re.MULTILINE | re.IGNORECASE
    ):
        return
    # `Distribution.files` asks the disk about every entry, 25 s on a cold disk; its RECORD already holds names, digests
    # and sizes.
    for row in csv.reader((distribution.read_text("RECORD") or "").splitlines()):
        file, digest, size = (*row, "", "", "")[:3]
        parts = PurePosixPath(file).parts
        if not file.endswith(".py") or ".." in parts or not SKIPPED_FOLDERS.isdisjoint(parts[:-1]):
            continue
        path = Path(str(distribution.locate_file(file)))
        if not digest.startswith("sha256=") or not size.isdigit():
            text = path.read_bytes() if path.is_file() else b""
            digest, size = _recorded(text), str(len(text))
        if int(size) >= MIN_SOURCE_BYTES:
            yield Document(name, name, file, int(size), path), digest


def _standard_library() -> dict[str, Path]:
    """The standard library as packages: `stdlib/json` -> its folder, `stdlib/argparse` -> its file."""
    found = {}
    for entry in Path(sysconfig.get_path("stdlib")).iterdir():
        name = entry.stem if entry.suffix == ".py" else entry.name
        if name in sys.stdlib_module_names - OPTIONAL_MODULES and (entry.suffix == ".py" or entry.is_dir()):
            found[f"stdlib/{name}"] = entry
    return dict(sorted(found.items()))


def _module_files(name: str, path: Path) -> Iterator[tuple[Document, str]]:
    if path.is_file():
        files = [path]
    else:
        files = []
        for folder, subfolders, names in os.walk(path):
            subfolders[:] = [inner for inner in subfolders if inner not in SKIPPED_FOLDERS]
            files += [Path(folder, file) for file in names if file.endswith(".py")]
    for file in sorted(files):
        text = file.read_bytes()
        if len(text) >= MIN_SOURCE_BYTES:
            yield Document(name, name, file.relative_to(path.parent).as_posix(), len(text), file), _recorded(text)


def _recorded(text: bytes) -> str:
    """The digest of a file as a wheel's RECORD writes it."""
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(text).digest()).rstrip(b"=").decode()


def _digest(files: Iterable[tuple[str, str]]) -> str:
    return hashlib.sha256(json.dumps(sorted(files)).encode()).hexdigest()[:16]
