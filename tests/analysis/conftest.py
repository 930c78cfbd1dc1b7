"""A synthetic study's results folder: the files of a real one, losses from a known curve."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from matplotlib.figure import Figure

from analysis.fits.allocation import fit_allocation
from analysis.fits.joint import fit_joint
from sparsemem.results import COLUMNS, MEASURED

FEW = 100
"""Resamples of a law over several budgets where a study's sentences and figures are tested; its own tests, and those of
bytes, take all.
"""
SHARES = (1.0, 0.9, 0.75, 0.6, 0.4, 0.2, 0.1, 0.0)
SEQUENCES = 64


def curve(share: float) -> float:
    """Nats per token: least at 0.35, 0.0845 below share 1."""
    return 4.0 + 0.2 * (share - 0.35) ** 2


def make_study(
    folder: Path,
    *,
    tokens: tuple[int, ...] = (500_000,),
    seeds: int = 2,
    shares: tuple[float, ...] = SHARES,
    loss: Callable[[float], float] = curve,
    noise: float = 0.003,
    rates: dict[float, float] | None = None,
    dense: bool = False,
    statuses: dict[int, str] | None = None,
    records: int = 16,
    sequences: int = SEQUENCES,
) -> Path:
    """Write a results folder.

    Args:
        records: of a training curve; eight of them are evaluations.
        sequences: held out.
        rates: learning rate -> loss added by it; all shares and seeds at every rate.
        statuses: row -> status of trials that did not finish.
    """
    rng = np.random.default_rng(7)
    rates = rates or {0.01: 0.0}
    rows: list[dict[str, Any]] = []
    folder.mkdir(parents=True, exist_ok=True)
    for budget in tokens:
        gain = 0.4 * np.log(budget / 500_000)
        for seed in range(seeds):
            together, by_sequence = 0.01 * rng.standard_normal(), rng.normal(0, 0.5, sequences)
            for share in (*shares, *((None,) if dense else ())):
                for rate, penalty in rates.items():
                    row = len(rows)
                    status = (statuses or {}).get(row, "finished")
                    own = (
                        (4.3 if share is None else loss(share))
                        - gain
                        + together
                        + noise * rng.standard_normal()
                        + penalty
                    )
                    losses = own + by_sequence - by_sequence.mean() + _centred(rng, 0.05, sequences)
                    trial = _trial(f"{row:012x}", status, seed, share, budget, own if status == "finished" else None)
                    trial |= {"budget.tokens": budget} if len(tokens) > 1 else {}
                    trial |= {"train.lr": rate} if len(rates) > 1 else {}
                    rows.append(trial)
                    _write_trial(folder / "trials" / trial["trial_id"], status, budget, own, losses, records)
    return _write_study(folder, rows, {"vary": {"rho": list(shares), "seed": list(range(seeds))}})


def make_points(
    folder: Path,
    kind: str,
    points: Sequence[dict[str, Any]],
    *,
    seeds: int = 2,
    noise: float = 0.003,
    statuses: dict[int, str] | None = None,
    described: dict[str, Any] | None = None,
) -> Path:
    """Write the results folder of a study of any kind.

    Args:
        kind: value of `analysis` in study.yaml.
        points: columns of `trials.csv` that a point sets, varied fields and `share_...` too, and its true `loss`; `rho`
            is its share.
        statuses: row (seed by seed, the points in order) -> status of trials that did not finish.
        described: fields of study.yaml in place of the usual ones.
    """
    rng = np.random.default_rng(7)
    rows: list[dict[str, Any]] = []
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(seeds):
        together, by_sequence = 0.01 * rng.standard_normal(), rng.normal(0, 0.5, SEQUENCES)
        for point in points:
            status = (statuses or {}).get(len(rows), "finished")
            own = point["loss"] + together + noise * rng.standard_normal()
            losses = own + by_sequence - by_sequence.mean() + _centred(rng, 0.05)
            tokens = point.get("tokens", 500_000)
            trial = _trial(
                f"{len(rows):012x}", status, seed, point.get("rho", 0.0), tokens, own if status == "finished" else None
            )
            rows.append(trial | {name: value for name, value in point.items() if name != "loss"})
            _write_trial(folder / "trials" / trial["trial_id"], status, tokens, own, losses)
    return _write_study(folder, rows, {"analysis": kind, **(described or {})})


def _write_study(folder: Path, rows: list[dict[str, Any]], described: dict[str, Any]) -> Path:
    varied = dict.fromkeys(name for row in rows for name in row if name not in COLUMNS)
    pd.DataFrame(rows)[[*COLUMNS, *varied]].to_csv(folder / "trials.csv", index=False)
    study = {
        "study": folder.name,
        "question": "Which share of the sparse parameters should be routed experts?",
        "data": {"corpus": "python-source", "vocab_size": 4096, "context": 128},
        "model": {
            "layers": 3,
            "width": 64,
            "heads": 4,
            "moe": {"expert_width": 48, "top_k": 2},
            "engram": {"layers": [2], "orders": [2, 3]},
        },
        "budget": {"total_params": "1.24M", "active_params": "135k", "tokens": "500k"},
        **described,
        "provenance": {
            "sparsemem": "0.1.0",
            "python": "3.12",
            "torch": "2.13.0",
            "git_commit": "0" * 40,
            "data": [{"id": "d", "digest": "ab12"}],
        },
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    manifest = {
        **{
            "corpus": "python-source",
            "digest": "ab12",
            "documents": 900,
            "train_tokens": 9_000_000,
            "validation_tokens": 131_072,
        },
        **{
            "packages": [
                {"name": "alpha", "version": "1.0", "split": "train"},
                {"name": "beta", "version": "2.0", "split": "validation"},
            ]
        },
        **{
            "duplicates_exact": 3,
            "duplicates_near": 4,
            "bytes_per_token": 3.2,
            "vocab_size": 4096,
            "canonical_size": 3500,
        },
        "overlap": {"2": 0.81, "3": 0.52, "4": 0.31, "5": 0.2, "8": 0.05},
    }
    (folder / "data.json").write_text(json.dumps(manifest))
    return folder


def _trial(
    trial_id: str, status: str, seed: int, share: float | None, tokens: int, loss: float | None
) -> dict[str, Any]:
    planned = {
        **{
            "trial_id": trial_id,
            "status": status,
            "study": "synthetic",
            "seed": seed,
            "rho": share,
            "share_moe": share,
        },
        **{
            "share_engram": None if share is None else 1 - share,
            "total_params": 1_240_000,
            "active_params": 135_000,
            "sparse_params": 0 if share is None else 1_105_000,
        },
        **{
            "embedding_params": 524_288,
            "budget_error_total": 0.0011,
            "budget_error_active": -0.0007,
            "routed_experts": round(38 * (share or 0)) + 2,
        },
        **{
            "shared_width": 96,
            "memory_rows": round(138_000 * (1 - (share or 0))),
            "memory_rows_read": 8,
            "memory_params": 1.1e6,
        },
        **{"memory_flops_share": 0.05, "flops_per_token": 9.1e5, "flops_per_token_head": 2.4e6},
        **{"memory_bytes_per_token": 110_000, "tokens": tokens},
    }
    if loss is None:
        return planned | dict.fromkeys(MEASURED)
    measured = {"val_loss": loss, "val_loss_se": 0.02, "val_bpb": loss / 2.2, "train_loss": loss - 0.1}
    return planned | measured | {"tokens_per_second": 12_345.6, "peak_memory_bytes": 9.0e8, "seconds": 41.7}


def _write_trial(folder: Path, status: str, tokens: int, loss: float, losses: np.ndarray, records: int = 16) -> None:
    if status in ("pending", "running"):
        return
    folder.mkdir(parents=True)
    if status in ("failed", "out_of_memory"):
        (folder / "failure.json").write_text(
            json.dumps({"status": status, "message": "MemoryError: <b>12 GB</b> asked for", "traceback": ""})
        )
        return
    done = np.linspace(0, tokens, records + 1)[1:].round().astype(int)
    evaluated = np.arange(1, records + 1) % (records // 8) == 0
    falling = loss + 4 * np.exp(-5 * done / tokens) - 4 * np.exp(-5)
    table = pd.DataFrame(
        {
            "step": done // 2048,
            "tokens": done,
            "train_loss": falling - 0.05,
            "val_loss": np.where(evaluated, falling, np.nan),
        }
    )
    table.assign(lr=0.01, grad_norm=1.0, expert_load_max=1.3, tokens_per_second=12_000, seconds=1.0).to_csv(
        folder / "curve.csv", index=False
    )
    if status == "finished":
        pd.DataFrame({"sequence": np.arange(len(losses)), "nats_per_token": losses}).to_csv(
            folder / "val_losses.csv", index=False
        )


def _centred(rng: np.random.Generator, sd: float, sequences: int = SEQUENCES) -> np.ndarray:
    drawn = rng.normal(0, sd, sequences)
    return drawn - drawn.mean()


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """8 shares, 2 seeds, one budget."""
    return make_study(tmp_path / "one-budget")


@pytest.fixture(scope="session")
def troubled_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 trials, the dense baseline among them: one out of memory, one diverged, one pending."""
    folder = tmp_path_factory.mktemp("studies") / "troubled"
    return make_study(folder, statuses={3: "out_of_memory", 9: "diverged", 11: "pending"}, dense=True)


