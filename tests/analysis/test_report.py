"""The report of a study: complete, self-contained, the same bytes again, honest about what is missing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest

from analysis import AnalysisError, fit_allocation, load_curves, load_trials, split_cells, summarize, write_report
from analysis.__main__ import main
from analysis.figures.allocation import allocation_figure, differences_figure
from analysis.figures.curves import curves_data, curves_figure
from analysis.results import Results
from analysis.studies import analyse
from analysis.studies.allocation import Allocation, allocation_data, differences_data

New = Callable[..., Path]


class Page(HTMLParser):
    """Text and addresses of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_study_leaves_fits_figures_and_a_page_that_needs_no_network(study: Path) -> None:
    report = write_report(study)
    assert report == study / "report.html"
    assert sorted(path.name for path in (study / "figures").iterdir()) == sorted(
        f"{name}.{suffix}"
        for name in ("allocation", "differences", "curves", "diagnostics")
        for suffix in ("svg", "png", "csv")
    )
    page = Page(report.read_text())
    assert page.addresses
    assert all(address.startswith(("#", "data:", "https://arxiv.org/abs/")) for address in page.addresses)
    assert not re.search(r"url\(|@import|https?://(?!arxiv.org/abs/)", re.sub(r"data:[^\"]*", "", report.read_text()))
    for part in (
        "Which share of the sparse parameters",
        "What this cannot tell",
        "000000000007",
        "beta 2.0",
        "31% of its held-out 4-grams",
        "Training tokens: 500k (3.7 for each activated parameter)",
    ):
        assert part in page.text


def test_the_fits_are_recorded_with_status_rows_and_provenance(new_study: New) -> None:
    folder = new_study(tokens=(500_000, 2_000_000))
    write_report(folder)
    record = json.loads((folder / "fits.json").read_text())
    *own, over_all = record["fits"]
    assert [fit["cell"] for fit in own] == [{"budget.tokens": 500_000}, {"budget.tokens": 2_000_000}]
    assert over_all["over"] == "All budgets"
    assert over_all["factors"] == ["tokens_per_active_param"]
    assert len(over_all["rows"]) == 32
    assert [round(fit["tokens_per_active_param"], 1) for fit in own] == [3.7, 14.8]
    for fit in own:
        assert fit["status"] == "converged"
        assert len(fit["rows"]) == 16
        assert fit["argmin"]["low"] < 0.36
        assert fit["argmin"]["high"] > 0.34
    assert {"trials_csv_sha256", "numpy", "scipy"} <= set(record["provenance"])


@pytest.mark.slow
@pytest.mark.figures
def test_the_same_ledger_gives_the_same_bytes_whatever_the_users_style(study: Path) -> None:
    write_report(study)
    first = {
        path.name: path.read_bytes()
        for path in [*(study / "figures").iterdir(), study / "fits.json", study / "report.html"]
    }
    with matplotlib.rc_context({"lines.linewidth": 9, "font.family": "serif", "savefig.dpi": 50}):
        write_report(study)
        assert matplotlib.rcParams["lines.linewidth"] == 9
    assert first == {
        path.name: path.read_bytes()
        for path in [*(study / "figures").iterdir(), study / "fits.json", study / "report.html"]
    }


def test_failures_are_listed_and_their_messages_are_text(new_study: New) -> None:
    folder = new_study(statuses={3: "out_of_memory", 9: "diverged", 11: "pending"}, dense=True)
    diverged = next(row for row in load_trials(folder).to_dict("records") if row["status"] == "diverged")
    (folder / "trials" / diverged["trial_id"] / "result.json").write_text('{"why": "the loss of step 7 is nan"}')
    html = write_report(folder).read_text()
    assert "<b>12 GB</b>" not in html
    assert "the loss of step 7 is nan" in html
    page = Page(html)
    assert "<b>12 GB</b> asked for" in page.text
    assert "15 of 18 trials finished" in page.text
    assert "diverged" in page.text


