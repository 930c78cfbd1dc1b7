"""The page over several studies: where it stands, what it says of each, links that lead somewhere."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from analysis import AnalysisError, write_index, write_report
from analysis.__main__ import main

New = Callable[..., Path]


def test_each_study_has_its_question_status_and_first_sentence(new_study: New, tmp_path: Path) -> None:
    folders = [new_study("one"), new_study("two", loss=lambda share: 4 + 0.1 * share, statuses={3: "diverged"})]
    for folder in folders:
        write_report(folder)
    index = write_index([*folders, folders[0] / ".." / "one"])
    assert index == tmp_path / "index.html"
    html = index.read_text()
    links = re.findall(r'href="([^"#]*)"', html)
    assert set(links) == {"one/report.html", "two/report.html"}
    assert all((index.parent / link).is_file() for link in links)
    one, two = re.findall(r"<article>.*?</article>", html, re.S)
    assert "The loss is least at a share of 0.3" in one
    assert "Statistically tied" not in one  # one sentence; the report has the others
    assert "In doubt" not in one
    assert "In doubt" in two
    assert html.count('<img src="data:image/svg+xml;base64,') == 2
    for part in (
        "16 of 16",
        "15 of 16",
        "converged",
        "no interior minimum",
        "1.24M",
        "135k",
        "500k",
        "<h1>2 studies</h1>",
    ):
        assert part in html


def test_studies_of_different_folders_meet_in_the_folder_above(new_study: New, tmp_path: Path) -> None:
    folders = [new_study("here/one"), new_study("there/deep/two", statuses=dict.fromkeys(range(16), "pending"))]
    for folder in folders:
        write_report(folder)
    index = write_index(folders)
    assert index == tmp_path / "index.html"
    assert 'href="there/deep/two/report.html"' in index.read_text()


def test_the_same_reports_give_the_same_bytes(study: Path) -> None:
    write_report(study)
    assert write_index([study]).read_bytes() == write_index([str(study)]).read_bytes()


def test_a_study_without_a_report_is_refused_with_the_command(study: Path) -> None:
    with pytest.raises(
        AnalysisError, match=r"fits.json: not the record of a report .*; run `python -m analysis .*one-budget`"
    ):
        write_index([study])
    (study / "fits.json").write_text('{"study"')
    with pytest.raises(AnalysisError, match=r"fits.json: not the record"):
        write_index([study])
    with pytest.raises(AnalysisError, match="at least one study"):
        write_index([])


def test_a_table_in_place_of_a_folder_is_refused_with_what_to_type(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "losses.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit) as refused:
        main(["allocation", str(tmp_path / "losses.csv")])
    assert refused.value.code == 2
    assert f"python -m analysis fit --law LAW {tmp_path / 'losses.csv'}" in capsys.readouterr().err
