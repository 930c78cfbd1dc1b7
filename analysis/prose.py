"""The sentences of a report that no single fit can say: how far a study is, what was not varied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

import pandas as pd

from analysis.cells import RATE, split_cells
from analysis.results import LEARNED_NOTHING, Results
from analysis.table import si, varied_fields
from sparsemem.config import ConfigError, Tuned, Winner, load_study
from sparsemem.mechanisms import EXPERTS, MEMORY_POOLS
from sparsemem.results import FREQUENCY_NATS, LEARNED_NATS, TrialStatus

MOST_LISTED = 6
"""Tuned values that are listed; of more the ends are given."""


def counts(trials: pd.DataFrame) -> str:
    """How many trials are in which state."""
    found = Counter(trials["status"])
    rest = ", ".join(
        f"{number} {status.replace('_', ' ')}" for status, number in found.items() if status != TrialStatus.FINISHED
    )
    return f"{found[TrialStatus.FINISHED]} of {len(trials)} trials finished" + (f"; {rest}." if rest else ".")


def text(results: Results) -> str:
    """Where the bytes of the text went, and how often it was read; empty where the manifest does not say."""
    account, tokens = results.corpus.get("text"), results.corpus.get("train_tokens")
    if not account or not tokens:
        return ""
    unused = ", ".join(f"{size:,} {reason}" for reason, size in account["unused"].items())
    return (
        f"Of {account['total']:,} bytes of text {account['train']:,} were trained on and {account['validation']:,} "
        f"held out ({account['validation'] / account['total']:.1%}), {sum(account['unused'].values()):,} were not used"
        + (f" ({unused})" if unused else "")
        + "".join(f"; {remark}" for remark in results.corpus.get("remarks") or ())
        + f". The longest training reads its text {results.trials['tokens'].max() / tokens:.2g} times."
    )


def remarks(results: Results) -> list[str]:
    """What to know of a study of any kind before its numbers: settings that were tuned, and trials that learned
    nothing.
    """
    lines = []
    for path in results.tuned.fields if results.tuned else ():
        values = sorted(results.trials[path if path == RATE else f"tuned.{path}"].dropna().unique())
        listed = ", ".join(map(str, values))
        if len(values) > MOST_LISTED:
            listed = f"{len(values)} values from {values[0]} to {values[-1]}"
        lines.append(f"Tuned before the study: {path} {listed}.")
    if results.tuned and any(winner.searched for winner in results.tuned.winners):
        with suppress(ConfigError):  # written before a field had its bounds, or with a memory that is not installed
            trials = [trial for _, trial in load_study(results.folder / "study.yaml").points()]
            lines += filter(None, [results.tuned.elsewhere(trials)])
    idle = results.trials[results.trials["status"] == LEARNED_NOTHING]
    if len(idle):
        lines.append(
            f"Warning: {len(idle)} of {len(idle) + len(results.finished)} trained trials, such as "
            f"{idle['trial_id'].iloc[0]}, end above, or within {LEARNED_NATS:g} nats of, the loss of equally likely "
            f"tokens ({results.chance(idle).max():.3f} nats). They learned nothing and are left out of every fit and "
            "comparison: lower `train.lr`, or train longer."
        )
    dull = results.only_frequencies
    if len(dull):
        axes = [
            name for name in varied_fields(results.trials) if name != "seed" and dull[name].nunique(dropna=False) == 1
        ]
        point, points = dull[axes].astype(str).iloc[0], results.finished[axes].astype(str)
        where = ", ".join(f"{name} {dull[name].iloc[0]}" for name in axes)
        alike = f" ({len(dull)} of the {(points == point).all(axis=1).sum()} with {where})" if where else ""
        lines.append(
            f"Warning: {len(dull)} of {len(results.finished)} finished trials, such as {dull['trial_id'].iloc[0]}"
            f"{alike}, end within {FREQUENCY_NATS:g} nats of, or above, the loss of token frequencies alone "
            f"({results.corpus['token_frequency_loss']:.3f} nats). They know at most which tokens are common, and "
            "nothing of their order, so a difference from them is one of failed training: look at `expert_load_max` in "
            "their `curve.csv`, try another `model.init_std` or `train.lr`, or train longer."
        )
    return lines


def caveats(results: Results, noun: str = "share", axis: Sequence[str] = ("rho",)) -> list[str]:
    """What a study cannot tell, of whatever kind it is: what it did not vary, and what all its numbers rest on.

    Args:
        noun: what the study compares.
        axis: columns that tell one of those from another.
    """
    trials, finished, varied = results.trials, results.finished, varied_fields(results.trials)
    lines = []
    if len(finished) < len(trials):
        lines.append(
            f"{len(trials) - len(finished)} of {len(trials)} planned trials have no result, so every number here may "
            "still move."
        )
    if len(finished):
        lines.append(_scale(finished))
    lengths = sorted(finished["tokens"].dropna().unique())
    if len(lengths) < 2:
        lines.append("One training length: whether the answer moves with compute cannot be told.")
    elif lengths[-1] < 10 * lengths[0]:
        lines.append(
            f"Training lengths a factor of {lengths[-1] / lengths[0]:.3g} apart: only a fast movement of the answer "
            "would show."
        )
    if results.tuned and RATE in results.tuned.fields:
        lines.append(_rates_tuned(results.tuned, finished, noun))
    elif RATE in varied:
        lines.append(
            f"The learning rate was chosen per {noun} on the held-out set itself: a {noun} with more rates tried is "
            "flattered by a little."
        )
    else:
        lines.append(
            f"One learning rate for every {noun}: part of the differences between them may be one of tuning, unless "
            "checked elsewhere."
        )
    if not {"train.table_lr_factor", "tuned.train.table_lr_factor"} & set(varied):
        lines.append("One learning-rate factor of the memory tables.")
    if not any(name.startswith("data") for name in varied):
        name = (results.described.get("data") or {}).get("corpus", "python-source")
        seen = ""
        if share := results.corpus.get("overlap", {}).get("4"):
            seen = f": {share:.0%} of its held-out 4-grams also occur in the training text, which favours n-gram memory"
        lines.append(f"One corpus, {' '.join([name, *_named(results)])}{seen}.")
        times = finished["tokens"].max() / (results.corpus.get("train_tokens") or float("inf"))
        if times > 1:
            lines.append(
                f"Trials read their text up to {times:.3g} times: a model that can remember it, as memory does, is "
                "favoured."
            )
    seeds = pd.concat(
        [cell.trials.groupby(list(axis), dropna=False)["seed"].nunique() for cell in split_cells(trials, axis)]
    )
    if len(seeds):
        number = "1 seed" if seeds.max() == 1 else f"{seeds.max()} seeds"
        if seeds.min() < seeds.max():
            number = f"{seeds.min()} to {number}"
        pooled = f"the noise is pooled over {plural(noun)} and taken to be alike at all of them"
        lines.append(f"{number} a {noun}: {'seed noise is not measured' if seeds.max() == 1 else pooled}.")
        if seeds.min() < seeds.max():
            lines.append(f"A seed that one of two {plural(noun)} lacks says nothing of their difference.")
    lines += _searched(results)
    lines.append(
        "All runs are judged on the same held-out sequences, and a seed changes data order and initial weights "
        "together."
    )
    return lines


def _named(results: Results) -> list[str]:
    """What the user's own text or data set is called."""
    data = results.described.get("data") or {}
    if data.get("corpus") == "files":
        return [", ".join(data.get("files", ()))]
    return [data["dataset"]] if data.get("dataset") else []


