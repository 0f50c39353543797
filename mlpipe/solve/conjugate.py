"""M of a crossed model applied, never formed: its Schur complement, and conjugate gradients side by side (FORMULAS R6)."""
from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from . import small
from .crossed import CrossedProblem, flat, per_level
from .crosses import Crosses

Array: TypeAlias = np.ndarray  # of doubles or of singles

MAX_CG = 2_000
STAGNANT = 30  # iterations without a smaller residual, after which rounding is all there is


@dataclass
class Solves:
    """Columns solved side by side: `x`; and per column the coefficients of conjugate gradients, for Lanczos' tridiagonal matrix;
    `iterations` of all together."""

    x: Array
    alphas: list[Array] = field(default_factory=list)
    betas: list[Array] = field(default_factory=list)
    iterations: int = 0

    def quadrature(self, k: int) -> float:
        """Σ τ² log λ of the Lanczos matrix of column k's conjugate gradients (R6)."""
        alphas = np.array([a[k] for a in self.alphas])
        used = int((alphas > 0.0).sum())
        if used == 0:
            return 0.0
        alphas, betas = alphas[:used], np.array([b[k] for b in self.betas])[:used]
        diagonal = 1.0 / alphas
        diagonal[1:] += betas[:-1] / alphas[:-1]
        off = np.sqrt(np.maximum(betas[:-1], 0.0)) / alphas[:-1]
        values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(off, 1) + np.diag(off, -1))
        return float((vectors[0] ** 2) @ np.log(np.maximum(values, 1e-300)))