@pytest.fixture(autouse=True)
def light(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Laws over several budgets take `FEW` resamples, curves four times as many, and figures are saved as empty pages
    but in tests marked `figures`.
    """
    monkeypatch.setattr("analysis.studies.allocation.fit_joint", functools.partial(fit_joint, resamples=FEW))
    monkeypatch.setattr(
        "analysis.studies.allocation.fit_allocation", functools.partial(fit_allocation, resamples=4 * FEW)
    )
    if not request.node.get_closest_marker("figures"):
        monkeypatch.setattr("analysis.report.save", _save_nothing)


def _save_nothing(figure: Figure, data: pd.DataFrame, folder: Path, name: str) -> None:
    for suffix in ("svg", "png"):
        (folder / f"{name}.{suffix}").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"/>')
    data.to_csv(folder / f"{name}.csv", index=False)


@pytest.fixture
def new_study(tmp_path: Path) -> Callable[..., Path]:
    """`make_study` into a folder of its own, named by the first argument."""
    return lambda name="study", **options: make_study(tmp_path / name, **options)


@pytest.fixture
def new_points(tmp_path: Path) -> Callable[..., Path]:
    """`make_points` into a folder of its own, named by the kind."""
    return lambda kind, points, **options: make_points(tmp_path / kind, kind, points, **options)


@pytest.fixture
def published() -> Path:
    """The folder of public scaling data, which stays out of the repository."""
    folder = Path(__file__).resolve().parents[3] / "shared" / "data" / "fits"
    if not folder.is_dir():
        pytest.skip("needs shared/data/fits beside the checkout")
    return folder
