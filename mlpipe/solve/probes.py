"""M = Λ'Z'WZΛ + I of weights that change, applied and never formed: solves by conjugate gradients, and what probes tell of its inverse
(FORMULAS R5, R6; Hutchinson 1990; Ubaru, Chen and Saad 2017).

The inverse of the rest S = M_22 - V'V is B⁻¹, its diagonal blocks', and what probes show of S⁻¹ - B⁻¹: only that has Monte Carlo error.
"""
from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import scipy.sparse as sp

from . import small
from .coded_rows import Factored, JointProblem, Spread, Weights, spread_of
from .conjugate import Operator
from .crossed import CrossedProblem, Factor
from .crosses import Cross, Crosses
from .link import Array
from .meetings import Inverse

PROBES = 16
CG_TIGHT, CG_LOOSE = 1e-8, 1e-4  # residual over right-hand side: of modes and, near the solution, of probes; on the way
MOST_WORK = 3e9  # operations of one factoring (an evaluation takes about three) above which conjugate gradients are faster


class _Weighted(Crosses):
    """The products of the operator, at some weights."""

    def __init__(self, problem: JointProblem, weights: Weights, pool: ThreadPoolExecutor | None, threads: int) -> None:
        whole = {pair: pattern.matrix(weights.cells[pair]) for pair, pattern in problem.pairs.items()}
        self.pool, self.values = pool, weights.cells
        self.patterns = {pair: pattern.over_levels for pair, pattern in problem.pairs.items()}
        self.forward = {pair: Cross.of(a, threads) for pair, a in whole.items()}
        self.backward = {pair: Cross.of(sp.csr_matrix(a.T), threads) for pair, a in whole.items()}


class Iterated:
    """M at some weights, applied and never formed, with the probes' solutions: x = S⁻¹Rp and g = R⁻ᵀp over the other factors."""

    def __init__(self, solver: Probed, problem: JointProblem, lambda_: Array, weights: Weights) -> None:
        factors = tuple(Factor(S, np.zeros((len(S), 1, S.shape[2]))) for S in weights.S)
        levels = CrossedProblem(factors, {}, np.zeros((1, 1)), 1.0, 0.0, False, problem.terms)
        self.operator = Operator(levels, lambda_, _Weighted(problem, weights, solver.pool, solver.threads))
        self.solver, self.pairs, self.weights = solver, problem.pairs, weights
        if not all(np.isfinite(part).all() for part in (self.operator.L, *self.operator.R)):
            raise np.linalg.LinAlgError("not positive definite")

    @property
    def logdet(self) -> float:
        """log|M| by Lanczos quadrature."""
        return self.lanczos()[0]

    def solve(self, b: Array) -> Array:
        """M⁻¹b."""
        return self.operator.solve(b, CG_TIGHT)

    def full(self, x: Array) -> Array:
        """[-L⁻ᵀVx; x], for x over the other factors."""
        M = self.operator
        return np.concatenate([-M.up(M.times(x)), x])

    def probed(self, tol: float) -> tuple[Array, Array]:
        """g, and x - g, over all factors."""
        M, solver = self.operator, self.solver
        g = M.by_blocks(small.backward, solver.probes)
        x = M.solve_rest(M.by_blocks(small.multiply, solver.probes), tol, solver.warm).x
        solver.warm = x
        return self.full(g), self.full(x - g)

    def known(self) -> Inverse:
        """M⁻¹ with B⁻¹ in the place of S⁻¹, on diagonal blocks and cells."""
        M = self.operator
        W = small.inverse_factor(M.L)
        inner, blocks, cells = np.eye(len(W))[:, :, None] + np.zeros_like(W), [], {}
        for h, R in enumerate(M.R, start=1):
            at = self.pairs[0, h]
            mapped = np.einsum("ia,ijc,jb->abc", M.lams[0], self.weights.cells[0, h], M.lams[h], optimize=True)
            V = small.forward(M.L[:, :, at.rows], mapped)
            inverse = small.inverse_factor(R)
            own = np.einsum("kam,kbm->abm", inverse, inverse)
            VB = np.einsum("iac,abc->ibc", V, own[:, :, at.columns])
            for a in range(len(W)):
                for b in range(len(W)):
                    inner[a, b] += np.bincount(at.rows, np.einsum("ac,ac->c", V[a], VB[b]), minlength=W.shape[2])
            blocks.append(own)
            cells[0, h] = -small.backward(M.L[:, :, at.rows], VB)
        cells |= {(k, h): np.zeros_like(values) for (k, h), values in self.weights.cells.items() if k > 0}
        return Inverse([np.einsum("kib,klb,ljb->ijb", W, inner, W), *blocks], cells)

    def lanczos(self) -> tuple[float, float]:
        """log|M| and its Monte Carlo error."""
        return self.operator.logdet(self.operator, self.solver.probes, CG_TIGHT)


