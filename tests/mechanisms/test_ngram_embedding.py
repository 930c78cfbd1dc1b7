"""N-gram embedding (OverEncoding, arXiv 2501.16975): the hash against big integers, the module against its formula in
float64.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsemem.config import Model
from sparsemem.mechanisms.hashed import distinct_primes
from sparsemem.mechanisms.ngram_embedding.layer import NgramEmbeddingLayer, PolynomialHash, ngram_embedding_account
from sparsemem.parameter import initialize

WIDTH, VOCABULARY, SEPARATOR = 16, 50, 3
ORDERS = [(2,), (4,), (2, 3), (2, 3, 4), (2, 5)]
AMPLIFY = ["none", "scale", "norm"]


def _config(width: int = WIDTH, **memory: Any) -> Model:
    fields = {"layers": 2, "width": width, "heads": 2, "ngram_embedding": {"heads": 2, "row_dim": 4} | memory}
    return Model.model_validate(fields)


def _rows(config: Model, start: int = 11) -> tuple[int, ...]:
    assert config.ngram_embedding is not None
    return distinct_primes(start, len(config.ngram_embedding.orders) * config.ngram_embedding.heads)


def _big_integer_rows(
    tokens: list[int], config: Model, primes: tuple[int, ...], vocabulary: int = VOCABULARY
) -> list[list[int]]:
    """`h_i mod m_ij`, position by position, in Python's unbounded integers."""
    memory = config.ngram_embedding
    assert memory is not None
    rows = []
    for t in range(len(tokens)):
        row = []
        for n, order in enumerate(memory.orders):
            number, crossed = 0, False
            for j in range(order):
                crossed = crossed or t < j or (memory.reset_at_document_end and j > 0 and tokens[t - j] == SEPARATOR)
                number += (SEPARATOR if crossed else tokens[t - j]) * vocabulary**j
            row += [number % prime for prime in primes[n * memory.heads : (n + 1) * memory.heads]]
        rows.append(row)
    return rows


def _hash(tokens: list[int], **memory: Any) -> list[list[int]]:
    config = _config(**memory)
    return PolynomialHash(config, _rows(config, 1009), VOCABULARY, SEPARATOR)(torch.tensor([tokens]))[0].tolist()


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.lists(st.integers(0, VOCABULARY - 1) | st.just(SEPARATOR), min_size=1, max_size=24),
    orders=st.sampled_from(ORDERS),
    heads=st.integers(1, 3),
    start=st.sampled_from([2, 97, 12_800_000]),
    reset=st.booleans(),
)
def test_rows_equal_those_of_big_integers(
    tokens: list[int], orders: tuple[int, ...], heads: int, start: int, reset: bool
) -> None:
    config = _config(orders=orders, heads=heads, reset_at_document_end=reset)
    primes = _rows(config, start)
    rows = PolynomialHash(config, primes, VOCABULARY, SEPARATOR)(torch.tensor([tokens, tokens[::-1]]))
    assert rows[0].tolist() == _big_integer_rows(tokens, config, primes)
    assert rows[1].tolist() == _big_integer_rows(tokens[::-1], config, primes)


@pytest.mark.parametrize("vocabulary", [4096, 129_280, 1_000_003])
@pytest.mark.parametrize("start", [12_800_000, 10**12])
def test_the_largest_ids_of_a_large_vocabulary_do_not_overflow(vocabulary: int, start: int) -> None:
    """h_5 of 129,280 ids is about 2^85: int64 would wrap."""
    config = _config(orders=[2, 3, 4, 5], heads=1)
    primes = _rows(config, start)
    tokens = [*range(vocabulary - 6, vocabulary), *[vocabulary - 1] * 6]
    rows = PolynomialHash(config, primes, vocabulary, SEPARATOR)(torch.tensor([tokens]))
    assert rows[0].tolist() == _big_integer_rows(tokens, config, primes, vocabulary)


def test_a_hash_that_could_overflow_is_refused() -> None:
    with pytest.raises(AssertionError):
        PolynomialHash(_config(orders=[2], heads=1), (2**62,), VOCABULARY, SEPARATOR)


def test_a_document_reads_the_same_rows_whatever_stands_before_it() -> None:
    document = [10, 20, 30, 11, SEPARATOR]
    before = [[], [40, 41, SEPARATOR], [SEPARATOR, 9, 9, SEPARATOR]]
    hashed = [_hash([*text, *document], orders=[2, 3, 4])[len(text) :] for text in before]
    assert hashed[0] == hashed[1] == hashed[2]


