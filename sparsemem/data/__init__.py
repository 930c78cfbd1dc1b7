"""Text to batches: which text (`corpus`, `selection`), tokens (`tokenizer`, `canonical`), once (`prepare`), in which
order (`batches`).
"""

from sparsemem.data.batches import Batches, Tokens, validation_windows
from sparsemem.data.prepare import prepare

__all__ = ["Batches", "Tokens", "prepare", "validation_windows"]
