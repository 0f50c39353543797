"""Profile likelihood: -2ℓ with one quantity pinned, minimized over the rest, and the limits where its signed root is a normal quantile
(Bates et al. 2015, section 5.1; Venzon and Moolgavkar 1988).

A surface is -2ℓ as a function of φ = (θ, e): the free elements of Λ, then log σ (linear models, β eliminated) or (β, τ).
A pin expresses φ by a pinned value v and the remaining free numbers x.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np

from mlpipe.errors import ConvergenceError, DataError

from .blocks import Array, Index
from .crossed import CrossedProblem, Exact
from .folding import folded
from .glm import GLMLook
from .glmm import GLMMProblem
from .likelihood import LMMProblem, evaluate

DECREMENT = 1e-7  # of -2ℓ that Newton's step still promises, at which a pinned minimum is found
CLOSE = 2e-4  # of the signed root from its quantile, at which a limit is found: 1e-4 of half the interval
BETTER = 1e-3  # by which a pinned -2ℓ may not fall below the least one
MOST_STEPS, MOST_POINTS = 200, 60
MOST_HALVINGS = 30
FEW, MOST_SIMPLICES = 8, 6  # free numbers that simplices can search, and how often they start


class Linear(NamedTuple):
    """A linear condition c'β = value."""

    c: Array
    value: float


class Look(NamedTuple):
    """-2ℓ, its derivatives by φ, and by the value of a linear condition."""

    value: float
    gradient: Array
    slope: float = 0.0


class Surface(Protocol):
    """-2ℓ over φ."""

    def look(self, phi: Array, condition: Linear | None) -> Look: ...


# -- surfaces ----------------------------------------------------------------------------------------------------------


def _conditioned(beta: Array, C: Array, rss: float, condition: Linear | None) -> tuple[Array, float, float]:
    """β, residual sum of squares and its derivative by the value, under a linear condition on β; C = (X'V⁻¹X)⁻¹."""
    if condition is None:
        return beta, rss, 0.0
    Cc = C @ condition.c
    v, gap = float(condition.c @ Cc), float(condition.c @ beta) - condition.value
    return beta - Cc * (gap / v), rss + gap**2 / v, -2.0 * gap / v


def lower(free: tuple[Index, Index], values: Array, q: int) -> Array:
    """Λ (q, q) from its free elements."""
    out = np.zeros((q, q))
    out[free] = values
    return out


class BlockSurface:
    """-2ℓ (ML) of a linear mixed model with one grouping factor, by (θ, log σ)."""

    def __init__(self, problem: LMMProblem) -> None:
        self.problem, self.free = replace(problem, reml=False), problem.free()

    def look(self, phi: Array, condition: Linear | None) -> Look:
        problem, lambda_, s2 = self.problem, lower(self.free, phi[:-1], self.problem.q), math.exp(2.0 * phi[-1])
        try:
            at = evaluate(problem, lambda_, s2)
        except DataError:  # far out
            return Look(math.inf, np.zeros(len(phi)))
        beta, rss, slope = _conditioned(at.beta, at.r_inverse @ at.r_inverse.T, at.rss, condition)
        v = np.append(-beta, 1.0)
        tt = np.einsum("j,ajbk,k->ab", v, at.sums.hh, v)
        G = at.sums.F_inverse.T @ (at.sums.e - tt / s2) @ at.sums.F_inverse
        by_lambda = 2.0 * (G @ lambda_)[self.free]
        value = at.objective + (rss - at.rss) / s2
        return Look(value, np.append(by_lambda, 2.0 * problem.n - 2.0 * rss / s2), slope / s2)


class LevelSurface:
    """The same for several grouping factors."""

    def __init__(self, problem: CrossedProblem) -> None:
        self.exact = Exact(folded(replace(problem, reml=False)))
        rows, columns = np.array(problem.entries, dtype=np.intp).reshape(-1, 2).T
        self.free = rows, columns

    def look(self, phi: Array, condition: Linear | None) -> Look:
        problem, s2 = self.exact.problem, math.exp(2.0 * phi[-1])
        lambda_ = lower(self.free, phi[:-1], problem.offsets[-1])
        try:
            at, U = self.exact.evaluate(lambda_)
        except np.linalg.LinAlgError:
            return Look(math.inf, np.zeros(len(phi)))
        before = problem.degrees * at.s2
        beta, rss, slope = _conditioned(at.beta, at.C, before, condition)
        moved = replace(at, beta=beta, s2=s2, u=U[:, -1] - U[:, :-1] @ beta)
        t, H = self.exact.residual_sums(lambda_, moved, U)
        gradient = -2.0 * self.exact.score(lambda_, moved, U, t, H)
        value = self.exact.logdet(lambda_, at.M) - problem.sum_log_w + problem.n * math.log(2.0 * math.pi * s2) + rss / s2
        return Look(value, np.append(gradient, 2.0 * problem.n - 2.0 * rss / s2), slope / s2)


