"""Linear mixed models with crossed factors too large to factor: conjugate gradients, fixed probes, and a root of the score.

The first factor is eliminated block by block, the rest S = M_22 - V'V is only ever applied. Traces of M⁻¹ come from Rademacher
probes with a control variate, the log-determinant from the same probes by Lanczos quadrature (FORMULAS R5 to R7; Hutchinson 1990; Ubaru,
Chen and Saad 2017). With fixed probes the score is a smooth function whose root Newton's method on the average information finds.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from . import small
from .columns import Columns
from .conditional import sd_error, split_covariance
from .conjugate import Operator
from .crossed import CrossedProblem, Evaluation, Exact, Factor, flat, per_level
from .crosses import Crosses, by_size, over_effects
from .glm import newton_step
from .glmm import SMALL, GLMMSolution
from .lanczos import normal

Array: TypeAlias = np.ndarray  # of doubles or of singles

PROBES, MOST_PROBES = 16, 256
ERROR = 0.05  # Monte Carlo error of a parameter, as a share of its standard error, that is good enough
CG_TIGHT = 1e-10  # residual over right-hand side of what estimates are made of: they are first-order in it
CG_SINGLE, CG_HESSIAN = 1e-6, 1e-4  # the same of probes, and of the average information, which need no more
NEWTON = 1.0  # scaled score from which the scores' own changes correct the average information
ENOUGH = 1e-3  # scaled score that ends the search: far below the Monte Carlo error
ROUNDING = 1e-2  # scaled score that will do where it falls no further: probes are solved in single precision
NEGLIGIBLE, DIFFERENCE = 0.01, 0.2  # Monte Carlo error that moves no other θ; step of a difference of scores, in standard errors
SAMPLES, MOST_SAMPLES = 8, 64  # of conditional variances, drawn in batches
SD_ERROR = 0.02  # Monte Carlo error of a conditional standard deviation, in root mean square over levels, that is good enough
ROUGH_PROBES, CG_ROUGH = 4, 1e-5  # far from the root the direction is all that matters: fewer probes, everything in singles
LEAST = 0.03  # diagonal of Λ, in units of what a level tells, that stands for zero on the way: Λ⁻¹ multiplies the probes' rounding


class Iterative(Exact):
    """Score and average information at Λ by conjugate gradients and probes; the probes in single precision, whose rounding error is far
    below their own."""

    def __init__(self, problem: CrossedProblem, seed: int, threads: int) -> None:
        self.problem = problem
        self.rng = np.random.default_rng(seed)
        self.double = Crosses(problem, threads)
        self.half = self.double.single()
        self.probes = np.zeros((sum(f.size for f in problem.factors[1:]), 0), dtype=np.float32)
        self.warm: tuple[Array | None, Array | None] = (None, None)
        self.add(PROBES)

    def add(self, count: int) -> None:
        """Further probes."""
        more = (self.rng.integers(0, 2, (len(self.probes), count), dtype=np.int8) * 2 - 1).astype(np.float32)
        self.probes = np.hstack([self.probes, more])

    def operator(self, lambda_: Array) -> Operator:
        """M at Λ."""
        return Operator(self.problem, lambda_, self.double)

    def cross_times(self, k: int, h: int, x: Array) -> Array:
        """See Exact."""
        return self.double.times(k, h, x)

    def newton(self, lambda_: Array, *, rough: bool = False) -> tuple[Evaluation, Array, Array, Array]:
        """The estimates, the score over the entries of Λ, the average information, and the score's part by traces per probe."""
        M = self.operator(lambda_)
        single = M.single(self.half)
        c = self.spherical(lambda_)
        y = M.down(c[: M.size])
        b, probes = c[M.size :] - M.transposed(y), self.probes[:, :ROUGH_PROBES] if rough else self.probes
        if rough:
            x = single.solve_rest(b.astype(np.float32), CG_ROUGH, self.warm[0]).x.astype(float)
        else:
            x = M.solve_rest(b, CG_TIGHT, self.warm[0]).x
        g = single.solve_rest(single.by_blocks(small.multiply, probes), CG_ROUGH if rough else CG_SINGLE, self._warm(probes.shape[1])).x
        self.warm = x, g
        U = np.concatenate([M.up(y - M.times(x)), x])
        at = self.estimates(c, U, M)
        t, H = self.residual_sums(lambda_, at, U)
        traces = self.traces_by_probe(single, M, probes, g)
        each = np.column_stack([-self.entries_of(self.gaps(lambda_, [part[:, :, i] for part in traces])) for i in range(g.shape[1])])
        score = self.score_from(at, U, t, H, self.gaps(lambda_, [part.mean(axis=2) for part in traces]))
        G = self.working(lambda_, at, t)
        AI = self.information_from(lambda_, at, t, H, G, lambda b: single.solve(b.astype(np.float32), CG_HESSIAN))
        return at, score, AI, each

    def _warm(self, probes: int) -> Array | None:
        """The last solutions for the probes, zeros for new ones."""
        last = self.warm[1]
        return None if last is None else np.pad(last[:, :probes], ((0, 0), (0, max(0, probes - last.shape[1]))))

    def estimates(self, c: Array, U: Array, M: Operator) -> Evaluation:
        problem, p = self.problem, self.problem.p
        A = problem.WW - c.T @ U
        R = np.linalg.cholesky((A + A.T) / 2.0).T
        s2 = float(R[-1, -1] ** 2) / problem.degrees
        beta = np.linalg.solve(R[:p, :p], R[:p, p]) if p else np.zeros(0)
        inverse = np.linalg.inv(R[:p, :p]) if p else np.zeros((0, 0))
        return Evaluation(math.nan, beta, s2, inverse @ inverse.T, U[:, p] - U[:, :p] @ beta, M)  # type: ignore[arg-type]

    def traces_by_probe(self, single: Operator, M: Operator, probes: Array, x: Array) -> list[Array]:
        """Σ_i (M⁻¹)_ki,ki of every factor, per probe (q_k, q_k, probes), from x = S⁻¹R probes: Hutchinson's estimates with B⁻¹, whose
        trace is known, as control variate."""
        g = single.by_blocks(small.backward, probes)
        first, base = single.up(single.times(x)), single.up(single.times(g))
        inverse = small.inverse_factor(M.L)
        known = np.einsum("kam,kbm->ab", inverse, inverse) + M.expected()
        each = [known[:, :, None] + _products(base, first - base, len(M.L))]
        for R, a, b in zip(M.R, M.ends[:-1], M.ends[1:], strict=True):
            inverse = small.inverse_factor(R)
            known = np.einsum("kam,kbm->ab", inverse, inverse)
            each.append(known[:, :, None] + _products(g[a:b], x[a:b] - g[a:b], len(R)))
        return each

    def gaps(self, lambda_: Array, sums: Sequence[Array]) -> list[Array]:
        """T_k of `Exact.score_from` from Σ_i (M⁻¹)_ki,ki."""
        out = []
        for f, lam, total in zip(self.problem.factors, self.problem.lambdas(lambda_), sums, strict=True):
            out.append(np.linalg.solve(lam.T, f.levels * np.eye(f.q) - (total + total.T) / 2.0))
        return out

    def loglik(self, lambda_: Array) -> tuple[float, float]:
        """The log-likelihood at Λ and its Monte Carlo error, by Lanczos quadrature with a control variate (R6)."""
        problem, p = self.problem, self.problem.p
        M = self.operator(lambda_)
        single = M.single(self.half)
        c = self.spherical(lambda_)
        U = M.solve(c, CG_TIGHT, self.warm[0])
        at = self.estimates(c, U, M)
        logdet, error = M.logdet(single, self.probes, CG_SINGLE)
        minus2 = logdet - problem.sum_log_w + problem.degrees * (1.0 + math.log(2.0 * math.pi * at.s2))
        minus2 -= float(np.linalg.slogdet(at.C)[1]) if problem.reml and p else 0.0
        return -minus2 / 2.0, error / 2.0

    def variances(self, lambda_: Array, draw: Callable[[np.random.Generator], Array] | None) -> tuple[list[Array], int, float]:
        """Blocks (q_k, q_k, m_k) of M⁻¹ of every factor, from samples v ~ N(0, M⁻¹) (R7), how many these are, and the error of the
        standard deviations they tell, as a share, in root mean square over levels; `draw` gives Z'w^½ε over single effects, where the
        cells tell it."""
        M = self.operator(lambda_)
        single, known = M.single(self.half), M.D
        sums, count, error = [np.zeros_like(D) for D in M.D], 0, math.inf
        while error > SD_ERROR and count < MOST_SAMPLES:
            rhs = self._drawn(lambda_, draw) if draw is not None else normal(M, self.rng, SAMPLES)
            v = single.solve(rhs.astype(np.float32), CG_SINGLE)
            both = zip(M.D, self._by_factor(lambda_, rhs), self._by_factor(lambda_, v), strict=True)
            parts = [split_covariance(D, per_level(b, f.q), per_level(x, f.q)) for D, (f, _, b), (_, _, x) in both]
            known, count = [own for own, _ in parts], count + SAMPLES
            sums = [total + more for total, (_, more) in zip(sums, parts, strict=True)]
            error = sd_error(known, [total / count for total in sums], count)
        return [own + total / count for own, total in zip(known, sums, strict=True)], count, error

    def _drawn(self, lambda_: Array, draw: Callable[[np.random.Generator], Array]) -> Array:
        """Samples (all effects, SAMPLES) from N(0, M)."""
        noise = np.column_stack([draw(self.rng) for _ in range(SAMPLES)])
        parts = [flat(np.einsum("ia,ikm->akm", lam, per_level(part, f.q))) for f, lam, part in self._by_factor(lambda_, noise)]
        return np.asarray(np.concatenate(parts) + self.rng.standard_normal(noise.shape))

    def _by_factor(self, lambda_: Array, x: Array) -> list[tuple[Factor, Array, Array]]:
        ends = np.concatenate([[0], np.cumsum([f.size for f in self.problem.factors])])
        lams = self.problem.lambdas(lambda_)
        return [(f, lam, x[a:b]) for f, lam, a, b in zip(self.problem.factors, lams, ends[:-1], ends[1:], strict=True)]