def test_without_reset_n_grams_read_through_a_separator() -> None:
    kept, through = (
        [_hash([first, SEPARATOR, 20], orders=[3], reset_at_document_end=reset)[2] for first in (10, 40)]
        for reset in (True, False)
    )
    assert kept[0] == kept[1]
    assert through[0] != through[1]


def test_the_separator_still_sees_the_document_that_it_ends() -> None:
    assert _hash([10, 20, SEPARATOR])[2] != _hash([10, 21, SEPARATOR])[2]


def test_longer_orders_look_further_back_and_not_beyond() -> None:
    assert _hash([10, 20], orders=[2])[1] != _hash([20, 10], orders=[2])[1]
    assert _hash([10, 20, 30], orders=[2])[2] == _hash([11, 20, 30], orders=[2])[2]
    assert _hash([10, 20, 30], orders=[3])[2] != _hash([11, 20, 30], orders=[3])[2]


# --- the module -------------------------------------------------------------------------------------------------------


def _build(**memory: Any) -> tuple[NgramEmbeddingLayer, Model]:
    config = _config(**memory)
    module = NgramEmbeddingLayer(config, _rows(config), VOCABULARY, SEPARATOR)
    initialize(module, seed=0)
    if module.norm is not None:
        module.norm.gain.data.uniform_(0.5, 1.5)
    return module, config


