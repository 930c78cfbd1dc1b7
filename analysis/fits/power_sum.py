"""Loss as a sum of power laws and a floor, `L = E + sum_t A_t x_t^-alpha_t`, with the derivatives that a fit in logs
needs.

The objective is `sum_i w_i Huber(log L^_i - log L_i)` with delta 1e-3: for nearly all runs the absolute residual, so
that a few odd ones move nothing. It is a sum, not a mean: dividing by the runs makes optimisers stop early, the traced
cause of the error in the first published Chinchilla fit (arXiv 2404.10102).

A descent sees a term as `s eta u^(-1/eta)`, where u is x over its geometric mean: s is the slope there, eta = 1/alpha.
In these the valley along which E, A and alpha trade off, the reason why such fits are slow and stop early, is straight:
E + s eta stays, s stays. Starts come from variable projection: on a grid over the exponents the coefficients follow
from linear least squares, so no grid over A and E is needed.

Letters: R rows of parameters, G starts, N runs, T terms, S terms with the floor, K parameters (s of the terms, E, eta
of the terms), X points to predict.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray
DELTA = 1e-3
ALPHA = (1e-3, 4.0)
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
        """Ends of the admissible range of each parameter -> [K], [K]. Slopes and floor are not negative."""
        most, t = np.exp(self.log_y_N.max()), self.terms
        low = np.r_[np.zeros(self.size - t), np.full(t, 1 / ALPHA[1])]
        return low, np.r_[
            np.full(t, 10 * ALPHA[1] * most), np.full(int(self.floor), 2 * most), np.full(t, 1 / ALPHA[0])
        ]

    def log_value(self, theta_RK: Array, log_x_TX: Array) -> Array:
        """log L^ -> [R, X]."""
        t = self.terms
        value_RX = (
            theta_RK[:, [t]] + np.zeros(log_x_TX.shape[1])
            if self.floor
            else np.zeros((len(theta_RK), log_x_TX.shape[1]))
        )
        for i in range(t):
            s_R1, eta_R1 = theta_RK[:, [i]], theta_RK[:, [i - t]]
            value_RX += s_R1 * eta_R1 * np.exp(-log_x_TX[i] / eta_R1)
        return np.log(value_RX)

    def losses(self, theta_RK: Array) -> Array:
        """Huber's loss of every run -> [R, N]."""
        with np.errstate(divide="ignore"):
            return np.minimum(huber(self.log_value(theta_RK, self.log_x_TN) - self.log_y_N), 1e9)

    def derivatives(self, theta_RK: Array, w_RN: Array) -> tuple[Array, Array, Array]:
        """Objective, gradient and Hessian -> [R], [R, K], [R, K, K]."""
        rows = max(1, BLOCK // len(self.log_y_N))
        with np.errstate(
            over="ignore", invalid="ignore", divide="ignore"
        ):  # a step too far is not lower, and so not taken
            parts = [
                self._derivatives(theta_RK[i : i + rows], w_RN[i : i + rows]) for i in range(0, len(theta_RK), rows)
            ]
        f, g, h = zip(*parts, strict=True)
        return np.concatenate(f), np.concatenate(g), np.concatenate(h)

    def starts(self) -> Array:
        """Grid over the exponents with coefficients from linear least squares of L^ / L on 1 -> [G, K]."""
        t = self.terms
        axis = np.geomspace(0.03, 2.5, {1: 64, 2: 16, 3: 8}[t])
        if not self.floor:
            axis = np.r_[ALPHA[0], axis]  # the nearest to a loss that does not fall
        alpha_GT = np.stack(np.meshgrid(*[axis] * t, indexing="ij"), axis=-1).reshape(-1, t)
        powers = [np.exp(-alpha_GT[:, [i]] * self.log_x_TN[i]) for i in range(t)]
        powers += [np.ones_like(powers[0])] * self.floor
        basis_GNS = np.stack(powers, axis=2) * np.exp(-self.log_y_N)[:, None]
        ridge = 1e-10 * np.exp(-2 * self.log_y_N).sum() * np.eye(t + self.floor)
        normal_GSS = basis_GNS.swapaxes(1, 2) @ basis_GNS + ridge
        linear_GS = np.linalg.solve(normal_GSS, basis_GNS.sum(1)[:, :, None])[:, :, 0]
        linear_GS = np.maximum(linear_GS, 1e-2 * np.exp(self.log_y_N.min()))
        return np.hstack([linear_GS[:, :t] * alpha_GT, linear_GS[:, t:], 1 / alpha_GT])

    def _derivatives(self, theta_RK: Array, w_RN: Array) -> tuple[Array, Array, Array]:
        """With q_t = u_t^(-1/eta_t) / L^, the derivatives of log L^ by s_t and eta_t are a 2 x 2 matrix times q_t (1,
        log u_t). So moments of q over the runs are taken first, as matrix products, and turned by those matrices
        afterwards.
        """
        t, k, n = self.terms, self.size, len(self.log_y_N)
        s_RT, eta_RT = theta_RK[:, :t], theta_RK[:, -t:]
        q_SRN = [np.exp(-self.log_x_TN[i] / eta_RT[:, [i]] - self.log_y_N) for i in range(t)]
        ratio_RN = sum(s_RT[:, [i]] * eta_RT[:, [i]] * q_SRN[i] for i in range(t))
        if self.floor:
            q_SRN.append(np.broadcast_to(np.exp(-self.log_y_N), ratio_RN.shape))
            ratio_RN = ratio_RN + theta_RK[:, [t]] * q_SRN[t]
        q_SRN = [q_RN / ratio_RN for q_RN in q_SRN]
        r_RN = np.log(ratio_RN)
        f_R = (w_RN * huber(r_RN)).sum(1)
        pull_RN = w_RN * np.clip(r_RN, -DELTA, DELTA)
        bend_RN = w_RN * (np.abs(r_RN) < DELTA) - pull_RN
        z = [np.stack([np.ones(n), x_N, x_N**2], axis=1) for x_N in self.log_x_TN] + [np.ones((n, 1))]
        turn = [np.zeros((len(theta_RK), 2, 2)) for _ in range(t)] + [np.ones((len(theta_RK), 1, 1))]
        for i in range(t):  # rows: by s, by eta; columns: 1, log u
            turn[i][:, 0, 0], turn[i][:, 1, 0], turn[i][:, 1, 1] = eta_RT[:, i], s_RT[:, i], s_RT[:, i] / eta_RT[:, i]
        place = [[i, k - t + i] for i in range(t)] + [[t]]
        g_RK, h_RKK = np.empty((len(theta_RK), k)), np.empty((len(theta_RK), k, k))
        for i, q_RN in enumerate(q_SRN):
            own_RZ = (pull_RN * q_RN) @ z[i]
            size = len(place[i])
            g_RK[:, place[i]] = (turn[i] @ own_RZ[:, :size, None])[:, :, 0]
            bent_RN = bend_RN * q_RN
            for j in range(i, len(q_SRN)):
                cross_NZ = (z[i][:, :size, None] * z[j][:, None, : len(place[j])]).reshape(n, -1)
                moments_R = ((bent_RN * q_SRN[j]) @ cross_NZ).reshape(-1, size, len(place[j]))
                block = turn[i] @ moments_R @ turn[j].swapaxes(1, 2)
                if i == j and i < t:
                    block[:, [0, 1], [1, 0]] += (own_RZ[:, 0] + own_RZ[:, 1] / eta_RT[:, i])[:, None]
                    block[:, 1, 1] += own_RZ[:, 2] * s_RT[:, i] / eta_RT[:, i] ** 3
                h_RKK[:, np.array(place[i])[:, None], place[j]] = block
                h_RKK[:, np.array(place[j])[:, None], place[i]] = block.swapaxes(1, 2)
        return np.where(np.isfinite(f_R), f_R, np.inf), g_RK, h_RKK


def huber(r: Array) -> Array:
    """Half the square of r up to DELTA, linear beyond."""
    size = np.abs(r)
    near = np.minimum(size, DELTA)
    return near * (size - near / 2)
