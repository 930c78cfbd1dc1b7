"""The tables of a curve over the share, and of the law over the curves of several budgets."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from analysis.fits.allocation_result import AllocationFit, called
from analysis.fits.joint_budgets import FACTORS, WORDS, together
from analysis.fits.joint_result import JointFit
from analysis.studies.tables import facts, interval, status_facts
from analysis.studies.types import Table
from analysis.table import fixed, si

LAWS = (
    "quadratic: c + s x + k x^2, over all shares x; biased where the curve is wide or asymmetric. cubic: with m x^3 "
    "more. two-power: c + a (1 - x)^p + b g(x), a <= 0 <= b, where g falls as (x + 0.1)^-q from 1 at x = 0 to 0 at x = "
    "1. akima: piecewise cubic through the share means. Used is the law with the least Cp (Mallows: squares in units "
    "of the noise, and two for each parameter) among those that the noise does not refute (lack of fit, p > 0.01), or, "
    "where all are refuted, the law with the least left-out error. Noise is what is left of a run's loss once the mean "
    "of its share and the effect of its seed are off. Tied shares: Gupta's subset selection, which holds the true best "
    "with 95% confidence."
)
JOINT = (
    "One law for the curves of all budgets, each with a level of its own and a depth that follows size, tokens per "
    "activated parameter and sparsity where these vary: level + exp(s + s' z) H(x; m + m' z), z the logarithms of what "
    "varies, H a cubic or a two-power curve whose form may follow them too. The models differ in what moves the "
    "optimum (m'). F test: chance of so much better a fit than with the same optimum everywhere if that were true. "
    "Left-out error: rms of the differences between shares at the largest budget, predicted from the others, where "
    "those determine the model."
)


def curve_tables(fit: AllocationFit, noun: str) -> tuple[Table, ...]:
    """Facts, laws tried and parameters of one curve.

    Args:
        noun: what the shares are called.
    """
    pairs = [
        *status_facts(fit, f"runs, {noun}s, seeds", len(fit.shares), fit.seeds, law=called(fit.law)),
        (f"winning end ({noun})", fixed(fit.best_end, ".4g")),
        (f"best {noun}", interval(fit.argmin, 3)),
        ("loss there (nats/token)", interval(fit.loss_at_best)),
        (f"depth against {noun} 1 (nats/token)", interval(fit.depth)),
        ("minimum inside, part of resamples", fixed(fit.p_interior, ".1%")),
        ("paired noise, sd (nats/token)", fixed(fit.paired_sd)),
        ("spread between seeds, sd (nats/token)", fixed(fit.seed_sd)),
        ("depth over paired noise", fixed(fit.depth_over_noise, ".1f")),
        ("lack of fit, p", fixed(fit.lack_of_fit_p, ".2g")),
        (f"{noun}s tied with the best", ", ".join(f"{share:.3g}" for share in fit.tied)),
    ]
    if not fit.candidates:
        return (facts(pairs),)
    laws = [
        {
            "law": called(law.law) + (" (used)" if law.law == fit.law else ""),
            "left-out error": fixed(law.left_out_error, ".5f"),
            "Cp": fixed(law.cp, ".1f"),
            "AICc": fixed(law.aicc, ".1f"),
            f"best {noun}": (fixed(law.argmin, ".3f") or "none inside") + (f" ({law.note})" if law.note else ""),
        }
        for law in fit.candidates
    ]
    parameters = [(name, interval(value)) for name, value in fit.parameters.items()]
    return (
        facts(pairs),
        Table(pd.DataFrame(laws), "Laws tried, errors in nats/token."),
        facts(parameters, "Parameters of the law used, with 95% intervals."),
    )


def joint_tables(law: JointFit, noun: str) -> tuple[Table, ...]:
    """Facts, models and parameters of the law over all budgets."""
    holm = law.movement_p if len(law.factors) > 1 else {}
    pairs = [
        ("status", str(law.status).replace("_", " ")),
        ("shape", law.law),
        ("runs, budgets", f"{len(law.rows)}, {len(law.budgets)}"),
        *(
            (f"best {noun} at {budget_name(budget)}", interval(best, 3))
            for budget, best in zip(law.budgets, law.optima, strict=True)
        ),
        *(
            (f"shift with {WORDS[each]}, in the fullest model", interval(shift, 3))
            for each, shift in law.shifts.items()
        ),
        *((f"no shift with {WORDS[each]}, p (Holm)", f"{p:.2g}") for each, p in holm.items()),
        *((f"{WORDS[each]}, not studied", why) for each, why in law.conventions["dropped"].items()),
    ]
    if law.left_out:
        pairs += [
            (f"largest budget left out, best {noun} predicted", interval(law.left_out.predicted, 3)),
            ("measured there", interval(law.left_out.measured, 3)),
            ("error", interval(law.left_out.error, 3)),
            (f"{noun}s whose 95% prediction interval holds the mean", f"{law.left_out.inside:.0%}"),
        ]
    models = [
        {
            "optimum moves with": (together(model.moves_with) or "nothing")
            + (" (used)" if model.moves_with == law.moves_with else ""),
            "parameters": str(model.parameters),
            "degrees of freedom": str(model.df),
            "AICc": fixed(model.aicc, ".1f"),
            "F test, p": fixed(model.same_optimum_p, ".2g"),
            "lack of fit, p": f"{model.lack_of_fit_p:.2g}",
            "left-out error": fixed(model.left_out_error, ".5f"),
        }
        for model in law.models
    ]
    parameters = [(name, interval(value)) for name, value in law.parameters.items()]
    return (
        facts(pairs),
        Table(pd.DataFrame(models), "Models, errors in nats/token."),
        facts(parameters, "Parameters of the model used, with 95% intervals."),
    )


def budget_name(budget: Mapping[str, float]) -> str:
    """Such as `P_act 135k, 14.8 tokens for each, sparsity 9.2`.

    Args:
        budget: `joint_budgets.FACTORS` -> value.
    """
    active, tokens, sparsity = (budget[name] for name in FACTORS)
    return f"P_act {si(active)}, {tokens:.3g} tokens for each, sparsity {sparsity:.3g}"