@dataclass
class Probed:
    """A `Solver` by conjugate gradients and Rademacher probes (all of the other factors' effects, k)."""

    size: int
    seed: int
    threads: int
    tol: float = CG_LOOSE
    warm: Array | None = None
    probes: Array = field(init=False)
    pool: ThreadPoolExecutor | None = field(init=False)
    rng: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.pool = ThreadPoolExecutor(self.threads) if self.threads > 1 else None
        self.probes = np.zeros((self.size, 0))
        self.add(PROBES)

    def add(self, count: int) -> None:
        """Further probes."""
        more = self.rng.integers(0, 2, (self.size, count), dtype=np.int8) * 2.0 - 1.0
        self.probes, self.warm = np.hstack([self.probes, more]), None

    def factored(self, problem: JointProblem, lambda_: Array, weights: Weights) -> Factored:
        """See joint.Solver."""
        return Iterated(self, problem, lambda_, weights)

    def roughly(self, M: Factored, b: Array) -> Array:
        """See joint.Solver."""
        return cast(Iterated, M).operator.solve(b, CG_LOOSE)

    def spread(self, problem: JointProblem, lambda_: Array, weights: Weights, M: Factored) -> Spread:
        """See joint.Solver."""
        made = cast(Iterated, M)
        out = spread_of(problem, lambda_, weights, made.known())
        g, gap = made.probed(self.tol)
        left, right = problem.scaled(lambda_, gap), problem.scaled(lambda_, g)
        return Spread(out.blocks, out.cells, out.traces, (left, right), self._traces(problem, weights, left, g))

    def _traces(self, problem: JointProblem, weights: Weights, scaled: Array, g: Array) -> list[Array]:
        """Σ_i (Z'WZΛ(x - g))_ki g_ki' per probe (q_k, q_k, k)."""
        sides = zip(problem.split(weights.times(problem, scaled)), problem.split(g), strict=True)
        return [np.einsum("akm,bkm->abk", left, right) for left, right in sides]


def chosen(method: str, rest: int, filling: float, limit: int) -> str:
    """"exact", "iterative", or "too large" where the exact path was asked for and does not fit.

    `rest`: the order of the dense matrix that elimination leaves; `filling`: Σ (cells of a level)² over the first factor; `limit`: bytes.
    """
    fits = 3 * 8 * rest**2 <= limit // 2
    if method == "exact":
        return "exact" if fits else "too large"
    return "exact" if method == "auto" and fits and 2.0 * rest**3 + 600.0 * filling < MOST_WORK else "iterative"


def filling(problem: JointProblem) -> float:
    """Σ (cells of a level)² over the first factor and all others."""
    return sum(float((np.bincount(pattern.rows) ** 2.0).sum()) for (k, _), pattern in problem.pairs.items() if k == 0)


def probes_for(problem: JointProblem, seed: int, threads: int) -> Probed:
    """The solver by iterations of a problem."""
    return Probed(problem.ends[-1] - problem.ends[1], seed, threads)
