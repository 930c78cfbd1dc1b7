"""Which documents are kept, and which are held out: duplicates dropped, sizes capped.

- Of packages, whole ones are held out, chosen by a hash of their name, so that installing one does not reshuffle the
  others.
- Of the user's text, documents are held out by size and content, whatever files they stand in and however these are
  called; of a document that is too long to be held out whole, its end.
- Units fill like vessels to a common level: every unit gives its first bytes before any gives its second, until the cap
  is reached. A giant package therefore cannot crowd out the rest, and no more is read than is kept.
- A document most of whose shingles were seen before is a near-duplicate. Exact copies are not enough: vendored copies
  and older versions on the other side of the split would flatter a model that remembers n-grams.

It must not know tokens.
"""

from __future__ import annotations

import codecs
import hashlib
import re
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from sparsemem.data.corpus import Document, stable_order

SHINGLE_WORDS = 6
NEAR_SHARE = 0.5  # of a document's shingles seen before: a near-duplicate
MIN_UNITS = 4  # held-out units aimed at, so that none makes up the validation text alone


@dataclass(frozen=True)
class Kept:
    """A document whose text stays."""

    document: Document
    text: bytes


@dataclass
class Selection:
    """The text of a study, each side in the order in which it is packed."""

    train: list[Kept] = field(default_factory=list)
    validation: list[Kept] = field(default_factory=list)
    duplicates_exact: int = 0
    duplicates_near: int = 0
    exact: int = 0
    """Bytes of exact duplicates dropped."""
    near: int = 0
    """Bytes of near-duplicates dropped on the training side."""
    held: int = 0
    """Of `exact` and `near`, what was dropped on the training side as it is held out."""
    near_held_out: int = 0
    """Bytes of near-duplicates dropped on the held-out side."""

    def counts(self) -> str:
        """Its documents in words; one whose end is held out is one, on both sides."""
        train, held = (
            {(kept.document.package, kept.document.name) for kept in side} for side in (self.train, self.validation)
        )
        ends = f" ({len(train & held)} of them by the end)" if train & held else ""
        return (
            f"documents to train on: {len(train)}, to hold out from: {len(held)}{ends}; "
            f"{self.duplicates_exact} copies and {self.duplicates_near} near-copies dropped"
        )


def select(
    documents: Sequence[Document],
    max_bytes: int,
    validation_bytes: int,
    held_out: Sequence[Document] | None = None,
    level: bool = False,
) -> Selection:
    """Split, de-duplicate and cap.

    Args:
        documents: in any order; the result does not depend on it.
        max_bytes: text kept on both sides together.
        validation_bytes: text aimed at for validation.
        held_out: what `documents` lacks because it is held out; None: whole units are chosen, at most half of them.
        level: no package (file) gives more to train on than others could, where `max_bytes` binds.

    Returns:
        A selection in which no training document nearly equals one held out, nor one another.
    """
    if held_out is None:
        sizes = _unit_sizes(documents)
        chosen = choose_held_out(sizes, validation_bytes)
        held_out = [document for document in documents if document.unit in chosen]
        documents = [document for document in documents if document.unit not in chosen]

    sieve = _Sieve(validation_bytes, max_bytes)
    selection = sieve.selection
    unit_room = fair_share(_unit_sizes(held_out).values(), validation_bytes)
    held = sieve.keep(levelled(held_out), validation_bytes, unit_room, held_out=True)
    room = max_bytes - sum(len(k.text) for k in held)
    file_room = room
    if level:
        files: Counter[str] = Counter()
        for document in documents:
            files[document.package] += document.size
        file_room = level_of(files.values(), room)
    selection.train = sieve.keep(levelled(documents), room, file_room, by_package=level)
    # The other direction: a held-out document that is a small part of a large training document.
    selection.validation = [k for k in held if share_seen(shingles_of(k.text), (sieve.train,)) < NEAR_SHARE]
    selection.duplicates_near += len(held) - len(selection.validation)
    selection.near_held_out += sum(len(k.text) for k in held) - sum(len(k.text) for k in selection.validation)
    return selection


