"""Chooses the shares of a study's searches (`config.Optimum`), batch by batch. It must not know engines.

A batch follows from the trials of the batches before it and from nothing else: not from which trial ended first, not
from slots, not from anything a process remembers. So a study that is run again walks through its finished batches and
goes on where it would have.

The search ends on the interval that the report gives. That, and where to train next, is for the judge to say: it is
handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from sparsemem.config import ConfigError, Optimum, Study
from sparsemem.results import FINAL, TrialStatus
from sparsemem.study.ledger import Ledger
from sparsemem.study.plan import plan

if TYPE_CHECKING:
    import pandas as pd

STEP = 0.02  # candidates are its multiples: ids stay the same, and an expert more or less is seldom finer
APART = STEP / 10  # shares nearer to each other are one


@dataclass(frozen=True)
class Judgement:
    """What the runs so far say of the best share."""

    interval: tuple[float, float]
    """95%, of the best share."""
    shares: Sequence[float]
    """Those that were sampled, rising."""
    choose: Callable[[Sequence[float], int, int], list[float]]
    """(free shares, how many, seeds of each) -> the shares to train next. Raises `ConfigError` where it cannot say."""


Judge = Callable[["pd.DataFrame"], Judgement]
"""Finished runs in the columns of `trials.csv` -> what they say. Raises `ConfigError` where that is nothing."""


class Adaptive:
    """A study and the shares that its searches have asked for so far; without a search, the study as it is."""

    def __init__(self, study: Study, ledger: Ledger, judge: Judge) -> None:
        """
        Args:
            ledger: of the study; its finished batches are walked through.
            judge: of its searched shares.
        """
        self._study, self._ledger, self._judge = study, ledger, judge
        self._searches = [_Search(settings, first) for settings, first in study.searches]
        self.remarks: list[str] = []
        """Where each search stands, one line each."""
        while self.advance():
            pass

    @property
    def study(self) -> Study:
        """With the shares of every batch so far written out."""
        return self._study.with_shares([search.shares for search in self._searches]) if self._searches else self._study

    def advance(self, say: Callable[[str], None] | None = None) -> bool:
        """Let each search whose trials have all ended go on; whether any asks for more.

        Args:
            say: takes a line for each search that went on or ended.
        """
        before = sum(len(search.shares) for search in self._searches)
        lines = [line for search in self._searches if (line := search.advance(self._ledger, self._judge))]
        if say:
            for line in lines:
                say(line)
        self.remarks = lines or self.remarks
        return sum(len(search.shares) for search in self._searches) > before


@dataclass
class _Search:
    """One search: the shares at one combination of whatever else the study varies."""

    settings: Optimum
    first: Study
    """Of its first batch."""
    shares: list[float] = field(init=False)
    """In the order in which they were chosen."""
    ended: bool = False

    def __post_init__(self) -> None:
        self.shares = list(self.first.vary[0]["rho"])  # type: ignore[arg-type]

    @cached_property
    def label(self) -> str:
        """What sets it apart, as `budget.tokens=500000`; '' where nothing does."""
        varied = self.first.vary[0]
        return ", ".join(f"{path}={values[0]}" for path, values in varied.items() if path not in ("rho", "seed"))  # type: ignore[index]

    def advance(self, ledger: Ledger, judge: Judge) -> str:
        """Judge the batches so far and choose the next one; '' while a trial of theirs has not ended, and once the
        search has.
        """
        if self.ended:
            return ""
        planned = plan(self._with(self.shares))
        states = [ledger.state(p.trial.id) for p in planned]
        if any(state.status not in FINAL for state in states):
            return ""
        import pandas as pd

        runs = pd.DataFrame(
            [
                p.row() | {"val_loss": s.result["val_loss"], "data.vocab_size": p.trial.data.vocab_size}
                for p, s in zip(planned, states, strict=True)
                if s.status == TrialStatus.FINISHED
            ]
        )
        so_far = f"{', '.join(filter(None, ('search of rho', self.label)))}: {len(self.shares)} shares"
        tolerance, most = self.settings.tolerance, self.settings.most
        room = most // self.settings.seeds - len(self.shares)
        try:
            found = judge(runs)
            low, high = found.interval
            so_far += f", 95% interval of the best {low:.2f} to {high:.2f}"
            if high - low <= tolerance:
                return self._end(f"{so_far}, within the tolerance {tolerance:g}")
            if room < 1:
                return self._end(f"{so_far}, not within the tolerance {tolerance:g}: no trial is left of {most}")
            inside = [share for share in self._candidates if found.shares[0] < share < found.shares[-1]]
            free = [share for share in inside if all(abs(share - used) > APART for used in found.shares)]
            chosen = found.choose(free, min(room, self.settings.batch), self.settings.seeds)
        except ConfigError as error:  # nearly all have diverged
            return self._end(f"{so_far}; nothing can be said of the best: {error}")
        if not chosen:
            return self._end(f"{so_far}; no other share fits the budget")
        self.shares += [self._candidates[share] for share in chosen]
        return f"{so_far}; next {', '.join(f'{share:.2f}' for share in self.shares[-len(chosen) :])}"

    def _end(self, line: str) -> str:
        self.ended = True
        return line

    def _with(self, shares: list[float], seeds: int | None = None) -> Study:
        seeds = seeds or self.settings.seeds
        return self.first.model_copy(
            update={"vary": ({**self.first.vary[0], "rho": tuple(shares), "seed": tuple(range(seeds))},)}
        )

    @cached_property
    def _candidates(self) -> dict[float, float]:
        """Share that integer sizes come to -> the nearest `rho` that comes to it; shares that miss the budget are left
        out.
        """
        found: dict[float, float] = {}
        for step in range(round(1 / STEP) + 1):
            rho = round(step * STEP, 9)
            try:
                share = float(plan(self._with([rho], seeds=1))[0].row()["share_moe"])
            except ConfigError:
                continue
            same = next((other for other in found if abs(other - share) < APART), share)
            if same not in found or abs(rho - share) < abs(found[same] - share):
                found[same] = rho
        return found
