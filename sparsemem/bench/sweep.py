"""`sparsemem bench sweep`: what a study costs beside its training, with real small trials, one processor each, under
both engines.

- `ENGINE/overhead`: from the end of one trial to the first step of the next one in its slot.
- `ENGINE/busy`: share of the slots' time that trials of about a minute are trained in, between the first start and the
  last end.
- `plan`: a study of 10,000 trials read and solved; `resume`: it is found that all of them have finished, report aside.
"""

from __future__ import annotations

import json
import math
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from sparsemem.api import run_study
from sparsemem.bench.measure import Row, measurement, progress, timed
from sparsemem.bench.step import SHAPES, SHARES, TAKEN_APART
from sparsemem.config import Study, load_study
from sparsemem.mechanisms import EXPERTS, MEMORY_POOLS
from sparsemem.study.jobs import ENGINES, slots
from sparsemem.study.plan import plan
from sparsemem.train import measure_step

SHORT, SHORT_TRIALS = 3.0, 8  # seconds of a trial, trials a slot
LONG, LONG_TRIALS = 60.0, 2
POLL_SECONDS = 0.01
ROUNDS = 3
MEMORY = next(pool for pool in SHARES[TAKEN_APART] if pool != EXPERTS.name)
HALF: dict[str, list[Any]] = {"shares": [{EXPERTS.name: 0.5, MEMORY: 0.5}]}
LARGE: dict[str, list[Any]] = {  # 10,000 trials of twenty sizes
    "shares": [{EXPERTS.name: share / 20, MEMORY: 1 - share / 20} for share in range(1, 21)],
    "train.lr": [round(1e-3 * 1.1**step, 6) for step in range(20)],
    "seed": list(range(25)),
}


def bench_sweep() -> Iterator[Row]:
    """Measurements of each engine, then of large studies."""
    with tempfile.TemporaryDirectory(prefix="sparsemem-bench-") as folder:
        for engine in ENGINES:
            progress(f"sweep: {engine}, {SHORT_TRIALS} trials a slot of {SHORT:g} s, then {LONG_TRIALS} of {LONG:g} s")
            gaps, _ = _trained(Path(folder) / engine / "short", engine, SHORT, SHORT_TRIALS)
            yield measurement(f"sweep/{engine}/overhead", f"{len(gaps)}", gaps, "s")
            _, busy = _trained(Path(folder) / engine / "long", engine, LONG, LONG_TRIALS)
            yield measurement(f"sweep/{engine}/busy", f"{LONG:g}s", [busy, busy], "of slots")
        progress("sweep: 10,000 trials planned, then skipped")
        study = _write(Path(folder) / "large", LARGE, tokens=10**6)
        yield measurement("sweep/plan", "10000", [timed(lambda: plan(load_study(study))) for _ in range(ROUNDS)], "s")
        yield measurement("sweep/resume", "10000", _resumed(study), "s")


def _trained(folder: Path, engine: str, seconds: float, a_slot: int) -> tuple[list[float], float]:
    """Seconds between one trial's end and the next one's first step, slot by slot; and the share of the slots' time
    spent in trials.
    """
    study = load_study(_write(folder, HALF, tokens=10**6))
    trial, together = study.trials()[0], slots(study.run)
    step = measure_step(trial, study.run.cpus_per_trial, device="cpu")  # as these trials train
    tokens = math.ceil(seconds / step) * trial.train.batch_tokens
    study = load_study(_write(folder, {**HALF, "seed": list(range(together * a_slot))}, tokens))
    with _starts(folder / "runs") as starts:
        ledger = run_study(study, folder, folder / "runs", engine, say=lambda line: None)
    ends = {id_: (ledger.trial_folder(id_) / "result.json").stat().st_mtime for id_ in starts}
    begun, ended = sorted(starts.values()), sorted(ends.values())
    spent = sum(ends[id_] - start for id_, start in starts.items())
    return [start - end for start, end in zip(begun[together:], ended, strict=False)], spent / together / (
        ended[-1] - begun[0]
    )


@contextmanager
def _starts(results: Path) -> Iterator[dict[str, float]]:
    """Trial -> time of its first step, before which it writes an empty curve."""
    found: dict[str, float] = {}
    left = threading.Event()

    def watch() -> None:
        while not left.wait(POLL_SECONDS):
            for curve in results.glob("*/trials/*/curve.csv"):
                found.setdefault(curve.parent.name, time.time())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        left.set()
        watcher.join()


def _resumed(file: Path) -> list[float]:
    """Seconds until a run of a finished study has found that nothing is left to do."""

    class Found(Exception):
        pass

    def stop(line: str) -> None:
        if "finished before" in line:
            raise Found

    def resume() -> None:
        with suppress(Found):
            run_study(load_study(file), file.parent, file.parent / "runs", "local", say=stop)

    _finish(load_study(file), file.parent / "runs")
    resume()  # which also writes down the study
    return [timed(resume) for _ in range(ROUNDS)]


def _finish(study: Study, results: Path) -> None:
    """Results of every trial, as training leaves them."""
    for planned in plan(study):
        folder = results / study.study / "trials" / planned.trial.id
        folder.mkdir(parents=True)
        sequences = planned.trial.data.validation_tokens // planned.trial.data.context
        losses = "".join(f"{number},{3 + number / 7919:.9g}\n" for number in range(sequences))
        mean = math.fsum(3 + number / 7919 for number in range(sequences)) / sequences
        (folder / "val_losses.csv").write_text(f"sequence,nats_per_token\n{losses}", encoding="utf-8")
        result = {
            "trial_id": planned.trial.id,
            "status": "finished",
            "val_loss": mean,
            "val_loss_se": 0.01,
            "val_bpb": 1.0,
        }
        (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    (results / study.study / "study.yaml").write_text(yaml.safe_dump({"study": study.study}), encoding="utf-8")


def _write(folder: Path, vary: dict[str, list[Any]], tokens: int) -> Path:
    """The quick study's shape as a study of its own."""
    shape = SHAPES["quick"]
    model = {name: value for name, value in shape["model"].items() if name not in MEMORY_POOLS or name == MEMORY}
    fields = {**shape, "study": "bench", "model": model, "budget": {**shape["budget"], "tokens": tokens}, "vary": vary}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.yaml").write_text(yaml.safe_dump(fields), encoding="utf-8")
    return folder / "study.yaml"
