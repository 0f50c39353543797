"""Response families: log-densities by the mean and a shape, and their derivatives (FORMULAS R8).

Every density is linear in a few functions of the response, so rows that share a mean may be held as one cell: the
means of these functions and how many rows (or trials) there are. What depends on the response alone is left out here
and added once (`Family.constant`).
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .link import Array, Means

LARGE = 1e3  # from which asymptotic series of the gamma function and its derivatives are exact
FLOOR = 1e-60  # of mu and 1 - mu where their powers are divided by


@dataclass(frozen=True)
class Cells:
    """The data of some rows or cells, each (n,): `y` the mean response; `size` how many rows or trials (None: one each);
    `weight` the prior weight (None: 1); `statistics` the means of the family's further functions of the response."""

    y: Array
    size: Array | None = None
    weight: Array | None = None
    statistics: tuple[Array, ...] = ()


class ByShape(NamedTuple):
    """Derivatives of one row's log f by tau: itself, its first and second derivatives by mu, and the second by tau."""

    first: Array
    score: Array
    curvature: Array
    second: Array


class Family:
    """One family. `shape`: whether tau (log of a shape, precision or inverse dispersion) is a parameter.

    `statistics`: further functions of the response the density needs ("log", "log1m", "inverse", "square"); `keyed`: rows must also
    share the response to be one cell; `constant`: what the log-likelihood adds ("binomial", "factorial", ""); `low`, `high`: the
    interval of means; `links`: the canonical or customary link first.
    """

    name = ""
    shape = False
    statistics: tuple[str, ...] = ()
    keyed = False
    constant = ""
    low, high = 0.0, math.inf
    links: tuple[str, ...] = ("log", "identity", "sqrt", "inverse")
    expected = True  # whether the expected curvature has a closed form
    vanishing = 0  # the sign of the infinity that tau may go to: that of plain counts; 0: none

    def loglik(self, m: Means, c: Cells, tau: float) -> Array:
        """log f (n,) of one row, up to `constant`."""
        raise NotImplementedError

    def by_mean(self, m: Means, c: Cells, tau: float) -> tuple[Array, Array, Array]:
        """The first three derivatives (n,) of log f by mu."""
        raise NotImplementedError

    def by_eta(self, m: Means, c: Cells, tau: float) -> tuple[Array, Array, Array]:
        """The first three derivatives (n,) of log f by the linear predictor, by the chain rule."""
        l1, l2, l3 = self.by_mean(m, c, tau)
        return l1 * m.d1, l2 * m.d1**2 + l1 * m.d2, l3 * m.d1**3 + 3.0 * l2 * m.d1 * m.d2 + l1 * m.d3

    def information(self, m: Means, c: Cells, tau: float) -> tuple[Array, Array, Array]:
        """Minus the expected second derivative by mu, and its derivatives by mu and by tau."""
        raise NotImplementedError

    def expected_by_eta(self, m: Means, c: Cells, tau: float) -> tuple[Array, Array, Array]:
        """Minus the expected second derivative by eta, and its derivatives by eta and by tau."""
        i, i_mu, i_tau = self.information(m, c, tau)
        return i * m.d1**2, i_mu * m.d1**3 + 2.0 * i * m.d1 * m.d2, i_tau * m.d1**2

    def by_shape(self, m: Means, c: Cells, tau: float) -> ByShape:
        """See ByShape; only where `shape`."""
        raise NotImplementedError


