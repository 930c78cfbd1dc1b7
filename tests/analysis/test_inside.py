"""The report's part on probed models, from files as `sparsemem probe` writes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.inside.found import Found, by_seed
from analysis.inside.parts import inside
from analysis.inside.words import alignment_words, gate_words, lens_words, suppression_words
from analysis.report import summarize, write_report
from analysis.results import Results
from analysis.table import RHO

SHARES, SEEDS = {"1": 1.0, "0.5": 0.5, "dense": None}, (0, 1, 2)


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(path, index=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shares, three seeds; the lens of 0.5 lies lower by 0.2 of each layer, that of dense by 0.02 x seed."""
    write(tmp_path / "trials.csv", [trial(share, rho, seed) for share, rho in SHARES.items() for seed in SEEDS])
    (tmp_path / "study.yaml").write_text("study: probed\nanalysis: allocation\n")
    for share in SHARES:
        for seed in SEEDS:
            probes = tmp_path / "trials" / f"{share}-{seed}" / "probes"
            kl = [3.0 + seed / 100, 1.0, 0.0]
            write(
                probes / "logit_lens.csv", [{"layer": layer, "kl_final_layer": value} for layer, value in enumerate(kl)]
            )
            if share == "0.5":
                write(probes / "gates.csv", gates(seed))
                tokens = [{"token": 5, "text": "<b>", "gate 1.1": 0.25}, {"token": 6, "text": "", "gate 1.1": 1.0}]
                write(probes / "gate_text.csv", tokens)
            if share != "dense":
                write(probes / "suppression.csv", suppressed(0.5 if share == "1" else 0.1, seed))
    areas, cka, aligned = [], [], []
    for seed in SEEDS:
        for share, area in (("0.5", -0.2 - seed / 100), ("dense", 0.02 * (seed - 1))):
            first, second = ("1", share) if seed else (share, "1")  # either order
            ids = {"pair": "shares", "first_id": f"{first}-{seed}", "second_id": f"{second}-{seed}"}
            ids |= {"first_share": first, "second_share": second, "first_seed": seed, "second_seed": seed}
            areas.append(ids | {"area": area if seed else -area})
            cka += matrix(ids, 0.6 if share == "0.5" else 0.3, turned=seed == 0)
            for layer in (1, 2):
                known = {"reference_id": f"1-{seed}", "trial_id": f"{share}-{seed}", "reference_share": "1"}
                difference = layer / 10 if share == "0.5" else 0.2 * (seed - 1)
                aligned.append(known | {"share": share, "seed": seed, "layer": layer, "difference": difference})
                aligned[-1]["null"] = layer + (seed - 1) / 10
    for first, second in ((0, 1), (0, 2), (1, 2)):
        ids = {"pair": "seeds", "first_id": f"1-{first}", "second_id": f"1-{second}"}
        ids |= {"first_share": "1", "second_share": "1", "first_seed": first, "second_seed": second}
        areas.append(ids | {"area": -0.05 * second})
        cka += matrix(ids, 0.5, turned=False)
    for name, rows in (("lens_area", areas), ("cka", cka), ("alignment", aligned)):
        write(tmp_path / "probes" / f"{name}.csv", rows)
    return tmp_path


def trial(share: str, rho: float | None, seed: int) -> dict[str, object]:
    sizes = {"total_params": 1000, "active_params": 100, "tokens": 400}
    shares = {"rho": rho, "share_moe": rho or 0.0, "share_engram": 0.5 if share == "0.5" else 0.0}
    return {
        "trial_id": f"{share}-{seed}",
        "status": "finished",
        "seed": seed,
        **shares,
        **sizes,
        "val_loss": 5 - seed / 10,
    }


