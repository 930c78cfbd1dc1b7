"""The committed studies say the same packed and unpacked."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest

from analysis.errors import AnalysisError
from analysis.report import write_report
from analysis.results import Results
from sparsemem.study.ledger import Ledger
from sparsemem.study.ledger.pack import pack_study
from sparsemem.trial_files import PACK, RECORDS, Records, TrialFiles

RESULTS = Path(__file__).parents[2] / "results"
STUDIES = sorted(path.parent.name for path in RESULTS.glob("*/study.yaml"))


def both_forms(name: str, place: Path) -> tuple[Path, Path, Records]:
    """Copies of a committed study, its trials in folders and in a pack that was made of them; and all its trials'
    files.
    """
    source = TrialFiles(RESULTS / name)
    records = {
        id_: {path.name: path.read_bytes() for path in (RESULTS / name / "trials").glob(f"{id_}/*") if path.is_file()}
        for id_ in source.begun()
    }
    records |= source.packed
    folders, packed = place / "folders" / name, place / "packed" / name
    shutil.copytree(RESULTS / name, folders, ignore=shutil.ignore_patterns(PACK, "trials", "lock"))
    for id_, own in records.items():
        (folders / "trials" / id_).mkdir(parents=True)
        for file, content in own.items():
            (folders / "trials" / id_ / file).write_bytes(content)
        if (probes := RESULTS / name / "trials" / id_ / "probes").is_dir():  # no records: never packed
            shutil.copytree(probes, folders / "trials" / id_ / "probes")
    shutil.copytree(folders, packed)
    pack_study(packed, lambda line: None)
    return folders, packed, records


def reported(folder: Path) -> dict[str, bytes]:
    for path in (folder / "figures").iterdir():
        path.unlink()
    write_report(folder)
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in [*folder.glob("*.*"), *folder.glob("figures/*")]
        if path.name != PACK
    }


# With and without the use of a memory; and with trials of an earlier plan that were never trained.
@pytest.mark.parametrize("name", ["compute-ratio", "allocation-quick", "allocation-cpu-lr"])
def test_a_committed_study_is_the_same_in_both_forms(name: str, tmp_path: Path) -> None:
    folders, packed, records = both_forms(name, tmp_path)
    found = TrialFiles(packed)
    assert found.packed == {id_: own for id_, own in records.items() if "result.json" in own}
    assert found.begun() == sorted(records)
    one, other = Results(folders), Results(packed)
    pd.testing.assert_frame_equal(one.curves, other.curves, check_exact=True)
    pd.testing.assert_frame_equal(one.sequence_losses, other.sequence_losses, check_exact=True)
    assert Ledger.read(folders).table() == Ledger.read(packed).table()
    assert Ledger.read(packed).unfinished() == []


def test_a_report_of_a_committed_study_is_the_same_bytes_in_both_forms(tmp_path: Path) -> None:
    folders, packed, _ = both_forms("activation-density", tmp_path)
    written = reported(folders)
    assert {"fits.json", "report.html", "trials.csv"} <= written.keys()
    assert any(path.endswith(".csv") for path in written if path.startswith("figures"))
    assert reported(packed) == written


@pytest.mark.slow
@pytest.mark.figures
@pytest.mark.parametrize("name", STUDIES)
def test_all_of_a_committed_report_is_the_same_bytes_in_both_forms(name: str, tmp_path: Path) -> None:
    folders, packed, _ = both_forms(name, tmp_path)
    assert reported(packed) == reported(folders)


@pytest.mark.parametrize("name", STUDIES)
def test_a_committed_pack_holds_the_trials_that_its_table_names(name: str) -> None:
    """Trials that extend a packed study may lie beside it in folders, but none in both."""
    packed, ledger = TrialFiles(RESULTS / name).packed, Ledger.read(RESULTS / name)
    recorded = pd.read_csv(RESULTS / name / "trials.csv", dtype={"trial_id": str})
    assert packed
    assert not [id_ for id_ in packed for record in RECORDS if (ledger.trial_folder(id_) / record).exists()]
    now = pd.DataFrame(ledger.table())
    assert now["status"].tolist() == recorded["status"].tolist()
    pd.testing.assert_series_equal(
        now["val_loss"], recorded["val_loss"], check_exact=True
    )  # empty of what is not trained


def test_a_damaged_file_in_a_pack_is_named_within_it(tmp_path: Path) -> None:
    folders, packed, records = both_forms("allocation-quick", tmp_path)
    shutil.rmtree(packed)
    victim = sorted(records)[3]
    curve = folders / "trials" / victim / "curve.csv"
    curve.write_text(curve.read_text().replace("train_loss", "train_los"))
    pack_study(folders, lambda line: None)
    with pytest.raises(
        AnalysisError, match=rf"{PACK}.{victim}.curve.csv: column `train_loss` \(is it `train_los`\?\) is missing"
    ):
        _ = Results(folders).curves
