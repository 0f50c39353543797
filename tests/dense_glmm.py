"""The naive truth for generalized linear mixed models: scipy.stats densities, wide grids, Nelder-Mead; slow and obvious."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import scipy.optimize as so
import scipy.special as sp
import scipy.stats as st

from mlpipe.solve.family import FAMILIES, Cells
from mlpipe.solve.kernel import Chunk, Point, Rows
from mlpipe.solve.link import LINKS, Array

PAIRS = [(name, link) for name, family in FAMILIES.items() for link in family.links]
SHARES = ("binomial", "beta")
COUNTS = ("poisson", "negbinomial", "negbinomial1")
TAU = {"negbinomial": 1.5, "negbinomial1": 0.5, "gamma": 1.5, "inverse_gaussian": 2.0, "gaussian": 0.5, "beta": 2.0}

MEANS: dict[str, Callable[[Array], Array]] = {
    "logit": sp.expit,
    "probit": st.norm.cdf,
    "cloglog": lambda eta: -np.expm1(-np.exp(eta)),
    "cauchit": st.cauchy.cdf,
    "log": np.exp,
    "identity": lambda eta: eta,
    "inverse": lambda eta: 1.0 / eta,
    "sqrt": lambda eta: eta**2,
    "1/mu^2": lambda eta: np.where(eta > 0.0, np.abs(eta), np.nan) ** -0.5,
}


def log_density(family: str, mu: Array, y: Array, size: Array, weight: Array, tau: float) -> Array:
    """log f of each row, times its size; a binomial y is the proportion of `size` trials. Minus infinity outside the domain."""
    shape = np.exp(tau)
    a = weight * shape
    with np.errstate(all="ignore"):
        match family:
            case "binomial":
                out = st.binom.logpmf(np.rint(y * size), size, mu) / size
            case "poisson":
                out = st.poisson.logpmf(y, mu)
            case "negbinomial":
                out = st.nbinom.logpmf(y, shape, shape / (shape + mu))
            case "negbinomial1":
                out = st.nbinom.logpmf(y, mu / shape, 1.0 / (1.0 + shape))
            case "gamma":
                out = st.gamma.logpdf(y, a, scale=mu / a)
            case "inverse_gaussian":
                out = st.invgauss.logpdf(y, mu / a, scale=a)
            case "gaussian":
                out = st.norm.logpdf(y, mu, 1.0 / np.sqrt(a))
            case _:
                out = st.beta.logpdf(y, mu * shape, (1.0 - mu) * shape)
    inside = (mu > FAMILIES[family].low) & (mu < FAMILIES[family].high)
    return np.asarray(size * np.where(inside, out, -np.inf))


def constant(family: str, y: Array, size: Array) -> Array:
    """What of it does not depend on the parameters and is left out by the library."""
    match FAMILIES[family].constant:
        case "binomial":
            return np.asarray(np.log(sp.comb(size, np.rint(y * size))))
        case "factorial":
            return np.asarray(-size * sp.gammaln(y + 1.0))
    return np.zeros_like(y)


def variance(family: str, mu: Array, weight: Array, tau: float) -> Array:
    """Var(y) of one row or trial."""
    shape = np.exp(tau)
    return np.asarray({
        "binomial": mu * (1.0 - mu),
        "poisson": mu,
        "negbinomial": mu + mu**2 / shape,
        "negbinomial1": mu * (1.0 + shape),
        "gamma": mu**2 / (weight * shape),
        "inverse_gaussian": mu**3 / (weight * shape),
        "gaussian": 1.0 / (weight * shape) + 0.0 * mu,
        "beta": mu * (1.0 - mu) / (1.0 + shape),
    }[family])  # fmt: skip


def information(family: str, mu: Array, weight: Array, tau: float) -> Array:
    """The expected curvature of log f by mu: 1/Var(y) for all but the beta family (nb1 has no closed form)."""
    if family == "beta":
        k = np.exp(tau)
        return np.asarray(k**2 * (sp.polygamma(1, mu * k) + sp.polygamma(1, (1.0 - mu) * k)))
    return 1.0 / variance(family, mu, weight, tau)


def draw(rng: np.random.Generator, family: str, mu: Array, size: Array, weight: Array, tau: float) -> Array:
    """Responses with mean mu."""
    shape = np.exp(tau)
    a = weight * shape
    match family:
        case "binomial":
            return rng.binomial(size.astype(int), mu) / size
        case "poisson":
            return rng.poisson(mu).astype(float)
        case "negbinomial":
            return rng.negative_binomial(shape, shape / (shape + mu)).astype(float)
        case "negbinomial1":
            return rng.negative_binomial(mu / shape, 1.0 / (1.0 + shape)).astype(float)
        case "gamma":
            return rng.gamma(a, mu / a)
        case "inverse_gaussian":
            return rng.wald(mu, a)
        case "gaussian":
            return mu + rng.normal(size=len(mu)) / np.sqrt(a)
    return rng.beta(mu * shape, (1.0 - mu) * shape)


def statistics(family: str, y: Array) -> tuple[Array, ...]:
    """The further functions of the response, of single rows."""
    kinds = {"log": np.log, "log1m": lambda v: np.log1p(-v), "inverse": lambda v: 1.0 / v, "square": np.zeros_like}
    return tuple(kinds[name](y) for name in FAMILIES[family].statistics)


def packed(family: str, y: Array, size: Array, weight: Array, cell: np.ndarray) -> Cells:
    """Rows (in order of their cells, of equal weight inside) as cells: means of the response and of its statistics."""
    starts = np.flatnonzero(np.diff(cell, prepend=-1))
    total = np.add.reduceat(size, starts)

    def mean(v: Array) -> Array:
        return np.asarray(np.add.reduceat(size * v, starts) / total)

    centre = mean(y)
    more = (mean((y - centre[cell]) ** 2),) if family == "gaussian" else tuple(mean(v) for v in statistics(family, y))
    return Cells(centre, total, weight[starts], more)


def centre(family: str, link: str) -> tuple[float, float]:
    """A linear predictor in the middle of the domain, and how far it may well vary: a little where the domain ends."""
    mean = 0.45 if family in SHARES else 20.0 if family in COUNTS else 1.5
    eta = LINKS[link].function(mean)
    whole_line = link in ("logit", "probit", "cloglog", "cauchit") or (link == "log" and family not in SHARES)
    return eta, 0.6 if whole_line or (family, link) == ("gaussian", "identity") else 0.08 * abs(eta)


def difference(f: Callable[[float], Array], h: float) -> Array:
    """f'(0) by central differences of fourth order."""
    return (8.0 * (f(h) - f(-h)) - (f(2.0 * h) - f(-2.0 * h))) / (12.0 * h)