@pytest.mark.parametrize("unfinished", [range(3, 16), range(16)])
def test_a_study_in_progress_has_a_report_with_a_status(new_study: New, unfinished: range) -> None:
    folder = new_study(statuses=dict.fromkeys(unfinished, "pending"))
    (folder / "data.json").unlink()
    assert "too_few_points" in Page(write_report(folder).read_text()).text
    assert json.loads((folder / "fits.json").read_text())["fits"][0]["status"] == "too_few_points"


def test_the_choice_of_the_learning_rate_is_told(new_study: New) -> None:
    folder = new_study(rates={0.005: 0.02, 0.01: 0.0})
    assert "Learning rate chosen per share" in Page(write_report(folder).read_text()).text
    assert (
        "chosen per share" in json.loads((folder / "fits.json").read_text())["fits"][0]["conventions"]["learning_rate"]
    )


def test_the_summary_says_optimum_interval_and_shift(new_study: New) -> None:
    lines = summarize(write_report(new_study(tokens=(500_000, 2_000_000))).parent).splitlines()
    assert lines[0] == "32 of 32 trials finished."
    assert re.match(r"500k training tokens: The loss is least at a share of 0\.3\d \(95% interval", lines[1])
    assert "no movement can be told from noise" in lines[3]


def test_the_summary_of_a_boundary_optimum_claims_no_interior_one(new_study: New) -> None:
    text = summarize(write_report(new_study(loss=lambda share: 4 + 0.1 * share)).parent)
    assert "No minimum inside" in text
    assert "no_interior_minimum" in text


@pytest.mark.slow
@pytest.mark.figures
def test_fifty_trials_take_less_than_ten_seconds(new_study: New) -> None:
    folder = new_study(tokens=(500_000, 2_000_000), seeds=3, dense=True)
    start = time.process_time()  # of this process alone: other work on the machine is not counted
    write_report(folder)
    assert time.process_time() - start < 10


# --- figures ----------------------------------------------------------------------------------------------------------


def test_the_figure_draws_exactly_its_table(new_study: New) -> None:
    trials = load_trials(new_study(dense=True))
    fitted = [(cell, fit_allocation(cell.trials, resamples=100)) for cell in split_cells(trials)]
    data = allocation_data(fitted)
    axes = allocation_figure(data).axes[0]
    drawn = {tuple(np.round(line.get_xydata(), 9).ravel()) for line in axes.lines}
    for series in ("curve", "mean"):
        table = data[data["series"] == series]
        assert tuple(np.round(table[["share", "loss"]].to_numpy(), 9).ravel()) in drawn
    runs = data[data["series"] == "run"]
    assert sorted(runs["trial_id"]) == sorted(trials[trials["rho"].notna()]["trial_id"])
    for _, own in runs.groupby("seed"):
        assert tuple(np.round(own[["share", "loss"]].to_numpy(dtype=float), 9).ravel()) in drawn
    assert "nats/token" in axes.get_ylabel()
    assert "share" in axes.get_xlabel()


def test_an_optimum_in_doubt_is_drawn_as_such(new_study: New) -> None:
    (cell,) = split_cells(load_trials(new_study(seeds=1)))
    figure = allocation_figure(allocation_data([(cell, fit_allocation(cell.trials, resamples=100))]))
    assert any("too few points" in text.get_text() for text in figure.legends[0].get_texts())


def test_differences_and_curves_hold_every_share_once(new_study: New) -> None:
    folder = new_study(tokens=(500_000, 2_000_000))
    fitted = [(cell, fit_allocation(cell.trials, resamples=50)) for cell in split_cells(load_trials(folder))]
    differences = differences_data(fitted)
    assert differences.groupby("cell").size().tolist() == [8, 8]
    assert differences[differences["rho"] == 1]["difference"].tolist() == [0, 0]
    assert len(differences_figure(differences).axes[0].containers) == 2
    curves = curves_data([cell for cell, _ in fitted], load_curves(folder))
    assert curves.groupby(["cell", "quantity", "rho"]).size().unique().tolist() == [8]
    assert (curves["seeds"] == 2).all()
    assert len(curves_figure(curves).axes) == 4


