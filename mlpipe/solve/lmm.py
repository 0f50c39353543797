"""Linear mixed models with one grouping factor: from block statistics to estimates and their information."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlpipe.solve.blocks import Array
from mlpipe.solve.boundary import positive_diagonal
from mlpipe.solve.likelihood import LMMProblem, evaluate, fixed_psi_hessian, jacobian, second_order
from mlpipe.solve.optimize import Step, maximize

FLAT = 1e-12  # curvature in θ over that in log σ, which is twice the rows, below which it is rounding


@dataclass
class LMMSolution:
    """A fitted model, in the coordinates of the statistics.

    Attributes:
        lambda_: (q, q) relative factor Λ, lower triangular, diagonal ≥ 0; b ~ N(0, σ²ΛΛ').
        theta: (d,) its free elements in lme4's order: lower triangles by columns, term after term.
        sigma2: σ².
        beta: (p,) fixed effects.
        vcov: (p, p) σ²(X'V⁻¹X)⁻¹, θ taken as known, as lme4 does.
        loglik: ℓ, restricted if `reml` was asked for.
        objective: −2ℓ.
        converged: the score is below the tolerance and no boundary hides a better fit.
        singular: some Ψ = ΛΛ' is not of full rank.
        score: √(g'H⁻¹g / blocks), g and H gradient and Hessian of −2ℓ: distance to the optimum in standard errors
            (up to √2), divided by the root of the number of blocks.
        evaluations: looks at the block statistics.
        message: how the search ended.
        trace: one record an evaluation.
    """

    lambda_: Array
    theta: Array
    sigma2: float
    beta: Array
    vcov: Array
    loglik: float
    objective: float
    converged: bool
    singular: bool
    score: float
    evaluations: int
    message: str
    trace: list[Step]


def solve(problem: LMMProblem, *, start: Array | None = None, tol: float = 1e-8, max_evaluations: int = 200) -> LMMSolution:
    """Fits the model by (restricted) maximum likelihood.

    Args:
        start: (d,) θ to begin from, in `LMMSolution.theta`'s order; None: moments.
        tol: bound on `LMMSolution.score`; raised where rounding error in the statistics is larger than that.
        max_evaluations: looks at the block statistics; used up, `converged` is False.

    Raises:
        DataError: n ≤ p, or the response is fitted exactly.
    """
    lambda_ = None
    if start is not None:
        lambda_ = np.zeros((problem.q, problem.q))
        lambda_[problem.free()] = start
    optimum = maximize(problem, lambda_, tol, max_evaluations)
    at, lambda_ = optimum.at, positive_diagonal(optimum.lambda_)
    return LMMSolution(
        lambda_=lambda_,
        theta=lambda_[problem.free()],
        sigma2=at.s2,
        beta=at.beta,
        vcov=at.s2 * at.r_inverse @ at.r_inverse.T,
        loglik=-at.objective / 2.0,
        objective=at.objective,
        converged=optimum.converged,
        singular=optimum.singular,
        score=optimum.score,
        evaluations=len(optimum.trace),
        message=optimum.message,
        trace=optimum.trace,
    )


@dataclass(frozen=True)
class Information:
    """Observed information of (θ, log σ), and its inverse, their approximate covariance.

    NaN for θ on the boundary; the covariance is all NaN where the information is singular. `flat`: whether some θ hardly changes the
    likelihood at all.
    """

    matrix: Array
    vcov: Array
    flat: bool


def information(problem: LMMProblem, solution: LMMSolution) -> Information:
    """Exact Hessian of −ℓ in (θ, log σ), β profiled out, at the solution: (d + 1, d + 1); one look at the blocks.

    Analytic (`fixed_psi_hessian`): differences of gradients would take two looks for each θ and lose half the digits.
    """
    lambda_ = solution.lambda_
    Q = [np.append(-solution.beta, 1.0)[:, None] / np.sqrt(solution.sigma2)]
    if problem.reml:
        Q.append(np.vstack([np.linalg.cholesky(solution.vcov / solution.sigma2), np.zeros((1, problem.p))]))
    at = evaluate(problem, lambda_, solution.sigma2, np.hstack(Q))
    free = problem.free()
    J = jacobian(lambda_, free, at.sums.F_inverse)
    theta = J.T @ fixed_psi_hessian(problem, at, at.sums.weighted) @ J + second_order(at.psi_gradient(), free)
    cross = 2.0 * J.T @ at.tt.reshape(-1) / at.s2
    matrix = np.block([[theta, cross[:, None]], [cross[None, :], np.full((1, 1), 4.0 * at.rss / at.s2)]]) / 2.0
    inside = np.append(np.diagonal(lambda_)[free[1]] > 0.0, True)
    return _invert(np.where(np.outer(inside, inside), matrix, np.nan), inside, _is_flat(matrix, solution.theta, inside))


def _is_flat(matrix: Array, theta: Array, inside: npt.NDArray[np.bool_]) -> bool:
    """Whether the curvature in some direction of θ is no more than its rounding error: one block alone gives about 1 in log θ."""
    kept = np.flatnonzero(inside[:-1])
    scale = np.maximum(1.0, np.abs(theta[kept]))
    curvature = matrix[np.ix_(kept, kept)] * np.outer(scale, scale)
    if len(kept) == 0 or not np.isfinite(curvature).all():
        return False
    return bool(np.linalg.eigvalsh(curvature)[0] < FLAT * (1.0 + matrix[-1, -1]))


def _invert(matrix: Array, inside: npt.NDArray[np.bool_], flat: bool) -> Information:
    vcov = np.full_like(matrix, np.nan)
    at = np.ix_(inside, inside)
    try:
        vcov[at] = np.linalg.inv(matrix[at])
    except np.linalg.LinAlgError:
        pass
    return Information(matrix, vcov, flat)
