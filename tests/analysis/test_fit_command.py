"""`python -m analysis fit` and the tables that it reads: every law, both outputs, figures, and refusals that say what
to do.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import AnalysisError, fit_power, fit_slots, read_table
from analysis.__main__ import main
from analysis.columns import is_finished
from analysis.fit_command import LAWS


def runs() -> pd.DataFrame:
    """A table that has a column for every law."""
    rng = np.random.default_rng(0)
    n, d = (x.ravel() for x in np.meshgrid(np.geomspace(2e7, 2e9, 6), np.geomspace(5e8, 2e11, 6)))
    loss = (1.7 + 400 * n**-0.34 + 410 * d**-0.28) * np.exp(0.005 * rng.standard_normal(36))
    frame = pd.DataFrame(
        {"trial_id": [f"t{i}" for i in range(36)], "params": n, "tokens": d, "flops": 6 * n * d, "loss": loss}
    )
    return frame.assign(
        unique_tokens=np.minimum(d, 5e9),
        bits=np.tile([4, 8, 16], len(d) // 3),
        experts=np.repeat(2.0 ** np.arange(6), 6),
        seed=np.repeat([0, 1], 18),
        mechanism=np.tile(np.repeat(["engram", "pkm", "peer"], 6), 2),
        memory_rows=np.tile(4.0 ** np.arange(6), 6),
        val_loss=3 - 0.02 * np.tile(np.arange(18), 2) + 0.01 * rng.standard_normal(36),
    )


def one_length() -> pd.DataFrame:
    """`runs` as a study of rows has them."""
    return runs().drop(columns="tokens")


def shares(*tokens: float) -> pd.DataFrame:
    """36 runs over the share of routed experts, two seeds at each of these budgets."""
    each = 18 // len(tokens)
    x, d, seed = (
        np.tile(np.linspace(0, 1, each), 2 * len(tokens)),
        np.repeat(tokens, 2 * each),
        np.tile(np.repeat([0, 1], each), len(tokens)),
    )
    loss = 3 + 0.2 * (x - 0.4) ** 2 + 0.02 * seed + 0.003 * np.random.default_rng(0).standard_normal(36)
    sizes = {"total_params": 1.0e9, "active_params": 1.0e8}
    return pd.DataFrame({"share_moe": x, "tokens": d, "seed": seed, "val_loss": loss, **sizes}).assign(
        trial_id=[f"t{i}" for i in range(36)]
    )


def sizes() -> pd.DataFrame:
    """36 runs of three mechanisms at six sizes, two seeds each, 20 tokens for each parameter."""
    rng = np.random.default_rng(0)
    active = np.tile(np.repeat(1e7 * 4.0 ** np.arange(6), 2), 3)
    better = np.repeat([0.0, 0.05, 0.1], 12)
    return pd.DataFrame(
        {
            "mechanism": np.repeat(["dense", "engram", "experts"], 12),
            "active_params": active,
            "tokens": 20 * active,
            "flops": 120 * active**2,
            "loss": 1.8 + (1 - better) * (120 * active**2 / 1e18) ** -0.15 + 0.003 * rng.standard_normal(36),
            "seed": np.tile([0, 1], 18),
        }
    ).assign(trial_id=[f"t{i}" for i in range(36)])


WRITERS: dict[str, Callable[[pd.DataFrame, Path], object]] = {
    "csv": lambda frame, path: frame.to_csv(path, index=False),
    "parquet": lambda frame, path: frame.to_parquet(path),
    "jsonl": lambda frame, path: frame.to_json(path, orient="records", lines=True),
}


NO_SHARES = (
    LAWS["allocation-joint"]
    .example.replace("share_moe", "seed")
    .replace("total_params", "params")
    .replace("active_params", "params")
    .split()
)


@pytest.fixture
def table(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """`runs`, or where the test has a law the table that it needs."""
    law = request.node.callspec.params.get("law") if hasattr(request.node, "callspec") else None
    path = tmp_path / "runs.csv"
    own = {"allocation": lambda: shares(1e6), "allocation-joint": lambda: shares(1e6, 4e6), "slots": one_length}
    (own | {"scaling": sizes}).get(law, runs)().to_csv(path, index=False)
    return path


@pytest.mark.parametrize("law", LAWS)
def test_the_example_of_every_law_fits(law: str, table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["fit", "--law", law, str(table), *LAWS[law].example.split()]
    assert main([*command, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert {"law", "status", "parameters", "objective", "rows", "conventions"} <= set(record)
    assert len(record["rows"]) == 36
    for each in record["parameters"].values():
        assert {"value", "low", "high", "se"} == set(each)
    assert main([*command, "--interval", "0.5"]) == 0
    printed = capsys.readouterr().out
    assert record["status"] in printed.splitlines()[0]
    assert ("50% low" in printed) == bool(record["parameters"])
    assert "95%" not in printed
    rows = {line.split("  ")[0]: line.split() for line in printed.splitlines()}
    narrower = [
        float(rows[name][-2]) - float(rows[name][-3]) < each["high"] - each["low"]
        for name, each in record["parameters"].items()
    ]
    assert all(narrower)


def test_a_fit_keeps_its_level_whatever_is_asked_later() -> None:
    frame = runs()
    wide, narrow = (
        fit_power(frame, x="flops", loss="loss", floor=False, resamples=200, level=level) for level in (None, 0.5)
    )
    assert narrow.parameters["alpha"].high < wide.parameters["alpha"].high
    assert narrow.parameters["alpha"].se == wide.parameters["alpha"].se
    bands = [fit.predict(1e20) for fit in (wide, narrow)]
    assert bands[1]["high"].iloc[0] < bands[0]["high"].iloc[0]
    assert "50% interval" in narrow.summary()
    assert narrow.conventions["interval"].startswith("50% percentile")
    assert narrow.drawn()["high"].max() <= wide.drawn()["high"].max()
    with pytest.raises(AnalysisError, match="an interval of level 95 cannot be made"):
        fit_power(frame, x="flops", loss="loss", level=95)


def test_words_end_in_an_aligned_table(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", "--law", "chinchilla", str(table), "--n", "params", "--d", "tokens", "--loss", "loss"])
    lines = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("parameter"))
    assert [line.split()[0] for line in lines[head + 1 :]] == ["E", "A", "B", "alpha", "beta"]
    assert len({len(line) for line in lines[head:]}) == 1


@pytest.mark.parametrize("law", ["allocation", "allocation-joint", "slots", "scaling"])
def test_a_fit_of_a_study_comes_with_its_data_too(law: str, table: Path, tmp_path: Path) -> None:
    assert (
        main(["fit", "--law", law, str(table), *LAWS[law].example.split(), "--figure", str(tmp_path / "fit.svg")]) == 0
    )
    series = set(pd.read_csv(tmp_path / "fit.csv")["series"])
    assert (
        series
        >= {
            "allocation": {"run", "mean", "curve", "optimum"},
            "allocation-joint": {"curve", "law"},
            "slots": {"run", "mean", "line", "slope"},
            "scaling": {"run", "mean", "curve"},
        }[law]
    )


@pytest.mark.parametrize(
    ("more", "law", "message"),
    [
        ([], "scaling", "law scaling needs --reference NAME"),
        (["--reference", "dens"], "scaling", "no run is of the reference `dens`; did you mean"),
        (["--reference", "dense"], "slots", "law slots has no --reference"),
    ],
)
def test_a_law_that_compares_needs_its_reference(
    more: list[str], law: str, message: str, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = LAWS[law].example.replace("--reference dense ", "").split()
    assert main(["fit", "--law", law, str(table), *example, *more]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_a_figure_comes_with_its_data(suffix: str, table: Path, tmp_path: Path) -> None:
    figure = tmp_path / f"fit.{suffix}"
    assert main(["fit", "--law", "power", str(table), "--x", "flops", "--loss", "loss", "--figure", str(figure)]) == 0
    first = figure.read_bytes()
    assert len(first) > 1000
    assert set(pd.read_csv(tmp_path / "fit.csv")["series"]) == {"run", "curve"}
    main(["fit", "--law", "power", str(table), "--x", "flops", "--loss", "loss", "--figure", str(figure)])
    assert figure.read_bytes() == first


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--law", "chinchilla", "--n", "params", "--loss", "loss"],
            "law chinchilla needs --d; for example: --n params",
        ),
        (["--law", "power", "--x", "flops", "--loss", "loss", "--seed", "seed"], "law power has no --seed"),
        (["--law", "power", "--x", "flop", "--loss", "loss"], "`flop` (is it `flops`?)"),
        (["--law", "power", "--x", "flops", "--loss", "loss", "--figure", "fit.pdf"], "a figure is .svg or .png"),
        (["--law", "allocation-joint", *NO_SHARES, "--figure", "fit.svg"], "nothing to draw"),
    ],
)
def test_refusals_say_what_to_do(
    arguments: list[str], words: str, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", str(table), *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert words in printed.err


def test_a_figure_never_overwrites_a_table(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["fit", "--law", "power", str(table), "--x", "flops", "--loss", "loss", "--figure"]
    before = table.read_bytes()
    (tmp_path / "other.csv").write_text("my,own\n1,2\n")
    for name, words in (
        ("runs.PNG", "would be written over the table"),
        ("other.svg", "is no such table"),
        ("none/fit.svg", "no folder"),
    ):
        assert main([*command, str(tmp_path / name)]) == 2
        assert words in capsys.readouterr().err
    assert table.read_bytes() == before
    assert (tmp_path / "other.csv").read_text() == "my,own\n1,2\n"
    assert not list(tmp_path.glob("*.svg"))


def test_a_status_that_nobody_finished_is_told(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pd.read_csv(table).assign(status="crashed").to_csv(table, index=False)
    assert main(["fit", "--law", "power", str(table), "--x", "flops", "--loss", "loss"]) == 2
    assert "36 of 36 rows, whose `status` says crashed (36)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("heading", "words"),
    [
        ("status", ("finished", "Finished", " FINISHED ", "done", "Completed", "TERMINATED")),
        ("State", ("finished", "crashed", "running", "failed", "", "finished")),
    ],
)
def test_rows_left_out_are_counted_and_told(
    heading: str, words: tuple[str, ...], table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = pd.read_csv(table).assign(**{heading: np.tile(words, 6)})
    frame["loss"] = frame["loss"].astype(object)
    frame.loc[[5, 6], "loss"] = ["diverged", "inf"]  # lines 7 and 8
    frame.to_csv(table, index=False)
    command = ["fit", "--law", "chinchilla", str(table), *LAWS["chinchilla"].example.split()]
    assert main([*command, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    lost = (
        []
        if heading == "status"
        else ["Left out: 24 of 36 rows, whose `status` says crashed (6), failed (6), nothing (6), running (6)"]
    )
    assert [each.partition(":")[0] + ":" + each.split(":")[1] for each in record["left_out"]] == [
        *lost,
        "Left out: 2 of 36 rows, whose `loss` is no number",
    ]
    assert len(record["rows"]) == 36 - 2 - 24 * len(lost)
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert all(each in printed for each in record["left_out"])


def test_a_fit_from_python_tells_which_rows_it_leaves_out() -> None:
    frame = runs().drop(columns="trial_id").assign(status=["FINISHED"] * 30 + ["KILLED"] * 6)
    found = fit_power(frame, x="flops", loss="loss", resamples=20)
    assert len(found.rows) == 30
    assert "Left out: 6 of 36 rows, whose `status` says KILLED (6): index 30" in found.summary()


def test_help_teaches_both_commands_and_every_law(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in (
        (["--help"], ["RESULTS_DIR", "fit --law chinchilla runs.csv"]),
        (["fit", "--help"], list(LAWS)),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        printed = capsys.readouterr().out
        assert all(each in printed for each in expected)


# --- the reader -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", WRITERS)
def test_all_kinds_of_table_read_alike(suffix: str, tmp_path: Path) -> None:
    WRITERS[suffix](runs(), tmp_path / f"runs.{suffix}")
    frame = read_table(tmp_path / f"runs.{suffix}", ["params", "loss"], ["mechanism"])
    assert frame["trial_id"].tolist() == runs()["trial_id"].tolist()
    assert frame["loss"].to_numpy() == pytest.approx(runs()["loss"].to_numpy())


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda frame: frame.drop(columns="loss"), "column `loss`"),
        (
            lambda frame: frame.assign(loss=frame["loss"].astype(str).where(frame.index != 2, "low")),
            "column `loss` holds 'low'",
        ),
        (
            lambda frame: frame.assign(trial_id=frame["trial_id"].where(frame.index != 3, "t1")),
            "trial id t1 stands in several rows",
        ),
        (lambda frame: frame.iloc[:0], "holds no row|is missing; it has no column"),
    ],
)
def test_a_damaged_table_is_refused(
    suffix: str, change: Callable[[pd.DataFrame], pd.DataFrame], words: str, tmp_path: Path
) -> None:
    WRITERS[suffix](change(runs()), tmp_path / f"runs.{suffix}")
    with pytest.raises(AnalysisError, match=words):
        read_table(tmp_path / f"runs.{suffix}", ["loss"])


def test_text_is_named_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "runs.csv").write_text("x,loss\n1,2\n\n3,low\n")
    with pytest.raises(AnalysisError, match="line 4, column `loss` holds 'low'"):
        read_table(tmp_path / "runs.csv", ["x", "loss"])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("runs.txt", "a", "give a table as .csv"),
        ("runs.csv", None, "no such file"),
        ("runs.csv", "", "is empty"),
        ("runs.csv", 'a\n"1\n', "cannot be read as csv"),
        ("runs.jsonl", "{", "cannot be read as jsonl"),
        ("runs.parquet", "PAR", "cannot be read as parquet"),
        ("runs.csv.gz", "x,loss", "cannot be read as csv"),
        ("runs.json", '{"x": [1]', "give an array of objects"),
        ("runs.json", '{"x": {"0": 1}, "loss": {"0": 2}}', "it holds columns; write an array of objects"),
        ("runs.parquet.gz", "PAR", "all but the last may be packed"),
    ],
)
def test_what_is_no_table_is_refused(name: str, content: str | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(AnalysisError, match=words):
        read_table(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x,loss\n1,2,3\n4,5,6\n", "line 2 has 3 fields, but there are 2 headings"),
        ("x,loss\n1,2\n\n3\n", "line 4 has 1 fields"),
        ("x,loss,loss\n1,2,3\n", "heading `loss` stands twice"),
        ("x;loss\n1;2,500\n", "whether 2,500 has a decimal mark or groups of digits"),
        ("x\tloss\n10M\t2,345\n20M\t2,201\n", "whether 2,345 has a decimal mark or groups of digits"),
        ("x;loss\n1.5;2,5\n", "a decimal comma .2,5. and a decimal point .1.5."),
        ('note,x,loss\n"two\nlines",1,2\n,1,low\n', "line 4, column `loss`"),
        ("x,loss\n1,2\n1,True\n", "column `loss` holds 'True'"),
    ],
)
def test_a_csv_that_would_be_misread_is_refused_by_its_line(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "runs.csv").write_text(text)
    with pytest.raises(AnalysisError, match=words):
        read_table(tmp_path / "runs.csv", ["x", "loss"])


def packed(text: str, encoding: str = "utf-8") -> bytes:
    return gzip.compress(text.encode(encoding), mtime=0)


PLAIN = "params,tokens,loss\n10000000,1000000000,4.5\n20000000,3000000000,4.25\n"
RECORDS = [
    {"params": 10000000, "tokens": 1000000000, "loss": 4.5},
    {"params": 20000000.0, "tokens": 3000000000, "loss": 4.25},
]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("runs.csv", PLAIN),
        ("runs.csv", "# exported\n\n#by hand, it's\n" + PLAIN + "\n\n"),
        ("runs.csv", "# " + PLAIN),  # as NumPy writes it
        ("runs.csv", PLAIN.replace(",", ", ").replace("params", ' "Params"').replace("loss", " LOSS ")),
        ("runs.csv", "params,tokens,loss\n10M,1B,4.5\n20 M,3 billion,4.25\n"),
        ("runs.tsv", "params\ttokens\tloss\n10000k\t1,000M\t4.500\n20,000k\t3,000M\t4.250\n"),
        ("runs.csv", 'params,tokens,loss\n"10,000,000","1,000,000,000",4.5\n20_000_000,3e9,425%\n'),
        ("runs.csv", "params;tokens;loss\n10.000.000;1e9;4,5\n2e7;3b;4,25\n"),
        ("runs.csv", 'params,tokens,loss\n1e7,1e9,"4,50"\n2e7,3e9,"4,25"\n'),
        ("runs.csv", "params,tokens,note,note,loss\n1e7,1e9,a,b,4.5\n2e7,3e9,,,4.25\n"),
        ("runs.csv", PLAIN.encode("utf-16")),
        ("runs.csv", PLAIN.encode("utf-16-le")),
        ("runs.csv", PLAIN.encode("utf-16-be")),
        ("runs.tsv", PLAIN.replace(",", "\t")),
        ("runs.csv", PLAIN.replace(",", "\t").replace("\n", "\r\n")),
        ("runs.CSV.gz", packed(PLAIN)),
        ("runs.tsv.gz", packed(PLAIN.replace(",", "\t"), "utf-16")),
        ("runs.json", json.dumps(RECORDS, indent=1)),
        ("runs.json", "\n".join(map(json.dumps, RECORDS))),
        ("runs.jsonl", json.dumps(RECORDS)),
        ("runs.ndjson", "\n".join(map(json.dumps, RECORDS)) + "\n\n"),
        ("runs.json.gz", packed(json.dumps(RECORDS))),
        ("runs.jsonl.gz", packed("\n".join(map(json.dumps, RECORDS)).replace("10000000,", '"10M",'))),
    ],
)
def test_tables_as_people_write_them_read_alike(name: str, content: str | bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    frame = read_table(tmp_path / name, ["params", "tokens", "loss"])
    assert frame[["params", "tokens", "loss"]].to_numpy().tolist() == [[1e7, 1e9, 4.5], [2e7, 3e9, 4.25]]


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("runs.csv", "# a comment\n\nx,loss\n1,2\n2,low\n", "line 5"),
        ("runs.jsonl", '{"x": 1, "loss": 2}\n\n{"x": 2, "loss": "low"}\n', "line 3"),
        ("runs.json", '[{"x": 1, "loss": 2},\n{"x": 2, "loss": "low"}]\n', "row 2"),
    ],
)
def test_a_row_is_named_by_its_line_or_counted_from_one(name: str, content: str, place: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(AnalysisError, match=f"{place}, column `loss` holds 'low'"):
        read_table(tmp_path / name, ["x", "loss"])
    (tmp_path / name).write_text(content.replace("low", "-3").replace('"-3"', "-3"))
    frame = read_table(tmp_path / name, ["x", "loss"])
    assert place in fit_power(frame, x="x", loss="loss").message  # the loss of ... is not a positive number
    with pytest.raises(AnalysisError, match=f"holds -3 in {place}"):
        fit_power(frame, x="loss", loss="x")


def test_words_for_no_number_are_empty_and_json_names_may_not_stand_twice(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text(
        '{"x": 1e9, "loss": "NaN"}\n{"x": "7b", "loss": NaN}\n{"x": 1e9, "loss": "Diverged"}\n{"x": 1e9, "loss": '
        "null}\n"
    )
    frame = read_table(path, ["x", "loss"])
    assert frame["loss"].isna().all()
    assert frame["x"].tolist() == [1e9, 7e9, 1e9, 1e9]
    path.write_text('{"x": 1, "y": 2, "y": 3}\n')
    assert len(read_table(path, ["x"])) == 1
    with pytest.raises(AnalysisError, match="heading `y` stands twice"):
        read_table(path, ["x", "y"])


def test_marks_suffixes_and_folders(tmp_path: Path) -> None:
    (tmp_path / "runs.CSV").write_bytes(b"\xef\xbb\xbfx,loss\n1,2\n")
    assert read_table(tmp_path / "runs.CSV", ["x", "loss"]).to_numpy().tolist() == [[1, 2]]
    (tmp_path / "x.csv").mkdir()
    with pytest.raises(AnalysisError, match="is a folder"):
        read_table(tmp_path / "x.csv")


@pytest.mark.parametrize("value", [pd.Timestamp("2024-01-01"), pd.Timedelta(days=1), True, np.datetime64("2024-01-01")])
def test_dates_and_truth_values_are_no_numbers(value: object, tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {"x": np.geomspace(1, 100, 6), "n": np.geomspace(1, 50, 6), "loss": [value] * 6, "seed": range(6)}
    )
    frame.to_parquet(tmp_path / "runs.parquet")
    with pytest.raises(AnalysisError, match=r"column `loss` holds .*; a number belongs there"):
        read_table(tmp_path / "runs.parquet", ["loss"])
    with pytest.raises(AnalysisError, match=r"column `loss` holds .*; a number belongs there"):
        fit_power(frame, x="x", loss="loss")
    with pytest.raises(AnalysisError, match=r"column `loss` holds .*; a number belongs there"):
        fit_slots(frame.assign(mechanism="pkm"), x="x", loss="loss")


def test_seeds_of_json_lines_may_be_text_and_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "runs.jsonl"
    one_length().assign(seed=lambda frame: frame["seed"].map({0: "a", 1: 1})).to_json(
        path, orient="records", lines=True
    )
    assert main(["fit", "--law", "slots", str(path), *LAWS["slots"].example.split(), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["seeds"] == 2


def test_checkpoints_may_share_the_id_of_their_run(tmp_path: Path) -> None:
    frame = runs().assign(trial_id=np.repeat([f"t{i}" for i in range(12)], 3))
    frame.to_csv(tmp_path / "runs.csv", index=False)
    columns = ["--n", "params", "--d", "tokens", "--loss", "loss"]
    assert main(["fit", "--law", "chinchilla", str(tmp_path / "runs.csv"), *columns]) == 2
    assert main(["fit", "--law", "chinchilla", str(tmp_path / "runs.csv"), *columns, "--run", "trial_id"]) == 0


@pytest.mark.parametrize(
    ("heading", "finished", "crashed"),
    [
        ("Status", "FINISHED", "FAILED"),
        ("State", "TrialState.COMPLETE", "TrialState.FAIL"),
        ("state", "COMPLETED", "crashed"),
        ("status", "RunStatus.FINISHED", "RunStatus.KILLED"),
    ],
)
def test_the_states_of_every_tracker_are_known(heading: str, finished: str, crashed: str, tmp_path: Path) -> None:
    frame = runs().assign(**{heading: [crashed] * 3 + [finished] * 33})
    frame.to_csv(tmp_path / "runs.csv", index=False)
    read = read_table(tmp_path / "runs.csv", ["params", "tokens", "loss"])
    assert is_finished(read["status"]).tolist() == [False] * 3 + [True] * 33


def test_a_state_in_which_nobody_finished_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "runs.csv"
    runs().assign(State="crashed").to_csv(path, index=False)
    assert main(["fit", "--law", "power", str(path), "--x", "params", "--loss", "loss"]) == 2
    assert "36 of 36 rows, whose `status` says crashed" in capsys.readouterr().err


@pytest.mark.parametrize("first", ["sep=;", '"sep=;"', "\ufeffsep=;", "SEP=;\r"])
def test_the_separator_that_excel_declares_is_read(first: str, tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(f"{first}\nparams;loss\n10;2.5\n20;2.25\n", newline="")
    read = read_table(path, ["params", "loss"])
    assert read["loss"].tolist() == [2.5, 2.25]
    assert list(read.index) == ["line 3", "line 4"]


def test_rows_without_a_group_are_left_out_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, arguments = tmp_path / "runs.csv", ["--x", "params", "--loss", "loss", "--group", "kind"]
    runs().assign(kind=[None, *["a"] * 17, *["b"] * 18]).to_csv(path, index=False)
    assert main(["fit", "--law", "power", str(path), *arguments]) == 0
    said = capsys.readouterr().out
    assert "Left out: 1 of 36 rows, whose `kind` is empty: line 2." in said
    assert "kind a" in said
    assert "kind b" in said
    runs().assign(kind=None).to_csv(path, index=False)
    assert main(["fit", "--law", "power", str(path), *arguments]) == 2
    assert "`kind` is empty in every row" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "heading", "words"),
    [
        ("flops", "tokens", "the heading says tokens"),
        ("flops", "Train Steps", "the heading says steps"),
        ("flops", "numParams", "the heading says parameters"),
        ("n", "training_flops", "the heading says compute"),
        ("loss", "val_ppl", "natural logarithm"),
        ("loss", "Perplexity", "natural logarithm"),
    ],
)
def test_a_heading_of_another_quantity_is_refused(
    option: str, heading: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = {"flops": "c", "n": "n", "loss": "l"} | {option: heading}
    path = tmp_path / "runs.csv"
    own = {"flops": "flops", "n": "params", "loss": "loss"}
    pd.DataFrame({columns[each]: runs()[name] for each, name in own.items()}).to_csv(path, index=False)
    given = [part for each, column in columns.items() for part in (f"--{each}", column)]
    assert main(["fit", "--law", "isoflop", str(path), *given]) == 2
    said = capsys.readouterr().err
    assert f"--{option} {heading}" in said
    assert words in said


def test_a_plain_number_that_lost_its_unit_is_refused_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("params,loss\n10M,2.5\n20,2.25\n")
    with pytest.raises(AnalysisError, match="line 3, column `params` holds 20 beside 10M; write its unit too"):
        read_table(path, ["params", "loss"])
    path.write_text("params,loss\n10M,2.5\n20000000,2.25\n1.5k,2\n900,1\n")
    assert read_table(path, ["params", "loss"])["params"].tolist() == [1e7, 2e7, 1500, 900]


def sweep(spread: float, rows: int = 8) -> pd.DataFrame:
    """A power law with `rows` runs at each size, of which the others lie up to `spread` above the best, ever more so
    for large sizes.
    """
    x, k = np.meshgrid(np.geomspace(1e6, 1e9, 7), np.arange(rows), indexing="ij")
    rng = np.random.default_rng(0)
    above = spread * rng.random(x.shape) * (k > 0) * np.log10(x) / 9
    return pd.DataFrame(
        {
            "x": x.ravel(),
            "loss": ((1.5 + 40 * x**-0.2) * (1 + above) * (1 + 1e-4 * rng.standard_normal(x.shape))).ravel(),
        }
    )


@pytest.mark.parametrize(("spread", "told"), [(0.03, True), (0.001, False)])
def test_a_mild_sweep_is_told_from_seeds(
    spread: float, told: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep(spread).to_csv(tmp_path / "runs.csv", index=False)
    command = ["fit", "--law", "saturating-power", str(tmp_path / "runs.csv"), "--x", "x", "--loss", "loss"]
    assert main(command) == 0
    assert ("--best-of-cell" in capsys.readouterr().out) == told
    assert main([*command, "--best-of-cell"]) == 0
    assert "sweep" not in capsys.readouterr().out


@pytest.mark.parametrize(("factor", "told"), [(10.0, True), (1.0, False)])
def test_losses_too_large_for_nats_are_doubted(
    factor: float, told: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep(0.0, 1).assign(loss=lambda each: each["loss"] * factor).to_csv(tmp_path / "runs.csv", index=False)
    assert main(["fit", "--law", "power", str(tmp_path / "runs.csv"), "--x", "x", "--loss", "loss"]) == 0
    assert ("perplexity" in capsys.readouterr().out) == told


@pytest.mark.parametrize(("unit", "told"), [(1e15, True), (1.0, False)])
def test_compute_far_from_six_n_d_is_doubted(
    unit: float, told: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    c, r = map(np.ravel, np.meshgrid(np.geomspace(1e17, 1e19, 4), np.geomspace(0.25, 4, 5)))
    n = r * np.sqrt(c / 120)
    runs = pd.DataFrame(
        {"flops": c / unit, "n": n, "tokens": c / 6 / n, "loss": 1.7 + 400 * n**-0.34 + 410 * (c / 6 / n) ** -0.28}
    )
    runs.to_csv(tmp_path / "runs.csv", index=False)
    assert (
        main(["fit", "--law", "isoflop", str(tmp_path / "runs.csv"), "--flops", "flops", "--n", "n", "--loss", "loss"])
        == 0
    )
    assert ("times 6 `n` `tokens`" in capsys.readouterr().out) == told


@pytest.mark.parametrize("law", ["chinchilla", "moe-joint"])
def test_one_diverged_run_is_named_and_does_not_set_the_scatter(
    law: str, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = pd.read_csv(table)
    frame.loc[11, "loss"] *= 1.6
    frame.to_csv(table, index=False)
    assert main(["fit", "--law", law, str(table), *LAWS[law].example.split()]) == 0
    said = capsys.readouterr().out
    assert float(re.findall(r"Runs lie ([.0-9]+)% around the law \(median; trial t11 lies", said)[0]) < 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fit", "--law", "chinchilla", "rnus.csv"], "rnus.csv: no such file; did you mean runs.csv?"),
        (["fti", "runs.csv"], "did you mean `fit`?"),
        (
            ["runs", "--detect", "1%"],
            "--detect is an option of sparsemem plan STUDY.yaml --detect 0.01 --noise RESULTS_DIR",
        ),
        (["fit", "--law", "isoflp", "runs.csv"], "did you mean isoflop?"),
    ],
)
def test_a_mistyped_command_is_refused_with_the_nearest_name(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs.csv").write_text("params,tokens,loss\n1,2,3\n")
    try:
        code: object = main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert words in capsys.readouterr().err
