"""M of a crossed model applied, never formed: its Schur complement, and conjugate gradients side by side (FORMULAS R6)."""
from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import scipy.sparse as sp

from . import small
from .crossed import CrossedProblem, flat, per_level

Array: TypeAlias = np.ndarray  # of doubles or of singles

MAX_CG = 2_000


@dataclass
class Solves:
    """Columns solved side by side: `x`; and per column the coefficients of conjugate gradients, for Lanczos' tridiagonal matrix."""

    x: Array
    alphas: list[Array] = field(default_factory=list)
    betas: list[Array] = field(default_factory=list)


class Crosses:
    """Z_k'wZ_l of all pairs over single effects, and their transposes, in one precision: what no Λ changes."""

    def __init__(self, plain: dict[tuple[int, int], sp.csr_matrix], kind: type) -> None:
        self.kind = kind
        self.of = {pair: a.astype(kind) for pair, a in plain.items()}
        self.turned = {pair: sp.csr_matrix(a.T) for pair, a in self.of.items()}


class Operator:
    """M at one Λ: LL' the first factor's blocks, S = M_22 - V'V with V = L⁻¹Λ'(Z'wZ)Λ never formed, B = RR' the diagonal blocks of S."""

    def __init__(self, problem: CrossedProblem, lambda_: Array, crosses: Crosses, threads: int) -> None:
        self.problem, self.crosses, self.threads = problem, crosses, threads
        self.lams = problem.lambdas(lambda_)
        self.D = [
            np.eye(f.q)[:, :, None] + np.einsum("ia,ijm,jb->abm", lam, f.S, lam) for f, lam in zip(problem.factors, self.lams, strict=True)
        ]
        self.L, self.size = small.cholesky(self.D[0]), problem.factors[0].size
        self.ends = np.concatenate([[0], np.cumsum([f.size for f in problem.factors[1:]])])
        self.cells = {h: self._cells(h) for h in range(1, len(self.D))}
        self.B = [block - self._gram(h) for h, block in enumerate(self.D[1:], start=1)]
        self.R = [small.cholesky(block) for block in self.B]

    def single(self, crosses: Crosses) -> Operator:
        """The same in single precision."""
        out = copy(self)
        out.crosses, kind = crosses, crosses.kind
        out.lams, out.D, out.B, out.R = ([a.astype(kind) for a in part] for part in (self.lams, self.D, self.B, self.R))
        out.L = self.L.astype(kind)
        return out

    def _cells(self, h: int) -> Array:
        """The blocks (q_0, q_l, c) of V, cell by cell."""
        cells = self.problem.cells[0, h]
        mapped = np.einsum("ia,ijc,jb->abc", self.lams[0], cells.values, self.lams[h], optimize=True)
        return small.forward(self.L[:, :, cells.rows], mapped)

    def _gram(self, h: int) -> Array:
        """The diagonal blocks (q, q, m) of V'V of one factor."""
        V, columns, m = self.cells[h], self.problem.cells[0, h].columns, self.problem.factors[h].levels
        q = V.shape[1]
        out = np.empty((q, q, m))
        for a in range(q):
            for b in range(a + 1):
                out[a, b] = out[b, a] = np.bincount(columns, np.einsum("ic,ic->c", V[:, a], V[:, b]), minlength=m)
        return out

    def parts(self, x: Array) -> list[Array]:
        """x over the other factors, factor by factor."""
        return [x[a:b] for a, b in zip(self.ends[:-1], self.ends[1:], strict=True)]

    def times(self, x: Array) -> Array:
        """V x."""
        total = sum(self.crosses.of[0, h] @ _mapped(self.lams[h], part) for h, part in enumerate(self.parts(x), start=1))
        return self.down(_mapped(self.lams[0].T, np.asarray(total)))

    def transposed(self, y: Array) -> Array:
        """V'y."""
        y = _mapped(self.lams[0], self.up(y))
        return np.concatenate([_mapped(self.lams[h].T, self.crosses.turned[0, h] @ y) for h in range(1, len(self.D))])

    def rest(self, x: Array) -> Array:
        """S x."""
        parts = self.parts(x)
        own = [_blockwise(D, part) for D, part in zip(self.D[1:], parts, strict=True)]
        for (k, h), a in self.crosses.of.items():
            if k > 0:
                own[k - 1] = own[k - 1] + _mapped(self.lams[k].T, a @ _mapped(self.lams[h], parts[h - 1]))
                own[h - 1] = own[h - 1] + _mapped(self.lams[h].T, self.crosses.turned[k, h] @ _mapped(self.lams[k], parts[k - 1]))
        return np.asarray(np.concatenate(own) - self.transposed(self.times(x)))

    def by_blocks(self, work: Callable[[Array, Array], Array], x: Array) -> Array:
        """A small-matrix function of R and x, level by level."""
        return np.concatenate([_levelwise(work, R, part) for R, part in zip(self.R, self.parts(x), strict=True)])

    def precondition(self, x: Array) -> Array:
        """B⁻¹x."""
        return self.by_blocks(small.solve, x)

    def down(self, b: Array) -> Array:
        """L⁻¹b over the first factor."""
        return _levelwise(small.forward, self.L, b)

    def up(self, b: Array) -> Array:
        """L⁻ᵀb."""
        return _levelwise(small.backward, self.L, b)

    def solve_rest(self, b: Array, tol: float, start: Array | None = None, *, keep: bool = False) -> Solves:
        """S⁻¹b by preconditioned conjugate gradients on each column, in threads over columns; `keep` their coefficients."""
        if self.threads == 1 or b.shape[1] < 4:
            return self._cg(b, tol, start, keep)
        split = np.array_split(np.arange(b.shape[1]), self.threads)
        with ThreadPoolExecutor(self.threads) as pool:
            parts = list(
                pool.map(lambda at: self._cg(np.ascontiguousarray(b[:, at]), tol, None if start is None else start[:, at], keep), split)
            )
        out = Solves(np.hstack([part.x for part in parts]))
        longest = max(len(part.alphas) for part in parts)
        for name in ("alphas", "betas"):
            columns = [_padded(getattr(part, name), longest, part.x.shape[1]) for part in parts]
            setattr(out, name, list(np.hstack(columns)) if longest else [])
        return out

    def _cg(self, b: Array, tol: float, start: Array | None, keep: bool) -> Solves:
        x = np.zeros_like(b) if start is None else np.ascontiguousarray(start, dtype=b.dtype).copy()
        r = b - self.rest(x) if start is not None else b.copy()
        z = self.precondition(r)
        p, rz = z.copy(), dots(r, z)
        bound = tol**2 * np.maximum(dots(b, self.precondition(b)), 1e-300)
        out = Solves(x)
        for _ in range(MAX_CG):
            live = rz > bound
            if not live.any():
                break
            Ap = self.rest(p)
            curvature = dots(p, Ap)
            alpha = np.where(live & (curvature > 0.0), rz / np.where(curvature > 0.0, curvature, 1.0), 0.0)
            x += p * alpha.astype(b.dtype)
            r -= Ap * alpha.astype(b.dtype)
            z = self.precondition(r)
            new = dots(r, z)
            beta = np.where(live, new / np.where(rz > 0.0, rz, 1.0), 0.0)
            if keep:
                out.alphas.append(alpha)
                out.betas.append(beta)
            p *= beta.astype(b.dtype)
            p += z
            rz = np.where(live, new, rz)
        return out

    def solve(self, b: Array, tol: float) -> Array:
        """M⁻¹b."""
        y = self.down(b[: self.size])
        x = self.solve_rest(b[self.size :] - self.transposed(y), tol).x
        return np.concatenate([self.up(y - self.times(x)), x])


