"""Where documents end inside a sequence, for what must not read across.

Shape letters: B sequences, T positions, D width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def documents(tokens_BT: Tensor, separator: int) -> Tensor:
    """Number of each position's document in its sequence, (B, T); a separator belongs to the document that it ends."""
    ends_BT = tokens_BT == separator
    return ends_BT.cumsum(1) - ends_BT.long()


def earlier(x: Tensor, back: int, documents_BT: Tensor | None) -> Tensor:
    """What stood `back` positions (1 to T - 1) before each of (B, T, ..., D); 0 before the sequence or, given
    documents, in another one.
    """
    before, widths = x[:, :-back], x.ndim - 2
    if documents_BT is not None:
        same_BT = documents_BT[:, :-back] == documents_BT[:, back:]
        before = before * same_BT.view(*same_BT.shape, *[1] * widths)
    return F.pad(before, (*[0, 0] * widths, back, 0))
