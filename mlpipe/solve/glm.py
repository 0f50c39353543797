"""Generalized linear models by Newton's method over passes of the rows (McCullagh and Nelder 1989, section 2.5).

Family parameters are estimated by maximum likelihood together with the coefficients.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .density import Density
from .kernel import Rows
from .link import Array

HALVINGS = 30
TAU_STEP = 2.0  # the largest change of tau in one step
TAU_BOUND = 16.0  # |tau| at which the overdispersion of counts of mean 1 is taken for none
ROUNDING = 1e-5  # scaled score below which a step that no longer improves is the end
LAST = 4.0 * float(np.finfo(np.float64).eps)  # of a response and a linear predictor, which their difference is known to
EXACT = 0.1  # scaled score that rounding errors give where a response is fitted exactly
INFINITE = "the family's parameter goes to infinity"
FITTED = "the response is fitted exactly, or to its last digits: its dispersion goes to zero"


@dataclass
class GLMLook:
    """Sums over rows at one point: `loglik`, `score` (k,) and `information` (k, k), minus the second derivatives, by (gamma, tau);
    `sizes`: squares of responses and linear predictors in units of a row's dispersion, where that may go to zero."""

    loglik: float
    score: Array
    information: Array
    sizes: float = 0.0

    def __add__(self, other: GLMLook) -> GLMLook:
        sums = self.loglik + other.loglik, self.score + other.score, self.information + other.information
        return GLMLook(*sums, self.sizes + other.sizes)


def glm_look(density: Density, rows: Rows, gamma: Array, tau: float, *, safe: bool = False) -> GLMLook:
    """One look at some rows; `safe`: with a curvature by the coefficients that is never negative, and none across to tau: a step to them
    is then as if tau were known."""
    with np.errstate(all="ignore"):
        return _glm_look(density, rows, gamma, tau, safe)


def _glm_look(density: Density, rows: Rows, gamma: Array, tau: float, safe: bool) -> GLMLook:
    eta = gamma @ rows.F
    if rows.offset is not None:
        eta = eta + rows.offset
    terms = density.terms(eta, rows.cells, tau)
    w = density.safe_curvature(eta, rows.cells, tau) if safe else terms.observed
    score, information = rows.F @ terms.score, (rows.F * w) @ rows.F.T
    if density.family.shape:
        shape = density.by_shape(eta, rows.cells, tau)
        cross = np.zeros(len(rows.F)) if safe else -rows.F @ shape.score
        score = np.append(score, shape.first.sum())
        information = np.block([[information, cross[:, None]], [cross[None], np.full((1, 1), -shape.second.sum())]])
    sizes = float(density.sizes(eta, rows.cells, tau).sum()) if density.disperses else 0.0
    return GLMLook(float(terms.value.sum()), score, information, sizes)


@dataclass
class GLMSolution:
    """`psi` (p + t,): coefficients in the solver's coordinates and tau; `loglik`; `information` (p + t, p + t) there, 0 for a tau that
    is as good as infinite; `score`: the length of Newton's step in standard errors."""

    psi: Array
    loglik: float
    information: Array
    converged: bool
    score: float
    passes: int
    message: str


