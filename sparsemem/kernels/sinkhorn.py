"""The doubly stochastic matrix that Sinkhorn's iteration makes of a positive one (mHC, arXiv 2512.24880, eq. 9).

The paper stops after 20 rounds of dividing columns and rows by their sums. Near the identity, where training begins,
that leaves columns whose sums are off by 0.5%. A few rounds and then Newton's steps come to the limit itself; its
gradient is that of the limit, by one linear system in place of the rounds. Columns come first, and by a softmax: no
logits make one vanish.

Shape letters: I rows (what is written), J columns (what is read), A matrices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsemem.kernels import REFERENCE

ROUNDS, NEWTON_STEPS = 6, 5
REFERENCE_ROUNDS = 300


def sinkhorn(logits_AIJ: Tensor) -> Tensor:
    """Scale rows and columns of exp(logits) until all sums are 1: (A, I, J), I = J. Row sums are exact to rounding,
    column sums unless the logits of a matrix differ by so much that its limit is not reached.
    """
    return sinkhorn_reference(logits_AIJ) if REFERENCE else _Sinkhorn.apply(logits_AIJ)


def sinkhorn_reference(logits_AIJ: Tensor) -> Tensor:
    for _ in range(REFERENCE_ROUNDS):
        logits_AIJ = logits_AIJ.log_softmax(1).log_softmax(2)
    return logits_AIJ.exp()


class _Sinkhorn(torch.autograd.Function):
    """P = exp(x - u_i - v_j) with all sums 1 has dx = P (dP - a_i - b_j), whose sums are 0: a = p - P b and
    (1 - P'P) b = q - P'p, with p and q the sums of P dP over rows and columns.
    """

    @staticmethod
    def forward(ctx: Any, logits_AIJ: Tensor) -> Tensor:
        matrix_AIJ = _divided(logits_AIJ.softmax(1), 2)
        for _ in range(ROUNDS - 1):
            matrix_AIJ = _round(matrix_AIJ)
        for _ in range(NEWTON_STEPS):
            missing_AJ = 1 - matrix_AIJ.sum(1)
            tried_AIJ = _divided(matrix_AIJ * _solve(matrix_AIJ, missing_AJ).exp().unsqueeze(1), 2)
            is_better_A = (1 - tried_AIJ.sum(1)).abs().amax(1) < missing_AJ.abs().amax(1)
            matrix_AIJ = _round(torch.where(is_better_A.view(-1, 1, 1), tried_AIJ, matrix_AIJ))
        ctx.save_for_backward(matrix_AIJ)
        return matrix_AIJ

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (matrix_AIJ,) = ctx.saved_tensors
        weighted_AIJ = matrix_AIJ * gradient
        rows_AI1 = weighted_AIJ.sum(2, keepdim=True)
        columns_AJ = weighted_AIJ.sum(1) - (matrix_AIJ.mT @ rows_AI1).squeeze(2)
        b_AJ = _solve(matrix_AIJ, columns_AJ)
        a_AI1 = rows_AI1 - matrix_AIJ @ b_AJ.unsqueeze(2)
        return weighted_AIJ - matrix_AIJ * (a_AI1 + b_AJ.unsqueeze(1))


def _round(matrix_AIJ: Tensor) -> Tensor:
    return _divided(_divided(matrix_AIJ, 1), 2)


def _divided(matrix_AIJ: Tensor, dim: int) -> Tensor:
    """By its sums."""
    return matrix_AIJ / matrix_AIJ.sum(dim, keepdim=True)


def _solve(matrix_AIJ: Tensor, right_AJ: Tensor) -> Tensor:
    """(diag(column sums) - P'P) x = right; the equal part of x, to which the left is blind, is that of the right."""
    left_AJJ = torch.diag_embed(matrix_AIJ.sum(1)) - matrix_AIJ.mT @ matrix_AIJ + 1 / matrix_AIJ.shape[1]
    return torch.linalg.solve_ex(left_AJJ, right_AJ.unsqueeze(2))[0].squeeze(2)