def _products(a: Array, b: Array, q: int) -> Array:
    """Σ over levels of a_i b_i', per column (q, q, k)."""
    left, right = a.reshape(-1, q, a.shape[1]), b.reshape(-1, q, b.shape[1])
    return np.asarray(np.einsum("mik,mjk->ijk", left, right, dtype=np.float64))


@dataclass
class IterativeSolution:
    """A GLMMSolution whose `information` is the average one, the estimates there, `along` (see Exact), `inverses`: diagonal blocks
    (q_k, q_k, m_k) of M⁻¹ with their `samples` and `sd_error` (see `variances`), `error` of each θ as a share of its standard error (Monte
    Carlo, and what the search left), `loglik_error`, and how many `probes`."""

    solution: GLMMSolution
    at: Evaluation
    along: Array
    inverses: list[Array]
    samples: int
    sd_error: float
    error: Array
    loglik_error: float
    probes: int


def solve_iterative(
    problem: CrossedProblem, start: Array, draw: Callable[[np.random.Generator], Array] | None, *, tol: float, max_evaluations: int,
    seed: int, threads: int, told: Callable[[], None] | None = None,
) -> IterativeSolution:  # fmt: skip
    """The root of the score from θ `start` (entries of Λ); `draw` gives Z'w^½ε over single effects, ε ~ N(0, I),
    where the cells tell it; `told` is called after every evaluation."""
    inside, orders = by_size(problem)
    places = over_effects(orders, [f.q for f in problem.factors])
    solver = Iterative(inside, seed, threads)
    root = _root(solver, start, max(tol, ENOUGH), max_evaluations, told or (lambda: None))
    theta, at = root.theta, root.at
    lambda_ = _lambda(problem, theta)
    loglik, loglik_error = solver.loglik(lambda_)
    blocks, samples, sd_error = solver.variances(lambda_, None if draw is None else lambda rng: draw(rng)[places])
    inverses = [part[:, :, np.argsort(order)] for part, order in zip(blocks, orders, strict=True)]
    u = np.empty_like(at.u)
    u[places] = at.u
    final = _lambda(problem, np.where(root.held, 0.0, theta))
    solution = GLMMSolution(
        np.array([final[i, j] for i, j in problem.entries]), final, loglik, *_covariance(root), root.converged,
        bool(root.held.any()) or _rank_deficient(problem, final), root.score, root.evaluations, root.message,
    )  # fmt: skip
    return IterativeSolution(
        solution, replace(at, u=u), solver.along(lambda_, at), inverses, samples, sd_error, root.error, loglik_error, solver.probes.shape[1]
    )