class Binomial(Family):
    """A proportion y of `size` trials."""

    name, constant, high = "binomial", "binomial", 1.0
    links = ("logit", "probit", "cloglog", "cauchit", "log", "identity")

    def loglik(self, m: Means, c: Cells, tau: float) -> Array:
        y, z = c.y, 1.0 - c.y
        log_mu = m.of_mu.log if m.of_mu is not None else np.log(np.where(y > 0.0, m.mu, 1.0))
        log_nu = m.of_nu.log if m.of_nu is not None else np.log(np.where(z > 0.0, m.nu, 1.0))
        return np.where(y > 0.0, y * log_mu, 0.0) + np.where(z > 0.0, z * log_nu, 0.0)

    def by_mean(self, m: Means, c: Cells, tau: float) -> tuple[Array, Array, Array]:
        r, s = c.y / m.mu, (1.0 - c.y) / m.nu
        r2, s2 = r / m.mu, s / m.nu
        return r - s, -(r2 + s2), 2.0 * (r2 / m.mu - s2 / m.nu)

    def by_eta(self, m: Means, c: Cells, tau: float) -> tuple[Array, Array, Array]:
        """The chain rule with the link's derivatives over mu and 1 - mu, which stay finite where these underflow."""
        y, z = c.y, 1.0 - c.y
        r, s = _ratios(m)
        first = y * r[0] - z * s[0]
        second = y * (r[1] - r[0] ** 2) - z * (s[1] + s[0] ** 2)
        third = y * (r[2] - 3.0 * r[0] * r[1] + 2.0 * r[0] ** 3) - z * (s[2] + 3.0 * s[0] * s[1] + 2.0 * s[0] ** 3)
        return first, second, third

    def information(self, m: Means, c: Cells, tau: float) -> tuple[Array, Array, Array]:
        i = 1.0 / (m.mu * m.nu)
        return i, -(m.nu - m.mu) * i * i, np.zeros_like(i)

    def expected_by_eta(self, m: Means, c: Cells, tau: float) -> tuple[Array, Array, Array]:
        """W = d1²/(mu (1 - mu)) by the same ratios."""
        r, s = _ratios(m)
        return r[0] * s[0], s[0] * (2.0 * r[1] - r[0] ** 2 + r[0] * s[0]), np.zeros_like(r[0])


def _ratios(m: Means) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """The link's three derivatives over mu, and over 1 - mu."""
    r = m.of_mu[1:] if m.of_mu is not None else tuple(d / m.mu for d in (m.d1, m.d2, m.d3))
    s = m.of_nu[1:] if m.of_nu is not None else tuple(d / m.nu for d in (m.d1, m.d2, m.d3))
    return r, s


class Poisson(Family):
    """Counts."""

    name, constant = "poisson", "factorial"
    links = ("log", "identity", "sqrt")

    def loglik(self, m: Means, c: Cells, tau: float) -> Array:
        return np.where(c.y > 0.0, c.y, 0.0) * np.log(m.mu) - m.mu

    def by_mean(self, m: Means, c: Cells, tau: float) -> tuple[Array, Array, Array]:
        r = c.y / m.mu
        return r - 1.0, -r / m.mu, 2.0 * r / m.mu**2

    def information(self, m: Means, c: Cells, tau: float) -> tuple[Array, Array, Array]:
        i = 1.0 / m.mu
        return i, -i * i, np.zeros_like(i)


class NegativeBinomial(Family):
    """Counts with variance mu + mu²/k, k = exp(tau) (nb2)."""

    name, constant, shape, keyed, vanishing = "negbinomial", "factorial", True, True, 1
    links = ("log", "identity", "sqrt")

    def loglik(self, m: Means, c: Cells, tau: float) -> Array:
        k = math.exp(tau)
        return np.asarray(_rising(c.y, k) + np.where(c.y > 0.0, c.y, 0.0) * np.log(m.mu) - (c.y + k) * np.log1p(m.mu / k))

    def by_mean(self, m: Means, c: Cells, tau: float) -> tuple[Array, Array, Array]:
        k, mu, y = math.exp(tau), m.mu, c.y  # without differences of what large counts make alike
        u, v = mu / (mu + k), k / (mu + k)
        first, second, third = y - mu, mu * u - y * (1.0 + u), y * (1.0 + u + u * u) - mu * u * u
        return v * first / mu, v * second / mu**2, 2.0 * v * third / mu**3

    def information(self, m: Means, c: Cells, tau: float) -> tuple[Array, Array, Array]:
        k = math.exp(tau)
        v = m.mu * (m.mu + k)
        return k / v, -k * (2.0 * m.mu + k) / v**2, k / (m.mu + k) ** 2

    def by_shape(self, m: Means, c: Cells, tau: float) -> ByShape:
        k, y, sum_ = math.exp(tau), c.y, m.mu + math.exp(tau)
        d = (y - m.mu) / sum_
        rest = _remainders(y, k, 2)
        bracket = rest[0] + np.where(d < -0.5, np.log((y + k) / sum_), np.log1p(d)) - d
        slope = rest[1] + d * d / (y + k)
        return ByShape(k * bracket, k * d / sum_, -2.0 * k * d / sum_**2 - k / sum_**2, k * bracket + k * k * slope)


