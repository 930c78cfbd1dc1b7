"""Many short trials while a random process of the driver's is killed every few seconds; whenever the driver is gone,
`sparsemem run` again.

    python tests/faults/soak.py --engine local ray --results results/soak.json

Writes a JSON record an engine: what was killed, how often the driver began again, and that every trial was finished
exactly once, as in an undisturbed run. The undisturbed run trains the same trials in turn in one process, and is made
once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from machine import TINY, Audit, Driver, leftovers, table, undisturbed, write_study

RHO = [1.0, 0.6, 0.3, 0.0]
SPARED = 0.75  # of the kills that find a driver without a trial yet: on a slow machine none would ever get further
BUDGET = TINY["budget"] | {"tokens": 30_000}  # about a second a trial


def soak(
    study: Path, engine: str, results: Path, every: float, seed: int, expected: Sequence[dict[str, str]]
) -> dict[str, Any]:
    """Run the study to its end, whatever is killed; see the module."""
    draw, kills, ends, begun = random.Random(seed), Counter[str](), Counter[int](), time.monotonic()
    audit, strays = Audit(results / "tiny"), 0
    driver = Driver(study, engine, results)
    last = time.monotonic()
    try:
        while True:
            counts = audit.look()
            if (code := driver.process.poll()) is not None:
                err = driver.end()[2]
                strays += len(driver.orphans())
                if code == 0:
                    break
                ends[code] += 1
                print(
                    f"driver ended with {code} after {len(counts)} results: {err.splitlines()[-1:]}",
                    file=sys.stderr,
                    flush=True,
                )
                driver = Driver(study, engine, results)
                last = time.monotonic()
            elif time.monotonic() - last > every:
                last = time.monotonic()
                living = driver.processes()
                if all(process.kind != "trial" for process in living) and draw.random() < SPARED:
                    continue
                kind = draw.choice(sorted({process.kind for process in living}))
                kills[kind] += driver.kill(draw.choice([process for process in living if process.kind == kind]))
                print(f"{last - begun:.0f} s, {len(counts)} results: killed {kind}", file=sys.stderr, flush=True)
            time.sleep(0.1)
    finally:  # also when the soak itself is interrupted
        for process in driver.processes():
            driver.kill(process)
    counts = audit.look()
    found = table(results / "tiny")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "engine": engine,
        "trials": len(expected),
        "finished": sum(row["status"] == "finished" for row in found),
        "twice": sum(count - 1 for count in counts.values()),
        "lost": len({row["trial_id"] for row in expected} - counts.keys()),
        "equal_to_undisturbed": found == expected,
        "kills": dict(sorted(kills.items())),
        "killed": kills.total(),
        "restarts": ends.total(),
        "restarts_by_exit_code": {str(code): number for code, number in sorted(ends.items())},
        "processes_left": strays,
        "files_left": leftovers(results / "tiny"),
        "seconds": round(time.monotonic() - begun),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", nargs="+", default=["local", "ray"], choices=("local", "ray"))
    parser.add_argument("--trials", type=int, default=200, help="a multiple of 4 (default: 200)")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between kills (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="of what is killed")
    parser.add_argument(
        "--results", type=Path, help="a JSON file that receives a record an engine (default: they are only printed)"
    )
    arguments = parser.parse_args()
    good = True
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        folder = Path(scratch)
        os.environ["SPARSEMEM_CACHE"] = str(folder / "cache")
        study = write_study(folder, budget=BUDGET, vary={"rho": RHO, "seed": list(range(arguments.trials // len(RHO)))})
        expected = undisturbed(study, folder / "undisturbed")
        for engine in arguments.engine:
            summary = soak(study, engine, folder / engine, arguments.every, arguments.seed, expected)
            print(json.dumps(summary, indent=2), flush=True)
            good &= summary["finished"] == summary["trials"] and summary["equal_to_undisturbed"]
            good &= not (summary["twice"] or summary["lost"] or summary["processes_left"] or summary["files_left"])
            if arguments.results:
                known = json.loads(arguments.results.read_text(encoding="utf-8")) if arguments.results.exists() else {}
                text = json.dumps(dict(sorted({**known, engine: summary}.items())), indent=2) + "\n"
                arguments.results.write_text(text, encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
