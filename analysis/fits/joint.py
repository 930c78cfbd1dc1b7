"""Whether the best share moves with compute or with sparsity: one law for the share curves of several budgets.

From a table of runs to a frozen `JointFit`. Every budget keeps a level of its own, so this is a law of the curves' shape, not of the loss
surface. With z the decimal logarithms of compute and sparsity less their means over the budgets,

    loss = level(budget) + exp(s + s' z) H(x; m + m' z)

    cubic      H = (x - m)^2 + g (x - m)^3          m is the best share itself
    two-power  H = e^m f_q(x) - (1 - x)^p           f_q and the bounds as in `laws.TwoPower`; the best share rises with m

The depth may always change with every factor (s'); the models differ in which of them move the optimum (m'). The shape, cubic or
two-power, is that with the lesser AICc where everything may move the optimum; the model is chosen by AICc, anew in every resample.

Letters: B resamples, C budgets, F factors, I means over all budgets, K parameters, X any shares.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.special import fdtrc

from analysis.errors import AnalysisError, require_columns
from analysis.fits.laws import Cubic, TwoPower
from analysis.fits.noise import SeedModel, resample, seed_model
from analysis.fits.runs import listed, read_shares, require_one_budget
from analysis.fits.types import Estimate, Fit, Status

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = np.ndarray
BUDGET = ("tokens", "budget.total_params", "budget.active_params")
"""Columns that set budgets apart, those of them that a table has."""
FACTORS = ("compute", "sparsity")
UNITS = {"compute": "FLOPs of a training run, LM head excluded", "sparsity": "P_tot / P_act"}
LEAST_SHARES = 4
VARIES = 1.1  # a factor whose budgets are within this ratio is held
SHAPES = {"cubic": ("g",), "two-power": ("p", "q")}
"""Shape -> its parameters, common to all budgets."""
POSITION = {"cubic": (-1.0, 2.0), "two-power": (-15.0, 15.0)}
BOUNDS = {"g": (-3.0, 3.0), "p": TwoPower.P, "q": TwoPower.Q}
AMPLITUDE = (-25.0, 10.0)  # of its logarithm
SLOPE = (-30.0, 30.0)


@dataclass(frozen=True)
class Model:
    """One of the nested models, as fitted to the same means."""

    moves_with: tuple[str, ...]
    """Factors that move the optimum; none: it is the same everywhere."""
    parameters: int
    """Levels of the budgets counted."""
    df: int
    """Means less parameters."""
    squares: float
    """Sum of squared deviations of the means from the law, in units of their noise."""
    aicc: float | None
    """Over runs; seed effects and the noise level of each budget counted."""
    lack_of_fit_p: float
    """Chance of so poor a fit if the model were true (F test against the paired noise)."""
    same_optimum_p: float | None
    """Chance of so much better a fit than with the same optimum everywhere if that were true (F test); None for that model itself."""
    left_out_error: float | None
    """Root mean square error of the differences between shares at the largest budget, predicted from all others, nats per token."""


@dataclass(frozen=True)
class LeftOut:
    """The largest budget predicted from all others, by the model that they choose."""

    budget: dict[str, float]
    moves_with: tuple[str, ...]
    predicted: Estimate
    """Best share."""
    measured: Estimate
    """Best share of a curve of the same shape, fitted to this budget alone."""
    error: Estimate
    """Predicted less measured."""
    rms: float
    """Of the predicted less the measured differences between shares, nats per token."""
    inside: float
    """Part of these whose 95% prediction interval holds the measured one."""
    note: str = ""


@dataclass(frozen=True)
class Extrapolation:
    """The best share at a budget that the user names."""

    status: Status
    message: str
    optimum: Estimate | None
    """None where the budget is too far from the data for a number to mean anything."""
    distance: float
    """How far beyond the sampled range, in units of that range's length on a logarithmic axis; 0 inside."""


