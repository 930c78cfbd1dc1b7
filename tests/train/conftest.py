"""A corpus of 260 tokens with something to learn in it, and a trial that trains in a fraction of a second."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsemem.config import Trial

VOCABULARY, SEPARATOR, CONTEXT, BATCH, TOKENS = 260, 0, 16, 128, 2010  # 15 whole batches and 90 tokens of a sixteenth

BASE: dict[str, Any] = {
    "data": {"vocab_size": VOCABULARY, "context": CONTEXT, "validation_tokens": 1000},
    "model": {
        "layers": 2,
        "width": 16,
        "heads": 2,
        "moe": {"expert_width": 8, "top_k": 2},
        "engram": {"layers": [2], "orders": [2, 3], "heads": 2, "row_dim": 4},
    },
    "budget": {"total_params": 12_000, "active_params": 6_000, "tokens": TOKENS, "tolerance": 0.05},
    "train": {"batch_tokens": BATCH, "lr": 0.01, "warmup": 0.1, "evaluations": 4},
}


def text(seed: int, length: int) -> np.ndarray:
    """Documents in which a token mostly follows its predecessor by a fixed step; a separator now and then."""
    draws = np.random.Generator(np.random.PCG64(seed)).random((length, 2))
    ids = np.empty(length, np.uint16)
    last = 1
    for i, (kind, jump) in enumerate(draws.tolist()):
        last = (
            SEPARATOR if kind < 0.02 else 1 + int(jump * 40) if kind < 0.2 or last == SEPARATOR else 1 + last * 7 % 41
        )
        ids[i] = last
    return ids


def write_tokens(folder: Path, digest: str = "a corpus") -> Path:
    """A prepared corpus as `data.Tokens.load` reads it."""
    folder.mkdir()
    canonical = np.arange(VOCABULARY) // 2
    val = text(1, 1000)
    val_bytes = np.where(val == SEPARATOR, 0, val % 5 + 1).astype(np.int64)
    for name, array in {"train": text(0, 3000), "val": val, "val_bytes": val_bytes, "canonical": canonical}.items():
        np.save(folder / f"{name}.npy", array)
    manifest = {
        "vocab_size": VOCABULARY,
        "separator_id": SEPARATOR,
        "canonical_size": int(canonical.max()) + 1,
        "digest": digest,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests kill loops, not machines; flushing to a busy disk after every step would take most of their time."""
    monkeypatch.setattr("os.fsync", lambda handle: None)


@pytest.fixture(scope="session")
def tokens_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("corpus") / "tokens")


@pytest.fixture
def other_tokens_folder(tmp_path: Path) -> Path:
    """The same tokens under another digest."""
    return write_tokens(tmp_path / "other", digest="another corpus")


@pytest.fixture
def make_trial() -> Callable[..., Trial]:
    """The small trial; `group={field: value}` changes fields of a group, other keywords fields of the trial."""

    def make(rho: Any = 0.5, seed: int = 0, **groups: dict[str, Any]) -> Trial:
        raw = {name: group | groups.get(name, {}) for name, group in BASE.items()}
        return Trial.model_validate(raw | {"rho": rho, "seed": seed})

    return make


MEMORIES: dict[str, dict[str, Any]] = {
    "ngram_embedding": {"heads": 2, "row_dim": 4, "amplify": "norm"},
    "pkm": {"layers": [2], "heads": 2, "top_m": 4, "key_dim": 4},
    "memory_plus": {"layers": [1, 2], "placement": "parallel", "heads": 1, "top_m": 4, "key_dim": 4, "value_dim": 8},
    "peer": {"layers": [2], "heads": 2, "top_m": 4, "key_dim": 4},
    "ultramem": {"layers": [1], "skip": 1, "top_m": 4, "key_dim": 4, "value_dim": 8},
    "ultramem_v2": {"top_m": 4, "key_dim": 4, "value_dim": 8, "pre_value_dim": 8},
}


@pytest.fixture(params=MEMORIES)
def memory_trial(request: pytest.FixtureRequest) -> Trial:
    """The small trial with half of its sparse parameters in one kind of memory, each kind in turn."""
    raw = BASE | {"model": BASE["model"] | {"engram": None, request.param: MEMORIES[request.param]}}
    raw |= {"budget": BASE["budget"] | {"total_params": 24_000, "active_params": 10_000}}
    return Trial.model_validate(raw | {"shares": {"moe": 0.5, request.param: 0.5}})
