"""What the probes say in sentences, what is to be doubted first. Each function returns the words and whether its main
finding may be quoted: an interval over seeds that leaves out 0, beyond what two seeds of one share differ by.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.figures.inside import DENSE, named

FEW = 3
"""Seeds below which an interval over them is too wide to tell much."""
SEEDS = "seeds"
Words = tuple[str, bool]


def lens_words(areas: pd.DataFrame, reference: str) -> Words:
    """
    Args:
        areas: share (`seeds`: two seeds of the reference, in size), seeds, mean, low, high, most.
    """
    lens = (
        "A lens without a translator is biased in early layers, and a difference between architectures may be a change "
        "of basis"
    )
    if areas.empty:
        return (
            f"{lens}. No curves are compared with those of {named(reference)}: `sparsemem probe` of the study's folder "
            "compares shares of one seed and seeds of one share, where more than one model is kept.",
            False,
        )
    others, null = areas[areas["share"] != SEEDS], areas[areas["share"] == SEEDS]
    doubts = [lens, *_few(others)]
    if null.empty:
        doubts.append(f"{named(reference)} has one seed, so what two seeds differ by is not known")
    told = [f"{named(row['share'])} {_signed(row)}" for row in others.to_dict("records")]
    apart = _beyond(others, null)
    control = others["share"].eq(DENSE) & others["mean"].lt(0)
    found = (
        f"Area under KL(final || layer), less that of {named(reference)} of the same seed, nats/token: {_and(told)}."
    )
    if len(null):
        found += f" Two seeds of {named(reference)} differ by up to {null['most'].iloc[0]:.3f}."
    found += _verdict(apart, "predictions form", "earlier", "later")
    if apart and control.any():
        found += " The dense model's lie earlier too, without any memory: that alone is no sign of memory."
    return f"{_sentence(doubts)} {found}", bool(apart)


def alignment_words(means: pd.DataFrame, reference: str, layers: int, off: float) -> Words:
    """
    Args:
        means: share, seeds, mean, low, high; of the mean over layers of the index less its null.
        layers: of a model.
        off: how far a seed of the reference stands, by its other seeds, off its own depth: mean over layers, in size;
            the largest of all seeds.
    """
    doubt = (
        "Pairs of shares have one seed, with it their shared weights at the start and the order of the text, which the "
        "null's two seeds have not; the nulls of all seeds share models, so intervals are too narrow; CKA can miss "
        "what a function needs, and an index of few layers is coarse"
    )
    if means.empty:
        return (
            f"{named(reference)} has no second seed with a kept model, so the index has no null and says nothing: "
            "train one (`vary: {seed: [0, 1]}`).",
            False,
        )
    apart = _beyond(means, pd.DataFrame({"most": [off]}))
    told = [f"{named(row['share'])} {_signed(row)}" for row in means.to_dict("records")]
    found = (
        f"Layers that a share saves: the soft alignment index in {named(reference)} less that of the reference's own "
        f"other seeds, mean over the {layers} layers: {_and(told)}. By that null a seed of {named(reference)} itself "
        f"stands up to {off:.3f} off its own depth."
    )
    found += _verdict(apart, "layers stand", "less deep", "deeper")
    return f"{_sentence([doubt, *_few(means)])} {found}", bool(apart)


def cka_words(data: pd.DataFrame, reference: str) -> Words:
    """
    Args:
        data: row (positions), column (share or `other seed`), first_layer, second_layer, seeds, cka.
    """
    same = data[data["first_layer"] == data["second_layer"]]
    means = same.groupby(["row", "column"], sort=False)["cka"].mean()
    told = []
    for row in dict.fromkeys(same["row"]):
        parts = [
            f"{column} {means[row, column]:.3f}" for column in dict.fromkeys(same["column"]) if (row, column) in means
        ]
        told.append(f"at {row}, {_and(parts)}")
    null = "other seed" in set(same["column"])
    doubts = [
        "Positions of a sequence depend on each other, CKA can be moved by a few tokens far from the others, and "
        "models of one seed are alike by their shared weights at the start, as two seeds are not"
    ]
    doubts += [] if null else [f"{named(reference)} has one seed, so how alike two seeds are is not known"]
    return (
        f"{_sentence(doubts)} Mean CKA of equal layers with {named(reference)}: {'; '.join(told)}. "
        + ("A share that lies below `other seed` differs by more than a seed does." if null else ""),
        null,
    )


def gate_words(gates: pd.DataFrame) -> Words:
    """
    Args:
        gates: series, measure, order, value, value_low, value_high, one row a seed.
    """
    told = []
    for series, own in gates.groupby("series", sort=False):
        mean, part = (own[own["measure"] == name]["value"].mean() for name in ("mean", "part"))
        told.append(f"{series}: mean gate {mean:.2f}, letting in {part:.0%} of the hidden state's size")
    frequency = gates[gates["measure"] == "rank_correlation_frequency"].dropna(subset=["value_low"])
    up = (frequency["value_low"] > 0).all() if len(frequency) else False
    down = (frequency["value_high"] < 0).all() if len(frequency) else False
    ends = gates[gates["measure"] == "ends_less_elsewhere"].dropna(subset=["value_low"])
    sentence = "; ".join(told) + "."
    if len(frequency):
        reach = f"{frequency['value'].min():+.2f} to {frequency['value'].max():+.2f}"
        word = (
            "open further at frequent n-grams"
            if up
            else "open further at rare n-grams"
            if down
            else "do not agree on frequency"
        )
        sentence += f" Over all gates and seeds they {word} (rank correlation {reach})."
    if len(ends):
        opened, closed = (ends["value_low"] > 0).all(), (ends["value_high"] < 0).all()
        word = "further" if opened else "less far" if closed else "not consistently further"
        reach = f"{ends['value'].min():+.3f} to {ends['value'].max():+.3f}"
        sentence += f" At ends of units of several tokens they open {word} than elsewhere ({reach})."
    doubt = (
        "A gate starts half open and says nothing of the size of what it lets in; intervals are over sequences, not "
        "over seeds."
    )
    return f"{doubt} {sentence}", bool(up or down)


def suppression_words(whole: pd.DataFrame) -> Words:
    """
    Args:
        whole: series, column, suppression, increase, increase_low over all tokens, one row a seed.
    """
    told = []
    for series, own in whole.groupby("series", sort=False):
        kinds = [f"{kind} {part['increase'].mean():+.3f}" for kind, part in own.groupby("column", sort=False)]
        told.append(f"{series}: {', '.join(kinds)}")
    doubt = (
        "A model is suppressed that was trained with what it now lacks, so an increase mixes what a pool knows with "
        "the shock of a missing input: compare the three kinds, and the experts."
    )
    sure = bool(len(whole) and (whole["increase_low"] > 0).all())
    return f"{doubt} Loss increase over all tokens, nats/token, mean over seeds: {'; '.join(told)}.", sure


def usage_words(even: pd.DataFrame, shared: pd.DataFrame) -> Words:
    """
    Args:
        even: series, evenness, coverage of each layer; `shared` likewise shared and shared_random of each table.
    """
    told = [
        f"{series}: {own['coverage'].mean():.0%} of the entries read, evenness {own['evenness'].mean():.2f}"
        for series, own in even.groupby("series", sort=False)
    ]
    sentence = f"Of the probed text, which is short: {'; '.join(told)}."
    if len(shared):
        excess = shared["shared"] - shared["shared_random"]
        sentence += (
            f" {shared['shared'].mean():.1%} of the distinct n-grams share their row with another one, where throwing "
            f"them at random would make it {shared['shared_random'].mean():.1%}; the hash is off that by at most "
            f"{excess.abs().max():.1%}."
        )
    return sentence, True


# --- parts of sentences -----------------------------------------------------------------------------------------------


def _few(table: pd.DataFrame) -> list[str]:
    least = int(table["seeds"].min()) if len(table) else 0
    if least >= FEW:
        return []
    width = "intervals are wide" if least > 1 else "there is no interval"
    return [f"with {least} seed{'s' * (least != 1)} a share, {width}"]


def _beyond(table: pd.DataFrame, null: pd.DataFrame) -> list[tuple[str, float]]:
    """Shares whose interval leaves out 0 and whose mean is beyond what two seeds of the reference differ by."""
    least = float(null["most"].iloc[0]) if len(null) else 0.0
    return [
        (row["share"], row["mean"])
        for row in table.to_dict("records")
        if (row["low"] > 0 or row["high"] < 0) and round(abs(row["mean"]) - least, 6) > 0
    ]


def _verdict(apart: Sequence[tuple[str, float]], what: str, below: str, above: str) -> str:
    """`below` and `above` say what a difference below and above 0 means."""
    if not apart:
        return " No share is told from the reference beyond what seeds differ by."
    parts = [f"at {named(share)} {what} {below if mean < 0 else above}" for share, mean in apart]
    return f" Beyond that, {_and(parts)}."


def _signed(row: dict[str, Any]) -> str:
    if not np.isfinite(row["low"]):
        return f"{row['mean']:+.3f}"
    return f"{row['mean']:+.3f} (95% over seeds {row['low']:+.3f} to {row['high']:+.3f})"


def _sentence(parts: Sequence[str]) -> str:
    text = "; ".join(parts)
    return text[0].upper() + text[1:] + "."


def _and(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else "none"
