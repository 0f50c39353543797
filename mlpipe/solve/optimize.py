"""Maximum likelihood over Ψ = ΛΛ' by a trust-region Newton method.

An evaluation may be a pass over a mapped file, so evaluations are what is saved. The start comes from moments. The
Hessian is that of the likelihood but for two details known only afterwards (`psi_hessian`) and costs little beside the
gradient. Steps are taken in the symmetric square root of K'ΨK, ΣE/blocks = KK': there zero is no wall and triangular
Λ's curved valleys (a small first diagonal lets its other columns rotate) are straight; a unit of length about doubles
a standard deviation or takes it out of the noise. Convergence is judged by the score, never by differences of −2ℓ:
those drown in rounding error long before the score does (FORMULAS, trap 1).
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlpipe.errors import DataError
from mlpipe.solve.blocks import EPS, Array
from mlpipe.solve.boundary import drop_negligible, identified, lower_factor, metric_root, psd_cholesky
from mlpipe.solve.likelihood import Evaluation, LMMProblem, evaluate, pair_products, psi_hessian, residual_root

START_INFORMATION = 4.0  # Λ'SΛ of the mean block at the first evaluation
MIN_SHARE = 1e-3  # moments may take no more than all but this share of σ² at once
MIN_START = 1e-3  # smallest eigenvalue of K'ΨK that moments may start from
MOMENTS_FALL = 0.5  # moments are taken again while −2ℓ falls by more than this a block
START_RADIUS, MAX_RADIUS, MIN_RADIUS = 2.0, 8.0, 1e-9
FEW_BLOCKS = 1e4  # below this the Hessian's sums with C_β, a share p/blocks of it, are worth their time
FLAT = 1e-10  # smallest relative eigenvalue of the Hessian
NOISE = 16.0  # rounding errors that a score or a difference of −2ℓ may consist of
CONVERGED = "converged"
BOUNDARY_TOLERANCE = 1e-6  # eigenvalues of K⁻¹GK⁻ᵀ down to minus this count as non-negative
HOPELESS = 1e9  # amplification from which a step to an exact fit is no accident


@dataclass(frozen=True)
class Step:
    """One evaluation: −2ℓ, the length of the step that led there, the score there, whether it was kept."""

    objective: float
    step: float
    score: float
    accepted: bool


@dataclass
class Optimum:
    """Where the search ended."""

    lambda_: Array
    at: Evaluation
    singular: bool
    score: float
    converged: bool
    message: str
    trace: list[Step]


class LocalModel:
    """The quadratic model of −2ℓ per block around one Λ, as a function of the symmetric root of K'ΨK."""

    def __init__(
        self, problem: LMMProblem, at: Evaluation, lambda_: Array, blocks: float, weighted: Array, known: Array | None
    ) -> None:
        """Expands −2ℓ; weighted is `BlockSums.weighted` for the right Q, known as `identified` gives it."""
        q, F, F_inverse = problem.q, at.sums.F, at.sums.F_inverse
        self.problem, self.root, inverse = problem, np.zeros((q, q)), np.zeros((q, q))
        inner = F_inverse @ lambda_
        for term in problem.terms():
            K = metric_root(at.sums.e[term, term] / blocks)
            left, values, _ = np.linalg.svd(K.T @ inner[term, term])
            self.root[term, term] = left * values @ left.T
            inverse[term, term] = np.linalg.inv(K).T
        if known is not None:
            inverse = F_inverse @ known @ F @ inverse
        self.inverse, self.to_factor = inverse, F @ inverse
        rows, columns = problem.free()
        self.basis = _symmetric_basis(problem) / np.where(rows == columns, 1.0, np.sqrt(2.0))
        unit = self.basis.T.reshape(-1, q, q)
        self.G = G = inverse.T @ at.G @ inverse / blocks
        self.ee = at.sums.ee / blocks
        square = np.kron(inverse, inverse)
        J = (unit @ self.root + self.root @ unit).reshape(-1, q * q).T
        hessian = J.T @ (square.T @ psi_hessian(problem, at, weighted) @ square / blocks) @ J
        hessian += 2.0 * np.einsum("aij,jk,bki->ab", unit, G, unit)
        self.values, self.axes = np.linalg.eigh((hessian + hessian.T) / 2)
        self.gradient = self.axes.T @ (J.T @ G.reshape(-1))
        self.sizes = np.maximum(np.abs(self.values), FLAT * max(float(np.abs(self.values).max()), FLAT))

    @property
    def score(self) -> float:
        """√(g'|H|⁻¹g): its square is twice the fall per block that the model promises."""
        return float(np.sqrt(np.sum(self.gradient**2 / self.sizes)))

    def step(self, radius: float) -> tuple[Array, float, float]:
        """The minimiser within the radius: Λ there, the step's length, the fall per block it promises."""
        x = -self.gradient / self.sizes
        if self.values[0] < -FLAT * self.sizes.max() or np.linalg.norm(x) > radius:
            x = self._on_boundary(radius)
        fall = -float(self.gradient @ x + 0.5 * (self.values * x) @ x)
        factor = self.to_factor @ (self.root + (self.basis @ (self.axes @ x)).reshape(self.root.shape))
        return lower_factor(self.problem, factor), float(np.linalg.norm(x)), fall

    def descent_direction(self, rounding: float) -> tuple[Array, float] | None:
        """(v, ε): −2ℓ falls from Ψ to Ψ + εvv' although the score may be zero (R2); None where G is non-negative.

        `rounding` is the relative error that G may have.
        """
        values, vectors = np.linalg.eigh(self.G)
        if values[0] >= -max(BOUNDARY_TOLERANCE, rounding):
            return None
        v = self.inverse @ vectors[:, 0]
        return self.to_factor @ vectors[:, 0], -float(values[0] / np.einsum("i,j,k,l,ijkl->", v, v, v, v, self.ee))

    def _on_boundary(self, radius: float) -> Array:
        """−(H + μI)⁻¹g of length `radius`, by bisection on μ; the lowest axis fills up where g is without it."""
        low = max(0.0, -float(self.values[0]))
        high = low + float(np.linalg.norm(self.gradient)) / radius + EPS
        for _ in range(80):
            middle = (low + high) / 2
            too_long = np.linalg.norm(self.gradient / np.maximum(self.values + middle, 1e-300)) > radius
            low, high = (middle, high) if too_long else (low, middle)
        x = -self.gradient / np.maximum(self.values + high, 1e-300)
        missing = radius**2 - float(x @ x)
        if self.values[0] < 0.0 and missing > 0.0:
            x[0] += np.copysign(np.sqrt(missing), x[0])
        return x


