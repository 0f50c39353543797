"""Confidence intervals of fixed effects and variance parameters, with R's names."""
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from . import variance
from .again import Again, again
from .errors import ConfigError, did_you_mean
from .generalized_result import PARAMETER, GeneralizedFit
from .held import Held
from .inference import check_size, held
from .marginal import fisher
from .pins import REACH, Parametrisation
from .result import LMMFit
from .solve.crossed import CrossedProblem
from .solve.profile import BlockSurface, LevelSurface, Pin, Profile, Surface
from .solve.refit import Optimum, free_of, refit
from .wald import check_level

if TYPE_CHECKING:
    import pyarrow as pa

    from .result import MixedFit

METHODS = ("wald", "profile", "boot")
Interval = tuple[str, float, float]


def confint(fit: MixedFit, method: str, level: float, draws: int) -> pa.Table:
    """See `MixedFit.confint`."""
    import pyarrow as pa

    if method not in METHODS:
        raise ConfigError(f"method = {method!r} is not one of {', '.join(METHODS)}", hint=did_you_mean(str(method), list(METHODS)))
    check_level(level, "level")
    if method == "boot":
        from .bootstrap import percentiles

        rows = percentiles(fit, level, draws)
    else:
        rows = _wald(fit, level) if method == "wald" else _profiled(fit, level)
    names, low, high = (list(column) for column in zip(*rows, strict=True))
    columns = {"conf_low": low, "conf_high": high}
    return pa.table({"term": names} | {name: pa.array(ends, pa.float64(), mask=np.isnan(ends)) for name, ends in columns.items()})


def random_names(fit: MixedFit) -> list[str]:
    """R's names of the variance parameters, in R's order: by columns of each term's lower triangle."""
    return [name for k in range(len(fit.terms)) for name, _, _ in _parameters(fit, k)]


def _parameters(fit: MixedFit, k: int) -> Iterator[tuple[str, int, int]]:
    """(name, i, j) of term k's standard deviations (i = j) and correlations."""
    term = fit.terms[k]
    group = _r_group(fit, term.group)
    for j, column in enumerate(term.names):
        yield f"sd_{column}|{group}", j, j
        for i in range(j + 1, len(term.names)):
            yield f"cor_{term.names[i]}.{column}|{group}", i, j


def _r_group(fit: MixedFit, group: str) -> str:
    """The name that lme4 gives a grouping factor: of a nesting a/b the inner key comes first."""
    bar = next(bar for bar in fit.parsed.random if bar.group_label == group)
    if "/" not in bar.text or len(bar.groups) < 2:
        return group
    name = bar.groups[0]
    for key in bar.groups[1:]:
        name = f"{key}:({name})" if ":" in name else f"{key}:{name}"
    return name


def family_name(fit: MixedFit) -> str | None:
    """The name of the family's own parameter: "sigma" where it is the residual's standard deviation."""
    name = next((name for _, name, _, _ in fit.family_parameters()), None)
    return "sigma" if name == "sd__Observation" else name


def _wald(fit: MixedFit, level: float) -> list[Interval]:
    z = NormalDist().inv_cdf(0.5 + level / 2)
    errors = dict(zip(((g, t) for g, t, _ in variance.random_parameters(fit)), variance.random_errors(fit).tolist(), strict=True))
    values = {(g, t): value for g, t, value in variance.random_parameters(fit)}
    out: list[Interval] = []
    for k, term in enumerate(fit.terms):
        for name, i, j in _parameters(fit, k):
            key = (term.group, f"sd__{term.names[i]}" if i == j else f"cor__{term.names[j]}.{term.names[i]}")
            out.append((name, values[key] - z * errors[key], values[key] + z * errors[key]))
    for _, _, value, error in fit.family_parameters():
        out.append((str(family_name(fit)), value - z * error, value + z * error))
    both = zip(fit.names, fit.beta.tolist(), variance.standard_errors(fit).tolist(), strict=True)
    return out + [(name, value - z * error, value + z * error) for name, value, error in both]


# -- profile -----------------------------------------------------------------------------------------------------------


def _profiled(fit: MixedFit, level: float) -> list[Interval]:
    z = NormalDist().inv_cdf(0.5 + level / 2)
    if isinstance(fit, GeneralizedFit):
        return _by_passes(fit, z)
    assert isinstance(fit, LMMFit)
    return _linear(fit, z)


def _limits(fit: MixedFit, surface: Surface, pins: list[tuple[str, Pin]], curvature: np.ndarray, least: float, z: float) -> list[Interval]:
    out = []
    for name, pin in pins:
        profile = Profile(surface, pin, curvature, least)
        out.append((name, profile.limit(z, upper=False), profile.limit(z, upper=True)))
    return out


def _random_pins(fit: MixedFit, how: Parametrisation, places: tuple[int, ...]) -> list[tuple[str, Pin]]:
    out = []
    for k, place in enumerate(places):
        out += [(name, how.sd(place, i) if i == j else how.cor(place, i, j)) for name, i, j in _parameters(fit, k)]
    return out


