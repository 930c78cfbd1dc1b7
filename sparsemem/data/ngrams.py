"""How often n-grams of one text occur in another, within documents. Exact but for collisions of 64-bit hashes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

SIEVE_BITS = 22
CHUNK = 1 << 24  # training n-grams hashed at a time: bounds memory


def overlap(train: npt.NDArray[Any], val: npt.NDArray[Any], order: int, separator: int) -> float:
    """Share of the held-out n-grams, repeats counted, that also occur in the training text; none across a document's
    end.
    """
    counts = occurrences_in(train, val, order, separator)
    found = counts[counts >= 0] > 0
    return float(found.mean()) if len(found) else 0.0


def occurrences_in(
    train: npt.NDArray[Any], text: npt.NDArray[Any], order: int, separator: int
) -> npt.NDArray[np.int64]:
    """How often the n-gram that ends at each token of a text occurs in the training text, int64 [len(text)]; -1 where
    none ends, as the document has begun less than n tokens before.
    """
    counts = np.full(len(text), -1, dtype=np.int64)
    if len(text) < order:
        return counts
    within = ~np.lib.stride_tricks.sliding_window_view(text == separator, order).any(axis=1)
    if not within.any():
        return counts
    wanted, place = np.unique(_hashes(text, order)[within], return_inverse=True)
    mask = np.uint64((1 << SIEVE_BITS) - 1)
    may_match = np.zeros(1 << SIEVE_BITS, dtype=bool)  # sieves out most training n-grams, so that few are looked up
    may_match[wanted & mask] = True
    found = np.zeros(len(wanted), dtype=np.int64)
    for start in range(0, len(train), CHUNK):
        hashes = _hashes(train[start : start + CHUNK + order - 1], order)
        hashes = hashes[may_match[hashes & mask]]
        at = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
        found += np.bincount(at[wanted[at] == hashes], minlength=len(wanted))
    counts[order - 1 :][within] = found[place]
    return counts


def _hashes(ids: npt.NDArray[Any], order: int) -> npt.NDArray[np.uint64]:
    """Multilinear hashes of all n-grams, uint64 [len(ids) - order + 1]."""
    count = max(0, len(ids) - order + 1)
    hashes = np.zeros(count, dtype=np.uint64)
    for i, multiplier in enumerate(np.random.PCG64(0).random_raw(order) | np.uint64(1)):
        hashes += ids[i : i + count].astype(np.uint64) * multiplier
    return hashes
