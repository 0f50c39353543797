"""Degrees of freedom of a linear fit's tests, from the statistics that it keeps."""
from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from .errors import ConfigError, DataError, ResourceError, did_you_mean
from .held import Held
from .solve import degrees
from .solve.crossed import CrossedProblem, Exact
from .solve.degrees import Derivatives, KenwardRoger
from .solve.likelihood import LMMProblem

if TYPE_CHECKING:
    from .result import LMMFit, MixedFit

T_EXCESS = 2.37  # (z³ + z) / 4 at z = 1.96: what the quantile of t exceeds z by, times the degrees of freedom
DDF = ("wald", "satterthwaite", "kenward-roger")


@dataclass(frozen=True)
class FTest:
    """One test of k independent contrasts: F (or χ² / k where `df` is infinite), its degrees of freedom, its p-value."""

    statistic: float
    k: int
    df: float
    p_value: float


def check_ddf(fit: MixedFit, ddf: str) -> None:
    """Raises ConfigError for unknown degrees of freedom, and for those that a fit has not."""
    if ddf not in DDF:
        raise ConfigError(f"ddf = {ddf!r} is not one of {', '.join(DDF)}", code="ddf", hint=did_you_mean(str(ddf), list(DDF)))
    if ddf == "wald":
        return
    if not fit.residual_scaled or not fit.terms or hasattr(fit, "df_test"):
        raise ConfigError(f"ddf = {ddf!r} belongs to linear mixed models", code="ddf", hint='ddf="wald"')
    if robust := fit.info.get("robust"):
        message = f"ddf = {ddf!r} is of the model's own covariance, and the fit's is cluster-robust ({robust['kind']})"
        raise ConfigError(message, code="ddf", hint='ddf="wald", or a fit without cluster=')
    if ddf == "kenward-roger" and not fit.reml:
        raise ConfigError("Kenward and Roger's method is for restricted likelihood", code="ddf", hint="fit with reml=True")


def held(fit: LMMFit) -> Held:
    """The statistics of a fit; one more scan of its source where they are gone, noted in `info`.

    Raises DataError where there is no source either, or where it has changed.
    """
    if fit.held is None:
        if fit.source is None:
            raise DataError(
                "the fit has neither its statistics nor its data", code="not_collected",
                hint=f'collect them once, mp.suffstats({fit.formula!r}, data, collect="blocks"), save them, and fit from them',
            )  # fmt: skip
        from .fit import recollected

        fit.held = recollected(fit)
    return fit.held


class Tests:
    """Tests of a fit's coefficients under one kind of degrees of freedom. Errors as in `check_ddf` and `held`."""

    def __init__(self, fit: MixedFit, ddf: str) -> None:
        check_ddf(fit, ddf)
        self.fit, self.ddf = fit, ddf

    @cached_property
    def _held(self) -> Held:
        return held(self.fit)  # type: ignore[arg-type]

    @cached_property
    def _derivatives(self) -> Derivatives:
        kept, second = self._held, self.ddf == "kenward-roger"
        lambda_, s2 = self._lambda, (self.fit.sigma / kept.scale) ** 2
        check_size(self.fit, kept.problem, second)  # type: ignore[arg-type]
        if isinstance(kept.problem, CrossedProblem):
            return degrees.of_levels(Exact(kept.problem), lambda_, s2, second=second)
        return degrees.of_blocks(kept.problem, lambda_, s2, second=second)

    @cached_property
    def _lambda(self) -> np.ndarray:
        return self._held.lambda_([term.star for term in self.fit.terms])

    @cached_property
    def _adjusted(self) -> KenwardRoger:
        return degrees.kenward_roger(self._derivatives, self._held.free)

    @cached_property
    def covariance(self) -> np.ndarray:
        """The covariance (p, p) of the coefficients, adjusted by Kenward and Roger's method where it was asked for."""
        return self._held.covariance(self._adjusted.adjusted) if self.ddf == "kenward-roger" else self.fit.covariance

    def between(self, L: np.ndarray) -> np.ndarray:
        """The same of Lβ (k, k), for L (k, p)."""
        if self.ddf != "kenward-roger":
            return self.fit.spread.between(L)
        star = self._held.star_contrasts(L)
        return np.asarray(star @ self._adjusted.adjusted @ star.T)

    def each(self, L: np.ndarray) -> np.ndarray:
        """Degrees of freedom (k,) of a t test of each row of L (k, p); by Wald's method those of least squares, else infinite, as of rows
        that are zero."""
        if self.ddf == "wald":
            return np.full(len(L), getattr(self.fit, "df_test", np.inf))
        star = self._held.star_contrasts(L)
        if self.ddf == "kenward-roger":
            return np.array([self._adjusted.test(row[None])[0] if row.any() else math.inf for row in star])
        covariance = self._held.in_solver_order(self.fit.theta_covariance)
        return degrees.satterthwaite(self._derivatives, self._lambda, self._held.free, covariance, star)

    def joint(self, L: np.ndarray, value: np.ndarray) -> FTest:
        """The F test of Lβ = value, by Wald's method over the residual degrees of freedom of least squares, else χ²; rows of L (k, p) that
        repeat others are left out. Raises ConfigError where they contradict these, or where the covariance has not their rank."""
        V = np.diag(self.covariance)
        if not np.isfinite(V).all():
            raise ConfigError("the covariance of the coefficients is not known: the fit has not converged", code="hypothesis")
        turned, k = _independent(L * np.sqrt(np.maximum(V, 0.0)), value)
        difference = turned @ (L @ self.fit.beta - value)
        middle = self.between(turned @ L)
        d = np.sqrt(np.maximum(np.diag(middle), 1e-300))
        if not np.linalg.eigvalsh(middle / np.outer(d, d))[0] > 1e-12:
            raise ConfigError(
                f"the covariance of the coefficients does not tell {k} equations apart", code="hypothesis",
                hint="there are too few clusters for them" if getattr(self.fit, "cluster", ()) else "test fewer at once",
            )  # fmt: skip
        statistic = float(difference @ np.linalg.solve(middle, difference)) / k
        if self.ddf == "wald":
            df = float(getattr(self.fit, "df_test", math.inf))
            return FTest(statistic, k, df, f_tail(statistic, k, df))
        if self.ddf == "satterthwaite":
            rows = degrees.uncorrelated(L, self.fit.spread.half(L))
            if len(rows) != k:  # standard deviations too far apart for one unit
                each = turned @ L / d[:, None]
                rows = degrees.uncorrelated(each, self.fit.spread.half(each))
            df = degrees.joint(self.each(rows))
        else:
            df, scale = self._adjusted.test(self._held.star_contrasts(turned @ L))
            statistic *= scale
        return FTest(statistic, k, df, f_tail(statistic, k, df))