class _Sieve:
    """Keeps documents, and counts the copies that it drops."""

    def __init__(self, validation_bytes: int, max_bytes: int) -> None:
        self.selection = Selection()
        self.exact, self.held_exact = set[bytes](), set[bytes]()
        self.held_out, self.train = ShingleTable(validation_bytes), ShingleTable(max_bytes)

    def keep(
        self,
        candidates: Iterable[Document],
        room: int,
        unit_room: int,
        held_out: bool = False,
        by_package: bool = False,
    ) -> list[Kept]:
        """The documents that nearly equal none before them, in their order.

        Args:
            room: bytes of text.
            unit_room: of it, for one unit.
            by_package: a package (file) counts as a unit.
        """
        kept = []
        taken: Counter[str] = Counter()
        for document in candidates:
            if room <= 0:
                break
            unit = document.package if by_package else document.unit
            if taken[unit] >= unit_room:
                continue
            text = document.read()
            if not text or self._is_copy(text, held_out):
                continue
            text = cut_utf8(text, min(room, unit_room - taken[unit]))
            shingles = shingles_of(text)
            if self._is_near(shingles, len(text), held_out):
                continue
            (self.held_out if held_out else self.train).add(shingles)
            kept.append(Kept(document, text))
            taken[unit] += len(text)
            room -= len(text)
        return kept

    def _is_copy(self, text: bytes, held_out: bool) -> bool:
        digest = hashlib.sha256(text).digest()
        if digest not in self.exact:
            self.exact.add(digest)
            if held_out:
                self.held_exact.add(digest)
            return False
        self.selection.duplicates_exact += 1
        self.selection.exact += len(text)
        self.selection.held += len(text) * (digest in self.held_exact and not held_out)
        return True

    def _is_near(self, shingles: npt.NDArray[np.uint64], size: int, held_out: bool) -> bool:
        before = (self.held_out,) if held_out else (self.train, self.held_out)
        if share_seen(shingles, before) < NEAR_SHARE:
            return False
        self.selection.duplicates_near += 1
        if held_out:
            self.selection.near_held_out += size
        else:
            self.selection.near += size
            self.selection.held += size * (share_seen(shingles, (self.held_out,)) >= NEAR_SHARE)
        return True