class PassSurface:
    """-2ℓ of a generalized model by passes over its rows, by (θ, β, τ)."""

    def __init__(self, problem: GLMMProblem) -> None:
        self.problem, self.d = problem, len(problem.entries)

    def look(self, phi: Array, condition: Linear | None) -> Look:
        assert condition is None
        p, d = self.problem.p, self.d
        psi = np.concatenate([phi[d : d + p], phi[:d], phi[d + p :]])
        try:
            found = self.problem.look(psi)
        except OverflowError:  # far out
            return Look(math.inf, np.zeros(len(phi)))
        score = np.concatenate([found.score[p : p + d], found.score[:p], found.score[p + d :]])
        return Look(-2.0 * found.loglik, -2.0 * score)


class PlainSurface:
    """The same without random effects, by (β, τ)."""

    def __init__(self, looks: Callable[[Array, bool], GLMLook]) -> None:
        self.looks = looks

    def look(self, phi: Array, condition: Linear | None) -> Look:
        assert condition is None
        try:
            found = self.looks(phi, False)
        except OverflowError:
            return Look(math.inf, np.zeros(len(phi)))
        return Look(-2.0 * found.loglik, -2.0 * found.score)


# -- pins --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pin:
    """A quantity that is pinned.

    `expand(x, v)` gives φ, `start` is x at the estimate, `estimate` v, `error` its standard error (NaN where unknown), `least`, `most` the
    ends of its domain, which are models themselves if `closed`, `condition` the c of a linear condition on β, in place of v in `expand`;
    `unit` a size of v that is neither small nor large.
    """

    expand: Callable[[Array, float], Array]
    start: Array
    estimate: float
    error: float
    least: float = -math.inf
    most: float = math.inf
    condition: Array | None = None
    closed: bool = True
    unit: float = 1.0


def jacobian(pin: Pin, x: Array, v: float) -> tuple[Array, Array]:
    """(φ, x) and (φ,) derivatives of `expand`, by central differences: it is cheap and smooth."""
    columns = []
    for k in range(len(x)):
        step = np.zeros(len(x))
        step[k] = 1e-5 * max(abs(x[k]), 1e-2)
        columns.append((pin.expand(x + step, v) - pin.expand(x - step, v)) / (2.0 * step[k]))
    h = 1e-5 * max(abs(v), 1e-2 * pin.unit)
    ahead, behind = min(v + h, pin.most), max(v - h, pin.least)
    by_v = (pin.expand(x, ahead) - pin.expand(x, behind)) / (ahead - behind)
    return (np.column_stack(columns) if columns else np.zeros((len(by_v), 0))), by_v


class _Point(NamedTuple):
    """x, -2ℓ, derivatives by x and by v."""

    x: Array
    value: float
    gradient: Array
    slope: float