@dataclass(frozen=True, kw_only=True)
class JointFit(Fit):
    """A law of several budgets with its status. Intervals are 95% percentile intervals over resamples; losses are in nats per token."""

    budgets: tuple[dict[str, float], ...]
    """Compute and sparsity of each budget, and its columns."""
    factors: tuple[str, ...] = ()
    """Those that vary and can be told apart."""
    moves_with: tuple[str, ...] = ()
    """Factors that move the optimum in the model chosen."""
    optima: tuple[Estimate, ...] = ()
    """Best share at each budget under the law."""
    shifts: dict[str, Estimate] = field(default_factory=dict)
    """Factor -> best share at its largest sampled value less that at its least, the others at their mean; in the fullest model."""
    models: tuple[Model, ...] = ()
    left_out: LeftOut | None = None
    _law: _Law | None = field(default=None, repr=False, compare=False)

    def extrapolate(self, compute: float | None = None, sparsity: float | None = None) -> Extrapolation:
        """The best share at another budget. The farther from the data, the graver the warning; beyond one sampled range, no number.

        Args:
            compute: FLOPs of the training run, without the LM head; needed where it varied.
            sparsity: P_tot / P_act; likewise.

        Raises:
            AnalysisError: no law was fitted, a factor is missing or not positive, or one that did not vary is given another value.
        """
        if self._law is None:
            raise AnalysisError(f"this fit has no law: {self.status}. {self.message}")
        given = {"compute": compute, "sparsity": sparsity}
        z_F, distance, where = [], 0.0, ""
        for name in FACTORS:
            value, sampled = given[name], [budget[name] for budget in self.budgets]
            if value is None:
                if name in self.factors:
                    raise AnalysisError(f"extrapolate: give `{name}` ({UNITS[name]}); it ran from {min(sampled):.3g} to {max(sampled):.3g}")
                continue
            if not value > 0:
                raise AnalysisError(f"extrapolate: `{name}` is {value!r}; it must be positive")
            if name not in self.factors:
                if not min(sampled) / VARIES <= value <= max(sampled) * VARIES:
                    raise AnalysisError(
                        f"extrapolate: the effect of `{name}` cannot be told from these budgets; leave it out, or train other values of it"
                    )
                continue
            low, high = np.log10(min(sampled)), np.log10(max(sampled))
            beyond = float(max(low - np.log10(value), np.log10(value) - high, 0) / (high - low))
            if beyond > distance:
                distance, where = beyond, f"{name} {value:.3g} against {min(sampled):.3g} to {max(sampled):.3g} sampled"
            z_F.append(np.log10(value))
        if distance > 1:
            message = f"{where} is {distance:.1f} times the sampled range beyond it: no number is given, train a budget nearer to it."
            return Extrapolation(Status.TOO_FEW_POINTS, message, None, distance)
        draws_B = self._law.optimum(np.array(z_F))
        warning = ""
        if distance > 0:
            grave = "barely more than a guess" if distance > 0.5 else "an extrapolation"
            warning = f"{where}: {distance:.2f} of the sampled range beyond the data, {grave}; the law may change there."
        return Extrapolation(self.status, " ".join(filter(None, (self.message, warning))), Estimate.of(draws_B[0], draws_B[1:]), distance)

    def band(self, factor: str, values: Array) -> pd.DataFrame:
        """The law's best share along a factor, the others at their mean -> value, optimum, low, high."""
        if self._law is None:
            raise AnalysisError(f"this fit has no law: {self.status}. {self.message}")
        rows = []
        for value in np.asarray(values, float):
            z_F = self._law.centre_F.copy()
            z_F[self.factors.index(factor)] = np.log10(value)
            draws_B = self._law.optimum(z_F)
            rows.append((value, draws_B[0], *np.quantile(draws_B[1:], (0.025, 0.975))))
        return pd.DataFrame(rows, columns=["value", "optimum", "low", "high"])

    def summary(self, noun: str = "share") -> str:
        lines = []
        for factor, shift in self.shifts.items():
            sampled = [budget[factor] for budget in self.budgets]
            moves = "it moves" if not shift.low <= 0 <= shift.high else "no movement can be told from noise"
            span = f"From {min(sampled):.3g} to {max(sampled):.3g} of {factor} the best {noun} shifts by {shift.value:+.2f}"
            lines.append(f"{span} (95% interval {shift.low:+.2f} to {shift.high:+.2f}): {moves}.")
        if self.models:
            chosen = next(model for model in self.models if model.moves_with == self.moves_with)
            what = f"an optimum that moves with {' and '.join(self.moves_with)}" if self.moves_with else "the same optimum everywhere"
            best = f" ({self.optima[0].value:.2f}, 95% interval {self.optima[0].low:.2f} to {self.optima[0].high:.2f})"
            lines.append(f"AICc prefers {what}{'' if self.moves_with else best}; {self.law} curves, {chosen.df} degrees of freedom.")
            tests = [f"{' and '.join(model.moves_with)} p = {model.same_optimum_p:.2g}" for model in self.models if model.moves_with]
            lines.append(f"Against the same optimum everywhere: {', '.join(tests)} (F test).")
        if self.left_out:
            left, verdict = self.left_out, "holds" if self.left_out.error.low <= 0 <= self.left_out.error.high else "excludes"
            note = f" ({left.note})" if left.note else ""
            lines.append(
                f"The largest budget, predicted without it{note}: best {noun} {left.predicted.value:.2f}, "
                f"measured {left.measured.value:.2f}; the 95% interval of the error, {left.error.low:+.2f} to {left.error.high:+.2f}, "
                f"{verdict} 0. Differences between {noun}s are off by {left.rms:.4f} nats/token (rms)."
            )
        if self.message:
            lines.append(f"{'Caution' if self.status is Status.CONVERGED else f'Status {self.status}'}: {self.message}")
        return " ".join(lines)

    def plot(self, ax: Axes) -> None:
        from analysis.figures.joint import draw_fit

        draw_fit(ax, self)


