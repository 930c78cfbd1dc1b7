"""Vocabulary of exactly the size asked for; every byte of the text is accounted for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from sparsemem.config import ConfigError
from sparsemem.data.tokenizer import SEPARATOR, encode, load_tokenizer, separator_id, token_bytes, train_tokenizer

WORDS = " ".join(f"alpha{i} beta{i * 7} return self.gamma_{i % 13}\n    été" for i in range(800)).encode()


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer([WORDS], 400)


def test_the_vocabulary_has_the_size_asked_for(trained: Tokenizer) -> None:
    assert trained.get_vocab_size() == 400
    assert separator_id(trained) == trained.token_to_id(SEPARATOR) == 0


def test_training_twice_gives_the_same_tokenizer(trained: Tokenizer) -> None:
    assert train_tokenizer([WORDS], 400).to_str() == trained.to_str()


def test_a_vocabulary_that_the_text_cannot_fill_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"`data.vocab_size` has the value 5000: the training text supports 2\d\d entries"):
        train_tokenizer([b"one two one two"], 5000)


@given(st.text())
def test_token_bytes_sum_to_the_bytes_of_any_text(trained: Tokenizer, text: str) -> None:
    ids = next(encode(trained, [text.encode()]))
    assert token_bytes(trained)[ids].sum() == len(text.encode())


def test_a_separator_spelt_out_in_a_text_is_ordinary_text(trained: Tokenizer) -> None:
    text = f"a {SEPARATOR} b".encode()
    ids = next(encode(trained, [text]))
    assert separator_id(trained) not in ids
    assert token_bytes(trained)[ids].sum() == len(text)


def test_many_documents_come_back_in_order(trained: Tokenizer) -> None:
    texts = [f"document {i} ".encode() * (1 + i % 5) for i in range(40)] + [WORDS * 90, b"last"]  # more than one lot
    for text, ids in zip(texts, encode(trained, texts), strict=True):
        assert trained.decode(ids) == text.decode()


def test_bytes_of_a_sentencepiece_vocabulary() -> None:
    entries = ["\u2581the", "<0x0A>", "\u00e9", "un", "\u2581"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(entries)}, []))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.add_tokens([AddedToken("    ", special=False)])
    assert token_bytes(tokenizer).tolist() == [4, 1, 2, 2, 1, 0, 4]


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
    tokenizer = load_tokenizer(_save(tmp_path, separator), 257)
    assert separator_id(tokenizer) == 256
    assert [len(ids) for ids in encode(tokenizer, [b"abcdef", b"a"])] == [6, 1]


def test_a_given_tokenizer_of_another_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`data.vocab_size` has the value 300: .* write `vocab_size: 257`"):
        load_tokenizer(_save(tmp_path, "</s>"), 300)


def test_a_given_tokenizer_without_separator_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.tokenizer.*separators"):
        load_tokenizer(_save(tmp_path, None), 256)


@pytest.mark.parametrize("content", ["{}", "not json", ""])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=r"data.tokenizer"):
        load_tokenizer(tmp_path / "tokenizer.json", 300)


def test_token_bytes_are_int64(trained: Tokenizer) -> None:
    assert token_bytes(trained).dtype == np.int64
