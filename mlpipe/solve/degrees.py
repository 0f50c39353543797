"""Degrees of freedom of tests of fixed effects in linear mixed models, from sums over blocks or levels: never an n x n matrix.

With V = σ²V₀, V₀ = diag(1/w) + ZΨZ', H = Z'V₀⁻¹X and E = Z'V₀⁻¹Z, derivatives by Ψ along a symmetric a (repeated over levels) are

    X'V₀⁻¹ZaZ'V₀⁻¹X = ΣH'aH,    tr(V₀⁻¹ZaZ'V₀⁻¹ZbZ') = Σtr(EaEb),    X'V₀⁻¹ZaZ'V₀⁻¹ZbZ'V₀⁻¹X = ΣH'aEbH

and the last direction is V₀ itself, which spans together with them what diag(1/w) and they span: the tests do not depend on the basis.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .blocks import Array, Index
from .crossed import CrossedProblem, Exact
from .likelihood import LMMProblem, evaluate

LARGE = 1e10  # degrees of freedom from which t is normal in double precision
SAME = 1e-8  # difference of degrees of freedom below which they are the same


@dataclass(frozen=True)
class Derivatives:
    """What the tests need of a model at Λ and σ², in the solver's coordinates; d directions a of Ψ, then V₀ (see above).

    Attributes:
        s2: σ². n: rows.
        C: (p, p) (X'V₀⁻¹X)⁻¹.
        HH: (q, p, q, p) ΣH[i, r] H[j, s] over levels, zero for i and j of different factors.
        E: (q, q) ΣE over the levels of each factor.
        EE: (q, q, q, q) ΣE[i, j] E[k, l], i and k being of one level and j and l of one level; None where only HH was asked for.
        HEH: (q, q, q, q, p, p) ΣH[i, r] E[j, k] H[l, s], i and j of one level, k and l of one level; None likewise.
    """

    s2: float
    n: float
    C: Array
    HH: Array
    E: Array
    EE: Array | None = None
    HEH: Array | None = None

    def moved(self, a: Array) -> Array:
        """(p, p) ΣH'aH."""
        return np.asarray(np.einsum("irjs,ij->rs", self.HH, a))


# -- from statistics ---------------------------------------------------------------------------------------------------


def of_blocks(problem: LMMProblem, lambda_: Array, s2: float, *, second: bool) -> Derivatives:
    """One grouping factor, in one look at the blocks; `second` asks for EE and HEH."""
    at, p = evaluate(problem, lambda_, s2, triple=second), problem.p
    inverse, C = at.sums.F_inverse, at.r_inverse @ at.r_inverse.T
    HH = np.einsum("ai,arbs,bj->irjs", inverse, at.sums.hh[:, :p, :, :p], inverse, optimize=True)
    E = inverse.T @ at.sums.e @ inverse
    if not second:
        return Derivatives(s2, problem.n, C, HH, E)
    EE = np.einsum("abcd,ai,bj,ck,dl->ijkl", at.sums.ee, inverse, inverse, inverse, inverse, optimize=True)
    assert at.sums.triple is not None
    triple = at.sums.triple[:, :, :, :p, :, :p]  # E[b, c] h[a, r] h[d, s]
    HEH = np.einsum("bcards,ai,bj,ck,dl->ijklrs", triple, inverse, inverse, inverse, inverse, optimize=True)
    return Derivatives(s2, problem.n, C, HH, E, EE, HEH)


def of_levels(exact: Exact, lambda_: Array, s2: float, *, second: bool) -> Derivatives:
    """Several grouping factors; `second` takes a dense matrix over all random effects."""
    problem = exact.problem
    at, U = exact.evaluate(lambda_)
    _, H = exact.residual_sums(lambda_, at, U)
    q, p = problem.offsets[-1], problem.p
    spans = _spans(problem)
    HH, E = np.zeros((q, p, q, p)), np.zeros((q, q))
    parts = [H[rows].reshape(-1, columns.stop - columns.start, p) for rows, columns in spans]
    for (_, columns), part in zip(spans, parts, strict=True):
        HH[columns, :, columns] = np.einsum("mir,mjs->irjs", part, part)
    if not second:
        return Derivatives(s2, problem.n, at.C, HH, E)
    EE, HEH = np.zeros((q,) * 4), np.zeros((q, q, q, q, p, p))
    whole = _dense_e(exact, lambda_)
    for (rows, k), left in zip(spans, parts, strict=True):
        for (others, h), right in zip(spans, parts, strict=True):
            block = whole[rows, others].reshape(len(left), left.shape[1], len(right), right.shape[1])
            if k == h:
                E[k, k] = np.einsum("mimj->ij", block)
            pairs = np.ascontiguousarray(block.transpose(1, 3, 0, 2)).reshape(left.shape[1] * right.shape[1], -1)
            EE[k, h, k, h] = (pairs @ pairs.T).reshape(left.shape[1], right.shape[1], left.shape[1], right.shape[1])
            HEH[k, k, h, h] = np.einsum("mir,mjnk,nls->ijklrs", left, block, right, optimize=True)
    return Derivatives(s2, problem.n, at.C, HH, E, EE, HEH)


def _spans(problem: CrossedProblem) -> list[tuple[slice, slice]]:
    """Per factor: its rows among single effects, its columns of Λ."""
    stops = np.concatenate([[0], np.cumsum([f.size for f in problem.factors])]).tolist()
    starts = zip(stops[:-1], stops[1:], problem.offsets[:-1], problem.offsets[1:], strict=True)
    return [(slice(a, b), slice(c, d)) for a, b, c, d in starts]


def _dense_e(exact: Exact, lambda_: Array) -> Array:
    """E = (I + Z'wZ Ψ)⁻¹Z'wZ over all effects, without cancellation for any Ψ (R1)."""
    problem = exact.problem
    size = sum(f.size for f in problem.factors)
    S = exact.times(np.eye(size))
    right = np.empty_like(S)
    for f, (rows, _), lam in zip(problem.factors, _spans(problem), problem.lambdas(lambda_), strict=True):
        right[:, rows] = (S[:, rows].reshape(size, f.levels, f.q) @ (lam @ lam.T)).reshape(size, -1)
    right[np.diag_indices(size)] += 1.0
    E = np.linalg.solve(right, S)
    return np.asarray((E + E.T) / 2.0)


def dense_bytes(problem: CrossedProblem) -> int:
    """Bytes that `of_levels` with `second` holds at its peak."""
    return 4 * 8 * sum(f.size for f in problem.factors) ** 2


# -- Satterthwaite -----------------------------------------------------------------------------------------------------


def satterthwaite(at: Derivatives, lambda_: Array, free: tuple[Index, Index], covariance: Array, L: Array) -> Array:
    """Degrees of freedom (k,) of the rows of L (k, p): 2 v² / Var(v), v = l'(σ²C)l (Satterthwaite 1946; Giesbrecht and Burns 1985).

    `covariance` (d + 1, d + 1) of (θ, log σ), NaN for θ on the boundary, which is taken as known; its order is that of `free`.
    """
    V = at.s2 * at.C
    value = np.einsum("ir,rs,is->i", L, V, L)
    gradient = np.empty((len(L), len(covariance)))
    half = L @ at.C
    for k, (i, j) in enumerate(zip(*free, strict=True)):
        a = np.zeros_like(lambda_)
        a[i] += lambda_[:, j]
        a = a + a.T
        gradient[:, k] = at.s2 * np.einsum("ir,rs,is->i", half, at.moved(a), half)
    gradient[:, -1] = 2.0 * value
    inside = np.isfinite(np.diag(covariance))
    variance = np.einsum("ij,jk,ik->i", gradient[:, inside], covariance[np.ix_(inside, inside)], gradient[:, inside])
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(variance > 0.0, 2.0 * value**2 / variance, np.nan)


def joint(nu: Array) -> float:
    """Denominator degrees of freedom of an F test from those of its uncorrelated contrasts (Fai and Cornelius 1996)."""
    if np.ptp(nu) < SAME * max(1.0, float(np.abs(nu).max())):
        return float(nu.mean())
    if (nu <= 2.0).any():
        return 2.0
    expected = float(np.where(nu > LARGE, 1.0, nu / (nu - 2.0)).sum())
    excess = expected - len(nu)
    return 2.0 * expected / excess if excess > 0.0 else np.inf


def uncorrelated(L: Array, half: Array) -> Array:
    """(rank, p) contrasts that say the same as L (k, p) and are uncorrelated, HH' being the covariance of Lβ for H = `half` (k, p): by its
    eigenvectors."""
    vectors, sds, _ = np.linalg.svd(half, full_matrices=False)
    return np.asarray(vectors[:, sds > 1e-12 * max(sds.max(initial=0.0), 1e-300)].T @ L)


# -- Kenward and Roger -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KenwardRoger:
    """Kenward and Roger (1997): `adjusted` (p, p) and `plain` (p, p) covariances of β; `P` (r, p, p) and the covariance `W` (r, r) of the
    variance parameters, from which degrees of freedom follow. Units are those of the solver."""

    adjusted: Array
    plain: Array
    P: Array
    W: Array

    def test(self, L: Array) -> tuple[float, float]:
        """(denominator degrees of freedom, scale of F) of L (k, p) β = 0, rows of L independent."""
        k = len(L)
        theta = L.T @ np.linalg.solve(L @ self.plain @ L.T, L)
        half = theta @ self.plain  # ΘΦ
        each = np.einsum("rs,ist,tu->iru", half, self.P, self.plain)  # ΘΦP_iΦ
        trace = np.einsum("irr->i", each)
        A1 = float(trace @ self.W @ trace)
        A2 = float(np.einsum("ij,irs,jsr->", self.W, each, each))
        return _matched(k, A1, A2)


def _matched(k: int, A1: float, A2: float) -> tuple[float, float]:
    """m and λ that match two moments of F (Kenward and Roger 1997, section 3; exact where Hotelling's T² or a balanced design is)."""
    if A2 <= 0.0:
        return np.inf, 1.0
    B = (A1 + 6.0 * A2) / (2.0 * k)
    g = ((k + 1.0) * A1 - (k + 4.0) * A2) / ((k + 2.0) * A2)
    c = np.array([g, k - g, k + 2.0 - g]) / (3.0 * k + 2.0 * (1.0 - g))
    top, first, second = 1.0 + c[0] * B, 1.0 - c[1] * B, 1.0 - c[2] * B
    ratio = 1.0 if abs(first) < 1e-12 and abs(1.0 - A2 / k) < 1e-12 else (1.0 - A2 / k) / first
    top = 0.0 if abs(top) < 1e-12 else top
    rho = ratio**2 * top / (second * k)
    m = 4.0 + (k + 2.0) / (k * rho - 1.0)
    scale = 1.0 if abs(m - 2.0) < 1e-2 else m * (1.0 - A2 / k) / (m - 2.0)
    return float(m), float(scale)


def kenward_roger(at: Derivatives, free: tuple[Index, Index]) -> KenwardRoger:
    """The adjusted covariance from derivatives with `second`, by the elements of Ψ that are free. For restricted likelihood."""
    assert at.EE is not None and at.HEH is not None
    directions = _directions(free, len(at.E))
    d, p = len(directions), len(at.C)
    P, Q, T = np.zeros((d + 1, p, p)), np.zeros((d + 1, d + 1, p, p)), np.zeros((d + 1, d + 1))
    information = np.linalg.inv(at.C)
    P[d] = Q[d, d] = information
    T[d, d] = at.n
    for i, a in enumerate(directions):
        P[i] = Q[i, d] = Q[d, i] = at.moved(a)
        T[i, d] = T[d, i] = float((a * at.E).sum())
        for j, b in enumerate(directions):
            Q[i, j] = np.einsum("ij,kl,ijklrs->rs", a, b, at.HEH, optimize=True)
            T[i, j] = float(np.einsum("ijkl,jl,ik->", at.EE, b, a, optimize=True))
    PC = P @ at.C
    expected = T - 2.0 * np.einsum("ijrs,sr->ij", Q, at.C) + np.einsum("irs,jsr->ij", PC, PC)
    unit = np.sqrt(np.maximum(np.diag(expected), 1e-300))  # weights may set Ψ and σ² far apart
    W = 2.0 * np.linalg.pinv((expected + expected.T) / 2.0 / np.outer(unit, unit), hermitian=True) / np.outer(unit, unit)
    inner = np.einsum("ij,ijrs->rs", W, Q) - np.einsum("ij,irs,jst->rt", W, PC, P)
    adjusted = at.s2 * (at.C + 2.0 * at.C @ inner @ at.C)
    # P and W in relative units: γ/σ² has covariance W, and Φ P Φ = σ² C P C with P per unit of γ/σ² is P/σ²
    return KenwardRoger((adjusted + adjusted.T) / 2.0, at.s2 * at.C, P / at.s2, W)


def _directions(free: tuple[Index, Index], q: int) -> list[Array]:
    """Symmetric units of the elements of Ψ."""
    out = []
    for i, j in zip(*free, strict=True):
        a = np.zeros((q, q))
        a[i, j] = a[j, i] = 1.0
        out.append(a)
    return out
