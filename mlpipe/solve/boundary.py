"""Positive semi-definite Ψ = ΛΛ': normal forms, the metric that ΣE gives, and rank (FORMULAS R2)."""
from __future__ import annotations

import numpy as np

from mlpipe.solve.blocks import Array
from mlpipe.solve.likelihood import Evaluation, LMMProblem

RANK_TOLERANCE = 1e-8  # eigenvalues of K'ΨK / number of blocks below this are zero: a singular fit (ΣE = KK')
PIVOT_TOLERANCE = 1e-12  # relative pivots of Ψ below this are zero
COLLINEAR = 1e-12  # eigenvalues of ΣE with unit diagonal below this: columns of Z that repeat others


def psd_cholesky(psi: Array) -> Array:
    """(q, q) lower Λ with ΛΛ' = Ψ, diagonal ≥ 0; for a pivot that is rounding error its column is zero."""
    lambda_ = np.zeros_like(psi)
    for j in range(len(psi)):
        pivot = psi[j, j] - lambda_[j] @ lambda_[j]
        if pivot > PIVOT_TOLERANCE * psi[j, j]:
            lambda_[j:, j] = (psi[j:, j] - lambda_[j:] @ lambda_[j]) / np.sqrt(pivot)
    return lambda_


def identified(problem: LMMProblem, S: Array) -> Array | None:
    """(q, q) projection of random effects on what the columns of Z tell apart, None for all; S (q, q) is the mean Z'wZ."""
    out, deficient = np.eye(problem.q), False
    for term in problem.terms():
        scale, values, vectors = _correlation(S[term, term])
        kept = vectors[:, values > COLLINEAR]
        if kept.shape[1] < len(values):
            out[term, term], deficient = (kept @ kept.T) * scale / scale[:, None], True
    return out if deficient else None


def _correlation(E: Array) -> tuple[Array, Array, Array]:
    """Scales that bring E to unit diagonal, and the eigenvalues and eigenvectors then."""
    scale = np.sqrt(np.where(np.diagonal(E) > 0.0, np.diagonal(E), 1.0))
    values, vectors = np.linalg.eigh(E / np.outer(scale, scale))
    return scale, values, vectors


def metric_root(E: Array) -> Array:
    """(q, q) invertible K, lower triangular, with KK' = E but for directions in which E is (nearly) singular."""
    scale, values, vectors = _correlation(E)
    half = vectors * np.sqrt(np.maximum(values, COLLINEAR))
    return positive_diagonal(scale[:, None] * _lower(half))


def _lower(factor: Array) -> Array:
    """Lower triangular L with LL' = FF'."""
    _, R = np.linalg.qr(factor.T)
    return np.asarray(R.T, dtype=np.float64)


def drop_negligible(problem: LMMProblem, lambda_: Array, at: Evaluation, blocks: float) -> tuple[Array, bool]:
    """Λ with directions of Ψ set to zero whose share of a block's information is below RANK_TOLERANCE; whether any is.

    The information is that of a (nearby) evaluation.
    """
    out, singular = lambda_.copy(), False
    F, inner = at.sums.F, at.sums.F_inverse @ lambda_
    for term in problem.terms():
        K = metric_root(at.sums.e[term, term] / blocks)
        left, values, _ = np.linalg.svd(K.T @ inner[term, term])
        small = values**2 < RANK_TOLERANCE
        if small.any():
            half = F[term, term] @ np.linalg.solve(K.T, left[:, ~small] * values[~small])
            out[term, term] = psd_cholesky(half @ half.T)
            singular = True
    return out, singular


def lower_factor(problem: LMMProblem, factor: Array) -> Array:
    """(q, q) lower Λ, diagonal ≥ 0, with ΛΛ' = FF' for each term's block of F."""
    out = np.zeros_like(factor)
    for term in problem.terms():
        out[term, term] = positive_diagonal(_lower(factor[term, term]))
    return out


def positive_diagonal(lambda_: Array) -> Array:
    """Λ with the signs of its columns turned so that the diagonal is not negative."""
    return lambda_ * np.where(np.diagonal(lambda_) < 0.0, -1.0, 1.0)
