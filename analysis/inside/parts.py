"""The report's part "Looking inside": of each probe that was run a paragraph, a figure, and what to doubt first.

Seeds are the samples: a model is one draw, and what two seeds of one share differ by is the scale of all else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from analysis.figures.inside import (
    alignment_figure,
    cka_figure,
    frequency_figure,
    lens_figure,
    named,
    usage_figure,
)
from analysis.inside.found import Found, by_seed
from analysis.inside.words import alignment_words, cka_words, gate_words, lens_words, suppression_words, usage_words
from analysis.studies.types import Drawing, Table
from sparsemem.mechanisms import label

ZERO = "zero"
SUPPRESSED = {ZERO: "output zero", "mean_row": "mean row", "other_ngram": "another n-gram's row"}
POSITIONS = {"all": "all positions", "unit_ends": "ends of units"}


@dataclass(frozen=True)
class Part:
    """One probe."""

    heading: str
    sentences: str
    sure: bool
    drawings: list[Drawing]
    tables: tuple[Table, ...] = ()
    passages: list[Passage] = field(default_factory=list)


@dataclass(frozen=True)
class Passage:
    """A text with the gates at each token: (text, gate) each."""

    title: str
    tokens: list[tuple[str, float]]


def inside(found: Found) -> list[Part]:
    """Of a study whose models were probed; else nothing."""
    if found.trials.empty:
        return []
    parts = (_lens(found), _cka(found), _alignment(found), _gates(found), _suppression(found), _usage(found))
    return [part for each in parts for part in each]


def scope(found: Found) -> str:
    """Which models are shown."""
    least = int(found.trials.groupby("share")["seed"].nunique().min())
    told = f"{len(found.trials)} kept models were probed: {', '.join(map(named, found.shares))}"
    told += f"; {least} seed{'s' * (least > 1)} of each at least."
    if left_out := found.left_out:
        told += f" {left_out} others differ in more than share and seed; theirs are in the trials' folders only."
    return told


def _lens(found: Found) -> Iterator[Part]:
    lens, areas = found.of_trials("logit_lens"), found.of_pairs("lens_area")
    curves = by_seed(lens, ["share", "layer"], "kl_final_layer").assign(part="curve")
    tables = [curves]
    if len(areas):
        rows = _against(areas, found, "area")
        tables.append(rows.assign(part="area", layer=np.nan))
    data = pd.concat(tables, ignore_index=True)
    data = data[["part", "share", "layer", "seeds", "mean", "low", "high", "least", "most"]]
    caption = (
        "Left: what is lacking to the model's own prediction where the head reads an earlier layer through the final "
        "norm; lines are means over seeds, bands reach from the least to the most of them. Right: the area under the "
        f"curve against depth from 0 to 1, less that of {named(found.reference)} of the same seed, with its 95% "
        "interval over seeds; dashes at its side: least and most. `other seed`: two seeds of the reference."
    )
    words, sure = lens_words(data[data["part"] == "area"], found.reference)
    yield Part("Logit lens", words, sure, [Drawing("inside-lens", caption, lens_figure, data)])


def _against(areas: pd.DataFrame, found: Found, value: str) -> pd.DataFrame:
    """`by_seed` of each share less the reference, and of two seeds of the reference (share `seeds`), in size."""
    of = areas[areas["pair"] == "shares"]
    straight = of[of["first_share"] == found.reference].assign(share=lambda rows: rows["second_share"])
    turned = of[of["second_share"] == found.reference].assign(
        share=lambda rows: rows["first_share"], **{value: lambda rows: -rows[value]}
    )
    both = pd.concat([straight, turned], ignore_index=True)
    both = both.sort_values("share", key=lambda share: share.map(found.shares.index), kind="stable")
    null = areas[(areas["pair"] == "seeds") & (areas["first_share"] == found.reference)]
    null = by_seed(null.assign(share="seeds", **{value: null[value].abs()}), ["share"], value)
    null = null.assign(low=np.nan, high=np.nan)  # pairs of three seeds share models
    return pd.concat([by_seed(both, ["share"], value), null], ignore_index=True)


def _cka(found: Found) -> Iterator[Part]:
    cka = found.of_pairs("cka")
    if cka.empty:
        return
    cka = cka[(cka["first_share"] == found.reference) | (cka["second_share"] == found.reference)]
    turn = (cka["pair"] == "shares") & (cka["first_share"] != found.reference)
    ends = ["first_layer", "second_layer", "first_share", "second_share"]
    other = ["second_layer", "first_layer", "second_share", "first_share"]
    cka = pd.concat([cka[~turn], cka[turn].rename(columns=dict(zip(ends, other, strict=True)))], ignore_index=True)
    column = np.where(cka["pair"] == "seeds", "other seed", cka["second_share"].map(named))
    cka = cka.assign(column=column, row=cka["positions"].map(POSITIONS))
    mean = by_seed(cka, ["row", "column", "first_layer", "second_layer"], "unbiased").rename(columns={"mean": "cka"})
    data = mean[["row", "column", "first_layer", "second_layer", "seeds", "cka"]]
    caption = (
        f"Unbiased linear CKA of the layers of {named(found.reference)} (the reference, upward) with those of the "
        "other shares of the same seed, and of its own other seeds: mean over pairs. Contours: 0.5 (dotted), 0.7 "
        "(dashed) and 0.9. Ends of units: the last tokens of words and identifiers of several tokens."
    )
    words, sure = cka_words(data, found.reference)
    yield Part("Which layers are alike", words, sure, [Drawing("inside-cka", caption, cka_figure, data)])


def _alignment(found: Found) -> Iterator[Part]:
    table = found.of_pairs("alignment")
    if table.empty:
        return
    table = table[table["reference_share"] == found.reference]
    if table["difference"].isna().all():
        words, sure = alignment_words(pd.DataFrame(), found.reference, int(table["layer"].max()), np.nan)
        yield Part("Effective depth", words, sure, [])
        return
    data = by_seed(table, ["share", "layer"], "difference")
    whole = table.groupby(["share", "seed"], sort=False)["difference"].mean().reset_index()
    means = by_seed(whole, ["share"], "difference")
    off = (table["null"] - table["layer"]).groupby(table["seed"]).mean().abs().max()
    caption = (
        f"At which layer of {named(found.reference)} each layer of the others stands (Engram paper, eq. 9), less where "
        "the reference's own other seeds stand. Above 0: as deep as a later layer. Lines: means over seeds; dashes: "
        "least and most of them."
    )
    words, sure = alignment_words(means, found.reference, int(table["layer"].max()), off)
    yield Part("Effective depth", words, sure, [Drawing("inside-alignment", caption, alignment_figure, data)])


def _bins(table: pd.DataFrame) -> pd.DataFrame:
    """Names of bins of occurrences and their places, from `least` and `most`."""

    def name(least: float, most: float) -> str:
        if np.isnan(most):
            return f"{least:,.0f}+"
        return f"{least:.0f}" if least == most else f"{least:.0f}-{most:.0f}"

    names = [name(*each) for each in table[["least", "most"]].to_numpy(float)]
    return table.assign(bin=names, place=table["least"]).drop(columns=["least", "most"])


def _gates(found: Found) -> Iterator[Part]:
    gates = found.of_trials("gates")
    if gates.empty:
        return
    series = [
        f"{label(row['pool'])}, {named(row['share'])}, layer {row['layer']}"
        + f", branch {row['branch']}" * (row["branches"] > 1)
        for row in gates.assign(branches=gates.groupby("pool")["branch"].transform("max")).to_dict("records")
    ]
    gates = gates.assign(series=series)
    bins = _bins(gates[gates["measure"] == "by_frequency"]).assign(column="")
    data = by_seed(bins, ["order", "column", "series", "bin", "place"], "value").dropna(subset=["mean"])
    data = data.assign(label="mean gate").astype({"order": int})
    caption = (
        "Mean gate by how often the n-gram that ends at a token occurs in the training text; bands reach from the "
        "least to the most of the seeds. All layers and branches are shown."
    )
    words, sure = gate_words(gates)
    drawings = Drawing.of_any("inside-gates", caption, frequency_figure, data)
    yield Part("Gates", words, sure, drawings, (_gate_table(gates),), _passages(found))


def _gate_table(gates: pd.DataFrame) -> Table:
    """A row a layer and branch of each share: means over seeds."""
    names = {
        ("mean", 0): "mean gate",
        ("part", 0): "|gate x value| / |hidden|",
        ("rank_correlation_frequency", 2): "rank corr. with 2-gram frequency",
        ("rank_correlation_frequency", 3): "with 3-gram frequency",
        ("rank_correlation_information", 2): "with 2-gram information",
        ("rank_correlation_information", 3): "with 3-gram information",
        ("ends_less_elsewhere", 0): "ends of units less elsewhere",
    }
    rows = []
    for series, own in gates.groupby("series", sort=False):
        row = {"gate": series}
        for (measure, order), name in names.items():
            chosen = own[(own["measure"] == measure) & (own["order"].fillna(0) == order)]["value"]
            row[name] = _ranged(chosen)
        rows.append(row)
    return Table(pd.DataFrame(rows), "Mean over seeds (least to most)", wide=True)


def _ranged(values: pd.Series) -> str:
    values = values.dropna()
    if values.empty:
        return ""
    told = f"{values.mean():.3f}"
    return told if len(values) == 1 else f"{told} ({values.min():.3f} to {values.max():.3f})"


def _passages(found: Found) -> list[Passage]:
    """The same passage under every gate of the first seed of each share."""
    texts, passages = found.of_trials("gate_text"), list[Passage]()
    for share, table in texts.groupby("share", sort=False) if len(texts) else ():
        first = table[table["seed"] == table["seed"].min()]
        for name in [name for name in first if name.startswith("gate ") and first[name].notna().all()]:
            layer, branch = name.removeprefix("gate ").split(".")
            tokens = list(zip(first["text"].fillna(""), first[name], strict=True))
            passages.append(Passage(f"{named(str(share))}, layer {layer}, branch {branch}", tokens))
    return passages


def _suppression(found: Found) -> Iterator[Part]:
    table = found.of_trials("suppression")
    table = table.dropna(subset="increase") if len(table) else table
    if table.empty:
        return
    series = [f"{label(row['pool'])}, {named(row['share'])}" for row in table.to_dict("records")]
    table = table.assign(series=series, column=table["suppression"].map(SUPPRESSED))
    bins = _bins(table.dropna(subset="order"))
    data = by_seed(bins, ["order", "column", "series", "bin", "place"], "increase").dropna(subset=["mean"])
    data = data.assign(label="loss increase\n(nats/token)").astype({"order": int})
    caption = (
        "What the loss rises by where a pool is suppressed in the trained model, by how often the n-gram before the "
        "target occurs in the training text; bands reach from the least to the most of the seeds. Routed experts, "
        "dropped to the shared ones, give the scale."
    )
    words, sure = suppression_words(table[table["order"].isna()])
    drawings = Drawing.of_any("inside-suppression", caption, frequency_figure, data)
    whole = [
        {"pool": name, "suppression": kind, "increase (nats/token)": _ranged(own["increase"])}
        for (name, kind), own in table[table["order"].isna()].groupby(["series", "column"], sort=False)
    ]
    yield Part("Suppression", words, sure, drawings, (Table(pd.DataFrame(whole), "Over all tokens"),))


def _usage(found: Found) -> Iterator[Part]:
    table = found.of_trials("usage")
    if table.empty:
        return
    table = table.assign(series=[f"{label(row['pool'])}, {named(row['share'])}" for row in table.to_dict("records")])
    even, shared = table[table["table"].isna()], table[table["table"].notna()]
    data = pd.concat(
        [
            even.assign(part="even", value=even["evenness"], random=np.nan),
            shared.assign(part="shared", value=shared["shared"], random=shared["shared_random"]),
        ],
        ignore_index=True,
    )[["part", "series", "seed", "layer", "value", "random"]]
    caption = (
        "Left: entropy of the reads over experts or rows, over its largest value (1: all are read as often). Right: "
        "the share of the distinct n-grams of the text that share their row with another one, a point a table; on the "
        "line: as many as if they were thrown at random."
    )
    words, sure = usage_words(even, shared)
    yield Part("Use of experts and rows", words, sure, [Drawing("inside-usage", caption, usage_figure, data)])