def _independent(L: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, int]:
    """A matrix (k, rows) that makes independent rows of those of L, in units of standard errors."""
    size = np.linalg.norm(L, axis=1)
    if not size.any():
        raise ConfigError("the hypothesis says nothing of the coefficients", code="hypothesis")
    scale = 1.0 / np.where(size > 0.0, size, 1.0)
    U, s, _ = np.linalg.svd(L * scale[:, None], full_matrices=True)
    k = int((s > 1e-7 * s[0]).sum())
    rest = U[:, k:].T @ (scale * value)
    if (np.abs(rest) > 1e-7 * np.linalg.norm(scale * value)).any():
        raise ConfigError("the equations contradict each other", code="hypothesis")
    return U[:, :k].T * scale, k


def check_size(fit: LMMFit, problem: LMMProblem | CrossedProblem, second: bool) -> None:
    """Raises ResourceError where the matrices of several factors do not fit the memory limit; `second` as in `degrees.of_levels`."""
    if isinstance(problem, LMMProblem):
        return
    from .options import Options

    limit = (fit.options or Options()).memory_bytes
    rest = sum(f.size for f in problem.factors[1:])
    needed = degrees.dense_bytes(problem) if second else 0 if problem.stays_sparse else 3 * 8 * rest**2
    if needed > limit // 2:
        effects, levels = sum(f.size for f in problem.factors), min(fit.levels.values())
        other = 'ddf="satterthwaite" or "wald"' if second else 'ddf="wald"'
        raise ResourceError(
            f"this needs {needed / 1e6:,.0f} MB of dense matrices over {effects:,} random effects, more than half the "
            f"memory limit of {limit / 1e6:,.0f} MB", code="memory_limit",
            hint=f"{other}, or raise memory_limit; with {levels:,} levels or more a factor 95 % quantiles of t and z differ by about "
            f"{T_EXCESS / levels:.1g}",
        )  # fmt: skip


# -- distributions -----------------------------------------------------------------------------------------------------


def chi2_tail(x: float, k: float) -> float:
    """P(χ²_k > x)."""
    from scipy.special import chdtrc

    return float(chdtrc(k, x)) if x > 0.0 else 1.0


def f_tail(x: float, k: float, df: float) -> float:
    """P(F_k,df > x), χ² / k at infinite df."""
    from scipy.special import fdtrc

    if not math.isfinite(x):
        return math.nan
    return chi2_tail(x * k, k) if df > degrees.LARGE else float(fdtrc(k, df, max(x, 0.0)))


def t_tail(t: float, df: float) -> float:
    """P(|T_df| > |t|)."""
    from scipy.special import stdtr

    return math.erfc(abs(t) / math.sqrt(2.0)) if df > degrees.LARGE else float(2.0 * stdtr(df, -abs(t)))


def t_quantile(level: float, df: float) -> float:
    """The t with P(|T_df| ≤ t) = level."""
    from scipy.special import ndtri, stdtrit

    return float(ndtri(0.5 + level / 2.0) if df > degrees.LARGE else stdtrit(df, 0.5 + level / 2.0))
