"""The residual in several streams: how a sublayer (attention, feed-forward) reads them and writes to them.

    x'_i = sum_j M_ij x_j + w_i F(sum_j r_j x_j),    x' = M x + w F(r x)

with a read r, a write w and a mixing matrix M for each sublayer, all numbers, and of a token where they depend on what
it holds. M_ij goes from stream j into stream i: it is not transposed.

- `hyper_connections` (arXiv 2409.19606, as mHC's eq. 3 to 5 restate it): each is a bias and 0.01 tanh of a projection
  of each stream's RMS norm; at the start it reads stream l mod N of sublayer l, writes 1 and mixes nothing.
- `manifold` (mHC, arXiv 2512.24880, eq. 7 to 9): r = sigmoid, w = 2 sigmoid, M = Sinkhorn's doubly stochastic matrix
  of a bias and 0.01 times a projection of the RMS norm of all streams together.
- `static`: the biases of `manifold` alone.
- `gated` (Gated Residual of arXiv 2608.30320, sec. 2.2, eq. 30 to 34): a gate for each number that is read, by a
  projection through D / 8, on streams that are normed each with its own gain, in place of the sublayer's norm; w =
  2 sigmoid of a projection; no M.

Projections start at zero and reads with the sum of one, so that every kind starts as pre-norm, streams being copies of
each other. It is the reads that set them apart: each sublayer leans on one. The projections are decayed, since they are
matrices; biases, scales and gains, which are not, are stored flat.

Shape letters: B sequences, T positions, N streams, D model width, R width of the gate's bottleneck, C numbers that a
connection has for a token, A matrices.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsemem.accounting import Account, always_active
from sparsemem.kernels.matmul import linear
from sparsemem.kernels.sinkhorn import sinkhorn
from sparsemem.layers.norm import norm_account
from sparsemem.parameter import parameter

if TYPE_CHECKING:
    from sparsemem.config import Model

SCALE = 0.01
"""Initial factor of what depends on the token (mHC, table 5)."""
OWN_LOGIT = 4.0
"""Of a stream into itself, over those of the others, at the start: a share of 0.95 of four. At 10 the others' gradient
vanishes.
"""
BOTTLENECK = 8
"""Width of the model over that of the gate's bottleneck."""


class Weights(NamedTuple):
    """Of one sublayer, for all tokens or each."""

    write: Tensor
    """(N, 1) or (B, T, N, 1)."""
    mix: Tensor | None
    """(N, N) or (B, T, N, N), into x from; None: each stream stays what it is."""


class Connection(nn.Module):
    """Of one sublayer. All is computed in the precision of the streams, under autocast too."""

    norms = False
    """Whether what it reads is normed."""

    @abstractmethod
    def read(self, x_BTND: Tensor) -> tuple[Tensor, Weights]:
        """What the sublayer reads, (B, T, D), and with which weights it will write."""

    def mixed(self, x_BTND: Tensor) -> Tensor:
        """What the sublayer reads, (B, T, D), in the scale of the streams."""
        return self.read(x_BTND)[0]

    def write(self, x_BTND: Tensor, y_BTD: Tensor | None, weights: Weights) -> Tensor:
        """The streams after a sublayer that gave y, if anything."""
        with torch.autocast(x_BTND.device.type, enabled=False):
            mixed_BTND = x_BTND if weights.mix is None else weights.mix @ x_BTND
            return mixed_BTND if y_BTD is None else mixed_BTND + weights.write * y_BTD.unsqueeze(-2)


class HyperConnection(Connection):
    """Hyper-connections, read l mod N first."""

    def __init__(self, config: Model, sublayer: int) -> None:
        super().__init__()
        self.streams, self.eps = config.stream_count, config.norm_eps
        N = self.streams
        # Rows: read, write, then one for each stream that is mixed into. Each meets every stream.
        self.project_CD = parameter(2 + N, config.width)
        self.scales = parameter(3, mean=SCALE)
        read_N = [float(stream == sublayer % N) for stream in range(N)]
        self.bias = parameter(2 * N + N * N, values=[*read_N, *[1.0] * N, *_identity(N)])

    def read(self, x_BTND: Tensor) -> tuple[Tensor, Weights]:
        with torch.autocast(x_BTND.device.type, enabled=False):
            N = self.streams
            each_BTNC = (linear(x_BTND, self.project_CD) * _inverse_rms(x_BTND, self.eps)).tanh()
            read_bias_N, write_bias_N, mix_bias = self.bias.split([N, N, N * N])
            read_BTN = self.scales[0] * each_BTNC[..., 0] + read_bias_N
            write_BTN = self.scales[1] * each_BTNC[..., 1] + write_bias_N
            # what stream j holds stands along its row, (from, into)
            mix_BTNN = self.scales[2] * each_BTNC[..., 2:].mT + mix_bias.view(N, N)
            return _sum(read_BTN, x_BTND), Weights(write_BTN.unsqueeze(-1), mix_BTNN)


