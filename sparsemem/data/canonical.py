"""Canonical tokens: ids that differ only by case, accents or spacing fold into one (MECHANISMS 2.1, Engram's released
code).

n-gram memory hashes canonical ids, so that "Token", " token" and "token" share their rows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, normalizers

LONE_SPACE = "\ue000"  # private use: stands for a token that is nothing but space while its ends are stripped

_NORMALIZER = normalizers.Sequence(
    [
        normalizers.NFKC(),
        normalizers.NFD(),
        normalizers.StripAccents(),
        normalizers.Lowercase(),
        normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
        normalizers.Replace(Regex(r"^ $"), LONE_SPACE),
        normalizers.Strip(),
        normalizers.Replace(LONE_SPACE, " "),
    ]
)


def canonical_key(text: str, token: str) -> str:
    """What a token is folded to.

    Args:
        text: the token decoded alone.
        token: its entry in the vocabulary, the key of a token that is part of a character only.

    >>> canonical_key(" Été", "ĠÃītÃ©"), canonical_key("\\n\\n", "ĊĊ"), canonical_key("\\ufffd", "Ã")
    ('ete', ' ', 'Ã')
    """
    if "\ufffd" in text:
        return token
    return str(_NORMALIZER.normalize_str(text)) or text


def canonical_table(tokenizer: Tokenizer, size: int) -> npt.NDArray[np.int64]:
    """Raw id -> canonical id, [V], onto 0..V'-1 in first-seen order. Each special token keeps an id of its own.

    Args:
        size: V, the tokenizer's entries and padding.
    """
    special = {index for index, entry in tokenizer.get_added_tokens_decoder().items() if entry.special}
    new_ids: dict[tuple[bool, str], int] = {}
    table = np.empty(size, dtype=np.int64)
    for index in range(size):
        token = tokenizer.id_to_token(index) or f"<gap {index}>"
        own = index in special
        key = token if own else canonical_key(tokenizer.decode([index], skip_special_tokens=False), token)
        table[index] = new_ids.setdefault((own, key), len(new_ids))
    return table
