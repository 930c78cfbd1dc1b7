"""One command draws every figure again, and the same ledger gives the same bytes wherever and however it runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

New = Callable[..., Path]
POINTS = [
    {
        "memory_rows": rows,
        "memory_rows_read": read,
        "model.ultramem_v2.rows": rows,
        "model.ultramem_v2.top_m": read,
        "loss": 4.4 - 0.01 * rows**0.1 - 0.02 * read**0.5,
    }
    for rows in (256, 1024, 4096)
    for read in (2, 4, 8)
]


def copied(source: Path, target: Path) -> Path:
    """A copy whose files were made in the opposite order, so that folders list them otherwise."""
    for path in sorted((path for path in source.rglob("*") if path.is_file()), reverse=True):
        (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target / path.relative_to(source))
    return target


def report(folders: list[Path], place: Path, **environment: str) -> dict[str, bytes]:
    """Run the one command from `place`, with its home there -> what it wrote, by study and path."""
    place.mkdir()
    own = {"HOME": str(place), "MPLCONFIGDIR": str(place / "mpl"), "PYTHONPATH": str(Path(__file__).parents[2]), **environment}
    kept = {name: value for name, value in os.environ.items() if name not in ("TZ", "LANG", "LC_ALL", "MATPLOTLIBRC", "PYTHONHASHSEED")}
    command = [sys.executable, "-m", "analysis", *map(str, folders)]
    done = subprocess.run(command, cwd=place, env=kept | own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = {}
    for folder in folders:
        for path in [folder / "fits.json", folder / "report.html", *(folder / "figures").iterdir()]:
            written[f"{folder.name}/{path.relative_to(folder)}"] = path.read_bytes()
    return written


def test_bytes_do_not_depend_on_process_place_locale_style_or_order_of_files(new_study: New, new_points: New, tmp_path: Path) -> None:
    studies = [new_study("curve"), new_points("density", POINTS, noise=0.002)]
    others = [copied(study, tmp_path / "elsewhere" / study.name) for study in studies]
    (tmp_path / "matplotlibrc").write_text("font.family: serif\nlines.linewidth: 9\nsavefig.dpi: 50\nsvg.fonttype: none\n")
    first = report(studies, tmp_path / "one", PYTHONHASHSEED="1", TZ="UTC", LC_ALL="C.UTF-8")
    second = report(
        others, tmp_path / "two", PYTHONHASHSEED="2", TZ="Asia/Tokyo", LC_ALL="C", MATPLOTLIBRC=str(tmp_path / "matplotlibrc"), COLUMNS="20"
    )
    assert len(first) == 2 * 2 + 3 * 5
    assert [name for name in first if first[name] != second[name]] == []
    assert {Path(name).suffix for name in first} == {".json", ".html", ".svg", ".png", ".csv"}
    figures = {name.rsplit(".", 1)[0] for name in first if "figures/" in name}
    assert all(f"{figure}.{suffix}" in first for figure in figures for suffix in ("svg", "png", "csv"))  # no figure without its data