@dataclass
class _Root:
    """Where the search for the root stands."""

    theta: Array
    at: Evaluation
    s: Array
    AI: Array
    each: Array
    held: np.ndarray
    step: Array
    score: float
    evaluations: int
    error: Array
    converged: bool
    message: str


def _root(solver: Iterative, start: Array, enough: float, max_evaluations: int, told: Callable[[], None]) -> _Root:
    """Newton's method on the average information, corrected by what the scores showed; roughly until the scaled score is small."""
    problem = solver.problem
    floor = LEAST / np.sqrt(np.maximum(np.diag(problem.typical), 1e-300))
    theta, shorter, last, best, since = _above(problem, start, floor), 1.0, math.inf, math.inf, 0
    pairs: list[tuple[Array, Array]] = []
    previous: tuple[Array, Array] | None = None
    columns = Columns(problem, problem.typical, np.repeat([f.levels for f in problem.factors], [f.q for f in problem.factors]), floor)
    rough = True
    for evaluation in range(1, max_evaluations + 1):
        at, s, AI, each = solver.newton(_lambda(problem, theta), rough=rough)
        told()
        held = _at_floor(problem, theta, s, floor) | columns.held(len(theta))
        if not rough and previous is not None and last < NEWTON:
            pairs = [*pairs, (theta - previous[0], previous[1] - s)][-4:]
        step = np.where(held, 0.0, _free_step(_corrected(AI, pairs, held), s, held))
        score = math.sqrt(max(float(step @ s), 0.0))
        best, since = (score, 0) if score < best / 2.0 else (best, since + 1)
        error = _error(AI, AI, each, held)
        found = _Root(theta, at, s, AI, each, held, step, score, evaluation, error, False, "out of evaluations")
        if (shut := columns.shut(theta, s, step)) is not None:
            theta, previous, pairs, best, since = shut, None, [], math.inf, 0
            continue
        if rough and (score < NEWTON or since >= 3):
            rough, previous, best, since = False, None, math.inf, 0
            theta = _stepped(problem, theta, shorter * step, floor)
            continue
        if score < enough or (score < ROUNDING and since >= 3):
            found.error = error = np.hypot(_error(AI, _derivative(solver, found), each, held), _remaining(found))
            if (opened := columns.opened(theta, s)) is not None:
                theta, previous, pairs, best, since = opened, None, [], math.inf, 0
                continue
            if error.max(initial=0.0) <= ERROR or solver.probes.shape[1] >= MOST_PROBES:
                found.converged, found.message = True, "the scaled score is small"
                return found
            solver.add(min(_wanted(error, solver.probes.shape[1]), MOST_PROBES) - solver.probes.shape[1])
            previous, pairs, best, since = None, [], math.inf, 0
            continue
        shorter = max(0.25, shorter * 0.5) if score > 2.0 * last else min(1.0, shorter * 2.0)
        last, previous = score, (theta.copy(), s)
        theta = _stepped(problem, theta, shorter * step, floor)
    return found


