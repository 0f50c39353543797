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
TAU_BOUND = 16.0  # |tau| at which the overdispersion of counts is taken for none
ROUNDING = 1e-5  # scaled score below which a step that no longer improves is the end


@dataclass
class GLMLook:
    """Sums over rows at one point: `loglik`, `score` (k,) and `information` (k, k), minus the second derivatives, by (gamma, tau)."""

    loglik: float
    score: Array
    information: Array

    def __add__(self, other: GLMLook) -> GLMLook:
        return GLMLook(self.loglik + other.loglik, self.score + other.score, self.information + other.information)


def glm_look(density: Density, rows: Rows, gamma: Array, tau: float, *, safe: bool = False) -> GLMLook:
    """One look at some rows; `safe`: with a curvature by the coefficients that is never negative."""
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
        cross = -rows.F @ shape.score
        score = np.append(score, shape.first.sum())
        information = np.block([[information, cross[:, None]], [cross[None], np.full((1, 1), -shape.second.sum())]])
    return GLMLook(float(terms.value.sum()), score, information)


@dataclass
class GLMSolution:
    """`psi` (p + t,): coefficients in the solver's coordinates and tau; `loglik`; `information` (p + t, p + t) there; `score`: the length
    of Newton's step in standard errors."""

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
    """Newton's method with step halving; `look(psi, safe)` is one pass in the solver's coordinates."""
    psi, passes, message, score = start, 1, "the scaled score is small", math.inf
    at = look(psi, False)
    if not math.isfinite(at.loglik):
        return GLMSolution(psi, at.loglik, at.information, False, math.inf, passes, "the link leaves the family's domain at the start")
    converged = False
    while passes < max_passes:
        information, safe = at.information, definite(at.information)
        if not safe:
            information = look(psi, True).information
            passes += 1
        if not (np.isfinite(information).all() and np.isfinite(at.score).all()):
            message = "the information is not finite: estimates go to infinity"
            break
        step = newton_step(information, at.score)
        score = math.sqrt(max(float(at.score @ step), 0.0))
        if score < (tol if safe else ROUNDING):  # without information in some direction no step there gets anywhere
            converged = True
            break
        if shape:
            step[-1] = np.clip(step[-1], -TAU_STEP, TAU_STEP)
        found = _halved(look, psi, step, at)
        if found is None:
            converged, message = score < ROUNDING, "at the limit of rounding" if score < ROUNDING else "no step improves the likelihood"
            break
        (psi, at), used = found[:2], found[2]
        passes += used
        if shape and abs(psi[-1]) > tau_bound:
            message = "the family's parameter goes to infinity"
            break
    else:
        message = "out of passes"
    return GLMSolution(psi, at.loglik, at.information, converged, score, passes, message)


def _halved(look: Callable[[Array, bool], GLMLook], psi: Array, step: Array, at: GLMLook) -> tuple[Array, GLMLook, int] | None:
    """The first of psi + step, psi + step/2, … that does not lower the likelihood by more than its rounding error."""
    slack = 1e-12 * abs(at.loglik)
    for k in range(HALVINGS):
        tried = psi + step * 0.5**k
        new = look(tried, False)
        if new.loglik >= at.loglik - slack:
            return tried, new, k + 1
    return None


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
