"""Linear mixed models with several grouping factors, exactly: elimination factor by factor (DESIGN: Bates et al. 2015, section 5;
gradients and average information FORMULAS R5, Gilmour, Thompson and Cullis 1995).

Unknowns are ordered factor by factor, largest first, level by level; Λ is block-diagonal, so that M = Λ'Z'wZΛ + I has the pattern of Z'wZ.
A factor whose levels do not meet is eliminated by its own small blocks. What is left when the next one's blocks would fill in is dense.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import scipy.sparse as sp

from .elimination import Eliminated, eliminate
from .kernel import Look, Point
from .link import Array
from .nested import Children, Family, Nested
from .several_factors import SeveralFactors
from .small import flat as flat
from .small import per_level as per_level

Places: TypeAlias = np.ndarray | slice


@dataclass(frozen=True)
class Factor:
    """One grouping factor: `S` (q, q, m) Z'wZ per level and `C` (q, p + 1, m) Z'w[X y]; `idle`, with one effect a level: Z'wZ of levels
    that meet no other factor and have C = 0, and how many there are of each (`folding`)."""

    S: Array
    C: Array
    idle: tuple[Array, Array] = (np.zeros(0), np.zeros(0))

    @property
    def q(self) -> int:
        """Random effects a level."""
        return len(self.S)

    @property
    def levels(self) -> int:
        """The number of levels m."""
        return int(self.S.shape[2])

    @property
    def size(self) -> int:
        """The number of random effects q m."""
        return self.q * self.levels

    @property
    def all_levels(self) -> float:
        """The number of levels with the idle ones."""
        return self.levels + float(self.idle[1].sum())

    @property
    def mean(self) -> Array:
        """The mean (q, q) of Z'wZ over all levels."""
        return np.asarray((self.S.sum(axis=2) + self.idle[0] @ self.idle[1]) / self.all_levels)


@dataclass(frozen=True)
class Cells:
    """Z_k'wZ_h of two factors: for each pair of levels that occurs, `rows` and `columns` (c,) and the block `values` (q_k, q_h, c)."""

    rows: np.ndarray
    columns: np.ndarray
    values: Array

    def pattern(self, shape: tuple[int, int]) -> tuple[sp.csr_matrix, Places]:
        """Where blocks are, as a matrix over levels sorted by row and column, and the place of each in `values`."""
        kind = np.int32 if max(*shape, len(self.rows)) < 2**31 else np.int64
        if _sorted(self):
            indptr = np.concatenate([[0], np.cumsum(np.bincount(self.rows, minlength=shape[0]))]).astype(kind)
            return csr(self.values[0, 0], self.columns.astype(kind, copy=False), indptr, shape), slice(None)
        places = np.arange(len(self.rows), dtype=kind)
        by_column = sp.csc_matrix(sp.coo_matrix((places, (self.rows, self.columns)), shape=shape, copy=False))
        out = sp.csr_matrix(by_column)
        order = out.data
        return csr(self.values[0, 0, order], out.indices, out.indptr, shape), order