def solve_glm(
    look: Callable[[Array, bool], GLMLook], start: Array, *, shape: bool, tau_bound: float = math.inf, tol: float = 1e-8,
    max_passes: int = 100,
) -> GLMSolution:
    """Newton's method with step halving; `look(psi, safe)` is one pass in the solver's coordinates.

    The end is a scaled score below `tol`, or below what rounding errors leave: those of responses that are fitted nearly exactly, or of
    sums so large that a step no longer halves the score.
    """
    psi, passes, score, before = start, 1, math.inf, math.inf
    at, message, converged, gone = look(psi, False), "out of passes", False, False
    if not math.isfinite(at.loglik):
        return GLMSolution(psi, at.loglik, at.information, False, math.inf, passes, "the link leaves the family's domain at the start")
    while passes < max_passes:
        free = slice(0, len(psi) - gone)
        information, s, safe = at.information[free, free], at.score[free], definite(at.information[free, free])
        if not safe:
            information = look(psi, True).information[free, free]
            passes += 1
        if not (np.isfinite(information).all() and np.isfinite(s).all()):
            message = "the information is not finite: estimates go to infinity"
            break
        if (rounding := LAST * math.sqrt(at.sizes)) > EXACT:
            message = FITTED
            break
        step = newton_step(information, s)
        score, before = math.sqrt(max(float(s @ step), 0.0)), score
        bound = max(tol, rounding) if safe else ROUNDING  # without information in some direction no step there gets anywhere
        if score < bound or 0.5 * before < score < max(ROUNDING, min(100.0 * rounding, EXACT)):
            converged, message = not gone, INFINITE if gone else "the scaled score is small"
            break
        step = np.append(step, 0.0) if gone else _limited(step, information, s) if shape else step
        found = _halved(look, psi, step, at)
        if found is None:
            converged = score < max(ROUNDING, rounding) and not gone
            message = INFINITE if gone else "at the limit of rounding" if converged else "no step improves the likelihood"
            break
        (psi, at), used = found[:2], found[2]
        passes += used
        gone = shape and vanished(float(psi[-1]), tau_bound)  # it stays there, and the others go on
    return _ended(psi, at, gone, converged, score, passes, message)


def _ended(psi: Array, at: GLMLook, gone: bool, converged: bool, score: float, passes: int, message: str) -> GLMSolution:
    information = at.information.copy()
    if gone:
        information[-1] = information[:, -1] = 0.0
    return GLMSolution(psi, at.loglik, information, converged, score, passes, message)


def _limited(step: Array, information: Array, score: Array) -> Array:
    """The step, with tau's not above TAU_STEP and the coefficients' given that."""
    if abs(step[-1]) <= TAU_STEP:
        return step
    tau = math.copysign(TAU_STEP, float(step[-1]))
    return np.append(newton_step(information[:-1, :-1], score[:-1] - information[:-1, -1] * tau), tau)


def _halved(look: Callable[[Array, bool], GLMLook], psi: Array, step: Array, at: GLMLook) -> tuple[Array, GLMLook, int] | None:
    """The first of psi + step, psi + step/2, … that does not lower the likelihood by more than its rounding error."""
    slack = 1e-12 * abs(at.loglik)
    for k in range(HALVINGS):
        tried = psi + step * 0.5**k
        new = look(tried, False)
        if new.loglik >= at.loglik - slack:
            return tried, new, k + 1
    return None


def vanished(tau: float, bound: float) -> bool:
    """Whether tau is beyond a bound, in the bound's direction."""
    return tau * math.copysign(1.0, bound) > abs(bound)


def definite(information: Array) -> bool:
    """Whether a symmetric matrix, scaled to unit diagonal, is safely positive definite."""
    diagonal = np.diag(information)
    if not np.isfinite(information).all() or (diagonal <= 0.0).any():
        return False
    d = np.sqrt(diagonal)
    return bool(np.linalg.eigvalsh(information / np.outer(d, d))[0] > 1e-10) if len(d) else True


def inverse(information: Array) -> Array:
    """The inverse in units of each parameter's own information, the pseudo-inverse of what is singular there; NaN of what is not finite."""
    if not np.isfinite(information).all():
        return np.full_like(information, math.nan)
    diagonal = np.abs(np.diag(information))
    d = np.sqrt(np.where(diagonal > 0.0, diagonal, 1.0))
    return np.asarray(np.linalg.pinv(information / np.outer(d, d), hermitian=True) / np.outer(d, d))


def newton_step(information: Array, score: Array) -> Array:
    """Ascent direction H⁻¹s; directions of negative or no curvature are followed by its size, so that a saddle repels."""
    d = np.sqrt(np.maximum(np.abs(np.diag(information)), 1e-300))
    values, vectors = np.linalg.eigh(information / np.outer(d, d))
    values = np.maximum(np.abs(values), 1e-8)
    with np.errstate(all="ignore"):  # a step without end is refused by its likelihood
        return np.asarray((vectors / values) @ (vectors.T @ (score / d)) / d)
