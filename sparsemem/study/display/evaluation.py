"""A kept model's losses on a text, for people. It must not know studies, engines or torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsemem.study.text import size, table

MOST_DOCUMENTS = 20


def describe_evaluation(found: Mapping[str, Any]) -> str:
    """What `train.text_loss.evaluate` returns, as a line and two tables."""
    documents, ngrams = found["documents"], found["ngrams"]
    error = "" if found["loss_se"] is None else f" +- {found['loss_se']:.4f}"
    left = found["tokens"] - 1 - found["scored"]
    lines = [
        f"trial {found['trial_id']}: loss {found['loss']:.6f}{error} nats/token, {_number(found['bits_per_byte'])} "
        "bits per byte",
        f"{len(documents)} document{'s' * (len(documents) != 1)}, {size(found['bytes'])}, {found['tokens']:,} tokens, "
        f"{found['scored']:,} of them scored" + f"; {left:,} fill no sequence or are no targets" * (left > 0),
        *found["remarks"],
    ]
    longest = sorted(documents, key=lambda each: -each["tokens"])[:MOST_DOCUMENTS]
    more = len(documents) - len(longest)
    lines += ["", table(["document", *_MEASURED], [[each["name"], *_measured(each)] for each in longest])]
    lines += [f"and {more} shorter ones, which --json lists"] if more else []
    if ngrams:
        rows = [[f"{each['order']}-gram", _occurrences(each), *_measured(each)] for each in ngrams if each["tokens"]]
        lines += [
            "",
            "by how often the n-gram before a token, which a memory reads there, occurs in the training text:",
            table(["n-gram", "occurrences", *_MEASURED], rows),
        ]
    return "\n".join(lines)


_MEASURED = ("tokens", "nats/token", "bits/byte")


def _measured(part: Mapping[str, Any]) -> list[str]:
    return [f"{part['tokens']:,}", _number(part["loss"]), _number(part["bits_per_byte"])]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _occurrences(part: Mapping[str, Any]) -> str:
    least, most = part["least"], part["most"]
    if least is None:
        return "no n-gram yet"
    if most is None:
        return f"{least:,} or more"
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"
