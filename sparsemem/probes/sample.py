"""The text that a trial's probes read, cut into sequences, and what is known of each position: how often the n-gram
that ends there occurs in the training text, its pointwise mutual information, and whether a unit of several tokens ends
there.

Shape letters: N tokens of the text, S sequences, T positions, P positions in all sequences (S x T), V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from torch import Tensor

from sparsemem.data import validation_windows
from sparsemem.data.ngrams import occurrences_in
from sparsemem.data.units import ends_of_units
from sparsemem.train.kept import KeptModel
from sparsemem.train.text_loss import LEAST

Ids = npt.NDArray[Any]
Counts = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass
class Sample:
    """The first sequences of a text. What follows from it is found once, on first use."""

    ids: Ids
    """[N]; the targets of the last sequence are among them."""
    train: Callable[[], Ids | None]
    """Tokens of the training text; None where the cache no longer has it."""
    tokenizer: Tokenizer
    context: int
    separator: int
    sequences: int
    unscored_after: int | None
    _occurrences: dict[int, Counts] = field(default_factory=dict)

    @classmethod
    def of(cls, kept: KeptModel, ids: Ids, train: Callable[[], Ids | None], sequences: int) -> Sample:
        """
        Args:
            sequences: at most.
        """
        data = kept.trial.data
        count = min(sequences, (len(ids) - 1) // data.context)
        unscored = kept.separator_id if data.mask_document_start else None
        return cls(ids, train, kept.tokenizer, data.context, kept.separator_id, count, unscored)

    @cached_property
    def windows(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets, (S, T) each, as in training; targets below 0 do not count."""
        return validation_windows(self.ids, self.context, self.sequences, self.unscored_after)

    @property
    def positions(self) -> int:
        return self.sequences * self.context

    @cached_property
    def sequence_P(self) -> Counts:
        """Number of each position's sequence."""
        return np.repeat(np.arange(self.sequences), self.context)

    def sums(self, *values_P: npt.NDArray[Any]) -> list[npt.NDArray[np.float64]]:
        """Of each sequence, (S,) each."""
        return [each.reshape(self.sequences, -1).sum(1, dtype=np.float64) for each in values_P]

    @cached_property
    def unit_ends_P(self) -> Mask:
        """Where a unit of several tokens ends, see `ends_of_units`."""
        return ends_of_units(self.ids[: self.positions + 1], self.tokenizer)[: self.positions]

    @property
    def knows_training(self) -> bool:
        return self._train is not None

    @cached_property
    def _train(self) -> Ids | None:
        return self.train()

    def occurrences_P(self, order: int) -> Counts:
        """How often the n-gram that ends at each position occurs in the training text; -1 where none does within its
        document and sequence.
        """
        if order not in self._occurrences:
            assert self._train is not None
            counts_P = occurrences_in(self._train, self.ids[: self.positions], order, self.separator)
            counts_P[np.arange(self.positions) % self.context < order - 1] = -1
            self._occurrences[order] = counts_P
        return self._occurrences[order]

    def information_P(self, order: int) -> npt.NDArray[np.float64]:
        """Pointwise mutual information of that n-gram in the training text, log p(n-gram) / product of p(token), nats;
        not a number where it does not occur there.
        """
        assert self._train is not None
        counts_P, total = self.occurrences_P(order), len(self._train)
        with np.errstate(divide="ignore", invalid="ignore"):
            single_P = np.log(self.occurrences_P(1) / total)
            found_P = np.log(counts_P / total)
            for back in range(order):
                found_P[back:] -= single_P[: len(single_P) - back]
        return np.where(counts_P > 0, found_P.round(9), np.nan)  # equal ones stay equal, whatever was added up first

    def bins(self, order: int) -> Iterator[tuple[int, int | None, Mask]]:
        """Least and most occurrences (None: no limit), and which positions lie there."""
        counts_P = self.occurrences_P(order)
        for least, below in zip(LEAST, (*LEAST[1:], math.inf), strict=True):
            yield least, None if below == math.inf else int(below) - 1, (counts_P >= least) & (counts_P < below)
