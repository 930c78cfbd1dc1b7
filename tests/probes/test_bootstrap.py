"""Intervals against resampling token by token, ranks against SciPy's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from sparsemem.probes import bootstrap
from sparsemem.probes.bootstrap import mean_ranks, rank_correlation, ratio

DRAWS = np.random.default_rng(3)


def test_an_interval_is_that_of_sequences_drawn_again_one_by_one() -> None:
    lengths = DRAWS.integers(1, 9, 40)
    sequences = [DRAWS.normal(place % 5, 1, length) for place, length in enumerate(lengths)]
    value, low, high = ratio(np.array([each.sum() for each in sequences]), lengths.astype(float))
    assert value == pytest.approx(np.concatenate(sequences).mean())
    means = [np.concatenate([sequences[place] for place in DRAWS.integers(0, 40, 40)]).mean() for _ in range(4000)]
    assert (low, high) == pytest.approx(tuple(np.quantile(means, (0.025, 0.975))), abs=0.06)
    assert high - low > 0.5


def test_ranks_and_their_correlation_are_scipys() -> None:
    x, y = DRAWS.integers(0, 7, 200).astype(float), DRAWS.normal(size=200)
    y += 0.4 * x
    assert mean_ranks(x).tolist() == (stats.rankdata(x) - 1).tolist()
    value, low, high = rank_correlation(x, y, np.arange(200) // 4, 50)
    assert value == pytest.approx(stats.spearmanr(x, y).statistic)
    assert 0 < low < value < high < 1


def test_what_has_no_interval_has_none() -> None:
    assert ratio(np.array([3.0]), np.array([2.0])) == (1.5, None, None)
    assert ratio(np.zeros(4), np.zeros(4)) == (None, None, None)
    assert rank_correlation(np.ones(8), np.arange(8.0), np.arange(8), 8) == (None, None, None)


def test_resamples_are_the_same_in_every_call() -> None:
    first = ratio(np.arange(30.0), np.ones(30))
    bootstrap._drawn.cache_clear()
    assert ratio(np.arange(30.0), np.ones(30)) == first