@dataclass(frozen=True)
class _Means:
    """Share means of all budgets, and how to weigh them."""

    x_I: Array
    y_BI: Array
    """Row 0 is the data, the others resamples."""
    budget_I: Array
    z_CF: Array
    """Decimal logarithms of the factors."""
    models: tuple[SeedModel, ...]
    sd_C: Array
    df_C: Array
    weigh_II: Array
    """Takes the level of each budget off, and makes the noise of what is left independent and of size 1."""
    seeds_C: Array

    @property
    def df(self) -> int:
        """Behind the noise of all budgets."""
        return int(sum(model.df for model in self.models))

    def part(self, own_C: Array, z_CF: Array) -> _Means:
        """Some of the budgets, under these factors."""
        own = np.flatnonzero(own_C)
        own_I = np.isin(self.budget_I, own)
        return replace(
            self,
            x_I=self.x_I[own_I],
            y_BI=self.y_BI[:, own_I],
            budget_I=np.searchsorted(own, self.budget_I[own_I]),
            z_CF=z_CF,
            models=tuple(self.models[c] for c in own),
            sd_C=self.sd_C[own],
            df_C=self.df_C[own],
            weigh_II=self.weigh_II[np.ix_(own_I, own_I)],
            seeds_C=self.seeds_C[own],
        )


@dataclass(frozen=True)
class _Curve:
    """A shape, the factors that there are and those that move its optimum: how parameters become losses."""

    shape: str
    factors: tuple[str, ...]
    moves_with: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        position = ("position", *(f"position by {name}" for name in self.moves_with))
        return (*position, "log amplitude", *(f"log amplitude by {name}" for name in self.factors), *SHAPES[self.shape])

    @property
    def bounds(self) -> Array:
        """[K, 2]."""
        slopes = [SLOPE] * len(self.moves_with), [SLOPE] * len(self.factors)
        return np.array([POSITION[self.shape], *slopes[0], AMPLITUDE, *slopes[1], *(BOUNDS[name] for name in SHAPES[self.shape])])

    def position(self, theta_BK: Array, z_F: Array) -> Array:
        """At one budget, z less its mean -> [B]."""
        moving = [self.factors.index(name) for name in self.moves_with]
        return np.asarray(theta_BK[:, 0] + theta_BK[:, 1 : 1 + len(moving)] @ z_F[moving])

    def value(self, theta_BK: Array, x_I: Array, z_IF: Array) -> Array:
        """Loss less the level -> [B, I]."""
        moving = [self.factors.index(name) for name in self.moves_with]
        split, count = 1 + len(moving), len(self.factors)
        m_BI = theta_BK[:, :1] + theta_BK[:, 1:split] @ z_IF[:, moving].T
        s_BI = theta_BK[:, [split]] + theta_BK[:, split + 1 : split + 1 + count] @ z_IF.T
        rest = theta_BK[:, split + 1 + count :]
        if self.shape == "cubic":
            u_BI = x_I - m_BI
            curve_BI = u_BI**2 * (1 + rest[:, :1] * u_BI)
        else:
            curve_BI = np.exp(m_BI) * TwoPower().fall(x_I, rest[:, 1:]) - (1 - x_I) ** rest[:, :1]
        return np.exp(s_BI) * curve_BI

    def optimum(self, theta_BK: Array, z_F: Array, low: float, high: float) -> Array:
        """Best share at one budget, an end where none is inside -> [B]."""
        m_B = self.position(theta_BK, z_F)
        one_B = np.ones_like(m_B)
        if self.shape == "cubic":
            g_B = theta_BK[:, -1]
            law: Cubic | TwoPower = Cubic()
            own_BK = np.stack([m_B**2 - g_B * m_B**3, 3 * g_B * m_B**2 - 2 * m_B, 1 - 3 * g_B * m_B, g_B], axis=1)
        else:
            law = TwoPower()
            own_BK = np.stack([0 * m_B, -one_B, np.exp(m_B), theta_BK[:, -2], theta_BK[:, -1]], axis=1)
        ends_B2 = law.value(np.array([low, high]), own_BK)
        vertex_B = law.vertex(own_BK, low, high)
        return np.where(np.isnan(vertex_B), np.where(ends_B2[:, 0] <= ends_B2[:, 1], low, high), vertex_B)