def _rising(y: Array, k: Array | float) -> Array:
    """log Γ(y + k) - log Γ(k) - y log k, by the difference of Stirling's series where the functions themselves would cancel."""
    from scipy.special import gammaln

    tail = (1.0 / (y + k) - 1.0 / k) / 12.0 - ((1.0 / (y + k)) ** 3 - (1.0 / k) ** 3) / 360.0
    stirling = (y + k - 0.5) * np.log1p(y / k) - y + tail
    return np.asarray(np.where(np.less(k, LARGE), gammaln(y + k) - gammaln(k) - y * np.log(k), stirling))


def _polygammas(y: Array, r: Array) -> tuple[Array, Array, Array]:
    """ψ(y + r) - ψ(r) and of its two derivatives."""
    d0, d1, d2 = _remainders(y, r, 3)
    return d0 + np.log1p(y / r), d1 - y / ((y + r) * r), d2


def _remainders(y: Array, r: Array | float, count: int) -> list[Array]:
    """The first `count` of the same without the leading terms log(1 + y / r) and -y / (r (y + r)) of two of them, by the differences of
    their asymptotic series where r is large."""
    from scipy.special import digamma, polygamma

    a, b, large = 1.0 / (y + r), 1.0 / r, np.greater_equal(r, LARGE)
    by = [-y * a * b]  # a^n - b^n = (a - b) (a^(n-1) + … + b^(n-1))
    by += [by[0] * sum(a**i * b ** (n - i) for i in range(n + 1)) for n in range(1, 5)]
    series = (-by[0] / 2.0 - by[1] / 12.0 + by[3] / 120.0, by[1] / 2.0 + by[2] / 6.0 - by[4] / 30.0, -by[1] - by[2] - by[3] / 2.0)
    if large.all():
        return list(series[:count])
    leading = (np.log1p(y * b), by[0], 0.0)
    exact = [(polygamma(n, y + r) - polygamma(n, r) if n else digamma(y + r) - digamma(r)) - leading[n] for n in range(count)]
    return [np.where(large, s, e) for s, e in zip(series, exact, strict=False)]


class NegativeBinomial1(Family):
    """Counts with variance mu (1 + alpha), alpha = exp(tau) (nb1). Its expected curvature has no closed form."""

    name, constant, shape, keyed, expected, vanishing = "negbinomial1", "factorial", True, True, False, -1
    links = ("log", "identity", "sqrt")

    def loglik(self, m: Means, c: Cells, tau: float) -> Array:
        alpha = math.exp(tau)
        r, rest = m.mu / alpha, math.log1p(alpha)
        return np.asarray(_rising(c.y, r) + c.y * (np.log(m.mu) - rest) - r * rest)

    def by_mean(self, m: Means, c: Cells, tau: float) -> tuple[Array, Array, Array]:
        alpha = math.exp(tau)
        d0, d1, d2 = _polygammas(c.y, m.mu / alpha)
        return (d0 - math.log1p(alpha)) / alpha, d1 / alpha**2, d2 / alpha**3

    def by_shape(self, m: Means, c: Cells, tau: float) -> ByShape:
        alpha = math.exp(tau)
        r, share = m.mu / alpha, alpha / (1.0 + alpha)
        d0, d1, d2 = _polygammas(c.y, r)
        bracket = d0 - math.log1p(alpha)
        first = -r * bracket + c.y - (c.y + r) * share
        second = r * bracket + r * r * d1 + 2.0 * r * share - (c.y + r) * share / (1.0 + alpha)
        return ByShape(first, -(bracket + r * d1 + share) / alpha, -(2.0 * d1 + r * d2) / alpha**2, second)


class _Dispersion(Family):
    """Families with variance V(mu) / a, a = weight * exp(tau): all derivatives by mu are proportional to a."""

    shape = True

    def precision(self, c: Cells, tau: float) -> Array | float:
        """a, per row where there are weights."""
        return math.exp(tau) if c.weight is None else c.weight * math.exp(tau)


