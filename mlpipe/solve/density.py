"""A family with a link: log-densities of rows and their derivatives by the linear predictor (FORMULAS R8)."""
from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .family import FAMILIES, ByShape, Cells, Family
from .link import LARGEST, LINKS, Array, Link, Means

CONCAVE = {
    ("binomial", "logit"), ("binomial", "probit"), ("binomial", "cloglog"), ("binomial", "log"), ("binomial", "identity"),
    ("poisson", "log"), ("poisson", "identity"), ("poisson", "sqrt"), ("negbinomial", "log"), ("gamma", "log"),
    ("gamma", "inverse"), ("gaussian", "identity"),
}  # fmt: skip


class Terms(NamedTuple):
    """Each row's log f (`value`, up to the family's constant) and its derivatives by eta, times its size, (n,): `score` the first;
    `observed` minus the second; `curvature` that or its expectation, with `slope`, its derivative by eta; by the shape tau: `shape`,
    `score_shape`, `curvature_shape` (None without)."""

    value: Array
    score: Array
    observed: Array
    curvature: Array
    slope: Array
    shape: Array | None = None
    score_shape: Array | None = None
    curvature_shape: Array | None = None


class Curvatures(NamedTuple):
    """Each row's derivatives of log f by eta, times its size, (n,): `score` the first, `w` minus the second, with its first derivative
    `slope` and its second, `bend`."""

    score: Array
    w: Array
    slope: Array
    bend: Array


class Density:
    """One family and link; `expected`: whether the expected curvature stands in the Laplace determinant.

    `concave`: whether log f is concave in eta for every response; `fourth`: whether `curvatures` are known.
    """

    fourth = False

    def __init__(self, family: Family, link: Link, *, expected: bool = False) -> None:
        self.family, self.link, self.expected = family, link, expected
        self.concave = (family.name, link.name) in CONCAVE
        self.disperses = family.shape and not family.vanishing  # whether an exact fit has a likelihood without bound
        # whether the link can give a mean that the family has not, or none
        self.leaves = link.partial or link.low < family.low or link.high > family.high

    def _means(self, eta: Array) -> tuple[Means, np.ndarray | None]:
        """The means, and where they lie outside the family's domain (None: nowhere); there they are replaced by one inside."""
        if not self.leaves:
            return self.link.means(eta), None
        with np.errstate(invalid="ignore", over="ignore"):
            means = self.link.means(eta)
            outside = ~((means.mu > self.family.low) & (means.mu < self.family.high))
        if not outside.any():
            return means, None
        eta = np.where(outside, self.link.function(0.5), eta)
        return self.link.means(eta), outside

    def loglik(self, eta: Array, c: Cells, tau: float) -> Array:
        """log f (n,) times size, up to the family's constant; minus infinity where the mean leaves the domain."""
        means, outside = self._means(eta)
        out = self.family.loglik(means, c, tau)
        out = out if c.size is None else c.size * out
        return out if outside is None else np.where(outside, -np.inf, out)

    def newton(self, eta: Array, c: Cells, tau: float) -> tuple[Array, Array]:
        """The score and the observed curvature (n,)."""
        means, outside = self._means(eta)
        score, second, _ = self.family.by_eta(means, c, tau)
        return _sized(score, c, outside), _sized(-second, c, outside)

    def safe_curvature(self, eta: Array, c: Cells, tau: float) -> Array:
        """A curvature (n,) that is never negative, for steps where the observed one is."""
        means, outside = self._means(eta)
        if self.family.expected:
            return _sized(self.family.expected_by_eta(means, c, tau)[0], c, outside)
        return _sized(self.family.by_eta(means, c, tau)[0] ** 2, c, outside)

    def sizes(self, eta: Array, c: Cells, tau: float) -> Array:
        """Squares (n,) of the linear predictor and of the mean, on its scale, in units of the row's dispersion."""
        m = self._means(eta)[0]
        return np.asarray(self.safe_curvature(eta, c, tau) * (eta**2 + (m.mu / m.d1) ** 2))

    def terms(self, eta: Array, c: Cells, tau: float) -> Terms:
        """All that an evaluation of the likelihood and its gradient needs."""
        m, outside = self._means(eta)
        score, second, third = self.family.by_eta(m, c, tau)
        observed = -second
        shape = self.family.by_shape(m, c, tau) if self.family.shape else None
        curvature, slope, by_shape = self.family.expected_by_eta(m, c, tau) if self.expected else (observed, -third, None)
        out = [score, observed, curvature, slope]
        if shape is not None:
            if by_shape is None:
                by_shape = -(shape.curvature * m.d1**2 + shape.score * m.d2)
            out += [shape.first, shape.score * m.d1, by_shape]
        value = _sized(self.family.loglik(m, c, tau), c, None)
        value = value if outside is None else np.where(outside, -np.inf, value)
        score, observed, curvature, *rest = (_sized(v, c, outside) for v in out)
        return Terms(value, score, observed, curvature if self.expected else observed, *rest)

    def curvatures(self, eta: Array, c: Cells) -> Curvatures:
        """See Curvatures; only where `fourth`."""
        raise NotImplementedError

    def by_shape(self, eta: Array, c: Cells, tau: float) -> ByShape:
        """Derivatives by tau, (n,): of log f, of its score by eta (`score`; `curvature` of that), and the second by tau."""
        m, outside = self._means(eta)
        shape = self.family.by_shape(m, c, tau)
        parts = (shape.first, shape.score * m.d1, shape.curvature * m.d1**2 + shape.score * m.d2, shape.second)
        return ByShape(*(_sized(v, c, outside) for v in parts))


