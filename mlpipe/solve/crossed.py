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

import numpy as np
import scipy.sparse as sp

from . import small
from .kernel import Look, Point
from .link import Array


@dataclass(frozen=True)
class Factor:
    """One grouping factor: `S` (q, q, m) Z'wZ per level and `C` (q, p + 1, m) Z'w[X y]."""

    S: Array
    C: Array

    @property
    def q(self) -> int:
        """Random effects a level."""
        return len(self.S)

    @property
    def levels(self) -> int:
        """The number of levels m."""
        return self.S.shape[2]

    @property
    def size(self) -> int:
        """The number of random effects q m."""
        return self.q * self.levels


@dataclass(frozen=True)
class Cells:
    """Z_k'wZ_l of two factors: for each pair of levels that occurs, `rows` and `columns` (c,) and the block `values` (q_k, q_l, c)."""

    rows: np.ndarray
    columns: np.ndarray
    values: Array


@dataclass(frozen=True)
class CrossedProblem:
    """All a fit needs: `factors`, largest first; `cells` of pairs (k, l), k < l; `WW` (p + 1, p + 1) = [X y]'w[X y]; `n`, `sum_log_w`."""

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
    def offsets(self) -> list[int]:
        """Where each factor's part of Λ starts, and their end."""
        return [0, *np.cumsum([f.q for f in self.factors]).tolist()]

    @property
    def entries(self) -> tuple[tuple[int, int], ...]:
        """The free elements of Λ (over all factors), lower triangles by column, terms in order."""
        out, at = [], 0
        for sizes in self.terms:
            for k in sizes:
                out += [(at + i, at + j) for j in range(k) for i in range(j, k)]
                at += k
        return tuple(out)

    @property
    def degrees(self) -> float:
        """N or N - p."""
        return self.n - (self.p if self.reml else 0)

    @cached_property
    def typical(self) -> Array:
        """The mean Z'wZ of a level, block-diagonal over factors."""
        out = np.zeros((self.offsets[-1],) * 2)
        for f, a, b in zip(self.factors, self.offsets[:-1], self.offsets[1:], strict=True):
            out[a:b, a:b] = f.S.mean(axis=2)
        return out

    def lambdas(self, lambda_: Array) -> list[Array]:
        """Λ of each factor."""
        return [lambda_[a:b, a:b] for a, b in zip(self.offsets[:-1], self.offsets[1:], strict=True)]

    @cached_property
    def patterns(self) -> dict[tuple[int, int], tuple[sp.csr_matrix, np.ndarray]]:
        """For each pair: a CSR matrix of the cells' pattern over single effects, and the place of each of its values in `Cells.values`."""
        out = {}
        for (k, l), cells in self.cells.items():
            qk, ql = cells.values.shape[:2]
            i = (cells.rows[None, None] * qk + np.arange(qk)[:, None, None] + np.zeros((1, ql, 1), dtype=np.intp)).ravel()
            j = (cells.columns[None, None] * ql + np.arange(ql)[None, :, None] + np.zeros((qk, 1, 1), dtype=np.intp)).ravel()
            order = np.lexsort((j, i)) if qk * ql > 1 or not _sorted(cells) else np.arange(len(i))
            shape = (self.factors[k].size, self.factors[l].size)
            counts = np.bincount(i, minlength=shape[0])
            indptr = np.concatenate([[0], np.cumsum(counts)])
            pattern = sp.csr_matrix((np.ones(len(i)), j[order], indptr), shape=shape)
            out[k, l] = pattern, order
        return out

    def cross(self, pair: tuple[int, int], left: Array, right: Array) -> sp.csr_matrix:
        """left' (Z_k'wZ_l) right over single effects, left and right being one level's maps."""
        pattern, order = self.patterns[pair]
        values = np.einsum("ia,ijc,jb->abc", left, self.cells[pair].values, right, optimize=True)
        return sp.csr_matrix((values.ravel()[order], pattern.indices, pattern.indptr), shape=pattern.shape)


def _sorted(cells: Cells) -> bool:
    key = cells.rows.astype(np.int64) * (int(cells.columns.max(initial=0)) + 1) + cells.columns
    return bool((key[1:] > key[:-1]).all())


