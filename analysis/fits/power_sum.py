"""Loss as a sum of power laws and a floor, `L = E + sum_t A_t x_t^-alpha_t`, fitted in logs to the runs and to their resamples at once.

The objective is `sum_i w_i Huber(log L^_i - log L_i)` with delta 1e-3: for nearly all runs the absolute residual, so that a few odd ones
move nothing. It is a sum, not a mean: dividing by the runs makes optimisers stop early, the traced cause of the error in the first
published Chinchilla fit (arXiv 2404.10102). Powers are taken about the geometric mean of each x, which separates A from alpha.

Starts come from variable projection: on a grid over the exponents the coefficients follow from linear least squares, so that no grid over
A and E is needed.

Letters: B resamples, R those still moving, G starts, N runs, T terms, S terms with the floor, K parameters (log coefficients of the terms,
log E, exponents of the terms), X points to predict.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray
DELTA = 1e-3
ALPHA = (0.0, 4.0)
NOTHING = 16.0  # log of how far below the least loss a coefficient, at the mean x, or the floor may fall
BLOCK = 1 << 16  # elements worked on together, so that they stay in the processor's cache


@dataclass(frozen=True)
class PowerSum:
    """The law at given runs."""

    log_x_TN: Array
    """Less their mean."""
    log_y_N: Array
    floor: bool = True

    @property
    def terms(self) -> int:
        return len(self.log_x_TN)

    @property
    def size(self) -> int:
        """Parameters."""
        return 2 * self.terms + self.floor

    def bounds(self) -> tuple[Array, Array]:
        """Ends of the admissible range of each parameter -> [K], [K]."""
        least, most, t = self.log_y_N.min(), self.log_y_N.max(), self.size - self.terms
        low = np.r_[np.full(t, least - NOTHING), np.full(self.terms, ALPHA[0])]
        return low, np.r_[np.full(t, most + 1), np.full(self.terms, ALPHA[1])]

    def log_value(self, theta_BK: Array, log_x_TX: Array) -> Array:
        """log L^ -> [B, X]."""
        return np.log(np.exp(self._exponents(theta_BK, log_x_TX)).sum(0))

    def losses(self, theta_BK: Array) -> Array:
        """Huber's loss of every run -> [B, N]."""
        return huber(self.log_value(theta_BK, self.log_x_TN) - self.log_y_N)

    def derivatives(self, theta_RK: Array, w_RN: Array) -> tuple[Array, Array, Array]:
        """Objective, gradient and Hessian -> [R], [R, K], [R, K, K].

        With the shares p_s of the terms in L^ and z_s the derivative of a term's logarithm (1 for its coefficient, -log x for its
        exponent): grad r = sum_s p_s z_s and Hess r = sum_s p_s z_s z_s' - grad r grad r'.
        """
        rows = max(1, BLOCK // len(self.log_y_N))
        parts = [self._derivatives(theta_RK[i : i + rows], w_RN[i : i + rows]) for i in range(0, len(theta_RK), rows)]
        f, g, h = zip(*parts, strict=True)
        return np.concatenate(f), np.concatenate(g), np.concatenate(h)

    def starts(self) -> Array:
        """Grid over the exponents with coefficients from linear least squares of L^ / L on 1 -> [G, K]."""
        steps = {1: 64, 2: 16, 3: 8}[self.terms]
        axis = np.geomspace(0.03, 2.5, steps)
        alpha_GT = np.stack(np.meshgrid(*[axis] * self.terms, indexing="ij"), axis=-1).reshape(-1, self.terms)
        free_GK = np.hstack([np.zeros((len(alpha_GT), self.size - self.terms)), alpha_GT])
        basis_GNS = np.moveaxis(np.exp(self._exponents(free_GK, self.log_x_TN) - self.log_y_N), 0, 2)
        norm_G1S = np.linalg.norm(basis_GNS, axis=1, keepdims=True)
        basis_GNS /= norm_G1S
        s = basis_GNS.shape[2]
        normal_GSS = basis_GNS.swapaxes(1, 2) @ basis_GNS + 1e-10 * np.eye(s)
        linear_GS = np.linalg.solve(normal_GSS, basis_GNS.sum(1)[:, :, None])[:, :, 0] / norm_G1S[:, 0]
        free_GK[:, :s] = np.log(np.maximum(linear_GS, 1e-2 * np.exp(self.log_y_N.min())))
        return free_GK

    def _exponents(self, theta_BK: Array, log_x_TX: Array) -> Array:
        """Logarithm of every term -> [S, B, X]."""
        t = self.terms
        exponents = theta_BK.T[: self.size - t, :, None] + np.zeros(log_x_TX.shape[1])
        exponents[:t] -= theta_BK.T[-t:, :, None] * log_x_TX[:, None]
        return exponents

    def _derivatives(self, theta_RK: Array, w_RN: Array) -> tuple[Array, Array, Array]:
        t, k = self.terms, self.size
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            share_SRN = np.exp(self._exponents(theta_RK, self.log_x_TN) - self.log_y_N)
            ratio_RN = share_SRN.sum(0)
            share_SRN /= ratio_RN
            r_RN = np.log(ratio_RN)
            size_RN = np.abs(r_RN)
            f_R = (w_RN * huber(r_RN)).sum(1)
            pull_RN = w_RN * np.clip(r_RN, -DELTA, DELTA)
            bend_RN = w_RN * (size_RN < DELTA) - pull_RN
        z = [np.stack([np.ones_like(x_N), -x_N], axis=1) for x_N in self.log_x_TN] + [np.ones((len(self.log_y_N), 1))]
        place = [[i, k - t + i] for i in range(t)] + [[t]]
        g_RK, h_RKK = np.empty((len(theta_RK), k)), np.empty((len(theta_RK), k, k))
        for i in range(len(share_SRN)):
            own_RN = pull_RN * share_SRN[i]
            g_RK[:, place[i]] = own_RN @ z[i]
            bent_RN = bend_RN * share_SRN[i]
            for j in range(i, len(share_SRN)):
                both_RN = bent_RN * share_SRN[j] + (own_RN if i == j else 0)
                cross_NZ = (z[i][:, :, None] * z[j][:, None]).reshape(len(self.log_y_N), -1)
                block = (both_RN @ cross_NZ).reshape(-1, z[i].shape[1], z[j].shape[1])
                h_RKK[:, np.array(place[i])[:, None], place[j]] = block
                h_RKK[:, np.array(place[j])[:, None], place[i]] = block.swapaxes(1, 2)
        return np.where(np.isfinite(f_R), f_R, np.inf), g_RK, h_RKK


def huber(r: Array) -> Array:
    """Half the square of r up to DELTA, linear beyond."""
    size = np.abs(r)
    near = np.minimum(size, DELTA)
    return near * (size - near / 2)
