"""The profiled likelihood of a linear mixed model with one grouping factor, its exact gradient and curvature.

−2ℓ is a function of the relative factor Λ alone once β and σ² are profiled out (DESIGN 2.1); derivatives follow
FORMULAS R1, with û = Λ'h, so that one look at the blocks gives everything although β is known only afterwards.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import log, pi

import numpy as np

from mlpipe.errors import DataError
from mlpipe.solve.blocks import EPS, Array, BlockChunk, BlockSums, Index, block_sums

EXACT_FIT = 64 * EPS  # of the response's sum of squares: a residual that small is rounding error
FITTED = "the response is fitted exactly; no residual variance to estimate"


@dataclass(frozen=True)
class LMMProblem:
    """Sufficient statistics of one model.

    Attributes:
        chunks: gives the blocks, the same at every call: a list in memory, or a stream from a mapped file.
        A: (p + 1, p + 1) [X y]'w[X y] over all rows; X has full column rank, p may be 0.
        n: number of rows, frequency weights counted.
        sum_log_w: Σ log w over the rows.
        sizes: numbers of columns of the random terms; Λ is block diagonal with lower triangles of these sizes.
        reml: restricted likelihood.
    """

    chunks: Callable[[], Iterable[BlockChunk]]
    A: Array
    n: float
    sum_log_w: float
    sizes: tuple[int, ...]
    reml: bool

    @property
    def p(self) -> int:
        """Number of fixed effects."""
        return len(self.A) - 1

    @property
    def q(self) -> int:
        """Number of random effects of a block."""
        return sum(self.sizes)

    @property
    def dof(self) -> float:
        """Divisor of the residual sum of squares in σ²: n, or n − p for the restricted likelihood."""
        return self.n - self.p if self.reml else self.n

    def terms(self) -> list[slice]:
        """Where each random term's columns are."""
        stops = np.cumsum(self.sizes)
        return [slice(int(stop) - size, int(stop)) for size, stop in zip(self.sizes, stops, strict=True)]

    def free(self) -> tuple[Index, Index]:
        """Rows and columns of Λ's free elements in lme4's order of θ: lower triangles by columns, term after term."""
        pairs = [(i, j) for term in self.terms() for j in range(term.start, term.stop) for i in range(j, term.stop)]
        rows, columns = np.array(pairs, dtype=np.intp).reshape(-1, 2).T
        return rows, columns


@dataclass(frozen=True)
class Evaluation:
    """−2ℓ and what follows at one Λ; G, scale and tt are in the coordinates b = Fc of `sums`.

    Attributes:
        objective: −2ℓ (ML or REML), all constants included.
        G: (q, q) F'(∂(−2ℓ)/∂Ψ)F, Ψ = ΛΛ', symmetric; zero between terms.
        beta: (p,) generalised least squares coefficients.
        s2: σ², profiled or as given.
        rss: the weighted residual sum of squares r_yy².
        r_inverse: (p, p) inverse of R_XX, upper triangular, R_XX'R_XX = X'V⁻¹X.
        scale: (q, q) ΣE less, for REML, what the fixed effects take: the expectation of Σtt'/σ².
        tt: (q, q) Σ tt', t = F'Z'V⁻¹(y − Xβ).
        sums: the sums over blocks.
        amplification: by how much downdating magnifies rounding error, max A_jj/R_jj².
    """

    objective: float
    G: Array
    beta: Array
    s2: float
    rss: float
    r_inverse: Array
    scale: Array
    tt: Array
    sums: BlockSums
    amplification: float

    def psi_gradient(self) -> Array:
        """(q, q) ∂(−2ℓ)/∂Ψ within the terms, FORMULAS' G."""
        return self.sums.F_inverse.T @ self.G @ self.sums.F_inverse

    def gradient(self, lambda_: Array) -> Array:
        """(q, q) ∂(−2ℓ)/∂Λ = 2 tril(GΛ), zero but for the free elements, at the Λ of this evaluation."""
        out: Array = 2.0 * np.tril(self.sums.F_inverse.T @ self.G @ (self.sums.F_inverse @ lambda_))
        return out


def evaluate(
    problem: LMMProblem, lambda_: Array, s2: float | None = None, Q: Array | None = None, *, triple: bool = False
) -> Evaluation:
    """−2ℓ at Λ, profiled over β and σ² or at the σ² given, with its exact gradient; one look at the blocks.

    Args:
        lambda_: (q, q) lower triangular, block diagonal by terms; may be singular.
        s2: σ²; None: its maximum likelihood (or restricted) estimate given Λ.
        Q: (p + 1, r) asks for `BlockSums.weighted`, which second derivatives need (`fixed_psi_hessian`).
        triple: asks for `BlockSums.triple`, which adjusted covariances need (`degrees`).

    Raises:
        DataError: n ≤ p, or the response is fitted exactly.
    """
    p, dof = problem.p, problem.dof
    if problem.n <= p:
        raise DataError(f"{problem.n:g} rows cannot determine {p} fixed effects and a residual variance")
    with np.errstate(over="ignore", invalid="ignore"):
        sums = block_sums(problem.chunks(), lambda_, p + 1, Q, triple=triple)
    beta, rss, r_inverse, amplification = _least_squares(problem.A - sums.uu, np.diagonal(problem.A))
    sigma2 = rss / dof if s2 is None else s2
    log_r = -float(np.sum(np.log(np.diagonal(r_inverse)))) if problem.reml else 0.0
    objective = sums.logdet - problem.sum_log_w + 2.0 * log_r + dof * log(2.0 * pi * sigma2) + rss / sigma2
    v = np.append(-beta, 1.0)
    tt = np.einsum("j,ajbk,k->ab", v, sums.hh, v)
    scale = sums.e - np.einsum("ajbk,jk->ab", sums.hh[:, :p, :, :p], r_inverse @ r_inverse.T) if problem.reml else sums.e
    mask = np.zeros((problem.q, problem.q))
    for term in problem.terms():
        mask[term, term] = 1.0
    G = (scale - tt / sigma2) * mask
    return Evaluation(objective, G, beta, sigma2, rss, r_inverse, scale, tt, sums, amplification)