@dataclass(frozen=True)
class _Law:
    """The fitted models: row 0 is that of the data, the others those of the resamples. Every row chose a model of its own."""

    curves: tuple[_Curve, ...]
    theta: tuple[Array, ...]
    chosen_B: Array
    centre_F: Array
    low: float
    high: float

    def optimum(self, log_F: Array) -> Array:
        """Best share at one budget in each row -> [B]."""
        z_F = log_F - self.centre_F
        each = [curve.optimum(theta, z_F, self.low, self.high) for curve, theta in zip(self.curves, self.theta, strict=True)]
        return np.stack(each)[self.chosen_B, np.arange(len(self.chosen_B))]


def fit_joint(
    frame: pd.DataFrame,
    x: str = "share_moe",
    loss: str = "val_loss",
    seed: str = "seed",
    *,
    resamples: int = 1000,
    random_seed: int = 0,
) -> JointFit:
    """Fit loss against share at several budgets at once.

    Args:
        frame: one run a row. A budget is what agrees in those of `BUDGET` that the table has; its compute is the median over its runs of
            `flops_per_token` x `tokens` (6 x `active_params` x `tokens` without that column), its sparsity that of `total_params` /
            `active_params`. Rows without a share (the dense baseline) are left out, of a column `status` only `finished` is used.
        x: column of the share of the sparse parameters in routed experts, in [0, 1].
        loss: column of the loss, nats per token.
        seed: column of the seed; runs of one seed are paired across the shares of one budget.
        resamples: size of the bootstrap.
        random_seed: of the bootstrap; the same input gives the same fit.

    Returns:
        A fit whose status says whether its numbers may be quoted. Poor data give a status, not an exception.

    Raises:
        AnalysisError: a column is missing or holds text, a share is outside [0, 1], a trial id is repeated, or one seed stands twice at one
            share of one budget.
    """
    require_columns(frame.columns, (x, loss, seed, "tokens", "total_params", "active_params"), "fit_joint")
    names = [name for name in BUDGET if name in frame]
    if {"rho", "sparse_params"} <= set(frame):
        frame = frame[frame["rho"].notna() | (frame["sparse_params"] > 0)]
    frame = frame[frame[x].notna() & frame[names].notna().all(axis=1)]
    if "trial_id" in frame and frame["trial_id"].duplicated().any():
        repeated = listed(sorted(map(str, frame["trial_id"][frame["trial_id"].duplicated()].unique())))
        raise AnalysisError(f"fit_joint: trial id {repeated} stands in several rows; keep one of each")
    groups = [(dict(zip(names, key, strict=True)), group) for key, group in frame.groupby(names, sort=True)]
    for key, group in groups:
        require_one_budget(group, x, f"fit_joint, {_named(key)}")
    read = [read_shares(group, (x,), loss, seed, f"fit_joint, {_named(key)}") for key, group in groups]
    few = [_named(key) for (key, _), runs in zip(groups, read, strict=True) if len(np.unique(runs.x_NK)) < LEAST_SHARES]
    kept = [place for place, runs in enumerate(read) if len(np.unique(runs.x_NK)) >= LEAST_SHARES]
    groups, read = [groups[place] for place in kept], [read[place] for place in kept]
    budgets = tuple({name: float(value) for name, value in key.items()} | factors_of(group) for key, group in groups)
    factors, dropped = _tell_apart(budgets)
    conventions: dict[str, Any] = {
        "x": x,
        "loss": loss,
        "loss_unit": "nats per token",
        "factors": {name: UNITS[name] for name in factors},
        "dropped": dropped,
        "budgets_left_out": few,
        "z": "decimal logarithm less its mean over the budgets",
        "objective": "sum of squared deviations of the share means from the law, in units of their noise",
        "noise": "residuals of runs after share and seed effects, a level for each budget",
        "resampling": "Gaussian noise of that size on every run, its level from a scaled inverse chi-square, seed effects taken off again",
        "choice_of_model": "least AICc, chosen anew in every resample; the shape by AICc of the fullest model, once",
        "interval": "95% percentile",
        "resamples": resamples,
        "random_seed": random_seed,
    }
    common: dict[str, Any] = {
        "rows": tuple(row for runs in read for row in runs.rows),
        "conventions": conventions,
        "budgets": budgets,
        "factors": factors,
    }
    bad = ", ".join(filter(None, (runs.unusable() for runs in read)))
    if bad:
        message = f"the loss of {bad} is not a number or is negative: leave such runs out and say so, or repeat them."
        return JointFit(status=Status.NOT_FINITE, message=message, law="none", **common)
    seed_models = [seed_model(runs.x_NK[:, 0], runs.y_N, runs.seeds_N) for runs in read]
    refusal = _refusal(budgets, factors, seed_models)
    if refusal:
        return JointFit(status=Status.TOO_FEW_POINTS, message=refusal, law="none", **common)
    if any(model.sd == 0 for model in seed_models) or any(np.ptp(runs.y_N) == 0 for runs in read):
        message = "runs of different seeds or shares have exactly the same loss: check that they differ."
        return JointFit(status=Status.NOT_FINITE, message=message, law="none", **common)

    rng = np.random.default_rng(random_seed)
    seeds_C = np.array([len(np.unique(runs.seeds_N)) for runs in read])
    means = _means(seed_models, np.log10([[budget[name] for name in factors] for budget in budgets]), seeds_C, resamples, rng)
    shapes = [name for name in SHAPES if len(means.x_I) > len(_Curve(name, factors, factors).names) + len(budgets)]
    fits = {shape: _fit(_Curve(shape, factors, factors), means) for shape in shapes}
    scores = {shape: _aiccs(_Curve(shape, factors, factors), theta, means)[0] for shape, theta in fits.items()}
    shape = min(scores, key=lambda name: (scores[name], name))
    curves = tuple(_Curve(shape, factors, moves) for moves in _nested(factors))
    theta = tuple(fits[shape] if curve.moves_with == factors else _fit(curve, means) for curve in curves)
    low, high = float(means.x_I.min()), float(means.x_I.max())
    score_MB = np.stack([_aiccs(*each, means) for each in zip(curves, theta, strict=True)])
    law = _Law(curves, theta, score_MB.argmin(0), means.z_CF.mean(0), low, high)
    chosen = int(law.chosen_B[0])
    optima_CB = np.stack([law.optimum(z_F) for z_F in means.z_CF])
    left_out, errors = _left_out(shape, budgets, means)
    models = _models(curves, theta, score_MB[:, 0], means, errors)
    status, message = _verdict(curves[chosen], theta[chosen][0], optima_CB, (low, high), models[chosen])
    own_BK = theta[chosen]
    return JointFit(
        status=status,
        message=message,
        law=shape,
        parameters={name: Estimate.of(own_BK[0, k], own_BK[1:, k]) for k, name in enumerate(curves[chosen].names)},
        covariance=tuple(map(tuple, np.cov(own_BK[1:].T).tolist())),
        objective=models[chosen].squares,
        moves_with=curves[chosen].moves_with,
        optima=tuple(Estimate.of(each[0], each[1:]) for each in optima_CB),
        shifts=_shifts(curves[-1], theta[-1], means, low, high),
        models=models,
        left_out=left_out,
        _law=law,
        **common,
    )


