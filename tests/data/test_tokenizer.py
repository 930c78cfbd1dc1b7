"""Vocabulary of exactly the size asked for; every byte of the text is accounted for."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from sparsemem.config import ConfigError
from sparsemem.data.tokenizer import SEPARATOR, encode, load_tokenizer, train_tokenizer

WORDS = " ".join(f"alpha{i} beta{i * 7} return self.gamma_{i % 13}\n    été" for i in range(800)).encode()


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer([WORDS], 400)


def test_the_vocabulary_has_the_size_asked_for(trained: Tokenizer) -> None:
    assert trained.get_vocab_size() == 400
    assert trained.token_to_id(SEPARATOR) == 0


def test_training_twice_gives_the_same_tokenizer(trained: Tokenizer) -> None:
    assert train_tokenizer([WORDS], 400).to_str() == trained.to_str()


def test_a_vocabulary_that_the_text_cannot_fill_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"`data.vocab_size` has the value 5000: the training text supports 2\d\d entries"
    ):
        train_tokenizer([b"one two one two"], 5000)


@given(st.text())
def test_bytes_of_the_entries_are_those_of_the_text(trained: Tokenizer, text: str) -> None:
    """In a byte-level vocabulary each token's bytes are known, also those of a part of a character."""
    document = next(encode(trained, [text.encode()]))
    entries = [
        0 if token == SEPARATOR else len(token) for token in map(str, map(trained.id_to_token, document.ids.tolist()))
    ]
    assert document.sizes.tolist() == [*entries, 0]
    assert document.sizes.sum() == len(text.encode())
    assert document.unknown == 0


def test_a_separator_spelt_out_in_a_text_is_ordinary_text(trained: Tokenizer) -> None:
    text = f"a {SEPARATOR} b".encode()
    document = next(encode(trained, [text]))
    assert trained.token_to_id(SEPARATOR) not in document.ids
    assert document.sizes.sum() == len(text)


def test_many_documents_come_back_in_order(trained: Tokenizer) -> None:
    texts = [f"document {i} ".encode() * (1 + i % 5) for i in range(40)] + [WORDS * 90, b"last"]  # more than one lot
    for text, document in zip(texts, encode(trained, texts), strict=True):
        assert trained.decode(document.ids.tolist()) == text.decode()


def _save(folder: Path, separator: str | None) -> Path:
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([separator] if separator else [])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=3)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("separator", ["<|endoftext|>", "</s>", "<|end_of_text|>", "[SEP]"])
def test_a_given_tokenizer_is_used_without_truncation_or_padding(tmp_path: Path, separator: str) -> None:
    tokenizer, found = load_tokenizer(_save(tmp_path, separator), 257)
    assert found == 256
    assert [len(document.ids) for document in encode(tokenizer, [b"abcdef", b"a"])] == [6, 1]


@pytest.mark.parametrize("content", ["{}", "not json", ""])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=r"data.tokenizer"):
        load_tokenizer(tmp_path / "tokenizer.json", 300)
