"""Generalized estimating equations over chunks of whole blocks (Liang and Zeger 1986; moments as in geepack, Hojsgaard et al. 2006).

With x̃ and ẽ the design and the residuals over the root of the variance function, a block's score is x̃'R⁻¹ẽ and its information x̃'R⁻¹x̃,
R the working correlation: formed by block sums for exchangeable blocks (FORMULAS R10), by neighbours for AR(1), by patterns of observed
times for an unstructured one. No matrix of a block's rows is formed but for the last.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from .density import Density
from .glm import definite, inverse
from .kernel import Chunk, Rows
from .sandwich import Array, corrected, half

ROUNDING = 4.0 * float(np.finfo(np.float64).eps)  # of a response, which its residual is known to
NEAR = 0.1  # scaled score of independent rows, from which the correlation is estimated
OUTSIDE = "a mean leaves the family's domain, or the working correlation is not positive definite"
EMPTY = "the information is singular: estimates go to infinity"
FITTED = "the response is fitted exactly, or to its last digits: nothing is left to estimate phi by"
LONGEST = 50_000  # lags at most
NEGLIGIBLE = 1e-14  # of a lag's weight in the estimate of an AR(1) coefficient, from which longer lags are left out
CORRELATIONS = ("independence", "exchangeable", "ar1", "unstructured")


@dataclass
class Moments:
    """Sums over rows: `squares` of ẽ, `n` rows; `products` of pairs of residuals and `pairs`, how many: one of each for exchangeable
    blocks, by lag for AR(1), (times, times) for an unstructured correlation."""

    squares: float
    n: float
    products: Array
    pairs: Array

    def __add__(self, other: Moments) -> Moments:
        size = max(len(self.products), len(other.products))
        products, pairs = (_padded(a, size) + _padded(b, size) for a, b in ((self.products, other.products), (self.pairs, other.pairs)))
        return Moments(self.squares + other.squares, self.n + other.n, products, pairs)


def _padded(values: Array, size: int) -> Array:
    return values if values.ndim > 1 or len(values) == size else np.append(values, np.zeros(size - len(values)))


@dataclass
class Look:
    """One pass: moments, `score` (p,), `information` (p, p), that of independence, the quasi-likelihood, the sum of squares `responses` of
    responses over the roots of their variances, in whose digits residuals are known; `meats` of the kinds asked for."""

    moments: Moments
    score: Array
    information: Array
    independence: Array
    quasi: float
    responses: float
    meats: dict[str, Array] = field(default_factory=dict)

    def __add__(self, other: Look) -> Look:
        return Look(
            self.moments + other.moments, self.score + other.score, self.information + other.information,
            self.independence + other.independence, self.quasi + other.quasi, self.responses + other.responses,
            {kind: meat + other.meats[kind] for kind, meat in self.meats.items()},
        )  # fmt: skip


@dataclass(frozen=True)
class Working:
    """The working model: `density` (its variance function and link), columns F Q (m, p), `corr`; `times`, the levels of an unstructured
    correlation; `counted`: whether cells' sizes are frequencies of rows."""

    density: Density
    Q: Array
    corr: str
    times: Array
    counted: bool = False

    @property
    def start(self) -> Array:
        """No correlation."""
        t = len(self.times)
        return np.zeros(t * (t - 1) // 2 if self.corr == "unstructured" else int(self.corr != "independence"))

    def look(self, chunk: Chunk, beta: Array, alpha: Array, bread: Array | None = None) -> Look:
        """One chunk at beta and the correlation parameters; with `bread` the meats of all kinds of sandwich."""
        with np.errstate(all="ignore"):  # what is not finite ends the search
            sums = {"exchangeable": _Exchangeable, "ar1": _Neighbours, "unstructured": _Patterns}.get(self.corr, _Independent)(self, alpha)
            independence, quasi, responses, need = np.zeros((len(beta),) * 2), 0.0, 0.0, bread is not None
            for rows in chunk.pieces:
                X, e, q, value, size = self.standardized(rows, beta, quasi=need)
                independence += (X * q) @ X.T
                quasi += value
                responses += size
                sums.add(rows, X, e, q, need)
            found = sums.finished()
        meats = {} if bread is None else _meats(found.scores, found.grams, bread)
        return Look(found.moments, found.scores.sum(axis=1), found.information, independence, quasi, responses, meats)

    def standardized(self, rows: Rows, beta: Array, *, quasi: bool) -> tuple[Array, Array, Array, float, float]:
        """x̃ (p, n), ẽ (n,), how many rows each stands for, the quasi-likelihood (McCullagh and Nelder 1989, table 9.1) over phi = 1, and
        `Look.responses`."""
        X = self.Q.T @ rows.F
        eta = beta @ X + (0.0 if rows.offset is None else rows.offset)
        means = self.density.link.means(eta)
        information = self.density.family.information(means, rows.cells, 0.0)[0]  # w / V(mu)
        size = np.ones(1) if rows.cells.size is None else rows.cells.size
        root = np.sqrt(information if self.counted else information * size)
        value = float((size * self._quasi(rows, means.mu, means.nu)).sum()) if quasi else 0.0
        y, q = rows.cells.y, size if self.counted else np.ones(1)
        return X * (means.d1 * root), (y - means.mu) * root, q, value, float((q * (y * root) ** 2).sum())

    def _quasi(self, rows: Rows, mu: Array, nu: Array) -> Array:
        y, w = rows.cells.y, 1.0 if rows.cells.weight is None else rows.cells.weight
        family = self.density.family.name
        if family == "binomial":
            return np.asarray(np.where(y > 0.0, y * np.log(mu), 0.0) + np.where(y < 1.0, (1.0 - y) * np.log(nu), 0.0))
        if family == "poisson":
            return np.asarray(np.where(y > 0.0, y * np.log(mu), 0.0) - mu)
        if family == "gamma":
            return np.asarray(-w * (y / mu + np.log(mu)))
        if family == "inverse_gaussian":
            return np.asarray(w * (1.0 / mu - y / (2.0 * mu**2)))
        return np.asarray(-w * (y - mu) ** 2 / 2.0)

    def correlation(self, moments: Moments, phi: float, alpha: Array) -> Array:
        """The parameters by moments, no degrees of freedom taken off."""
        if self.corr == "independence" or not moments.pairs.any():
            return alpha
        with np.errstate(invalid="ignore", divide="ignore"):
            r = np.where(moments.pairs > 0.0, moments.products / (phi * moments.pairs), 0.0)
        if self.corr == "ar1":
            return np.array([_ar1(moments.products / phi, moments.pairs)])
        return np.asarray(r[np.triu_indices(len(self.times), 1)] if self.corr == "unstructured" else r)


def _ar1(products: Array, pairs: Array) -> float:
    """The root of Σ_k k a^(k-1) (c_k - m_k a^k) over lags k (geepack's estimating equation over all pairs); 1 or -1, which no correlation
    of blocks is, where there is none between."""
    from scipy.optimize import brentq

    k = np.arange(1, len(pairs) + 1)

    def equation(a: float) -> float:
        return float((k * a ** (k - 1.0) * (products - pairs * a**k)).sum())

    first = float(products[0] / pairs[0]) if pairs[0] > 0.0 else 0.0
    at = min(max(first, -1.0), 1.0)
    step = 0.05
    while step < 4.0:  # the root nearest to the first lag's
        low, high = max(at - step, -1.0), min(at + step, 1.0)
        if equation(low) * equation(high) < 0.0:
            return float(brentq(equation, low, high, xtol=1e-15, rtol=1e-14))
        step *= 2.0
    return math.copysign(1.0, first)


@dataclass
class _Found:
    scores: Array
    grams: Array
    information: Array
    moments: Moments


class _Sums:
    """Sums over the blocks of a chunk, piece by piece where a block is long."""

    def __init__(self, working: Working, alpha: Array) -> None:
        self.working, self.alpha = working, alpha
        self.squares = self.n = 0.0
        self.scores: Array | None = None
        self.grams: Array | None = None
        self.information: Array | None = None

    def add(self, rows: Rows, X: Array, e: Array, q: Array, need: bool) -> None:
        """Takes in one piece."""
        raise NotImplementedError

    def total(self, rows: Rows, left: Array, X: Array, e: Array, need: bool) -> None:
        """Adds Σ left e per block and Σ left x'."""
        p = len(X)
        if self.scores is None or self.information is None:
            self.scores, self.information = np.zeros((p, len(rows.starts))), np.zeros((p, p))
            self.grams = np.zeros((p, p, len(rows.starts))) if need else None
        self.scores += rows.sums(left * e)
        self.information += left @ X.T
        if self.grams is not None:
            self.grams = self.grams + rows.sums(left[:, None] * X[None])

    def counted(self, e: Array, q: Array) -> None:
        """Σ ẽ² and rows."""
        self.squares += float((q * e**2).sum())
        self.n += float(len(e) if len(q) == 1 else q.sum())

    def moments(self) -> Moments:
        """Without pairs."""
        return Moments(self.squares, self.n, np.zeros(1), np.zeros(1))

    def finished(self) -> _Found:
        """All blocks."""
        assert self.scores is not None and self.information is not None
        empty = np.zeros((len(self.scores), len(self.scores), 0))
        return _Found(self.scores, empty if self.grams is None else self.grams, self.information, self.moments())


class _Independent(_Sums):
    def add(self, rows: Rows, X: Array, e: Array, q: Array, need: bool) -> None:
        self.counted(e, q)
        self.total(rows, X * q, X, e, need)


class _Exchangeable(_Sums):
    """Blocks by their sums: R⁻¹ = (I - f 11') / (1 - alpha), f = alpha / (1 + (n - 1) alpha)."""

    x_sums: Array | float = 0.0
    e_sums: Array | float = 0.0
    sizes: Array | float = 0.0

    def add(self, rows: Rows, X: Array, e: Array, q: Array, need: bool) -> None:
        self.counted(e, q)
        self.total(rows, X * q, X, e, need)
        self.x_sums = self.x_sums + rows.sums(X * q)
        self.e_sums = self.e_sums + rows.sums(e * q)
        self.sizes = self.sizes + (rows.lengths if len(q) == 1 else rows.sums(q))

    def moments(self) -> Moments:
        n, e = np.asarray(self.sizes), np.asarray(self.e_sums)
        products, pairs = (float((e**2).sum()) - self.squares) / 2.0, float((n * (n - 1.0)).sum()) / 2.0
        return Moments(self.squares, self.n, np.array([products]), np.array([pairs]))

    def finished(self) -> _Found:
        found, a = super().finished(), float(self.alpha[0])
        x, n = np.asarray(self.x_sums), np.asarray(self.sizes)
        positive = 1.0 + (n - 1.0) * a
        f = np.where(positive > 0.0, a / positive, np.nan)  # no correlation of blocks of this size: the search ends there
        found.scores = (found.scores - f * x * self.e_sums) / (1.0 - a)
        found.information = (found.information - (f * x) @ x.T) / (1.0 - a)
        if found.grams.shape[2]:
            found.grams = (found.grams - f * x[:, None] * x[None]) / (1.0 - a)
        return found


class _Neighbours(_Sums):
    """AR(1) by neighbours in time: R⁻¹ = L'L, L taking alpha times the row before off each and dividing by √(1 - alpha²)."""

    def __init__(self, working: Working, alpha: Array) -> None:
        super().__init__(working, alpha)
        self.before: tuple[Array, Array] | None = None  # rows of the piece before that lags reach back to
        self.lags: list[tuple[float, float]] = []
        self.reach = _reach(float(alpha[0]))

    def add(self, rows: Rows, X: Array, e: Array, q: Array, need: bool) -> None:
        self.counted(e, q)
        a, first = float(self.alpha[0]), np.zeros(len(e), dtype=bool)
        first[rows.starts] = self.before is None
        x0, e0 = (np.zeros(len(X)), 0.0) if self.before is None else (self.before[0], self.before[1][-1])
        scale = np.where(first, 1.0, 1.0 / math.sqrt(1.0 - a * a))
        shifted_x, shifted_e = np.column_stack([x0, X[:, :-1]]), np.append(e0, e[:-1])
        Xw = (X - np.where(first, 0.0, a) * shifted_x) * scale
        ew = (e - np.where(first, 0.0, a) * shifted_e) * scale
        self.total(rows, Xw, Xw, ew, need)
        self._pairs(rows, e)
        held = e if self.before is None else np.concatenate([self.before[1], e])
        self.before = X[:, -1], held[-self.reach :]

    def _pairs(self, rows: Rows, e: Array) -> None:
        """Σ ẽ_j ẽ_(j+k) and the number of such pairs, for lags whose weight k a^(k-1) is not negligible."""
        earlier = np.zeros(0) if self.before is None else self.before[1]
        every = np.concatenate([earlier, e])
        begins = np.repeat(rows.starts, rows.lengths) if self.before is None else np.zeros(len(e), dtype=np.intp)
        place = np.arange(len(e)) + len(earlier) - begins  # rows of the block before this one
        for k in range(1, min(self.reach, int(place.max(initial=0))) + 1):
            at = np.flatnonzero(place >= k)
            self.lags += [(0.0, 0.0)] * (k - len(self.lags))
            products, pairs = self.lags[k - 1]
            now = at + len(earlier)
            self.lags[k - 1] = products + float(every[now] @ every[now - k]), pairs + len(at)

    def moments(self) -> Moments:
        lags = np.array(self.lags or [(0.0, 0.0)])
        return Moments(self.squares, self.n, lags[:, 0], lags[:, 1])


def _reach(a: float) -> int:
    """The longest lag whose weight is not negligible."""
    k = np.arange(1, LONGEST)
    return int(k[k * min(max(abs(a), 0.5), 0.999) ** (k - 1.0) > NEGLIGIBLE][-1])


class _Patterns(_Sums):
    """An unstructured correlation of the levels of time: blocks observed at the same times share R⁻¹."""

    def __init__(self, working: Working, alpha: Array) -> None:
        super().__init__(working, alpha)
        t = len(working.times)
        self.R = np.eye(t)
        self.R[np.triu_indices(t, 1)] = alpha
        self.R = np.triu(self.R) + np.triu(self.R, 1).T
        self.products, self.pairs = np.zeros((t, t)), np.zeros((t, t))

    def add(self, rows: Rows, X: Array, e: Array, q: Array, need: bool) -> None:
        self.counted(e, q)
        assert rows.time is not None
        code = np.searchsorted(self.working.times, rows.time)
        B, t = len(rows.starts), len(self.working.times)
        block = np.repeat(np.arange(B), rows.lengths)
        E, seen = np.zeros((B, t)), np.zeros((B, t), dtype=bool)
        E[block, code], seen[block, code] = e, True
        self.products += E.T @ E
        self.pairs += seen.T.astype(float) @ seen
        XT = np.zeros((B, t, len(X)))
        XT[block, code] = X.T
        scores, grams = np.zeros((len(X), B)), np.zeros((len(X), len(X), B)) if need else None
        information = np.zeros((len(X),) * 2)
        for at, times in _alike(seen):
            inverse = np.linalg.inv(self.R[np.ix_(times, times)])
            x, r = XT[np.ix_(at, times)], E[np.ix_(at, times)]
            left = np.einsum("st,btp->bsp", inverse, x)
            scores[:, at] = np.einsum("bsp,bs->pb", left, r)
            information += np.einsum("bsp,bsr->pr", left, x)
            if grams is not None:
                grams[:, :, at] = np.einsum("bsp,bsr->prb", left, x)
        self.scores, self.information, self.grams = scores, information, grams

    def moments(self) -> Moments:
        return Moments(self.squares, self.n, self.products, self.pairs)


def _alike(seen: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks observed at the same times, and these."""
    patterns, which = np.unique(seen, axis=0, return_inverse=True)
    order = np.argsort(which.ravel(), kind="stable")
    stops = np.cumsum(np.bincount(which.ravel(), minlength=len(patterns)))
    for pattern, at in zip(patterns, np.split(order, stops[:-1]), strict=True):
        yield at, np.flatnonzero(pattern)


def _meats(scores: Array, grams: Array, bread: Array) -> dict[str, Array]:
    """Σ s s' of block scores as they are, and corrected for their leverages by (I - H)^(-1/2) (Kauermann and Carroll 2001) and (I - H)⁻¹
    (Mancl and DeRouen 2001); what one block alone determines has no residual."""
    L = half(bread)
    kauermann, mancl = (corrected(scores, grams, L, whole=whole) for whole in (False, True))
    return {kind: s @ s.T for kind, s in (("robust", scores), ("kauermann-carroll", kauermann), ("mancl-derouen", mancl))}


@dataclass
class GEESolution:
    """`beta` (p,) in the solver's coordinates, `alpha`, `phi`; `bread`, the inverse information over phi = 1; the last look."""

    beta: Array
    alpha: Array
    phi: float
    bread: Array
    look: Look
    converged: bool
    score: float
    passes: int
    message: str


def solve_gee(
    look: Callable[[Array, Array, Array | None], Look], working: Working, start: Array, *, tol: float, max_passes: int
) -> GEESolution:
    """Fisher scoring for beta with moment estimates of alpha and phi in between, until both stay where they are, or move by no more than
    the rounding errors of residuals."""
    beta, alpha, message = start, working.start, "out of passes"
    score, converged, near, still = math.inf, False, False, 0
    for passes in range(1, max_passes):
        at = look(beta, alpha, None)
        phi = at.moments.squares / at.moments.n
        if not (np.isfinite(at.score).all() and np.isfinite(at.information).all() and math.isfinite(phi)):
            return _ended(look, beta, alpha, working, passes, OUTSIDE)
        if len(beta) and not definite(at.information):
            return _ended(look, beta, alpha, working, passes, EMPTY)
        rounding = ROUNDING * math.sqrt(at.responses / phi) if phi > 0.0 else math.inf
        if rounding > NEAR:
            return _ended(look, beta, alpha, working, passes, FITTED)
        bound = max(tol, rounding)
        step = np.linalg.solve(at.information, at.score)
        score = math.sqrt(max(float(at.score @ step) / phi, 0.0))
        near = near or score < NEAR  # before that residuals say nothing of the correlation
        new = working.correlation(at.moments, phi, alpha) if near else alpha
        if not _proper(working, new):
            return _ended(look, beta, alpha, working, passes, "the working correlation is not positive definite")
        moved = float(np.abs(new - alpha).max(initial=0.0))
        # beta follows alpha by one pass: what stands still twice has settled
        still = still + 1 if near and score < bound and moved < 0.1 * bound else 0
        if still == 2:
            converged, message = True, "the scaled score is small"
            break
        beta, alpha = beta + step, new
    return _ended(look, beta, alpha, working, passes, message, converged, score)


def _ended(
    look: Callable[[Array, Array, Array | None], Look], beta: Array, alpha: Array, working: Working, passes: int, message: str,
    converged: bool = False, score: float = math.inf,
) -> GEESolution:  # fmt: skip
    """The last look, with the sandwiches."""
    at = look(beta, alpha, None)
    bread = inverse(at.information)
    if definite(at.information):
        at = look(beta, alpha, bread)
    return GEESolution(beta, alpha, at.moments.squares / at.moments.n, bread, at, converged, score, passes + 2, message)


def _proper(working: Working, alpha: Array) -> bool:
    """Whether the correlation is one of all blocks; an exchangeable one is judged by the sizes of blocks as they come."""
    if working.corr == "unstructured":
        t = len(working.times)
        R = np.eye(t)
        R[np.triu_indices(t, 1)] = alpha
        return bool(np.linalg.eigvalsh(np.triu(R) + np.triu(R, 1).T)[0] > 0.0)
    return bool((np.abs(alpha) < 1.0).all())
