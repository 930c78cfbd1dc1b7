"""What names a text must outlive new fields: its id stands in finished studies, its digest in the cache."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import pytest
import tokenizers
import yaml

from sparsemem import checkout
from sparsemem.config import Data, Study, load_study
from sparsemem.config.data import FIRST_DATA_FIELDS
from sparsemem.data.corpus import Corpus
from sparsemem.data.prepare import FORMAT, _digest
from sparsemem.study.ledger.provenance import data_id

RESULTS = Path(__file__).parents[2] / "results"


@pytest.mark.parametrize("recorded", sorted(RESULTS.glob("*/study.yaml")), ids=lambda path: path.parent.name)
def test_the_texts_of_committed_results_keep_their_ids(recorded: Path) -> None:
    ids = {entry["id"] for entry in yaml.safe_load(recorded.read_text(encoding="utf-8"))["provenance"]["data"]}
    study: Study = load_study(recorded)
    assert ids <= {data_id(trial.data) for trial in study.trials()}


def test_a_digest_rests_on_no_younger_field_at_its_default(tmp_path: Path) -> None:
    data = Data()
    settings = {
        name: value
        for name, value in data.model_dump(mode="json").items()
        if name in FIRST_DATA_FIELDS - {"context", "tokenizer"}
    }
    text = json.dumps([FORMAT, tokenizers.__version__, settings, None, "text"], sort_keys=True)
    assert _digest(data, Corpus("text", {}, list), tmp_path) == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_only_tracked_files_and_code_make_a_checkout_dirty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
            check=True,
            capture_output=True,
        )

    module = tmp_path / "sparsemem" / "checkout.py"
    module.parent.mkdir(parents=True)
    for path in (module, tmp_path / "README.md", tmp_path / "analysis" / "new.py"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    monkeypatch.setattr(checkout, "__file__", str(module))
    (tmp_path / "mine.yaml").write_text("study: mine\n")
    assert checkout.checkout()[1] is False
    (tmp_path / "sparsemem" / "new.py").write_text("1\n")
    assert checkout.checkout()[1] is True
    (tmp_path / "sparsemem" / "new.py").unlink()
    (tmp_path / "README.md").write_text("2\n")
    assert checkout.checkout()[1] is True