def ml_optimum(fit: LMMFit, kept: Held) -> tuple[Held, Optimum]:
    """The fit by maximum likelihood, from the same statistics."""
    whole = kept.with_reml(False)
    lambda_ = kept.lambda_([term.star for term in fit.terms])
    options = fit.options
    start = lambda_[free_of(whole.problem)]
    if options is None:
        return whole, refit(whole.problem, start)
    return whole, refit(whole.problem, start, tol=options.tol, max_evaluations=options.max_passes)


def _linear(fit: LMMFit, z: float) -> list[Interval]:
    before = held(fit)
    check_size(fit, before.problem, second=False)
    kept, best = ml_optimum(fit, before)
    problem = kept.problem
    surface: Surface = LevelSurface(problem) if isinstance(problem, CrossedProblem) else BlockSurface(problem)
    phi = np.append(best.lambda_[free_of(problem)], math.log(best.s2) / 2)
    size = math.exp(-0.5 * problem.sum_log_w / problem.n)
    how = Parametrisation(kept.random, phi, best.covariance, relative=True, scale=kept.scale, size=size)
    pins = _random_pins(fit, how, kept.order)
    error = math.sqrt(best.covariance[-1, -1]) * math.sqrt(best.s2)
    pins.append(("sigma", how.element(len(phi) - 1, math.exp, math.log, error)))
    moved = len(pins)
    contrasts = kept.star_contrasts(np.eye(len(fit.names)))
    for name, c in zip(fit.names, contrasts, strict=True):
        pins.append((name, how.whole(c, float(c @ best.beta), math.sqrt(float(c @ best.vcov @ c)))))
    found = _limits(fit, surface, pins, how.curvature(), best.value, z)
    shift = kept.base + np.linalg.solve(kept.fixed.R, kept.offset)
    rows = [(name, low * kept.scale, high * kept.scale) if name == "sigma" else (name, low, high) for name, low, high in found[:moved]]
    return rows + [(name, low + s, high + s) for (name, low, high), s in zip(found[moved:], shift.tolist(), strict=True)]


def _by_passes(fit: GeneralizedFit, z: float) -> list[Interval]:
    with again(fit) as found:
        best, p = found.best, found.best.p
        d = len(best.psi) - p - found.model.density.family.shape
        order = np.concatenate([np.arange(p, p + d), np.arange(p), np.arange(p + d, len(best.psi))])
        phi, covariance = best.psi[order], best.vcov[np.ix_(order, order)]
        how = Parametrisation(found.random, phi, covariance, relative=False, size=_typical(found))
        pins = _random_pins(fit, how, found.places)
        moved = len(pins)
        inverse = np.linalg.inv(found.model.fixed.R)
        for name, c in zip(fit.names, inverse, strict=True):
            pins.append((name, how.coefficient(c, float(c @ best.beta), math.sqrt(float(c @ best.vcov[:p, :p] @ c)))))
        curvature, shape = how.curvature(), found.model.density.family.shape
        if shape:
            curvature[-1, -1] += 2.0 / REACH**2  # a parameter at 0 or infinity leaves its logarithm undetermined
        rows = _limits(fit, best.surface, pins, curvature, -2.0 * best.loglik, z)
        if not shape:
            return rows
        tau = _toward_poisson(fit, how.logarithm(len(phi) - 1, math.sqrt(covariance[-1, -1])))
        [(_, *limits)] = _limits(fit, best.surface, [("", tau)], curvature, -2.0 * best.loglik, z)
        return [*rows[:moved], (str(family_name(fit)), *_ends(limits, tau, PARAMETER[fit.base_family][1])), *rows[moved:]]


def _typical(found: Again) -> float:
    """A random effect neither small nor large beside what one row tells of its linear predictor: the columns of the solver's coefficients
    have mean square 1."""
    model, best = found.model, found.best
    tau = float(best.psi[-1]) if model.density.family.shape else 0.0
    told = float(np.mean(np.diag(fisher(model, model.Q @ best.beta, tau)))) if best.p else math.nan
    return math.sqrt(model.rows.nobs / told) if told > 0.0 else 1.0


def _toward_poisson(fit: GeneralizedFit, tau: Pin) -> Pin:
    """A negative binomial's parameter ends where it is as good as Poisson: beyond it a sum of its logarithms has no digits."""
    if fit.base_family == "negbinomial":
        return replace(tau, most=max(tau.estimate, REACH + math.log(float(fit.info["mean_response"]))))
    return replace(tau, least=min(tau.estimate, -REACH)) if fit.base_family == "negbinomial1" else tau


def _ends(limits: Sequence[float], tau: Pin, power: float) -> tuple[float, float]:
    """The limits of exp(power tau); 0 or infinite where the profile of tau has no end."""
    ends = {tau.least: 0.0 if power > 0.0 else math.inf, tau.most: math.inf if power > 0.0 else 0.0}
    low, high = (ends[t] if t in ends else math.exp(power * t) for t in limits)
    return min(low, high), max(low, high)
