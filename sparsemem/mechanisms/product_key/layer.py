"""Product-key memories: PKM, Memory+, PEER, UltraMem, UltraMemV2. What is done with the rows that `retrieval` finds.

Facts (PKM = arXiv 1907.05242, Memory+ = 2412.09764, PEER = 2407.04153, UltraMem = 2411.12364, UltraMemV2 = 2508.18756):

- The output is the sum over heads and slots of weight x value. Memory+ multiplies it by silu of a projection of the
  input.
- Pre-values (PEER, UltraMemV2) make each row an expert of one neuron: its weight is multiplied by (an activation of)
  pre-value x input.
- Multi-core scoring (UltraMem): slice g of a value is weighted by the score of Tucker core g.
- Implicit value expansion (UltraMem): E virtual tables `V_p = V W_p` of N addresses each. Addresses are shuffled once;
  rows are pooled for each virtual table apart, then projected: `o = sum_p W_p^T pooled_p`. UltraMemV2 pools all
  together and projects once.

Shape letters: B sequences, T positions, S = B x T tokens, D model width, H heads, M rows that a head reads (all heads,
once they are joined), G cores, P projected groups (virtual tables with a projection of their own, otherwise one), C
width of a value, W = P x C, K width of a pre-value, A addresses, or reads, N rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsemem.accounting import BYTES_PER_PARAMETER, Account, always_active
from sparsemem.kernels.matmul import linear
from sparsemem.layers.documents import documents
from sparsemem.mechanisms.layer import SparseLayer
from sparsemem.mechanisms.product_key.cost import retrieval_account
from sparsemem.mechanisms.product_key.fields import ProductKey, layers_per_table, memory_layers
from sparsemem.mechanisms.product_key.retrieval import ProductKeyRetrieval, top_score_moments
from sparsemem.memory.table import MemoryTable, Reads
from sparsemem.parameter import parameter, residual_std

if TYPE_CHECKING:
    from sparsemem.config import Model


class ValueTable(nn.Module):
    """The rows of one table: values and, where configured, pre-values. Built once, shared by the layers
    that read it.
    """

    def __init__(self, config: Model, pool: str, keys: tuple[int, int], ffn_inner: int) -> None:
        """
        Args:
            keys: row keys and column keys, whose product is the number of rows.
            ffn_inner: activated inner width of a feed-forward, whose output variance `init: ultramem_v2` matches.
        """
        super().__init__()
        memory: ProductKey = config.pools[pool]
        value_std, pre_value_std = row_stds(config, pool, keys, ffn_inner)
        rows, value_dim, pre_value_dim = (math.prod(keys),), *_row_widths(config, memory)
        self.values = MemoryTable(rows, value_dim, value_std, memory.value_rate)
        self.pre_values = MemoryTable(rows, pre_value_dim, pre_value_std, memory.value_rate) if pre_value_dim else None


class ProductKeyMemory(SparseLayer):
    """One memory layer: retrieve, weight, pool, project. The block decides where its output is added.

    Buffers:
        shuffle_A: address -> place among the virtual tables, the same in every run; only with more than one virtual
        table.
    """

    shuffle_A: Tensor

    def __init__(
        self, config: Model, pool: str, layer: int, keys: tuple[int, int], table: ValueTable, separator: int = 0
    ) -> None:
        """
        Args:
            layer: 1-based block; the seed of the shuffle.
            keys: row keys and column keys of `table`.
            separator: token id that ends a document, where the query's convolution has to know.
        """
        super().__init__(math.prod(keys))
        memory: ProductKey = config.pools[pool]
        self.memory, self.table, self.separator = memory, table, separator
        self.retrieval = ProductKeyRetrieval(config, memory, keys)
        pooled = projected_groups(memory) * _row_widths(config, memory)[0]
        pre_std, gate_std, out_std = _projection_stds(config, memory)
        self.pre_KD = parameter(memory.pre_value_dim, config.width, std=pre_std) if memory.pre_value_dim else None
        self.gate_WD = parameter(pooled, config.width, std=gate_std) if memory.projection == "gated" else None
        self.out_DW = parameter(config.width, pooled, std=out_std) if memory.projection != "none" else None
        if memory.virtual_tables > 1:
            stream, addresses = torch.Generator("cpu").manual_seed(layer), memory.virtual_tables * self.rows
            counted = self.retrieval.query_FD.is_meta  # only, and published models have a billion addresses
            shuffle_A = torch.empty(addresses) if counted else torch.randperm(addresses, generator=stream, device="cpu")
            self.register_buffer("shuffle_A", shuffle_A, persistent=False)

    def forward(self, x_BTD: Tensor, tokens_BT: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) -> what the memory adds, (B, T, D), and the retrieval's weighted auxiliary loss, a scalar or None.

        Raw token ids (B, T) are read where the query's convolution stays in its document; without them it is one.
        """
        asks = self.memory.conv_reset_at_document_end
        documents_BT = documents(tokens_BT, self.separator) if asks and tokens_BT is not None else None
        addresses_SHM, scores_SHMG, auxiliary = self.retrieval(x_BTD, documents_BT)
        reads, weights_SMG, x_SD = self._reads(addresses_SHM), scores_SHMG.flatten(1, 2), x_BTD.flatten(0, 1)
        if self.table.pre_values is not None:
            x_SK = x_SD if self.pre_KD is None else linear(x_SD, self.pre_KD)
            neuron_SM = self.table.pre_values.dot(reads, x_SK)
            neuron_SM = F.gelu(neuron_SM) if self.memory.pre_values == "gelu" else neuron_SM
            weights_SMG = weights_SMG * neuron_SM.unsqueeze(-1)
        y_SD = self.table.values.pool(reads, weights_SMG).flatten(1)
        if self.gate_WD is not None:
            y_SD = y_SD * F.silu(linear(x_SD, self.gate_WD))
        if self.out_DW is not None:
            y_SD = linear(y_SD, self.out_DW)
        if not self.training:
            first_SH, last_SH = scores_SHMG[:, :, 0].double().sum(-1), scores_SHMG[:, :, -1].double().sum(-1)
            self.note(reads.rows_A, y_SD, top1_score=first_SH, topm_score=last_SH)
        return y_SD.view_as(x_BTD), auxiliary

    def reads(self) -> Iterator[tuple[nn.Parameter, int]]:
        for table in (self.table.values, self.table.pre_values):
            if table is not None:
                yield table.rows_RC, self.memory.heads * self.memory.top_m

    def usage(self) -> dict[str, Any]:
        """Also `top1_score` and `topm_score`, the means of a head's first and last weight, cores summed, pre-values
        aside; and `singular_values` of the Tucker core.
        """
        return {**super().usage(), "singular_values": self.retrieval.singular_values()}

    def _reads(self, addresses_SHM: Tensor) -> Reads:
        """Which row of the table each address stands for and, if these are projected apart, in which virtual table."""
        if self.memory.virtual_tables == 1:
            return Reads(addresses_SHM.flatten(1))
        places_SM = self.shuffle_A[addresses_SHM.flatten(1)]
        groups = projected_groups(self.memory)
        return Reads(places_SM % self.rows, places_SM // self.rows if groups > 1 else None, groups)


# --- initial scale ----------------------------------------------------------------------------------------------------


def row_stds(config: Model, pool: str, keys: tuple[int, int], ffn_inner: int) -> tuple[float, float]:
    """Standard deviations of values and pre-values at the start.

    - `flat`, `released`: 0.02 (UltraMemV2's released code).
    - `ultramem`: the values' variance is E / (2 k H L), with E projected groups, top-k, H heads and L memory layers;
      with weights of mean square one the output's is then 1 / (2 L) (recalled from UltraMem, not re-read). Pre-values,
      which UltraMem does not have, multiply the weights by products of unit variance.
    - `ultramem_v2`: the output of a memory layer gets the variance T = 0.032 r / L, with L blocks and r the
      feed-forward's inner width over the model's h. Linears are N(0, 2 / (5 h)) and inputs have unit variance. T is the
      output variance of a feed-forward with its output matrix divided by sqrt(2 L) and its silu taken as linear: 0.4 x
      0.4 x 0.4 r / (2 L); with silu it is less, by E[silu(g)^2] / 0.4 = 0.31. With C and K the widths of value and
      pre-value and w^2 the weights' mean square, 1 + ss^2 at a mean of one, a value of variance v and a pre-value of
      variance u give

          T = k H w^2 v (0.4 K u) (0.4 C / h), hence, with u = v, v = sqrt(0.2 r h / (k H w^2 K C L)), UltraMemV2's
          formula.

      Without pre-values 0.4 K u drops out: v = 0.08 r h / (k H w^2 C L). Without a pre-projection its 0.4 does; without
      an output projection 0.4 C / h does, and each of E groups, which then stand side by side, holds 1 / E of the
      reads; a gated one adds E[silu(g)^2], g ~ N(0, 0.4). Projecting virtual tables apart changes nothing: a row in
      another group meets other columns of the same scale. A gelu of the neuron is taken as linear, as the silu is.

    The last two take the rows that a token reads as distinct. A row that two heads read, or that is read at two virtual
    addresses which are projected together, counts with (w1 + w2)^2 in place of w1^2 + w2^2: k addresses without
    preference give about (k - 1) (1 - 1 / E) / rows more.
    """
    memory: ProductKey = config.pools[pool]
    value_dim, pre_value_dim = _row_widths(config, memory)
    reads, groups = memory.heads * memory.top_m, projected_groups(memory)
    if memory.init in ("flat", "released"):
        return 0.02, 0.02
    if memory.init == "ultramem":
        return math.sqrt(groups / (2 * reads * len(memory_layers(config, pool)))), 1 / math.sqrt(pre_value_dim or 1)
    after = 1 / groups if memory.projection == "none" else 0.4 * value_dim / config.width
    after *= SILU_SQUARE if memory.projection == "gated" else 1.0
    square = (
        0.032 * ffn_inner / config.width / config.layers / (reads * _weight_square(memory, keys) * after)
    )  # of neuron x value
    if not pre_value_dim:
        return math.sqrt(square), 0.0
    std = (square / (pre_value_dim * (0.4 if memory.pre_value_dim else 1.0))) ** 0.25
    return std, std


SILU_SQUARE = 0.122742
"""E[silu(g)^2] for g ~ N(0, 0.4)."""


def _weight_square(memory: ProductKey, keys: tuple[int, int]) -> float:
    """Mean square of a read's weight at the start, its pre-value aside."""
    if memory.softmax:
        return 1 / memory.top_m**2  # as if all weighed the same
    mean, spread = top_score_moments(memory, keys)
    return (1.0 if memory.norm == "layer" else mean**2) * (1 + spread**2)  # a layer norm's gain brings the mean to one


def _projection_stds(config: Model, memory: ProductKey) -> tuple[float, float, float]:
    """Of the projections before pre-values, of the gate and of the output."""
    fan_in = 1 / math.sqrt(config.width)
    if memory.init == "flat":
        return fan_in, config.init_std, residual_std(config.init_std, config.layers)
    if memory.init in ("released", "ultramem"):
        return fan_in, fan_in, 1 / math.sqrt(projected_groups(memory) * _row_widths(config, memory)[0])
    return (math.sqrt(0.4) * fan_in,) * 3


# --- what it costs ----------------------------------------------------------------------------------------------------


def product_key_account(config: Model, pool: str, tables: tuple[tuple[int, int], ...]) -> Account:
    """Closed form of a whole pool: each layer's retrieval, projections and reads, and every table once.

    Args:
        tables: row keys and column keys of each table.
    """
    memory: ProductKey = config.pools[pool]
    value_dim, _ = _row_widths(config, memory)
    row, read = row_parameters(config, pool), memory.heads * memory.top_m
    pooled, projections = projected_groups(memory) * value_dim, {"none": 0, "linear": 1, "gated": 2}[memory.projection]
    layer = always_active(config.width * (projections * pooled + (memory.pre_value_dim or 0)))
    layer += Account(
        0, 0, 2 * read * row, read * row * BYTES_PER_PARAMETER
    )  # each value read is multiplied and added once
    together, account = layers_per_table(config, pool), Account()
    for keys in tables:
        rows = math.prod(keys)  # of a table that several layers read, a token cannot touch more than all
        account += (layer + retrieval_account(config, memory, keys)) * together + Account(
            rows * row, min(together * read, rows) * row
        )
    return account


def row_parameters(config: Model, pool: str) -> int:
    """Parameters of one row: its value and its pre-value."""
    return sum(_row_widths(config, config.pools[pool]))


def projected_groups(memory: ProductKey) -> int:
    """Virtual tables that are pooled and projected apart; otherwise one."""
    return memory.virtual_tables if memory.projection_per_table else 1


def _row_widths(config: Model, memory: ProductKey) -> tuple[int, int]:
    """Of a value and of a pre-value, zero without."""
    return memory.value_dim or config.width, 0 if memory.pre_values == "none" else memory.pre_value_dim or config.width