def matrix(ids: dict[str, object], equal: float, turned: bool) -> list[dict[str, object]]:
    """CKA of two layers of the reference with two of the other: `equal` on the diagonal, 0.1 of (1, 0) alone."""
    rows = []
    for positions in ("all", "unit_ends"):
        for one in (0, 1):
            for other in (0, 1):
                value = equal if one == other else 0.1 if one else 0.0
                layers = (other, one) if turned else (one, other)
                found = {"positions": positions, "first_layer": layers[0], "second_layer": layers[1]}
                rows.append(ids | found | {"unbiased": value})
    return rows


def gates(seed: int) -> list[dict[str, object]]:
    def row(measure: str, value: float, order: int | None = None, least: int | None = None) -> dict[str, object]:
        known = {"pool": "engram", "layer": 1, "branch": 1, "measure": measure, "order": order, "least": least}
        return known | {"most": least, "value": value, "value_low": value - 0.01, "value_high": value + 0.01}

    return [
        row("mean", 0.6 + seed / 100),
        row("part", 0.2),
        row("rank_correlation_frequency", 0.3, 2),
        row("rank_correlation_information", -0.1, 2),
        row("ends_less_elsewhere", -0.05),
        *(row("by_frequency", 0.5 + least / 10, 2, least) for least in (0, 1)),
    ]


def suppressed(increase: float, seed: int) -> list[dict[str, object]]:
    return [
        {
            "pool": "moe",
            "suppression": kind,
            "order": order,
            "least": least,
            "most": least,
            "increase": value,
            "increase_low": None if value is None else value - 0.01,
        }
        for kind, value in (("zero", increase + seed / 100), ("mean_row", None))
        for order, least in ((None, None), (2, 0), (2, 1))
    ]


def test_pairs_are_turned_so_that_the_most_experts_are_the_reference(folder: Path) -> None:
    parts = {part.heading: part for part in inside(Found(Results(folder)))}
    drawn = parts["Logit lens"].drawings[0].data
    areas = drawn[drawn["part"] == "area"].set_index("share")
    assert areas.loc["0.5", "mean"] == pytest.approx(-0.21)
    interval = stats.t.interval(0.95, 2, -0.21, stats.sem([-0.2, -0.21, -0.22]))
    assert tuple(areas.loc["0.5", ["low", "high"]]) == pytest.approx(interval, rel=1e-6)
    assert areas.loc["seeds", "most"] == pytest.approx(0.1)
    cka = parts["Which layers are alike"].drawings[0].data
    lower = cka[(cka["first_layer"] == 1) & (cka["second_layer"] == 0)]
    assert set(lower["cka"]) == {0.1}
    assert set(cka[(cka["first_layer"] == 0) & (cka["second_layer"] == 1)]["cka"]) == {0.0}


def test_words_follow_the_numbers(folder: Path) -> None:
    parts = {part.heading: part for part in inside(Found(Results(folder)))}
    lens, depth = parts["Logit lens"], parts["Effective depth"]
    assert f"at {RHO} = 0.5 predictions form earlier" in lens.sentences
    assert "dense predictions form" not in lens.sentences
    assert lens.sure
    assert f"at {RHO} = 0.5 layers stand deeper" in depth.sentences
    assert f"{RHO} = 0.5 +0.150" in depth.sentences
    assert "open further at frequent n-grams" in parts["Gates"].sentences
    assert "open less far than elsewhere" in parts["Gates"].sentences
    assert f"routed experts, {RHO} = 1: output zero +0.510" in parts["Suppression"].sentences
    for part in parts.values():
        assert part.sentences.index(".") > 40  # doubt comes first, a sentence


@pytest.mark.parametrize(("half", "seed_apart", "sure"), [(0.05, 0.1, True), (0.05, 0.3, False), (0.3, 0.1, False)])
def test_a_difference_counts_beyond_its_interval_and_beyond_what_seeds_differ_by(
    half: float, seed_apart: float, sure: bool
) -> None:
    found = {"share": "0.5", "seeds": 3, "mean": -0.2, "low": -0.2 - half, "high": -0.2 + half, "most": -0.1}
    null = {"share": "seeds", "seeds": 3, "mean": 0.1, "low": np.nan, "high": np.nan, "most": seed_apart}
    words, told = lens_words(pd.DataFrame([found, null]), "1")
    assert told is sure
    assert ("No share is told" in words) is not sure