# --- the table --------------------------------------------------------------------------------------------------------------


def _named(key: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in key.items())


def factors_of(group: pd.DataFrame) -> dict[str, float]:
    """Compute and sparsity of the runs of one budget."""
    each = group["flops_per_token"] if "flops_per_token" in group else 6 * group["active_params"]
    return {
        "compute": float((each * group["tokens"]).median()),
        "sparsity": float((group["total_params"] / group["active_params"]).median()),
    }


def _tell_apart(budgets: Sequence[Mapping[str, float]]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Factors whose effects the budgets can tell apart; and why the others are left out."""
    kept: list[str] = []
    dropped = {}
    for name in FACTORS:
        values = [budget[name] for budget in budgets]
        design = np.log10([[10.0, *(budget[each] for each in [*kept, name])] for budget in budgets]) if budgets else np.zeros((0, 1))
        if not values or max(values) <= VARIES * min(values):
            dropped[name] = "does not vary between the budgets"
        elif np.linalg.matrix_rank(design - design.mean(0) * (np.arange(design.shape[1]) > 0), tol=1e-2) < len(kept) + 2:
            dropped[name] = f"varies only together with {' and '.join(kept)}, so their effects cannot be told apart"
        else:
            kept.append(name)
    return tuple(kept), dropped


def _refusal(budgets: Sequence[Mapping[str, float]], factors: tuple[str, ...], models: Sequence[SeedModel]) -> str:
    """Why no law can be fitted, or ''."""
    if len(budgets) < 2:
        return f"{len(budgets)} of the budgets with {LEAST_SHARES} shares or more; a law over budgets needs two: train more shares."
    if not factors:
        return "neither compute nor sparsity varies: train another `budget.tokens`, `budget.active_params` or `budget.total_params`."
    if not any(model.df for model in models):
        return "no seed is repeated, so the noise is not measured and nothing can be compared: train a second seed."
    return ""


def _means(models: Sequence[SeedModel], z_CF: Array, seeds_C: Array, resamples: int, rng: np.random.Generator) -> _Means:
    """A budget without repeats has the pooled noise of the others."""
    df = sum(model.df for model in models)
    pooled = math.sqrt(sum(model.squares for model in models) / df)
    sd_C = np.array([model.sd if model.df else pooled for model in models])
    df_C = np.array([model.df or df for model in models])
    budget_I = np.repeat(np.arange(len(models)), [len(model.x_I) for model in models])
    weigh_II = np.zeros((len(budget_I), len(budget_I)))
    for c, model in enumerate(models):
        whiten = np.linalg.inv(np.linalg.cholesky(model.covariance_II)) / sd_C[c]
        level = whiten.sum(1) / np.linalg.norm(whiten.sum(1))
        weigh_II[np.ix_(budget_I == c, budget_I == c)] = whiten - np.outer(level, level @ whiten)
    draws = [resample(model, sd, int(df), resamples, rng) for model, sd, df in zip(models, sd_C, df_C, strict=True)]
    y_BI = np.hstack([np.vstack([model.mean_I, drawn]) for model, drawn in zip(models, draws, strict=True)])
    x_I = np.concatenate([model.x_I for model in models])
    return _Means(x_I, y_BI, budget_I, z_CF, tuple(models), sd_C, df_C, weigh_II, seeds_C)


# --- the fit ----------------------------------------------------------------------------------------------------------------


def _nested(factors: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Which factors move the optimum: none, each alone, all."""
    return [(), *((name,) for name in factors), *([factors] if len(factors) > 1 else [])]


def _fit(curve: _Curve, means: _Means) -> Array:
    """Parameters of every row of means -> [B, K]. The data from a grid of starts, the resamples from the best of those."""
    z_IF = (means.z_CF - means.z_CF.mean(0))[means.budget_I]
    target_BI = means.y_BI @ means.weigh_II.T
    firsts = np.linspace(0, 1, 6) if curve.shape == "cubic" else np.linspace(-6, 4, 6)
    shapes = [(g,) for g in (-0.7, 0.0, 0.7)] if curve.shape == "cubic" else [(p, q) for p in (0.4, 0.9) for q in (0.5, 3.0)]
    starts = np.zeros((len(firsts) * len(shapes) * 2, len(curve.names)))
    place = 0
    for first in firsts:
        for rest in shapes:
            for amplitude in (-3.0, -1.0):
                starts[place, 0], starts[place, 1 + len(curve.moves_with)] = first, amplitude
                starts[place, -len(rest) :] = rest
                place += 1
    tried, squares = _descend(curve, starts, np.repeat(target_BI[:1], len(starts), axis=0), means, z_IF, 60)
    best = tried[squares.argmin()]
    theta_BK = _descend(curve, np.repeat(best[None], len(target_BI), axis=0), target_BI, means, z_IF, 25)[0]
    theta_BK[0] = best
    return theta_BK


def _descend(curve: _Curve, theta_BK: Array, target_BI: Array, means: _Means, z_IF: Array, steps: int) -> tuple[Array, Array]:
    """Levenberg-Marquardt within the bounds, all rows at once -> parameters [B, K], squares [B]."""
    limits = curve.bounds
    theta_BK = np.clip(theta_BK, limits[:, 0], limits[:, 1])
    count, damping_B = theta_BK.shape[1], np.full(len(theta_BK), 1e-2)

    def rest(theta_BK: Array) -> Array:
        return target_BI - curve.value(theta_BK, means.x_I, z_IF) @ means.weigh_II.T

    rest_BI = rest(theta_BK)
    squares_B, idle = (rest_BI**2).sum(1), 0
    for _ in range(steps):
        slope_BIK = np.empty((*rest_BI.shape, count))
        for k in range(count):
            moved = theta_BK.copy()
            moved[:, k] += np.where(theta_BK[:, k] + 1e-6 > limits[k, 1], -1e-6, 1e-6)
            slope_BIK[:, :, k] = (rest_BI - rest(moved)) / (moved - theta_BK)[:, [k]]
        downhill_BK = (slope_BIK * rest_BI[:, :, None]).sum(1)
        held_BK = ((theta_BK <= limits[:, 0]) & (downhill_BK < 0)) | ((theta_BK >= limits[:, 1]) & (downhill_BK > 0))
        slope_BIK = np.where(held_BK[:, None], 0, slope_BIK)
        normal_BKK = slope_BIK.swapaxes(1, 2) @ slope_BIK
        size_BK = np.einsum("bkk->bk", normal_BKK) + 1e-9 + held_BK
        normal_BKK = normal_BKK + (damping_B[:, None] * size_BK + 1e-12)[:, :, None] * np.eye(count) + held_BK[:, :, None] * np.eye(count)
        move_BK = np.linalg.solve(normal_BKK, np.where(held_BK, 0, downhill_BK)[:, :, None])[:, :, 0]
        trial_BK = np.clip(theta_BK + np.clip(move_BK, -2, 2), limits[:, 0], limits[:, 1])
        new_BI = rest(trial_BK)
        new_B = (new_BI**2).sum(1)
        better_B = new_B < squares_B
        idle = 0 if (squares_B - new_B > 1e-6).any() else idle + 1
        theta_BK, rest_BI = np.where(better_B[:, None], trial_BK, theta_BK), np.where(better_B[:, None], new_BI, rest_BI)
        squares_B = np.where(better_B, new_B, squares_B)
        if idle == 4:
            break
        damping_B = np.clip(np.where(better_B, damping_B / 5, damping_B * 5), 1e-10, 1e8)
    return theta_BK, squares_B


def _rest(curve: _Curve, theta_BK: Array, means: _Means) -> Array:
    """Deviations of the means from the law, in units of their noise -> [B, I]."""
    z_IF = (means.z_CF - means.z_CF.mean(0))[means.budget_I]
    return np.asarray((means.y_BI - curve.value(theta_BK, means.x_I, z_IF)) @ means.weigh_II.T)


def _aiccs(curve: _Curve, theta_BK: Array, means: _Means) -> Array:
    """Akaike's criterion over runs, each budget with a noise level of its own -> [B]; infinite where too few runs allow it.

    A resample has the noise of the study and its own, so half of its squares count.
    """
    budgets = len(means.models)
    runs_C = np.array([model.counts_I.sum() for model in means.models])
    rest_BI = _rest(curve, theta_BK, means)
    squares_BC = np.stack([(rest_BI[:, means.budget_I == c] ** 2).sum(1) for c in range(budgets)], axis=1) * means.sd_C**2
    squares_BC[1:] /= 2
    free, runs = len(curve.names) + budgets + int((means.seeds_C - 1).sum()) + budgets, int(runs_C.sum())
    if runs - free <= 1:
        return np.full(len(squares_BC), np.inf)
    pure_C = np.array([model.squares for model in means.models])
    return np.asarray(np.log((pure_C + squares_BC) / runs_C) @ runs_C + 2 * free + 2 * free * (free + 1) / (runs - free - 1))


def _models(
    curves: Sequence[_Curve], theta: Sequence[Array], scores: Array, means: _Means, errors: Mapping[tuple[str, ...], float]
) -> tuple[Model, ...]:
    found: list[Model] = []
    for curve, theta_BK, score in zip(curves, theta, scores, strict=True):
        squares = float((_rest(curve, theta_BK, means)[0] ** 2).sum())
        count = len(curve.names) + len(means.models)
        df, same = len(means.x_I) - count, found[0] if found else None
        better = None
        if same:
            more = count - same.parameters
            better = float(fdtrc(more, means.df, max(same.squares - squares, 0) / more))
        found.append(
            Model(
                moves_with=curve.moves_with,
                parameters=count,
                df=df,
                squares=squares,
                aicc=float(score) if math.isfinite(score) else None,
                lack_of_fit_p=float(fdtrc(df, means.df, squares / df)),
                same_optimum_p=better,
                left_out_error=errors.get(curve.moves_with),
            )
        )
    return tuple(found)


def _left_out(shape: str, budgets: tuple[dict[str, float], ...], means: _Means) -> tuple[LeftOut, dict[tuple[str, ...], float]]:
    """The largest budget predicted from all others; and the error of each model that they determine."""
    largest = max(range(len(budgets)), key=lambda c: (budgets[c]["compute"], budgets[c]["sparsity"]))
    others_C = np.arange(len(budgets)) != largest
    factors, _ = _tell_apart([budgets[c] for c in np.flatnonzero(others_C)])
    others = means.part(others_C, np.log10([[budgets[c][name] for name in factors] for c in np.flatnonzero(others_C)]))
    own = means.part(~others_C, np.zeros((1, 0)))
    low, high = float(means.x_I.min()), float(means.x_I.max())
    z_F = np.log10([budgets[largest][name] for name in factors]) - others.z_CF.mean(0)
    curves = [_Curve(shape, factors, moves) for moves in _nested(factors)]
    theta = [_fit(curve, others) for curve in curves]
    chosen_B = np.stack([_aiccs(*each, others) for each in zip(curves, theta, strict=True)]).argmin(0)
    wide_IF = np.repeat(z_F[None], len(own.x_I), axis=0)
    off_MBI = np.stack([curve.value(each, own.x_I, wide_IF) for curve, each in zip(curves, theta, strict=True)]) - own.y_BI
    off_MBI -= off_MBI.mean(2, keepdims=True)
    rows = np.arange(len(chosen_B))
    off_BI = off_MBI[chosen_B, rows]
    predicted_B = np.stack([curve.optimum(each, z_F, low, high) for curve, each in zip(curves, theta, strict=True)])[chosen_B, rows]
    alone = _Curve(shape, (), ())
    measured_B = alone.optimum(_fit(alone, own), np.zeros(0), low, high)
    bounds = np.quantile(off_BI[1:], (0.025, 0.975), axis=0)
    lost = [
        name
        for name in FACTORS
        if name not in factors and budgets[largest][name] > VARIES * max(budgets[c][name] for c in np.flatnonzero(others_C))
    ]
    left = LeftOut(
        budget=budgets[largest],
        moves_with=curves[chosen_B[0]].moves_with,
        predicted=Estimate.of(predicted_B[0], predicted_B[1:]),
        measured=Estimate.of(measured_B[0], measured_B[1:]),
        error=Estimate.of(predicted_B[0] - measured_B[0], predicted_B[1:] - measured_B[1:]),
        rms=float(np.sqrt(np.mean(off_BI[0] ** 2))),
        inside=float(np.mean((bounds[0] <= 0) & (bounds[1] >= 0))),
        note=f"taken to be without effect of {' and '.join(lost)}, which the others do not vary" if lost else "",
    )
    return left, {curve.moves_with: float(np.sqrt(np.mean(off[0] ** 2))) for curve, off in zip(curves, off_MBI, strict=True)}


def _shifts(curve: _Curve, theta_BK: Array, means: _Means, low: float, high: float) -> dict[str, Estimate]:
    z_CF = means.z_CF - means.z_CF.mean(0)
    shifts = {}
    for place, name in enumerate(curve.factors):
        first_F, last_F = np.zeros(z_CF.shape[1]), np.zeros(z_CF.shape[1])
        first_F[place], last_F[place] = z_CF[:, place].min(), z_CF[:, place].max()
        moved_B = curve.optimum(theta_BK, last_F, low, high) - curve.optimum(theta_BK, first_F, low, high)
        shifts[name] = Estimate.of(moved_B[0], moved_B[1:])
    return shifts


def _verdict(curve: _Curve, theta_K: Array, optima_CB: Array, ends: tuple[float, float], model: Model) -> tuple[Status, str]:
    """The status of a fitted law and what there is to doubt about it; the last status set is the gravest."""
    status, doubts = Status.CONVERGED, []
    ordinary = {("p", 1), ("q", 0)}  # a steady gain and the logarithm are members of the family
    hits = [
        name
        for name, value, limits in zip(curve.names, theta_K, curve.bounds, strict=True)
        for side in (0, 1)
        if abs(value - limits[side]) < 1e-3 and (name, side) not in ordinary
    ]
    if hits:
        status = Status.BOUND_HIT
        doubts.append(f"the law stopped at the end of its admissible range ({', '.join(hits)}).")
    at_end = np.isin(optima_CB[:, 0], ends)
    if at_end.any():
        status = Status.NO_INTERIOR_MINIMUM if at_end.all() else status
        doubts.append(f"at {at_end.sum()} of {len(at_end)} budgets the law is least at an end of the sampled shares.")
    if model.lack_of_fit_p < 0.01:
        doubts.append(f"the law misses the share means by more than noise explains (p = {model.lack_of_fit_p:.1g}).")
    return status, " ".join(doubts)
