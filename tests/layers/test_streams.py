"""Residual streams: each kind against its formulas index by index, its start against pre-norm, and what it decays."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from sparsemem.config import Model, Train
from sparsemem.kernels.sinkhorn import sinkhorn, sinkhorn_reference
from sparsemem.layers.streams import KINDS, OWN_LOGIT, Connection, connection
from sparsemem.mechanisms import MEMORY_POOLS, POOLS
from sparsemem.model import Sizes, Transformer
from sparsemem.parameter import initialize
from sparsemem.train.optim import Optimizer

VOCABULARY, CONTEXT, N, D, EPS = 40, 12, 3, 8, 1e-6
ENGRAM = {"layers": [1, 2], "orders": [2, 3], "heads": 2, "row_dim": 4, "init_std": 0.5}
MEMORY = {"layers": [1, 2], "placement": "parallel", "top_m": 2, "key_dim": 4}
MEMORIES: dict[str, dict[str, Any]] = {
    "engram": {"engram": ENGRAM},
    "ngram_embedding": {"ngram_embedding": {"heads": 1, "row_dim": 4}},
    "ultramem": {"ultramem": {**MEMORY, "layers": [1], "skip": 1, "value_dim": 4, "init": "flat"}},
    "pkm": {"pkm": {**MEMORY, "placement": "replace", "layers": [2], "init": "flat"}},
}


def _config(residual: str = "pre_norm", **changes: Any) -> Model:
    fields: dict[str, Any] = {"layers": 2, "width": D, "heads": 2, "init_std": 0.3, "residual": residual}
    return Model.model_validate(fields | ({} if residual == "pre_norm" else {"streams": N}) | changes)


def _transformer(config: Model) -> Transformer:
    pools = {pool: POOLS[pool] for pool in config.pools if pool in MEMORY_POOLS}
    tables = {pool: each.tables(config, 2 * each.least(config)) for pool, each in pools.items()}
    canonical = torch.arange(VOCABULARY)
    return Transformer(config, Sizes(4 if config.moe else 0, 8, tables), CONTEXT, canonical, separator=3).initialize(0)


def _tokens() -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, CONTEXT), generator=torch.Generator().manual_seed(2))


def _drawn(residual: str, sublayer: int = 1, scale: float = 0.7, **changes: Any) -> Connection:
    """A connection whose parameters are all far from their start, but for a scale of 0, in float64."""
    through = connection(_config(residual, **changes), sublayer)
    assert through is not None
    initialize(through, 0)
    if scale and residual in ("static", "manifold"):
        through.get_parameter("bias").data.mul_(0.1)  # less of the identity
    stream = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in through.parameters():
            weight += scale * torch.randn(weight.shape, generator=stream)
    return through.double()


def _streams(batch: int = 2, length: int = 3, streams: int = N) -> torch.Tensor:
    return torch.randn(batch, length, streams, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


# --- each kind against its paper's formulas, number by number, in numpy -----------------------------------------------


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def _doubly_stochastic(logits: np.ndarray) -> np.ndarray:
    matrix = np.exp(logits)
    for _ in range(500):  # to its limit
        matrix = matrix / matrix.sum(0, keepdims=True)
        matrix = matrix / matrix.sum(1, keepdims=True)
    return matrix


def _formula(residual: str, w: dict[str, np.ndarray], x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of one token with streams x (N, D): what is read (D), the writes (N) and the matrix (N, N), into i from j."""
    if residual == "gated":
        gain = w["gain"].reshape(N, D)
        normed = np.stack([x[i] / math.sqrt((x[i] ** 2).mean() + EPS) * gain[i] for i in range(N)])
        hidden = w["down_RD"] @ normed.reshape(-1) / N
        gate = _sigmoid(w["up_DR"] @ (hidden * _sigmoid(hidden))).reshape(N, D)
        write = np.array([2 * _sigmoid(w["write_ND"][i] @ normed.reshape(-1) / N) for i in range(N)])
        return sum(gate[i] * normed[i] for i in range(N)) / N, write, np.eye(N)
    b = w["bias"]
    if residual == "hyper_connections":
        normed = [x[j] / math.sqrt((x[j] ** 2).mean() + EPS) for j in range(N)]
        theta, a = w["project_CD"], w["scales"]
        pre = np.array([a[0] * math.tanh(theta[0] @ normed[j]) + b[j] for j in range(N)])
        write = np.array([a[1] * math.tanh(theta[1] @ normed[j]) + b[N + j] for j in range(N)])
        mix = np.zeros((N, N))
        for i in range(N):
            for j in range(N):
                mix[i, j] = a[2] * math.tanh(theta[2 + i] @ normed[j]) + b[2 * N + i * N + j]
        return sum(pre[j] * x[j] for j in range(N)), write, mix
    logits = b.copy()
    if residual == "manifold":
        flat = x.reshape(-1)
        a = np.repeat(w["scales"], [N, N, N * N])
        logits = logits + a * (w["project_CD"] @ (flat / math.sqrt((flat**2).mean() + EPS)))
    pre, write = _sigmoid(logits[:N]), 2 * _sigmoid(logits[N : 2 * N])
    mix = _doubly_stochastic(np.array([[logits[2 * N + i * N + j] for j in range(N)] for i in range(N)]))
    return sum(pre[j] * x[j] for j in range(N)), write, mix


