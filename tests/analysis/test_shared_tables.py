"""Tables of the same 25 runs, written in many ways: each gives the same fit, or says which runs it left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from analysis.__main__ import main

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "data" / "cases" / "tables"


def fit(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    code = main(["fit", "--law", "chinchilla", str(path), "--n", "params", "--d", "tokens", "--loss", "loss", "--json"])
    said = capsys.readouterr()
    assert code == 0, said.err
    found = json.loads(said.out)
    values = {name: each["value"] for name, each in found["parameters"].items()}
    return {"status": found["status"], "values": values, "rows": len(found["rows"]), "left_out": found["left_out"]}


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*")) or ["plain.csv"])
def test_every_way_to_write_a_table_gives_the_same_fit_or_says_what_was_left_out(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if not FOLDER.is_dir():
        pytest.skip("needs shared/data/cases/tables beside the checkout")
    plain, found = fit(FOLDER / "plain.csv", capsys), fit(FOLDER / name, capsys)
    assert found["status"] == plain["status"] == "converged"
    assert found["values"] == pytest.approx(plain["values"], rel=1e-3)
    assert (found["rows"] == plain["rows"]) != bool(found["left_out"]), found["left_out"]
