"""What a model asks of a layer of any mechanism."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from sparsemem.layers.usage import Usage
from sparsemem.memory.table import MemoryTable


class SparseLayer(nn.Module):
    """A layer with sparse parameters.

    Its `forward` takes what it is fed, (B, T, D), and raw token ids (B, T), and returns what it adds, (B, T, D), or the
    pair of that and a weighted auxiliary loss, a scalar or None.
    """

    imbalance = math.nan
    """Largest load over the mean one in the last step, for the log; 1 is perfect balance."""

    def __init__(self, rows: int = 0) -> None:
        """`rows`: of all its tables, whose use is logged; 0: nothing is."""
        super().__init__()
        self.rows = rows
        self._usage: Usage | None = None

    def reads(self) -> Iterator[tuple[nn.Parameter, int]]:
        """Each parameter of which a token reads only some entries of the first dimension, and how many; by default a
        row a table.
        """
        return ((module.rows_RC, len(module.first_H)) for module in self.modules() if isinstance(module, MemoryTable))

    def end_step(self) -> None:
        """Called after every update."""

    def note(self, rows_A: Tensor, output: Tensor, **means: Tensor) -> None:
        """Log what evaluation reads, see `Usage.add`; in training a layer does not call it."""
        self._usage = self._usage or Usage(self.rows)
        self._usage.add(rows_A, output, **means)

    def usage(self) -> dict[str, Any]:
        """What evaluation read since the last call, which is then forgotten.

        Returns:
            `coverage`, the share of rows that were read; `kl_uniform`, the divergence of reads over rows from the
            uniform distribution, in nats; `output_std`; and the means that the layer notes. Means are not a number
            where nothing was read.
        """
        usage, self._usage = self._usage or Usage(self.rows), None
        return usage.summary()
