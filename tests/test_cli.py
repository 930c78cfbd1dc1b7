from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from sparsemem import cli
from sparsemem.cli import main

STUDY = """
study: small
data: {corpus: files, files: [corpus/*.txt], vocab_size: 300, context: 16, validation_tokens: 2k}
model: {layers: 2, width: 16, heads: 2, moe: {expert_width: 8, top_k: 2}}
budget: {total_params: 30k, active_params: 7k, tokens: 4k, tolerance: 5%}
train: {batch_tokens: 256, lr: 1e-2}
vary: {seed: [0, 1]}
rho: 1
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(STUDY, encoding="utf-8")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("".join(f"{number} is a number. " for number in range(2_000)))
    return path


def test_plan_as_json_has_nothing_else_on_stdout(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(study), "--json"]) == 0
    trials = json.loads(capsys.readouterr().out)["trials"]
    assert [trial["seed"] for trial in trials] == [0, 1]
    assert all(trial["estimated_seconds"] > 0 for trial in trials)
    assert {"trial_id", "routed_experts", "budget_error_active", "flops_per_token", "memory_bytes_per_token"} <= trials[
        0
    ].keys()


def test_plan_refuses_a_tokenizer_that_no_text_can_mend(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (study.parent / "mine.json").write_text("{}")
    assert main(["plan", str(study), "--set", "data.tokenizer=mine.json"]) == 2
    assert "field `data.tokenizer` has the value 'mine.json': not a tokenizer" in capsys.readouterr().err


def test_plan_as_a_table_ends_in_totals(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(study), "--set", "budget.tokens=200k"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0] == "files: 34,890 bytes of text: 22,890 to train on, 2,229 held out (6.4%), 9,771 unused (9,771 over "
        "validation_tokens)"
    )
    assert lines[1].startswith("note: trials read their text up to about ")
    assert lines[1].endswith(" times, which favours memory; use more text, or fewer `budget.tokens`")
    assert lines[3].split()[:3] == ["trial", "seed", "experts"]
    assert lines[-1].startswith("2 trials, 400k tokens, largest budget error")


def noisy(folder: Path, seeds: int = 2) -> Path:
    """Results of a study whose runs differ by noise of 0.01 nats/token."""
    rows = ["trial_id,status,seed,rho,share_moe,total_params,active_params,tokens,val_loss"]
    for seed in range(seeds):
        rows += [
            f"{seed}{i},finished,{seed},{i / 4},{i / 4},30000,7000,4000,{4 + 0.01 * (-1) ** (i * seed)}"
            for i in range(5)
        ]
    folder.mkdir(parents=True)
    (folder / "trials.csv").write_text("\n".join(rows))
    (folder / "study.yaml").write_text("study: other")
    return folder


def test_plan_says_what_a_difference_takes(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engram = "top_k: 2}, engram: {layers: [1], orders: [2], heads: 1, row_dim: 8}}"
    study.write_text(
        STUDY.replace("top_k: 2}}", engram).replace("vary: {", "vary: {rho: [1, 0], ").replace("rho: 1\n", "")
    )
    arguments = ["plan", str(study), "--detect", "0.02", "--noise", str(noisy(tmp_path / "other"))]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["detect"]
    (design,) = found["designs"]
    assert (found["depth"], found["noise"]["df"]) == (0.02, 4)
    assert (design["points"], design["seeds"]) == (2, 2)
    assert design["seeds_needed"] > 2
    assert design["detectable"] > 0.02
    low, high = found["noise"]["low"], found["noise"]["high"]
    assert low < found["noise"]["paired_sd"] < high
    assert high / low == pytest.approx((11.143 / 0.4844) ** 0.5, rel=1e-3)  # chi-square quantiles, 4 degrees of freedom
    least, most = design["seeds_needed_range"]
    assert least < design["seeds_needed"] < most
    assert main(arguments) == 0
    assert f"{design['seeds_needed']} seeds see 0.02 with 80% ({least} to {most} over" in capsys.readouterr().out


def test_the_noise_is_that_of_as_many_tokens_as_planned(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = noisy(tmp_path / "two")
    table = folder / "trials.csv"
    lines = table.read_text().splitlines()
    head, rows = lines[0], [line.split(",") for line in lines[1:]]
    others = [[f"b{row[0]}", *row[1:7], "8000", str(4 + 3 * (float(row[8]) - 4))] for row in rows]
    table.write_text("\n".join([head, *map(",".join, rows + others)]))
    assert main(["plan", str(study), "--detect", "0.02", "--noise", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "differs between the cells" in said
    assert "used: those with as many tokens as planned" in said
    assert "4 degrees of freedom" in said


def test_plan_refuses_to_guess_the_noise(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one_seed = noisy(tmp_path / "one", seeds=1)
    for arguments, words in (
        (["--detect", "0.01"], "give --noise with the results folder of a similar study"),
        (["--detect", "0.01", "--noise", str(one_seed)], "no seed is repeated"),
        (["--noise", str(one_seed)], "give --detect"),
        (["--detect", "-1", "--noise", str(one_seed)], "give a positive number"),
        (["--detect", "0.01", "--noise", str(tmp_path)], "study.yaml: no such file"),
    ):
        assert main(["plan", str(study), *arguments]) == 2
        assert words in capsys.readouterr().err


def test_set_replaces_fields_and_axes(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["vary.seed=[7]", "budget.tokens=8k", "train={batch_tokens: 512, lr: 0.1}"]
    assert main(["plan", str(study), "--json", *(word for setting in settings for word in ("--set", setting))]) == 0
    (trial,) = json.loads(capsys.readouterr().out)["trials"]
    assert (trial["seed"], trial["tokens"]) == (7, 8000)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "nowhere.yaml"], ["nowhere.yaml", "no such file"]),
        (["run", "{study}", "--set", "budget.tokens=many"], ["small.yaml", "budget.tokens", "'many'", "500k"]),
        (["run", "{study}", "--set", "modle.width=3"], ["unknown field", "modle", "model"]),
        (["run", "{study}", "--set", "rho=1.5"], ["rho", "1.5", "between 0"]),
        (["run", "{study}", "--set", "budget.tokens"], ["--set budget.tokens", "path=value"]),
        (["run", "{study}", "--set", "seed=[1"], ["--set seed=[1"]),
        (["run", "{study}", "--set", "budget.active_params=1k"], ["budget.active_params", "1,000", "raise it to"]),
        (["run", "{study}", "--set", "data.files=[none/*.txt]"], ["small.yaml", "data.files", "none/*.txt"]),
        (["plan", "{study}", "--set", "data.files=[none/*.txt]"], ["small.yaml", "data.files", "none/*.txt"]),
        (["status", "{folder}"], ["not the results folder of a study"]),
        (["report", "{folder}"], ["not the results folder of a study"]),
        (["report", "runs/nowhere"], ["runs/nowhere: no such folder", "`sparsemem run` makes it"]),
        (["status", "runs/nowhere"], ["runs/nowhere: no such folder"]),
        (["plan", "{study}", "--diff", "runs/nowhere"], ["runs/nowhere does not exist", "`sparsemem run` makes it"]),
        (["plan", "{study}", "--set", "budget.tokens = many"], ["budget.tokens", "'many'"]),
        (["plan", "{study}", "--set", "tokens=4k"], ["unknown field `tokens`", "did you mean `budget.tokens`?"]),
    ],
)
def test_bad_input_is_refused_with_words_and_nothing_is_written(
    study: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(study.parent)
    assert main([argument.format(study=study, folder=study.parent) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert all(word in err for word in words), err
    assert "Traceback" not in err
    assert {path.name for path in study.parent.iterdir()} == {"small.yaml", "corpus"}


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["run", "--help"], ["tune", "nowhere.yaml"], ["plan", "nowhere.yaml"], ["status", "nowhere"]],
)
def test_help_and_refusals_load_neither_torch_nor_ray(arguments: list[str]) -> None:
    code = "import sys; from sparsemem.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'ray', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)


@pytest.mark.parametrize("command", ["plan", "run", "tune", "status", "report", "bench"])
def test_the_help_of_each_command_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"example:\n  sparsemem {command} " in capsys.readouterr().out


def test_a_warning_of_a_library_is_a_line_without_its_source(
    study: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def warn(arguments: object) -> int:
        warnings.warn("the driver in /usr/lib/x/driver.so is old\nand more", UserWarning, stacklevel=1)
        return 0

    monkeypatch.setitem(cli._COMMANDS, "plan", warn)
    monkeypatch.setattr("sys.warnoptions", [])
    assert main(["plan", str(study)]) == 0
    assert capsys.readouterr().err == "warning: the driver in .../driver.so is old\n"


def test_an_axis_of_one_share_is_drawn_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    from matplotlib.figure import Figure

    from analysis.figures.style import share_axis

    axes = Figure().subplots()
    share_axis(axes, 1.0, 1.0, "share")
    low, high = axes.get_xlim()
    assert low < 1.0 < high
    assert not recwarn.list


def test_a_results_folder_that_is_not_there_is_refused_with_the_nearest_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first-study").mkdir(parents=True)
    (tmp_path / "runs" / "first-study" / "study.yaml").write_text("study: first-study\n")
    (tmp_path / "runs" / "first-study" / "trials.csv").touch()
    (tmp_path / "runs" / "first-study" / "report.html").touch()
    for command, inside in (("report", "report.html"), ("status", "trials.csv"), ("report", "figures/loss.svg")):
        assert main([command, f"runs/first-study/{inside}"]) == 2
        assert "folder; did you mean runs/first-study, in which it lies?" in capsys.readouterr().err
    for wrong in ("runs/frst-study", "first-study", "results/first-study"):
        assert main(["report", wrong]) == 2
        assert f"{wrong}: no such folder; did you mean runs/first-study?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "usage", "remedy"),
    [
        (["tune", "s.yaml", "--engine", "local"], "usage: sparsemem tune", "--engine is an option of run"),
        (["plan", "s.yaml", "--results", "x"], "usage: sparsemem plan", "--results is an option of run and tune"),
        (["run", "s.yaml", "--result", "x"], "usage: sparsemem run", "did you mean --results?"),
        (["run", "s.yaml", "--enigne=local"], "usage: sparsemem run", "did you mean --engine?"),
        (["plan", "s.yaml", "--set", "budget.tokens", "40k"], "usage: sparsemem plan", "--set budget.tokens=40k"),
        (["plan", "s.yaml", "data.files=[a.txt]"], "usage: sparsemem plan", "one word: --set 'data.files=[a.txt]'"),
        (["plan", "s.yaml", "--set"], "usage: sparsemem plan", "expected one argument; write --set budget.tokens=40k"),
        (
            ["plan", "s.yaml", "--detect", "1%"],
            "usage: sparsemem plan",
            "write --detect 0.01, a difference of losses in nats/token",
        ),
        (
            ["plan", "s.yaml", "--detect"],
            "usage: sparsemem plan",
            "write --detect 0.01, a difference of losses in nats/token",
        ),
        (
            ["plan", "--diff", "s.yaml"],
            "usage: sparsemem plan",
            "required: STUDY.yaml; --diff took the word after it: write it last",
        ),
        (["run", "s.yaml", "--engine"], "usage: sparsemem run", "write --engine ray or local"),
        (["rnu", "s.yaml"], "usage: sparsemem", "did you mean run?"),
        (["run", "s.yaml", "--engine", "locl"], "usage: sparsemem run", "did you mean local?"),
    ],
)
def test_an_unknown_argument_is_refused_by_its_own_command(
    capsys: pytest.CaptureFixture[str], arguments: list[str], usage: str, remedy: str
) -> None:
    with pytest.raises(SystemExit) as refused:
        main(arguments)
    err = capsys.readouterr().err
    assert refused.value.code == 2
    assert err.startswith(usage)
    assert remedy in err


def test_what_a_run_has_said_is_not_said_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "report.html").touch()
    monkeypatch.setattr(
        "analysis.report.summarize", lambda folder: "2 of 2 trials finished.\nWarning: narrow\nCompared: alike"
    )
    cli._print_findings(tmp_path, ["Warning: narrow"])
    assert capsys.readouterr().out.splitlines()[:3] == ["", "2 of 2 trials finished.", "Compared: alike"]


@pytest.mark.parametrize(
    ("size", "setting", "words"),
    [
        (300, "data.context=256", "field `data.context` has the value 256: the text held out has"),
        (4_000, "train.batch_tokens=8192", "field `train.batch_tokens` has the value 8,192: a batch takes"),
    ],
)
def test_plan_refuses_a_text_that_run_would(
    study: Path, capsys: pytest.CaptureFixture[str], size: int, setting: str, words: str
) -> None:
    """Before the text has tokens, its bytes bound them."""
    for path in (study.parent / "corpus").glob("*"):
        path.unlink()
    (study.parent / "corpus" / "a.txt").write_text("".join(f"{number} is a number. " for number in range(size // 16)))
    assert main(["plan", str(study), "--set", setting]) == 2
    assert words in capsys.readouterr().err