class Profile:
    """The profile of one pin over a surface; `curvature` (φ, φ) is the Hessian of -2ℓ near the estimate."""

    def __init__(self, surface: Surface, pin: Pin, curvature: Array, least: float) -> None:
        self.surface, self.pin, self.least = surface, pin, least
        J, _ = jacobian(pin, pin.start, pin.estimate)
        H = J.T @ curvature @ J
        size = np.sqrt(np.maximum(np.diag(H), 1e-12))
        values, vectors = np.linalg.eigh(H / np.outer(size, size))
        self.inverse = (vectors / np.maximum(values, 1e-6)) @ vectors.T / np.outer(size, size) if len(H) else H
        self.known: list[tuple[float, Array]] = [(pin.estimate, pin.start)]

    def _at(self, x: Array, v: float) -> _Point:
        pin = self.pin
        condition = None if pin.condition is None else Linear(pin.condition, v)
        look = self.surface.look(pin.expand(x, v), condition)
        J, by_v = jacobian(pin, x, v)
        slope = look.slope if condition is not None else float(by_v @ look.gradient)
        return _Point(x, look.value, J.T @ look.gradient, slope)

    def minimum(self, v: float) -> _Point:
        """The least -2ℓ at v, by BFGS from the nearest point known. Raises ConvergenceError."""
        x = min(self.known, key=lambda known: abs(known[0] - v))[1]
        at, H = self._at(x, v), self.inverse
        if not math.isfinite(at.value):
            raise ConvergenceError(f"the likelihood is not finite at the profiled value {v:g}")
        for _ in range(MOST_STEPS):
            step = -H @ at.gradient
            promise = float(-at.gradient @ step)
            if promise < DECREMENT:
                self.known.append((v, at.x))
                self.inverse = H
                return at
            new = self._line(at, step, v, promise)
            if new is None:
                if promise < 1e3 * DECREMENT:  # at the limit of rounding
                    self.known.append((v, at.x))
                    return at
                if H is self.inverse:
                    return self._by_values(at, v)
                H = self.inverse
                continue
            H = _updated(H, new.x - at.x, new.gradient - at.gradient)
            at = new
        raise ConvergenceError(f"the profile did not converge at the value {v:g}")

    def _by_values(self, at: _Point, v: float) -> _Point:
        """The least -2ℓ at v by Nelder and Mead's (1965) simplices: where a covariance matrix loses rank elements of Λ may turn at once,
        and gradients by them lead nowhere. Raises ConvergenceError where another simplex around the end finds a better point."""
        from scipy.optimize import minimize

        def value(x: Array) -> float:
            return self.surface.look(self.pin.expand(x, v), None if self.pin.condition is None else Linear(self.pin.condition, v)).value

        best, least = at.x, at.value
        cheap = len(at.x) <= FEW and isinstance(self.surface, BlockSurface | LevelSurface)  # no passes over rows
        for _ in range(MOST_SIMPLICES if cheap else 0):
            found = minimize(value, best, method="Nelder-Mead", options={"xatol": 1e-4, "fatol": DECREMENT, "maxiter": 400 * len(best)})
            settled, best, least = least - found.fun < 10.0 * DECREMENT, found.x, float(found.fun)
            if settled:
                self.known.append((v, best))
                return self._at(best, v)
        raise ConvergenceError(f"the profile did not converge at the value {v:g}")

    def _line(self, at: _Point, step: Array, v: float, promise: float) -> _Point | None:
        length = 1.0
        for _ in range(MOST_HALVINGS):
            new = self._at(at.x + length * step, v)
            if new.value <= at.value - 1e-4 * length * promise or (promise < 1e-5 and new.value <= at.value + 1e-9 * abs(at.value)):
                return new
            length *= 0.4
        return None

    def root(self, v: float) -> tuple[float, float]:
        """The signed root ζ of the excess of -2ℓ at v, and dζ/dv."""
        at = self.minimum(v)
        excess = at.value - self.least
        if excess < -BETTER:
            raise ConvergenceError(
                f"profiling found a better fit (by {-excess / 2:.3g} in the log-likelihood)", hint="fit again from other values of start="
            )
        zeta = math.sqrt(max(excess, 0.0))
        sign = math.copysign(1.0, v - self.pin.estimate)
        return sign * zeta, sign * at.slope / (2.0 * zeta) if zeta > 0.0 else 0.0

    def limit(self, z: float, upper: bool) -> float:
        """The value at which ζ is z (or -z); the end of the domain where it stays below. Raises ConvergenceError."""
        pin, sign = self.pin, 1.0 if upper else -1.0
        end = pin.most if upper else pin.least
        if pin.estimate == end:
            return end
        error = pin.error if math.isfinite(pin.error) and pin.error > 0.0 else max(abs(pin.estimate), 0.1 * pin.unit)
        inner, outer, v = pin.estimate, math.inf * sign, pin.estimate + sign * z * error
        for _ in range(MOST_POINTS):
            if (v - end) * sign >= 0.0:
                v = end if math.isinf(outer) and pin.closed else 0.5 * (inner + (end if math.isinf(outer) else outer))
            zeta, slope = self.root(v)
            short = z - sign * zeta
            if abs(short) < CLOSE or (v == end and short > 0.0):
                return v
            inner, outer = (v, outer) if short > 0.0 else (inner, v)
            if abs(outer - inner) < 1e-9 * max(pin.unit, abs(v)):
                if inner == pin.estimate:  # where it is 0 by definition: the minima so near to it are none
                    raise ConvergenceError(f"the profile did not converge at the value {v:g}")
                return v
            step = short / slope if slope > 0.0 else math.inf
            v = self._next(v + sign * step, inner, outer, sign, error)
        raise ConvergenceError("no limit of the profile was found")

    @staticmethod
    def _next(v: float, inner: float, outer: float, sign: float, error: float) -> float:
        """v kept between inner and outer, or within a few standard errors of inner where there is no outer yet."""
        if math.isinf(outer):
            far = inner + sign * 4.0 * max(error, 0.1 * abs(inner))
            return min(max(v, min(inner, far)), max(inner, far)) if math.isfinite(v) else inner + sign * error
        low, high = min(inner, outer), max(inner, outer)
        margin = 0.02 * (high - low)
        return v if low + margin < v < high - margin else 0.5 * (low + high)


def _updated(H: Array, s: Array, y: Array) -> Array:
    """BFGS's update of the inverse Hessian."""
    sy = float(s @ y)
    if sy <= 1e-10 * math.sqrt(float(s @ s) * float(y @ y)):
        return H
    Hy = H @ y
    return np.asarray(H + np.outer(s, s) * (1.0 + float(y @ Hy) / sy) / sy - (np.outer(Hy, s) + np.outer(s, Hy)) / sy)