def _least_squares(A: Array, whole: Array) -> tuple[Array, float, Array, float]:
    """β, residual sum of squares, R_XX⁻¹ and the amplification from [X y]'V⁻¹[X y] and the diagonal of [X y]'w[X y]."""
    least = EXACT_FIT * whole[-1]
    if not A[-1, -1] > least:  # which bounds the rest: of such a response variances grow until X'V⁻¹X is rounding too
        raise DataError(FITTED, code="no_residual")
    try:
        R = np.linalg.cholesky(A[:-1, :-1]).T
    except np.linalg.LinAlgError:
        raise DataError("the fixed effects are not determined beside the random effects: X'V⁻¹X is singular") from None
    r_inverse: Array = np.triu(np.linalg.inv(R))
    r_y = r_inverse.T @ A[:-1, -1]
    rss = float(A[-1, -1] - r_y @ r_y)
    if not rss > least:
        raise DataError(FITTED, code="no_residual")
    amplification = max([whole[-1] / rss, *(whole[:-1] / np.diagonal(R) ** 2)])
    return r_inverse @ r_y, rss, r_inverse, float(amplification)


def jacobian(lambda_: Array, free: tuple[Index, Index], F_inverse: Array) -> Array:
    """(q², d) derivative of vec(F⁻¹ΨF⁻ᵀ), Ψ = ΛΛ', with respect to Λ's free elements."""
    q = len(lambda_)
    J = np.zeros((q, q, len(free[0])))
    for k, (i, j) in enumerate(zip(*free, strict=True)):
        half = np.outer(F_inverse[:, i], F_inverse @ lambda_[:, j])
        J[:, :, k] = half + half.T
    return J.reshape(q * q, -1)


def second_order(G: Array, free: tuple[Index, Index]) -> Array:
    """(d, d) what the curvature of ΛΛ' adds to the Hessian in Λ's free elements, G = ∂(−2ℓ)/∂Ψ: 2 G[i, k] in a column."""
    rows, columns = free
    return np.where(columns[:, None] == columns, 2.0 * G[np.ix_(rows, rows)], 0.0)


def pair_products(tensor: Array) -> Array:
    """(q², q²) matrix K with a'Kb = Σ tr(FaEb) for vec's of symmetric a, b from Σ F[i, j] E[k, l]."""
    q = len(tensor)
    return tensor.transpose(0, 2, 1, 3).reshape(q * q, q * q)


def fixed_psi_hessian(problem: LMMProblem, at: Evaluation, weighted: Array) -> Array:
    """(q², q²) second derivative of −2ℓ at fixed σ², for pairs of symmetric directions a, b in F⁻¹ΨF⁻ᵀ.

    −Σtr(EaEb) + 2Σtr(Q h'aEb h) − (2/σ²)(ΣH'at)'C_β(ΣH'bt) − [REML] tr(C_β ΣH'aH C_β ΣH'bH), exact if `weighted` is
    Σ(hQh')[i, j] E[k, l] with Q = vv'/σ² + [REML] C_β, v = (−β, 1).
    """
    p, q = problem.p, problem.q
    hx = np.tensordot(at.sums.hh[:, :p], at.r_inverse, axes=(1, 0)).transpose(0, 3, 1, 2)  # (q, p, q, p + 1)
    score = (hx @ np.append(-at.beta, 1.0)).transpose(0, 2, 1).reshape(q * q, p)
    out: Array = 2.0 * pair_products(weighted) - pair_products(at.sums.ee) - 2.0 / at.s2 * score @ score.T
    if problem.reml:
        spread = (hx[..., :p] @ at.r_inverse).transpose(0, 2, 1, 3).reshape(q * q, p * p)
        out = out - spread @ spread.T
    return out


def residual_root(problem: LMMProblem, at: Evaluation, fixed: bool) -> Array:
    """(p + 1, r) Q with QQ' = vv'/σ², v = (−β, 1), and where `fixed` + C_β for the restricted likelihood."""
    v = np.append(-at.beta, 1.0)[:, None] / np.sqrt(at.s2)
    return np.hstack([v, np.vstack([at.r_inverse, np.zeros((1, problem.p))])]) if fixed and problem.reml else v


def psi_hessian(problem: LMMProblem, at: Evaluation, weighted: Array) -> Array:
    """(q², q²) second derivative of −2ℓ, σ² profiled out, for pairs of symmetric directions in F⁻¹ΨF⁻ᵀ."""
    profiled = at.tt.reshape(-1) / at.s2
    return fixed_psi_hessian(problem, at, weighted) - np.outer(profiled, profiled) / problem.dof
