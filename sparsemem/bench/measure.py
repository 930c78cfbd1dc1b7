"""Measuring in rounds: contenders take turns, so that a drift of the machine hits all of them; a ratio is that of one
round.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from sparsemem.config import Train
from sparsemem.kernels.matmul import by_onednn
from sparsemem.train.step import default_device, precision_on

WARM_UP = 2
SIDE, GPU_SIDE = 1536, 8192  # of the square matrices whose product is the device's peak
Row = dict[str, Any]
Name = TypeVar("Name")


@dataclass(frozen=True)
class Place:
    """The device and the precision of a measurement and of all that it is compared with."""

    device: torch.device
    precision: torch.dtype

    def timed(self, work: Callable[[], object]) -> float:
        """Seconds until the device has done it."""
        self._wait()
        start = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - start

    def autocast(self) -> AbstractContextManager[object]:
        """As around a training step's forward pass."""
        return torch.autocast(self.device.type, dtype=self.precision, enabled=self.precision != torch.float32)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @property
    def side(self) -> int:
        return SIDE if self.device.type == "cpu" else GPU_SIDE

    def in_fp32(self) -> Place:
        return Place(self.device, torch.float32)


ON_CPU = Place(torch.device("cpu"), torch.float32)


def training_place() -> Place:
    """Where a trial trains by default: on the GPU where there is one."""
    device = torch.device(default_device())
    return Place(device, precision_on(device, Train(batch_tokens=1, lr=1.0)))


def take_turns(contenders: Mapping[Name, Callable[[], float]], number: int) -> dict[Name, list[float]]:
    """Seconds of each contender in each of so many rounds, after two that do not count.

    Args:
        contenders: functions that return the seconds of what they timed; each is called once a round.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in contenders}
    for turn in range(WARM_UP + number):
        for name, contender in contenders.items():
            spent = contender()
            if turn >= WARM_UP:
                seconds[name].append(spent)
    return seconds


def timed(work: Callable[[], object]) -> float:
    """Seconds of work on the processor."""
    return ON_CPU.timed(work)


def matrix_product(place: Place) -> float:
    """Seconds of the best of three large square products by either of torch's libraries: what the device can do at
    most.
    """
    a, b = (torch.randn(place.side, place.side, device=place.device, dtype=place.precision) for _ in range(2))
    libraries = (torch.matmul, by_onednn) if place.device.type == "cpu" else (torch.matmul,)
    return min(place.timed(partial(multiply, a, b)) for multiply in libraries for _ in range(3))


def over(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Ratios, round by round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def measurement(
    name: str, shape: str, values: Sequence[float], unit: str, place: Place = ON_CPU, **ratios: Sequence[float]
) -> Row:
    """One line of the output: median and quartiles over the rounds, of the values and of each ratio."""
    where = {"device": place.device.type, "dtype": "fp32" if place.precision == torch.float32 else "bf16"}
    row: Row = {
        "name": name,
        "shape": shape,
        "threads": torch.get_num_threads(),
        **where,
        **_spread(values),
        "unit": unit,
    }
    for ratio, of_rounds in ratios.items():
        spread = _spread(of_rounds)
        row |= {ratio: spread["median"], f"{ratio}_range": [spread["low"], spread["high"]]}
    return row


def speeds(
    place: Place,
    kind: str,
    shape: str,
    tokens: int,
    contenders: Mapping[str, Callable[[], float]],
    flops: Mapping[str, int],
    rivals: Sequence[str],
    number: int,
) -> list[Row]:
    """Tokens/s of contenders that process `tokens` a round: as a share of the device's peak, and over each rival.

    Args:
        flops: of one token, forward and backward, where known.
    """
    seconds = take_turns({"peak": lambda: matrix_product(place), **contenders}, number)
    peaks = [2 * place.side**3 / spent for spent in seconds.pop("peak")]
    rows = []
    for name, times in seconds.items():
        rates = [tokens / spent for spent in times]
        ratios = {
            f"ratio_to_{rival}": over(seconds[rival], times) for rival in rivals if rival in seconds and rival != name
        }
        if name in flops:
            ratios = {"share_of_peak": [rate * flops[name] / max(peaks) for rate in rates], **ratios}
        rows.append(measurement(f"{kind}/{name}", shape, rates, "tokens/s", place, **ratios))
    return [*rows, measurement("peak/matrix-product", shape, [peak / 1e9 for peak in peaks], "GFLOP/s", place)]


def progress(text: str) -> None:
    print(f"bench {text}, {torch.get_num_threads()} threads", file=sys.stderr, flush=True)


def line(row: Row) -> str:
    """A measurement for people."""
    text = (
        f"{row['name']:<24} {row['shape']:<9} {_short(row['median']):>8} [{_short(row['low'])}, {_short(row['high'])}] "
        f"{row['unit']}"
    )
    for ratio in row:
        if f"{ratio}_range" in row:
            low, high = row[f"{ratio}_range"]
            text += f"   {ratio.replace('_', ' ')} {_ratio(row[ratio])} [{_ratio(low)}, {_ratio(high)}]"
    return text


def _spread(values: Sequence[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": round(median, 4), "low": round(low, 4), "high": round(high, 4)}


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
