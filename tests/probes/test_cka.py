"""CKA in feature space is what Gram matrices and a sum over pairs of tokens give, and its published values."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparsemem.probes.cka import CKA, KINDS

FEATURES = 8  # of which the published values of independent normals are: biased CKA is about D / (n + D)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def related(tokens: int) -> tuple[Tensor, Tensor]:
    """Features of 5 and 7 dimensions, far from the origin, that share some of their variance."""
    x, noise = draw(tokens, 5), draw(tokens, 7, seed=1)
    return x + 30, x @ draw(5, 7, seed=2) + 2 * noise - 20


def cka(x: Tensor, y: Tensor, kind: str, batch: int | None = None) -> float:
    found = CKA()
    for x_part, y_part in zip(x.split(batch or len(x)), y.split(batch or len(x)), strict=True):
        found.add([x_part], [y_part])
    return float(found.matrix(kind))


def ratio(hsic: Callable[[Tensor, Tensor], float], x: Tensor, y: Tensor) -> float:
    return float(hsic(x, y) / (hsic(x, x) * hsic(y, y)) ** 0.5)


def gram_unbiased(x: Tensor, y: Tensor) -> float:
    """By Gram matrices, doubly centred without their diagonals (Szekely & Rizzo 2014)."""

    def centred(features: Tensor) -> Tensor:
        gram = (features @ features.T).fill_diagonal_(0)
        n = len(gram)
        means = gram.sum(1) / (n - 2)
        means -= means.sum() / (2 * (n - 1))
        return (gram - means - means[:, None]).fill_diagonal_(0)

    return float((centred(x) * centred(y)).sum() / (len(x) * (len(x) - 3)))


def gram_biased(x: Tensor, y: Tensor) -> float:
    n = len(x)
    centre = torch.eye(n, dtype=torch.float64) - 1 / n
    return float(torch.trace(x @ x.T @ centre @ y @ y.T @ centre) / (n - 1) ** 2)


def loop_unbiased(x: Tensor, y: Tensor) -> float:
    """HSIC_1 term by term, over pairs of tokens."""
    k, l = ([[float(a @ b) for b in features] for a in features] for features in (x, y))  # noqa: E741
    n, trace, of_k, of_l, product = len(x), 0.0, 0.0, 0.0, 0.0
    for i, j in itertools.permutations(range(n), 2):
        trace += k[i][j] * l[i][j]
        of_k += k[i][j]
        of_l += l[i][j]
        product += k[i][j] * sum(l[j][m] for m in range(n) if m != j)
    return (trace + of_k * of_l / ((n - 1) * (n - 2)) - 2 * product / (n - 2)) / (n * (n - 3))


def test_the_whole_set_is_what_gram_matrices_give() -> None:
    x, y = related(60)
    assert cka(x, y, "unbiased", batch=17) == pytest.approx(ratio(gram_unbiased, x, y), abs=1e-10)
    assert cka(x, y, "biased", batch=17) == pytest.approx(ratio(gram_biased, x, y), abs=1e-10)


def test_the_whole_set_is_what_a_sum_over_pairs_gives() -> None:
    x, y = related(14)
    near = ratio(loop_unbiased, x - 30, y + 20)  # far from the origin this form cancels
    assert cka(x, y, "unbiased", batch=5) == pytest.approx(near, abs=1e-10)


def test_minibatches_are_summed_before_the_ratio_is_taken() -> None:
    x, y = related(48)

    def summed(a: Tensor, b: Tensor) -> float:
        return sum(map(gram_unbiased, a.split(12), b.split(12)))

    assert cka(x, y, "minibatch", batch=12) == pytest.approx(ratio(summed, x, y), abs=1e-10)
    assert abs(cka(x, y, "minibatch", batch=12) - cka(x, y, "unbiased")) > 1e-4
    assert cka(x, y, "minibatch") == pytest.approx(cka(x, y, "unbiased"), abs=1e-12)


@pytest.mark.parametrize(
    ("tokens", "biased", "unbiased"), [(32, 0.198, 0.017), (64, 0.114, 0.009), (128, 0.056, 0.003), (256, 0.029, 0.001)]
)
def test_independent_normals_have_the_published_values(tokens: int, biased: float, unbiased: float) -> None:
    found = {kind: Tensor([0.0] * 100) for kind in ("biased", "unbiased")}
    for seed in range(100):
        one = CKA()
        one.add([draw(tokens, FEATURES, seed=2 * seed)], [draw(tokens, FEATURES, seed=2 * seed + 1)])
        for kind in found:
            found[kind][seed] = one.matrix(kind)
    assert float(found["biased"].mean()) == pytest.approx(biased, rel=0.08)
    spread = float(found["unbiased"].std())
    assert abs(float(found["unbiased"].mean())) < 3 * spread / 10  # of 100 draws
    assert unbiased < 3 * spread  # the published one is of a single draw
    assert float(found["unbiased"].min()) < 0  # not clipped


@pytest.mark.parametrize("kind", KINDS)
def test_neither_rotation_nor_scale_nor_shift_matters(kind: str) -> None:
    x, y = related(40)
    rotation = torch.linalg.qr(draw(5, 5, seed=3)).Q
    assert cka(x @ rotation * 7 - 4, y / 3 + 100, kind, batch=10) == pytest.approx(cka(x, y, kind, batch=10), abs=1e-10)
    assert cka(x, -2 * (x @ rotation) + 1, kind, batch=10) == pytest.approx(1, abs=1e-10)
    skewed = x * torch.tensor([10.0, 1, 1, 1, 1])
    assert abs(cka(skewed, y, kind, batch=10) - cka(x, y, kind, batch=10)) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_has_the_pairs_in_their_places(kind: str) -> None:
    x, y = related(40)
    rows, columns = [x, y, x[:, :2]], [y, x]
    found = CKA()
    for part in torch.arange(40).split(20):
        found.add([each[part] for each in rows], [each[part] for each in columns])
    wanted = [[cka(row, column, kind, batch=20) for column in columns] for row in rows]
    assert torch.allclose(found.matrix(kind), torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-12)
    assert found.tokens == 40


def test_features_that_do_not_vary_have_none_and_few_tokens_are_refused() -> None:
    x, _ = related(10)
    assert cka(torch.ones(10, 3), x, "unbiased") != cka(torch.ones(10, 3), x, "unbiased")  # not a number
    with pytest.raises(ValueError, match="4 tokens"):
        cka(x[:3], x[:3], "unbiased")
    with pytest.raises(ValueError, match="4 tokens"):
        CKA().add([x], [x[:5]])