def gradient(f: Callable[[Array], Array | float], x: Array, h: Array) -> Array:
    """Derivatives of f by each element of x, along the last axis."""
    return np.stack([difference(lambda t, e=e: f(x + t * e), step) for e, step in zip(np.eye(len(x)), h, strict=True)], axis=-1)


@dataclass
class DenseGLMM:
    """Rows of a GLMM: X (n, m), Z (n, q), response, block of each row; and parameters."""

    family: str
    link: str
    X: Array
    Z: Array
    y: Array
    block: np.ndarray
    offset: Array
    size: Array
    weight: Array
    gamma: Array
    lambda_: Array
    tau: float
    expected: bool = False

    @property
    def blocks(self) -> list[DenseGLMM]:
        """One model a block."""
        return [self.rows(self.block == k) for k in np.unique(self.block)]

    def rows(self, at: np.ndarray) -> DenseGLMM:
        """The rows chosen by a mask or by their positions."""
        names = ("X", "Z", "y", "block", "offset", "size", "weight")
        return replace(self, **{name: getattr(self, name)[at] for name in names})

    # -- one block

    def eta(self, u: Array) -> Array:
        """The linear predictor (n, K) at points u (q, K)."""
        return (self.X @ self.gamma + self.offset)[:, None] + self.Z @ self.lambda_ @ u

    def log_f(self, eta: Array) -> Array:
        """Σ log f up to the constant, of linear predictors (n, K): terms (n, K)."""
        y, size, weight = (np.broadcast_to(v[:, None], eta.shape) for v in (self.y, self.size, self.weight))
        with np.errstate(all="ignore"):
            mu = MEANS[self.link](eta)
        return log_density(self.family, mu, y, size, weight, self.tau) - constant(self.family, y, size)

    def joint(self, u: Array) -> Array:
        """g(u) = log f(y | u) - u'u/2 at points u (q, K)."""
        return np.asarray(self.log_f(self.eta(u)).sum(axis=0) - 0.5 * (u**2).sum(axis=0))

    def mode(self) -> Array:
        """The maximum of g: Nelder-Mead, polished by Newton's method with numerical derivatives."""
        q = self.Z.shape[1]
        u = so.minimize(lambda v: -self.joint(v[:, None])[0], np.zeros(q), method="Nelder-Mead", options={"xatol": 1e-3, "fatol": 1e-3}).x
        ZL = self.Z @ self.lambda_
        for _ in range(6):
            score, observed = self._derivatives(u)
            u = u + np.linalg.solve(np.eye(q) + ZL.T @ (observed[:, None] * ZL), ZL.T @ score - u)
        return np.asarray(u)

    def _derivatives(self, u: Array) -> tuple[Array, Array]:
        """First derivative of log f by eta and minus the second, (n,), by differences of sixth order."""
        h = 0.01 * centre(self.family, self.link)[1]
        eta = self.eta(u[:, None])
        f = self.log_f(eta + h * np.arange(-3, 4))
        return f @ np.array([-1, 9, -45, 0, 45, -9, 1]) / (60 * h), -f @ np.array([2, -27, 270, -490, 270, -27, 2]) / (180 * h * h)

    def hessian(self, u: Array) -> Array:
        """H = I + Λ'Z'WZΛ at u."""
        w = self._derivatives(u)[1]
        if self.expected:
            eta = self.eta(u[:, None])[:, 0]
            slope = difference(lambda t: MEANS[self.link](eta + t), 0.01 * centre(self.family, self.link)[1])
            w = self.size * information(self.family, MEANS[self.link](eta), self.weight, self.tau) * slope**2
        ZL = self.Z @ self.lambda_
        return np.asarray(np.eye(ZL.shape[1]) + ZL.T @ (w[:, None] * ZL))

    def laplace(self) -> float:
        """g(û) - ½ log|H|."""
        u = self.mode()
        return float(self.joint(u[:, None])[0] - 0.5 * np.linalg.slogdet(self.hessian(u))[1])

    def integral(self, nodes: int, reach: float = 8.0) -> float:
        """log ∫ f(y | u) φ(u) du by the trapezoidal rule on a product grid around the mode."""
        mode = self.mode()
        q = len(mode)
        line = np.linspace(-reach, reach, nodes)
        u = mode[:, None] + np.stack([v.ravel() for v in np.meshgrid(*[line] * q)])
        return float(sp.logsumexp(self.joint(u)) + q * np.log(line[1] - line[0]) - 0.5 * q * np.log(2 * np.pi))

    # -- as the library takes it

    @property
    def point(self) -> Point:
        """The parameters over the features [X, Z]; those of Z are zero."""
        return Point(np.r_[self.gamma, np.zeros(self.Z.shape[1])], self.lambda_, self.tau)

    def library_rows(self) -> Rows:
        """Features [X, Z] and the data of single rows."""
        plain = self.family != "binomial" and (self.size == 1.0).all()
        cells = Cells(self.y, None if plain else self.size, self.weight, statistics(self.family, self.y))
        starts = np.flatnonzero(np.diff(self.block, prepend=-1))
        return Rows(np.vstack([self.X.T, self.Z.T]), self.offset, cells, starts)

    def chunk(self, first: int = 0) -> Chunk:
        """All blocks as one chunk."""
        rows = self.library_rows()
        return Chunk((rows,), first, len(rows.starts))


