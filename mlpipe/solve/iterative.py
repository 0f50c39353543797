"""Linear mixed models with crossed factors too large to factor: conjugate gradients, fixed probes, and a root of the score.

The first factor is eliminated block by block, the rest S = M_22 - V'V is only ever applied. Traces of M⁻¹ come from Rademacher
probes with a control variate, the log-determinant from the same probes by Lanczos quadrature (FORMULAS R5 to R7; Hutchinson 1990; Ubaru,
Chen and Saad 2017). With fixed probes the score is a smooth function whose root Newton's method on the average information finds.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import scipy.sparse as sp

from . import small
from .crossed import CrossedProblem, Evaluation, Exact, flat, per_level
from .glm import newton_step
from .glmm import SMALL, GLMMSolution
from .link import Array

PROBES, MOST_PROBES = 16, 256
ERROR = 0.05  # Monte Carlo error of a parameter, as a share of its standard error, that is good enough
CG_TIGHT, CG_LOOSE = 1e-10, 1e-6  # residual over right-hand side, at the solution and on the way
MAX_CG = 2_000
NEAR = 1e-2  # scaled score from which solves are tight
BLUP_SAMPLES = 32
LEAST = 1e-4  # diagonal of Λ, in units of what a level tells, that stands for zero on the way


@dataclass
class Solves:
    """Columns solved side by side: `x`; and per column the coefficients of conjugate gradients, for Lanczos' tridiagonal matrix."""

    x: Array
    alphas: list[Array] = field(default_factory=list)
    betas: list[Array] = field(default_factory=list)


