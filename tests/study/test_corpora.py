"""A study goes on with the text that it began with, and `plan --diff` says what `run` does."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import numpy as np
import pytest
import yaml

from analysis import prose
from analysis.results import Results
from sparsemem.api import run_study
from sparsemem.cli import main
from sparsemem.config import ConfigError, load_study
from sparsemem.data import python_source
from sparsemem.data.batches import Tokens
from sparsemem.data.cache import cache_folder, kept_folder
from sparsemem.study.ledger import Ledger

FOUR = {"vary": {"rho": [1.0, 0.7, 0.5, 0.0]}}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEMEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sparsemem.study.plan.estimate_seconds", lambda planned, study: None)


def run(file: Path) -> tuple[Ledger, list[str]]:
    said: list[str] = []
    return run_study(load_study(file), file.parent, file.parent / "runs", say=said.append), said


def digests(ledger: Ledger) -> set[str]:
    return set(ledger.texts().values())


def change_text(file: Path) -> None:
    (file.parent / "corpus" / "00.txt").write_text("other words " * 2000)


def test_an_extended_study_goes_on_with_its_text_and_plan_says_so(
    write_study: Callable[..., Path], engine: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = write_study()
    began = digests(run(file)[0])
    change_text(file)
    file = write_study(**FOUR)
    assert main(["plan", str(file), "--diff", str(tmp_path / "runs" / "tiny")]) == 0
    (note,) = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("note: the text of `data` has changed")
    ]
    ledger, said = run(file)
    assert note in said
    assert "corpus/00.txt" in note
    assert digests(ledger) == began
    assert len(engine.ran) == 4


@pytest.mark.parametrize("loss", ["changed", "gone"])
def test_where_neither_text_nor_tokens_are_left_run_and_plan_refuse_alike(
    write_study: Callable[..., Path], engine: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path, loss: str
) -> None:
    file = write_study()
    run(file)
    (digest,) = {path.name for path in cache_folder().iterdir() if path.is_dir()}
    kept = tmp_path / "kept"
    shutil.copytree(cache_folder() / digest, kept)
    change_text(file) if loss == "changed" else shutil.rmtree(file.parent / "corpus")
    file = write_study(**FOUR)
    if loss == "changed":
        shutil.rmtree(cache_folder() / digest)
        before = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()}
        with pytest.raises(
            ConfigError,
            match=rf"its 3 finished trials .* corpus {digest}; .* not in the cache .* copy the folder {digest}",
        ) as one:
            run(file)
        assert {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()} == before
        assert main(["plan", str(file), "--diff", str(tmp_path / "runs" / "tiny")]) == 2
        assert str(one.value) in capsys.readouterr().err
        shutil.copytree(kept, cache_folder() / digest)  # the remedy
    ledger, said = run(file)
    assert digests(ledger) == {digest}
    assert [line for line in said if "goes on with the tokens that it began with" in line]


def test_text_that_was_mended_before_a_trial_was_finished_is_taken(
    write_study: Callable[..., Path], engine: Any
) -> None:
    file = write_study(vary={"rho": [1.0]})
    engine.outcomes[0] = lambda folder: None
    first = digests(run(file)[0])
    change_text(file)
    ledger, said = run(file)
    assert not digests(ledger) & first
    assert not [line for line in said if "began with" in line]
    assert [line for line in said if "no trial is finished on what it was, so trials begin anew" in line]
    (manifest,) = ledger.folder.glob("data*.json")
    assert manifest.name == "data.json"
    assert json.loads(manifest.read_text())["digest"] in digests(ledger)


def test_files_go_by_the_names_that_the_study_has_for_them(write_study: Callable[..., Path], engine: Any) -> None:
    first, _ = run(write_study())
    file = write_study(study="other", data=machine.TINY["data"] | {"files": ["moved/*.txt"]})
    (file.parent / "corpus").rename(file.parent / "moved")
    other, _ = run(file)
    before, after = (json.loads((each.folder / "data.json").read_text()) for each in (first, other))
    assert after["digest"] == before["digest"]
    assert {each["name"].partition("/")[0] for each in after["packages"]} == {"moved"}
    (file.parent / "moved" / "00.txt").write_text("other words " * 2000)
    _, said = run(file)
    (note,) = [line for line in said if line.startswith("note: the text of `data` has changed")]
    assert "corpus/00.txt" in note
    assert "corpus/01.txt" not in note


def test_the_loss_of_token_frequencies_alone_is_written_down(write_study: Callable[..., Path], engine: Any) -> None:
    ledger, _ = run(write_study())
    manifest = json.loads((ledger.folder / "data.json").read_text())
    tokens = Tokens.load(kept_folder(manifest["digest"]))
    counts = Counter(tokens.train.tolist())
    total = len(tokens.train) + tokens.vocab_size
    expected = -np.mean([math.log((counts[each] + 1) / total) for each in tokens.val.tolist()])
    assert manifest["token_frequency_loss"] == pytest.approx(expected, rel=1e-12)


def test_plan_says_where_the_bytes_go_and_how_often_they_are_read(
    write_study: Callable[..., Path], engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_study(budget=machine.TINY["budget"] | {"tokens": "200k"})

    def planned() -> dict[str, Any]:
        assert main(["plan", str(file), "--json"]) == 0
        (text,) = json.loads(capsys.readouterr().out)["texts"]
        return dict(text)

    before = planned()
    assert before["total"] == sum(path.stat().st_size for path in (file.parent / "corpus").iterdir())
    assert before["train"] + before["validation"] + sum(before["unused"].values()) == before["total"]
    ledger, said = run(file)
    after, manifest = planned(), json.loads((ledger.folder / "data.json").read_text())
    assert {name: after[name] for name in manifest["text"]} == manifest["text"]
    assert after["repetition"] == round(200_000 / manifest["train_tokens"], 2) > 1
    assert [
        line for line in said if line.startswith(f"note: trials read their text up to {after['repetition']:.3g} times")
    ]
    assert before["repetition"] == pytest.approx(after["repetition"], rel=0.5)
    assert before["train"] == after["train"]


def test_files_that_are_not_read_to_their_end_are_told(
    write_study: Callable[..., Path], engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_study(data=machine.TINY["data"] | {"max_bytes": "40k"})
    told = re.compile(
        r"read [\d,]+ of about [\d,]+ bytes of corpus/\S+, .* and parts of \d+ more: what was read suffices for "
        r"`data.max_bytes` 40,000"
    )
    assert main(["plan", str(file)]) == 0
    assert told.search(capsys.readouterr().out)
    ledger, _ = run(file)
    assert told.search(prose.text(Results(ledger.folder)))


def test_another_context_of_a_begun_study_reads_the_same_text(write_study: Callable[..., Path], engine: Any) -> None:
    file = write_study(vary={"rho": [1.0]})
    began = digests(run(file)[0])
    change_text(file)
    ledger, _ = run(write_study(vary={"rho": [1.0], "data.context": [16, 32]}))
    assert len(ledger.texts()) == 2
    assert digests(ledger) == began


def test_an_update_of_a_package_does_not_lock_a_study(
    write_study: Callable[..., Path], engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = {"vocab_size": 300, "context": 16, "validation_tokens": 2048, "max_bytes": "150k"}
    file = write_study(data=text, vary={"rho": [1.0]})
    ledger, _ = run(file)
    began = digests(ledger)
    required = python_source.required_distributions
    monkeypatch.setattr(
        python_source,
        "required_distributions",
        lambda name: {key: each for key, each in required(name).items() if key != "attrs"},
    )
    ledger, said = run(write_study(data=text, vary={"rho": [1.0, 0.0]}))
    assert digests(ledger) == began
    assert [line for line in said if "goes on with the tokens that it began with" in line]
    assert json.loads((ledger.folder / "data.json").read_text())["digest"] in began
    assert "data" in yaml.safe_load((ledger.folder / "study.yaml").read_text())["provenance"]


def test_the_report_names_the_files_and_counts_them_once(write_study: Callable[..., Path], engine: Any) -> None:
    (write_study().parent / "mine.txt").write_bytes(
        b"\n".join(path.read_bytes() for path in write_study().parent.glob("corpus/*.txt"))
    )
    ledger, _ = run(write_study(data=machine.TINY["data"] | {"files": ["mine.txt"]}))
    results = Results(ledger.folder)
    assert prose.sources(results) == "1 document in 1 file"
    assert [line for line in prose.caveats(results) if line.startswith("One corpus, files mine.txt")]


def test_bytes_are_not_counted_like_parameters(
    write_study: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(write_study())]) == 0
    out = capsys.readouterr().out
    assert re.search(r" [\d.]+ kB ", out)
    assert not re.search(r"\d[kMBT]B\b", out)


def test_plan_and_run_say_alike_that_the_text_has_changed_or_is_gone(
    write_study: Callable[..., Path],
    engine: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    (began,) = digests(run(write_study())[0])
    capsys.readouterr()
    changes = {
        "has changed since the study began (it comes to ": (
            change_text,
            "for the new text give the study another `study` name",
        ),
        "cannot be read any more (field `data.files` has the value 'corpus/*.txt': no file matches it": (
            lambda file: shutil.rmtree(file.parent / "corpus"),
            "keep those tokens in the cache, or bring the text back as it was",
        ),
    }
    for told, (change, remedy) in changes.items():
        change(write_study())
        for vary, ran in (({"rho": [1.0, 0.5, 0.0]}, 3), (FOUR["vary"], 4)):  # nothing is left to train; something is
            file = write_study(vary=vary)
            assert main(["plan", str(file), "--json"]) == 0
            out, err = capsys.readouterr()
            (note,) = [line for line in err.splitlines() if line.startswith(f"note: the text of `data` {told}")]
            assert note.endswith(f"; {remedy}")
            assert f"goes on with the tokens that it began with, {began} as its" in note
            assert [text["digest"] for text in json.loads(out)["texts"]] == [began]
            ledger, said = run(file)
            assert note in said
            assert digests(ledger) == {began}
            shutil.rmtree(tmp_path / "runs" / "tiny" / "trials" / engine.ran[-1]) if ran == 4 else None


def test_a_new_text_of_a_study_that_has_results_is_refused_by_plan_as_by_run(
    write_study: Callable[..., Path],
    engine: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    file = write_study()
    run(file)
    (file.parent / "mine.txt").write_bytes(b"caf\xe9 " * 4000)
    assert main(["plan", str(file), "--set", "data.files=[mine.txt]"]) == 2
    assert "'mine.txt': byte 3 is not UTF-8" in capsys.readouterr().err


def test_finished_trials_under_another_name_of_the_same_text_are_told(
    write_study: Callable[..., Path],
    engine: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    run(write_study())
    (tmp_path / "corpus").rename(tmp_path / "texts")
    file = write_study(data=machine.TINY["data"] | {"files": ["texts/*.txt"]}, vary={"rho": [1.0, 0.7, 0.5]})
    capsys.readouterr()
    assert main(["plan", str(file)]) == 0
    (note,) = [line for line in capsys.readouterr().err.splitlines() if "under another name" in line]
    assert note.startswith("note: 2 finished trials in runs/tiny")
    assert 'write `files: ["corpus/*.txt"]`' in note
    assert [line for line in run(file)[1] if line.replace(str(tmp_path) + "/", "") == note]
    assert not [line for line in run(file)[1] if "under another name" in line]
