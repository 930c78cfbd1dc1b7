"""Engram: conditional memory by hashed n-grams (arXiv 2601.07372), with each choice where paper and released code
differ.

- Row numbers depend on token ids alone: no router, no key scoring. Suffix n-grams of several orders, several hash heads
  an order, every head with a table of its own and a distinct prime number of rows.
- What is read is gated by the hidden state, smoothed by a short causal convolution, and added to the residual stream.
- With several residual streams (sec. 2.4) each may have a key projection, norms, a gate and a convolution of its own,
  while all have the table and the value projection in common.

Shape letters: B sequences, T positions, S residual streams, D model width, N orders, H tables (orders x heads), M
memory width (H x row width).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsemem.accounting import BYTES_PER_PARAMETER, Account, always_active
from sparsemem.kernels.matmul import linear
from sparsemem.layers.documents import documents, earlier
from sparsemem.layers.norm import RMSNorm, norm_account
from sparsemem.layers.streams import mixed_flops
from sparsemem.mechanisms.layer import SparseLayer
from sparsemem.memory.table import MemoryTable
from sparsemem.parameter import parameter

if TYPE_CHECKING:
    from sparsemem.config import Model
    from sparsemem.mechanisms.engram import Engram


class NgramHash(nn.Module):
    """Token ids to row numbers (released code: multiply, XOR, modulo a prime)."""

    multipliers: Tensor
    canonical: Tensor
    primes_NH: Tensor

    def __init__(self, config: Engram, layer: int, rows: tuple[int, ...], canonical: Tensor, separator: int) -> None:
        """
        Args:
            layer: 1-based block.
            rows: rows of each table, order by order, head by head.
            canonical: (V,) raw token id -> canonical id; ignored without `compression`.
            separator: raw id of the token that ends a document.
        """
        super().__init__()
        self.orders, self.reset, self.separator = config.orders, config.reset_at_document_end, separator
        ids = canonical if config.compression else torch.arange(len(canonical), device=canonical.device)
        self.pad = int(ids[separator])
        self.register_buffer("canonical", ids, persistent=False)
        self.register_buffer("multipliers", hash_multipliers(config, layer, int(ids.max()) + 1), persistent=False)
        self.register_buffer("primes_NH", torch.tensor(rows).view(len(config.orders), config.heads), persistent=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """(B, T) raw token ids -> (B, T, H) row numbers, int64."""
        rows, mix_BT = list[Tensor](), torch.zeros_like(tokens_BT)
        for back, ids_BT in enumerate(self.lookback(tokens_BT)):
            mix_BT = mix_BT ^ (ids_BT * self.multipliers[back])
            if back + 1 in self.orders:
                rows.append(mix_BT.unsqueeze(-1) % self.primes_NH[len(rows)])
        return torch.cat(rows, dim=-1)

    def lookback(self, tokens_BT: Tensor) -> Iterator[Tensor]:
        """The hashed ids of each token, of the one before it and so on, (B, T) each; the separator's where an n-gram
        may not reach.
        """
        ids_BT, document_BT = self.canonical[tokens_BT], documents(tokens_BT, self.separator)
        yield ids_BT
        for back in range(1, self.orders[-1]):
            back_BT = F.pad(ids_BT, (back, 0), value=self.pad)[:, : ids_BT.shape[1]]
            if self.reset:
                same_BT = F.pad(document_BT, (back, 0), value=-1)[:, : ids_BT.shape[1]] == document_BT
                back_BT = torch.where(same_BT, back_BT, self.pad)
            yield back_BT


def hash_multipliers(config: Engram, layer: int, vocabulary: int) -> Tensor:
    """One odd multiplier a look-back, small enough that its product with an id stays within int64; `layer`
    is 1-based.
    """
    bound = max(1, np.iinfo(np.int64).max // vocabulary // 2)
    stream = np.random.default_rng(config.hash_seed + 10007 * (layer - 1))
    return torch.from_numpy(2 * stream.integers(0, bound, size=max(config.orders)) + 1)


class EngramMemory(SparseLayer):
    """The module at the entry of one block: hash, look up, gate, convolve. The caller adds its output to the residual
    stream.
    """

    def __init__(self, config: Model, layer: int, rows: tuple[int, ...], canonical: Tensor, separator: int) -> None:
        super().__init__(sum(rows))
        self.config: Engram = config.pools["engram"]
        self.streams = _gates(config)
        memory_width, width, widths = len(rows) * self.config.row_dim, config.width, self.streams * config.width
        self.hash = NgramHash(self.config, layer, rows, canonical, separator)
        self.table = MemoryTable(rows, self.config.row_dim, self.config.init_std)
        self.key = parameter(widths, memory_width, std=config.init_std)
        self.value = parameter(width, memory_width, std=config.init_std)
        self.key_bias = parameter(widths) if self.config.bias else None
        self.value_bias = parameter(width) if self.config.bias else None
        self.hidden_norm = RMSNorm(width, config.norm_eps, self.streams)
        self.key_norm = RMSNorm(width, config.norm_eps, self.streams)
        if self.config.conv:
            self.conv_norm = RMSNorm(width, config.norm_eps, self.streams)
            # zero: the module starts as its gated value
            self.taps_KD = parameter(self.config.conv_kernel, *([self.streams] * (self.streams > 1)), width)

    def forward(self, hidden: Tensor, tokens_BT: Tensor) -> Tensor:
        """Hidden states (B, T, D), with a gate for each stream (B, T, S, D), and raw token ids (B, T) -> what the
        memory adds, of the same shape.
        """
        rows_BTH = self.hash(tokens_BT)
        memory_BTM = self.table(rows_BTH)
        key = linear(memory_BTM, self.key, self.key_bias).view_as(hidden)
        value = linear(memory_BTM, self.value, self.value_bias)
        if self.streams > 1:
            value = value.unsqueeze(2)
        gate = self.gate(hidden, key)
        value = gate.to(value.dtype) * value
        documents_BT = documents(tokens_BT, self.hash.separator) if self.config.conv_reset_at_document_end else None
        out = value + self._convolve(value, documents_BT) if self.config.conv else value
        if not self.training:
            self.note(rows_BTH + self.table.first_H, out, gated=value, gate_mean=gate.flatten(2))
        return out

    def ngrams(self, tokens_BT: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        orders_H = tuple(order for order in self.config.orders for _ in range(self.config.heads))
        return torch.stack(tuple(self.hash.lookback(tokens_BT)), -1), orders_H

    def gate(self, hidden: Tensor, key: Tensor) -> Tensor:
        """How much of the memory each position lets in, and each stream, (..., 1) between 0 and 1 (Engram sec. 2)."""
        score = (self.hidden_norm(hidden) * self.key_norm(key)).sum(-1, keepdim=True) / math.sqrt(hidden.shape[-1])
        if self.config.gate == "signed-root":
            score = score.sign() * score.abs().clamp_min(1e-6).sqrt()
        return score.sigmoid()

    def _convolve(self, value: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        """SiLU of a depthwise causal convolution; tap j reads j x (largest order) positions back, given documents not
        out of its own.
        """
        x = self.conv_norm(value)
        T, dilation = x.shape[1], self.config.orders[-1]
        out = x * self.taps_KD[0]
        for tap in range(1, min(self.config.conv_kernel, 1 + (T - 1) // dilation)):
            out = out + earlier(x, tap * dilation, documents_BT) * self.taps_KD[tap]
        return F.silu(out)


def _gates(config: Model) -> int:
    """Gates of a module, each with a key projection, norms and taps: one, or one for each residual stream."""
    return config.stream_count if config.pools["engram"].fusion == "per_branch" else 1


def engram_account(config: Model, rows: tuple[tuple[int, ...], ...]) -> Account:
    """Closed form of all modules: what every token passes (projections, norms, convolution) and the rows; `rows` for
    each module.
    """
    return sum((_module_account(config, config.pools["engram"], module) for module in rows), Account())


def _module_account(config: Model, engram: Engram, rows: tuple[int, ...]) -> Account:
    gates, width, read = _gates(config), config.width, len(rows) * engram.row_dim
    outputs = (gates + 1) * width  # keys and the value
    projections = always_active(outputs * read) + always_active(outputs * engram.bias, flops=0)
    score = norm_account(width) * 2 + Account(flops=2 * width)
    conv = norm_account(width) + always_active(width * engram.conv_kernel) if engram.conv else Account()
    rows_read = Account(sum(rows) * engram.row_dim, read, 0, read * BYTES_PER_PARAMETER)
    own_read = Account() if gates > 1 else Account(flops=mixed_flops(config))
    return projections + (score + conv) * gates + rows_read + own_read
