from __future__ import annotations

import numpy as np
import pytest
from small import CONTEXT, VOCABULARY, sample_of

from sparsemem.probes.sample import Sample


@pytest.fixture
def sample() -> Sample:
    """Six sequences of a text whose tokens repeat, and a training text."""
    draws = np.random.default_rng(0)
    return sample_of(draws.zipf(1.5, 6 * CONTEXT + 9) % VOCABULARY, draws.zipf(1.5, 3000) % VOCABULARY)
