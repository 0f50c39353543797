"""Confidence intervals of fixed effects and variance parameters, with R's names."""
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from . import variance
from .again import again
from .errors import ConfigError, did_you_mean
from .generalized_result import PARAMETER, GeneralizedFit
from .held import Held
from .inference import check_size, held
from .pins import REACH, Parametrisation
from .result import LMMFit
from .solve.crossed import CrossedProblem
from .solve.pinned import Pin
from .solve.profile import Profile
from .solve.refit import Optimum, free_of, refit
from .solve.surfaces import BlockSurface, LevelSurface, Surface
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


class _Profiled:
    """Profiles of one model: `how` its parameters are laid out, with the Hessian `curvature` of -2ℓ at the `least` one; limits at z."""

    def __init__(self, how: Parametrisation, curvature: np.ndarray, least: float, z: float) -> None:
        self.how, self.curvature, self.least, self.z = how, curvature, least, z

    def limits(self, pin: Pin) -> tuple[float, float]:
        """Both limits of one quantity."""
        profile = Profile(self.how.surface, pin, self.curvature, self.least)
        return profile.limit(self.z, upper=False), profile.limit(self.z, upper=True)

    def random(self, fit: MixedFit, places: tuple[int, ...]) -> Iterator[Interval]:
        """The standard deviations and correlations of a fit's terms, which stand at `places`. Where a standard deviation may be zero
        the likelihood says nothing of its correlations."""
        for k, place in enumerate(places):
            names = list(_parameters(fit, k))
            sds = {i: self.limits(self.how.sd(place, i)) for _, i, j in names if i == j}
            for name, i, j in names:
                told = sds[i][0] > 0.0 and sds[j][0] > 0.0
                yield name, *(sds[i] if i == j else self.limits(self.how.cor(place, i, j)) if told else (-1.0, 1.0))


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
    log_sigma = np.array([math.log(best.s2) / 2])
    how = Parametrisation(
        surface, kept.random, best.lambda_, log_sigma, np.array([math.sqrt(0.5 / problem.n)]), relative=True, scale=kept.scale
    )
    profiled = _Profiled(how, how.curvature(), best.value, z)
    rows = list(profiled.random(fit, kept.order))
    low, high = profiled.limits(how.sigma())
    rows.append(("sigma", low * kept.scale, high * kept.scale))
    shift = np.linalg.solve(kept.fixed.R, kept.offset)
    for name, c, s in zip(fit.names, kept.star_contrasts(np.eye(len(fit.names))), shift.tolist(), strict=True):
        low, high = profiled.limits(how.whole(c, float(c @ best.beta), math.sqrt(float(c @ best.vcov @ c))))
        rows.append((name, low + s, high + s))
    return rows


def _by_passes(fit: GeneralizedFit, z: float) -> list[Interval]:
    with again(fit) as found:
        best, p, shape = found.best, found.best.p, found.model.density.family.shape
        e = [*range(p), *([len(best.psi) - 1] if shape else [])]
        covariance = best.vcov[np.ix_(e, e)]
        errors = np.sqrt(np.diag(covariance))
        if shape:
            errors[-1] = errors[-1] if errors[-1] < REACH else REACH  # a parameter at 0 or infinity leaves its logarithm undetermined
        how = Parametrisation(best.surface, found.random, best.lambda_, best.psi[e], errors, relative=False)
        profiled = _Profiled(how, how.curvature(), -2.0 * best.loglik, z)
        rows = list(profiled.random(fit, found.places))
        if shape:
            tau = _toward_poisson(fit, how.logarithm())
            rows.append((str(family_name(fit)), *_ends(profiled.limits(tau), tau, PARAMETER[fit.base_family][1])))
        for name, c in zip(fit.names, np.linalg.inv(found.model.fixed.R), strict=True):
            error = math.sqrt(float(c @ covariance[:p, :p] @ c))
            rows.append((name, *profiled.limits(how.coefficient(c, float(c @ best.beta), error))))
        return rows


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