def simulate(
    family: str, link: str, q: int, *, seed: int = 0, blocks: int = 3, rows: tuple[int, int] = (4, 8), expected: bool = False
) -> DenseGLMM:
    """A random model; blocks are numbered from 0. Of X and Z the first column is constant."""
    rng = np.random.default_rng(seed)
    block = np.repeat(np.arange(blocks), rng.integers(rows[0], rows[1], blocks))
    n = len(block)
    eta, spread = centre(family, link)
    X, Z = (np.column_stack([np.ones(n), rng.uniform(-1.0, 1.0, (n, k))]) for k in (1, q - 1))
    size = rng.integers(1, 8, n).astype(float) if family == "binomial" else np.ones(n)
    weight = rng.uniform(0.5, 2.0, n) if family in ("gamma", "inverse_gaussian", "gaussian") else np.ones(n)
    lambda_ = spread * (np.eye(q) * np.linspace(1.0, 0.6, q) + np.tril(np.full((q, q), 0.3), -1))
    model = DenseGLMM(
        family, link, X, Z, np.zeros(n), block, spread * rng.uniform(-0.5, 0.5, n), size, weight,
        np.array([eta, 0.5 * spread]), lambda_, TAU.get(family, 0.0), expected,
    )  # fmt: skip
    u = rng.normal(size=(blocks, q))
    mu = MEANS[link](X @ model.gamma + model.offset + (Z * (u @ lambda_.T)[block]).sum(axis=1))
    model.y = draw(rng, family, mu, size, weight, model.tau)
    return model