@dataclass(frozen=True)
class CrossedProblem(SeveralFactors):
    """All a fit needs: `factors`, largest first; `cells` of pairs (k, h), k < h; `WW` (p + 1, p + 1) = [X y]'w[X y]; `n`, `sum_log_w`."""

    factors: tuple[Factor, ...]
    cells: dict[tuple[int, int], Cells]
    WW: Array
    n: float
    sum_log_w: float
    reml: bool
    terms: tuple[tuple[int, ...], ...]  # sizes of the random terms of each factor

    @property
    def p(self) -> int:
        """The number of fixed effects."""
        return len(self.WW) - 1

    @property
    def degrees(self) -> float:
        """N or N - p."""
        return self.n - (self.p if self.reml else 0)

    @cached_property
    def typical(self) -> Array:
        """The mean Z'wZ of a level, block-diagonal over factors."""
        out = np.zeros((self.offsets[-1],) * 2)
        for f, a, b in zip(self.factors, self.offsets[:-1], self.offsets[1:], strict=True):
            out[a:b, a:b] = f.mean
        return out

    @cached_property
    def stays_sparse(self) -> bool:
        """Whether elimination meets no dense rest: each level of a factor meets at most one of each later factor (nested designs)."""
        return all(len(cells.rows) == self.factors[k].levels for (k, _), cells in self.cells.items())

    @cached_property
    def patterns(self) -> dict[tuple[int, int], tuple[sp.csr_matrix, Places]]:
        """Where the blocks of each pair are: see `Cells.pattern`."""
        levels = [f.levels for f in self.factors]
        return {(k, h): cells.pattern((levels[k], levels[h])) for (k, h), cells in self.cells.items()}

    def cross(self, pair: tuple[int, int], left: Array, right: Array) -> sp.csr_matrix:
        """left' (Z_k'wZ_h) right over single effects, left and right being one level's maps."""
        held = self.cells[pair].values
        if held.shape[:2] == (1, 1):
            factor = float(left[0, 0] * right[0, 0])
            values = held if factor == 1.0 else held * factor
        else:
            values = np.einsum("ia,ijc,jb->abc", left, held, right, optimize=True)
        return by_effects(*self.patterns[pair], values)


def by_effects(pattern: sp.csr_matrix, places: Places, values: Array) -> sp.csr_matrix:
    """Blocks `values[:, :, places]` (q, r, c) in a pattern over levels, as a matrix over single effects."""
    q, r = values.shape[:2]
    if q == r == 1:
        return csr(values[0, 0, places], pattern.indices, pattern.indptr, pattern.shape)
    blocks = values[:, :, places].transpose(2, 0, 1)
    shape = pattern.shape[0] * q, pattern.shape[1] * r
    return sp.csr_matrix(sp.bsr_matrix((blocks, pattern.indices, pattern.indptr), shape=shape).tocsr())


def csr(values: Array, columns: np.ndarray, indptr: np.ndarray, shape: tuple[int, int]) -> sp.csr_matrix:
    """A CSR matrix over these arrays themselves, whose columns ascend in each row."""
    out = sp.csr_matrix(shape, dtype=values.dtype)
    out.data, out.indices, out.indptr = values, columns, indptr
    out.has_sorted_indices = out.has_canonical_format = True
    return out


def _sorted(cells: Cells) -> bool:
    """Whether the cells are in the order of their rows, then of their columns, a million at a time."""
    for first in range(0, len(cells.rows) - 1, 1 << 20):
        part = slice(first, first + (1 << 20) + 1)
        rows, columns = cells.rows[part], cells.columns[part]
        if not ((rows[1:] > rows[:-1]) | ((rows[1:] == rows[:-1]) & (columns[1:] > columns[:-1]))).all():
            return False
    return True


INVERTIBLE = 1e-3  # diagonal of Λ, in units of what a level tells, from which Λ⁻¹ is safe

# -- likelihood, score, average information ----------------------------------------------------------------------------


@dataclass
class Evaluation:
    """The likelihood at Λ: `loglik`, `beta` (p,), `s2`, `C` (p, p) = (X'V⁻¹X)⁻¹ in units of s2, modes `u` over single effects."""

    loglik: float
    beta: Array
    s2: float
    C: Array
    u: Array
    M: Eliminated | Nested


class _Tree:
    """What no Λ changes of nested factors: the children of every level, and the cells in the order of their inner levels."""

    def __init__(self, problem: CrossedProblem) -> None:
        self.family: Family = {}
        self.blocks: dict[tuple[int, int], Array] = {}
        for (k, h), cells in problem.cells.items():
            order = slice(None) if (np.diff(cells.rows) > 0).all() else np.argsort(cells.rows)
            self.family[k, h] = Children(cells.columns[order], problem.factors[h].levels)
            self.blocks[k, h] = cells.values[:, :, order]

    def factored(self, diagonals: list[Array], lams: list[Array]) -> Nested:
        """M from the diagonal blocks of each factor."""
        cross = {(k, h): np.einsum("ia,ijc,jb->abc", lams[k], A, lams[h], optimize=True) for (k, h), A in self.blocks.items()}
        return Nested(diagonals, cross, self.family)