def test_one_seed_has_no_null() -> None:
    words, sure = alignment_words(pd.DataFrame(), "1", 3, np.nan)
    assert "no second seed" in words
    assert not sure
    rows = pd.DataFrame([{"share": "0.5", "seeds": 1, "mean": -0.2, "low": np.nan, "high": np.nan, "most": -0.2}])
    words, sure = lens_words(rows, "1")
    assert "there is no interval" in words
    assert "one seed" in words
    assert not sure


def test_a_share_is_deeper_only_beyond_what_its_reference_is_off_itself(folder: Path) -> None:
    def words() -> str:
        return next(part.sentences for part in inside(Found(Results(folder))) if part.heading == "Effective depth")

    told = "at \N{GREEK SMALL LETTER RHO} = 0.5 layers stand deeper"
    assert told in words()
    path = folder / "probes" / "alignment.csv"
    rows = pd.read_csv(path)
    rows.assign(null=rows["layer"] - 0.15 * (rows["seed"] == 1)).to_csv(path, index=False)
    assert told not in words()
    assert "stands up to 0.150 off its own depth" in words()


def test_models_whose_pairs_were_not_probed_are_not_said_to_differ_in_more_than_share_or_seed() -> None:
    words, sure = lens_words(pd.DataFrame(), "0.5")
    assert "= 0.5: `sparsemem probe` of the study's folder compares" in words
    assert not sure


def test_gates_that_disagree_are_said_to() -> None:
    rows = pd.DataFrame(gates(0) + [row | {"value": -0.3, "value_low": -0.4, "value_high": -0.2} for row in gates(1)])
    words, sure = gate_words(rows.assign(series="gate"))
    assert "do not agree on frequency" in words
    assert not sure


def test_an_increase_whose_interval_holds_0_is_in_doubt() -> None:
    rows = pd.DataFrame([{"series": "a", "column": "output zero", "increase": 0.01, "increase_low": -0.01}])
    assert not suppression_words(rows)[1]


def test_only_trials_of_one_budget_are_drawn_together(folder: Path) -> None:
    trials = pd.read_csv(folder / "trials.csv")
    trials["train.lr"] = [0.1 if name == "1-2" else 0.2 for name in trials["trial_id"]]
    trials.to_csv(folder / "trials.csv", index=False)
    found = Found(Results(folder))
    assert len(found.trials) == 8
    assert found.left_out == 1
    assert "1-2" not in set(found.of_pairs("cka")[["first_id", "second_id"]].to_numpy().ravel())


def more(folder: Path, **columns: list[object]) -> pd.DataFrame:
    """The nine trials with more columns, in the order of `SHARES` and `SEEDS`."""
    trials = pd.read_csv(folder / "trials.csv").assign(**columns)
    trials.to_csv(folder / "trials.csv", index=False)
    return Found(Results(folder)).trials


def test_one_seed_is_drawn(folder: Path) -> None:
    trials = pd.read_csv(folder / "trials.csv")
    trials[trials["seed"] == 0].to_csv(folder / "trials.csv", index=False)
    for path, kept in (("lens_area", "first_seed"), ("cka", "first_seed"), ("alignment", "seed")):
        rows = pd.read_csv(folder / "probes" / f"{path}.csv").query(f"{kept} == 0")
        rows = rows[rows["pair"] == "shares"] if "pair" in rows else rows.assign(difference=None)
        rows.to_csv(folder / "probes" / f"{path}.csv", index=False)
    parts = {part.heading: part for part in inside(Found(Results(folder)))}
    assert "has one seed, so what two seeds differ by is not known" in parts["Logit lens"].sentences
    assert "no second seed with a kept model" in parts["Effective depth"].sentences


def test_each_share_may_have_a_rate_of_its_own(folder: Path) -> None:
    assert len(more(folder, **{"train.lr": [0.1] * 3 + [0.2] * 6})) == 9


