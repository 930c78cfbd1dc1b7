"""Tokenizers as people bring them: bytes are those of the text, what is unknown is measured, the separator is found or
named.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from sparsemem.config import ConfigError, Data
from sparsemem.data import Tokens, prepare
from sparsemem.data.tokenizer import Encoded, encode, load_tokenizer, tokenize

from .conftest import SYLLABLES

Settings = Callable[..., Data]
LETTERS = sorted(set("".join(SYLLABLES)) | set("abcdefghijklmnopqrstuvwxyz \n\u2581"))
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _byte_level(**options: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=options.get("prefix", False))
    tokenizer.decoder = decoders.ByteLevel()
    if options.get("trim"):
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    if options.get("runs"):
        tokenizer.add_tokens([AddedToken(" " * count, normalized=False) for count in range(2, 8)])
    if options.get("strip"):
        tokenizer.add_tokens([AddedToken("ka", lstrip=True, rstrip=True)])
    if options.get("composed"):
        tokenizer.normalizer = normalizers.NFC()
    if options.get("lower"):
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    return tokenizer


def _unigram(fallback: bool, letters: list[str] = LETTERS) -> Tokenizer:
    """As T5, ALBERT and Gemma."""
    pieces = ["<unk>", *(BYTES if fallback else []), *letters]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], 0, fallback))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return tokenizer


def _llama() -> Tokenizer:
    pieces = ["<unk>", *BYTES, *LETTERS]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return tokenizer


def _word_pieces() -> Tokenizer:
    """As uncased BERT: lower case, no accents, no spaces, [CLS] and [SEP] around each text."""
    vocabulary = ["[UNK]", "[CLS]", *LETTERS, *(f"##{letter}" for letter in LETTERS), ".", ",", "[SEP]"]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _words(words: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[UNK]", *words])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": _byte_level,
    "prefix space, trimmed places": lambda: _byte_level(prefix=True, trim=True),
    "added runs of spaces": lambda: _byte_level(runs=True),
    "added token that strips": lambda: _byte_level(strip=True),
    "lower case": lambda: _byte_level(lower=True),
    "composed, as Qwen's": lambda: _byte_level(composed=True),
    "unigram, byte fallback": lambda: _unigram(True),
    "unigram": lambda: _unigram(False),
    "BPE, byte fallback": _llama,
    "word pieces, lower case": _word_pieces,
    "words": lambda: _words(["ka", "Lo"]),
}
ALWAYS_KNOWN = [kind for kind in KINDS if kind not in ("unigram", "words", "word pieces, lower case")]


def _saved(tokenizer: Tokenizer, folder: Path, separator: str | None = "</s>") -> Path:
    tokenizer.add_special_tokens([separator] if separator else [])
    tokenizer.save(str(folder / "mine.json"))
    return folder / "mine.json"


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(
    text=st.text(
        st.sampled_from("ka Lo\u00e9\u00df\u65e5\U0001f600\n\u0130.\u00a0e\u0302\u0301\u1112\u1161\u11ab"), min_size=1
    )
)
def test_bytes_are_those_of_the_text(kind: str, text: str) -> None:
    document = next(encode(KINDS[kind](), [text.encode()]))
    assert document.sizes.sum() == len(text.encode())
    assert (document.sizes >= 0).all()
    assert len(document.sizes) == len(document.ids) + 1
    assert 0 <= document.unknown <= len(text.encode())
    assert document.unknown == 0 or kind not in ALWAYS_KNOWN


def _pairs(tokenizer: Tokenizer, text: str) -> tuple[list[tuple[str, int]], Encoded]:
    document = next(encode(tokenizer, [text.encode()]))
    return list(
        zip([*map(str, map(tokenizer.id_to_token, document.ids.tolist())), "end"], document.sizes.tolist(), strict=True)
    ), document


def test_bytes_by_hand() -> None:
    """A dropped space counts with the token after it; the bytes of a character that a fallback spells
    count one by one.
    """
    assert _pairs(_words(["ka", "\u00e9t\u00e9"]), "ka \u00e9t\u00e9 ")[0] == [
        ("ka", 2),
        ("\u00e9t\u00e9", 6),
        ("end", 1),
    ]
    spelt = [("\u2581", 0), ("k", 1), ("<0xE6>", 1), ("<0x97>", 1), ("<0xA5>", 1), ("\u2581", 1), ("k", 1), ("end", 0)]
    assert _pairs(_llama(), "k\u65e5 k")[0] == spelt
    assert _pairs(_byte_level(runs=True), "k   \u00e9")[0] == [
        ("k", 1),
        ("   ", 3),
        ("\u00c3", 1),
        ("\u00a9", 1),
        ("end", 0),
    ]
    assert _pairs(_byte_level(lower=True), "\u0130k")[0][-2:] == [
        ("k", 1),
        ("end", 0),
    ]  # the first turns into three bytes


def test_unknown_bytes_by_hand() -> None:
    document = _pairs(_words(["ka"]), "ka \u00e9t\u00e9 ka")[1]
    assert (document.unknown, document.example) == (5, "\u00e9t\u00e9")
    document = _pairs(_unigram(False, ["k", "\u2581"]), "k\u65e5\u65e5 k")[1]
    assert (document.unknown, document.example) == (6, "\u65e5\u65e5")
    joining = _unigram(False, ["k", "\u1ebf", "\u2581"])
    joining.normalizer = normalizers.NFC()
    assert (
        _pairs(joining, "e\u0302\u0301k")[1].unknown == 0
    )  # two marks on one letter, of which the vocabulary knows all
    dropping = Tokenizer(
        models.BPE({"k": 0, "a": 1}, [])
    )  # without an unknown token, what it does not know is left out
    dropping.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert _pairs(dropping, "ka \u00e9 ka")[1].unknown == 2


@pytest.mark.parametrize("kind", [*ALWAYS_KNOWN, "unigram", "word pieces, lower case"])
def test_a_held_out_set_has_the_bytes_of_its_text(kind: str, text_folder: Path, small: Settings) -> None:
    """What was wrong by factors of up to 400: entries in place of the text that they stand for."""
    path = _saved(KINDS[kind](), text_folder)
    size = Tokenizer.from_file(str(path)).get_vocab_size()
    tokens = Tokens.load(prepare(small(tokenizer="mine.json", vocab_size=size), text_folder, text_folder / "cache"))
    trained, held_out = (
        [e for e in tokens.manifest["packages"] if e["split"] == split] for split in ("train", "validation")
    )
    text, sizes = tokens.manifest["text"], [path.stat().st_size for path in (text_folder / "corpus").iterdir()]
    assert (text["total"], text["train"]) == (sum(sizes), sum(entry["bytes"] for entry in trained))
    assert sum(entry["bytes"] for entry in held_out) == tokens.val_bytes.sum()
    ends = np.flatnonzero(tokens.val == tokens.separator_id) + 1
    parts = [int(part.sum()) for part in np.split(tokens.val_bytes, ends[:-1])]
    assert all(0 < size <= max(sizes) for size in parts)
    assert tokens.manifest["bytes_per_token"] == pytest.approx(tokens.val_bytes.mean(), rel=0.2)


# --- what is unknown --------------------------------------------------------------------------------------------------


def test_a_tokenizer_to_which_the_text_is_unknown_is_refused(text_folder: Path, small: Settings) -> None:
    _saved(_words(["ka"]), text_folder)
    with pytest.raises(
        ConfigError,
        match=r"`data.tokenizer` has the value 'mine.json': 8\d\.\d% of the text is unknown to it, such as '\w",
    ):
        prepare(small(tokenizer="mine.json", vocab_size=3), text_folder, text_folder / "cache")


@pytest.mark.parametrize(("unknown", "refused"), [(1, False), (2, True)])
def test_a_hundredth_may_be_unknown(unknown: int, refused: bool) -> None:
    texts = [b"k" * 10 + b" "] * 9 + [b"k" * (10 - unknown) + b"#" * unknown + b" "]
    tokenizer = _unigram(False, ["k", "\u2581", "</s>"])
    if refused:
        with pytest.raises(ConfigError, match=r"1.8% of the text is unknown to it, such as '##'"):
            list(tokenize(tokenizer, 3, texts, "mine.json"))
    else:
        assert len(list(tokenize(tokenizer, 3, texts, "mine.json"))) == len(texts)


def test_a_tokenizer_that_fails_on_the_text_is_refused() -> None:
    tokenizer = Tokenizer(models.WordLevel({"ka": 0, "</s>": 1}))  # no unknown token
    with pytest.raises(ConfigError, match=r"`data.tokenizer` has the value 'mine.json': it fails on the text"):
        list(tokenize(tokenizer, 1, [b"ka", b"Lo"], "mine.json"))


# --- separator and size -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "token", ["<\uff5cend\u2581of\u2581sentence\uff5c>", "<|end_of_text|>", "<EOS_TOKEN>", "[EOS]", "<eos>"]
)
def test_an_end_of_a_common_name_is_found(tmp_path: Path, token: str) -> None:
    tokenizer, separator = load_tokenizer(_saved(_byte_level(), tmp_path, token), 257)
    assert tokenizer.id_to_token(separator) == token


def test_the_separator_may_be_named(tmp_path: Path) -> None:
    tokenizer = _byte_level()
    tokenizer.add_special_tokens(["<doc>"])
    path = _saved(tokenizer, tmp_path)
    assert load_tokenizer(path, 258)[1] == 257
    assert load_tokenizer(path, 258, "<doc>")[1] == 256
    with pytest.raises(
        ConfigError,
        match=r"`data.separator` has the value '<d>': mine.json has no such token; its special ones: <doc>, </s>",
    ):
        load_tokenizer(path, 258, "<d>")


def test_a_tokenizer_without_a_known_end_says_how_to_name_one(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"`data.tokenizer` has the value 'mine.json'.*name one as `data.separator`.*: <doc>"
    ):
        load_tokenizer(_saved(_byte_level(), tmp_path, "<doc>"), 257)


def test_a_separator_that_is_not_special_becomes_so(tmp_path: Path) -> None:
    tokenizer = _byte_level()
    tokenizer.add_tokens([AddedToken("</s>", normalized=False)])
    assert 256 in tokenizer.encode("a</s>b").ids
    loaded, separator = load_tokenizer(_saved(tokenizer, tmp_path, None), 257)
    assert separator == 256
    assert separator not in next(encode(loaded, [b"a</s>b"])).ids


def test_a_separator_that_a_text_spells_is_refused() -> None:
    """A model of whole words or pieces reads it, however special the token is."""
    tokenizer = _words(["ka", "</s>"])
    tokenizer.add_special_tokens(["</s>"])
    with pytest.raises(
        ConfigError, match=r"`data.separator` has the value '</s>': mine.json also finds it inside a text.*'ka </s> ka'"
    ):
        list(tokenize(tokenizer, 2, [b"ka ka", b"ka </s> ka"], "mine.json"))


@pytest.mark.parametrize(("vocab_size", "right"), [(256, False), (257, True), (300, True), (1281, True), (1282, False)])
def test_a_size_beyond_the_entries_is_padding(tmp_path: Path, vocab_size: int, right: bool) -> None:
    path = _saved(_byte_level(), tmp_path)
    if right:
        assert load_tokenizer(path, vocab_size)[1] == 256
    else:
        with pytest.raises(
            ConfigError,
            match=rf"`data.vocab_size` has the value {vocab_size}: mine.json has 257 entries.* write `vocab_size: 257`",
        ):
            load_tokenizer(path, vocab_size)


def test_ids_far_apart_are_refused(tmp_path: Path) -> None:
    path = _saved(Tokenizer(models.WordLevel({"ka": 0, "Lo": 4_000_000})), tmp_path)
    with pytest.raises(
        ConfigError,
        match=r"`data.tokenizer` has the value 'mine.json': its 3 entries have ids up to 4000000; number them",
    ):
        load_tokenizer(path, 4_000_001)


def test_a_padded_vocabulary_is_stated(text_folder: Path, small: Settings) -> None:
    _saved(_byte_level(), text_folder)
    said: list[str] = []
    tokens = Tokens.load(
        prepare(small(tokenizer="mine.json", vocab_size=320), text_folder, text_folder / "cache", said.append)
    )
    assert any("63 ids are padding" in line for line in said)
    assert tokens.vocab_size == len(tokens.canonical) == 320
    assert tokens.train.max() < 257


def test_ids_beyond_16_bits_are_kept() -> None:
    """Few entries, of which one has a large id."""
    tokenizer = Tokenizer(
        models.WordLevel(
            {**{f"w{i}": i for i in range(40_000)}, "far": 70_000, "</s>": 70_001, "[UNK]": 70_002}, "[UNK]"
        )
    )
    ((ids, _),) = tokenize(tokenizer, 70_001, [b"far"], "mine.json")
    assert ids.tolist() == [70_000, 70_001]


def test_a_small_given_vocabulary_works(text_folder: Path, small: Settings) -> None:
    path = _saved(_unigram(False), text_folder)
    size = Tokenizer.from_file(str(path)).get_vocab_size()
    assert size < 60
    tokens = Tokens.load(prepare(small(tokenizer="mine.json", vocab_size=size), text_folder, text_folder / "cache"))
    assert tokens.vocab_size == size


def test_a_small_vocabulary_or_a_separator_needs_a_tokenizer(small: Settings) -> None:
    with pytest.raises(ValueError, match="`vocab_size` is 100; a byte-level BPE takes at least 260"):
        small(vocab_size=100)
    with pytest.raises(ValueError, match="`separator` '</s>' names a token of `tokenizer`, which is not given"):
        small(separator="</s>")


# --- what a tokenizer does of its own accord --------------------------------------------------------------------------


def test_templates_and_dropout_are_left_out(tmp_path: Path) -> None:
    tokenizer, separator = load_tokenizer(_saved(_word_pieces(), tmp_path, "[SEP]"), _word_pieces().get_vocab_size())
    ids = next(encode(tokenizer, [b"ka lo"])).ids.tolist()
    assert tokenizer.token_to_id("[CLS]") not in ids
    assert separator not in ids
    merging = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")], dropout=1.0))
    assert len(merging.encode("ab").ids) == 2
    tokenizer, _ = load_tokenizer(_saved(merging, tmp_path), 4)
    assert next(encode(tokenizer, [b"ab"])).ids.tolist() == [2]


@pytest.mark.parametrize(
    "content", [b"{}", b"not json", b"", b"\x0a\x0e\xff\xfe", b'{"version": "2.0", "model": {"type": "BPE"}}', b"[1]"]
)
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "mine.json").write_bytes(content)
    with pytest.raises(
        ConfigError, match=r"`data.tokenizer` has the value 'mine.json': not a tokenizer of.*; give a `tokenizer.json`"
    ):
        load_tokenizer(tmp_path / "mine.json", 300)


def test_a_file_of_another_version_is_refused(tmp_path: Path) -> None:
    path = _saved(_byte_level(), tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": "9.0"}))
    with pytest.raises(ConfigError, match=r"`data.tokenizer` has the value 'mine.json': not a tokenizer of"):
        load_tokenizer(path, 257)
