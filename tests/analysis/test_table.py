"""A results folder as tables: types, pairing, and errors that name the file and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import (
    AnalysisError,
    average_differences,
    format_table,
    load_curves,
    load_sequence_losses,
    load_trials,
    paired_differences,
    split_cells,
    write_report,
)
from analysis.table import varied_fields

New = Callable[..., Path]


def rewrite(folder: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    path = folder / "trials.csv"
    change(pd.read_csv(path, dtype=str)).to_csv(path, index=False)


def test_trials_are_typed_and_unfinished_ones_kept(new_study: New) -> None:
    trials = load_trials(new_study(statuses={2: "pending", 3: "diverged"}, dense=True))
    assert len(trials) == 18
    assert trials["val_loss"].isna().sum() == 2
    assert trials["rho"].isna().sum() == 2
    assert trials["trial_id"].iloc[1] == "000000000001"
    assert trials.dtypes[["val_loss", "seed"]].tolist() == [np.dtype(float), np.dtype(int)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda frame: frame.rename(columns={"val_loss": "valloss"}),
            r"trials.csv: column `val_loss` \(is it `valloss`\?\)",
        ),
        (lambda frame: pd.concat([frame, frame.iloc[:1]]), "trial id 000000000000 stands in several rows"),
        (lambda frame: frame.assign(val_loss="low"), "line 2, column `val_loss` holds 'low'"),
        (lambda frame: frame.assign(status="done"), "'done'; known: finished"),
        (lambda frame: frame.assign(val_loss=None), "its val_loss is not a number"),
        (lambda frame: frame.assign(seed=None), "has no seed"),
        (lambda frame: frame.iloc[:0], "holds no trial"),
    ],
)
def test_a_damaged_table_is_refused_by_name(
    study: Path, change: Callable[[pd.DataFrame], pd.DataFrame], message: str
) -> None:
    rewrite(study, change)
    with pytest.raises(AnalysisError, match=message):
        load_trials(study)


@pytest.mark.parametrize(
    ("content", "message"), [("", "is empty"), ('a,b\n"1,2\n3,4\n', "cannot be read as CSV"), (None, "no such file")]
)
def test_a_file_that_is_no_table_is_refused(study: Path, content: str | None, message: str) -> None:
    (study / "trials.csv").unlink()
    if content is not None:
        (study / "trials.csv").write_text(content)
    with pytest.raises(AnalysisError, match=message):
        load_trials(study)


def test_curves_of_all_that_ended_stand_beside_their_trials(new_study: New) -> None:
    curves = load_curves(new_study(statuses={0: "diverged", 1: "pending", 2: "failed"}))
    assert curves["trial_id"].nunique() == 14
    assert {"rho", "seed", "val_loss", "final_val_loss"} <= set(curves.columns)


def test_other_held_out_sequences_are_refused(study: Path) -> None:
    path = study / "trials" / "000000000003" / "val_losses.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(AnalysisError, match=r"000000000003/val_losses.csv: not the 64 held-out sequences"):
        load_sequence_losses(study)


def test_each_text_has_held_out_sequences_of_its_own(new_points: New) -> None:
    both = [
        {"rho": share, "share_moe": share, "loss": 4 + (share - 0.4) ** 2, "data.vocab_size": vocabulary}
        for vocabulary in (300, 400)
        for share in (1.0, 0.75, 0.5, 0.25, 0.0)
    ]
    folder = new_points("allocation", both)
    for trial_id in load_trials(folder).query("`data.vocab_size` == 400")["trial_id"]:
        path = folder / "trials" / trial_id / "val_losses.csv"
        path.write_text("\n".join(path.read_text().splitlines()[:-8]) + "\n")
    losses = load_sequence_losses(folder)
    assert losses.notna().sum().value_counts().to_dict() == {64: 10, 56: 10}
    for cell in split_cells(load_trials(folder)):
        assert (paired_differences(cell.trials, losses)["difference_se"] > 0).all()
    write_report(folder)


def test_differences_are_paired_by_seed_and_by_sequence(study: Path) -> None:
    trials, losses = load_trials(study), load_sequence_losses(study)
    differences = paired_differences(trials, losses)
    assert len(differences) == 14
    row = differences.iloc[0]
    by_sequence = losses[row["trial_id"]] - losses[row["reference_id"]]
    assert row["difference"] == pytest.approx(by_sequence.mean(), abs=1e-9)
    assert row["difference_se"] == pytest.approx(by_sequence.std() / 8)
    assert (
        row["difference_se"] < losses[row["trial_id"]].std() / 8 / 3
    )  # pairing takes off what a sequence gives to both
    averages = average_differences(differences).set_index("rho")
    own = differences[differences["rho"] == 0.4]["difference"]
    assert averages.loc[0.4, "difference"] == pytest.approx(own.mean())
    assert averages.loc[0.4, "se_seeds"] == pytest.approx(abs(own.iloc[0] - own.iloc[1]) / 2)


def test_a_seed_without_pure_experts_has_no_difference(new_study: New) -> None:
    differences = paired_differences(load_trials(new_study(statuses={0: "diverged"})))
    assert set(differences["seed"]) == {1}
    assert differences["difference_se"].isna().all()


def test_budgets_are_cells_and_the_dense_baseline_stands_apart(new_study: New) -> None:
    found = split_cells(load_trials(new_study(tokens=(500_000, 2_000_000), dense=True)))
    assert [cell.label for cell in found] == ["500k training tokens", "2M training tokens"]
    assert [(len(cell.trials), len(cell.dense)) for cell in found] == [(16, 2), (16, 2)]


def test_a_trial_that_does_not_use_a_field_stands_in_every_cell(study: Path) -> None:
    def two_memories(frame: pd.DataFrame) -> pd.DataFrame:
        wide = frame.assign(**{"model.engram.row_dim": np.where(frame["rho"] == "1.0", None, "8")})
        other = wide[wide["rho"] != "1.0"].assign(
            **{"model.engram.row_dim": "16", "trial_id": lambda inner: "x" + inner["trial_id"]}
        )
        return pd.concat([wide, other])

    rewrite(study, two_memories)
    found = split_cells(load_trials(study))
    assert [cell.label for cell in found] == ["model.engram.row_dim 8", "model.engram.row_dim 16"]
    assert [sorted(set(cell.trials["rho"])) for cell in found] == [
        sorted({1.0, 0.9, 0.75, 0.6, 0.4, 0.2, 0.1, 0.0})
    ] * 2


def test_the_learning_rate_is_chosen_per_share_over_shared_seeds(new_study: New) -> None:
    folder = new_study(rates={0.005: 0.2, 0.01: 0.0})

    def unbalanced(frame: pd.DataFrame) -> pd.DataFrame:
        # Share 0.4: the better rate has seed 0 only, and seed 1 of the other rate is far too good to be compared with
        # it.
        here = (frame["rho"] == "0.4") & (frame["seed"] == "1")
        frame.loc[here & (frame["train.lr"] == "0.005"), "val_loss"] = "1.0"
        return frame[~(here & (frame["train.lr"] == "0.01"))]

    rewrite(folder, unbalanced)
    (cell,) = split_cells(load_trials(folder))
    assert set(cell.trials["train.lr"]) == {0.01}
    assert len(cell.trials) == 15
    chosen = cell.rates[cell.rates["rho"] == 0.4]
    assert chosen["seeds"].tolist() == [1, 1]
    assert chosen["chosen"].tolist() == [False, True]


def test_every_table_has_its_tokens_for_each_active_parameter(new_study: New) -> None:
    folder = new_study(tokens=(500_000, 2_000_000))
    trials = load_trials(folder)
    assert "tokens_per_active_param" not in pd.read_csv(folder / "trials.csv")
    assert trials["tokens_per_active_param"].tolist() == (trials["tokens"] / trials["active_params"]).tolist()
    assert varied_fields(trials) == ["budget.tokens"]  # it sets no cells apart of its own
    heading, _, first, *_ = format_table(trials).splitlines()
    assert "tokens/P_act" in heading
    assert f"{trials['tokens_per_active_param'].iloc[0]:.3g}" in first.split()


def test_the_terminal_table_is_aligned_and_names_units(new_study: New) -> None:
    text = format_table(load_trials(new_study(tokens=(500_000, 2_000_000), dense=True, statuses={1: "out_of_memory"})))
    lines = text.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len(lines) == 2 + 36
    for heading in ("val loss (nats/token)", "P_tot", "tokens/s", "peak (GB)"):
        assert heading in lines[0]
    assert "out of memory" in lines[3]
    assert "dense" in text
    assert "1.24M" in text
