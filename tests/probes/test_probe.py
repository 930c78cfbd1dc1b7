"""`sparsemem probe`: the files that it leaves of a trained study, and what it says where it can leave none."""

from __future__ import annotations

import csv
import math
import shutil
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import machine
import numpy as np
import pytest
import torch

from sparsemem.api import run_study
from sparsemem.cli import main
from sparsemem.config import ConfigError, Run, Study, Trial, load_study
from sparsemem.data.cache import kept_folder
from sparsemem.probes.alignment import soft_alignment
from sparsemem.probes.cka import CKA
from sparsemem.probes.pairs import SEEDS, SHARES, alignments, by_share, pairs
from sparsemem.study import launch
from sparsemem.study import probing as module
from sparsemem.study.engines.worker import run_job
from sparsemem.study.jobs import Job
from sparsemem.study.ledger import Ledger
from sparsemem.train.kept import load_model
from sparsemem.trial_files import MODEL

FIELDS = {
    "budget": machine.TINY["budget"] | {"tokens": 512},
    "vary": {"rho": [1.0, 0.5], "seed": [0, 1]},
    "run": {"keep_models": True},
}


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ledger]:
    """A study of two shares and two seeds with its models; the cache holds its text."""
    base = tmp_path_factory.mktemp("probed")

    def train(jobs: Sequence[Job], run: Run) -> None:
        for job in jobs:
            run_job(job, run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("SPARSEMEM_CACHE", str(base / "cache"))
        patch.setattr(launch, "find_engine", lambda name, address: train)
        patch.setattr("sparsemem.api._report", lambda folder, say: None)
        file = machine.write_study(base, **FIELDS)
        yield run_study(load_study(file), base, base / "runs", say=lambda line: None)


def read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_kept_model_and_pair_is_probed(ledger: Ledger, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", str(ledger.folder), "--sequences", "1000"]) == 0
    out, err = capsys.readouterr()
    assert "[8/8] CKA of" in err  # 4 models, 2 pairs of shares, 2 of seeds
    assert "0.5 in 1" in out
    for row in ledger.rows:
        lens = read(ledger.trial_folder(row["trial_id"]) / "probes" / "logit_lens.csv")
        assert [each["layer"] for each in lens] == ["0", "1", "2"]
        assert lens[-1]["kl_final_layer"] == lens[-1]["kl_layer_final"] == "0.0"
        assert float(lens[0]["kl_final_layer"]) > 0
        result = ledger.state(row["trial_id"]).result
        assert float(lens[-1]["loss"]) == pytest.approx(result["val_loss"], rel=1e-6)
        assert float(lens[-1]["loss_se"]) == pytest.approx(result["val_loss_se"], rel=1e-5)
        for name, pools in (("suppression", ("moe", "engram")), ("usage", ("moe", "engram")), ("gates", ("engram",))):
            rows = read(ledger.trial_folder(row["trial_id"]) / "probes" / f"{name}.csv")
            held = [pool for pool in pools if float(row["share_moe"]) < 1 or pool == "moe"]
            assert list(dict.fromkeys(each["pool"] for each in rows)) == held
        for each in read(ledger.trial_folder(row["trial_id"]) / "probes" / "suppression.csv"):
            if not each["order"]:
                assert float(each["loss"]) == pytest.approx(result["val_loss"], rel=1e-6)
    cka = read(ledger.folder / "probes" / "cka.csv")
    kinds = [(each["pair"], each["positions"]) for each in cka]
    assert all(kinds.count((pair, at)) == 18 for pair in (SHARES, SEEDS) for at in ("all", "unit_ends"))
    cka = [each for each in cka if each["positions"] == "all"]
    for each in cka:
        same = (each["first_share"] == each["second_share"], each["first_seed"] == each["second_seed"])
        assert same == ((False, True) if each["pair"] == SHARES else (True, False))
    aligned = read(ledger.folder / "probes" / "alignment.csv")
    assert len(aligned) == 8
    for each in aligned:
        column = [
            float(row["unbiased"])
            for row in cka
            for reference, other in (("first", "second"), ("second", "first"))
            if (row[f"{reference}_id"], row[f"{other}_id"]) == (each["reference_id"], each["trial_id"])
            and row[f"{other}_layer"] == each["layer"]
            and row[f"{reference}_layer"] != "0"
        ]
        assert float(each["index"]) == soft_alignment(torch.tensor([column]).T, 1)[0]
        assert float(each["difference"]) == float(each["index"]) - float(each["null"])


def test_the_area_between_lens_curves_is_that_of_the_curves(ledger: Ledger) -> None:
    assert main(["probe", str(ledger.folder), "--sequences", "1000"]) == 0
    areas = read(ledger.folder / "probes" / "lens_area.csv")
    assert [each["pair"] for each in areas].count(SHARES) == [each["pair"] for each in areas].count(SEEDS) == 2
    for each in areas:
        under = []
        for name in ("first", "second"):
            lens = read(ledger.trial_folder(each[f"{name}_id"]) / "probes" / "logit_lens.csv")
            kl = [float(row["kl_final_layer"]) for row in lens]
            under.append(np.trapezoid(kl, dx=1 / (len(kl) - 1)))
        assert float(each["area"]) == pytest.approx(under[1] - under[0], abs=1e-9)
        assert float(each["area_low"]) < float(each["area"]) < float(each["area_high"])


def test_named_trials_alone_are_probed(ledger: Ledger, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (row["trial_id"] for row in ledger.rows[:2])
    assert main(["probe", str(ledger.folder), "--trial", first, second, "--sequences", "3"]) == 0
    assert "[3/3] CKA" in capsys.readouterr().err
    assert {row["sequences"] for row in read(ledger.trial_folder(first) / "probes" / "logit_lens.csv")} == {"3"}
    assert main(["probe", str(ledger.folder), "--trial", first, "--sequences", "1"]) == 0
    assert "none are compared" in capsys.readouterr().out
    assert read(ledger.trial_folder(first) / "probes" / "logit_lens.csv")[0]["loss_se"] == ""


def test_a_model_is_like_itself(ledger: Ledger) -> None:
    kept = load_model(ledger.trial_folder(ledger.rows[0]["trial_id"]))
    for kind in ("unbiased", "minibatch", "biased"):
        assert torch.allclose(
            module.compare(kept, kept, module.Samples(64))["all"].matrix(kind).diagonal(), torch.ones(3).double()
        )


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--trial", "0.25"], "--trial 0.25: no trial that was begun has it"),
        (["--trial", "half"], "--trial: 'half' names no trial: write a share"),
        (["--sequences", "0"], "--sequences 0: write 1 or more"),
    ],
)
def test_what_cannot_be_probed_is_refused(
    ledger: Ledger, more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["probe", str(ledger.folder), *more]) == 2
    assert said in capsys.readouterr().err


def test_sequences_too_short_for_cka_are_refused_before_any_work(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = module.kept_trials(ledger, [])
    short = [each.model_copy(update={"data": each.data.model_copy(update={"context": 2})}) for each in trials]
    monkeypatch.setattr(module, "kept_trials", lambda *_: short)
    said = list[str]()
    with pytest.raises(ConfigError, match=r"`data\.context` of trial .* is 2, and CKA needs"):
        module.probe_study(ledger.folder, [], 8, "cpu", said.append)
    assert said == []


def test_where_no_model_was_kept_it_says_what_to_type(
    ledger: Ledger, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    id_ = ledger.rows[0]["trial_id"]
    model = ledger.trial_folder(id_) / MODEL
    aside = model.rename(model.with_suffix(".aside"))
    try:
        assert main(["probe", str(ledger.folder), "--trial", id_]) == 2
    finally:
        aside.rename(model)
    said = capsys.readouterr().err
    assert "keep_models: true" in said
    assert f"rm {ledger.trial_folder(id_) / 'result.json'}" in said
    monkeypatch.setenv("SPARSEMEM_CACHE", str(ledger.folder / "elsewhere"))
    assert main(["probe", str(ledger.folder), "--trial", id_]) == 2
    assert "set SPARSEMEM_CACHE" in capsys.readouterr().err


# --- pairs ------------------------------------------------------------------------------------------------------------


def trial(rho: Any, seed: int, **model: Any) -> Trial:
    fields = {name: machine.TINY[name] for name in ("data", "budget", "train")}
    return Trial.model_validate(fields | {"model": machine.TINY["model"] | model, "rho": rho, "seed": seed})


def test_pairs_differ_in_shares_or_seed_alone() -> None:
    experts, again, half, dense = trial(1.0, 0), trial(1.0, 1), trial(0.5, 0), trial("dense", 1)
    wider, faster = trial(0.5, 0, width=32), half.model_copy(update={"train": half.train.model_copy(update={"lr": 1})})
    assert list(pairs([experts, again, half, dense])) == [
        (SEEDS, experts, again),
        (SHARES, experts, half),
        (SHARES, again, dense),
    ]
    assert list(pairs([experts, wider])) == []
    assert list(pairs([experts, faster])) == [(SHARES, experts, faster)]
    assert list(pairs([faster, trial(0.5, 1)])) == []


def test_the_index_is_held_against_the_references_own_seeds() -> None:
    experts, again, half = trial(1.0, 0), trial(1.0, 1), trial(0.5, 0)
    null, found = torch.tensor([[0.9, 0.2], [0.1, 0.8]]), torch.tensor([[0.3, 0.1], [0.7, 0.9]])
    rows = alignments([(SEEDS, experts, again, null), (SHARES, experts, half, found)])
    deeper, shallower = rows[:2], rows[2:]
    assert [(row["index"], row["null"], row["difference"]) for row in deeper] == [(2, 1, 1), (2, 2, 0)]
    assert [row["share"] for row in deeper] == ["0.5", "0.5"]
    assert [(row["index"], row["null"], row["difference"]) for row in shallower] == [(1, None, None), (2, None, None)]
    assert by_share(rows) == [("1", "0.5", 0.5, None, 1), ("0.5", "1", None, None, 0)]


def test_the_interval_is_over_seeds() -> None:
    def row(seed: int, layer: int, difference: float) -> dict[str, Any]:
        ids = {"reference_id": f"a{seed}", "trial_id": f"b{seed}", "seed": seed}
        return ids | {"reference_share": "1", "share": "0", "layer": layer, "difference": difference}

    rows = [row(0, 1, 1.0), row(0, 2, 0.0), row(1, 1, 2.0), row(1, 2, math.nan), row(2, 1, 0.0), row(2, 2, 1.0)]
    means = [0.5, 2.0, 0.5]
    found = [("1", "0", 1.0, statistics.stdev(means) / math.sqrt(3), 3)]
    assert by_share(rows) == found
    again = [{**each, "trial_id": f"{each['trial_id']} at another rate"} for each in rows]
    assert by_share([*rows, *again]) == found


def test_cka_at_ends_of_units_is_that_of_their_rows(ledger: Ledger) -> None:
    first, second = (load_model(ledger.trial_folder(row["trial_id"])) for row in ledger.rows[:2])
    samples = module.Samples(64)
    found, sample = module.compare(first, second, samples), samples.of(first)
    ends = torch.from_numpy(sample.unit_ends_P)
    wanted = CKA()
    wanted.add(*([each[ends] for each in module._streams(kept, sample.windows[0])] for kept in (first, second)))
    assert found["unit_ends"].tokens == int(ends.sum()) < found["all"].tokens
    assert torch.allclose(found["unit_ends"].matrix("unbiased"), wanted.matrix("unbiased"), atol=1e-10)


# --- at the end of a trial --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("probe", "left"), [(["usage", "logit_lens"], {"usage.csv", "logit_lens.csv"}), (False, set()), ("fails", set())]
)
def test_a_study_may_probe_each_trial_at_its_end(
    ledger: Ledger,
    probe: Any,
    left: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    id_ = ledger.rows[0]["trial_id"]
    copy = shutil.copytree(ledger.trial_folder(id_), tmp_path / id_, ignore=shutil.ignore_patterns("probes"))
    if probe == "fails":
        monkeypatch.setattr("sparsemem.probes.trial.read", lambda *_: 1 / 0)
        probe = ["gates"]
    kept = load_model(copy)
    tokens = kept_folder(kept.corpus)
    assert tokens is not None
    run_job(Job(copy, tokens), Run(keep_models=True, probe=probe))
    assert {path.name for path in copy.glob("probes/*")} == left
    (tmp_path / "again").mkdir()
    for name in left:
        samples = module.Samples(256)
        module.probe_trial(kept, samples.of(kept), tmp_path / "again")
        assert (tmp_path / "again" / "probes" / name).read_text() == (copy / "probes" / name).read_text()
    if not left and probe:
        assert "the probes failed; `sparsemem probe` runs them again" in capsys.readouterr().err
        assert Ledger.read(ledger.folder).state(id_).status == "finished"


def test_probes_are_no_part_of_a_trial_and_need_its_model(tmp_path: Path) -> None:
    def study(**run: Any) -> Study:
        return load_study(machine.write_study(tmp_path, run=run))

    ids = [each.id for each in study(keep_models=True).trials()]
    assert [each.id for each in study(keep_models=True, probe=True).trials()] == ids
    with pytest.raises(ConfigError, match="`probe` reads kept models; add `keep_models: true`"):
        study(probe=True)
    with pytest.raises(ConfigError, match="run `sparsemem probe` afterwards"):
        study(probe=["gates"], keep_models=True, storage="file:///nowhere")
    message = r"field `run\.probe` has the value \['lens'\]: write true, false, or some of \[logit_lens, gates"
    with pytest.raises(ConfigError, match=message):
        study(probe=["lens"], keep_models=True)


def test_any_text_may_be_read(ledger: Ledger, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    id_ = ledger.rows[-1]["trial_id"]
    (tmp_path / "a.py").write_text("def load_models(path):\n    return [path]\n" * 40)
    command = ["probe", str(ledger.folder), "--trial", id_, "--text"]
    assert main([*command, str(tmp_path / "a.py")]) == 0
    passage = "".join(row["text"] for row in read(ledger.trial_folder(id_) / "probes" / "gate_text.csv"))
    assert passage.strip() in (tmp_path / "a.py").read_text()
    (tmp_path / "b.py").write_text("x")
    assert main([*command, str(tmp_path / "b.py")]) == 2
    assert "fill no sequence of `data.context`" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "c.py")]) == 2
    assert "--text" in capsys.readouterr().err