def _remaining(root: _Root) -> Array:
    """The Newton step that was not taken any more, in standard errors of each θ: what the end of the search leaves."""
    variance = np.diag(_covariance(root)[1])
    return np.where(root.held, 0.0, np.abs(root.step) / np.sqrt(np.where(variance > 0.0, variance, np.inf)))


def _covariance(root: _Root) -> tuple[Array, Array]:
    """The average information and its inverse, NaN for what is held at the boundary."""
    information = np.where(np.outer(~root.held, ~root.held), root.AI, np.nan)
    vcov, free = np.full_like(root.AI, np.nan), np.flatnonzero(~root.held)
    vcov[np.ix_(free, free)] = np.linalg.pinv(root.AI[np.ix_(free, free)], hermitian=True)
    return information, vcov


def _lambda(problem: CrossedProblem, theta: Array) -> Array:
    lam = np.zeros((problem.offsets[-1],) * 2)
    for (i, j), value in zip(problem.entries, theta, strict=True):
        lam[i, j] = value
    return lam


def _rank_deficient(problem: CrossedProblem, lam: Array) -> bool:
    return bool(np.linalg.eigvalsh(lam.T @ problem.typical @ lam)[0] < (SMALL * 1e-3) ** 2)


def _at_floor(problem: CrossedProblem, theta: Array, s: Array, floor: Array) -> np.ndarray:
    """Diagonal elements at their floor that the score would lower further."""
    low = [i == j and abs(v) <= floor[i] * (1 + 1e-9) for (i, j), v in zip(problem.entries, theta, strict=True)]
    return np.asarray(np.array(low, dtype=bool) & (s <= 0.0))


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
    """theta + step, the whole step shortened where an element would move by more than its size (or than a level's own information), or a
    diagonal one fall by more than most of it; one that is near its floor may go there."""
    room = np.full(len(theta), np.inf)
    for k, (i, j) in enumerate(problem.entries):
        room[k] = max(abs(theta[k]), 0.5 / math.sqrt(max(problem.typical[i, i], 1e-300)))
        if i == j and step[k] < 0.0:
            room[k] = 0.6 * theta[k] if theta[k] > 3.0 * floor[i] else np.inf
    with np.errstate(divide="ignore"):
        out = theta + step * min(1.0, float((room / np.abs(step)).min(initial=np.inf)))
    return _above(problem, out, floor)


