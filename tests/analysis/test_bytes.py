"""One command draws every figure again, and the same ledger gives the same bytes wherever and however it runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

New = Callable[..., Path]
RESULTS = Path(__file__).parents[2] / "results"
# NumPy and OpenBLAS take their code for other processors where their environment variables say so.
PLAIN = " ".join(np._core._multiarray_umath.__cpu_dispatch__)
SETTINGS = (
    {"OMP_NUM_THREADS": "1"},
    {"OMP_NUM_THREADS": "2", "OPENBLAS_CORETYPE": "Haswell"},
    {"OMP_NUM_THREADS": "1", "OPENBLAS_CORETYPE": "Nehalem", "NPY_DISABLE_CPU_FEATURES": PLAIN},
)
FITS = """
import numpy as np, pandas as pd
from analysis import fit_allocation, fit_joint, fit_slots
rng = np.random.default_rng(3)
shares = np.array([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
parts = []
for tokens in (500_000, 2_000_000):
    for seed in range(2):
        noise = 0.01 * rng.standard_normal(6)
        loss = 5 - tokens / 4e6 - 0.1 * (1 - shares) ** 0.5 + 0.02 / (shares + 0.1) ** 0.5 + noise
        sizes = {"tokens": tokens, "total_params": 1e6, "active_params": 1e5, "seed": seed}
        parts.append(pd.DataFrame({**sizes, "share_moe": shares, "val_loss": loss}))
runs = pd.concat(parts, ignore_index=True)
print(fit_joint(runs, resamples=60).to_json())
print(fit_allocation(runs[runs["tokens"] == 500_000], law="two-power", resamples=300).to_json())
sizes, seeds = np.tile(4.0 ** np.arange(2, 8), 2), np.repeat([0, 1], 6)
val_loss = 3 + sizes ** -0.4 + 0.01 * rng.standard_normal(12)
rows = pd.DataFrame({"mechanism": "engram", "memory_rows": sizes, "seed": seeds, "val_loss": val_loss})
print(fit_slots(rows, resamples=300).to_json())
print((np.exp(rng.standard_normal((50, 50))) @ np.exp(rng.standard_normal((50, 50)))).sum(0).tolist())
"""
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
    own = {
        "HOME": str(place),
        "MPLCONFIGDIR": str(place / "mpl"),
        "PYTHONPATH": str(Path(__file__).parents[2]),
        **environment,
    }
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("TZ", "LANG", "LC_ALL", "MATPLOTLIBRC", "PYTHONHASHSEED")
    }
    command = [sys.executable, "-m", "analysis", *map(str, folders)]
    done = subprocess.run(command, cwd=place, env=kept | own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = {}
    for folder in folders:
        for path in [folder / "fits.json", folder / "report.html", *(folder / "figures").iterdir()]:
            written[f"{folder.name}/{path.relative_to(folder)}"] = path.read_bytes()
    return written


def test_bytes_do_not_depend_on_process_place_locale_style_or_order_of_files(
    new_study: New, new_points: New, tmp_path: Path
) -> None:
    studies = [new_study("curve"), new_points("density", POINTS, noise=0.002)]
    others = [copied(study, tmp_path / "elsewhere" / study.name) for study in studies]
    (tmp_path / "matplotlibrc").write_text(
        "font.family: serif\nlines.linewidth: 9\nsavefig.dpi: 50\nsvg.fonttype: none\n"
    )
    first = report(studies, tmp_path / "one", PYTHONHASHSEED="1", TZ="UTC", LC_ALL="C.UTF-8")
    second = report(
        others,
        tmp_path / "two",
        PYTHONHASHSEED="2",
        TZ="Asia/Tokyo",
        LC_ALL="C",
        MATPLOTLIBRC=str(tmp_path / "matplotlibrc"),
        COLUMNS="20",
    )
    assert len(first) == 2 * 2 + 3 * 5
    assert [name for name in first if first[name] != second[name]] == []
    assert {Path(name).suffix for name in first} == {".json", ".html", ".svg", ".png", ".csv"}
    figures = {name.rsplit(".", 1)[0] for name in first if "figures/" in name}
    assert all(
        f"{figure}.{suffix}" in first for figure in figures for suffix in ("svg", "png", "csv")
    )  # no figure without its data


def test_fits_do_not_depend_on_the_processor() -> None:
    said = []
    for setting in SETTINGS:
        done = subprocess.run(
            [sys.executable, "-c", FITS], env=os.environ | setting, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.splitlines())
    assert said[0][:-1] == said[1][:-1] == said[2][:-1]
    if said[0][-1] == said[2][-1]:
        pytest.skip("NumPy rounds alike under all settings here, so nothing was compared")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["allocation-cpu", "memory-slots"])
def test_a_report_does_not_depend_on_the_processor(name: str, tmp_path: Path) -> None:
    written = []
    for place, setting in enumerate(SETTINGS):
        folder = tmp_path / f"copy-{place}" / name
        shutil.copytree(RESULTS / name, folder)
        written.append(report([folder], tmp_path / f"home-{place}", **setting))
    assert len(written[0]) > 4
    for other in written[1:]:
        assert [path for path in written[0] if written[0][path] != other[path]] == []
