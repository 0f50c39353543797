"""Intervals around predictions."""
from __future__ import annotations

from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from .coefficients import critical
from .errors import ConfigError, did_you_mean
from .lookup import MODE_VARIANCE
from .predictions import Output, variance_of
from .solve.link import LINKS
from .wald import check_level

if TYPE_CHECKING:
    from .result import MixedFit

INTERVALS = ("confidence", "prediction")


def bands(fit: MixedFit, wanted: str, kind: str, interval: str, level: float, factors: list[str]) -> tuple[Output, Output]:
    """The outputs `lower` and `upper`; see `MixedFit.predict`. Raises ConfigError for an interval that the fit has not."""
    _check(fit, wanted, interval, level, factors)
    degrees = getattr(fit, "df_test", np.inf)  # of least squares, as in its tests
    z = NormalDist().inv_cdf(0.5 + level / 2) if np.isinf(degrees) else critical(level, degrees)
    V, features = _over_features(fit)
    parts = ["conditional" if wanted == "conditional" else "population", *(f"f{i}" for i in features)]
    further = [MODE_VARIANCE] if wanted == "conditional" else []
    if interval == "prediction":
        further += ["variance"] if wanted != "conditional" and fit.terms else []
        further += [variance_of(group) for group in fit.groups if group not in factors] if wanted == "conditional" else []
        further += ["size"] if fit.recipe.weights else []
    plain = fit.sigma**2 if interval == "prediction" and not fit.recipe.weights else 0.0
    link = None if fit.residual_scaled or kind == "link" else LINKS[fit.link]

    def ends(sign: float, eta: np.ndarray, *values: np.ndarray) -> np.ndarray:
        F = np.stack(values[: len(features)]) if features else np.zeros((0, len(eta)))
        variance = plain + np.einsum("in,ij,jn->n", F, V, F, optimize=True)
        for name, value in zip(further, values[len(features) :], strict=True):
            variance = variance + (fit.sigma**2 / value if name == "size" else value)
        half = z * np.sqrt(variance)
        if link is None:
            return np.asarray(eta + sign * half)
        return link.ends(eta, half)[int(sign > 0)]

    names = tuple([*parts, *further])
    return Output(names, lambda *values: ends(-1.0, *values)), Output(names, lambda *values: ends(1.0, *values))


def _check(fit: MixedFit, wanted: str, interval: str, level: float, factors: list[str]) -> None:
    if interval not in INTERVALS:
        known = list(INTERVALS)
        raise ConfigError(f"interval = {interval!r} is not one of {', '.join(known)}", hint=did_you_mean(str(interval), known))
    check_level(level, "level")
    if any(np.isinf(term.factor).any() for term in fit.terms):
        raise ConfigError("predictions of a fit with absorbed effects have no interval: the effects have no errors", code="not_available")
    if not fit.residual_scaled:
        if interval == "prediction":
            raise ConfigError(
                "a generalized model has no prediction interval of this form: its responses are not normal", hint='interval="confidence"'
            )
        if wanted == "marginal" and fit.terms:
            raise ConfigError("marginal means of a generalized model have no interval here", hint='effects="population"')
    if wanted == "conditional":
        for group in factors:
            if sum(len(term.names) for term in fit.terms if term.group == group) > 1:
                raise ConfigError(
                    f"the effects of {group} have covariances that the fit does not keep", hint='effects="population" has intervals'
                )


def _over_features(fit: MixedFit) -> tuple[np.ndarray, list[int]]:
    """The covariance of the fixed part's coefficients over features, and which features these are."""
    Q = fit.spread.Q
    features = np.flatnonzero(np.abs(Q).max(axis=1, initial=0.0)).tolist()
    return Q[features] @ fit.spread.star @ Q[features].T, features