@torch.no_grad()
@pytest.mark.parametrize("residual", KINDS)
def test_reads_and_writes_are_those_of_the_papers(residual: str) -> None:
    """The matrix is asymmetric, so that a transposed one would be seen."""
    through, x_BTND, y_BTD = _drawn(residual), _streams(), _streams()[:, :, 0].flip(0)
    weights = {name: weight.numpy() for name, weight in through.named_parameters()}
    read_BTD, how = through.read(x_BTND)
    written_BTND, silent_BTND = through.write(x_BTND, y_BTD, how), through.write(x_BTND, None, how)
    for b, t in np.ndindex(2, 3):
        x, y = x_BTND[b, t].numpy(), y_BTD[b, t].numpy()
        read, write, mix = _formula(residual, weights, x)
        mixed = np.array([[sum(mix[i, j] * x[j, d] for j in range(N)) for d in range(D)] for i in range(N)])
        added = np.einsum("i,d->id", write, y)
        np.testing.assert_allclose(read_BTD[b, t], read, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(written_BTND[b, t], mixed + added, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(silent_BTND[b, t], mixed, rtol=1e-9, atol=1e-11)
        if residual != "gated":
            assert np.abs(mix - mix.T).max() > 0.05  # else this test could not see a transposition
            assert np.abs(mix.T @ x + added - (mixed + added)).max() > 0.05


@torch.no_grad()
@pytest.mark.parametrize("residual", KINDS)
@pytest.mark.parametrize("streams", [2, 4])
def test_one_stream_that_feeds_another(residual: str, streams: int) -> None:
    """Only stream 0 holds something; with all of it mixed into stream 1, stream 1 holds it, and not the other way."""
    if residual == "gated":
        pytest.skip("a gated residual mixes nothing")
    through = _drawn(residual, scale=0.0, streams=streams)
    into_from = torch.full((streams, streams), -30.0, dtype=torch.float64)
    for i in range(streams):
        into_from[(i + 1) % streams, i] = 30.0  # a rotation: its transpose turns the other way from three streams on
    if residual == "hyper_connections":
        into_from = (into_from > 0).double()
    through.get_parameter("bias").data[2 * streams :] = into_from.flatten()
    x_BTND = torch.zeros(1, 1, streams, D, dtype=torch.float64)
    x_BTND[:, :, 0] = 1.0
    after = through.write(x_BTND, None, through.read(x_BTND)[1])[0, 0].mean(-1)
    torch.testing.assert_close(after, torch.eye(streams, dtype=torch.float64)[1], atol=1e-9, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("residual", ["static", "manifold"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mixing_matrix_is_doubly_stochastic(residual: str, dtype: torch.dtype) -> None:
    through = _drawn(residual, scale=0.3, streams=4).to(dtype)
    mix = through.read(_streams(4, 64, streams=4).to(dtype))[1].mix
    assert mix is not None
    assert (mix >= 0).all()
    torch.testing.assert_close(mix.sum(-1), torch.ones_like(mix.sum(-1)), atol=1e-6, rtol=0)
    torch.testing.assert_close(mix.sum(-2), torch.ones_like(mix.sum(-2)), atol=1e-6, rtol=0)
    assert (mix - mix.mT).abs().max() > 0.1


def test_sinkhorns_fast_form_is_its_reference_and_has_its_gradient() -> None:
    """In the limit that both come to, which is not where 20 rounds end."""
    logits_AIJ = torch.randn(5, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits_AIJ = (logits_AIJ + OWN_LOGIT * torch.eye(3)).requires_grad_()
    torch.testing.assert_close(sinkhorn(logits_AIJ), sinkhorn_reference(logits_AIJ), rtol=1e-7, atol=1e-9)
    gradients = [
        torch.autograd.grad((each(logits_AIJ) * torch.arange(45.0).view(5, 3, 3)).sum(), logits_AIJ)[0]
        for each in (sinkhorn, sinkhorn_reference)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-8)
    assert torch.autograd.gradcheck(sinkhorn, logits_AIJ)
    early = logits_AIJ
    for _ in range(20):
        early = early.log_softmax(1).log_softmax(2)
    assert 1e-4 < (early.exp().sum(1) - 1).abs().max() < 0.1


def test_no_logits_make_sinkhorn_anything_but_a_number() -> None:
    """A column far below the others would vanish outside of logarithms."""
    logits_AIJ = torch.tensor([[[0.0, -200.0], [0.0, -200.0]]]).requires_grad_()
    matrix = sinkhorn(logits_AIJ)
    torch.testing.assert_close(matrix, torch.full_like(matrix, 0.5))
    matrix[0, 0].sum().backward()
    assert logits_AIJ.grad is not None
    assert logits_AIJ.grad.isfinite().all()


@pytest.mark.parametrize("residual", KINDS)
def test_gradients_are_finite_differences(residual: str) -> None:
    through = _drawn(residual, streams=2)
    names = [name for name, _ in through.named_parameters()]
    x_BTND = _streams(1, 2, 2).requires_grad_()
    y_BTD = _streams(1, 2, 2)[:, :, 1].clone().requires_grad_()

    def run(x: torch.Tensor, y: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        class Whole(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.through = through

            def forward(self) -> tuple[torch.Tensor, ...]:
                read, how = self.through.read(x)
                return read, self.through.mixed(x), self.through.write(x, y, how)

        given = {f"through.{name}": weight for name, weight in zip(names, weights, strict=True)}
        return torch.func.functional_call(Whole(), given, ())  # type: ignore[no-any-return]

    weights = [weight.detach().clone().requires_grad_() for weight in through.parameters()]
    assert torch.autograd.gradcheck(run, (x_BTND, y_BTD, *weights))


# --- in the model -----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("memory", [*MEMORIES, "moe", "none"])
@pytest.mark.parametrize("residual", KINDS)
def test_every_kind_starts_as_pre_norm_whatever_memory_there_is(residual: str, memory: str) -> None:
    changes = MEMORIES.get(memory, {})
    if memory == "moe":
        changes = {"moe": {"expert_width": 8, "top_k": 2}}
    one, many = (_transformer(_config(kind, **changes)).double().eval() for kind in ("pre_norm", residual))
    tokens_BT = _tokens()
    torch.testing.assert_close(many(tokens_BT)[0], one(tokens_BT)[0], rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(many.residual_streams(tokens_BT), one.residual_streams(tokens_BT), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("residual", KINDS)
def test_per_branch_with_one_key_for_all_starts_as_after_the_mix(residual: str) -> None:
    one = _transformer(_config("pre_norm", engram=ENGRAM)).double().eval()
    many = _transformer(_config(residual, engram=ENGRAM | {"fusion": "per_branch"})).double().eval()
    assert (many(_tokens())[0] - one(_tokens())[0]).abs().max() > 1e-4  # keys differ
    for ours, theirs in zip(many.layers_of("engram"), one.layers_of("engram"), strict=True):
        ours.get_parameter("key").copy_(theirs.get_parameter("key").repeat(N, 1))
    torch.testing.assert_close(many(_tokens())[0], one(_tokens())[0], rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("residual", KINDS)
@pytest.mark.parametrize("fusion", ["after_mix", "per_branch"])
def test_the_whole_residual_path_is_its_formulas(residual: str, fusion: str) -> None:
    """Copies, then in each block the memory, attention and feed-forward by `_formula`, then the mean."""
    model = _transformer(_config(residual, engram=ENGRAM | {"fusion": fusion})).double().eval()
    stream = torch.Generator().manual_seed(5)
    for weight in model.parameters():
        weight += 0.2 * torch.randn(weight.shape, generator=stream)
    tokens_BT = _tokens()[:1]
    x = model.embedding[tokens_BT][0].unsqueeze(1).repeat(1, N, 1).numpy()  # (T, N, D)

    def read(through: Any, x: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        weights = {name: weight.numpy() for name, weight in through.named_parameters()}
        return [_formula(residual, weights, x[t]) for t in range(CONTEXT)]

    def sublayer(through: Any, norm: Any, function: Any, x: np.ndarray) -> np.ndarray:
        found = read(through, x)
        fed = torch.from_numpy(np.stack([each[0] for each in found])).unsqueeze(0)
        y = function(fed if norm is None else norm(fed))[0].numpy()
        return np.stack([mix @ x[t] + np.outer(write, y[t]) for t, (_, write, mix) in enumerate(found)])

    for block in model.blocks:
        if fusion == "per_branch":
            x = x + block.memory(torch.from_numpy(x).unsqueeze(0), tokens_BT)[0].numpy()
        else:
            mixed = np.stack([each[0] for each in read(block.attention_streams, x)])
            if residual == "gated":
                mixed /= (1 / np.sqrt((x**2).mean(-1) + EPS)).mean(-1)[:, None]
            x = x + block.memory(torch.from_numpy(mixed).unsqueeze(0), tokens_BT)[0].numpy()[:, None]
        attend = lambda fed, block=block: block.attention(fed, model.cos_sin_2THK)  # noqa: E731
        x = sublayer(block.attention_streams, block.attention_norm, attend, x)
        x = sublayer(block.ffn_streams, block.ffn_norm, block.ffn, x)
    assert model.head is not None
    expected = model.norm(torch.from_numpy(x.mean(1)).unsqueeze(0)) @ model.head.T
    torch.testing.assert_close(model(tokens_BT)[0], expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("residual", KINDS)
def test_training_sets_the_streams_apart(residual: str) -> None:
    """From copies that all sublayers treat alike they would never part."""
    model = _transformer(_config(residual, engram=ENGRAM))
    optimizer = Optimizer(model, Train(batch_tokens=24, lr=1e-2))
    seen: list[torch.Tensor] = []
    model.blocks[-1].register_forward_hook(lambda *given: seen.append(given[2][0].detach()))
    for _ in range(8):
        model.loss(_tokens(), _tokens().roll(-1, 1), 24)[0].backward()
        optimizer.step(1e-2, 0.5)
    spread = [(x_BTND - x_BTND.mean(2, keepdim=True)).norm() / x_BTND.norm() for x_BTND in seen]
    assert spread[0] < 1e-6 < 1e-3 < spread[-1]


@pytest.mark.parametrize("residual", KINDS)
def test_every_parameter_learns_and_only_projections_are_decayed(residual: str) -> None:
    model = _transformer(_config(residual, engram=ENGRAM | {"fusion": "per_branch"}))
    optimizer = Optimizer(model, Train(batch_tokens=24, lr=1e-2))
    for _ in range(2):  # projections start at zero: what is behind one learns from the second step on
        model.loss(_tokens(), _tokens().roll(-1, 1), 24)[0].backward()
        idle = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.norm() > 0]
        optimizer.step(1e-2, 0.5)
    assert not idle
    decayed, plain = ({id(weight) for weight in part.weights} for part in optimizer.parts[:2])  # type: ignore[union-attr]
    ours = {name: id(weight) for name, weight in model.named_parameters() if "_streams." in name}
    projections = {name for name in ours if name.endswith(("project_CD", "down_RD", "up_DR", "write_ND"))}
    assert {name for name, weight in ours.items() if weight in decayed} == projections
    assert {name for name, weight in ours.items() if weight in plain} == ours.keys() - projections
    gains = [id(weight) for name, weight in model.named_parameters() if name.endswith("gain")]
    assert gains
    assert plain.issuperset(gains)


@torch.no_grad()
@pytest.mark.parametrize("residual", KINDS)
def test_streams_keep_their_precision_under_autocast(residual: str) -> None:
    """Only what the sublayers multiply is rounded to bf16: a residual rounded at each write loses what is added."""
    model = _transformer(_config(residual, engram=ENGRAM | {"fusion": "per_branch"})).eval()
    kept: list[torch.Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda *given: kept.append(given[2][0]))
    exact = model(_tokens())[0]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(_tokens())[0]
    assert all(each.dtype == torch.float32 for each in kept)
    assert 0 < (rounded.float() - exact).abs().max() < 0.05 * exact.abs().max()