def flat(values: Array) -> Array:
    """(q, k, m) per level -> (m q, k) over single effects."""
    return np.ascontiguousarray(values.transpose(2, 0, 1).reshape(-1, values.shape[1]))


def per_level(values: Array, q: int) -> Array:
    """The inverse of `flat`: (m q, k) -> (q, k, m)."""
    return values.reshape(-1, q, values.shape[1]).transpose(1, 2, 0)


LEVELS_AT_ONCE = 4_096  # levels whose rows of V are multiplied by a dense inverse at once
INVERTIBLE = 1e-3  # diagonal of Λ, in units of what a level tells, from which Λ⁻¹ is safe

# -- M and its factor --------------------------------------------------------------------------------------------------


class Eliminated:
    """M with its first factor eliminated block by block: D = LL', V = L⁻¹A, and the rest S = M_22 - V'V."""

    def __init__(self, diagonals: list[Array], cross: dict[tuple[int, int], sp.csr_matrix], make: Callable[..., Rest]) -> None:
        self.q, self.size = len(diagonals[0]), diagonals[0].shape[0] * diagonals[0].shape[2]
        self.L = small.cholesky(diagonals[0])
        self.K = len(diagonals)
        self.V = [self._down(cross[0, l]) for l in range(1, self.K)]
        self.sizes = [self.size, *(d.shape[0] * d.shape[2] for d in diagonals[1:])]
        self.rest: Rest | None = make(self, diagonals[1:], {(k - 1, l - 1): a for (k, l), a in cross.items() if k > 0}) if self.K > 1 else None

    @property
    def logdet(self) -> float:
        """log|M|."""
        return float(small.logdet(self.L).sum()) + (self.rest.logdet if self.rest is not None else 0.0)

    def _down(self, a: sp.csr_matrix) -> sp.csr_matrix:
        """L⁻¹a for a sparse matrix with the factor's effects as rows."""
        if self.q == 1:
            return sp.csr_matrix((a.data / np.repeat(self.L[0, 0], np.diff(a.indptr)), a.indices, a.indptr), shape=a.shape)
        return sp.csr_matrix(_block_diagonal(small.inverse_factor(self.L)) @ a)

    def down(self, b: Array) -> Array:
        """L⁻¹b for b (size, k)."""
        return flat(small.forward(self.L, per_level(b, self.q)))

    def up(self, b: Array) -> Array:
        """L⁻ᵀb."""
        return flat(small.backward(self.L, per_level(b, self.q)))

    def times(self, x: Array) -> Array:
        """V x for x over the other factors."""
        out, at = np.zeros((self.size, x.shape[1])), 0
        for V in self.V:
            out += V @ x[at : at + V.shape[1]]
            at += V.shape[1]
        return out

    def transposed(self, y: Array) -> Array:
        """V'y."""
        return np.concatenate([V.T @ y for V in self.V])

    def solve(self, b: Array) -> Array:
        """M⁻¹b for b (size of all, k)."""
        y = self.down(b[: self.size])
        if self.rest is None:
            return self.up(y)
        x = self.rest.solve(b[self.size :] - self.transposed(y))
        return np.concatenate([self.up(y - self.times(x)), x])

    def inner(self, P: list[Array | None]) -> float:
        """Σ over levels of tr(P_k (M⁻¹)_ki,ki) for symmetric P_k (q_k, q_k) of each factor, None for zero."""
        return self._inner(P[0], [None if Q is None else _repeated(Q, size) for Q, size in zip(P[1:], self.sizes[1:], strict=True)], {})

    def inner_blocks(self, blocks: dict[int, Array], cross: dict[tuple[int, int], sp.csr_matrix]) -> float:
        """tr(M⁻¹P) for symmetric P with diagonal blocks (q_k, q_k, m_k) of some factors and `cross` blocks of pairs."""
        others = [_block_diagonal(blocks[k]) if k in blocks else None for k in range(1, self.K)]
        return self._inner(blocks.get(0), others, cross)

    def inverse_blocks(self) -> list[Array]:
        """The diagonal blocks (q_k, q_k, m_k) of M⁻¹ of every factor."""
        W = small.inverse_factor(self.L)
        if self.rest is None:
            return [np.einsum("kib,kjb->ijb", W, W)]
        V = sp.csr_matrix(sp.hstack(self.V))
        G = self.rest.inverse_on(abs(V).T @ abs(V))
        return [self._own(W, V, G), *self.rest.inverse_blocks()]

    def _own(self, W: Array, V: sp.csr_matrix, G: sp.csr_matrix | Array) -> Array:
        """L⁻ᵀ(I + V_i G V_i')L⁻¹ per level, G being the rest's inverse where V_i V_i' needs it."""
        inner = np.empty((self.q, self.q, W.shape[2]))
        for first in range(0, W.shape[2], LEVELS_AT_ONCE):
            rows = slice(first * self.q, (first + LEVELS_AT_ONCE) * self.q)
            part = V[rows]
            product = part @ G
            for a in range(self.q):
                for b in range(self.q):
                    both = part[a :: self.q].multiply(product[b :: self.q])
                    inner[a, b, first : first + LEVELS_AT_ONCE] = np.asarray(both.sum(axis=1)).ravel()
        inner += np.eye(self.q)[:, :, None]
        return np.einsum("kib,klb,ljb->ijb", W, inner, W)

    def _inner(
        self, own: Array | sp.csr_matrix | None, diagonals: list[sp.csr_matrix | None], cross: dict[tuple[int, int], sp.csr_matrix]
    ) -> float:
        """tr(M⁻¹P) for P with blocks `own` of the first factor, `diagonals` of the others and `cross` (k, l) of pairs, k < l."""
        total = 0.0
        middle: sp.csr_matrix | None = None  # L⁻¹ P_11 L⁻ᵀ
        if own is not None:
            W = small.inverse_factor(self.L)
            if isinstance(own, np.ndarray):
                blocks = np.einsum("iab,ac,jcb->ijb", W, own, W) if own.ndim == 2 else np.einsum("iab,acb,jcb->ijb", W, own, W)
                total += float(np.einsum("iib->", blocks))
                middle = _block_diagonal(blocks)
            else:
                lower = _block_diagonal(W)
                middle = sp.csr_matrix(lower @ own @ lower.T)
                total += float(middle.diagonal().sum())
        if self.rest is None:
            return total
        return total + self.rest.inner_sparse(self._reduced(middle, diagonals, cross))

    def _reduced(
        self, middle: sp.csr_matrix | None, diagonals: list[sp.csr_matrix | None], cross: dict[tuple[int, int], sp.csr_matrix]
    ) -> dict[tuple[int, int], sp.csr_matrix]:
        """P_rr + V' middle V - (V'L⁻¹P_1r + its transpose), by pairs of the other factors."""
        out: dict[tuple[int, int], sp.csr_matrix] = {}
        down = {l: self._down(a) for (k, l), a in cross.items() if k == 0}
        for k in range(1, self.K):
            for l in range(k, self.K):
                part: sp.csr_matrix | None = diagonals[k - 1] if k == l else cross.get((k, l))
                Vk, Vl = self.V[k - 1], self.V[l - 1]
                if middle is not None:
                    part = _plus(part, Vk.T @ (middle @ Vl))
                if l in down:
                    part = _plus(part, -(Vk.T @ down[l]))
                if k in down:
                    part = _plus(part, -(down[k].T @ Vl))
                if part is not None:
                    out[k - 1, l - 1] = sp.csr_matrix(part)
        return out