def hold_out_by_size(documents: Sequence[Document], validation_bytes: int) -> tuple[list[Document], list[Document]]:
    """Training documents and those held out, at most so many bytes: from short and from long ones by their share of the
    text.

    A unit (a file) no longer than one part in `MIN_UNITS` of `validation_bytes` is held out whole; of longer ones their
    documents; of a document that is longer itself its end, from a paragraph's or a line's start on; where such ends
    would be short, those of fewer documents. Names decide nothing, only sizes and content.
    """
    total, limit = sum(document.size for document in documents), validation_bytes // MIN_UNITS
    files = _unit_sizes(documents)
    train, held, long, short = list[Document](), list[Document](), list[Document](), list[Document]()
    for document in documents:
        if files[document.unit] > limit:
            document = replace(document, unit=hashlib.sha256(document.read() or b"").hexdigest())
        (long if document.size > limit else short).append(document)
    room = validation_bytes * sum(document.size for document in long) // max(1, total)
    for document in sorted(long, key=lambda document: stable_order(document.unit)):
        size = max(validation_bytes * document.size // total, limit // MIN_UNITS)
        first, last = _divided(document, size) if size <= room else (document, None)
        train.append(first)
        if last and last.size:
            held.append(last)
            room -= size
    sizes = _unit_sizes(short)
    room, chosen = validation_bytes * sum(sizes.values()) // max(1, total), set[str]()
    for unit in sorted(sizes, key=stable_order):
        if sizes[unit] <= room:
            chosen.add(unit)
            room -= sizes[unit]
    train += [document for document in short if document.unit not in chosen]
    return train, held + [document for document in short if document.unit in chosen]


def _unit_sizes(documents: Iterable[Document]) -> Counter[str]:
    sizes: Counter[str] = Counter()
    for document in documents:
        sizes[document.unit] += document.size
    return sizes


def _divided(document: Document, size: int) -> tuple[Document, Document]:
    """A document without its end, and its end: at most `size` bytes, from a paragraph or else a line that begins in
    their first half.
    """
    text = document.read() or b""
    start = len(cut_utf8(text, len(text) - size))
    breaks = (
        re.compile(pattern).search(text, start, len(text) - size // 2) for pattern in (rb"\n[ \t\r]*\n\s*", rb"\n")
    )
    cut = next((found.end() for found in breaks if found), start)
    parts = ((document.unit, text[:cut]), (f"{document.unit} (end)", text[cut:]))
    first, last = (replace(document, unit=unit, size=len(part), source=part) for unit, part in parts)
    return first, last


def choose_held_out(sizes: Mapping[str, int], validation_bytes: int) -> set[str]:
    """Units for validation, by the hash of their names: of moderate size first, then any; at most half of them.

    A unit counts for at most a quarter of `validation_bytes`, so that there are `MIN_UNITS` of them where there can be.
    """
    part = validation_bytes // MIN_UNITS

    def order(name: str) -> tuple[bool, bytes]:
        moderate = part // MIN_UNITS <= sizes[name] <= validation_bytes * MIN_UNITS
        return not moderate, stable_order(name)

    chosen: set[str] = set()
    covered = 0
    for name in sorted(sizes, key=order)[: len(sizes) // 2]:
        if covered >= validation_bytes:
            break
        chosen.add(name)
        covered += min(sizes[name], part)
    return chosen


def fair_share(sizes: Iterable[int], total: int) -> int:
    """The most that one unit may give of `total`: one part in `MIN_UNITS`, or more where the others have too little."""
    return max(level_of(sizes, total), -(-total // MIN_UNITS))


def level_of(sizes: Iterable[int], total: int) -> int:
    """To which vessels of these sizes fill when they share `total`."""
    left, rest = deque(sorted(sizes)), total
    while left and left[0] * len(left) < rest:
        rest -= left.popleft()
    return -(-rest // len(left)) if left else total


def cut_utf8(text: bytes, size: int) -> bytes:
    """The first `size` bytes, less a character that would be cut in two."""
    return text if len(text) <= size else codecs.getincrementaldecoder("utf-8")().decode(text[:size]).encode()


def levelled(documents: Iterable[Document]) -> list[Document]:
    """All documents by the bytes of their unit that precede them; within a unit in hashed order."""
    units: dict[str, list[Document]] = {}
    for document in documents:
        units.setdefault(document.unit, []).append(document)
    keyed = []
    for name, unit in units.items():
        unit_key, start = stable_order(name), 0
        for document in sorted(unit, key=lambda d: (stable_order(f"{d.unit}/{d.name}"), d.name)):
            keyed.append(((start, unit_key, document.name), document))
            start += document.size
    return [document for _, document in sorted(keyed, key=lambda pair: pair[0])]


# --- shingles ---------------------------------------------------------------------------------------------------------

_BLOCK = 1 << 20  # bytes hashed at once; bounds memory, and a shingle across two blocks is not worth keeping
_BASE = 0x9E3779B97F4A7C15 | 1
_BITS = np.array([1 << bit for bit in range(8)], dtype=np.uint8)
_WORD_BYTES = np.array([chr(byte).isalnum() or byte == ord("_") or byte >= 128 for byte in range(256)])


def _powers(base: int) -> npt.NDArray[np.uint64]:
    powers = np.full(_BLOCK + 1, base, dtype=np.uint64)
    powers[0] = 1
    products: npt.NDArray[np.uint64] = np.cumprod(powers, dtype=np.uint64)
    return products


_POWERS = _powers(_BASE)
_INVERSE_POWERS = _powers(pow(_BASE, -1, 1 << 64))  # an odd number has an inverse modulo 2^64


def shingles_of(text: bytes) -> npt.NDArray[np.uint64]:
    """Distinct hashes of all runs of `SHINGLE_WORDS` words; of all words where there are fewer. Spacing and punctuation
    do not count.
    """
    blocks = [_block_shingles(text[start : start + _BLOCK]) for start in range(0, len(text), _BLOCK)]
    return np.unique(np.concatenate(blocks)) if blocks else np.empty(0, np.uint64)


def _block_shingles(text: bytes) -> npt.NDArray[np.uint64]:
    raw = np.frombuffer(text + b" ", dtype=np.uint8)
    is_word = _WORD_BYTES[raw]
    after_word = np.zeros_like(is_word)
    after_word[1:] = is_word[:-1]
    # Words joined by one separator each (value 1); a prefix sum of the polynomial then gives the hash of any run of
    # them.
    joined = np.where(is_word, raw, 1)[is_word | after_word].astype(np.uint64)
    ends = np.flatnonzero(joined == 1)
    if not len(ends):
        return np.empty(0, np.uint64)
    starts = np.concatenate([[0], ends[:-1] + 1])
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(joined * _POWERS[: len(joined)], dtype=np.uint64)])
    words = min(SHINGLE_WORDS, len(ends))
    starts, ends = starts[: len(starts) - words + 1], ends[words - 1 :]
    hashes: npt.NDArray[np.uint64] = (sums[ends] - sums[starts]) * _INVERSE_POWERS[starts]
    hashes ^= hashes >> np.uint64(32)  # mixes the bits, as the table's addresses are low ones
    hashes *= np.uint64(0xD6E8FEB86659FD93)
    hashes ^= hashes >> np.uint64(32)
    return hashes


class ShingleTable:
    """Which shingles were seen: one bit each, addressed by the hash.

    With 8 bits a byte of text (about 50 a shingle), some 2% of unseen shingles look seen: little against `NEAR_SHARE`.
    """

    def __init__(self, text_bytes: int) -> None:
        size = 1 << max(16, (text_bytes - 1).bit_length())
        self.bits = np.zeros(size, dtype=np.uint8)

    def _address(self, shingles: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint8]]:
        place = (shingles >> np.uint64(3)) & np.uint64(len(self.bits) - 1)
        return place, _BITS[shingles & np.uint64(7)]

    def add(self, shingles: npt.NDArray[np.uint64]) -> None:
        place, bit = self._address(shingles)
        np.bitwise_or.at(self.bits, place, bit)

    def holds(self, shingles: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        place, bit = self._address(shingles)
        seen: npt.NDArray[np.bool_] = (self.bits[place] & bit) != 0
        return seen


def share_seen(shingles: npt.NDArray[np.uint64], tables: Sequence[ShingleTable]) -> float:
    """Share of the shingles that any of the tables holds; 1 for a text without words."""
    if not len(shingles):
        return 1.0
    seen = np.zeros(len(shingles), dtype=bool)
    for table in tables:
        seen |= table.holds(shingles)
    return float(seen.mean())
