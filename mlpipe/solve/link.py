"""Link functions: the mean and its derivatives by the linear predictor."""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float64]

LARGEST = 100.0  # |eta| beyond which exp(eta) is held, so that its powers stay finite


class Tail(NamedTuple):
    """log of mu (or of 1 - mu) and the derivatives of mu divided by it, where these are known beyond underflow."""

    log: Array
    d1: Array
    d2: Array
    d3: Array


class Means(NamedTuple):
    """Per row: the mean `mu`, its complement `nu` = 1 - mu without cancellation, and the derivatives of mu by eta; `of_mu`, `of_nu`: see
    Tail."""

    mu: Array
    nu: Array
    d1: Array
    d2: Array
    d3: Array
    of_mu: Tail | None = None
    of_nu: Tail | None = None


@dataclass(frozen=True)
class Link:
    """One link: `means` and the link function itself (McCullagh and Nelder 1989, section 2.2; derivatives FORMULAS R8).

    `low`, `high`: the interval of means it can give; `partial`: whether some eta have no mean at all (NaN).
    """

    name: str
    means: Callable[[Array], Means]
    function: Callable[[float], float]
    low: float = -math.inf
    high: float = math.inf
    partial: bool = False

    def ends(self, eta: Array, half: Array) -> tuple[Array, Array]:
        """The ends (n,) of the means of eta - half … eta + half: NaN where these go on beyond where the link is not defined, which is 0."""
        low, high = eta - half, eta + half
        with np.errstate(invalid="ignore"):
            if self.partial:
                low, high = np.where(low * eta > 0.0, low, math.nan), np.where(high * eta > 0.0, high, math.nan)
            mu, one, other = (self.means(x).mu for x in (eta, low, high))
            lower = np.where(one <= mu, one, np.where(other <= mu, other, math.nan))  # some links fall
            upper = np.where(other >= mu, other, np.where(one >= mu, one, math.nan))
        return lower, upper


def _logit(eta: Array) -> Means:
    e = np.exp(-np.abs(eta))
    larger, smaller = 1.0 / (1.0 + e), e / (1.0 + e)
    positive = eta >= 0.0
    mu, nu = np.where(positive, larger, smaller), np.where(positive, smaller, larger)
    v = mu * nu
    return Means(mu, nu, v, v * (nu - mu), v * (1.0 - 6.0 * v))


def _probit(eta: Array) -> Means:
    from scipy.special import ndtr

    density = np.exp(-0.5 * eta * eta) / math.sqrt(2.0 * math.pi)
    tails = _normal_tail(eta), _normal_tail(-eta)
    of_nu = Tail(tails[1].log, tails[1].d1, -eta * tails[1].d1, (eta * eta - 1.0) * tails[1].d1)
    return Means(ndtr(eta), ndtr(-eta), density, -eta * density, (eta * eta - 1.0) * density, tails[0], of_nu)


def _normal_tail(x: Array) -> Tail:
    """log Φ(x) and the derivatives of Φ over Φ(x), by Mills' ratio."""
    from scipy.special import erfcx, log_ndtr

    with np.errstate(over="ignore"):
        ratio = math.sqrt(2.0 / math.pi) / erfcx(-x / math.sqrt(2.0))
    return Tail(log_ndtr(x), ratio, -x * ratio, (x * x - 1.0) * ratio)


def _cloglog(eta: Array) -> Means:
    x = np.exp(np.clip(eta, -LARGEST, LARGEST))
    s = np.exp(-x)
    shape = x, x * (1.0 - x), x * (1.0 - 3.0 * x + x * x)
    return Means(-np.expm1(-x), s, shape[0] * s, shape[1] * s, shape[2] * s, of_nu=Tail(-x, *shape))


def _cauchit(eta: Array) -> Means:
    d = 1.0 + eta * eta
    mu, nu = np.arctan2(1.0, -eta) / math.pi, np.arctan2(1.0, eta) / math.pi
    return Means(mu, nu, 1.0 / (math.pi * d), -2.0 * eta / (math.pi * d**2), (6.0 * eta * eta - 2.0) / (math.pi * d**3))


def _log(eta: Array) -> Means:
    mu = np.exp(np.clip(eta, -LARGEST, LARGEST))
    return Means(mu, 1.0 - mu, mu, mu, mu)


def _identity(eta: Array) -> Means:
    zero = np.zeros_like(eta)
    return Means(eta, 1.0 - eta, zero + 1.0, zero, zero)


def _inverse(eta: Array) -> Means:
    mu = 1.0 / np.where(eta == 0.0, math.nan, eta)
    return Means(mu, 1.0 - mu, -(mu**2), 2.0 * mu**3, -6.0 * mu**4)


def _sqrt(eta: Array) -> Means:
    eta = np.where(eta > 0.0, eta, math.nan)
    mu = eta * eta
    return Means(mu, 1.0 - mu, 2.0 * eta, np.full_like(eta, 2.0), np.zeros_like(eta))


def _inverse_square(eta: Array) -> Means:
    root = np.sqrt(np.where(eta > 0.0, eta, math.nan))
    mu = 1.0 / root
    return Means(mu, 1.0 - mu, -0.5 * mu**3, 0.75 * mu**5, -1.875 * mu**7)


def _normal_quantile(p: float) -> float:
    from scipy.special import ndtri

    return float(ndtri(p))


LINKS = {
    link.name: link
    for link in (
        Link("logit", _logit, lambda p: math.log(p / (1.0 - p)), 0.0, 1.0),
        Link("probit", _probit, _normal_quantile, 0.0, 1.0),
        Link("cloglog", _cloglog, lambda p: math.log(-math.log1p(-p)), 0.0, 1.0),
        Link("cauchit", _cauchit, lambda p: math.tan(math.pi * (p - 0.5)), 0.0, 1.0),
        Link("log", _log, math.log, 0.0),
        Link("identity", _identity, lambda mu: mu),
        Link("inverse", _inverse, lambda mu: 1.0 / mu, partial=True),
        Link("sqrt", _sqrt, math.sqrt, 0.0, partial=True),
        Link("1/mu^2", _inverse_square, lambda mu: mu**-2.0, 0.0, partial=True),
    )
}