def _sized(value: Array, c: Cells, outside: np.ndarray | None) -> Array:
    value = value if c.size is None else c.size * value
    return value if outside is None else np.where(outside, 0.0, value)


class _BinomialLogit(Density):
    """The same without the detour by the mean's derivatives: W = mu (1 - mu)."""

    fourth = True

    def loglik(self, eta: Array, c: Cells, tau: float) -> Array:
        out = c.y * eta - np.maximum(eta, 0.0) - np.log(1.0 + np.exp(-np.abs(eta)))
        return out if c.size is None else c.size * out

    def newton(self, eta: Array, c: Cells, tau: float) -> tuple[Array, Array]:
        mu = _logistic(eta)
        score, w = c.y - mu, mu - mu * mu
        return (score, w) if c.size is None else (c.size * score, c.size * w)

    def terms(self, eta: Array, c: Cells, tau: float) -> Terms:
        mu = _logistic(eta)
        score, w = c.y - mu, mu - mu * mu
        value = c.y * eta - np.maximum(eta, 0.0) + np.log(np.maximum(mu, 1.0 - mu))
        if c.size is not None:
            value, score, w = c.size * value, c.size * score, c.size * w
        return Terms(value, score, w, w, w * (1.0 - 2.0 * mu))

    def curvatures(self, eta: Array, c: Cells) -> Curvatures:
        mu = _logistic(eta)
        v = mu - mu * mu
        score, w = (c.y - mu, v) if c.size is None else (c.size * (c.y - mu), c.size * v)
        return Curvatures(score, w, w * (1.0 - 2.0 * mu), w * (1.0 - 6.0 * v))


def _logistic(eta: Array) -> Array:
    """1 / (1 + exp(-eta)); the mean's complement loses digits only where its weight is below rounding."""
    out = np.negative(eta)
    with np.errstate(over="ignore"):
        np.exp(out, out=out)
    out += 1.0
    return np.reciprocal(out, out=out)


class _PoissonLog(Density):
    """The same for counts: W = mu."""

    fourth = True

    def loglik(self, eta: Array, c: Cells, tau: float) -> Array:
        out = c.y * eta - np.exp(np.clip(eta, -LARGEST, LARGEST))
        return out if c.size is None else c.size * out

    def newton(self, eta: Array, c: Cells, tau: float) -> tuple[Array, Array]:
        mu = np.exp(np.clip(eta, -LARGEST, LARGEST))
        return (c.y - mu, mu) if c.size is None else (c.size * (c.y - mu), c.size * mu)

    def terms(self, eta: Array, c: Cells, tau: float) -> Terms:
        score, w = self.newton(eta, c, tau)
        return Terms(c.y * eta * (1.0 if c.size is None else c.size) - w, score, w, w, w)

    def curvatures(self, eta: Array, c: Cells) -> Curvatures:
        score, w = self.newton(eta, c, 0.0)
        return Curvatures(score, w, w, w)


_FAST: dict[tuple[str, str], type[Density]] = {("binomial", "logit"): _BinomialLogit, ("poisson", "log"): _PoissonLog}


def density(family: str, link: str, *, expected: bool = False) -> Density:
    """The density of a family and link by name; for canonical links both curvatures are one."""
    kind = _FAST.get((family, link))
    made = FAMILIES[family]
    return kind(made, LINKS[link]) if kind else Density(made, LINKS[link], expected=expected)