def sources(results: Results) -> str:
    """How many documents a text has, and of how many packages or files."""
    corpus = results.corpus
    what = {"python-source": "package", "hub": "data set"}.get(corpus.get("corpus", ""), "file")
    number = len({each["name"] for each in corpus.get("packages", ())})
    documents = corpus.get("documents")
    many = f"{documents:,} document{'s' * (documents != 1)}" if documents is not None else "documents"
    return f"{many} in {number:,} {what}{'s' * (number != 1)}"


def _rates_tuned(tuned: Tuned, finished: pd.DataFrame, noun: str) -> str:
    """How the rates of `sparsemem tune` were found, and which of them to doubt."""
    paths = list(dict.fromkeys(path for winner in tuned.winners for path in winner.at))
    own = f"apart for each value of {' and '.join(paths)}," if paths else f"once for every {noun},"
    line = (
        f"The learning rate was tuned {own} on the held-out set itself (`sparsemem tune`, one seed a trial): see Tuned "
        "settings."
    )
    found = Counter(why for winner in tuned.winners if (why := _rate_doubt(winner)))
    if found:
        each = "; ".join(f"{number} of {len(tuned.winners)} {why[number != 1]}" for why, number in found.items())
        line += (
            f" Rates to doubt: {each}. A better one may lie there, and part of the differences between {plural(noun)} "
            "may be one of tuning."
        )
    if seeds := {winner.seed for winner in tuned.winners if winner.seed is not None} & set(finished["seed"]):
        line += (
            f" Seed {', '.join(map(str, sorted(seeds)))} served the search and is compared too: its runs are flattered "
            "by a little."
        )
    return line