def _normalizer(a: Array) -> Array:
    """a log a - a - log Γ(a), by Stirling's series where these would cancel."""
    from scipy.special import gammaln

    series = 0.5 * np.log(a / (2.0 * math.pi)) - 1.0 / (12.0 * a) + 1.0 / (360.0 * a**3)
    return np.asarray(np.where(a >= LARGE, series, a * np.log(a) - a - gammaln(a)))


class Gamma(_Dispersion):
    """Positive responses with variance mu²/a."""

    name, statistics = "gamma", ("log",)
    links = ("log", "inverse", "identity", "sqrt")

    def loglik(self, m: Means, c: Cells, tau: float) -> Array:
        a = np.asarray(self.precision(c, tau))
        return np.asarray(_normalizer(a) + a * self._distance(m, c) - c.statistics[0])

    def _distance(self, m: Means, c: Cells) -> Array:
        """The mean of 1 + log(y / mu) - y / mu."""
        d = (c.y - m.mu) / m.mu
        ratio = np.where(d < -0.5, np.log(c.y / m.mu), np.log1p(d))
        return np.asarray(ratio - d + (c.statistics[0] - np.log(c.y)))

    def by_mean(self, m: Means, c: Cells, tau: float) -> tuple[Array, Array, Array]:
        a, mu, y = self.precision(c, tau), m.mu, c.y
        return a * (y - mu) / mu**2, a * (mu - 2.0 * y) / mu**3, a * (6.0 * y - 2.0 * mu) / mu**4

    def information(self, m: Means, c: Cells, tau: float) -> tuple[Array, Array, Array]:
        i = self.precision(c, tau) / m.mu**2
        return i, -2.0 * i / m.mu, i

    def by_shape(self, m: Means, c: Cells, tau: float) -> ByShape:
        from scipy.special import digamma, polygamma

        a = np.asarray(self.precision(c, tau))
        l1, l2, _ = self.by_mean(m, c, tau)
        large, b = a >= LARGE, 1.0 / a  # log a - ψ(a), and a - a² ψ'(a), by their asymptotic series there
        gap = np.where(large, b / 2.0 + b**2 / 12.0 - b**4 / 120.0, np.log(a) - digamma(a))
        bend = np.where(large, -0.5 - b / 6.0 + b**3 / 30.0, a - a * a * polygamma(1, a))
        first = a * (gap + self._distance(m, c))
        return ByShape(first, l1, l2, first + bend)


class InverseGaussian(_Dispersion):
    """Positive responses with variance mu³/a."""

    name, statistics = "inverse_gaussian", ("log", "inverse")
    links = ("log", "1/mu^2", "inverse", "identity", "sqrt")

    def _distance(self, m: Means, c: Cells) -> Array:
        """The mean of (y - mu)² / (mu² y)."""
        return np.asarray(((c.y - m.mu) / m.mu) ** 2 / c.y + (c.statistics[1] - 1.0 / c.y))

    def loglik(self, m: Means, c: Cells, tau: float) -> Array:
        a = self.precision(c, tau)
        return 0.5 * np.log(a / (2.0 * math.pi)) - 1.5 * c.statistics[0] - 0.5 * a * self._distance(m, c)

    def by_mean(self, m: Means, c: Cells, tau: float) -> tuple[Array, Array, Array]:
        a, mu, y = self.precision(c, tau), m.mu, c.y
        return a * (y - mu) / mu**3, a * (2.0 * mu - 3.0 * y) / mu**4, a * (12.0 * y - 6.0 * mu) / mu**5

    def information(self, m: Means, c: Cells, tau: float) -> tuple[Array, Array, Array]:
        i = self.precision(c, tau) / m.mu**3
        return i, -3.0 * i / m.mu, i

    def by_shape(self, m: Means, c: Cells, tau: float) -> ByShape:
        l1, l2, _ = self.by_mean(m, c, tau)
        half = 0.5 * self.precision(c, tau) * self._distance(m, c)
        return ByShape(0.5 - half, l1, l2, -half)