def maximize(problem: LMMProblem, start: Array | None, tol: float, max_evaluations: int) -> Optimum:
    """Maximises the likelihood over Λ.

    Args:
        start: (q, q) lower triangular Λ to begin from; None: moments.
        tol: bound on `LocalModel.score`, raised to NOISE·EPS·amplification where rounding is larger.
        max_evaluations: looks at the blocks.

    Raises:
        DataError: from `evaluate`, where no fit exists.
    """
    return _Search(problem, tol, max_evaluations).run(start)


class _Search:
    """State of one search: where it is, the model there, the radius."""

    def __init__(self, problem: LMMProblem, tol: float, max_evaluations: int) -> None:
        self.problem, self.tol, self.left = problem, tol, max_evaluations
        self.blocks, self.mean_s = mean_block(problem)
        self.known = identified(problem, self.mean_s)
        self.trace: list[Step] = []
        self.radius, self.few = START_RADIUS, self.blocks < FEW_BLOCKS
        self.failure: DataError | None = None

    def run(self, start: Array | None) -> Optimum:
        """Steps until the score is small and G non-negative."""
        if start is None:
            self._start_from_moments()
        else:
            lambda_ = self._lower(start)
            self._move(lambda_, self._evaluate(lambda_), 0.0)
        message = ""
        while not message:
            rounding = NOISE * EPS * self.at.amplification
            if self.model.score > max(self.tol, rounding):
                message = self._step()
            elif (direction := self.model.descent_direction(rounding)) is not None:
                message = self._escape(*direction)
            elif not self._flatten():
                message = CONVERGED
        if self.failure is not None and message != CONVERGED:
            raise self.failure
        _, singular = drop_negligible(self.problem, self.lambda_, self.at, self.blocks)
        return Optimum(self.lambda_, self.at, singular, self.model.score, message == CONVERGED, message, self.trace)

    def _flatten(self) -> bool:
        """Moves to the boundary itself where the optimum is indistinguishable from it; whether it did."""
        flat, _ = drop_negligible(self.problem, self.lambda_, self.at, self.blocks)
        if self.left <= 0 or np.count_nonzero(np.diagonal(flat)) == np.count_nonzero(np.diagonal(self.lambda_)):
            return False
        self._move(flat, self._evaluate(flat), 0.0)
        return True

    def _evaluate(self, lambda_: Array) -> Evaluation:
        self.left -= 1
        Q = residual_root(self.problem, self.at, self.few) if self.trace else None
        return evaluate(self.problem, lambda_, Q=Q)

    def _model(self, lambda_: Array, at: Evaluation) -> LocalModel:
        """The model at a point, its Q from the point before; expectations stand in for what was not summed."""
        weighted = at.sums.weighted if self.trace else at.sums.ee
        if not (self.trace and self.few):
            weighted = weighted + np.multiply.outer(at.sums.e - at.scale, at.sums.e) / self.blocks
        return LocalModel(self.problem, at, lambda_, self.blocks, weighted, self.known)

    def _move(self, lambda_: Array, at: Evaluation, length: float, model: LocalModel | None = None) -> None:
        self.model = self._model(lambda_, at) if model is None else model
        self.lambda_, self.at = lambda_, at
        self.trace.append(Step(at.objective, length, self.model.score, True))

    def _start_from_moments(self) -> None:
        """Λ from the design alone, then Λ from the moments there, for as long as that helps much."""
        factor = np.zeros_like(self.mean_s)
        for term in self.problem.terms():
            factor[term, term] = np.linalg.inv(metric_root(self.mean_s[term, term])).T * np.sqrt(START_INFORMATION)
        lambda_ = self._lower(factor)
        self._move(lambda_, self._evaluate(lambda_), 0.0)
        before = np.inf
        while self.left > 0 and before - self.at.objective > MOMENTS_FALL * self.blocks:
            before = self.at.objective
            self._try(self._lower(moments(self.problem, self.at, self.lambda_, self.blocks)), 0.0, 0.0)

    def _lower(self, factor: Array) -> Array:
        """Λ for a factor of Ψ, without what the columns of Z do not tell apart."""
        return lower_factor(self.problem, factor if self.known is None else self.known @ factor)

    def _step(self) -> str:
        """Tries one step of the model; says why where the search must end."""
        if self.left <= 0:
            return "the number of evaluations allowed is used up"
        if self.radius < MIN_RADIUS:
            return "no step lowers -2 log L: the score is at the limit of rounding"
        lambda_, length, fall = self.model.step(self.radius)
        lambda_, _ = drop_negligible(self.problem, lambda_, self.at, self.blocks)
        self._try(lambda_, fall * self.blocks, length)
        return ""

    def _try(self, lambda_: Array, promised: float, length: float) -> None:
        """Evaluates at Λ; moves there if −2ℓ falls, or the score where the fall drowns in rounding; sets the radius."""
        try:
            new = self._evaluate(lambda_)
        except DataError as failure:
            self.failure = failure
            if self.at.amplification > HOPELESS:
                raise
            return self._reject(np.inf, length, np.inf)
        model = self._model(lambda_, new)
        fall = self.at.objective - new.objective
        noise = NOISE * EPS * (abs(new.objective) + self.problem.dof * new.amplification)
        if max(promised, abs(fall)) < noise:
            fall = promised if model.score < self.model.score else -np.inf
        if not fall > 0.05 * promised:
            return self._reject(new.objective, length, model.score)
        if promised > 0.0 and fall < 0.3 * promised:
            self.radius = length / 2
        elif fall > 0.7 * promised and length > 0.7 * self.radius:
            self.radius = min(2.5 * self.radius, MAX_RADIUS)
        self._move(lambda_, new, length, model)

    def _reject(self, objective: float, length: float, score: float) -> None:
        self.trace.append(Step(objective, length, score, False))
        if length > 0.0:
            self.radius = min(self.radius, length) / 4

    def _escape(self, v: Array, size: float) -> str:
        """Leaves a boundary on which Ψ wants to grow along v, by size vv' or as much of it as lowers −2ℓ."""
        psi = self.lambda_ @ self.lambda_.T
        while self.left > 0 and size > 0.0:
            lambda_ = psd_cholesky(psi + size * np.outer(v, v))
            new = self._evaluate(lambda_)
            if new.objective < self.at.objective:
                self.radius = 1.0
                self._move(lambda_, new, 0.0)
                return ""
            size /= 4.0
        return "the boundary is not the maximum, but no step away from it lowers -2 log L"


