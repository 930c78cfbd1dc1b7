"""The best of many scores.

Shape letters: N scores, M of them that are wanted, X candidates among which they are.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparsemem.kernels import REFERENCE

NUMPY_THREADS = 4
"""With more, torch's topk, which takes them all, is faster than numpy, which takes one."""
SHORT = 128
"""Scores that numpy sorts without leaving the registers, measured on AVX-512."""


def topk(scores_N: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(..., N) -> the largest scores and their places, (..., M), best first: those of `topk`, but that of equal ones it
    may take others.

    What is not a number comes first or last, by its sign; only a trial that diverges has any.

    Args:
        count: M; at most N are found.
    """
    count = min(count, scores_N.shape[-1])
    if (
        REFERENCE
        or scores_N.device.type != "cpu"
        or scores_N.dtype != torch.float32
        or torch.get_num_threads() > NUMPY_THREADS
    ):
        values_M, places_M = scores_N.topk(count)
        return values_M, places_M
    places_M = _places(scores_N, count)
    return scores_N.gather(-1, places_M), places_M


def _places(scores_N: Tensor, count: int) -> Tensor:
    """By numpy, which sorts short lists with vector instructions, where torch's topk moves one pair of value and place
    at a time.
    """
    N, half = scores_N.shape[-1], scores_N.shape[-1] // 2
    if N <= SHORT or half <= count:
        return _sorted_places(scores_N)[..., :count]
    # The best are among as many pairs of the largest larger member, and the one that has no partner.
    pairs_M = _places(torch.maximum(scores_N[..., :half], scores_N[..., half : 2 * half]), count)
    rest_X = torch.arange(2 * half, N).expand(*pairs_M.shape[:-1], -1)
    candidates_X = torch.cat((pairs_M, pairs_M + half, rest_X), -1)
    return candidates_X.gather(-1, _sorted_places(scores_N.gather(-1, candidates_X))[..., :count])


def _sorted_places(scores_N: Tensor) -> Tensor:
    """Places in falling order of the scores, of equal ones the first first, zero before minus zero.

    Score and place are sorted as one integer, the score's bits above: those of a float rise with it, once a negative
    one's are flipped.
    """
    bits_N = scores_N.numpy().view(np.int32)
    rising_N = bits_N ^ ((bits_N >> 31) & 0x7FFFFFFF)
    both_N = np.left_shift(~rising_N, 32, dtype=np.int64) | np.arange(scores_N.shape[-1])
    both_N.sort()
    return torch.from_numpy(both_N & 0xFFFFFFFF)