class Exact:
    """A `scan` for the search of `glmm.solve_glmm`: profiled log-likelihood, its score by Λ, and the average information."""

    def __init__(self, problem: CrossedProblem) -> None:
        self.problem = problem
        self.identity = [np.eye(f.q) for f in problem.factors]
        self.tree = _Tree(problem) if problem.stays_sparse else None
        self.plain = {pair: problem.cross(pair, self.identity[pair[0]], self.identity[pair[1]]) for pair in problem.cells}

    def __call__(self, points: Sequence[Point], main: bool) -> list[Look]:
        return [self.look(point.lambda_) for point in points]

    def factored(self, lambda_: Array) -> Eliminated | Nested:
        """M at Λ."""
        problem = self.problem
        lams = problem.lambdas(lambda_)
        every = zip(self.identity, problem.factors, lams, strict=True)
        diagonals: list[Array] = [one[:, :, None] + np.einsum("ia,ijm,jb->abm", lam, f.S, lam) for one, f, lam in every]
        if self.tree is not None:
            return self.tree.factored(diagonals, lams)
        return eliminate(diagonals, {(k, h): problem.cross((k, h), lams[k], lams[h]) for k, h in problem.cells})

    def spherical(self, lambda_: Array) -> Array:
        """Λ'Z'w[X y] over single effects."""
        lams = self.problem.lambdas(lambda_)
        return np.concatenate([flat(np.einsum("ia,ijm->ajm", lam, f.C)) for f, lam in zip(self.problem.factors, lams, strict=True)])

    def evaluate(self, lambda_: Array) -> tuple[Evaluation, Array]:
        """The likelihood, and Û = M⁻¹Λ'Z'w[X y]."""
        problem, M = self.problem, self.factored(lambda_)
        c = self.spherical(lambda_)
        U = M.solve(c)
        A = problem.WW - c.T @ U
        R = np.linalg.cholesky((A + A.T) / 2.0).T
        p, dof = problem.p, problem.degrees
        s2 = float(R[-1, -1] ** 2) / dof
        beta = np.linalg.solve(R[:p, :p], R[:p, p]) if p else np.zeros(0)
        minus2 = self.logdet(lambda_, M) - problem.sum_log_w + dof * (1.0 + math.log(2.0 * math.pi * s2))
        minus2 += 2.0 * float(np.log(np.abs(np.diag(R)[:p])).sum()) if problem.reml else 0.0
        inverse = np.linalg.inv(R[:p, :p]) if p else np.zeros((0, 0))
        return Evaluation(-minus2 / 2.0, beta, s2, inverse @ inverse.T, U[:, p] - U[:, :p] @ beta, M), U

    def logdet(self, lambda_: Array, M: Eliminated | Nested) -> float:
        """log|M|, idle levels included."""
        out = M.logdet
        for f, lam in zip(self.problem.factors, self.problem.lambdas(lambda_), strict=True):
            out += float(f.idle[1] @ np.log1p(lam[0, 0] ** 2 * f.idle[0]))
        return out

    def look(self, lambda_: Array) -> Look:
        """One evaluation with score and average information over the entries of Λ."""
        try:
            at, U = self.evaluate(lambda_)
        except np.linalg.LinAlgError:
            size = len(self.problem.entries)
            return Look(-math.inf, np.zeros(size), np.zeros((size, size)))
        t, H = self.residual_sums(lambda_, at, U)
        return Look(at.loglik, self.score(lambda_, at, U, t, H), self.information(lambda_, at, t, H))

    def residual_sums(self, lambda_: Array, at: Evaluation, U: Array) -> tuple[Array, Array]:
        """t = Z'V⁻¹r and H = Z'V⁻¹X over single effects."""
        problem, p = self.problem, self.problem.p
        rhs = np.concatenate([flat(f.C) for f in problem.factors])
        both = rhs - self.times(_apply(self.problem, lambda_, U))
        return both[:, p] - both[:, :p] @ at.beta, both[:, :p]

    def along(self, lambda_: Array, at: Evaluation) -> Array:
        """∂ log s / ∂θ (entries,) on the profile: -g_D't / (2 dof s²)."""
        p, rhs = self.problem.p, np.concatenate([flat(f.C) for f in self.problem.factors])
        t = rhs[:, p] - rhs[:, :p] @ at.beta - self.times(_apply(self.problem, lambda_, at.u[:, None]))[:, 0]
        return np.asarray(-(self.working(lambda_, at, t).T @ t) / (2.0 * self.problem.degrees * at.s2))

    def times(self, b: Array) -> Array:
        """Z'wZ b for b (all effects, k)."""
        problem = self.problem
        ends = np.concatenate([[0], np.cumsum([f.size for f in problem.factors])])
        parts = [b[a:e] for a, e in zip(ends[:-1], ends[1:], strict=True)]
        out = [_own(f, part) for f, part in zip(problem.factors, parts, strict=True)]
        for k, h in problem.cells:
            out[k] += self.cross_times(k, h, parts[h])
            out[h] += self.cross_times(h, k, parts[k])
        return np.concatenate(out)

    def cross_times(self, k: int, h: int, x: Array) -> Array:
        """Z_k'wZ_h x for x over factor h's effects."""
        return np.asarray(self.plain[k, h] @ x if k < h else self.plain[h, k].T @ x)

    def score(self, lambda_: Array, at: Evaluation, U: Array, t: Array, H: Array) -> Array:
        """∂ℓ/∂Λ by the entries: -tril[Σ Z'wZΛM⁻¹ - Σ t u'/s² - [REML] Σ H C Ĥ'] (R5, first form where Λ is singular)."""
        return self.score_from(at, U, t, H, self.traces(lambda_, at.M))

    def score_from(self, at: Evaluation, U: Array, t: Array, H: Array, traces: list[Array]) -> Array:
        """The score by the entries from T_k of every factor."""
        return self.entries_of(self.scores(at, U, t, H, traces))

    def scores(self, at: Evaluation, U: Array, t: Array, H: Array, traces: list[Array]) -> list[Array]:
        """∂ℓ by all elements (q_k, q_k) of Λ_k, free or not, of every factor."""
        problem, p = self.problem, self.problem.p
        out, place = [], 0
        for k, f in enumerate(problem.factors):
            rows = slice(place, place + f.size)
            place += f.size
            tk, uk = t[rows].reshape(-1, f.q), at.u[rows].reshape(-1, f.q)
            G = traces[k] - tk.T @ uk / at.s2
            if problem.reml and p:
                HC, Uk = (H[rows] @ at.C).reshape(-1, f.q, p), U[rows, :p].reshape(-1, f.q, p)
                G = G - np.einsum("iap,ibp->ab", HC, Uk)
            out.append(-G)
        return out

    def entries_of(self, blocks: list[Array]) -> Array:
        """The free elements of Λ, from a matrix of each factor."""
        problem = self.problem
        full = np.zeros((problem.offsets[-1],) * 2)
        for G, a, b in zip(blocks, problem.offsets[:-1], problem.offsets[1:], strict=True):
            full[a:b, a:b] = G
        return np.array([full[i, j] for i, j in problem.entries])

    def traces(self, lambda_: Array, M: Eliminated | Nested) -> list[Array]:
        """T_k = Σ_i (Z'wZΛM⁻¹)_ki,ki, from Λ_k'T_k = m_k I - Σ_i (M⁻¹)_ki,ki where Λ_k is safely invertible."""
        out: list[Array] = []
        for k, (f, lam) in enumerate(zip(self.problem.factors, self.problem.lambdas(lambda_), strict=True)):
            diagonal = np.abs(np.diag(lam)) * np.sqrt(np.diag(self.problem.typical)[slice(*self.problem.offsets[k : k + 2])])
            if diagonal.min() < INVERTIBLE:
                out.append(self._direct(lambda_, M, k))
            else:
                out.append(np.asarray(np.linalg.solve(lam.T, f.levels * np.eye(f.q) - M.sums(k)), dtype=np.float64))
            if len(f.idle[0]):
                out[k] += f.idle[1] @ (f.idle[0] * lam[0, 0] / (1.0 + lam[0, 0] ** 2 * f.idle[0]))
        return out

    def _direct(self, lambda_: Array, M: Eliminated | Nested, k: int) -> Array:
        """T_k element by element: T_k[a, b] = tr(M⁻¹P), P having row (i, a) of Z_k'wZΛ as its row (i, b), and nothing else."""
        problem, lams = self.problem, self.problem.lambdas(lambda_)
        f = problem.factors[k]
        out = np.zeros((f.q, f.q))
        for a in range(f.q):
            for b in range(f.q):
                move = np.zeros((f.q, f.q))
                move[b, a] = 1.0
                own = np.einsum("ij,jkm,kl->ilm", move, f.S, lams[k])
                blocks = {k: (own + own.transpose(1, 0, 2)) / 2.0}
                cross = {}
                for pair in problem.cells:
                    if k in pair:
                        left, right = (move.T, lams[pair[1]]) if pair[0] == k else (lams[pair[0]], move.T)
                        cross[pair] = problem.cross(pair, left, right) * 0.5
                out[a, b] = M.inner_blocks(blocks, cross)
        return out

    def information(self, lambda_: Array, at: Evaluation, t: Array, H: Array) -> Array:
        """The average information of θ with σ² profiled out (R5)."""
        return self.information_from(lambda_, at, t, H, self.working(lambda_, at, t), at.M.solve)

    def information_from(self, lambda_: Array, at: Evaluation, t: Array, H: Array, G: Array, solve: Callable[[Array], Array]) -> Array:
        """The same from working variates g_D (all effects, entries) and a way to solve by M."""
        problem = self.problem
        SG = self.times(G)
        K = SG - self.times(_apply(problem, lambda_, solve(_apply(problem, lambda_, SG, transpose=True))))
        AI = G.T @ K - (G.T @ H) @ at.C @ (H.T @ G)
        cross = G.T @ t
        dof = problem.degrees
        return np.asarray(AI / (2.0 * at.s2) - np.outer(cross, cross) / (2.0 * dof * at.s2**2))

    def working(self, lambda_: Array, at: Evaluation, t: Array) -> Array:
        """g_D = D u + Λ D't for each entry D of Λ, over single effects (all effects, entries)."""
        problem, columns = self.problem, []
        starts = np.concatenate([[0], np.cumsum([f.size for f in problem.factors])])
        lams = problem.lambdas(lambda_)
        for i, j in problem.entries:
            k = int(np.searchsorted(problem.offsets, i, side="right")) - 1
            f, a, b = problem.factors[k], i - problem.offsets[k], j - problem.offsets[k]
            rows = slice(int(starts[k]), int(starts[k + 1]))
            uk, tk = at.u[rows].reshape(-1, f.q), t[rows].reshape(-1, f.q)
            g = np.zeros((f.levels, f.q))
            g[:, a] += uk[:, b]
            g += tk[:, [a]] * lams[k][:, b][None]
            column = np.zeros(int(starts[-1]))
            column[rows] = g.ravel()
            columns.append(column)
        return np.column_stack(columns) if columns else np.zeros((int(starts[-1]), 0))


def _own(f: Factor, x: Array) -> Array:
    """Z_k'wZ_k x for x over single effects."""
    return x * f.S[0, 0][:, None] if f.q == 1 else flat(np.einsum("ijm,jkm->ikm", f.S, per_level(x, f.q)))


def _apply(problem: CrossedProblem, lambda_: Array, b: Array, *, transpose: bool = False) -> Array:
    """Λb (or Λ'b) over single effects."""
    out, place = np.empty_like(b), 0
    for f, lam in zip(problem.factors, problem.lambdas(lambda_), strict=True):
        rows = slice(place, place + f.size)
        place += f.size
        map_ = lam.T if transpose else lam
        if f.q == 1:
            np.multiply(b[rows], map_[0, 0], out=out[rows])
        else:
            out[rows] = np.einsum("ab,mbk->mak", map_, b[rows].reshape(f.levels, f.q, -1)).reshape(f.size, -1)
    return out