class StaticConnection(Connection):
    """Manifold-constrained connections that are the same for all tokens."""

    def __init__(self, config: Model, sublayer: int) -> None:
        super().__init__()
        self.streams, self.eps = config.stream_count, config.norm_eps
        N = self.streams
        read_N = [math.log(share / (1 - share)) for share in _leaning(N, sublayer)]
        mix_NN = [OWN_LOGIT * each for each in _identity(N)]
        self.bias = parameter(2 * N + N * N, values=[*read_N, *[0.0] * N, *mix_NN])

    def read(self, x_BTND: Tensor) -> tuple[Tensor, Weights]:
        with torch.autocast(x_BTND.device.type, enabled=False):
            read_AN, write_AN, mix_ANN = self._constrained(self.bias.unsqueeze(0))
            return _sum(read_AN[0], x_BTND), Weights(write_AN[0].unsqueeze(-1), mix_ANN[0])

    def _constrained(self, logits_AC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reads (A, N) below 1, writes (A, N) below 2 and doubly stochastic matrices (A, N, N), into x from."""
        N = self.streams
        read_AN, write_AN, mix_AC = logits_AC.split([N, N, N * N], dim=-1)
        return read_AN.sigmoid(), 2 * write_AN.sigmoid(), sinkhorn(mix_AC.reshape(-1, N, N))


class ManifoldConnection(StaticConnection):
    """Manifold-constrained hyper-connections."""

    def __init__(self, config: Model, sublayer: int) -> None:
        super().__init__(config, sublayer)
        self.project_CD = parameter(len(self.bias), self.streams * config.width)  # D: of all streams
        self.scales = parameter(3, mean=SCALE)

    def read(self, x_BTND: Tensor) -> tuple[Tensor, Weights]:
        with torch.autocast(x_BTND.device.type, enabled=False):
            (B, T, N, _), all_BTD = x_BTND.shape, x_BTND.flatten(2)
            scales_C = self.scales.repeat_interleave(torch.tensor([N, N, N * N], device=x_BTND.device))
            logits_BTC = linear(all_BTD, self.project_CD) * _inverse_rms(all_BTD, self.eps) * scales_C + self.bias
            read_AN, write_AN, mix_ANN = self._constrained(logits_BTC.flatten(0, 1))
            weights = Weights(write_AN.view(B, T, N, 1), mix_ANN.view(B, T, N, N))
            return _sum(read_AN.view(B, T, N), x_BTND), weights


class GatedConnection(Connection):
    """Gated Residual."""

    norms = True

    def __init__(self, config: Model, sublayer: int) -> None:
        super().__init__()
        N, D, R = config.stream_count, config.width, _bottleneck(config)
        self.streams, self.eps = N, config.norm_eps
        # A gate starts at one half: the gains' mean over streams is 2. The paper's are 1, as are all here but one.
        self.gain = parameter(N * D, values=[2 * N * share for share in _leaning(N, sublayer) for _ in range(D)])
        self.down_RD = parameter(R, N * D, std=config.init_std)  # D: of all streams
        self.up_DR = parameter(N * D, R)
        self.write_ND = parameter(N, N * D)

    def read(self, x_BTND: Tensor) -> tuple[Tensor, Weights]:
        return self._read(x_BTND, _inverse_rms(x_BTND, self.eps))

    def mixed(self, x_BTND: Tensor) -> Tensor:
        """What is read, over the mean factor that norms the streams."""
        inverse_BTN1 = _inverse_rms(x_BTND, self.eps)
        return self._read(x_BTND, inverse_BTN1)[0] / inverse_BTN1.mean(-2)

    def _read(self, x_BTND: Tensor, inverse_BTN1: Tensor) -> tuple[Tensor, Weights]:
        with torch.autocast(x_BTND.device.type, enabled=False):
            N = self.streams
            normed_BTND = x_BTND * inverse_BTN1 * self.gain.view(N, -1)
            all_BTD = normed_BTND.flatten(2)
            gate_BTND = linear(F.silu(linear(all_BTD, self.down_RD) / N), self.up_DR).sigmoid().view_as(x_BTND)
            write_BTN = 2 * (linear(all_BTD, self.write_ND) / N).sigmoid()
            return (gate_BTND * normed_BTND).mean(-2), Weights(write_BTN.unsqueeze(-1), None)


KINDS: dict[str, type[Connection]] = {
    "static": StaticConnection,
    "hyper_connections": HyperConnection,
    "manifold": ManifoldConnection,
    "gated": GatedConnection,
}


def connection(config: Model, sublayer: int) -> Connection | None:
    """Of a sublayer, numbered from 0 over the model; None: there is one stream, which it reads normed and adds to."""
    return None if config.residual == "pre_norm" else KINDS[config.residual](config, sublayer)


def expanded(x_BTD: Tensor, streams: int) -> Tensor:
    """So many copies, (B, T, N, D)."""
    return x_BTD.unsqueeze(2).expand(-1, -1, streams, -1).contiguous()


def read(through: Connection | None, norm: nn.Module | None, x: Tensor) -> tuple[Tensor, Weights | None]:
    """What a sublayer is fed, (B, T, D), of one stream (B, T, D) or several (B, T, N, D), and how it will write.

    Args:
        norm: None where the connection norms.
    """
    read_BTD, weights = (x, None) if through is None else through.read(x)
    return read_BTD if norm is None else norm(read_BTD), weights


def write(through: Connection | None, x: Tensor, outputs_BTD: Sequence[Tensor], weights: Weights | None) -> Tensor:
    """The residual after a sublayer that gave these outputs, in one stream or several."""
    if through is None or weights is None:
        return sum(outputs_BTD, x)
    return through.write(x, sum(outputs_BTD[1:], outputs_BTD[0]) if outputs_BTD else None, weights)


def _leaning(streams: int, sublayer: int) -> list[float]:
    """Shares with the sum of one: half of it is the sublayer's own stream's, the rest all streams' alike."""
    return [0.5 * (stream == sublayer % streams) + 0.5 / streams for stream in range(streams)]


def _identity(size: int) -> list[float]:
    """Row by row."""
    return [float(row == column) for row in range(size) for column in range(size)]


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """(..., D) -> (..., 1)."""
    return (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def _sum(read_N: Tensor, x_BTND: Tensor) -> Tensor:
    """Weights (N) or (B, T, N) of the streams -> (B, T, D)."""
    return (read_N.unsqueeze(-2) @ x_BTND).squeeze(-2)


def _bottleneck(config: Model) -> int:
    return max(1, config.width // BOTTLENECK)


# --- what it costs ----------------------------------------------------------------------------------------------------


def connection_account(config: Model) -> Account:
    """Closed form of one sublayer's norm and connection."""
    N, D = config.stream_count, config.width
    if config.residual == "pre_norm":
        return norm_account(D)
    if config.residual == "gated":
        return norm_account(N * D) + _projections_account(config) + Account(flops=4 * N * D)
    numbers = always_active(2 * N + N * N, flops=0)
    return norm_account(D) + numbers + _projections_account(config) + Account(flops=(4 * N + 2 * N * N) * D)


def mixed_flops(config: Model) -> int:
    """Of `Connection.mixed`; 0 with one stream."""
    streams = config.stream_count
    return 0 if config.residual == "pre_norm" else _projections_account(config).flops + 2 * streams * config.width


def _projections_account(config: Model) -> Account:
    """Of what depends on the token."""
    N, D = config.stream_count, config.width
    if config.residual == "gated":
        return always_active(N * D * (2 * _bottleneck(config) + N))
    if config.residual == "static":
        return Account()
    scales = always_active(3, flops=0)
    if config.residual == "manifold":
        return scales + always_active((2 * N + N * N) * N * D)
    return scales + always_active((2 + N) * D, flops=2 * (2 + N) * D * N)  # it meets every stream
