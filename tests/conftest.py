"""What every test may rely on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _ordinary_floats() -> Iterator[None]:
    """A timed training step flushes denormals for its whole thread: give the next test the arithmetic that
    it expects.
    """
    yield
    import sys

    if torch := sys.modules.get("torch"):
        torch.set_flush_denormal(False)
