"""Where the bytes of a text went, as a record and in words. It must not know tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsemem.data.selection import Selection


def accounts(total: int, text: Selection, validation: int) -> dict[str, Any]:
    """Where the bytes of a text went: `total`, `train`, `validation` and `unused` by reason.

    Args:
        total: of all text, also what was not read.
        validation: held out in the end.
    """
    train, held = sum(len(kept.text) for kept in text.train), sum(len(kept.text) for kept in text.validation)
    unused = {
        "copies": text.exact,
        "near-copies": text.near + text.near_held_out,
        "over validation_tokens": held - validation,
    }
    unused["over max_bytes"] = total - train - validation - sum(unused.values())
    reasons = {reason: size for reason, size in unused.items() if size > 0}
    return {"total": total, "train": train, "validation": validation, "unused": reasons}


def describe_text(manifest: Mapping[str, Any]) -> str:
    """What became of a text, in words: of a manifest, or of one without `train_tokens` where no tokens are made yet."""
    text, tokens = manifest["text"], "train_tokens" in manifest
    unused = text["unused"]
    reasons = ", ".join(f"{size:,} {reason}" for reason, size in unused.items())
    return (
        f"{text['total']:,} bytes of text: {text['train']:,} to train on"
        + (f" ({manifest['train_tokens']:,} tokens)" if tokens else "")
        + f", {text['validation']:,} held out ({text['validation'] / text['total']:.1%}"
        + (f", {manifest['validation_tokens']:,} tokens" if tokens else "")
        + f"), {sum(unused.values()):,} unused"
        + (f" ({reasons})" if reasons else "")
    )
