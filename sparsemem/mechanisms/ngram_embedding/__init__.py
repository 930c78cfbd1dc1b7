"""Hashed n-grams added to the vocabulary embedding (OverEncoding, arXiv 2501.16975; amplified as in LongCat, arXiv
2601.21204).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, StrictBool, model_validator

from sparsemem.accounting import Account
from sparsemem.mechanisms.hashed import Hashed, Order, refuse_unless_rising
from sparsemem.mechanisms.mechanism import MemoryFields, Placed, Vocabulary
from sparsemem.values import Real, Size, SmallCount

if TYPE_CHECKING:
    from sparsemem.config import Model
    from sparsemem.model import Sizes


class NgramEmbedding(MemoryFields):
    """Hashed n-grams added to the vocabulary embedding (OverEncoding, arXiv 2501.16975; amplified as in LongCat, arXiv
    2601.21204).
    """

    orders: tuple[Order, ...] = (2, 3)
    """Lengths of the suffix n-grams."""
    heads: SmallCount = 4
    """Tables an order, each with a prime number of rows of its own and a projection to the model's width."""
    row_dim: Size = 8
    """Width of one row."""
    amplify: Literal["none", "scale", "norm"] = "none"
    """So that the n-grams are not drowned in the residual stream: the sum times the root of the width, or
    its RMS norm.
    """
    reset_at_document_end: StrictBool = True
    """n-grams do not reach across document separators."""
    init_std: Annotated[Real, Field(ge=0)] = 0.02
    """Standard deviation of the rows at the start."""

    @model_validator(mode="after")
    def _rising(self) -> NgramEmbedding:
        refuse_unless_rising(self, "orders")
        return self


class NgramEmbeddingMechanism(Hashed):
    """One module, before the first block."""

    name, label, fields = "ngram_embedding", "n-gram embedding", NgramEmbedding
    published_slope = -0.0256  # OverEncoding's 2-gram table on OLMoE-1.3B

    def account(self, model: Model, sizes: Sizes) -> Account:
        from sparsemem.mechanisms.ngram_embedding.layer import ngram_embedding_account

        return ngram_embedding_account(model, sizes.of(self.name)[0])

    def build(self, model: Model, sizes: Sizes, vocabulary: Vocabulary) -> Iterator[Placed]:
        from sparsemem.mechanisms.ngram_embedding.layer import NgramEmbeddingLayer

        layer = NgramEmbeddingLayer(model, sizes.of(self.name)[0], len(vocabulary.canonical), vocabulary.separator)
        yield Placed(0, "embedding", "ngrams", layer)


NGRAM_EMBEDDING = NgramEmbeddingMechanism()
