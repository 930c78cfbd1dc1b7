"""Tokens on disk, and the order in which training meets them: a pure function of the seed and the step.

Nothing has to be saved to resume but the step; all shares of a study meet the same batches.

Shapes: B sequences a batch, S held-out sequences, T = context, V vocabulary.
It must not know models.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sparsemem.config import ConfigError
from sparsemem.data.corpus import refused

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Tokens:
    """A prepared corpus.

    Attributes:
        train, val: token ids with a separator after each document, memory-mapped, uint16 or uint32.
        vocab_size: V.
        separator_id: the token that ends a document.
        canonical: raw id -> canonical id, int64 [V].
        canonical_size: canonical ids in use.
        val_bytes: UTF-8 bytes of the text that each token of `val` stands for, int64.
        manifest: what the text is; stored with a study.
        digest: names the corpus and its tokenizer.
    """

    train: npt.NDArray[np.unsignedinteger[Any]]
    val: npt.NDArray[np.unsignedinteger[Any]]
    vocab_size: int
    separator_id: int
    canonical: npt.NDArray[np.int64]
    canonical_size: int
    val_bytes: npt.NDArray[np.int64]
    manifest: dict[str, Any]
    digest: str

    @classmethod
    def load(cls, folder: Path) -> Tokens:
        """Open what `prepare` has built."""
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        arrays = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in ("train", "val", "val_bytes")
        }
        canonical = np.load(folder / "canonical.npy", allow_pickle=False)
        names = ("vocab_size", "separator_id", "canonical_size", "digest")
        return cls(**arrays, canonical=canonical, **{name: manifest[name] for name in names}, manifest=manifest)


def token_frequency_loss(tokens: Tokens) -> float:
    """Loss on the held-out text of the training text's token frequencies alone, one added to each count, nats per
    token: what a model knows that has learned nothing of order.
    """
    counts = np.bincount(tokens.train, minlength=tokens.vocab_size) + 1
    held_out = np.bincount(tokens.val, minlength=tokens.vocab_size)
    return float(held_out @ -np.log(counts / counts.sum()) / held_out.sum())


class Batches:
    """Non-overlapping windows of the training text, in a new permutation each epoch."""

    def __init__(
        self, tokens: npt.NDArray[Any], context: int, batch_tokens: int, seed: int, unscored_after: int | None = None
    ) -> None:
        """
        Args:
            tokens: ids, 1-D.
            context: T.
            batch_tokens: B x T.
            seed: of the order.
            unscored_after: a token after which the target is -1, which is none.

        Raises:
            ConfigError: the text is shorter than one batch.
        """
        self.tokens, self.context, self.seed, self.unscored_after = tokens, context, seed, unscored_after
        check_batch(len(tokens), context, batch_tokens)
        self.rows = batch_tokens // context
        self.windows = (len(tokens) - 1) // context
        self._orders: dict[int, npt.NDArray[np.int64]] = {}

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of a step, int64 [B, T] each. A batch at the end of an epoch takes its rest
        from the next.
        """
        epochs, places = np.divmod(np.arange(step * self.rows, (step + 1) * self.rows), self.windows)
        first, last = int(epochs[0]), int(epochs[-1])
        windows = self._order(first)[places]
        if last != first:
            windows = np.where(epochs == first, windows, self._order(last)[places])
        return _split(self.tokens, windows, self.context, self.unscored_after)

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        if epoch not in self._orders:
            # Sorting the raw stream of PCG64 is a permutation that no later numpy changes; `Generator.permutation`
            # promises none.
            draws = np.random.PCG64([self.seed, epoch]).random_raw(self.windows)
            self._orders = {k: v for k, v in self._orders.items() if k == epoch - 1} | {
                epoch: np.argsort(draws, kind="stable")
            }
        return self._orders[epoch]


def check_batch(tokens: int, context: int, batch_tokens: int) -> None:
    """Refuse a batch that is larger than the training text, of so many tokens or, before they are counted, bytes.

    Raises:
        ConfigError: naming both.
    """
    rows, windows = batch_tokens // context, max(0, tokens - 1) // context
    if windows < rows:
        raise ConfigError(
            f"field `train.batch_tokens` has the value {batch_tokens:,}: a batch takes {rows} sequences of {context} "
            f"tokens, the training text holds {windows}; use smaller batches or more text"
        )


def validation_windows(
    tokens: npt.NDArray[Any], context: int, count: int, unscored_after: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `count` non-overlapping windows of the held-out text: inputs and targets, int64 [S, T] each, targets as
    those of `Batches`.

    Raises:
        ConfigError: the held-out text is shorter.
    """
    held = (len(tokens) - 1) // context
    if count < 1 or held < count:
        remedy = f"that is {held} sequences of {context} tokens, {max(count, 1)} are needed; hold out more"
        raise refused("validation_tokens", len(tokens), remedy)
    return _split(tokens, np.arange(count), context, unscored_after)


def _split(
    tokens: npt.NDArray[Any], windows: npt.NDArray[np.int64], context: int, unscored_after: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    import torch  # here, so that preparing and describing data does not wait for it

    cut = torch.from_numpy(tokens[windows[:, None] * context + np.arange(context + 1)].astype(np.int64))
    inputs, targets = cut[:, :-1].contiguous(), cut[:, 1:].contiguous()
    return inputs, targets if unscored_after is None else targets.masked_fill(inputs == unscored_after, -1)
