"""The soft alignment index of two models (Engram paper, eq. 9): at which depth of a reference another model's layers
stand.

With S the CKA of layer i of the reference and layer j of the other, a_j = sum S_ij i / sum S_ij over the k layers i of
largest S_ij. At the edges the k layers lie on one side, so that a_j is not j even for a model against itself: an index
says something only less that of the reference against another seed of itself.
"""

from __future__ import annotations

from torch import Tensor

DEPTHS_PER_LAYER_TAKEN = 6  # the paper takes 5 of 30 layers


def layers_taken(layers: int) -> int:
    """k, in proportion to the reference's depth.

    >>> [layers_taken(layers) for layers in (1, 4, 8, 12, 30)]
    [1, 1, 1, 2, 5]
    """
    return max(1, round(layers / DEPTHS_PER_LAYER_TAKEN))


def soft_alignment(cka_PQ: Tensor, k: int) -> list[float]:
    """The index of each of Q layers, in 1-based layers of the reference. Of the k largest values those above 0 count;
    where none is, it is not a number.

    Args:
        cka_PQ: of the P layers of the reference with the Q of the other.
    """
    found = []
    for column_P in cka_PQ.double().T:
        weights, layers = column_P.nan_to_num(0.0).topk(min(k, len(column_P)))
        weights = weights.clamp(min=0)
        found.append(float((weights * (layers + 1)).sum() / weights.sum()))
    return found
