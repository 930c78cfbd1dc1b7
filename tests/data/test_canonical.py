"""The rules of MECHANISMS 2.1, each with an example folded by hand."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from sparsemem.data.canonical import canonical_key, canonical_table


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("\ufb01x", "fix"),  # NFKC: the ligature fi is two letters
        ("\u2460", "1"),  # NFKC: the circled digit
        ("\u00e9t\u00e9", "ete"),  # NFD, then accents stripped
        ("ReadME", "readme"),
        (" token", "token"),  # Strip
        ("token\n", "token"),
        ("a \t\r\n b", "a b"),  # a run of space inside becomes one
        (" ", " "),  # a lone space survives Strip
        ("\n\n\t", " "),  # so does any run, as one space
        ("\u00a0", " "),  # NFKC makes a no-break space a space
        ("\u0301", "\u0301"),  # a combining accent alone folds to nothing: the original stays
        ("", ""),
        ("++", "++"),
    ],
)
def test_text_folds_to(text: str, key: str) -> None:
    assert canonical_key(text, "raw") == key


def test_part_of_a_character_keeps_its_raw_token() -> None:
    assert canonical_key("\ufffd", "\u00c3") == "\u00c3"
    assert canonical_key("a\ufffd", "a\u00c3") == "a\u00c3"


def test_ids_are_given_in_first_seen_order_and_special_tokens_stay_apart() -> None:
    # Byte-level spelling: a leading space is U+0120, a line end U+010A, the first byte of an accented e U+00C3.
    entries = ["\u0120The", "the", "\u0120", "\u010a", "\u00c3", "THE", "x", "\u00c3\u00a9", "e"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(entries)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("X", special=True), AddedToken("x ", special=True)])
    #            The the ' ' \n  C3 THE x  é  e  <X> <x >
    expected = [0, 0, 1, 1, 2, 0, 3, 4, 4, 5, 6]
    assert canonical_table(tokenizer, 11).tolist() == expected
    assert canonical_table(tokenizer, 11).dtype == np.int64


def test_padding_beyond_the_entries_shares_one_id() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}))
    assert canonical_table(tokenizer, 5).tolist() == [0, 1, 2, 2, 2]