def _above(problem: CrossedProblem, theta: Array, floor: Array) -> Array:
    """theta with its diagonal elements at least at their floor."""
    low = [floor[i] if i == j else -np.inf for i, j in problem.entries]
    return np.asarray(np.maximum(theta, low))


def _derivative(solver: Iterative, root: _Root) -> Array:
    """Minus the score's derivative: the average information, corrected along the direction of the largest Monte Carlo error by the score
    there. Where levels are few the two differ, and a large error of one θ then moves the others by more than the information tells."""
    spread = _spread(root.AI, root.each, root.held)
    worst = int(np.argmax(np.diag(spread) * np.diag(root.AI)))
    if root.held[worst] or root.error[worst] < NEGLIGIBLE:
        return root.AI
    along = spread[:, worst] * DIFFERENCE / math.sqrt(max(float(spread[:, worst] @ root.AI @ spread[:, worst]), 1e-300))
    along *= -1.0 if along[worst] < 0.0 else 1.0  # away from the boundary
    _, s, _, _ = solver.newton(_lambda(solver.problem, root.theta + along))
    return _corrected(root.AI, [(along, root.s - s)], root.held)


def _spread(H: Array, each: Array, held: np.ndarray) -> Array:
    """The covariance (entries, entries) of the root that the probes' scores leave, H standing for minus the score's derivative."""
    free, out = np.flatnonzero(~held), np.zeros_like(H)
    if len(free) and each.shape[1] > 1:
        V = np.linalg.pinv(H[np.ix_(free, free)], hermitian=True)
        out[np.ix_(free, free)] = V @ np.cov(each[free]).reshape(len(free), len(free)) @ V / each.shape[1]
    return out


def _error(AI: Array, H: Array, each: Array, held: np.ndarray) -> Array:
    """Monte Carlo error of each θ over its standard error (AI's), from H as in `_spread`; with its own standard error on top."""
    free, out = np.flatnonzero(~held), np.zeros(len(AI))
    if len(free) and each.shape[1] > 1:
        variance = np.diag(np.linalg.pinv(AI[np.ix_(free, free)], hermitian=True))
        out[free] = np.sqrt(np.maximum(np.diag(_spread(H, each, held))[free], 0.0) / np.maximum(variance, 1e-300))
        out *= 1.0 + 1.0 / math.sqrt(2.0 * (each.shape[1] - 1))
    return out


def _wanted(error: Array, probes: int) -> int:
    """How many probes bring the error below ERROR, with a margin."""
    return math.ceil(1.3 * probes * float(error.max() / ERROR) ** 2)