def _inputs(length: int = 19) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(VOCABULARY, (2, length))
    tokens[0, length // 2] = SEPARATOR
    return torch.randn(2, length, WIDTH) * 0.02, tokens


def _formula(module: NgramEmbeddingLayer, config: Model, embedded: np.ndarray, tokens: list[int]) -> np.ndarray:
    """MECHANISMS 4 in float64: position by position, table by table."""
    memory, primes = config.ngram_embedding, _rows(config)
    assert memory is not None
    weights = {name: weight.detach().double().numpy() for name, weight in module.named_parameters()}
    first = np.cumsum([0, *primes[:-1]])
    out = []
    for t, row in enumerate(_big_integer_rows(tokens, config, primes)):
        total = embedded[t].copy()
        for table, number in enumerate(row):
            W = weights["projection"][:, table * memory.row_dim : (table + 1) * memory.row_dim]
            total += W @ weights["table.rows_RC"][first[table] + number]
        total /= 1 + memory.heads * len(memory.orders)  # OverEncoding's 1 + k (n - 1), whose orders are 2..n
        if memory.amplify == "scale":
            total *= math.sqrt(WIDTH)
        if memory.amplify == "norm":
            total *= weights["norm.gain"] / np.sqrt((total**2).mean() + config.norm_eps)
        out.append(total)
    return np.array(out)


@pytest.mark.parametrize("amplify", AMPLIFY)
@pytest.mark.parametrize("orders", ORDERS)
@pytest.mark.parametrize(("heads", "row_dim", "reset"), [(1, 4, True), (3, 8, False)])
def test_the_module_equals_its_formula(
    amplify: str, orders: tuple[int, ...], heads: int, row_dim: int, reset: bool
) -> None:
    module, config = _build(amplify=amplify, orders=orders, heads=heads, row_dim=row_dim, reset_at_document_end=reset)
    embedded, tokens = _inputs()
    out = module(embedded, tokens)
    for b in range(2):
        expected = _formula(module, config, embedded[b].double().numpy(), tokens[b].tolist())
        np.testing.assert_allclose(out[b].detach().numpy(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_text_shorter_than_the_longest_order_is_embedded(length: int) -> None:
    module, config = _build(orders=[2, 5])
    embedded, tokens = _inputs(length)
    expected = _formula(module, config, embedded[1].double().numpy(), tokens[1].tolist())
    np.testing.assert_allclose(module(embedded, tokens)[1].detach().numpy(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("amplify", AMPLIFY)
def test_a_token_reaches_exactly_the_positions_whose_n_grams_hold_it(amplify: str) -> None:
    module, _ = _build(orders=[2, 4], amplify=amplify)
    embedded, tokens = torch.randn(1, 12, WIDTH), torch.arange(10, 22).unsqueeze(0)
    changed = tokens.clone()
    changed[0, 5] = 40
    differs = (module(embedded, tokens) != module(embedded, changed))[0].any(-1)
    assert differs.nonzero().flatten().tolist() == [5, 6, 7, 8]


class _DenseGradient(torch.autograd.Function):
    """Identity: gradcheck refuses the sparse gradient of a dense input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.to_dense()


@pytest.mark.parametrize("amplify", AMPLIFY)
def test_gradients_pass_a_finite_difference_check(amplify: str) -> None:
    module, _ = _build(amplify=amplify, orders=[2, 3], heads=1, row_dim=3, init_std=0.5)
    module.double()
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in module.named_parameters()}
    embedded, tokens = (
        torch.randn(1, 4, WIDTH, dtype=torch.float64, requires_grad=True),
        torch.tensor([[10, SEPARATOR, 20, 30]]),
    )

    def forward(embedded_BTD: Tensor, *values: Tensor) -> Tensor:
        named = dict(zip(weights, values, strict=True))
        named["table.rows_RC"] = _DenseGradient.apply(named["table.rows_RC"])
        return torch.func.functional_call(module, named, (embedded_BTD, tokens))

    assert torch.autograd.gradcheck(forward, (embedded, *weights.values()))


def test_only_the_rows_that_were_read_have_a_gradient() -> None:
    module, config = _build(orders=[2, 3])
    embedded, tokens = _inputs(7)
    module(embedded, tokens).square().sum().backward()
    gradient = module.table.rows_RC.grad
    assert gradient is not None
    assert gradient.is_sparse
    primes = _rows(config)
    rows = np.concatenate([_big_integer_rows(text, config, primes) for text in tokens.tolist()])
    read = set((rows + np.cumsum([0, *primes[:-1]])).flatten().tolist())
    assert set(gradient.coalesce().indices()[0].tolist()) == read
    assert len(read) < sum(primes)
    assert (gradient.coalesce().values() != 0).any(-1).all()


def test_every_table_adds_something_of_its_own() -> None:
    """Without one table's rows the output is another, and what tables add is not alike."""
    module, config = _build(orders=[2, 3])
    embedded, tokens = _inputs()
    whole, primes = module(embedded, tokens), _rows(config)
    parts = []
    for start, end in zip(np.cumsum([0, *primes[:-1]]), np.cumsum(primes), strict=True):
        kept = module.table.rows_RC.detach().clone()
        module.table.rows_RC.data[start:end] = 0
        parts.append((whole - module(embedded, tokens)).flatten())
        module.table.rows_RC.data.copy_(kept)
    likeness = torch.corrcoef(torch.stack(parts)) - torch.eye(len(parts))
    assert likeness.abs().max() < 0.3


@pytest.mark.parametrize("row_dim", [2, 8, 32])
def test_a_table_starts_at_the_scale_of_the_vocabulary_embedding(row_dim: int) -> None:
    """Every term of the mean weighs alike: 1 + H independent ones average to 1 / sqrt(1 + H) of one's deviation, times
    sqrt(D).
    """
    width = 128
    config = _config(width=width, row_dim=row_dim, orders=[2, 3], heads=4, amplify="scale")
    module = NgramEmbeddingLayer(config, _rows(config, 997), VOCABULARY, SEPARATOR)
    initialize(module, seed=0)
    tokens = torch.randint(VOCABULARY, (8, 256))
    embedded = torch.randn(8, 256, width) * config.init_std
    assert module(embedded, tokens).std().item() == pytest.approx(config.init_std * math.sqrt(width / 9), rel=0.05)
    assert module(torch.zeros_like(embedded), tokens).std().item() == pytest.approx(
        config.init_std * math.sqrt(8 * width) / 9, rel=0.05
    )


@pytest.mark.parametrize("amplify", AMPLIFY)
@pytest.mark.parametrize("orders", [(2,), (2, 3, 4)])
def test_the_account_counts_the_tensors(amplify: str, orders: tuple[int, ...]) -> None:
    config = _config(amplify=amplify, orders=orders)
    rows = _rows(config, 997)
    with torch.device("meta"):
        module = NgramEmbeddingLayer(config, rows, VOCABULARY, SEPARATOR)
    account, weights = ngram_embedding_account(config, rows), dict(module.named_parameters())
    assert account.total == sum(weight.numel() for weight in weights.values())
    assert account.idle == weights["table.rows_RC"].numel() - len(rows) * 4
    assert account.flops == 2 * weights["projection"].numel()
    assert account.sparse_bytes == 4 * len(rows) * 4
    with torch.device("meta"):
        tokens = torch.zeros(2, 7, dtype=torch.int64)
        assert module(torch.zeros(2, 7, WIDTH), tokens).shape == (2, 7, WIDTH)
