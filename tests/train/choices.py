"""Whether two versions of the code compute the same, where rounding lets choices of experts and rows fall differently.

A curve of `test_golden` is another one from the first choice on that falls differently; given the same choices, the versions must agree
over all of its steps. In a checkout of each version, from its root:

    python -m tests.train.choices keep FOLDER      # the choices and losses of one version
    python -m tests.train.choices compare FOLDER   # the other's losses with the same choices, and how close those are that fall differently
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsemem.data import Tokens
from sparsemem.layers import moe, retrieval

from .conftest import write_tokens
from .test_golden import CASES, STEPS, curve

Choose = Callable[[tuple[Tensor, ...], Callable[..., Tensor]], tuple[Tensor, ...]]


@contextmanager
def choosing(choose: Choose) -> Iterator[None]:
    """Let `choose` see each choice, and how to score one, and return what is chosen in its place."""
    best, pairs = moe.best, retrieval.choose_pairs

    def experts(scores: Tensor, top_k: int) -> tuple[None, Tensor]:
        return None, *choose((best(scores, top_k)[1],), lambda places: scores.gather(-1, places))

    def rows(row: Tensor, column: Tensor, cores: Tensor | None, filters: Tensor | None, top_m: int) -> Any:
        def score(rows: Tensor, columns: Tensor) -> Tensor:
            sides = retrieval._take(row, rows), retrieval._take(column, columns)
            return retrieval.score_pairs(*sides, cores).sum(-1).transpose(0, 1)

        return choose(pairs(row, column, cores, filters, top_m), score)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe, "best", experts)
        patch.setattr(retrieval, "choose_pairs", rows)
        yield


def keep(case: str, tokens: Tokens) -> dict[str, Any]:
    made: list[tuple[Tensor, ...]] = []

    def choose(chosen: tuple[Tensor, ...], score: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        made.append(chosen)
        return chosen

    with choosing(choose):
        return {"losses": curve(case, tokens, STEPS), "choices": made}


def compare(case: str, tokens: Tokens, kept: dict[str, Any]) -> str:
    left, gaps = iter(kept["choices"]), []

    def choose(chosen: tuple[Tensor, ...], score: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        wanted = next(left)
        own, others = (score(*choice).sort(-1).values for choice in (chosen, wanted))
        gap = ((own - others).abs().amax(-1) / own.abs().amax()).flatten()
        gaps.extend(gap[gap > 0].tolist())
        return wanted

    with choosing(choose):
        losses = curve(case, tokens, STEPS)
    apart = max(abs(a / b - 1) for a, b in zip(losses, kept["losses"], strict=True))
    return f"{case:<16} losses apart {apart:.1e}   choices apart {len(gaps)}" + (f", by scores {max(gaps):.0e} apart" if gaps else "")


if __name__ == "__main__":
    torch.set_num_threads(1)
    task, folder = sys.argv[1], Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as corpus:
        tokens = Tokens.load(write_tokens(Path(corpus) / "tokens"))
        for case in CASES:
            if task == "keep":
                torch.save(keep(case, tokens), folder / f"{case}.pt")
            else:
                print(compare(case, tokens, torch.load(folder / f"{case}.pt", weights_only=True)), flush=True)
