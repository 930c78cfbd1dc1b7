"""`sparsemem evaluate`: a kept model's loss on its held-out text is its trial's, and its parts add up to it."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from sparsemem.cli import main
from sparsemem.config import ConfigError, Run, load_study
from sparsemem.data import Tokens, prepare
from sparsemem.data.cache import cache_folder
from sparsemem.study.engines.worker import run_job
from sparsemem.study.jobs import Job
from sparsemem.train import text_loss
from sparsemem.train.kept import KeptModel, load_model
from sparsemem.train.text_loss import Text, evaluate, held_out_text, read_text

from .conftest import TINY, write_corpus


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A trial's folder with its model, and the folder with the files that it held out, `val/*.txt`."""
    base = tmp_path_factory.mktemp("made")
    write_corpus(base / "corpus")
    draw = random.Random(1)
    words = (base / "corpus" / "00.txt").read_text(encoding="utf-8").split()
    (base / "val").mkdir()
    for number in range(3):
        (base / "val" / f"{number}.txt").write_text(" ".join(draw.choices(words, k=150)), encoding="utf-8")
    data = TINY["data"] | {"validation_files": ["val/*.txt"], "validation_tokens": 4096}
    (base / "tiny.yaml").write_text(yaml.safe_dump(TINY | {"data": data, "vary": {"rho": [0.5]}}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"write `validation_tokens: \d+`") as refused:
        prepare(load_study(base / "tiny.yaml").trials()[0].data, base)
    whole = int(str(refused.value).partition("write `validation_tokens: ")[2].partition("`")[0])
    trial = load_study(base / "tiny.yaml", {"data.validation_tokens": whole}).trials()[0]
    (base / "trial").mkdir()
    (base / "trial" / "trial.yaml").write_text(yaml.safe_dump(trial.model_dump(mode="json")), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        run_job(Job(base / "trial", prepare(trial.data, base)), Run(keep_models=True))
    return base / "trial", base


@pytest.fixture
def kept(made: tuple[Path, Path]) -> KeptModel:
    return load_model(made[0])


def result(made: tuple[Path, Path]) -> dict[str, Any]:
    return dict(json.loads((made[0] / "result.json").read_text(encoding="utf-8")))


def test_the_held_out_text_gives_the_trials_losses(made: tuple[Path, Path], kept: KeptModel) -> None:
    found, wanted = evaluate(kept, held_out_text(kept), None), result(made)
    for ours, theirs in (("loss", "val_loss"), ("loss_se", "val_loss_se"), ("bits_per_byte", "val_bpb")):
        assert found[ours] == pytest.approx(wanted[theirs], rel=1e-12)


def test_the_held_out_files_give_them_too(
    made: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made[1])
    assert main(["evaluate", "trial", "--text", "val/2.txt", "val/0.txt", "val/1.txt", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["loss"] == pytest.approx(result(made)["val_loss"], abs=1e-6)
    assert found["bits_per_byte"] == pytest.approx(result(made)["val_bpb"], abs=1e-6)
    assert sorted(each["name"] for each in found["documents"]) == ["val/0.txt", "val/1.txt", "val/2.txt"]
    assert main(["evaluate", "trial"]) == 0
    assert f"loss {found['loss']:.6f}" in capsys.readouterr().out


def test_parts_add_up_to_the_whole(made: tuple[Path, Path], kept: KeptModel) -> None:
    text = read_text(kept, ["val/*.txt"], made[1], "--text")
    found = evaluate(kept, text, Tokens.load(cache_folder() / kept.corpus).train)
    orders = [[each for each in found["ngrams"] if each["order"] == order] for order in (1, 2, 3)]
    assert len(found["ngrams"]) == sum(map(len, orders))
    for parts in (found["documents"], *orders):
        assert sum(part["tokens"] for part in parts) == found["scored"]
        assert sum(part["bytes"] for part in parts) == found["bytes"]
        total = sum(part["tokens"] * part["loss"] for part in parts if part["tokens"])
        assert total / found["scored"] == pytest.approx(found["loss"], rel=1e-9)
    assert orders[2][1]["least"] == orders[2][1]["most"] == 0
    assert orders[0][-1]["most"] is None


def _alone(kept: KeptModel, ids: list[int]) -> list[float]:
    """Nats of each token after the first, by the formula, of a text within one sequence."""
    with torch.inference_mode():
        logits = kept.model(torch.tensor([ids[:-1]]))[0][0].double()
    return [float(logits[place].logsumexp(0) - logits[place, token]) for place, token in enumerate(ids[1:])]


def test_documents_by_hand(kept: KeptModel) -> None:
    first, second = [5, 6, 7, kept.separator_id], [8, 9, kept.separator_id]
    ids = np.array(first + second)
    found = evaluate(kept, Text(ids, np.array([1, 1, 1, 0, 2, 2, 0]), ["a", "b"], [4, 3], []), None)
    nats = _alone(kept, ids.tolist())
    assert found["loss"] == pytest.approx(np.mean(nats), rel=1e-5)
    assert found["scored"] == 6  # a text shorter than a sequence is scored whole
    assert [each["loss"] for each in found["documents"]] == pytest.approx(
        [np.mean(nats[:3]), np.mean(nats[3:])], rel=1e-5
    )
    assert found["documents"][0]["bits_per_byte"] == pytest.approx(sum(nats[:3]) / 2 / math.log(2), rel=1e-5)


def test_ngrams_by_hand(kept: KeptModel) -> None:
    end = kept.separator_id
    ids, train = np.array([5, 6, 7, end, 6, 7, 9]), np.array([5, 6, end, 5, 6, 7, end] * 3)
    found = evaluate(kept, Text(ids, np.ones(7, np.int64), ["a"], [7], []), train)
    nats = _alone(kept, ids.tolist())
    bins = {(each["order"], each["least"]): each for each in found["ngrams"] if each["tokens"]}
    # of pairs: none yet at 5, at the end of the first document and after it; 56 six times, 67 three times, twice here
    assert {key[1]: each["tokens"] for key, each in bins.items() if key[0] == 2} == {None: 3, 2: 3}
    assert bins[2, 2]["loss"] == pytest.approx(np.mean([nats[1], nats[2], nats[5]]), rel=1e-5)
    assert bins[2, 2]["most"] == 9
    assert bins[3, 2]["tokens"] == 1  # 567, three times
    assert {key[1]: each["tokens"] for key, each in bins.items() if key[0] == 1} == {None: 1, 2: 5}


def test_masked_document_starts_are_not_scored(kept: KeptModel) -> None:
    ids, sizes = np.array([5, 6, kept.separator_id, 8, 9]), np.ones(5, np.int64)
    data = kept.trial.data.model_copy(update={"mask_document_start": True})
    masked = dataclasses.replace(kept, trial=kept.trial.model_copy(update={"data": data}))
    found = evaluate(masked, Text(ids, sizes, ["a", "b"], [3, 2], []), None)
    nats = _alone(kept, ids.tolist())
    assert found["scored"] == found["bytes"] == 3
    assert found["loss"] == pytest.approx(np.mean([nats[0], nats[1], nats[3]]), rel=1e-5)


def test_an_ngram_does_not_reach_back_into_another_sequence(kept: KeptModel) -> None:
    context = kept.trial.data.context
    ids = np.full(2 * context + 1, 7)
    found = evaluate(kept, Text(ids, np.ones(len(ids), np.int64), ["a"], [len(ids)], []), ids)
    bins = {each["least"]: each["tokens"] for each in found["ngrams"] if each["order"] == 3 and each["tokens"]}
    assert bins == {None: 4, 10: 2 * context - 4}


def test_many_windows_are_the_same_as_few(
    made: tuple[Path, Path], kept: KeptModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = read_text(kept, ["corpus/00.txt"], made[1], "--text")
    whole = evaluate(kept, text, None)
    monkeypatch.setattr(text_loss, "BATCHES_AT_ONCE", 1)
    monkeypatch.setattr("sparsemem.train.evaluate.TOKENS_AT_ONCE", 64)
    assert evaluate(kept, text, None)["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert whole["tokens"] - whole["scored"] <= kept.trial.data.context


def test_without_the_cache_texts_are_asked_for(
    made: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A copy of three files on another machine."""
    shutil.copytree(made[0], tmp_path / "copy", ignore=shutil.ignore_patterns("*.csv", "*.yaml", "result.json"))
    monkeypatch.setenv("SPARSEMEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(made[1])
    assert main(["evaluate", str(tmp_path / "copy")]) == 2
    assert "name texts by --text FILES" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "copy"), "--text", "val/*.txt"]) == 0
    shown = capsys.readouterr()
    assert f"loss {result(made)['val_loss']:.6f}" in shown.out
    assert "-gram" not in shown.out
    assert "give its training text by --train FILE" in shown.err
    assert main(["evaluate", str(tmp_path / "copy"), "--text", "val/*.txt", "--train", "corpus/*.txt"]) == 0
    shown = capsys.readouterr()
    assert "3-gram" in shown.out
    assert not shown.err


def test_other_kinds_of_files_are_read(made: tuple[Path, Path], kept: KeptModel, tmp_path: Path) -> None:
    lines = [json.dumps({"text": path.read_text(encoding="utf-8")}) for path in sorted(made[1].glob("val/*.txt"))]
    (tmp_path / "val.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    rows = read_text(kept, ["val.jsonl.gz"], tmp_path, "--text")
    files = read_text(kept, ["val/*.txt"], made[1], "--text")
    assert len(rows.names) == 3
    assert sorted(rows.ids.tolist()) == sorted(files.ids.tolist())
    assert rows.sizes.sum() == files.sizes.sum() == sum(path.stat().st_size for path in made[1].glob("val/*.txt"))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.txt", None, "--text none.txt: no such file"),
        ("vall/0.txt", None, "--text vall/0.txt: no such file; did you mean val/0.txt?"),
        ("a.bin", "text", "--text 'a.bin': the suffix is none of"),
        ("a.jsonl", '{"body": "text"}', "the model's study reads that column, so give files that have it"),
        ("empty.txt", "", "--text empty.txt: no text in there"),
    ],
)
def test_what_cannot_be_read_is_refused_by_its_option(
    kept: KeptModel, tmp_path: Path, name: str, content: str | None, said: str
) -> None:
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "0.txt").write_text("text")
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError) as refused:
        read_text(kept, [name], tmp_path, "--text")
    assert said in str(refused.value)


def test_one_token_alone_is_too_short(kept: KeptModel) -> None:
    with pytest.raises(ConfigError, match="too short"):
        evaluate(kept, Text(np.array([5]), np.array([1]), ["a"], [1], []), None)


def test_a_list_of_many_documents_is_cut(
    kept: KeptModel, made: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made[1])
    monkeypatch.setattr("sparsemem.study.display.evaluation.MOST_DOCUMENTS", 2)
    assert main(["evaluate", "trial", "--text", "val/*.txt"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("val/") == 2
    assert "and 1 shorter ones, which --json lists" in shown
