"""Where the search for the variances of several factors begins: moments of the least-squares residuals' sums per level."""
from __future__ import annotations

import numpy as np

from .crossed import CrossedProblem, Factor
from .link import Array

DOMINATED = 0.04  # share of the residual variance left within the levels of one factor, below which the others are looked at within them
ENOUGH = 0.1  # share of the rows that levels must leave for that to be told
ROUNDING = 1e-14  # share below which it is what rounding leaves
RIDGE = 1e-9  # of a level's covariates, whose cross-products may be singular


def start(problem: CrossedProblem) -> Array:
    """θ (d,): relative standard deviations by E c² = s²(S + ψ Σz⁴), one factor at a time, c what a level's residuals sum to.

    Where one factor's levels tell nearly all of the residuals, its variance is that of its levels' own least-squares effects, and the
    others' are sought in what these leave: beside such a factor they would seem to have none, and the search would not leave zero.
    """
    p = problem.p
    beta = np.linalg.solve(problem.WW[:p, :p], problem.WW[:p, p]) if p else np.zeros(0)
    total = float(problem.WW[p, p] - problem.WW[p, :p] @ beta)
    s2 = total / problem.degrees
    sums = [f.C[:, p] - np.einsum("apm,p->am", f.C[:, :p], beta) for f in problem.factors]
    effects = [_effects(f, c) for f, c in zip(problem.factors, sums, strict=True)]
    within = [
        (total - float((c * b).sum())) / dof if (dof := problem.degrees - f.size) > ENOUGH * problem.degrees else s2
        for f, c, b in zip(problem.factors, sums, effects, strict=True)
    ]
    most = int(np.argmin(within))
    if within[most] >= DOMINATED * s2:
        sds = [_spreads(f, c, s2) for f, c in zip(problem.factors, sums, strict=True)]
    else:
        s2 = max(within[most], ROUNDING * s2)
        left = [c - _taken(problem, k, most, effects[most]) for k, c in enumerate(sums)]
        sds = [_spreads(f, c, s2) for f, c in zip(problem.factors, left, strict=True)]
        weight = np.einsum("aam->am", problem.factors[most].S)
        sds[most] = np.sqrt((weight * effects[most] ** 2).sum(axis=1) / np.maximum(weight.sum(axis=1), 1e-300) / s2).tolist()
    flat = [sd for each in sds for sd in each]
    return np.array([flat[i] if i == j else 0.0 for i, j in problem.entries])


def _effects(f: Factor, c: Array) -> Array:
    """The levels' own least-squares effects (q, m)."""
    if f.q == 1:
        return np.asarray(c / np.maximum(f.S[0], 1e-300))
    S = f.S.transpose(2, 0, 1)
    ridge = RIDGE * np.trace(S, axis1=1, axis2=2)[:, None, None] * np.eye(f.q) + 1e-300 * np.eye(f.q)
    return np.asarray(np.linalg.solve(S + ridge, c.T[:, :, None])[:, :, 0].T)


def _taken(problem: CrossedProblem, k: int, most: int, effects: Array) -> Array:
    """What the effects (q, m) of the factor `most` add to the sums (q, m) of the levels of factor k."""
    f = problem.factors[k]
    if k == most:
        return np.asarray(np.einsum("abm,bm->am", f.S, effects))
    cells = problem.cells[min(k, most), max(k, most)]
    own, others = (cells.rows, cells.columns) if k < most else (cells.columns, cells.rows)
    each = np.einsum("abc,bc->ac" if k < most else "bac,bc->ac", cells.values, effects[:, others])
    return np.stack([np.bincount(own, row, minlength=f.levels) for row in each])


def _spreads(f: Factor, c: Array, s2: float) -> list[float]:
    """Relative standard deviations of one factor's coefficients; a few times what a level can tell for several of them, whose moments
    also hold their covariances."""
    S = np.einsum("aam->am", f.S)
    psi = (c**2 / s2 - S).sum(axis=1) / np.maximum((S**2).sum(axis=1), 1e-300)
    typical = np.maximum(S.mean(axis=1), 1e-300)
    if f.q > 1:
        return [float(sd) for sd in np.minimum(1.0, 3.0 / np.sqrt(typical))]
    return [float(sd) for sd in np.sqrt(np.clip(psi, 0.1 / typical, np.maximum(100.0 / typical, 4.0)))]