class Gaussian(_Dispersion):
    """Real responses with variance 1/a; the statistic is the variance of the response inside a cell."""

    name, statistics, low = "gaussian", ("square",), -math.inf
    links = ("identity", "log", "inverse", "sqrt")

    def _distance(self, m: Means, c: Cells) -> Array:
        return np.asarray((c.y - m.mu) ** 2 + c.statistics[0])

    def loglik(self, m: Means, c: Cells, tau: float) -> Array:
        a = self.precision(c, tau)
        return 0.5 * np.log(a / (2.0 * math.pi)) - 0.5 * a * self._distance(m, c)

    def by_mean(self, m: Means, c: Cells, tau: float) -> tuple[Array, Array, Array]:
        a, zero = self.precision(c, tau), np.zeros_like(m.mu)
        return a * (c.y - m.mu), zero - a, zero

    def information(self, m: Means, c: Cells, tau: float) -> tuple[Array, Array, Array]:
        zero = np.zeros_like(m.mu)
        i = zero + self.precision(c, tau)
        return i, zero, i

    def by_shape(self, m: Means, c: Cells, tau: float) -> ByShape:
        l1, l2, _ = self.by_mean(m, c, tau)
        half = 0.5 * self.precision(c, tau) * self._distance(m, c)
        return ByShape(0.5 - half, l1, l2, -half)


class Beta(Family):
    """Shares in (0, 1) with mean mu and precision k = exp(tau) (Ferrari and Cribari-Neto 2004)."""

    name, shape, statistics, high = "beta", True, ("log", "log1m"), 1.0
    links = ("logit", "probit", "cloglog", "cauchit", "log", "identity")

    def loglik(self, m: Means, c: Cells, tau: float) -> Array:
        from scipy.special import gammaln

        k = math.exp(tau)
        a, b = np.maximum(m.mu, FLOOR) * k, np.maximum(m.nu, FLOOR) * k
        return np.asarray(math.lgamma(k) - gammaln(a) - gammaln(b) + (a - 1.0) * c.statistics[0] + (b - 1.0) * c.statistics[1])

    def _gammas(self, m: Means, n: int, k: float) -> tuple[Array, Array]:
        from scipy.special import digamma, polygamma

        a, b = np.maximum(m.mu, FLOOR) * k, np.maximum(m.nu, FLOOR) * k
        return (polygamma(n, a), polygamma(n, b)) if n else (digamma(a), digamma(b))

    def by_mean(self, m: Means, c: Cells, tau: float) -> tuple[Array, Array, Array]:
        k = math.exp(tau)
        (a0, b0), (a1, b1), (a2, b2) = (self._gammas(m, n, k) for n in range(3))
        return k * (c.statistics[0] - c.statistics[1] - a0 + b0), -(k**2) * (a1 + b1), -(k**3) * (a2 - b2)

    def information(self, m: Means, c: Cells, tau: float) -> tuple[Array, Array, Array]:
        k = math.exp(tau)
        (a1, b1), (a2, b2) = (self._gammas(m, n, k) for n in (1, 2))
        return k**2 * (a1 + b1), k**3 * (a2 - b2), 2.0 * k**2 * (a1 + b1) + k**3 * (m.mu * a2 + m.nu * b2)

    def by_shape(self, m: Means, c: Cells, tau: float) -> ByShape:
        from scipy.special import digamma, polygamma

        k = math.exp(tau)
        (a0, b0), (a1, b1), (a2, b2) = (self._gammas(m, n, k) for n in range(3))
        log_y, log_1 = c.statistics
        first = k * (digamma(k) - m.mu * a0 - m.nu * b0 + m.mu * log_y + m.nu * log_1)
        score = k * (log_y - log_1 - a0 + b0) + k**2 * (m.nu * b1 - m.mu * a1)
        curvature = -2.0 * k**2 * (a1 + b1) - k**3 * (m.mu * a2 + m.nu * b2)
        return ByShape(first, score, curvature, first + k**2 * (polygamma(1, k) - m.mu**2 * a1 - m.nu**2 * b1))


FAMILIES = {
    family.name: family
    for family in (
        Binomial(), Poisson(), NegativeBinomial(), NegativeBinomial1(), Gamma(), InverseGaussian(), Gaussian(), Beta(),
    )
}  # fmt: skip