def _rate_doubt(winner: Winner) -> tuple[str, str] | None:
    """Why a better rate may exist than the winner's, for one and for several; None where nothing says so."""
    if RATE in winner.edges:
        return "lies at the edge of what was searched", "lie at the edge of what was searched"
    if RATE in winner.unbracketed:
        return "is the outermost value tried", "are the outermost values tried"
    if RATE in winner.doubts():
        return "has no value tried close to it on one side", "have no value tried close to them on one side"
    return None


def _searched(results: Results) -> list[str]:
    """What to know of shares that the study chose itself."""
    vary = results.described.get("vary") or {}
    rho = [grid.get("rho") for grid in (vary if isinstance(vary, list) else [vary])]
    return [
        "The shares were chosen by a search: each where it was expected to shorten the interval of the best share "
        f"most, until that was no longer than {search.get('tolerance')} or no trial was left. The fit takes the shares "
        "as given, and a search stops at an interval that came out short, which noise may have helped: "
        "`docs/searched-shares` measures how often it holds the truth."
        for search in rho
        if isinstance(search, dict)
    ]


def plural(noun: str) -> str:
    """Of what a study compares.

    >>> plural("share"), plural("mix")
    ('shares', 'mixes')
    """
    noun = noun.replace("memory and", "memories and")
    return noun + ("es" if noun.endswith("x") else "s")


def designs(results: Results) -> list[str]:
    """Caveats of a study that holds the design of its experts and memories fixed."""
    varied, described = varied_fields(results.trials), results.described.get("model") or {}
    lines = []
    memories = [pool for pool in MEMORY_POOLS if pool in described]
    if memories and not any(name.startswith(tuple(f"model.{pool}" for pool in memories)) for name in varied):
        lines.append(f"One design of each memory ({', '.join(memories)}): another may have another optimum.")
    if EXPERTS.name in described and not any(name.startswith(EXPERTS.field("")) for name in varied):
        lines.append("One expert design (width, top-k, balancing): finer or coarser experts may shift the curve.")
    return lines


def _scale(finished: pd.DataFrame) -> str:
    ratio = finished["tokens"] / finished["active_params"]
    low, high = f"{ratio.min():.3g}", f"{ratio.max():.3g}"
    each = low if low == high else f"{low} to {high}"
    return (
        f"Scale: {si(finished['active_params'].median())} activated parameters and {each} training tokens for each. "
        "Published results come from models thousands of times larger; nothing here says what holds there."
    )
