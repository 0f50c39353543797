"""-2ℓ of mixed models as a surface over φ = (F_1 … F_K, e): a square factor of each random term's covariance Ψ = FF', by rows, then log σ
(linear models, β eliminated) or (β, τ).

F need not be triangular: -2ℓ depends on Ψ alone (a quadrature of several dimensions but nearly), its derivative by F is 2 ∂(-2ℓ)/∂Ψ F, and
smooth where Ψ loses rank, while a Cholesky factor turns at once there.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, Protocol

import numpy as np
from scipy.linalg import block_diag

from mlpipe.errors import DataError

from .blocks import Array
from .boundary import lower_factor
from .crossed import CrossedProblem, Exact
from .folding import folded
from .glm import GLMLook
from .glmm import GLMMProblem
from .likelihood import LMMProblem, evaluate
from .optimize import mean_block
from .several_factors import spans, squares


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
    """-2ℓ over φ. `sizes`: q_k of each term; `typical` (q, q): the mean Z'wZ of a level, or Z'WZ. Far out looks may raise OverflowError."""

    @property
    def sizes(self) -> tuple[int, ...]: ...

    @property
    def typical(self) -> Array: ...

    def look(self, phi: Array, condition: Linear | None) -> Look: ...


def _placed(sizes: tuple[int, ...], values: Array) -> Array:
    """The block-diagonal matrix of the terms' factors."""
    out = np.zeros((sum(sizes),) * 2)
    rows, columns = _index(sizes)
    out[rows, columns] = values
    return out


def _index(sizes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = np.array(squares(sizes), dtype=np.intp).reshape(-1, 2).T
    return rows, columns


def _conditioned(beta: Array, C: Array, rss: float, condition: Linear | None) -> tuple[Array, float, float]:
    """β, residual sum of squares and its derivative by the value, under a linear condition on β; C = (X'V⁻¹X)⁻¹."""
    if condition is None:
        return beta, rss, 0.0
    Cc = C @ condition.c
    v, gap = float(condition.c @ Cc), float(condition.c @ beta) - condition.value
    return beta - Cc * (gap / v), rss + gap**2 / v, -2.0 * gap / v


class BlockSurface:
    """-2ℓ (ML) of a linear mixed model with one grouping factor."""

    def __init__(self, problem: LMMProblem) -> None:
        self.problem, self.sizes = replace(problem, reml=False), problem.sizes
        self.typical = mean_block(problem)[1]

    def look(self, phi: Array, condition: Linear | None) -> Look:
        problem, F, s2 = self.problem, _placed(self.sizes, phi[:-1]), math.exp(2.0 * phi[-1])
        try:
            at = evaluate(problem, lower_factor(problem, F), s2)
        except (DataError, np.linalg.LinAlgError):  # far out
            return Look(math.inf, np.zeros(len(phi)))
        beta, rss, slope = _conditioned(at.beta, at.r_inverse @ at.r_inverse.T, at.rss, condition)
        v = np.append(-beta, 1.0)
        tt = np.einsum("j,ajbk,k->ab", v, at.sums.hh, v)
        G = at.sums.F_inverse.T @ (at.sums.e - tt / s2) @ at.sums.F_inverse
        by_factor = np.concatenate([(2.0 * G[one, one] @ F[one, one]).ravel() for one in problem.terms()])
        value = at.objective + (rss - at.rss) / s2
        return Look(value, np.append(by_factor, 2.0 * problem.n - 2.0 * rss / s2), slope / s2)


class LevelSurface:
    """The same for several grouping factors."""

    def __init__(self, problem: CrossedProblem) -> None:
        self.exact = Exact(folded(replace(problem, reml=False)))
        self.sizes = tuple(size for sizes in problem.terms for size in sizes)
        self.typical = problem.typical

    def look(self, phi: Array, condition: Linear | None) -> Look:
        problem, s2 = self.exact.problem, math.exp(2.0 * phi[-1])
        F = _placed(self.sizes, phi[:-1])
        try:
            lambda_, turn = _triangular(self.sizes, F)
            at, U = self.exact.evaluate(lambda_)
        except np.linalg.LinAlgError:
            return Look(math.inf, np.zeros(len(phi)))
        before = problem.degrees * at.s2
        beta, rss, slope = _conditioned(at.beta, at.C, before, condition)
        moved = replace(at, beta=beta, s2=s2, u=U[:, -1] - U[:, :-1] @ beta)
        t, H = self.exact.residual_sums(lambda_, moved, U)
        score = block_diag(*self.exact.scores(moved, U, t, H, self.exact.traces(lambda_, at.M)))
        by_factor = (-2.0 * score @ turn)[_index(self.sizes)]
        value = self.exact.logdet(lambda_, at.M) - problem.sum_log_w + problem.n * math.log(2.0 * math.pi * s2) + rss / s2
        return Look(value, np.append(by_factor, 2.0 * problem.n - 2.0 * rss / s2), slope / s2)


def _triangular(sizes: tuple[int, ...], F: Array) -> tuple[Array, Array]:
    """Λ lower triangular and Q orthogonal, term by term, with F = ΛQ."""
    lambda_, turn = np.zeros_like(F), np.zeros_like(F)
    for at in spans(sizes):
        Q, R = np.linalg.qr(F[at, at].T)
        lambda_[at, at], turn[at, at] = R.T, Q.T
    return lambda_, turn


class PassSurface:
    """-2ℓ of a generalized model by passes over its rows; the `problem`'s `entries` are `squares(sizes)`."""

    def __init__(self, problem: GLMMProblem, sizes: tuple[int, ...]) -> None:
        self.problem, self.sizes, self.typical = problem, sizes, problem.typical

    def look(self, phi: Array, condition: Linear | None) -> Look:
        assert condition is None
        p, d = self.problem.p, len(self.problem.entries)
        found = self.problem.look(np.concatenate([phi[d : d + p], phi[:d], phi[d + p :]]))
        score = np.concatenate([found.score[p : p + d], found.score[:p], found.score[p + d :]])
        return Look(-2.0 * found.loglik, -2.0 * score)


class PlainSurface:
    """The same without random effects, by (β, τ)."""

    sizes: tuple[int, ...] = ()
    typical = np.zeros((0, 0))

    def __init__(self, looks: Callable[[Array, bool], GLMLook]) -> None:
        self.looks = looks

    def look(self, phi: Array, condition: Linear | None) -> Look:
        assert condition is None
        found = self.looks(phi, False)
        return Look(-2.0 * found.loglik, -2.0 * found.score)


def curvature(surface: Surface, phi: Array, steps: Array) -> Array:
    """The Hessian of -2ℓ at φ by differences of its gradient over `steps`, behind where there is nothing ahead."""
    base, columns = surface.look(phi, None).gradient, []
    for k, size in enumerate(steps):
        for step in (size, -size):
            moved = phi.copy()
            moved[k] += step
            look = surface.look(moved, None)
            if math.isfinite(look.value):
                break
        columns.append((look.gradient - base) / step)
    H = np.column_stack(columns)
    return np.asarray((H + H.T) / 2.0)
