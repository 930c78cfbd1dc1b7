"""Linear centred kernel alignment (CKA) of the layers of two models.

With K = X X' and L = Y Y' of the features of n tokens, CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)). `biased` takes
HSIC as Kornblith et al. 2019 (arXiv 1905.00414) do: independent features then have a CKA above 0 that falls with n.
`unbiased` takes HSIC_1 (Song et al. 2012, eq. 5), of all tokens together. `minibatch` sums HSIC_1 over batches in the
numerator and in each normaliser before it divides (Nguyen et al. 2021, arXiv 2010.15327).

All of them need sums in feature space alone, added up batch by batch in float64, and no n x n matrix. Unbiased values
may lie below 0 or above 1 and are not clipped; they are not a number where a layer's own HSIC is not positive.

Shape letters: N tokens, D and E features, P and Q layers of the first and the second model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

KINDS = ("unbiased", "minibatch", "biased")
LEAST_TOKENS = 4  # of which HSIC_1 is defined


@dataclass(frozen=True)
class Sums:
    """What HSIC depends on, summed over tokens, for features x of one layer and y of another; any constant may have
    been subtracted from either before.
    """

    tokens: int
    xy_DE: Tensor
    x_D: Tensor
    y_E: Tensor
    xyy_D: Tensor
    """Sum of x |y|^2."""
    xxy_E: Tensor
    """Sum of |x|^2 y."""
    xx: Tensor
    yy: Tensor
    xxyy: Tensor
    """Sum of |x|^2 |y|^2."""

    @classmethod
    def of(cls, x_ND: Tensor, y_NE: Tensor) -> Sums:
        xx_N, yy_N = x_ND.square().sum(1), y_NE.square().sum(1)
        return cls(
            len(x_ND),
            x_ND.T @ y_NE,
            x_ND.sum(0),
            y_NE.sum(0),
            yy_N @ x_ND,
            xx_N @ y_NE,
            xx_N.sum(),
            yy_N.sum(),
            xx_N @ yy_N,
        )

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def unbiased(self) -> float:
        """HSIC_1. With K~ and L~ the Gram matrices without their diagonals, it is [tr(K~ L~) + 1'K~1 1'L~1 / ((n-1)
        (n-2)) - 2/(n-2) 1'K~L~1] / (n (n-3)).
        """
        n = self.tokens
        trace = self.xy_DE.square().sum() - self.xxyy
        k, l = self.x_D @ self.x_D - self.xx, self.y_E @ self.y_E - self.yy  # noqa: E741
        kl = self.x_D @ self.xy_DE @ self.y_E - self.x_D @ self.xyy_D - self.xxy_E @ self.y_E + self.xxyy
        return float((trace + k * l / ((n - 1) * (n - 2)) - 2 * kl / (n - 2)) / (n * (n - 3)))

    def biased(self) -> float:
        """|X'Y|^2 / (n-1)^2 of centred features."""
        centred_DE = self.xy_DE - torch.outer(self.x_D, self.y_E) / self.tokens
        return float(centred_DE.square().sum() / (self.tokens - 1) ** 2)


class _Pair:
    """HSIC of two layers in each kind, batch by batch."""

    def __init__(self) -> None:
        self.whole: Sums | None = None
        self.batches = 0.0

    def add(self, x_ND: Tensor, y_NE: Tensor) -> None:
        sums = Sums.of(x_ND, y_NE)
        self.whole = sums if self.whole is None else self.whole + sums
        self.batches += sums.unbiased()

    def hsic(self, kind: str) -> float:
        assert self.whole is not None
        return self.batches if kind == "minibatch" else getattr(self.whole, kind)()


class CKA:
    """CKA of every layer of one model with every layer of another, over the same tokens.

    >>> x, found = torch.randn(50, 3), CKA()
    >>> found.add([x], [2 * x, -x])
    >>> found.matrix("unbiased").round(decimals=6)
    tensor([[1., 1.]], dtype=torch.float64)
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._shifts: tuple[list[Tensor], list[Tensor]] | None = None
        self._pairs: dict[tuple[int, int], _Pair] = {}
        self._own: tuple[list[_Pair], list[_Pair]] = ([], [])

    def add(self, x_PND: Sequence[Tensor], y_QNE: Sequence[Tensor]) -> None:
        """
        Args:
            x_PND, y_QNE: (N, D) and (N, E) of each layer, row for row of the same tokens.

        Raises:
            ValueError: there are fewer than four tokens, or two layers differ in their number.
        """
        counts = {len(each) for each in (*x_PND, *y_QNE)}
        if len(counts) != 1 or min(counts) < LEAST_TOKENS:
            raise ValueError(f"CKA needs {LEAST_TOKENS} tokens or more, as many of each layer; these have {counts}")
        if self._shifts is None:  # CKA does not depend on it, rounding does
            self._shifts = ([each.double().mean(0) for each in x_PND], [each.double().mean(0) for each in y_QNE])
            self._pairs = {(p, q): _Pair() for p in range(len(x_PND)) for q in range(len(y_QNE))}
            self._own = ([_Pair() for _ in x_PND], [_Pair() for _ in y_QNE])
        near_x, near_y = (
            [each.double() - shift for each, shift in zip(layers, shifts, strict=True)]
            for layers, shifts in zip((x_PND, y_QNE), self._shifts, strict=True)
        )
        for own, layers in zip(self._own, (near_x, near_y), strict=True):
            for pair, layer in zip(own, layers, strict=True):
                pair.add(layer, layer)
        for (p, q), pair in self._pairs.items():
            pair.add(near_x[p], near_y[q])
        self.tokens += counts.pop()

    def matrix(self, kind: str) -> Tensor:
        """(P, Q) float64.

        Args:
            kind: one of `KINDS`.
        """
        x_P, y_Q = (torch.tensor([pair.hsic(kind) for pair in own], dtype=torch.float64) for own in self._own)
        cross = torch.tensor([pair.hsic(kind) for pair in self._pairs.values()], dtype=torch.float64)
        return cross.view(len(x_P), len(y_Q)) / (x_P[:, None].sqrt() * y_Q.sqrt())