@pytest.mark.parametrize("pool", ["engram", "moe"])
def test_settings_of_a_pool_are_no_seeds(folder: Path, pool: str) -> None:
    own = ["1-0", "1-1", "1-2"] if pool == "engram" else ["dense-0", "dense-1", "dense-2"]
    settings = [None] * 3 + [1, 1, 2] + [None] * 3 if pool == "engram" else [1, 2, 1, 1, 1, 1] + [None] * 3
    trials = more(folder, **{f"model.{pool}.of_each": settings})
    assert set(own) <= set(trials["trial_id"])
    assert len(trials) == 8


def test_memories_of_one_rho_are_no_seeds(folder: Path) -> None:
    trials = pd.read_csv(folder / "trials.csv")
    trials["share_ultramem"] = [0.0] * 5 + [0.5] + [0.0] * 3
    trials["share_engram"] -= trials["share_ultramem"]
    trials.to_csv(folder / "trials.csv", index=False)
    found = Found(Results(folder))
    assert found.shares == ["1", "0.5, Engram", "0.5, UltraMem", "dense"]
    parts = {part.heading: part for part in inside(Found(Results(folder)))}
    areas = parts["Logit lens"].drawings[0].data
    assert areas[areas["part"] == "area"].set_index("share")["seeds"].to_dict() == {
        "0.5, Engram": 2,
        "0.5, UltraMem": 1,
        "dense": 3,
        "seeds": 3,
    }


def test_shares_of_several_memories_are_named_with_theirs(folder: Path) -> None:
    trials = pd.read_csv(folder / "trials.csv")
    half = trials["rho"] == 0.5
    trials["share_engram"] = trials["share_ultramem"] = half * 0.25
    trials.to_csv(folder / "trials.csv", index=False)
    for path in (folder / "probes").glob("*.csv"):  # as `probe` names them
        path.write_text(path.read_text().replace(",0.5,", ",moe=0.5 engram=0.25 ultramem=0.25,"))
    parts = {part.heading: part for part in inside(Found(Results(folder)))}
    assert set(parts["Effective depth"].drawings[0].data["share"]) == {"0.5, Engram 0.25, UltraMem 0.25", "dense"}


def test_means_over_seeds_leave_out_what_is_missing() -> None:
    table = pd.DataFrame({"share": ["a", "a", "a", "b"], "value": [1.0, 3.0, np.nan, np.nan]})
    found = by_seed(table, ["share"], "value").set_index("share")
    assert tuple(found.loc["a", ["seeds", "mean", "least", "most"]]) == (2, 2.0, 1.0, 3.0)
    assert found.loc["b", "seeds"] == 0
    assert np.isnan(found.loc["b", "mean"])


def test_the_page_shows_every_part_and_text_as_text(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = pd.read_csv(folder / "trials.csv").assign(status="pending", val_loss=None)
    trials.to_csv(folder / "trials.csv", index=False)
    monkeypatch.setattr(
        "analysis.report._save", lambda drawing, folder: {"name": drawing.name, "caption": "", "inches": "1", "uri": ""}
    )
    page = write_report(folder).read_text(encoding="utf-8")
    for part in inside(Found(Results(folder))):
        assert f"<h3>{part.heading}</h3>" in page
    assert (
        '<span style="--gate: 0.25" title="0.25">&lt;b&gt;</span><span style="--gate: 1.00" title="1.00"></span>'
        in page
    )
    record = json.loads((folder / "fits.json").read_text())
    assert [each["label"] for each in record["inside"]][:3] == [
        "Logit lens",
        "Which layers are alike",
        "Effective depth",
    ]
    assert "Logit lens: A lens" in summarize(folder)


def test_a_study_without_probes_says_nothing_of_them(folder: Path) -> None:
    for path in folder.glob("trials/*/probes/*"):
        path.unlink()
    assert inside(Found(Results(folder))) == []
