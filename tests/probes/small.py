"""A small model of each pool, as if trained, and a text for it."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from sparsemem.config import Model
from sparsemem.mechanisms import MEMORY_POOLS
from sparsemem.model import Sizes, Transformer
from sparsemem.probes.sample import Sample

VOCABULARY, CONTEXT, SEPARATOR = 60, 16, 0
MEMORIES: dict[str, dict[str, Any]] = {
    "engram": {"layers": [1, 2], "orders": [2, 3], "heads": 2, "row_dim": 4},
    "ngram_embedding": {"orders": [2, 3], "heads": 2, "row_dim": 4},
    "pkm": {"layers": [2], "heads": 2, "top_m": 4, "key_dim": 8},
    "ultramem_v2": {"layers": [1, 2], "heads": 2, "top_m": 4, "key_dim": 8, "value_dim": 8, "pre_value_dim": 8},
}


def model_of(memory: str | None) -> Transformer:
    """Experts and a memory; None: dense."""
    raw = {"layers": 3, "width": 16, "heads": 2, "moe": {"expert_width": 8, "top_k": 2}}
    model = Model.model_validate(raw | ({memory: MEMORIES[memory]} if memory else {}))
    sizes = Sizes(6, 8, {memory: MEMORY_POOLS[memory].tables(model, 30)}) if memory else Sizes(0, 24)
    made = Transformer(model, sizes, CONTEXT, torch.arange(VOCABULARY) // 2, SEPARATOR)
    with torch.no_grad():  # predictions that depend on every part
        for weight in made.initialize(0).parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(weight))))
    return made.eval()


def sample_of(ids: Any, train: Any, sequences: int = 6, context: int = CONTEXT) -> Sample:
    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Sample(ids, lambda: train, tokenizer, context, SEPARATOR, sequences, None)