def moments(problem: LMMProblem, at: Evaluation, lambda_: Array, blocks: float) -> Array:
    """A factor of Ψ from the expectations of Σtt' and r_yy², which are linear in σ²Ψ and σ² (MINQUE), given weights from a Λ.

    E Σtt' = σ²ΣE + ΣEDE and E r_yy² = σ²(n − p) + tr ΣED with D = σ²(Ψ − ΛΛ').
    """
    basis = _symmetric_basis(problem)
    root = np.linalg.inv(metric_root(basis.T @ pair_products(at.sums.ee) @ basis))
    c, t = (root @ (basis.T @ matrix.reshape(-1)) for matrix in (at.scale, at.tt))
    average = at.rss / problem.dof
    left = problem.dof - float(c @ c)
    s2 = (at.rss - float(c @ t)) / left if left > 0.0 else average
    s2 = min(max(s2, MIN_SHARE * average), average / MIN_SHARE)
    inner = at.sums.F_inverse @ lambda_
    psi = inner @ inner.T + (basis @ (root.T @ (t - s2 * c))).reshape(lambda_.shape) / s2
    out = np.zeros_like(psi)
    for term in problem.terms():
        K = metric_root(at.sums.e[term, term] / blocks)
        values, vectors = np.linalg.eigh(K.T @ psi[term, term] @ K)
        out[term, term] = np.linalg.solve(K.T, vectors * np.sqrt(np.maximum(values, MIN_START)))
    return at.sums.F @ out


def _symmetric_basis(problem: LMMProblem) -> Array:
    """(q², d) vec of the symmetric matrices with one pair of ones, for each pair of random effects of one term."""
    q = problem.q
    rows, columns = problem.free()
    out = np.zeros((q, q, len(rows)))
    at = np.arange(len(rows))
    out[rows, columns, at] = out[columns, rows, at] = 1.0
    return out.reshape(q * q, -1)


def mean_block(problem: LMMProblem) -> tuple[float, Array]:
    """Number of blocks, and their mean S."""
    blocks, total = 0.0, np.zeros((problem.q, problem.q))
    for chunk in problem.chunks():
        blocks += float(chunk.count.sum())
        total += chunk.S @ chunk.count
    return blocks, total / max(blocks, 1.0)
