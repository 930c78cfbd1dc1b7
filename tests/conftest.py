"""What every test may rely on."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _torch_as_it_starts() -> Iterator[None]:
    """The same draws each time; and a timed training step flushes denormals for its whole thread: give the next test
    the arithmetic that it expects.
    """
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
    yield
    if torch := sys.modules.get("torch"):
        torch.set_flush_denormal(False)
