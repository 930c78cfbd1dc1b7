"""Ends of words that a tokenizer divides, against a search for words in the text."""

from __future__ import annotations

import re

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sparsemem.data.units import ends_of_units

TEXT = "def load_model(path): return Éclair(path)+load2 load_models 17 == 1717, unfathomable_x\n  été modelled"


def byte_level() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        ["load model path return " * 9], trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet)
    )
    return made


def test_the_last_token_of_each_word_of_several_is_found() -> None:
    tokenizer = byte_level()
    encoded = tokenizer.encode(TEXT + " ")
    wanted = np.zeros(len(encoded.ids), dtype=bool)
    for word in re.finditer(r"[A-Za-z0-9_]+", TEXT):  # the others are several tokens a character
        over = [
            place for place, (first, end) in enumerate(encoded.offsets) if first < word.end() and end > word.start()
        ]
        beside = TEXT[max(0, word.start() - 1)] + TEXT[min(word.end(), len(TEXT) - 1)]
        if not re.search("[Éé]", beside):
            wanted[over[-1]] = len(over) > 1
    found = ends_of_units(np.array(encoded.ids), tokenizer)
    ascii_only = np.array([TEXT[first:end].isascii() for first, end in encoded.offsets])
    assert wanted.sum() >= 5
    near_accents = np.zeros(len(found), dtype=bool)
    for place in np.flatnonzero(~ascii_only):
        near_accents[max(0, place - 2) : place + 6] = True
    assert found[~near_accents].tolist() == wanted[~near_accents].tolist()


def test_a_space_that_a_vocabulary_writes_as_a_sign_begins_a_word() -> None:
    made = Tokenizer(models.WordLevel({"▁load": 0, "er": 1, "▁x": 2, "(": 3}, unk_token="("))
    made.decoder = decoders.Metaspace()
    assert ends_of_units(np.array([0, 1, 2, 3, 0, 2, 1]), made).tolist() == [False, True] + [False] * 5