class Operator:
    """M at one Λ: L of the first factor, V, and S with its block-diagonal part B = RR'."""

    def __init__(self, problem: CrossedProblem, lambda_: Array, threads: int) -> None:
        lams = problem.lambdas(lambda_)
        D = [np.eye(f.q)[:, :, None] + np.einsum("ia,ijm,jb->abm", lam, f.S, lam) for f, lam in zip(problem.factors, lams, strict=True)]
        self.q, self.size, self.threads = [f.q for f in problem.factors], problem.factors[0].size, threads
        self.D, self.L = D, small.cholesky(D[0])
        cross = {(k, l): problem.cross((k, l), lams[k], lams[l]) for k, l in problem.cells}
        self.V = [self._down(cross[0, l]) for l in range(1, len(D))]
        self.Vt = [sp.csr_matrix(V.T) for V in self.V]
        self.others = {(k, l): a for (k, l), a in cross.items() if k > 0}
        self.ends = np.concatenate([[0], np.cumsum([f.size for f in problem.factors[1:]])])
        self.B = [block - self._gram(V, len(block)) for block, V in zip(D[1:], self.V, strict=True)]
        self.R = [small.cholesky(block) for block in self.B]

    def _down(self, a: sp.csr_matrix) -> sp.csr_matrix:
        if self.q[0] == 1:
            return sp.csr_matrix((a.data / np.repeat(self.L[0, 0], np.diff(a.indptr)), a.indices, a.indptr), shape=a.shape)
        inverse = small.inverse_factor(self.L)
        blocks = sp.bsr_matrix((inverse.transpose(2, 0, 1), np.arange(inverse.shape[2]), np.arange(inverse.shape[2] + 1)))
        return sp.csr_matrix(blocks @ a)

    def _gram(self, V: sp.csr_matrix, q: int) -> Array:
        """The diagonal blocks (q, q, m) of V'V."""
        if q == 1:
            return np.bincount(V.indices, V.data**2, minlength=V.shape[1])[None, None]
        columns = sp.csc_matrix(V)
        out = np.empty((q, q, V.shape[1] // q))
        for a in range(q):
            for b in range(q):
                out[a, b] = np.asarray(columns[:, a::q].multiply(columns[:, b::q]).sum(axis=0)).ravel()
        return out

    def parts(self, x: Array) -> list[Array]:
        """x over the other factors, factor by factor."""
        return [x[a:b] for a, b in zip(self.ends[:-1], self.ends[1:], strict=True)]

    def times(self, x: Array) -> Array:
        """V x."""
        return np.asarray(sum(V @ part for V, part in zip(self.V, self.parts(x), strict=True)))

    def transposed(self, y: Array) -> Array:
        """V'y."""
        return np.concatenate([Vt @ y for Vt in self.Vt])

    def rest(self, x: Array) -> Array:
        """S x."""
        parts = self.parts(x)
        own = [flat(np.einsum("ijm,jkm->ikm", D, per_level(part, len(D)))) for D, part in zip(self.D[1:], parts, strict=True)]
        for (k, l), a in self.others.items():
            own[k - 1] = own[k - 1] + a @ parts[l - 1]
            own[l - 1] = own[l - 1] + a.T @ parts[k - 1]
        return np.concatenate(own) - self.transposed(self.times(x))

    def by_blocks(self, work: Callable[[Array, Array], Array], x: Array) -> Array:
        """A small-matrix function of R and x, level by level."""
        return np.concatenate([flat(work(R, per_level(part, len(R)))) for R, part in zip(self.R, self.parts(x), strict=True)])

    def precondition(self, x: Array) -> Array:
        """B⁻¹x."""
        return self.by_blocks(small.solve, x)

    def down(self, b: Array) -> Array:
        """L⁻¹b over the first factor."""
        return flat(small.forward(self.L, per_level(b, self.q[0])))

    def up(self, b: Array) -> Array:
        """L⁻ᵀb."""
        return flat(small.backward(self.L, per_level(b, self.q[0])))

    def solve_rest(self, b: Array, tol: float, start: Array | None = None, *, keep: bool = False) -> Solves:
        """S⁻¹b by preconditioned conjugate gradients on each column, in threads over columns; `keep` their coefficients."""
        if self.threads == 1 or b.shape[1] < 4:
            return self._cg(b, tol, start, keep)
        split = np.array_split(np.arange(b.shape[1]), self.threads)
        with ThreadPoolExecutor(self.threads) as pool:
            parts = list(pool.map(lambda at: self._cg(b[:, at], tol, None if start is None else start[:, at], keep), split))
        out = Solves(np.empty_like(b))
        for at, part in zip(split, parts, strict=True):
            out.x[:, at] = part.x
        longest = max(len(part.alphas) for part in parts)
        for name in ("alphas", "betas"):
            rows = [np.concatenate([getattr(p, name)[i] if i < len(getattr(p, name)) else np.zeros(p.x.shape[1]) for p in parts]) for i in range(longest)]
            setattr(out, name, rows)
        return out

    def _cg(self, b: Array, tol: float, start: Array | None, keep: bool) -> Solves:
        x = np.zeros_like(b) if start is None else start.copy()
        r = b - self.rest(x) if start is not None else b.copy()
        z = self.precondition(r)
        p, rz = z, np.einsum("ik,ik->k", r, z)
        bound = tol**2 * np.maximum(np.einsum("ik,ik->k", b, self.precondition(b)), 1e-300)
        out = Solves(x)
        for _ in range(MAX_CG):
            live = rz > bound
            if not live.any():
                break
            Ap = self.rest(p)
            curvature = np.einsum("ik,ik->k", p, Ap)
            alpha = np.where(live & (curvature > 0.0), rz / np.where(curvature > 0.0, curvature, 1.0), 0.0)
            x += alpha * p
            r -= alpha * Ap
            z = self.precondition(r)
            new = np.einsum("ik,ik->k", r, z)
            beta = np.where(live, new / np.where(rz > 0.0, rz, 1.0), 0.0)
            if keep:
                out.alphas.append(alpha)
                out.betas.append(beta)
            p, rz = z + beta * p, np.where(live, new, rz)
        return out

    def solve(self, b: Array, tol: float) -> Array:
        """M⁻¹b."""
        y = self.down(b[: self.size])
        x = self.solve_rest(b[self.size :] - self.transposed(y), tol).x
        return np.concatenate([self.up(y - self.times(x)), x])


@dataclass
class ProbeTraces:
    """Σ_i (M⁻¹)_ki,ki of every factor: `mean` (q_k, q_k) and per probe (q_k, q_k, probes)."""

    mean: list[Array]
    each: list[Array]


class Iterative(Exact):
    """Score and average information at Λ by conjugate gradients and probes."""

    def __init__(self, problem: CrossedProblem, seed: int, threads: int) -> None:
        super().__init__(problem)
        self.rng, self.threads = np.random.default_rng(seed), threads
        self.probes = np.zeros((sum(f.size for f in problem.factors[1:]), 0))
        self.warm: Array | None = None
        self.solves = 0
        self.add(PROBES)

    def add(self, count: int) -> None:
        """Further probes."""
        more = self.rng.integers(0, 2, (len(self.probes), count)) * 2.0 - 1.0
        self.probes, self.warm = np.hstack([self.probes, more]), None

    def newton(self, lambda_: Array, tol: float) -> tuple[Evaluation, Array, Array, Array, ProbeTraces]:
        """The estimates, the score over the entries of Λ, the average information, the score per probe, and the traces."""
        problem, p = self.problem, self.problem.p
        M = Operator(problem, lambda_, self.threads)
        c = self.spherical(lambda_)
        y = M.down(c[: M.size])
        rhs = np.hstack([c[M.size :] - M.transposed(y), M.by_blocks(_lower, self.probes)])
        solved = M.solve_rest(rhs, tol, self.warm)
        self.warm = solved.x
        self.solves += 1
        x = solved.x[:, : p + 1]
        U = np.concatenate([M.up(y - M.times(x)), x])
        at = self._estimates(c, U, M)
        t, H = self.residual_sums(lambda_, at, U)
        traces = self._traces(M, solved.x[:, p + 1 :])
        score = self._by_entries(lambda_, at, U, t, H, traces.mean)
        each = np.column_stack(
            [self._by_entries(lambda_, at, U, t, H, [part[:, :, i] for part in traces.each]) for i in range(self.probes.shape[1])]
        )
        return at, score, self._information(lambda_, at, t, H, M, tol), each, traces

    def _estimates(self, c: Array, U: Array, M: Operator) -> Evaluation:
        problem, p = self.problem, self.problem.p
        A = problem.WW - c.T @ U
        R = np.linalg.cholesky((A + A.T) / 2.0).T
        s2 = float(R[-1, -1] ** 2) / problem.degrees
        beta = np.linalg.solve(R[:p, :p], R[:p, p]) if p else np.zeros(0)
        inverse = np.linalg.inv(R[:p, :p]) if p else np.zeros((0, 0))
        return Evaluation(math.nan, beta, s2, inverse @ inverse.T, U[:, p] - U[:, :p] @ beta, M)  # type: ignore[arg-type]

    def _traces(self, M: Operator, x: Array) -> ProbeTraces:
        """Hutchinson's estimates less the control variate M_D⁻¹, whose trace is known."""
        g = M.by_blocks(small.backward, self.probes)
        mean, each = [], []
        first, base = M.up(M.times(x)), M.up(M.times(g))
        q0 = M.q[0]
        inverse = small.inverse_factor(M.L)
        known = np.einsum("kam,kbm->ab", inverse, inverse) + self._expected(M)
        each.append(known[:, :, None] + _products(base, first - base, q0))
        for R, a, b in zip(M.R, M.ends[:-1], M.ends[1:], strict=True):
            inverse = small.inverse_factor(R)
            known = np.einsum("kam,kbm->ab", inverse, inverse)
            each.append(known[:, :, None] + _products(g[a:b], x[a:b] - g[a:b], len(R)))
        mean = [part.mean(axis=2) for part in each]
        return ProbeTraces(mean, each)

    def _expected(self, M: Operator) -> Array:
        """Σ_i of the blocks of L⁻ᵀV B⁻¹ V'L⁻¹: what the control variate is on average."""
        q0 = M.q[0]
        out = np.zeros((q0, q0))
        for V, R in zip(M.V, M.R, strict=True):
            if q0 == 1 and len(R) == 1:
                scale = 1.0 / R[0, 0] ** 2
                rows = np.repeat(1.0 / M.L[0, 0] ** 2, np.diff(V.indptr))
                out[0, 0] += float((V.data**2 * scale[V.indices] * rows).sum())
                continue
            inverse = small.inverse_factor(R)
            half = V @ sp.bsr_matrix((inverse.transpose(2, 1, 0), np.arange(inverse.shape[2]), np.arange(inverse.shape[2] + 1)))
            upper = small.inverse_factor(M.L)
            blocks = sp.bsr_matrix((upper.transpose(2, 1, 0), np.arange(upper.shape[2]), np.arange(upper.shape[2] + 1)))
            W = sp.csr_matrix(blocks @ half)
            for a in range(q0):
                for b in range(q0):
                    out[a, b] += float(W[a::q0].multiply(W[b::q0]).sum())
        return out

    def _by_entries(self, lambda_: Array, at: Evaluation, U: Array, t: Array, H: Array, sums: Sequence[Array]) -> Array:
        """The score of `Exact` with traces of M⁻¹ from probes."""
        traces = []
        for f, lam, total in zip(self.problem.factors, self.problem.lambdas(lambda_), sums, strict=True):
            gap = f.levels * np.eye(f.q) - (total + total.T) / 2.0
            traces.append(np.linalg.solve(lam.T, gap))
        return self.score_from(at, U, t, H, traces)

    def _information(self, lambda_: Array, at: Evaluation, t: Array, H: Array, M: Operator, tol: float) -> Array:
        G = self.working(lambda_, at, t)
        return self.information_from(lambda_, at, t, H, G, lambda b: M.solve(b, tol))

    def loglik(self, lambda_: Array) -> tuple[float, float]:
        """The log-likelihood at Λ and its Monte Carlo error, by Lanczos quadrature with a control variate (R6)."""
        problem, p = self.problem, self.problem.p
        M = Operator(problem, lambda_, self.threads)
        at, _ = self._plain(lambda_, M)
        rhs = M.by_blocks(_lower, self.probes)
        solved = M.solve_rest(rhs, CG_TIGHT, keep=True)
        size = len(rhs)
        energy = np.einsum("ik,ik->k", self._scaled(M, self.probes), self.probes)
        logs = np.array([size * _quadrature(solved, k) for k in range(rhs.shape[1])])
        excess = energy - size
        slope = float(logs @ excess / max(excess @ excess, 1e-300)) if rhs.shape[1] > 2 else 1.5
        values = logs - slope * excess
        rest = sum(float(small.logdet(R).sum()) for R in M.R) + float(values.mean())
        logdet = float(small.logdet(M.L).sum()) + rest
        minus2 = logdet - problem.sum_log_w + problem.degrees * (1.0 + math.log(2.0 * math.pi * at.s2))
        minus2 -= float(np.linalg.slogdet(at.C)[1]) if problem.reml and p else 0.0
        return -minus2 / 2.0, float(values.std(ddof=1) / math.sqrt(len(values)) / 2.0)

    def _plain(self, lambda_: Array, M: Operator) -> tuple[Evaluation, Array]:
        c = self.spherical(lambda_)
        U = M.solve(c, CG_TIGHT)
        return self._estimates(c, U, M), U

    def _scaled(self, M: Operator, x: Array) -> Array:
        """R⁻¹ S R⁻ᵀ x."""
        return M.by_blocks(small.forward, M.rest(M.by_blocks(small.backward, x)))

    def variances(self, lambda_: Array, draw: Callable[[np.random.Generator], Array]) -> list[Array]:
        """Blocks (q_k, q_k, m_k) of M⁻¹ of every factor, from samples v ~ N(0, M⁻¹) (R7); `draw` gives Z'w^½ε over single effects."""
        problem = self.problem
        M = Operator(problem, lambda_, self.threads)
        noise = np.column_stack([draw(self.rng) for _ in range(BLUP_SAMPLES)])
        rhs = np.concatenate(
            [flat(np.einsum("ia,ikm->akm", lam, per_level(part, f.q))) for f, lam, part in self._by_factor(lambda_, noise)]
        ) + self.rng.standard_normal(noise.shape)
        v = M.solve(rhs, CG_LOOSE)
        out, place = [], 0
        for f, D in zip(problem.factors, M.D, strict=True):
            rows = slice(place, place + f.size)
            place += f.size
            L = small.cholesky(D)
            off = per_level(rhs[rows], f.q) - np.einsum("ijm,jkm->ikm", D, per_level(v[rows], f.q))
            shifted = small.solve(L, off)
            inverse = small.inverse_factor(L)
            out.append(np.einsum("kam,kbm->abm", inverse, inverse) + np.einsum("ikm,jkm->ijm", shifted, shifted) / noise.shape[1])
        return out

    def _by_factor(self, lambda_: Array, x: Array) -> list[tuple[object, Array, Array]]:
        ends = np.concatenate([[0], np.cumsum([f.size for f in self.problem.factors])])
        lams = self.problem.lambdas(lambda_)
        return [(f, lam, x[a:b]) for f, lam, a, b in zip(self.problem.factors, lams, ends[:-1], ends[1:], strict=True)]


def _lower(R: Array, x: Array) -> Array:
    """R x for lower R (q, q, m) and x (q, k, m)."""
    return np.einsum("ijm,jkm->ikm", R, x)


def _products(a: Array, b: Array, q: int) -> Array:
    """Σ over levels of a_i b_i', per column (q, q, k)."""
    left, right = a.reshape(-1, q, a.shape[1]), b.reshape(-1, q, b.shape[1])
    return np.einsum("mik,mjk->ijk", left, right)


def _quadrature(solved: Solves, k: int) -> float:
    """Σ τ² log λ of the Lanczos matrix of column k's conjugate gradients (R6)."""
    alphas = np.array([a[k] for a in solved.alphas])
    used = int((alphas > 0.0).sum())
    if used == 0:
        return 0.0
    betas = np.array([b[k] for b in solved.betas])[:used]
    alphas = alphas[:used]
    diagonal = 1.0 / alphas
    diagonal[1:] += betas[:-1] / alphas[:-1]
    off = np.sqrt(np.maximum(betas[:-1], 0.0)) / alphas[:-1]
    values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(off, 1) + np.diag(off, -1))
    return float((vectors[0] ** 2) @ np.log(np.maximum(values, 1e-300)))


@dataclass
class IterativeSolution:
    """A GLMMSolution whose `information` is the average one, the estimates there, `error`: the Monte Carlo error of each θ as a share of its
    standard error, `loglik_error`, and how many `probes`."""

    solution: GLMMSolution
    at: Evaluation
    error: Array
    loglik_error: float
    probes: int
    solver: Iterative


def solve_iterative(
    problem: CrossedProblem, start: Array, *, tol: float, max_evaluations: int, seed: int, threads: int
) -> IterativeSolution:
    """The root of the score from θ `start` (entries of Λ)."""
    solver = Iterative(problem, seed, threads)
    floor = LEAST / np.sqrt(np.maximum(np.diag(problem.typical), 1e-300))
    theta, message, converged, evaluations = start.copy(), "out of evaluations", False, 0
    tolerance, score, shorter, last = CG_LOOSE, math.inf, 1.0, math.inf
    pairs: list[tuple[Array, Array]] = []
    previous: tuple[Array, Array] | None = None
    while evaluations < max_evaluations:
        at, s, AI, each, _ = solver.newton(_lambda(problem, theta), tolerance)
        evaluations += 1
        held = _at_floor(problem, theta, s, floor)
        if previous is not None:
            pairs = [*pairs, (theta - previous[0], previous[1] - s)][-4:]
        H = _corrected(AI, pairs, held)
        step = np.where(held, 0.0, _free_step(H, s, held))
        score = math.sqrt(max(float(step @ s), 0.0))
        if score < NEAR and tolerance > CG_TIGHT:
            tolerance, previous, pairs = CG_TIGHT, None, []
            continue
        if score < max(tol, 1e-6) and tolerance == CG_TIGHT:
            error = _error(AI, each, held)
            if error.max(initial=0.0) <= ERROR or solver.probes.shape[1] >= MOST_PROBES:
                converged, message = True, "the scaled score is small"
                break
            solver.add(min(_wanted(error, solver.probes.shape[1]), MOST_PROBES) - solver.probes.shape[1])
            previous, pairs = None, []
            continue
        shorter = max(0.25, shorter * 0.5) if score > 2.0 * last else min(1.0, shorter * 2.0)
        last, previous = score, (theta.copy(), s)
        theta = _stepped(problem, theta, shorter * step, floor)
    lam = _lambda(problem, np.where(held, 0.0, theta)) if held.any() else _lambda(problem, theta)
    error = _error(AI, each, held)
    loglik, loglik_error = solver.loglik(_lambda(problem, theta))
    information = np.where(np.outer(~held, ~held), AI, np.nan)
    vcov = np.full_like(AI, np.nan)
    free = np.flatnonzero(~held)
    vcov[np.ix_(free, free)] = np.linalg.pinv(AI[np.ix_(free, free)], hermitian=True)
    singular = bool(held.any()) or _rank_deficient(problem, lam)
    solution = GLMMSolution(np.array([lam[i, j] for i, j in problem.entries]), lam, loglik, information, vcov, converged, singular, score, evaluations, message)
    return IterativeSolution(solution, at, error, loglik_error, solver.probes.shape[1], solver)


def _lambda(problem: CrossedProblem, theta: Array) -> Array:
    lam = np.zeros((problem.offsets[-1],) * 2)
    for (i, j), value in zip(problem.entries, theta, strict=True):
        lam[i, j] = value
    return lam


def _rank_deficient(problem: CrossedProblem, lam: Array) -> bool:
    return bool(np.linalg.eigvalsh(lam.T @ problem.typical @ lam)[0] < (SMALL * 1e-3) ** 2)


def _at_floor(problem: CrossedProblem, theta: Array, s: Array, floor: Array) -> np.ndarray:
    """Diagonal elements at their floor that the score would lower further."""
    return np.array([i == j and abs(v) <= floor[i] * (1 + 1e-9) and g <= 0.0 for (i, j), v, g in zip(problem.entries, theta, s, strict=True)])


def _corrected(AI: Array, pairs: list[tuple[Array, Array]], held: np.ndarray) -> Array:
    """The average information with BFGS updates by what the scores showed."""
    H = AI
    for delta, change in pairs:
        delta, change = np.where(held, 0.0, delta), np.where(held, 0.0, change)
        curvature, Hd = float(delta @ change), H @ delta
        size = float(delta @ Hd)
        if size > 0.0 and 0.1 * size < curvature < 10.0 * size:
            H = H - np.outer(Hd, Hd) / size + np.outer(change, change) / curvature
    return H


def _free_step(H: Array, s: Array, held: np.ndarray) -> Array:
    free = np.flatnonzero(~held)
    out = np.zeros_like(s)
    if len(free):
        out[free] = newton_step(H[np.ix_(free, free)], s[free])
    return out


def _stepped(problem: CrossedProblem, theta: Array, step: Array, floor: Array) -> Array:
    """theta + step, no element moved by more than its size or that of a level's own information, diagonals kept above their floor."""
    out = theta.copy()
    for k, (i, j) in enumerate(problem.entries):
        most = max(abs(theta[k]), 0.5 / math.sqrt(max(problem.typical[i, i], 1e-300)))
        out[k] += float(np.clip(step[k], -most, most))
        if i == j:
            out[k] = max(abs(out[k]) if out[k] * theta[k] < 0 and abs(out[k]) > 0.5 * abs(theta[k]) else out[k], floor[i])
    return out


def _error(AI: Array, each: Array, held: np.ndarray) -> Array:
    """Monte Carlo error of each θ over its standard error."""
    free = np.flatnonzero(~held)
    out = np.zeros(len(AI))
    if len(free) and each.shape[1] > 1:
        V = np.linalg.pinv(AI[np.ix_(free, free)], hermitian=True)
        spread = V @ np.cov(each[free]).reshape(len(free), len(free)) @ V / each.shape[1]
        out[free] = np.sqrt(np.maximum(np.diag(spread), 0.0) / np.maximum(np.diag(V), 1e-300))
    return out


def _wanted(error: Array, probes: int) -> int:
    """How many probes bring the error below ERROR, with a margin."""
    return math.ceil(1.3 * probes * float(error.max() / ERROR) ** 2)