class Dense:
    """The rest as one dense matrix."""

    def __init__(self, S: Array) -> None:
        from scipy.linalg import cho_factor

        self.factor = cho_factor(S, lower=True, overwrite_a=True, check_finite=False)
        self.offsets: list[int] = []
        self.widths: list[int] = []

    @property
    def logdet(self) -> float:
        """log|S|."""
        return float(2.0 * np.log(np.diag(self.factor[0])).sum())

    def solve(self, b: Array) -> Array:
        """S⁻¹b."""
        from scipy.linalg import cho_solve

        return np.asarray(cho_solve(self.factor, b, check_finite=False))

    @cached_property
    def inverse(self) -> Array:
        """S⁻¹."""
        from scipy.linalg.lapack import dpotri

        lower, _ = dpotri(self.factor[0], lower=1)
        return np.asarray(np.tril(lower) + np.tril(lower, -1).T)

    def inverse_on(self, pattern: sp.csr_matrix) -> Array:
        """S⁻¹, whole."""
        return self.inverse

    def inverse_blocks(self) -> list[Array]:
        """The diagonal blocks of S⁻¹ of every factor."""
        out = []
        for first, last, q in zip(self.offsets[:-1], self.offsets[1:], self.widths, strict=True):
            at = np.arange(first, last).reshape(-1, q)
            out.append(self.inverse[at[:, :, None], at[:, None, :]].transpose(1, 2, 0))
        return out

    def inner_sparse(self, P: dict[tuple[int, int], sp.csr_matrix]) -> float:
        """tr(S⁻¹P) for P by pairs of factors."""
        total = 0.0
        for (k, l), block in P.items():
            coo = block.tocoo()
            values = self.inverse[coo.row + self.offsets[k], coo.col + self.offsets[l]]
            total += (1.0 if k == l else 2.0) * float(values @ coo.data)
        return total


