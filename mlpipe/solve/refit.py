"""The optimum of a linear mixed model from its statistics, whatever the number of grouping factors."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .blocks import Array, Index
from .crossed import CrossedProblem, Exact
from .folding import folded
from .glmm import GLMMProblem, solve_glmm
from .likelihood import LMMProblem
from .lmm import information, solve


@dataclass(frozen=True)
class Optimum:
    """`lambda_` (q, q), `s2`, `beta` (p,), its covariance `vcov` (p, p), `value` = -2ℓ there; `covariance` (d + 1, d + 1) of (θ, log σ),
    NaN for θ on the boundary; `converged`, `singular`."""

    lambda_: Array
    s2: float
    beta: Array
    vcov: Array
    value: float
    covariance: Array
    converged: bool
    singular: bool


def refit(problem: LMMProblem | CrossedProblem, start: Array, *, tol: float = 1e-8, max_evaluations: int = 200) -> Optimum:
    """The optimum from θ = `start`. Raises DataError as `solve` does."""
    if isinstance(problem, LMMProblem):
        found = solve(problem, start=start, tol=tol, max_evaluations=max_evaluations)
        at_optimum = information(problem, found).vcov
        return Optimum(found.lambda_, found.sigma2, found.beta, found.vcov, found.objective, at_optimum, found.converged, found.singular)
    exact = Exact(folded(problem))
    search = GLMMProblem(exact, np.zeros((0, 0)), problem.entries, problem.offsets[-1], False, problem.typical)
    solution = solve_glmm(search, start, tol=tol, max_evaluations=max_evaluations)
    at, _ = exact.evaluate(solution.lambda_)
    whole = with_log_sigma(solution.vcov, exact.along(solution.lambda_, at), problem.degrees)
    return Optimum(solution.lambda_, at.s2, at.beta, at.s2 * at.C, -2.0 * at.loglik, whole, solution.converged, solution.singular)


def with_log_sigma(covariance: Array, slope: Array, degrees: float) -> Array:
    """The covariance of (θ, log σ) from that of θ: along the profile log σ follows θ, and has 1 / (2 dof) of its own."""
    d = len(slope)
    out = np.full((d + 1, d + 1), np.nan)
    out[:-1, :-1] = covariance
    inside = np.flatnonzero(np.isfinite(np.diag(covariance)))
    along = covariance[np.ix_(inside, inside)] @ slope[inside]
    out[-1, inside] = out[inside, -1] = along
    out[-1, -1] = slope[inside] @ along + 1.0 / (2.0 * degrees)
    return out


def free_of(problem: LMMProblem | CrossedProblem) -> tuple[Index, Index]:
    """Rows and columns of the free elements of Λ."""
    if isinstance(problem, LMMProblem):
        return problem.free()
    rows, columns = np.array(problem.entries, dtype=np.intp).reshape(-1, 2).T
    return rows, columns
