"""Where units of several tokens end: words and identifiers that the tokenizer divides."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

SPACES = ("\u2581", "\u0120")  # how vocabularies write the space before a token


def ends_of_units(ids: npt.NDArray[Any], tokenizer: Tokenizer) -> npt.NDArray[np.bool_]:
    """Whether each token is the last of a unit of several: of a run of letters, digits and underscores that no token
    boundary with another character interrupts. The last token's following one is unknown, so it ends none. [len(ids)]
    """
    known, place = np.unique(ids, return_inverse=True)
    begins, ends = np.array([_edges(int(each), tokenizer) for each in known], dtype=bool).T
    begins, ends = begins[place], ends[place]
    goes_on = np.append(ends[:-1] & begins[1:], True)  # into the next token
    return np.append(False, goes_on[:-1]) & ~goes_on & ends


def _edges(token: int, tokenizer: Tokenizer) -> tuple[bool, bool]:
    """Whether its text begins, and ends, with a character of a word."""
    entry, text = tokenizer.id_to_token(token) or "", tokenizer.decode([token])  # specials decode to nothing
    if not text:
        return False, False
    begins = not entry.startswith(SPACES) and _in_word(text[0])
    return begins, _in_word(text[-1])


def _in_word(character: str) -> bool:
    return character.isalnum() or character == "_"