class Next(Eliminated):
    """A further factor that stays block-diagonal."""

    def inverse_on(self, pattern: sp.csr_matrix) -> sp.csr_matrix:
        """The inverse where `pattern` has entries, which must be among those of the rest of an elimination."""
        W = small.inverse_factor(self.L)
        own_only = self.rest is None
        if own_only:
            return _block_diagonal(np.einsum("kib,kjb->ijb", W, W))
        V = sp.csr_matrix(sp.hstack(self.V))
        G = self.rest.inverse_on(abs(V).T @ abs(V) + abs(pattern[self.size :, self.size :]))  # type: ignore[union-attr]
        B = -(_block_diagonal(W.transpose(1, 0, 2)) @ V) @ G
        own = _block_diagonal(self._own(W, V, G))
        whole = sp.csr_matrix(sp.block_array([[own, sp.csr_matrix(B)], [sp.csr_matrix(B).T, sp.csr_matrix(G)]]))
        return sp.csr_matrix(whole.multiply(pattern != 0))

    def inner_sparse(self, P: dict[tuple[int, int], sp.csr_matrix]) -> float:
        """tr(S⁻¹P) for P by pairs of factors."""
        diagonals: list[sp.csr_matrix | None] = [P.get((k, k)) for k in range(1, self.K)]
        return self._inner(P.get((0, 0)), diagonals, {pair: a for pair, a in P.items() if pair[0] != pair[1]})


Rest = Dense | Next


def _plus(a: sp.csr_matrix | None, b: sp.csr_matrix) -> sp.csr_matrix:
    return b if a is None else a + b


