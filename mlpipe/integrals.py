"""Moments of the response with the random effects integrated out, e ~ N(0, v) added to the linear predictor, and their derivatives.

d E g⁻¹(eta + e) / d v = ½ E (g⁻¹)''(eta + e) (the heat equation): the first two derivatives of the inverse link give all that the delta
method needs.
"""
from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .marginal import nodes, trapezoid
from .solve.link import LINKS

if TYPE_CHECKING:
    from .result import MixedFit

    Array = np.ndarray

PLAIN = {"binomial": (0.0, 1.0, -1.0, 0.0), "poisson": (0.0, 1.0, 0.0, 0.0)}


# links whose means are interpolated (of cloglog the complement falls too fast); nodes per unit of the linear predictor
SMOOTH, PER_UNIT = ("logit", "cauchit"), 32


class Integrated(NamedTuple):
    """E g⁻¹(eta + e) and its complement to 1, and its derivatives by eta and by v, (n,)."""

    mu: Array
    nu: Array
    by_eta: Array
    by_variance: Array


def integrated(link: str, eta: Array, variance: Array | None) -> Integrated:
    """The mean over e ~ N(0, variance): closed for identity, log and probit, else by quadrature; at eta without a variance."""
    means = LINKS[link].means
    if variance is None or link == "identity":
        at = means(eta)
        return Integrated(at.mu, at.nu, at.d1, 0.5 * at.d2)
    if link == "log":
        mu = means(eta + 0.5 * variance).mu
        return Integrated(mu, 1.0 - mu, mu, 0.5 * mu)
    if link == "probit":
        s2 = 1.0 + variance
        at = means(eta / np.sqrt(s2))
        return Integrated(at.mu, at.nu, at.d1 / np.sqrt(s2), -0.5 * at.d1 * eta / s2**1.5)
    cells = _cells(link, eta, variance)
    if cells is not None:
        return _interpolated(link, eta, float(variance[0]), *cells)
    return _quadrature(link, eta, np.sqrt(variance))


def _quadrature(link: str, eta: Array, sd: Array) -> Integrated:
    means = LINKS[link].means
    mu, nu, d1, d2 = (np.zeros_like(eta) for _ in range(4))
    for weight, place in nodes(link, eta, sd):
        at = means(place)
        mu += weight * at.mu
        nu += weight * at.nu
        d1 += weight * at.d1
        d2 += weight * at.d2
    return Integrated(mu, nu, d1, 0.5 * d2)


def _cells(link: str, eta: Array, variance: Array) -> tuple[float, int] | None:
    """The first node and the number of cells of width 1 / PER_UNIT over the linear predictors, where interpolation pays: the mean is a
    smooth function of eta alone, and there are more rows than nodes."""
    if link not in SMOOTH or len(eta) < 2 or (variance != variance[0]).any():
        return None
    with np.errstate(invalid="ignore"):
        low, high = float(np.nanmin(eta, initial=np.inf)), float(np.nanmax(eta, initial=-np.inf))
    if not (np.isfinite(low) and np.isfinite(high)):
        return None
    first, n = math.floor(low * PER_UNIT), math.floor(high * PER_UNIT) + 1 - math.floor(low * PER_UNIT)
    return (first / PER_UNIT, n) if 4 * n < len(eta) else None


def _interpolated(link: str, eta: Array, variance: float, first: float, n: int) -> Integrated:
    """The same by quintic Hermite interpolation of the mean and of its complement; their sixth derivatives, of the order of the values
    themselves, times width⁶ / 46,080 are its error, below 1e-12."""
    grid = first + np.arange(n + 1) / PER_UNIT
    at = _quadrature(link, grid, np.full(n + 1, math.sqrt(variance)))
    slope, curvature = at.by_eta, 2.0 * at.by_variance
    place = np.nan_to_num((eta - first) * PER_UNIT)
    cell = np.clip(place.astype(np.intp), 0, n - 1)
    t = np.where(np.isnan(eta), math.nan, place - cell)
    mu, d1, d2 = _hermite(cell, t, at.mu, slope, curvature)
    nu = _hermite(cell, t, at.nu, -slope, -curvature)[0]
    return Integrated(mu, nu, d1, 0.5 * d2)


def _hermite(cell: Array, t: Array, value: Array, slope: Array, curvature: Array) -> tuple[Array, Array, Array]:
    """Value and two derivatives at `t` in [0, 1] of each cell, of the quintic that has both ends' values and two derivatives."""
    h = 1.0 / PER_UNIT
    a, b, c = value[:-1], h * slope[:-1], 0.5 * h * h * curvature[:-1]
    rest = value[1:] - (a + b + c), h * slope[1:] - (b + 2.0 * c), h * h * curvature[1:] - 2.0 * c
    d = 10.0 * rest[0] - 4.0 * rest[1] + 0.5 * rest[2]
    e = -15.0 * rest[0] + 7.0 * rest[1] - rest[2]
    f = 6.0 * rest[0] - 3.0 * rest[1] + 0.5 * rest[2]
    a, b, c, d, e, f = (k[cell] for k in (a, b, c, d, e, f))
    return (
        a + t * (b + t * (c + t * (d + t * (e + t * f)))),
        (b + t * (2.0 * c + t * (3.0 * d + t * (4.0 * e + t * 5.0 * f)))) / h,
        (2.0 * c + t * (6.0 * d + t * (12.0 * e + t * 20.0 * f))) / (h * h),
    )


