"""Product-key retrieval: which rows of a memory a token reads, and with which weights, without scoring every row.

Facts (PKM = arXiv 1907.05242, PEER = 2407.04153, UltraMem = 2411.12364, UltraMemV2 = 2508.18756):

- A row is a pair of a row key and a column key: n_row + n_column keys address n_row x n_column rows.
- PKM, PEER: a row's score is the sum of its two key scores. The best m sums lie among the best m row keys and the best
  m column keys, so the top-m is exact. Of those pairs, that of the i-th row key and the j-th column key has i j - 1
  others at least as good: only i j <= m are summed.
- UltraMem: a row's score is `row^T C column` with r scores a key and a learned r x r Tucker core C for each head.
  Candidates come from a filter of rank one: the best m of `u . row` and of `t . column`, u and t being C's leading
  singular vectors. Candidates are then scored exactly. The filter is an approximation: it does not see pairs of two
  negative filter scores, though their product is positive. At the start those are half of the best m; of the others the
  filter finds 99.9% at rank two, all at rank one.
- Multi-core scoring: rows are chosen by the sum of the cores, C = sum of C_g; slice g of what is read is weighted by
  the score of C_g.
- Implicit value expansion: with E virtual tables a side holds sqrt(E) times the keys of the table, and addresses run to
  E x rows.

Rows are chosen without a gradient, and only the chosen ones are scored with one: the gradient is the same, and no graph
of candidates is kept.

Shape letters: B sequences, T positions, S = B x T tokens, D model width, H heads, Q distinct queries, F features of all
queries, K width of a key, R Tucker ranks (one without Tucker), N keys of a side, P candidates of a side, M rows that a
head reads, G cores, J taps of the convolution; X and Y: several of them flattened.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsemem import parallel
from sparsemem.kernels.matmul import linear, linears
from sparsemem.kernels.topk import topk
from sparsemem.layers.documents import earlier
from sparsemem.mechanisms.product_key.cost import candidates_of, logical_keys, queries_of, query_features, undominated
from sparsemem.mechanisms.product_key.fields import ProductKey
from sparsemem.parameter import parameter

if TYPE_CHECKING:
    from sparsemem.config import Model

LARGEST_SIMULATION = 2**28  # numbers drawn or scored at once, 1 GiB

TOKENS = 512
"""Tokens whose rows are chosen together on a CPU: their candidates stay in its cache."""


class ProductKeyRetrieval(nn.Module):
    """Hidden states to addresses and weights.

    Buffers:
        filters_2HR: u and t of each head, refreshed by every training forward; evaluation uses them as they are.
    """

    filters_2HR: Tensor

    def __init__(self, config: Model, memory: ProductKey, keys: tuple[int, int]) -> None:
        """`keys`: row keys and column keys of the table, before its virtual expansion."""
        super().__init__()
        self.memory, self.eps = memory, config.norm_eps
        sets, ranks, width = 1 if memory.shared_keys else memory.heads, max(memory.tucker_rank, 1), memory.key_dim
        row_keys, self.column_keys = logical_keys(memory, keys)
        features = query_features(memory)
        self.taps_JD = (
            parameter(memory.query_conv, config.width) if memory.query_conv else None
        )  # beyond the identity, hence zero
        self.query_FD = parameter(features, config.width, std=config.width**-0.5)
        self.row_keys_HRNK = parameter(sets, ranks, row_keys, width, std=width**-0.5)
        self.column_keys_HRNK = parameter(sets, ranks, self.column_keys, width, std=width**-0.5)
        if memory.norm == "batch":
            self.query_norm = BatchNorm(features)
        elif memory.norm == "layer":
            gain = initial_gain(memory, keys)
            self.query_gain_K = parameter(width, mean=gain)
            self.key_gain_K = parameter(width, mean=gain)
        if memory.tucker_rank:
            self.cores_GHRR = parameter(memory.cores, memory.heads, ranks, ranks, uniform=(0.0, 1.0))
            start_2HR = torch.zeros(2, memory.heads, ranks)  # no t yet
            start_2HR[0].fill_(1.0)  # from all ones, the nearer u is the one of positive sum
            self.register_buffer("filters_2HR", start_2HR)

    def forward(self, x_BTD: Tensor, documents_BT: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """What each token reads, best row first. Given documents, the query's convolution stays in its own where that
        is configured.

        Returns:
            addresses (S, H, M), int64: row key x column keys + column key, below E x rows;
            weights (S, H, M, G), one for each core, in the precision of the keys;
            the weighted penalty on the cores' singular values, a scalar, or None without one.
        """
        memory, cores_GHRR = self.memory, self.cores_GHRR if self.memory.tucker_rank else None
        query_SF = self._query(x_BTD, documents_BT if memory.conv_reset_at_document_end else None).to(
            self.row_keys_HRNK.dtype
        )
        with torch.autocast(x_BTD.device.type, enabled=False):  # in bf16 near-equal scores would tie
            row_HRSN, column_HRSN = self._key_scores(query_SF)
            if cores_GHRR is not None and (self.training or not self.filters_2HR[1].any()):
                self.refresh_filter()
            filters_2HR = None if cores_GHRR is None else self.filters_2HR
            rows_HSM, columns_HSM = choose_pairs(row_HRSN, column_HRSN, cores_GHRR, filters_2HR, memory.top_m)
            scores_SHMG = score_pairs(_take(row_HRSN, rows_HSM), _take(column_HRSN, columns_HSM), cores_GHRR)
            weights_SHMG = scores_SHMG.softmax(2) if memory.softmax else scores_SHMG
            return (rows_HSM * self.column_keys + columns_HSM).transpose(0, 1), weights_SHMG, self._penalty()

    def _query(self, x_BTD: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        """Convolve, project and flatten: (B, T, D) -> (S, F)."""
        if self.taps_JD is not None:
            T, taps_JD = x_BTD.shape[1], self.taps_JD.to(x_BTD.dtype)
            mixed_BTD = x_BTD + x_BTD * taps_JD[0]
            for back in range(1, min(T, len(taps_JD))):
                mixed_BTD = mixed_BTD + earlier(x_BTD, back, documents_BT) * taps_JD[back]
            x_BTD = mixed_BTD
        return linear(x_BTD.flatten(0, 1), self.query_FD)

    def _key_scores(self, query_SF: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of all row keys and of all column keys, (H, R, S, N) each."""
        memory = self.memory
        heads, queries, width = memory.heads, queries_of(memory), (memory.key_dim,)
        if memory.norm == "batch":
            query_SF = self.query_norm(query_SF)
        query_SQ2RK = query_SF.view(len(query_SF), queries, 2, -1, memory.key_dim)
        sides: list[Tensor] = [self.row_keys_HRNK, self.column_keys_HRNK]
        if memory.norm == "layer":
            query_SQ2RK = F.layer_norm(query_SQ2RK, width, self.query_gain_K, eps=self.eps)
            sides = [F.layer_norm(keys_HRNK, width, self.key_gain_K, eps=self.eps) for keys_HRNK in sides]
        query_2HRSK = (
            query_SQ2RK.permute(2, 1, 3, 0, 4)
            .repeat_interleave(heads // queries, 1)
            .expand(-1, -1, sides[0].shape[1], -1, -1)
        )
        row_XSN, column_XSN = (
            linears(query_HRSK.flatten(0, 1), keys_HRNK.expand(heads, -1, -1, -1).flatten(0, 1))
            for query_HRSK, keys_HRNK in zip(query_2HRSK, sides, strict=True)
        )
        return row_XSN.unflatten(0, (heads, -1)), column_XSN.unflatten(0, (heads, -1))

    @torch.no_grad()
    def refresh_filter(self) -> None:
        """Leading singular vectors of each head's summed core, of the two signs the one nearer to what was there
        (released code).
        """
        new_2HR = _leading_vectors(self.cores_GHRR)
        same_H, other_H = ((self.filters_2HR - sign * new_2HR).abs().sum((0, 2)) for sign in (1, -1))
        self.filters_2HR.copy_(torch.where(same_H <= other_H, 1.0, -1.0).unsqueeze(-1) * new_2HR)

    def _penalty(self) -> Tensor | None:
        """tucker_penalty / (r - 1) x the sum over i >= 2 of max(0, lambda_i - tau)^2, mean over heads (UltraMem)."""
        memory = self.memory
        if memory.tucker_rank < 2 or not memory.tucker_penalty:
            return None
        above_HR = (torch.linalg.svdvals(self.cores_GHRR.sum(0))[:, 1:] - memory.tucker_threshold).relu()
        return memory.tucker_penalty * above_HR.square().mean()

    @torch.no_grad()
    def singular_values(self) -> list[float]:
        """Of the summed core, largest first, mean over heads; empty without Tucker."""
        return torch.linalg.svdvals(self.cores_GHRR.sum(0)).mean(0).tolist() if self.memory.tucker_rank else []


class BatchNorm(nn.Module):
    """Each feature to zero mean and unit variance over the tokens, then gain and bias; evaluation uses the running
    statistics.

    That of torch, with parameters that know how they start.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.gain = parameter(features, mean=1.0)
        self.bias = parameter(features)
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x_SF: Tensor) -> Tensor:
        """(S, F) -> (S, F); training needs at least two tokens."""
        if parallel.is_sharded():
            return self._over_all_parts(x_SF)
        return F.batch_norm(
            x_SF, self.running_mean, self.running_var, self.gain, self.bias, self.training, momentum=0.1, eps=1e-5
        )

    def _over_all_parts(self, x_SF: Tensor) -> Tensor:
        """In training on a batch that ranks have divided: the statistics are those of the whole."""
        count = parallel.all_reduce(x_SF.new_tensor(len(x_SF)))
        mean_F = parallel.all_reduce(x_SF.sum(0)) / count
        var_F = parallel.all_reduce((x_SF - mean_F).square().sum(0)) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean_F, 0.1)
            self.running_var.lerp_(var_F * count / (count - 1), 0.1)
        return (x_SF - mean_F) * (var_F + 1e-5).rsqrt() * self.gain + self.bias


# --- choosing and scoring ---------------------------------------------------------------------------------------------


@torch.no_grad()
def choose_pairs(
    row_HRSN: Tensor, column_HRSN: Tensor, cores_GHRR: Tensor | None, filters_2HR: Tensor | None, top_m: int
) -> tuple[Tensor, Tensor]:
    """Row keys and column keys of the best pairs, (H, S, M) each, best first.

    Args:
        row_HRSN, column_HRSN: key scores of the two sides; their N may differ.
        cores_GHRR: Tucker cores; None: the score of a pair is the sum of its key scores, R being one.
        filters_2HR: u and t of the summed core; None without cores.
        top_m: at most the number of pairs.
    """
    tokens = TOKENS if row_HRSN.device.type == "cpu" else row_HRSN.shape[2]
    parts = zip(row_HRSN.split(tokens, 2), column_HRSN.split(tokens, 2), strict=True)
    if cores_GHRR is None or filters_2HR is None:
        chosen = [_choose_sums(row_HRYN.squeeze(1), column_HRYN.squeeze(1), top_m) for row_HRYN, column_HRYN in parts]
    else:
        core_HRR = cores_GHRR.sum(0)
        chosen = [
            _choose_products(row_HRYN, column_HRYN, core_HRR, filters_2HR, top_m) for row_HRYN, column_HRYN in parts
        ]
    rows, columns = zip(*chosen, strict=True)
    return torch.cat(rows, 1), torch.cat(columns, 1)


def _choose_products(
    row_HRSN: Tensor, column_HRSN: Tensor, core_HRR: Tensor, filters_2HR: Tensor, top_m: int
) -> tuple[Tensor, Tensor]:
    rows_HSP, columns_HSP = (
        topk((filter_HR.unsqueeze(1) @ side_HRSN.flatten(2)).view_as(side_HRSN[:, 0]), top_m)[1]
        for filter_HR, side_HRSN in zip(filters_2HR, (row_HRSN, column_HRSN), strict=True)
    )
    candidates_HRSP = _take(row_HRSN, rows_HSP)
    left_HRSP = (core_HRR.mT @ candidates_HRSP.flatten(2)).view_as(candidates_HRSP)
    scores_HSPP = left_HRSP.permute(0, 2, 3, 1) @ _take(column_HRSN, columns_HSP).transpose(1, 2)
    best_HSM, columns = topk(scores_HSPP.flatten(-2), top_m)[1], columns_HSP.shape[-1]
    return rows_HSP.gather(-1, best_HSM // columns), columns_HSP.gather(-1, best_HSM % columns)


def _choose_sums(row_HSN: Tensor, column_HSN: Tensor, top_m: int) -> tuple[Tensor, Tensor]:
    (row_HSP, rows_HSP), (column_HSP, columns_HSP) = topk(row_HSN, top_m), topk(column_HSN, top_m)
    pairs = undominated(row_HSP.shape[-1], column_HSP.shape[-1], top_m)
    first_X, second_X = torch.tensor(pairs, device=row_HSN.device).T
    best_HSM = topk(row_HSP[..., first_X] + column_HSP[..., second_X], top_m)[1]
    return rows_HSP.gather(-1, first_X[best_HSM]), columns_HSP.gather(-1, second_X[best_HSM])


def score_pairs(row_HRSM: Tensor, column_HRSM: Tensor, cores_GHRR: Tensor | None) -> Tensor:
    """Scores of chosen pairs from the key scores of their two sides, one for each core (one in all without): (S, H, M,
    G).
    """
    if cores_GHRR is None:
        return (row_HRSM + column_HRSM).permute(2, 0, 3, 1)
    left_HXY = cores_GHRR.permute(1, 0, 3, 2).flatten(1, 2) @ row_HRSM.flatten(
        2
    )  # X: cores x ranks of a column, Y: tokens x pairs
    left_HGRSM = left_HXY.view(len(left_HXY), len(cores_GHRR), *row_HRSM.shape[1:])
    return (left_HGRSM * column_HRSM.unsqueeze(1)).sum(2).permute(2, 0, 3, 1)


def _take(scores_HRSN: Tensor, index_HSM: Tensor) -> Tensor:
    """All ranks' scores of some keys, (H, R, S, M)."""
    return scores_HRSN.gather(-1, index_HSM.unsqueeze(1).expand(-1, scores_HRSN.shape[1], -1, -1))


def _leading_vectors(cores_GHRR: Tensor) -> Tensor:
    """Left and right singular vectors of each head's summed core for the largest singular value, (2, H, R)."""
    left_HRR, _, right_HRR = torch.linalg.svd(cores_GHRR.sum(0))
    return torch.stack((left_HRR[..., 0], right_HRR[..., 0, :]))


# --- initial scale ----------------------------------------------------------------------------------------------------


def initial_gain(memory: ProductKey, keys: tuple[int, int]) -> float:
    """Of the layer norms of query and keys: the released code's (V2 and v1), or such that the mean weight is one
    (UltraMemV2).

    Raises:
        ValueError: no gain brings the mean weight to one.
    """
    if memory.init in ("flat", "released"):
        return memory.key_dim**-0.4
    if memory.init == "ultramem":
        return memory.key_dim**-0.33
    ranks, pairs = max(memory.tucker_rank, 1), math.prod(candidates_of(memory, keys))
    if (
        max(8 * ranks * sum(logical_keys(memory, keys)) * memory.key_dim, 128 * ranks * memory.cores * pairs)
        > LARGEST_SIMULATION
    ):
        raise ValueError(
            "so many keys and candidates are too many to simulate its start; hold or read fewer rows, or set `init: "
            "flat`"
        )
    mean, _ = top_score_moments(memory, keys)
    if mean <= 0:
        raise ValueError("the mean score of so many of so few rows is not positive; read fewer, or set `init: flat`")
    return mean ** (
        -1 / 4 if memory.tucker_rank else -1 / 2
    )  # a key score has both gains; Tucker multiplies two key scores


@functools.cache
@torch.no_grad()
def top_score_moments(memory: ProductKey, keys: tuple[int, int]) -> tuple[float, float]:
    """Mean, and standard deviation over the mean, of the scores that weight the values at the start, with norm gains of
    one and no softmax.

    A simulation of the forward pass: every token has its own query and cores, drawn as at the start, and one of eight
    sets of keys; without a layer norm, queries of unit variance meet the keys as drawn. The moments are over tokens,
    the top-m rows and the cores: with several cores, over each core's own score, as that is what weights its slice of
    the value. They are expectations over what may be drawn: a single layer is off by the scale of its own cores.

    Args:
        keys: row keys and column keys of the table, before its virtual expansion.

    Source: UltraMemV2's initialisation ("std of the top-k scores by simulation"; MECHANISMS 3.5).
    """
    ranks, width, sets = max(memory.tucker_rank, 1), memory.key_dim, 8
    pairs = math.prod(candidates_of(memory, keys))
    tokens = sets * max(16, min(512, 2**21 // (pairs + ranks * sum(logical_keys(memory, keys)))))
    stream = torch.Generator("cpu").manual_seed(0)
    draw = functools.partial(torch.randn, generator=stream, device="cpu", dtype=torch.float32)
    sides = []
    for count in logical_keys(memory, keys):
        query_XRSK = draw(sets, ranks if memory.query_per_rank else 1, tokens // sets, width)
        keys_XRNK = draw(sets, ranks, count, width) * width**-0.5
        if memory.norm == "layer":
            query_XRSK, keys_XRNK = F.layer_norm(query_XRSK, (width,)), F.layer_norm(keys_XRNK, (width,))
        sides.append(
            (query_XRSK @ keys_XRNK.mT).transpose(1, 2).flatten(0, 1).unsqueeze(2)
        )  # each token stands as a head of its own
    row_HRSN, column_HRSN = sides
    cores_GHRR = filters_2HR = None
    if memory.tucker_rank:
        cores_GHRR = torch.rand(memory.cores, tokens, ranks, ranks, generator=stream, device="cpu", dtype=torch.float32)
        filters_2HR = _leading_vectors(cores_GHRR)  # of either sign: key scores are as often negative
    rows_HSM, columns_HSM = choose_pairs(row_HRSN, column_HRSN, cores_GHRR, filters_2HR, memory.top_m)
    std, mean = torch.std_mean(score_pairs(_take(row_HRSN, rows_HSM), _take(column_HRSN, columns_HSM), cores_GHRR))
    return float(mean), float(std / mean)
