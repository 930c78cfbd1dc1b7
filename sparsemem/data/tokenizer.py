"""Text to token ids: a byte-level BPE trained on the training text, or the user's `tokenizer.json`.

It must not know where text comes from.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sparsemem.data.corpus import refused

SEPARATOR = "<|endoftext|>"
KNOWN_SEPARATORS = (SEPARATOR, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
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
        raise refused("vocab_size", vocab_size, f"the training text supports {reached} entries; use at most that many, or more text")
    return _plain(tokenizer)


def load_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """The user's tokenizer.

    Raises:
        ConfigError: not a tokenizer, another size than `vocab_size`, or no token that separates documents.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise refused("tokenizer", path.name, f"not a tokenizer of the `tokenizers` library ({error})") from None
    size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if size != vocab_size:
        raise refused("vocab_size", vocab_size, f"{path.name} has {size} entries; write `vocab_size: {size}`")
    separator_id(tokenizer)
    return _plain(tokenizer)


def separator_id(tokenizer: Tokenizer) -> int:
    """The token between documents."""
    for token in KNOWN_SEPARATORS:
        if (found := tokenizer.token_to_id(token)) is not None:
            return int(found)
    raise refused("tokenizer", "tokenizer.json", f"it has none of the document separators {', '.join(KNOWN_SEPARATORS)}; add one to it")


def _plain(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # a text that spells the separator out must not gain a document end
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[bytes]) -> Iterator[list[int]]:
    """Token ids of each document, without separators."""
    lot: list[str] = []
    room = ENCODE_BYTES
    for number, text in enumerate(texts, 1):
        lot.append(text.decode())
        room -= len(text)
        if room <= 0 or number == len(texts):
            for encoding in tokenizer.encode_batch_fast(lot, add_special_tokens=False):
                yield encoding.ids
            lot, room = [], ENCODE_BYTES


def token_bytes(tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    """UTF-8 bytes that each token stands for, [V]; 0 for special tokens. Exact for byte-level and byte-fallback vocabularies.

    A tokenizer that rewrites text (lower case, say) counts the bytes of what it has rewritten.
    """
    sizes = np.zeros(max(tokenizer.get_vocab().values()) + 1, dtype=np.int64)
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    added = tokenizer.get_added_tokens_decoder()
    vocabulary = {token: index for token, index in tokenizer.get_vocab().items() if index not in added}
    byte_level = alphabet.issuperset("".join(vocabulary))
    for token, index in vocabulary.items():
        if byte_level:
            sizes[index] = len(token)  # each character of such a vocabulary writes one byte
        elif len(token) == 6 and token.startswith("<0x"):
            sizes[index] = 1
        else:
            sizes[index] = len(token.removeprefix("##").replace("\u2581", " ").encode())
    for index, entry in added.items():
        sizes[index] = 0 if entry.special else len(entry.content.encode())
    return sizes
