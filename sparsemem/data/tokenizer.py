"""Text to token ids: a byte-level BPE trained on the training text, or the user's `tokenizer.json`.

It must not know where text comes from.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from sparsemem.data.corpus import refused
from sparsemem.values import brief, shortened

SEPARATOR = "<|endoftext|>"
KNOWN_SEPARATORS = (
    SEPARATOR,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "[SEP]",
    "<|end_of_sentence|>",
    "[EOS]",
    "<|eos|>",
    "<eos_token>",
    "<eod>",
)
MOST_UNKNOWN = 0.01  # of a text's bytes: beyond it, losses are about something else than the text
MOST_PADDING = 1024  # ids without an entry that are no slip; more where there are more entries
SAMPLE_BYTES = 8_000_000  # training text that the BPE is learnt from; more changes few merges
ENCODE_BYTES = 2_000_000  # text encoded at once; an encoding takes some hundred bytes a token

# The library warns when a process that has used its threads forks; a set value says that this is meant.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def train_tokenizer(texts: Sequence[bytes], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with exactly `vocab_size` entries, the separator (id 0) among them.

    Args:
        texts: training documents in UTF-8. Evenly spaced ones are used, `SAMPLE_BYTES` in all.

    Raises:
        ConfigError: the text holds too few distinct pairs for so many entries.
    """
    step = max(1, -(-sum(map(len, texts)) // SAMPLE_BYTES))
    sample = [text.decode() for text in texts[::step]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer, length=len(sample))
    reached = tokenizer.get_vocab_size()
    if reached != vocab_size:
        raise refused(
            "vocab_size",
            vocab_size,
            f"the training text supports {reached} entries; use at most that many, or more text",
        )
    return _plain(tokenizer)


def load_tokenizer(path: Path, vocab_size: int, separator: str | None = None) -> tuple[Tokenizer, int]:
    """The user's tokenizer, and its token between documents.

    What would make its tokens depend on more than the text is off: truncation, padding, the dropout of merges.

    Args:
        vocab_size: ids of the model; more than the tokenizer has are padding, which no text holds.
        separator: the token between documents; None: one of a common name.

    Raises:
        ConfigError: not a tokenizer, more entries than `vocab_size` or far fewer, or no such token.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        remedy = "give a `tokenizer.json` as `save` of `tokenizers` or of a fast tokenizer of `transformers` writes it"
        known = f"not a tokenizer of the `tokenizers` library {tokenizers.__version__} ({shortened(str(error))})"
        raise refused("tokenizer", path.name, f"{known}; {remedy}") from None
    entries = tokenizer.get_vocab(with_added_tokens=True)
    size = max(entries.values(), default=-1) + 1
    most = len(entries) + max(MOST_PADDING, len(entries))
    if size > most:
        raise refused(
            "tokenizer", path.name, f"its {len(entries)} entries have ids up to {size - 1}; number them with fewer gaps"
        )
    if vocab_size < size:
        raise refused(
            "vocab_size", vocab_size, f"{path.name} has {size} entries; write `vocab_size: {size}`, or more to pad it"
        )
    if vocab_size > most:
        remedy = f"{path.name} has {len(entries)} entries, and so much padding is a slip; write `vocab_size: {size}`"
        raise refused("vocab_size", vocab_size, remedy)
    found = _separator_of(tokenizer, path.name, separator)
    if isinstance(tokenizer.model, models.BPE):
        tokenizer.model.dropout = None
    return _plain(tokenizer), found


def _separator_of(tokenizer: Tokenizer, name: str, wanted: str | None) -> int:
    """The id of the token between documents, which the tokenizer takes for a special one from now on."""
    added = tokenizer.get_added_tokens_decoder()
    folded = {_folded(entry.content): index for index, entry in sorted(added.items(), reverse=True)}
    if wanted is not None:
        found = tokenizer.token_to_id(wanted)
    else:
        exact = (tokenizer.token_to_id(token) for token in KNOWN_SEPARATORS)
        alike = (folded.get(_folded(token)) for token in KNOWN_SEPARATORS)
        found = next((index for index in (*exact, *alike) if index is not None), None)
    if found is None:
        special = ", ".join(entry.content for entry in added.values() if entry.special) or "none"
        if wanted is None:
            missing = f"it has no token of a common name for the end of a document ({', '.join(KNOWN_SEPARATORS)})"
            raise refused(
                "tokenizer", name, f"{missing}; name one as `data.separator`; its special ones: {shortened(special)}"
            )
        raise refused("separator", wanted, f"{name} has no such token; its special ones: {shortened(special)}")
    if found not in added or not added[found].special:
        tokenizer.add_special_tokens([AddedToken(str(tokenizer.id_to_token(found)), special=True, normalized=False)])
    return int(found)


def _folded(token: str) -> str:
    """A token's name without what only dresses it: DeepSeek writes its end with full-width bars and U+2581.

    >>> _folded("<\uff5cend\u2581of\u2581sentence\uff5c>")
    '<|end_of_sentence|>'
    """
    return unicodedata.normalize("NFKC", token).casefold().replace("\u2581", "_").replace(" ", "_")


def _plain(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # a text that spells the separator out must not gain a document end
    return tokenizer


# --- encoding ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """A document in tokens.

    Attributes:
        ids: without a separator, [N].
        sizes: UTF-8 bytes of the text that each token stands for, and the bytes after the last token, [N + 1]; in all,
            those of the text. What a tokenizer drops, such as spaces, counts with the token after it.
        unknown: bytes under an unknown token or, spaces aside, under none.
        example: some of what is unknown.
    """

    ids: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    unknown: int = 0
    example: str = ""


def encode(tokenizer: Tokenizer, texts: Sequence[bytes]) -> Iterator[Encoded]:
    """Each document in tokens.

    Bytes are those of the entries where these add up to the text, as in a byte-level vocabulary; otherwise they come
    from the places in the text that the tokenizer says its tokens are from.

    Raises:
        Exception: the tokenizer has no token for what is unknown to it.
    """
    unknown = _unknown_id(tokenizer)
    entry_sizes = _entry_sizes(tokenizer, unknown)
    whole = entry_sizes.any()
    # Byte-level with every byte: it spells whatever a normalizer makes of the text.
    spells_all = whole and tokenizer.get_vocab().keys() >= set(pre_tokenizers.ByteLevel.alphabet())
    lot: list[bytes] = []
    room = ENCODE_BYTES
    for number, text in enumerate(texts, 1):
        lot.append(text)
        room -= len(text)
        if room <= 0 or number == len(texts):
            encode_lot = tokenizer.encode_batch_fast if whole else tokenizer.encode_batch
            for each, encoding in zip(
                lot, encode_lot([text.decode() for text in lot], add_special_tokens=False), strict=True
            ):
                ids = np.array(encoding.ids, dtype=np.int64)
                if whole and entry_sizes[ids].sum() == len(each):
                    yield Encoded(ids, np.append(entry_sizes[ids], 0))
                else:
                    placed = tokenizer.encode(each.decode(), add_special_tokens=False) if whole else encoding
                    document = _placed(
                        each.decode(), ids, np.array(placed.offsets, dtype=np.int64).reshape(-1, 2), unknown
                    )
                    yield Encoded(ids, document.sizes) if spells_all else document
            lot, room = [], ENCODE_BYTES


def _entry_sizes(tokenizer: Tokenizer, unknown: int | None) -> npt.NDArray[np.int64]:
    """UTF-8 bytes of each entry of a byte-level vocabulary, [V]; 0 for special and unknown tokens, and for all of other
    vocabularies.
    """
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    sizes = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    added = tokenizer.get_added_tokens_decoder()
    entries = {token: index for token, index in vocabulary.items() if index not in added and index != unknown}
    if set(pre_tokenizers.ByteLevel.alphabet()).issuperset("".join(entries)):
        for token, index in entries.items():
            sizes[index] = len(token)  # each character of such a vocabulary writes one byte
        for index, entry in added.items():
            sizes[index] = 0 if entry.special else len(entry.content.encode())
    return sizes


def _unknown_id(tokenizer: Tokenizer) -> int | None:
    if isinstance(tokenizer.model, models.Unigram):  # which tells it in its file alone
        index = json.loads(tokenizer.to_str())["model"]["unk_id"]
        return None if index is None else int(index)
    token = tokenizer.model.unk_token
    return None if token is None else tokenizer.token_to_id(token)


def _placed(text: str, ids: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64], unknown: int | None) -> Encoded:
    """Bytes from the places of the tokens, [N, 2] in characters. Tokens of one place, such as the bytes of a character,
    share its bytes.
    """
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (points[:, None] >= np.array([0x80, 0x800, 0x10000])).sum(1)
    bytes_before = np.concatenate([[0], np.cumsum(widths)])
    reached = np.maximum.accumulate(bytes_before[offsets[:, 1]])
    sizes = np.diff(reached, prepend=0, append=bytes_before[-1])
    if len(ids):
        first = np.flatnonzero(np.concatenate([[True], (offsets[1:] != offsets[:-1]).any(1)]))
        count = np.diff(first, append=len(ids))
        place = np.arange(len(ids)) - np.repeat(first, count)
        shared = np.repeat(np.add.reduceat(sizes[:-1], first), count)
        count = np.repeat(count, count)
        sizes[:-1] = (place + 1) * shared // count - place * shared // count
    under, known = (_covered(offsets[chosen], len(text)) for chosen in (slice(None), ids != unknown))
    lost = ~known & under
    # A mark that a normalizer joins to its letter (NFC) has no place of its own, and is not unknown for that.
    lost[[i for i in np.flatnonzero(~under) if not (text[i].isspace() or unicodedata.combining(text[i]))]] = True
    start = int(lost.argmax()) if lost.any() else 0
    end = start + int(lost[start:].argmin()) if not lost[start:].all() else len(text)
    return Encoded(ids, sizes, int(widths[lost].sum()), text[start : min(end, start + 20)])


def _covered(offsets: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.bool_]:
    """Which characters lie in any of these places."""
    steps = np.bincount(offsets[:, 0], minlength=length + 1) - np.bincount(offsets[:, 1], minlength=length + 1)
    return np.cumsum(steps)[:length] > 0


def tokenize(
    tokenizer: Tokenizer, separator: int, texts: Sequence[bytes], name: str
) -> Iterator[tuple[npt.NDArray[np.unsignedinteger[Any]], npt.NDArray[np.int64]]]:
    """Each document's token ids, the separator last, and the bytes that each stands for.

    Args:
        name: of the tokenizer, for a refusal.

    Raises:
        ConfigError: too much of the text is unknown to the tokenizer, or it reads a separator in the middle of a text.
    """
    dtype = np.uint16 if max(tokenizer.get_vocab().values()) < 1 << 16 else np.uint32
    unknown, total, example = 0, 0, ""
    encoded = encode(tokenizer, texts)
    for text in texts:
        try:
            document = next(encoded)
        except Exception as error:  # the library raises bare Exception
            raise refused(
                "tokenizer",
                name,
                f"it fails on the text ({shortened(str(error))}); give it an unknown token or byte fallback",
            ) from None
        if (document.ids == separator).any():
            spelt = tokenizer.id_to_token(separator)
            remedy = f"{name} also finds it inside a text, one that begins {brief(text[:40].decode(errors='ignore'))}"
            raise refused(
                "separator", spelt, f"{remedy}; name a token that no text spells, such as another special one"
            )
        unknown, total, example = unknown + document.unknown, total + len(text), example or document.example
        yield np.append(document.ids, separator).astype(dtype), document.sizes
    if unknown > MOST_UNKNOWN * total:
        remedy = (
            "use one that can spell any text (byte-level, or with byte fallback), or leave `tokenizer` out to have one "
            "trained"
        )
        raise refused(
            "tokenizer", name, f"{unknown / total:.1%} of the text is unknown to it, such as {brief(example)}; {remedy}"
        )