def linked(link: str, mu: Array, nu: Array) -> Array:
    """The link of a mean `mu` whose complement `nu` = 1 - mu is known without cancellation."""
    with np.errstate(divide="ignore", invalid="ignore"):
        match link:
            case "logit":
                return np.asarray(np.log(mu) - np.log(nu))
            case "probit":
                from scipy.special import ndtri

                return np.asarray(np.where(mu < 0.5, ndtri(mu), -ndtri(nu)))
            case "cloglog":
                return np.asarray(np.log(-np.where(mu < 0.5, np.log1p(-mu), np.log(nu))))
            case "cauchit":
                return np.asarray(np.where(mu < 0.5, -1.0 / np.tan(math.pi * mu), 1.0 / np.tan(math.pi * nu)))
            case "log":
                return np.asarray(np.log(mu))
            case "inverse":
                return np.asarray(1.0 / mu)
            case "sqrt":
                return np.asarray(np.sqrt(mu))
            case "1/mu^2":
                return np.asarray(mu**-2.0)
    return mu


def variance_coefficients(fit: MixedFit) -> tuple[float, float, float, float]:
    """Var(y) of a row of weight and trials 1 as a cubic polynomial in its mean: coefficients from degree 0 up."""
    if fit.residual_scaled:
        return fit.sigma**2, 0.0, 0.0, 0.0
    family, phi = fit.base_family, fit.dispersion  # type: ignore[attr-defined]
    if family == "gaussian":  # the scale of estimating equations, sigma² of a likelihood
        return phi, 0.0, 0.0, 0.0
    if family in PLAIN:  # phi is 1 but for quasi families and estimating equations
        constant, linear, square, cubic = PLAIN[family]
        return phi * constant, phi * linear, phi * square, phi * cubic
    return {
        "negbinomial": (0.0, 1.0, 1.0 / phi, 0.0), "negbinomial1": (0.0, 1.0 + phi, 0.0, 0.0), "gamma": (0.0, 0.0, phi, 0.0),
        "inverse_gaussian": (0.0, 0.0, 0.0, phi), "beta": (0.0, 1.0 / (1.0 + phi), -1.0 / (1.0 + phi), 0.0),
    }[str(family)]  # fmt: skip


def moments(link: str, eta: Array, variance: Array | None) -> tuple[Array, Array, Array]:
    """E mu, E mu², E mu³ for mu = g⁻¹(eta + e)."""
    means = LINKS[link].means
    if variance is None:
        mu = means(eta).mu
        return mu, mu**2, mu**3
    if link == "identity":
        return eta, eta**2 + variance, eta**3 + 3.0 * eta * variance
    if link == "log":
        first, second, third = (means(k * eta + 0.5 * k * k * variance).mu for k in (1.0, 2.0, 3.0))
        return first, second, third
    out = [np.zeros_like(eta) for _ in range(3)]
    for weight, place in nodes(link, eta, np.sqrt(variance)):
        mu = means(place).mu
        for k in range(3):
            out[k] += weight * mu ** (k + 1)
    return out[0], out[1], out[2]


def response_moments(fit: MixedFit, eta: Array, variance: Array | None, size: Any = 1.0) -> tuple[Array, Array]:
    """Mean and variance of the response given its covariates, E Var(y | e) / size + Var E(y | e); `size`: weight, or trials of a
    proportion."""
    first, second, third = moments(fit.link, eta, variance)
    c = variance_coefficients(fit)
    within = c[0] + c[1] * first + c[2] * second + c[3] * third
    return first, within / size + _between(fit.link, first, second, variance)


def _between(link: str, first: Array, second: Array, variance: Array | None) -> Array:
    """Var E(y | e), without cancellation where it is closed."""
    if variance is None:
        return np.zeros_like(first)
    if link == "identity":
        return variance
    return np.asarray(first**2 * np.expm1(variance)) if link == "log" else np.maximum(second - first**2, 0.0)


def pair_covariances(link: str, eta: tuple[Array, Array], variance: tuple[Array, Array], covariance: Array) -> Array:
    """Cov(g⁻¹(eta_1 + e_1), g⁻¹(eta_2 + e_2)) for pairs (n,) of normal e: closed for identity and log, else the outer integral over
    e_1 by quadrature and the inner one over e_2 given e_1."""
    if link == "identity":
        return covariance
    means = [integrated(link, eta[k], variance[k]).mu for k in (0, 1)]
    if link == "log":
        return np.asarray(means[0] * means[1] * np.expm1(covariance))
    sd = np.sqrt(variance[0])
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = np.where(sd > 0.0, covariance / sd, 0.0)
    rest = np.maximum(variance[1] - slope**2, 0.0)
    rest[rest < 1e-12 * np.maximum(variance[1], 1e-300)] = 0.0
    product = np.zeros_like(eta[0])
    largest = max(float(np.max(sd, initial=0.0)), float(np.max(np.abs(slope), initial=0.0)))
    for node, weight in zip(*trapezoid(link, largest), strict=True):
        inner = integrated(link, eta[1] + slope * node, rest if rest.any() else None).mu
        product += weight * (LINKS[link].means(eta[0] + sd * node).mu - means[0]) * inner
    return np.where(np.isfinite(means[1]), product, math.nan)