def _repeated(P: Array, size: int) -> sp.csr_matrix:
    """P on the diagonal, once a level."""
    return sp.csr_matrix(sp.kron(sp.identity(size // len(P)), P, format="csr"))


def _block_diagonal(blocks: Array) -> sp.csr_matrix:
    """Blocks (q, q, m) as one sparse matrix."""
    q, _, m = blocks.shape
    if q == 1:
        return sp.csr_matrix(sp.diags_array(blocks[0, 0]))
    return sp.csr_matrix(sp.bsr_matrix((blocks.transpose(2, 0, 1), np.arange(m), np.arange(m + 1))))


def _blocks_of(a: sp.csr_matrix, q: int) -> Array | None:
    """The diagonal blocks (q, q, m) of a matrix that has no others, else None."""
    coo = a.tocoo()
    level = coo.row // q
    if (coo.col // q != level)[coo.data != 0.0].any():
        return None
    out = np.zeros((q, q, a.shape[0] // q))
    np.add.at(out, (coo.row % q, coo.col % q, level), coo.data)
    return out


def eliminate(diagonals: list[Array], cross: dict[tuple[int, int], sp.csr_matrix]) -> Eliminated:
    """M factored: diagonal blocks (q_k, q_k, m_k) and cross blocks by pairs, the factors in the order given."""
    return Eliminated(diagonals, cross, _rest)


def _rest(first: Eliminated, diagonals: list[Array], cross: dict[tuple[int, int], sp.csr_matrix]) -> Rest:
    """What is left: the next factor eliminated too where it stays block-diagonal, else dense."""
    V = first.V
    left: list[Array] = []
    for k, D in enumerate(diagonals):
        blocks = _blocks_of(sp.csr_matrix(V[k].T @ V[k]), len(D)) if not left or len(left) == k else None
        if blocks is None:
            break
        left.append(D - blocks)
    if left:  # at least the next one: those that would fill in are dense further down
        reduced = {(k, l): sp.csr_matrix(a - V[k].T @ V[l]) for (k, l), a in cross.items()}
        if len(left) == len(diagonals):
            return Next(left, reduced, _rest)
    return _dense(V, diagonals, cross)


def _dense(V: list[sp.csr_matrix], diagonals: list[Array], cross: dict[tuple[int, int], sp.csr_matrix]) -> Dense:
    offsets = np.concatenate([[0], np.cumsum([d.shape[0] * d.shape[2] for d in diagonals])]).tolist()
    S = np.zeros((offsets[-1],) * 2)
    for k, D in enumerate(diagonals):
        for l in range(k, len(diagonals)):
            block = _block_diagonal(D) if k == l else cross[k, l]
            at = slice(offsets[k], offsets[k + 1]), slice(offsets[l], offsets[l + 1])
            S[at] = (block - V[k].T @ V[l]).toarray()
            if k != l:
                S[at[::-1]] = S[at].T
    out = Dense(S)
    out.offsets, out.widths = offsets, [len(D) for D in diagonals]
    return out


# -- likelihood, score, average information ----------------------------------------------------------------------------


@dataclass
class Evaluation:
    """The likelihood at Λ: `loglik`, `beta` (p,), `s2`, `C` (p, p) = (X'V⁻¹X)⁻¹ in units of s2, modes `u` over single effects."""

    loglik: float
    beta: Array
    s2: float
    C: Array
    u: Array
    M: Eliminated


class Exact:
    """A `scan` for the search of `glmm.solve_glmm`: profiled log-likelihood, its score by Λ, and the average information."""

    def __init__(self, problem: CrossedProblem) -> None:
        self.problem = problem
        self.identity = [np.eye(f.q) for f in problem.factors]
        self.plain = {pair: problem.cross(pair, self.identity[pair[0]], self.identity[pair[1]]) for pair in problem.cells}

    def __call__(self, points: Sequence[Point], main: bool) -> list[Look]:
        return [self.look(point.lambda_) for point in points]

    def factored(self, lambda_: Array) -> Eliminated:
        """M at Λ."""
        problem = self.problem
        lams = problem.lambdas(lambda_)
        diagonals = [np.eye(f.q)[:, :, None] + np.einsum("ia,ijm,jb->abm", lam, f.S, lam) for f, lam in zip(problem.factors, lams, strict=True)]
        return eliminate(diagonals, {(k, l): problem.cross((k, l), lams[k], lams[l]) for k, l in problem.cells})

    def stays_sparse(self) -> bool:
        """Whether elimination meets no dense rest: each level of a factor meets at most one of each later factor (nested designs)."""
        return all(len(np.unique(cells.rows)) == len(cells.rows) for cells in self.problem.cells.values())

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
        minus2 = M.logdet - problem.sum_log_w + dof * (1.0 + math.log(2.0 * math.pi * s2))
        minus2 += 2.0 * float(np.log(np.abs(np.diag(R)[:p])).sum()) if problem.reml else 0.0
        inverse = np.linalg.inv(R[:p, :p]) if p else np.zeros((0, 0))
        return Evaluation(-minus2 / 2.0, beta, s2, inverse @ inverse.T, U[:, p] - U[:, :p] @ beta, M), U

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

    def residual(self, lambda_: Array, at: Evaluation) -> Array:
        """t = Z'V⁻¹r (all effects,) from the estimates."""
        p, rhs = self.problem.p, np.concatenate([flat(f.C) for f in self.problem.factors])
        return np.asarray(rhs[:, p] - rhs[:, :p] @ at.beta - self.times(_apply(self.problem, lambda_, at.u[:, None]))[:, 0])

    def times(self, b: Array) -> Array:
        """Z'wZ b for b (all effects, k)."""
        problem = self.problem
        ends = np.concatenate([[0], np.cumsum([f.size for f in problem.factors])])
        parts = [b[a:e] for a, e in zip(ends[:-1], ends[1:], strict=True)]
        out = [flat(np.einsum("ijm,jkm->ikm", f.S, per_level(part, f.q))) for f, part in zip(problem.factors, parts, strict=True)]
        for (k, l), a in self.plain.items():
            out[k] = out[k] + a @ parts[l]
            out[l] = out[l] + a.T @ parts[k]
        return np.concatenate(out)

    def score(self, lambda_: Array, at: Evaluation, U: Array, t: Array, H: Array) -> Array:
        """∂ℓ/∂Λ by the entries: -tril[Σ Z'wZΛM⁻¹ - Σ t u'/s² - [REML] Σ H C Ĥ'] (R5, first form where Λ is singular)."""
        return self.score_from(at, U, t, H, self.traces(lambda_, at.M))

    def score_from(self, at: Evaluation, U: Array, t: Array, H: Array, traces: list[Array]) -> Array:
        """The score by the entries from T_k of every factor."""
        problem, p = self.problem, self.problem.p
        out, place = [], 0
        for k, f in enumerate(problem.factors):
            rows = slice(place, place + f.size)
            place += f.size
            tk, uk = t[rows].reshape(-1, f.q), at.u[rows].reshape(-1, f.q)
            G = traces[k] - tk.T @ uk / at.s2
            if problem.reml and p:
                Hk, Uk = H[rows].reshape(-1, f.q, p), U[rows, :p].reshape(-1, f.q, p)
                G = G - np.einsum("iap,pr,ibr->ab", Hk, at.C, Uk)
            out.append(-G)
        full = np.zeros((problem.offsets[-1],) * 2)
        for G, a, b in zip(out, problem.offsets[:-1], problem.offsets[1:], strict=True):
            full[a:b, a:b] = G
        return np.array([full[i, j] for i, j in problem.entries])

    def traces(self, lambda_: Array, M: Eliminated) -> list[Array]:
        """T_k = Σ_i (Z'wZΛM⁻¹)_ki,ki, from Λ_k'T_k = m_k I - Σ_i (M⁻¹)_ki,ki where Λ_k is safely invertible."""
        out = []
        for k, (f, lam) in enumerate(zip(self.problem.factors, self.problem.lambdas(lambda_), strict=True)):
            diagonal = np.abs(np.diag(lam)) * np.sqrt(np.diag(self.problem.typical)[slice(*self.problem.offsets[k : k + 2])])
            if diagonal.min() < INVERTIBLE:
                out.append(self._direct(lambda_, M, k))
                continue
            sums = np.zeros((f.q, f.q))
            for a in range(f.q):
                for b in range(a + 1):
                    P = np.zeros((f.q, f.q))
                    P[a, b] = P[b, a] = 1.0 if a == b else 0.5
                    every: list[Array | None] = [None] * len(self.problem.factors)
                    every[k] = P
                    sums[a, b] = sums[b, a] = M.inner(every)
            out.append(np.linalg.solve(lam.T, f.levels * np.eye(f.q) - sums))
        return out

    def _direct(self, lambda_: Array, M: Eliminated, k: int) -> Array:
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
        return np.asarray((AI / (2.0 * at.s2) - np.outer(cross, cross) / (2.0 * dof * at.s2**2)))

    def working(self, lambda_: Array, at: Evaluation, t: Array) -> Array:
        """g_D = D u + Λ D't for each entry D of Λ, over single effects (all effects, entries)."""
        problem, place, columns = self.problem, 0, []
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
        del place
        return np.column_stack(columns) if columns else np.zeros((int(starts[-1]), 0))


def _apply(problem: CrossedProblem, lambda_: Array, b: Array, *, transpose: bool = False) -> Array:
    """Λb (or Λ'b) over single effects."""
    out, place = np.empty_like(b), 0
    for f, lam in zip(problem.factors, problem.lambdas(lambda_), strict=True):
        rows = slice(place, place + f.size)
        place += f.size
        map_ = lam.T if transpose else lam
        out[rows] = np.einsum("ab,mbk->mak", map_, b[rows].reshape(f.levels, f.q, -1)).reshape(f.size, -1)
    return out
