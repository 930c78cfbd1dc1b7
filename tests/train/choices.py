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

Choice = tuple[Tensor, ...]
Choose = Callable[[Choice, Callable[[Choice, Choice], Tensor]], Choice]


@contextmanager
def choosing(choose: Choose) -> Iterator[None]:
    """Let `choose` see each choice, and how far two differ for each token, and return what is chosen in its place."""
    best, pairs = moe.best, retrieval.choose_pairs

    def experts(scores_SE: Tensor, top_k: int) -> tuple[None, Tensor]:
        return None, *choose((best(scores_SE, top_k)[1],), lambda a, b: _apart(*(scores_SE.gather(-1, places) for (places,) in (a, b))))

    def rows(row: Tensor, column: Tensor, cores: Tensor | None, filters: Tensor | None, top_m: int) -> Choice:
        def apart(a: Choice, b: Choice) -> Tensor:
            scores = [
                retrieval.score_pairs(retrieval._take(row, rows), retrieval._take(column, columns), cores).sum(-1).transpose(0, 1)
                for rows, columns in (a, b)
            ]
            by_score = _apart(*scores)
            if filters is None:
                return by_score
            # Either the scores are close, or a key just passed the filter of its side in one of the two.
            filtered = ((filters[side].unsqueeze(1) @ keys.flatten(2)).view_as(keys[:, 0]) for side, keys in enumerate((row, column)))
            by_filter = [_margin(scores, top_m, *choice) for scores, choice in zip(filtered, zip(a, b, strict=True), strict=True)]
            return torch.stack((by_score, *by_filter)).amin(0)

        return choose(pairs(row, column, cores, filters, top_m), apart)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe, "best", experts)
        patch.setattr(retrieval, "choose_pairs", rows)
        yield


def _apart(own: Tensor, others: Tensor) -> Tensor:
    """Largest difference of the scores of two choices, relative to the largest score chosen."""
    return (own.sort(-1).values - others.sort(-1).values).abs().amax(-1) / own.abs().amax()


def _margin(scores_HSN: Tensor, top_m: int, a_HSM: Tensor, b_HSM: Tensor) -> Tensor:
    """How near to the bound of the best m the nearest of the keys lies that only one of two choices has; infinite where there is none."""
    ordered_HSN = scores_HSN.sort(-1, descending=True).values
    if top_m >= ordered_HSN.shape[-1]:
        return torch.full(scores_HSN.shape[:-1], torch.inf)
    inside_HS1, outside_HS1 = ordered_HSN[..., top_m - 1, None], ordered_HSN[..., top_m, None]
    margin_HSN = torch.where(scores_HSN >= inside_HS1, scores_HSN - outside_HS1, inside_HS1 - scores_HSN)
    has = [torch.zeros_like(scores_HSN, dtype=torch.bool).scatter_(-1, choice, True) for choice in (a_HSM, b_HSM)]
    return margin_HSN.masked_fill(has[0] == has[1], torch.inf).amin(-1) / scores_HSN.abs().amax()


def keep(case: str, tokens: Tokens) -> dict[str, Any]:
    made: list[Choice] = []

    def choose(chosen: Choice, apart: Callable[[Choice, Choice], Tensor]) -> Choice:
        made.append(chosen)
        return chosen

    with choosing(choose):
        return {"losses": curve(case, tokens, STEPS), "choices": made}


def compare(case: str, tokens: Tokens, kept: dict[str, Any]) -> str:
    left, gaps = iter(kept["choices"]), []

    def choose(chosen: Choice, apart: Callable[[Choice, Choice], Tensor]) -> Choice:
        wanted = next(left)
        own, others = (
            sum((part.long() << 32 * place for place, part in enumerate(choice)), torch.tensor(0)) for choice in (chosen, wanted)
        )
        differ = (own.sort(-1).values != others.sort(-1).values).any(-1)
        gaps.extend(apart(chosen, wanted)[differ].tolist())
        return wanted

    with choosing(choose):
        losses = curve(case, tokens, STEPS)
    apart = max(abs(a / b - 1) for a, b in zip(losses, kept["losses"], strict=True))
    by = f", by {max(gaps):.0e} of the largest score" if gaps else ""
    return f"{case:<16} losses apart {apart:.1e}   choices apart {len(gaps)}{by}"


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
