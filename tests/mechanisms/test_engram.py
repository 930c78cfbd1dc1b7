"""Engram (arXiv 2601.07372): the hash against big integers, the module against its formulas in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemem.config import Model
from sparsemem.mechanisms.engram import Engram
from sparsemem.mechanisms.engram.layer import EngramMemory, NgramHash, engram_account, hash_multipliers
from sparsemem.mechanisms.hashed import distinct_primes
from sparsemem.parameter import initialize

WIDTH, VOCABULARY, SEPARATOR = 16, 50, 3
CANONICAL = torch.arange(VOCABULARY) * 7 % 31  # onto 0..30: some raw ids fold into one
ORDERS = [(2,), (3,), (2, 3), (2, 3, 4), (2, 5)]


def _model(layers: int = 4, **engram: Any) -> Model:
    moe = {"expert_width": 8, "top_k": 1, "normalize_gates": False}
    fields = {"layers": layers, "width": WIDTH, "heads": 2, "init_std": 0.3, "moe": moe}
    return Model.model_validate(
        fields | {"engram": {"layers": [1], "heads": 2, "row_dim": 4, "init_std": 0.5} | engram}
    )


def _engram(**engram: Any) -> Engram:
    config = _model(**engram).engram
    assert config is not None
    return config


def _big_integer_rows(tokens: list[int], config: Engram, layer: int, primes: tuple[int, ...]) -> list[list[int]]:
    """MECHANISMS 2.2 in Python's unbounded integers; `layer` counts from 0 as in the released code."""
    table = CANONICAL.tolist() if config.compression else list(range(VOCABULARY))
    vocabulary = max(table) + 1
    bound = max(1, ((2**63 - 1) // vocabulary) // 2)
    draws = np.random.default_rng(config.hash_seed + 10007 * layer).integers(0, bound, size=max(config.orders))
    multipliers = [2 * int(draw) + 1 for draw in draws]
    rows = []
    for t in range(len(tokens)):
        mix, seen, row, crossed = 0, 0, [], False
        for n, order in enumerate(config.orders):
            while seen < order:
                place = t - seen
                crossed = (
                    crossed or place < 0 or (config.reset_at_document_end and seen > 0 and tokens[place] == SEPARATOR)
                )
                identity = table[SEPARATOR] if crossed else table[tokens[place]]
                mix ^= identity * multipliers[seen]
                seen += 1
            assert mix < 2**63  # neither a product nor their XOR leaves int64
            row += [mix % prime for prime in primes[n * config.heads : (n + 1) * config.heads]]
        rows.append(row)
    return rows


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.lists(st.integers(0, VOCABULARY - 1) | st.just(SEPARATOR), min_size=1, max_size=24),
    orders=st.sampled_from(ORDERS),
    heads=st.integers(1, 3),
    layer=st.integers(1, 30),
    seed=st.integers(0, 5),
    start=st.sampled_from([2, 97, 2_262_400]),
    compression=st.booleans(),
    reset=st.booleans(),
)
def test_rows_equal_those_of_big_integers(
    tokens: list[int],
    orders: tuple[int, ...],
    heads: int,
    layer: int,
    seed: int,
    start: int,
    compression: bool,
    reset: bool,
) -> None:
    config = _engram(orders=orders, heads=heads, hash_seed=seed, compression=compression, reset_at_document_end=reset)
    primes = distinct_primes(start, len(orders) * heads)
    rows = NgramHash(config, layer, primes, CANONICAL, SEPARATOR)(torch.tensor([tokens, tokens[::-1]]))
    assert rows[0].tolist() == _big_integer_rows(tokens, config, layer - 1, primes)
    assert rows[1].tolist() == _big_integer_rows(tokens[::-1], config, layer - 1, primes)


def _hash(tokens: list[int], **engram: Any) -> list[list[int]]:
    config = _engram(**engram)
    primes = distinct_primes(1009, len(config.orders) * config.heads)
    return NgramHash(config, 1, primes, CANONICAL, SEPARATOR)(torch.tensor([tokens]))[0].tolist()


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


def test_compression_lets_folded_tokens_share_rows() -> None:
    same, other = 5, 36  # 5 * 7 % 31 == 36 * 7 % 31
    assert CANONICAL[same] == CANONICAL[other]
    assert _hash([same, 8]) == _hash([other, 8])
    assert _hash([same, 8], compression=False) != _hash([other, 8], compression=False)


def test_order_of_tokens_matters_and_longer_orders_look_further_back() -> None:
    assert _hash([10, 20], orders=[2])[1] != _hash([20, 10], orders=[2])[1]
    assert _hash([10, 20, 30], orders=[2])[2] == _hash([11, 20, 30], orders=[2])[2]
    assert _hash([10, 20, 30], orders=[3])[2] != _hash([11, 20, 30], orders=[3])[2]


@pytest.mark.parametrize("vocabulary", [1, 2, 31, 4096, 129_280, 2**31])
@pytest.mark.parametrize("layer", [1, 2, 15])
def test_multipliers_are_odd_differ_by_layer_and_never_overflow(vocabulary: int, layer: int) -> None:
    config = _engram(orders=[2, 3, 4])
    multipliers = hash_multipliers(config, layer, vocabulary).tolist()
    assert len(multipliers) == 4
    assert all(m % 2 == 1 and m > 0 and m * (vocabulary - 1) < 2**63 for m in multipliers)
    assert multipliers != hash_multipliers(config, layer + 1, vocabulary).tolist()


def test_multipliers_are_those_of_the_released_code() -> None:
    """Values, so that a numpy that draws other numbers is noticed: rows of stored results must stay what they were."""
    draws = np.random.default_rng(0 + 10007 * 1).integers(0, (2**63 - 1) // 1000 // 2, size=3)
    assert hash_multipliers(_engram(orders=[2, 3]), 2, 1000).tolist() == (2 * draws + 1).tolist()
    assert hash_multipliers(_engram(orders=[2, 3]), 2, 1000).tolist() == [
        7593627661414631,
        479593001838623,
        3563315849468963,
    ]


@pytest.mark.parametrize(("start", "count"), [(0, 5), (2, 1), (8, 40), (2_262_400, 32), (7_239_680, 32)])
def test_primes_are_distinct_and_consecutive_from_the_start(start: int, count: int) -> None:
    sieve = np.ones(start + 1000 + 40 * count, bool)
    sieve[:2] = False
    for divisor in range(2, math.isqrt(len(sieve)) + 1):
        if sieve[divisor]:
            sieve[divisor * divisor :: divisor] = False
    expected = np.flatnonzero(sieve)
    assert distinct_primes(start, count) == tuple(expected[expected >= start][:count].tolist())


# --- the module -------------------------------------------------------------------------------------------------------


def _memory(rows: tuple[int, ...] | None = None, **engram: Any) -> tuple[EngramMemory, Model]:
    config = _model(**engram)
    assert config.engram is not None
    rows = rows or distinct_primes(11, len(config.engram.orders) * config.engram.heads)
    memory = EngramMemory(config, 1, rows, CANONICAL, SEPARATOR)
    initialize(memory, seed=0)
    for weight in memory.parameters():
        if weight.ndim == 1:
            weight.data.uniform_(0.5, 1.5)
    return memory, config


def _rms(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * gain


def _formula(
    memory: EngramMemory, config: Engram, hidden: np.ndarray, tokens: list[int], primes: tuple[int, ...]
) -> np.ndarray:
    """MECHANISMS 2.3 in float64, position by position."""
    weights = {name: weight.detach().double().numpy() for name, weight in memory.named_parameters()}
    first = np.cumsum([0, *primes[:-1]])
    values = []
    for t, row in enumerate(_big_integer_rows(tokens, config, 0, primes)):
        read = np.concatenate([weights["table.rows_RC"][start + r] for start, r in zip(first, row, strict=True)])
        key = weights["key"] @ read + weights.get("key_bias", 0)
        value = weights["value"] @ read + weights.get("value_bias", 0)
        score = _rms(hidden[t], weights["hidden_norm.gain"]) @ _rms(key, weights["key_norm.gain"]) / math.sqrt(WIDTH)
        if config.gate == "signed-root":
            score = np.sign(score) * math.sqrt(max(abs(score), 1e-6))
        values.append(value / (1 + math.exp(-score)))
    if not config.conv:
        return np.array(values)
    out = []
    for t, value in enumerate(values):
        total = np.zeros(WIDTH)
        for tap in range(config.conv_kernel):
            place = t - tap * max(config.orders)
            within = not config.conv_reset_at_document_end or SEPARATOR not in tokens[max(place, 0) : t]
            if place >= 0 and within:
                total += weights["taps_KD"][tap] * _rms(values[place], weights["conv_norm.gain"])
        out.append(value + total / (1 + np.exp(-total)))
    return np.array(out)


@pytest.mark.parametrize("gate", ["signed-root", "plain"])
@pytest.mark.parametrize("orders", ORDERS)
@pytest.mark.parametrize(
    ("bias", "conv", "kernel"), [(False, True, 4), (True, True, 3), (True, False, 4), (False, True, 1)]
)
@pytest.mark.parametrize("reset", [False, True])
def test_the_module_equals_its_formulas(
    gate: str, orders: tuple[int, ...], bias: bool, conv: bool, kernel: int, reset: bool
) -> None:
    memory, config = _memory(
        gate=gate, orders=orders, bias=bias, conv=conv, conv_kernel=kernel, conv_reset_at_document_end=reset
    )
    assert config.engram is not None
    if conv:
        memory.taps_KD.data.normal_()
    tokens = torch.randint(VOCABULARY, (1, 19))
    tokens[0, 8] = SEPARATOR
    hidden = torch.randn(1, 19, WIDTH)
    primes = distinct_primes(11, len(orders) * 2)
    expected = _formula(memory, config.engram, hidden[0].double().numpy(), tokens[0].tolist(), primes)
    np.testing.assert_allclose(memory(hidden, tokens)[0].detach().numpy(), expected, rtol=1e-3, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("reset", [False, True])
def test_a_document_is_read_alike_whatever_stands_before_it(reset: bool) -> None:
    """With the reset of the convolution too; without, the published module lets the end of one document
    into the next.
    """
    memory, _ = _memory(conv_reset_at_document_end=reset)
    memory.taps_KD.normal_()
    tokens, hidden = torch.randint(SEPARATOR + 1, VOCABULARY, (1, 12)), torch.randn(1, 12, WIDTH)
    tokens[0, 4] = SEPARATOR
    other = tokens.clone()
    other[0, :4] = other[0, :4].flip(0) - 1
    one, two = memory(hidden, tokens), memory(hidden, other)
    assert not torch.equal(one[:, :5], two[:, :5])
    assert torch.equal(one[:, 5:], two[:, 5:]) == reset


@pytest.mark.parametrize("orders", [(2,), (2, 3), (4,)])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 13, 40])
def test_the_convolution_is_torchs_depthwise_one(orders: tuple[int, ...], length: int) -> None:
    """Depthwise, causal, kernel 4, dilation = largest order (Engram sec. 2); conv1d's last tap is the present."""
    memory, _ = _memory(orders=orders)
    memory.taps_KD.data.normal_()
    value = torch.randn(2, length, WIDTH)
    normed = memory.conv_norm(value).transpose(1, 2)
    kernel = memory.taps_KD.flip(0).T.unsqueeze(1)
    padded = torch.nn.functional.pad(normed, (3 * max(orders), 0))
    expected = torch.nn.functional.silu(torch.nn.functional.conv1d(padded, kernel, groups=WIDTH, dilation=max(orders)))
    torch.testing.assert_close(memory._convolve(value), expected.transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_the_module_starts_as_its_gated_value() -> None:
    """Zero taps: with and without the convolution, the first step is the same; the taps do learn."""
    with_conv, without = _memory(conv=True)[0], _memory(conv=False)[0]
    for name, weight in without.named_parameters():
        weight.data = with_conv.get_parameter(name).data
    tokens, hidden = torch.randint(VOCABULARY, (2, 13)), torch.randn(2, 13, WIDTH)
    y = with_conv(hidden, tokens)
    torch.testing.assert_close(y, without(hidden, tokens), rtol=0, atol=0)
    y.square().sum().backward()
    assert with_conv.taps_KD.grad is not None
    assert with_conv.taps_KD.grad.abs().min() > 0


def test_the_signed_root_widens_the_gate() -> None:
    """Below a score of 1 the signed root pushes the gate away from a half, to the same side."""
    plain, root = _memory(gate="plain")[0], _memory(gate="signed-root")[0]
    hidden, key = torch.randn(1, 200, WIDTH), torch.randn(1, 200, WIDTH)
    for norm in (plain.hidden_norm, plain.key_norm, root.hidden_norm, root.key_norm):
        norm.gain.data.fill_(0.5)
    a, b = plain.gate(hidden, key) - 0.5, root.gate(hidden, key) - 0.5
    assert torch.equal(a.sign(), b.sign())
    assert (b.abs() >= a.abs()).all()


def test_gradients_stay_finite_at_a_score_of_zero() -> None:
    memory, _ = _memory(gate="signed-root")
    hidden = torch.zeros(1, 4, WIDTH, requires_grad=True)
    memory(hidden, torch.randint(VOCABULARY, (1, 4))).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize(("bias", "conv", "kernel"), [(False, True, 4), (True, True, 2), (True, False, 4)])
@pytest.mark.parametrize("orders", [(2,), (2, 3, 4)])
def test_the_accounts_count_the_tensors(bias: bool, conv: bool, kernel: int, orders: tuple[int, ...]) -> None:
    memory, config = _memory(orders=orders, bias=bias, conv=conv, conv_kernel=kernel)
    rows = distinct_primes(11, len(orders) * 2)
    account = engram_account(config, (rows,))
    weights = dict(memory.named_parameters())
    table, common = weights.pop("table.rows_RC").numel(), sum(weight.numel() for weight in weights.values())
    assert account.total == table + common
    assert table == sum(rows) * 4
    assert account.active == common + len(rows) * 4
    assert account.sparse_bytes == 4 * len(rows) * 4
    assert engram_account(config, (rows, rows)) == account * 2


@pytest.mark.parametrize(("rows", "billions"), [(2_262_400, 5.79), (7_239_680, 18.53)])
def test_published_memory_sizes(rows: int, billions: float) -> None:
    """Engram-27B and -40B (paper, table 1; MECHANISMS 2.5): 2 layers x 16 tables x rows x 80, with the primes that
    hashing needs.
    """
    engram = {"layers": [2, 15], "orders": [2, 3], "heads": 8, "row_dim": 80}
    config = Model.model_validate(
        {"layers": 30, "width": 2560, "heads": 32, "moe": {"expert_width": 1536, "top_k": 6}, "engram": engram}
    )
    primes = distinct_primes(rows, 32)
    account = engram_account(config, (primes[:16], primes[16:]))
    assert account.idle / 1e9 == pytest.approx(billions, abs=0.005)
    assert account.sparse_bytes == 4 * 2 * 1280  # d_mem in each of two modules
