"""Hashed n-grams added to the vocabulary embedding: OverEncoding (arXiv 2501.16975), amplified as in LongCat (arXiv
2601.21204).

- `e = (E[x_t] + sum_i sum_j W_ij E_ij[h_i mod m_ij]) / (1 + number of tables)`, with `h_i = x_t + x_{t-1} V + ... +
  x_{t-i+1} V^(i-1)`: the i-gram read as one number in base V, whose digits are raw token ids. Each order has several
  tables, each with its own prime m.
- Evaluated once, before the first block, without a gate. What a mean of many terms leaves is small beside what the
  blocks add, which is why LongCat amplifies it.

Shape letters: B sequences, T positions, D model width, N tokens of the longest n-gram, H tables (orders x heads), M
memory width (H x row width).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsemem.accounting import BYTES_PER_PARAMETER, Account, always_active
from sparsemem.kernels.matmul import linear
from sparsemem.layers.norm import RMSNorm, norm_account
from sparsemem.mechanisms.layer import SparseLayer
from sparsemem.memory.table import MemoryTable
from sparsemem.parameter import parameter

if TYPE_CHECKING:
    from sparsemem.config import Model
    from sparsemem.mechanisms.ngram_embedding import NgramEmbedding


class PolynomialHash(nn.Module):
    """Token ids to row numbers: every n-gram as a number in base V, modulo each table's prime."""

    powers_NH: Tensor
    primes_H: Tensor

    def __init__(self, config: Model, rows: tuple[int, ...], vocabulary: int, separator: int) -> None:
        """
        Args:
            rows: rows of each table, order by order, head by head.
            vocabulary: number of token ids, V.
            separator: id of the token that ends a document; it also stands for whatever an n-gram may not reach.
        """
        super().__init__()
        memory: NgramEmbedding = config.pools["ngram_embedding"]
        self.reset, self.separator = memory.reset_at_document_end, separator
        self.orders_H = tuple(order for order in memory.orders for _ in range(memory.heads))
        longest = self.orders_H[-1]
        # V^j mod m for V^j leaves h mod m what it is, and each term of h below V m: its sum is exact in int64.
        assert longest * vocabulary * max(rows) < 2**63
        powers = [
            [pow(vocabulary, j, m) if j < order else 0 for m, order in zip(rows, self.orders_H, strict=True)]
            for j in range(longest)
        ]
        self.register_buffer("powers_NH", torch.tensor(powers), persistent=False)
        self.register_buffer("primes_H", torch.tensor(rows), persistent=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """(B, T) raw token ids -> (B, T, H) row numbers, int64."""
        digits = (back_BT.unsqueeze(-1) * self.powers_NH[j] for j, back_BT in enumerate(self.lookback(tokens_BT)))
        return functools.reduce(torch.add, digits) % self.primes_H

    def lookback(self, tokens_BT: Tensor) -> Iterator[Tensor]:
        """The ids of each token, of the one before it and so on, (B, T) each; the separator's where an n-gram may not
        reach.
        """
        before_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(
            tokens_BT
        )  # tokens before t, of its document
        if self.reset:
            begins_BT = F.pad(tokens_BT[:, :-1] == self.separator, (1, 0))
            before_BT = before_BT - (before_BT * begins_BT).cummax(1).values
        yield tokens_BT
        for j in range(1, len(self.powers_NH)):
            yield torch.where(before_BT >= j, tokens_BT.roll(j, 1), self.separator)


class NgramEmbeddingLayer(SparseLayer):
    """Turns the vocabulary embedding into what enters the first block."""

    def __init__(self, config: Model, rows: tuple[int, ...], vocabulary: int, separator: int) -> None:
        """Arguments as those of `PolynomialHash`."""
        super().__init__(sum(rows))
        memory: NgramEmbedding = config.pools["ngram_embedding"]
        self.hash = PolynomialHash(config, rows, vocabulary, separator)
        self.table = MemoryTable(rows, memory.row_dim, memory.init_std)
        # Neither paper says how W starts. With this scale W E has the deviation of the rows, which by default is the
        # embedding's too.
        self.projection = parameter(config.width, len(rows) * memory.row_dim, std=1 / math.sqrt(memory.row_dim))
        self.factor = (math.sqrt(config.width) if memory.amplify == "scale" else 1.0) / (1 + len(rows))
        self.norm = RMSNorm(config.width, config.norm_eps) if memory.amplify == "norm" else None

    def forward(self, embedded_BTD: Tensor, tokens_BT: Tensor) -> Tensor:
        """Vocabulary embeddings (B, T, D) and their raw token ids (B, T) -> (B, T, D)."""
        rows_BTH = self.hash(tokens_BT)
        added_BTD = linear(self.table(rows_BTH), self.projection)
        if not self.training:
            self.note(rows_BTH + self.table.first_H, added_BTD * self.factor)  # before the norm
        return self._scaled(embedded_BTD + added_BTD)

    def without(self, embedded_BTD: Tensor, tokens_BT: Tensor) -> Tensor:
        """The vocabulary embedding, scaled and normed as with n-grams."""
        return self._scaled(embedded_BTD)

    def ngrams(self, tokens_BT: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        return torch.stack(tuple(self.hash.lookback(tokens_BT)), -1), self.hash.orders_H

    def _scaled(self, sum_BTD: Tensor) -> Tensor:
        out_BTD = sum_BTD * self.factor
        return out_BTD if self.norm is None else self.norm(out_BTD)


def ngram_embedding_account(config: Model, rows: tuple[int, ...]) -> Account:
    """Closed form of the whole: projections, norm (where the sum is normed) and rows; `rows` for each table."""
    memory: NgramEmbedding = config.pools["ngram_embedding"]
    read = len(rows) * memory.row_dim
    norm = norm_account(config.width) if memory.amplify == "norm" else Account()
    return (
        always_active(config.width * read)
        + norm
        + Account(sum(rows) * memory.row_dim, read, 0, read * BYTES_PER_PARAMETER)
    )