class Operator:
    """M at one Λ: LL' the first factor's blocks D_0; S = M_22 - V'V with V = L⁻¹Λ'(Z'wZ)Λ, never formed; B = RR', S's diagonal blocks."""

    def __init__(self, problem: CrossedProblem, lambda_: Array, crosses: Crosses) -> None:
        self.problem, self.crosses = problem, crosses
        self.lams = problem.lambdas(lambda_)
        self.D = [
            np.eye(f.q)[:, :, None] + np.einsum("ia,ijm,jb->abm", lam, f.S, lam) for f, lam in zip(problem.factors, self.lams, strict=True)
        ]
        self.L, self.size = small.cholesky(self.D[0]), problem.factors[0].size
        self.ends = np.concatenate([[0], np.cumsum([f.size for f in problem.factors[1:]])])
        half = self._half()  # Λ_0 L⁻ᵀ
        K = np.einsum("iam,jam->ijm", half, half)
        self.B = [block - self._gram(h, K) for h, block in enumerate(self.D[1:], start=1)]
        self.R = [small.cholesky(block) for block in self.B]

    def single(self, crosses: Crosses) -> Operator:
        """The same in single precision."""
        out = copy(self)
        kind: type = np.float32
        out.crosses, out.L = crosses, self.L.astype(kind)
        out.lams, out.D, out.B, out.R = ([a.astype(kind) for a in part] for part in (self.lams, self.D, self.B, self.R))
        return out

    def _half(self) -> Array:
        inverse = small.inverse_factor(self.L)
        return np.asarray(np.einsum("ia,bam->ibm", self.lams[0], inverse))

    def _gram(self, h: int, K: Array) -> Array:
        """The diagonal blocks (q, q, m) of V'V of one factor, K being Λ_0 D_0⁻¹Λ_0'."""
        lam, inner = self.lams[h], self.crosses.squares((0, h), K, by_row=False)
        return np.asarray(np.einsum("ia,ijm,jb->abm", lam, inner, lam))

    def expected(self) -> Array:
        """Σ_i of the blocks of L⁻ᵀV B⁻¹ V'L⁻¹ (q_0, q_0): what B⁻¹ in place of S⁻¹ tells of M⁻¹'s first blocks."""
        out, half = np.zeros((len(self.L), len(self.L))), self._half()
        own = np.einsum("iam,jam->ijm", small.inverse_factor(self.L).transpose(1, 0, 2), half)  # D_0⁻¹Λ_0'
        for h, R in enumerate(self.R, start=1):
            outer = np.einsum("ia,bam->ibm", self.lams[h], small.inverse_factor(R))
            E = np.einsum("iam,jam->ijm", outer, outer)
            out += np.einsum("aim,ijm,bjm->ab", own, self.crosses.squares((0, h), E, by_row=True), own, optimize=True)
        return out

    def parts(self, x: Array) -> list[Array]:
        """x over the other factors, factor by factor."""
        return [x[a:b] for a, b in zip(self.ends[:-1], self.ends[1:], strict=True)]

    def times(self, x: Array) -> Array:
        """V x."""
        total = sum(self.crosses.times(0, h, _mapped(self.lams[h], part)) for h, part in enumerate(self.parts(x), start=1))
        return self.down(_mapped(self.lams[0].T, np.asarray(total)))

    def transposed(self, y: Array) -> Array:
        """V'y."""
        y = _mapped(self.lams[0], self.up(y))
        return np.concatenate([_mapped(self.lams[h].T, self.crosses.times(h, 0, y)) for h in range(1, len(self.D))])

    def rest(self, x: Array) -> Array:
        """S x."""
        parts = self.parts(x)
        own = [_blockwise(D, part) for D, part in zip(self.D[1:], parts, strict=True)]
        for k, h in self.crosses.patterns:
            if k > 0:
                own[k - 1] = own[k - 1] + _mapped(self.lams[k].T, self.crosses.times(k, h, _mapped(self.lams[h], parts[h - 1])))
                own[h - 1] = own[h - 1] + _mapped(self.lams[h].T, self.crosses.times(h, k, _mapped(self.lams[k], parts[k - 1])))
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
        """S⁻¹b by preconditioned conjugate gradients on each column, side by side; `keep` their coefficients."""
        x = np.zeros_like(b) if start is None else start.astype(b.dtype)
        r = b.copy() if start is None else b - self.rest(x)
        z = self.precondition(r)
        p, rz = z.copy(), dots(r, z)
        bound = tol**2 * np.maximum(dots(b, self.precondition(b)), 1e-300)
        out, least, stagnant = Solves(x), rz.copy(), 0
        while out.iterations < MAX_CG and stagnant < STAGNANT:
            live = rz > bound
            if not live.any():
                break
            out.iterations += 1
            Ap = self.rest(p)
            curvature = dots(p, Ap)
            alpha = np.where(live & (curvature > 0.0), rz / np.where(curvature > 0.0, curvature, 1.0), 0.0)
            x += p * alpha.astype(b.dtype)
            Ap *= alpha.astype(b.dtype)
            r -= Ap
            z = self.precondition(r)
            new = dots(r, z)
            beta = np.where(live, new / np.where(rz > 0.0, rz, 1.0), 0.0)
            if keep:
                out.alphas.append(alpha)
                out.betas.append(beta)
            p *= beta.astype(b.dtype)
            p += z
            rz = np.where(live, new, rz)
            stagnant = 0 if (rz[live] < 0.9 * least[live]).any() else stagnant + 1
            least = np.minimum(least, rz)
        return out

    def logdet(self, solver: Operator, probes: Array, tol: float) -> tuple[float, float]:
        """log|M| and its Monte Carlo error by Lanczos quadrature of `solver` (this, or it in singles), p'S̃p as control variate (R6)."""
        size, columns = probes.shape
        solved = solver.solve_rest(solver.by_blocks(small.multiply, probes), tol, keep=True)
        scaled = solver.by_blocks(small.forward, solver.rest(solver.by_blocks(small.backward, probes)))
        excess = dots(scaled, probes) - size
        logs = np.array([size * solved.quadrature(k) for k in range(columns)])
        slope = float(logs @ excess / max(excess @ excess, 1e-300)) if columns > 2 else 1.5
        values = logs - slope * excess
        known = float(small.logdet(self.L).sum()) + sum(float(small.logdet(R).sum()) for R in self.R)
        return known + float(values.mean()), float(values.std(ddof=1) / math.sqrt(columns))

    def solve(self, b: Array, tol: float, start: Array | None = None) -> Array:
        """M⁻¹b; `start`: of the factors other than the first."""
        y = self.down(b[: self.size])
        x = self.solve_rest(b[self.size :] - self.transposed(y), tol, start).x
        return np.concatenate([self.up(y - self.times(x)), x])


def dots(a: Array, b: Array) -> Array:
    """Inner products (k,), column by column, in double precision."""
    return np.asarray(np.einsum("ik,ik->k", a, b, dtype=np.float64))


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