def dots(a: Array, b: Array) -> Array:
    """Inner products (k,), column by column, in double precision."""
    return np.asarray(np.einsum("ik,ik->k", a, b, dtype=np.float64))


def _padded(rows: list[Array], longest: int, width: int) -> Array:
    return np.vstack([*rows, *(np.zeros(width) for _ in range(longest - len(rows)))]) if longest else np.zeros((0, width))


def _mapped(map_: Array, x: Array) -> Array:
    """map_ applied to the effects of each level of x (m q, k)."""
    q = len(map_)
    if q == 1:
        return np.asarray(x * map_[0, 0])
    return np.asarray(np.einsum("ab,mbk->mak", map_, x.reshape(-1, q, x.shape[1])).reshape(x.shape))


def _blockwise(D: Array, x: Array) -> Array:
    """Blocks D (q, q, m) times x (m q, k)."""
    if len(D) == 1:
        return np.asarray(x * D[0, 0][:, None])
    return flat(np.einsum("ijm,jkm->ikm", D, per_level(x, len(D))))


def _levelwise(work: Callable[[Array, Array], Array], R: Array, x: Array) -> Array:
    """A function of triangular blocks R (q, q, m) and x (m q, k) by levels."""
    if len(R) == 1:
        return np.asarray(work(R[:, :, :, None], x[None])[0])
    return flat(work(R, per_level(x, len(R))))
