"""The noise model: seed effects come off, the pooled size is right, and the shares called tied hold the best."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.detect import detectable, power, seeds_needed
from analysis.fits.noise import Noise, resample, seed_model, tied_with_best


def balanced(noise: float, seeds: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x, seed = (axis.ravel() for axis in np.meshgrid(np.linspace(0, 1, 8), np.arange(seeds)))
    return x, 4 + x + rng.normal(0, 1, seeds)[seed] + rng.normal(0, noise, len(x)), seed


def test_the_pooled_noise_leaves_out_what_seeds_share() -> None:
    rng = np.random.default_rng(0)
    models = [seed_model(*balanced(0.02, 3, rng)) for _ in range(100)]
    assert models[0].df == 14  # 24 runs, 8 shares, 2 free seed effects
    assert np.mean([model.sd**2 for model in models]) ** 0.5 == pytest.approx(0.02, rel=0.05)
    assert np.mean([model.spread for model in models]) > 0.5


def test_balanced_means_are_plain_means() -> None:
    x, y, seed = balanced(0.02, 3, np.random.default_rng(1))
    assert seed_model(x, y, seed).mean_I == pytest.approx(y.reshape(3, 8).mean(0))


def test_resamples_scatter_as_the_means_do() -> None:
    model = seed_model(*balanced(0.02, 2, np.random.default_rng(2)))
    draws = resample(model, Noise(0.02, 10_000), 20_000, np.random.default_rng(3))
    assert (draws[:, 0] - draws[:, 1]).std() == pytest.approx(0.02, rel=0.03)  # sqrt(2) x 0.02 / sqrt(2 seeds)


def test_tied_shares_hold_the_best_in_95_of_100_studies() -> None:
    rng = np.random.default_rng(4)
    held, all_kept = [], []
    for _ in range(200):
        x, y, seed = balanced(0.02, 2, rng)
        y = y - x + np.where(x == 0, 0, 0.01)  # share 0 is best by a little
        model = seed_model(x, y, seed)
        tied = tied_with_best(model, Noise(model.sd, model.df), rng)
        held.append(tied[0])
        all_kept.append(tied.all())
    assert np.mean(held) >= 0.94
    assert np.mean(all_kept) < 1


def test_far_worse_shares_are_not_tied() -> None:
    x, y, seed = balanced(0.02, 2, np.random.default_rng(5))
    model = seed_model(x, y, seed)
    assert tied_with_best(model, Noise(model.sd, model.df), np.random.default_rng(0)).tolist() == [True, *[False] * 7]


def test_the_power_is_that_of_simulated_studies() -> None:
    rng, found = np.random.default_rng(6), []
    for _ in range(1000):
        x, y, seed = balanced(0.02, 3, rng)
        model = seed_model(x, y - x + np.where(x == 0, 0, 0.05), seed)
        difference = model.mean_I[-1] - model.mean_I[0]
        found.append(
            abs(difference) > 2.1448 * model.sd * np.sqrt(2 / 3)
        )  # Student's t at 97.5%, 14 degrees of freedom
    assert np.mean(found) == pytest.approx(power(0.05, 0.02, 3, 8), abs=0.04)


def test_seeds_and_what_they_detect_agree() -> None:
    needed = seeds_needed(0.01, 0.02, 8)
    assert needed is not None
    assert power(0.01, 0.02, needed, 8) >= 0.8 > power(0.01, 0.02, needed - 1, 8)
    assert detectable(0.02, needed, 8) <= 0.01 < detectable(0.02, needed - 1, 8)
    # Of the normal approximation: 2 (z_0.975 + z_0.8)^2 (sd / depth)^2 = 15.7 x 4
    assert needed == pytest.approx(62.8, abs=2)
    assert seeds_needed(1e-5, 0.02, 8) is None
    assert detectable(0.02, 1, 8) is None
    assert power(10.0, 0.02, 2, 8) == 1