# --- command ----------------------------------------------------------------------------------------------------------


def test_the_command_writes_reports_and_prints_the_reading(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(study)]) == 0
    printed = capsys.readouterr()
    assert "The loss is least at a share of 0.3" in printed.out
    assert "report.html" in printed.err


def test_the_command_over_several_studies_writes_their_index(
    new_study: New, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unfinished = dict.fromkeys(range(16), "pending")
    assert main([str(new_study("one", statuses=unfinished)), str(new_study("two", statuses=unfinished))]) == 0
    assert f"index: {tmp_path / 'index.html'}" in capsys.readouterr().err
    assert main([str(tmp_path / "one")]) == 0
    assert "index" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda record: None, "No such file"),
        (lambda record: {**record, "remarks": None}, "field `remarks` is missing or damaged"),
        (lambda record: {**record, "readings": [{"label": "", "sure": True}]}, "field `readings`"),
        (lambda record: [record], "field `counts`"),
    ],
)
def test_a_summary_of_a_report_that_is_not_whole_is_refused(
    new_study: New, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    folder = write_report(new_study(statuses=dict.fromkeys(range(16), "pending"))).parent
    record = change(json.loads((folder / "fits.json").read_text()))
    (folder / "fits.json").unlink() if record is None else (folder / "fits.json").write_text(json.dumps(record))
    with pytest.raises(AnalysisError, match=f"{words}.*; run `python -m analysis "):
        summarize(folder)


def test_the_command_refuses_what_is_no_study(tmp_path: Path, study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nothing")]) == 2
    assert "nothing/study.yaml: no such file; give the results folder of a study" in capsys.readouterr().err
    for wrong in (study / "report.html", study.with_name(f"{study.name}s")):
        (study / "report.html").touch()
        assert main([str(wrong)]) == 2
        assert f"which holds study.yaml and trials.csv; did you mean {study}?" in capsys.readouterr().err
    (study / "study.yaml").write_text("study: [")
    assert main([str(study)]) == 2
    assert "study.yaml: cannot be read" in capsys.readouterr().err
    (study / "study.yaml").unlink()
    with pytest.raises(AnalysisError, match=r"study.yaml: no such file"):
        write_report(study)


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        (
            "study.yaml",
            lambda text: text.replace("data:\n", "data: text\nother:\n"),
            "field `data` has the value 'text'; fields belong there",
        ),
        (
            "study.yaml",
            lambda text: text.replace("vary:\n", "vary: [1]\nother:\n"),
            r"field `vary` has the value \[1\]; a grid or a list",
        ),
        ("study.yaml", lambda text: text + "analysis: [ladder]\n", r"field `analysis` has the value \['ladder'\]"),
        ("study.yaml", lambda text: text + "analysis: laddder\n", "'laddder'; known: allocation"),
        ("data.json", lambda text: text[:99], "cannot be read as JSON"),
        ("data.json", lambda text: "[]", "not the manifest of a corpus"),
        (
            "data.json",
            lambda text: text.replace("131072", '"many"'),
            "field `validation_tokens` has the value 'many'; a number",
        ),
        ("data.json", lambda text: text.replace("0.31", '"x"'), "field `4` has the value 'x'; a number"),
        (
            "trials.csv",
            lambda text: text[: len(text) // 2],
            "trials.csv: trial 000000000007 is finished but its val_loss is not a number",
        ),
        ("trials/000000000003/curve.csv", lambda text: text[:-20], "000000000003.curve.csv: its last line is cut off"),
        (
            "trials/000000000003/curve.csv",
            lambda text: text.replace("train_loss", "train_los"),
            r"`train_loss` \(is it `train_los`\?\)",
        ),
        (
            "trials/000000000003/curve.csv",
            lambda text: text.replace("31250,", "many,"),
            "000000000003.curve.csv: line 2, column `tokens` holds",
        ),
        ("trials/000000000003/val_losses.csv", lambda text: text[:500], "000000000003.val_losses.csv"),
    ],
)
def test_the_command_names_what_is_wrong_with_a_damaged_study(
    study: Path, capsys: pytest.CaptureFixture[str], path: str, change: Callable[[str], str], message: str
) -> None:
    (study / path).write_text(change((study / path).read_text()))
    assert main([str(study)]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_neither_torch_nor_ray_is_imported(study: Path) -> None:
    code = (
        "import sys, analysis.report; analysis.report.write_report(sys.argv[1]); print(sorted({'torch', 'ray'} & "
        "set(sys.modules)), sorted(name for name in sys.modules if name.startswith('sparsemem.') and "
        "name.split('.')[1] not in ('accounting', 'config', 'files', 'locks', 'mechanisms', 'results', 'trial_files', "
        "'values')))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(study)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] []"


def test_blank_columns_of_an_unfinished_study_survive_the_table(new_study: New) -> None:
    trials = load_trials(new_study(statuses=dict.fromkeys(range(16), "pending")))
    assert isinstance(trials["val_loss"].dtype, np.dtype)
    assert pd.isna(trials["val_loss"]).all()


def test_diagnostics_and_the_optimum_draw_their_tables(new_study: New) -> None:
    drawings = {
        drawing.name: drawing for drawing in analyse(Results(new_study(tokens=(500_000, 2_000_000)))).drawings()
    }
    errors, figure = drawings["diagnostics"].data, drawings["diagnostics"].figure
    residuals = errors[errors["series"] == "residual"]
    assert len(residuals) == 16
    assert set(errors["law"][errors["series"] == "left out"]) == {"quadratic", "cubic", "two-power", "akima"}
    assert len(figure.axes) == 4  # two cells; residuals and left-out shares
    drawn = np.array(figure.axes[0].lines[1].get_xydata())
    assert np.allclose(drawn, residuals[["share", "error"]].iloc[:8])
    optimum = drawings["optimum-tokens_per_active_param"].data
    assert (optimum["series"] == "curve").sum() == 2
    law = optimum[optimum["series"] == "law"]
    assert (law["low"] <= law["high"]).all()
    assert law["value"].iloc[-1] == pytest.approx(4 * law["value"].iloc[0])


def test_the_report_says_where_the_bytes_of_the_text_went_and_how_often_it_was_read(study: Path) -> None:
    text = {"total": 1000, "train": 880, "validation": 100, "unused": {"near-copies": 20}}
    manifest = json.loads((study / "data.json").read_text()) | {"text": text, "train_tokens": 100_000}
    (study / "data.json").write_text(json.dumps(manifest))
    page = write_report(study).read_text()
    assert (
        "Of 1,000 bytes of text 880 were trained on and 100 held out (10.0%), 20 were not used (20 near-copies)."
        in page
    )
    times = load_trials(study)["tokens"].max() / 100_000
    assert f"Trials read their text up to {times:.3g} times" in page
    (study / "data.json").write_text(json.dumps(manifest | {"text": {"total": "many"}}))
    with pytest.raises(AnalysisError, match="field `text`"):
        write_report(study)


@pytest.mark.parametrize(
    ("batches", "laws"),
    [
        ({500_000: (512,), 2_000_000: (1024,)}, ["All budgets"]),
        (
            dict.fromkeys((500_000, 2_000_000), (512, 1024)),
            [f"All budgets, train.batch_tokens {batch}" for batch in (512, 1024)],
        ),
    ],
)
def test_a_batch_that_grows_with_the_tokens_belongs_to_the_budget(
    new_points: Callable[..., Path], batches: dict[int, tuple[int, ...]], laws: list[str]
) -> None:
    points = [
        {"rho": share, "share_moe": share, "share_engram": 1 - share, "tokens": tokens, "budget.tokens": tokens}
        | {"train.batch_tokens": batch, "loss": 4 + 0.2 * (share - 0.4) ** 2}
        for tokens, own in batches.items()
        for batch in own
        for share in (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)
    ]
    study = Allocation(Results(new_points("allocation", points)))
    assert [label for label, _, _ in study.joint] == laws
    assert ("train.batch_tokens: another value at each budget" in " ".join(study.caveats())) == (len(laws) == 1)
