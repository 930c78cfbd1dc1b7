"""What a model asks of a layer of any mechanism."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from sparsemem.layers.usage import Usage
from sparsemem.memory.table import MemoryTable

Listener = Callable[[Tensor, Tensor, Mapping[str, Tensor]], object]
"""Is told of the rows that are read, what is let in, and the noted means."""


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
        self.listener: Listener | None = None
        self._usage: Usage | None = None

    def reads(self) -> Iterator[tuple[nn.Parameter, int]]:
        """Each parameter of which a token reads only some entries of the first dimension, and how many; by default a
        row a table.
        """
        return ((module.rows_RC, len(module.first_H)) for module in self.modules() if isinstance(module, MemoryTable))

    def end_step(self) -> None:
        """Called after every update."""

    def note(self, rows_A: Tensor, output: Tensor, *, gated: Tensor | None = None, **means: Tensor) -> None:
        """Log what evaluation reads, see `Usage.add`, and tell the `listener`; in training a layer does not call it.

        Args:
            rows_A: numbers of the rows, or experts, that each token reads, over all tables.
            output: what the layer adds.
            gated: what its gate lets in, before anything else is done to it; None: the output.
            means: of a layer with a gate, `gate_mean` is that gate, (B, T, branches) between 0 and 1.
        """
        if self.rows:
            self._usage = self._usage or Usage(self.rows)
            self._usage.add(rows_A, output, **means)
        if self.listener is not None:
            self.listener(rows_A, output if gated is None else gated, means)

    def without(self, x_BTD: Tensor, tokens_BT: Tensor) -> Tensor:
        """What it would return without its sparse parameters, of the same arguments as `forward`: by default, nothing
        is added.
        """
        return x_BTD.new_zeros(x_BTD.shape)

    def ngrams(self, tokens_BT: Tensor) -> tuple[Tensor, tuple[int, ...]] | None:
        """Of tables whose rows follow from token ids alone: the ids that a token and those before it have in the hash,
        (B, T, N), and how many of them each table reads; None where rows depend on more, or are no n-gram's.
        """
        return None

    def usage(self) -> dict[str, Any]:
        """What evaluation read since the last call, which is then forgotten.

        Returns:
            `coverage`, the share of rows that were read; `kl_uniform`, the divergence of reads over rows from the
            uniform distribution, in nats; `output_std`; and the means that the layer notes. Means are not a number
            where nothing was read.
        """
        usage, self._usage = self._usage or Usage(self.rows), None
        return usage.summary()
