"""Maximum likelihood of a GLMM: trust in the outer products of block scores first, corrected by what exact gradients show
along the way, and the observed information, from differences of exact gradients, at the end."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .glm import ROUNDING, TAU_STEP, definite, newton_step, vanished
from .kernel import Look, Point
from .link import Array

NEAR, NEAR_LARGE = 1e-3, 0.05  # scaled score below which the observed information is computed; for many rows it hardly changes
STALLED, AGAIN = 4, 8  # steps without two thirds of the score gone, after which it is computed anyway, and computed again
DIFFERENCE = 1e-3  # step of the differences in standard errors
LARGEST = 2.0  # the most that Λ may change in one step, relative to its largest element
LARGEST_TAU = 300.0  # |tau| whose exponential is held
STRAYED = 1e-7  # distance in standard errors from where it was observed, at which the information of few rows is observed again
ZERO = 1e-4  # scaled standard deviations below this are zero: a singular fit
SMALL = 0.3  # scaled length of a column of Λ below which it is tried at zero
MAX_RELEASES = 3  # times that a column may leave zero again
MAX_SHORTER = 12  # lengths of a step that are tried
PAIRS = 8  # secant pairs kept
ROUNDED = 8.0 * float(np.finfo(np.float64).eps)  # of a log-likelihood, which its sum over rows is known to


@dataclass(frozen=True)
class GLMMProblem:
    """`scan(points, keep)` is one pass over the blocks: a look at each point, outer products only at the first, whose modes are where the
    next pass starts if `keep`.

    `Q` (m, p): gamma = Q beta*. `entries`: free elements of Λ (q, q). `shape`: whether tau is a parameter. `typical` (q, q): the mean of
    Z'WZ over blocks, which makes Λ dimensionless. `central`: whether the information may take two looks a parameter. `observe`: scaled
    score from which the information is observed, None for what suits outer products. `second`: the second derivatives by gamma, Λ's
    elements and tau in one pass, where they are known; else the information comes from differences of scores. `constant`: what the
    log-likelihood leaves out, which of large counts is nearly all that there is of it.
    """

    scan: Callable[[Sequence[Point], bool], list[Look]]
    Q: Array
    entries: tuple[tuple[int, int], ...]
    q: int
    shape: bool
    typical: Array
    central: bool = True
    tau_bound: float = math.inf
    second: Callable[[Point], Array] | None = None
    observe: float | None = None
    constant: float = 0.0

    def slack(self, loglik: float, share: float) -> float:
        """A difference of log-likelihoods that is none: a share of it, but not less than its rounding error."""
        return max(share * min(abs(loglik), abs(loglik + self.constant)), ROUNDED * abs(loglik))

    @property
    def p(self) -> int:
        """The number of coefficients."""
        return int(self.Q.shape[1])

    @property
    def size(self) -> int:
        """The number of parameters."""
        return self.p + len(self.entries) + self.shape

    @property
    def of_lambda(self) -> np.ndarray:
        """Which parameters (size,) are elements of Λ."""
        at = np.arange(self.size)
        return np.asarray((at >= self.p) & (at < self.p + len(self.entries)))

    def column(self, j: int) -> np.ndarray:
        """Where the free elements of column j of Λ stand in psi, the diagonal one first."""
        return np.array([self.p + k for k, (_, column) in enumerate(self.entries) if column == j])

    def point(self, psi: Array) -> Point:
        """Parameters as the kernel takes them."""
        lam = np.zeros((self.q, self.q))
        for (i, j), value in zip(self.entries, psi[self.p :], strict=False):
            lam[i, j] = value
        tau = float(np.clip(psi[-1], -LARGEST_TAU, LARGEST_TAU)) if self.shape else 0.0
        return Point(self.Q @ psi[: self.p], lam, tau)

    def look(self, psi: Array) -> Look:
        """A whole look by psi = (beta*, theta, tau)."""
        return self._mapped(self.scan([self.point(psi)], True)[0])

    def near(self, psis: Sequence[Array]) -> list[Look]:
        """Looks without outer products at points near the last."""
        return [self._mapped(look) for look in self.scan([self.point(psi) for psi in psis], False)]

    def information(self, psi: Array) -> Array:
        """Minus the exact second derivatives (size, size) at psi; only where `second` is known."""
        assert self.second is not None
        H = self.second(self.point(psi))
        J = self._map(len(H))
        return -J.T @ H @ J

    def _map(self, n: int) -> Array:
        """The derivatives (n, size) of the kernel's parameters by psi."""
        m = len(self.Q)
        J = np.zeros((n, self.size))
        J[:m, : self.p] = self.Q
        J[m:, self.p :] = np.eye(n - m)
        return J

    def _mapped(self, look: Look) -> Look:
        J = self._map(len(look.score))
        return Look(look.loglik, J.T @ look.score, J.T @ look.outer @ J, look.rough)


@dataclass
class Step:
    """One evaluation: psi, log-likelihood, scaled score, whether it was taken."""

    psi: list[float]
    loglik: float
    score: float
    taken: bool


@dataclass
class GLMMSolution:
    """`psi` = (beta*, theta, tau) with Λ's diagonal >= 0; `information`, the observed one, NaN for theta on the boundary, and `vcov`, its
    inverse; `score`, the length of Newton's step in standard errors; `passes` over all rows."""

    psi: Array
    lambda_: Array
    loglik: float
    information: Array
    vcov: Array
    converged: bool
    singular: bool
    score: float
    evaluations: int
    message: str
    rough: int = 0
    trace: list[Step] = field(default_factory=list)


@dataclass
class _Curvature:
    """The Hessian of -loglik as it is known: a matrix, and secant pairs (step, change of score) since."""

    observed: Array | None = None
    pairs: list[tuple[Array, Array]] = field(default_factory=list)

    def at(self, look: Look) -> Array:
        """The outer products, or the observed information once it is known, corrected by BFGS updates."""
        H = look.outer if self.observed is None else self.observed
        for delta, change in self.pairs:
            curvature, Hd = float(delta @ change), H @ delta
            size = float(delta @ Hd)
            if curvature > 1e-8 * abs(size) and size > 0.0:
                H = H - np.outer(Hd, Hd) / size + np.outer(change, change) / curvature
        return np.asarray((H + H.T) / 2.0)

    def add(self, delta: Array, change: Array) -> None:
        """Keeps a pair."""
        self.pairs = [*self.pairs, (delta, change)][-PAIRS:]


def solve_glmm(
    problem: GLMMProblem,
    start: Array,
    *,
    tol: float = 1e-8,
    max_evaluations: int = 200,
    loose: bool = False,
    saved: Callable[[Array], None] | None = None,
) -> GLMMSolution:
    """The maximum from `start` (size,).

    `tol`: bound on the scaled score √(s'H⁻¹s), in standard errors; `loose`: stop at a tenth, without the information; `saved` is told psi
    after every step that is taken.
    """
    with np.errstate(all="ignore"):  # a step without end is refused by its likelihood
        return _Search(problem, start).run(tol, max_evaluations, loose, saved)


class _Search:
    """The state of a search. Columns of Λ that are zero are fixed there: -loglik is even in a column, so its score says nothing."""

    def __init__(self, problem: GLMMProblem, start: Array) -> None:
        self.problem, self.psi = problem, start
        self.look = problem.look(start)
        for _ in range(MAX_SHORTER):
            if math.isfinite(self.look.loglik):
                break
            self.psi = start = start * np.where(problem.of_lambda, 0.3, 1.0)
            self.look = problem.look(start)
        self.curvature, self.trace = _Curvature(), list[Step]()
        self.observed_at, self.near = start, problem.observe or (NEAR if problem.central else NEAR_LARGE)
        self.evaluations, self.damping, self.slow, self.best = 1, 0.0, 0, math.inf
        self.zero = {j for j in range(problem.q) if not np.any(start[problem.column(j)])}
        self.kept: dict[int, float] = {}  # columns that were tried at zero in vain, and their size then
        self.released = 0

    @property
    def free(self) -> np.ndarray:
        """The parameters (k,) that are not fixed."""
        out = np.ones(self.problem.size, dtype=bool)
        for j in self.zero:
            out[self.problem.column(j)] = False
        out[-1] &= not self._vanished
        return np.flatnonzero(out)

    @property
    def _vanished(self) -> bool:
        """Whether the family's parameter is as good as infinite: it stays there, and the others go on."""
        return self.problem.shape and vanished(float(self.psi[-1]), self.problem.tau_bound)

    def run(self, tol: float, max_evaluations: int, loose: bool, saved: Callable[[Array], None] | None) -> GLMMSolution:
        message, converged, score = "out of evaluations", False, math.inf
        if not math.isfinite(self.look.loglik):
            return self.ended(False, "the link leaves the family's domain at the start", score)
        while self.evaluations < max_evaluations:
            if self._collapsed():
                continue
            step, score = self._newton()
            if loose and score < 0.1:
                return self.ended(True, "close enough for a start", score)
            if not loose and self._due(score):
                self._observe()
                continue
            if score < tol and self.curvature.observed is not None:
                if self._strayed():
                    self._observe()
                    continue
                if self._released():
                    continue
                converged = not self._vanished
                message = "the scaled score is small" if converged else "the family's parameter goes to infinity"
                break
            if not self._move(self._limited(step), score):
                if self._restarted():
                    continue
                converged = score < ROUNDING
                message = "at the limit of rounding" if converged else "no step improves the likelihood"
                break
            if saved is not None:
                saved(self.psi)
        return self.ended(converged, message, score)

    def _newton(self) -> tuple[Array, float]:
        """Newton's step (size,), zero for what is fixed, and its length in standard errors."""
        free = self.free
        score = self.look.score[free]
        inner = newton_step(self.curvature.at(self.look)[np.ix_(free, free)], score)
        step = np.zeros(self.problem.size)
        step[free] = inner
        return step, math.sqrt(max(float(score @ inner), 0.0))

    # -- the boundary --------------------------------------------------------------------------------------------

    def _collapsed(self) -> bool:
        """Tries a column of Λ at zero that is small and pulled there; whether it stays."""
        for j in set(range(self.problem.q)) - self.zero:
            at = self.problem.column(j)
            size, pull = self._size(j), float(self.look.score[at] @ self.psi[at])
            if size > SMALL or pull >= 0.0 or size > 0.5 * self.kept.get(j, math.inf):
                continue
            tried = self.psi.copy()
            tried[at] = 0.0
            look = self.problem.look(tried)
            self.evaluations += 1
            if look.loglik >= self.look.loglik - self.problem.slack(self.look.loglik, 1e-11):
                self._stand(tried, look, {*self.zero, j})
                return True
            self.kept[j] = size
        return False

    def _size(self, j: int) -> float:
        """The length of a column of Λ in units of what a block tells about it."""
        column = self.problem.point(self.psi).lambda_[:, j]
        return math.sqrt(max(float(column @ self.problem.typical @ column), 0.0))

    def _released(self) -> bool:
        """Whether a column at zero would rather not be, in whatever direction: then the search goes on from a small one.

        With column j at zero the score of its elements at t e_i is -t times a column of G, the derivative by ΛΛ': a direction along which
        G is negative leads up, though none of the elements may by itself.
        """
        if not self.zero or self.released >= MAX_RELEASES:
            return False
        columns = [(j, self.problem.column(j)) for j in sorted(self.zero)]
        points, size = [], 0.2 * SMALL / np.sqrt(np.maximum(np.diag(self.problem.typical), 1e-300))
        rows = {at: size[self.problem.entries[at - self.problem.p][0]] for _, column in columns for at in column.tolist()}
        for at, step in rows.items():
            points.append(self.psi.copy())
            points[-1][at] = step
        looks = dict(zip(rows, self.problem.near(points), strict=True))
        self.evaluations += 1
        for j, column in columns:
            steps = np.array([rows[at] for at in column.tolist()])
            S = np.column_stack([looks[at].score[column] for at in column.tolist()]) * steps[:, None]
            values, vectors = np.linalg.eigh((S + S.T) / 2.0)
            tried = self.psi.copy()
            tried[column] = steps * vectors[:, -1]
            if not values[-1] > 0.0:
                continue
            look = self.problem.near([tried])[0] if len(column) > 1 else looks[int(column[0])]
            least = self.look.loglik + self.problem.slack(self.look.loglik, 1e-9)
            if look.loglik > least and float(look.score[column] @ tried[column]) > 0.0:
                self._stand(tried, self.problem.look(tried), self.zero - {j})
                self.released += 1
                return True
        return False

    def _stand(self, psi: Array, look: Look, zero: set[int]) -> None:
        """Goes on from another point, with what was known of the curvature forgotten."""
        self.psi, self.look, self.zero, self.curvature = psi, look, zero, _Curvature()
        self.slow, self.best, self.damping = 0, math.inf, 0.0

    # -- steps and curvature -------------------------------------------------------------------------------------

    def _due(self, score: float) -> bool:
        """Whether the observed information is worth its looks now, or worth them again."""
        self.slow = 0 if score < self.best / 3.0 else self.slow + 1
        self.best = min(self.best, score)
        if self.curvature.observed is not None:
            return self.problem.shape and self.slow >= AGAIN  # a dispersion on its way scales the curvature of all others
        return score < self.near or self.slow >= STALLED

    def _observe(self) -> None:
        """The observed information at psi in one pass."""
        self.curvature, self.observed_at = _Curvature(self._exact() if self.problem.second else self._differences()), self.psi
        self.slow, self.best = 0, math.inf

    def _strayed(self) -> bool:
        """Whether the information was observed too far from here, in standard errors, to stand for the one here."""
        moved = (self.psi - self.observed_at)[self.free]
        H = self.curvature.at(self.look)[np.ix_(self.free, self.free)]
        return float(moved @ H @ moved) > (STRAYED if self.problem.central else NEAR_LARGE) ** 2

    def _restarted(self) -> bool:
        """Whether a search that found no better point may look at the curvature here again."""
        if self.curvature.observed is not None and not self.curvature.pairs:
            return False
        self._observe()
        return True

    def _exact(self) -> Array:
        self.evaluations += 1
        out = np.zeros((self.problem.size,) * 2)
        at = np.ix_(self.free, self.free)
        out[at] = self.problem.information(self.psi)[at]
        return (out + out.T) / 2.0

    def _differences(self) -> Array:
        """By differences of the score along directions that make the information nearly the identity."""
        free = self.free
        if not len(free):  # all variances are zero, and there is nothing else
            return np.zeros((self.problem.size,) * 2)
        directions = np.zeros((self.problem.size, len(free)))
        directions[free] = _whitened(self.curvature.at(self.look)[np.ix_(free, free)])
        if self.problem.shape:  # one that the rows hardly tell: its logarithm moves by a tenth at most
            directions /= np.maximum(1.0, 10.0 * DIFFERENCE * np.abs(directions[-1]))
        ahead = [self.psi + DIFFERENCE * v for v in directions.T]
        behind = [self.psi - DIFFERENCE * v for v in directions.T] if self.problem.central else []
        looks, base = self.problem.near([*ahead, *behind]), self.look.score
        self.evaluations += 1
        forward = [(base - look.score)[free] for look in looks[: len(ahead)]]
        if behind:
            forward = [(f + (look.score - base)[free]) / 2.0 for f, look in zip(forward, looks[len(ahead) :], strict=True)]
        J = np.linalg.solve(directions[free].T, np.column_stack(forward).T / DIFFERENCE)
        out = np.zeros((self.problem.size,) * 2)
        out[np.ix_(free, free)] = (J + J.T) / 2.0
        return out

    def _limited(self, step: Array) -> Array:
        """The step, shortened where it would change Λ or tau too much at once."""
        theta = self.problem.of_lambda
        if theta.any():
            least = 1e-3 / math.sqrt(max(np.abs(np.diag(self.problem.typical)).max(), 1e-300))
            largest = LARGEST * max(np.abs(self.psi[theta]).max(), least)
            step = step * min(1.0, largest / max(np.abs(step[theta]).max(), 1e-300))
        if self.problem.shape:
            step = step * min(1.0, TAU_STEP / max(abs(step[-1]), 1e-300))
        return np.asarray(step * 0.5**self.damping)

    def _move(self, step: Array, score: float) -> bool:
        """Tries the step, then ever shorter ones; False where none is better."""
        slack = self.problem.slack(self.look.loglik, 1e-11)
        for _ in range(MAX_SHORTER):
            tried = self.psi + step
            look = self.problem.look(tried)
            self.evaluations += 1
            gain, promised = look.loglik - self.look.loglik, float(self.look.score @ step)
            taken = gain > 1e-4 * promised if promised > slack else gain > -slack and self._shorter(look)
            self.trace.append(Step(tried.tolist(), look.loglik, score, taken))
            if taken:
                self.curvature.add(step, self.look.score - look.score)
                self.psi, self.look = tried, look
                self.damping = max(0.0, self.damping - 1.0)
                return True
            if promised <= slack:
                break
            step, self.damping = step * 0.25, min(self.damping + 1.0, 4.0)
        self.problem.look(self.psi)  # the modes kept are those of the point we stay at
        return False

    def _shorter(self, look: Look) -> bool:
        """Whether the score there is clearly shorter than here, in the metric of the outer products."""
        free = self.free
        d = np.maximum(np.diag(self.look.outer)[free], 1e-300)
        return float((look.score[free] ** 2 / d).sum()) < 0.8 * float((self.look.score[free] ** 2 / d).sum())

    def ended(self, converged: bool, message: str, score: float) -> GLMMSolution:
        """The solution where the search stands, Λ's columns turned so that its diagonal is not negative."""
        problem = self.problem
        lam = problem.point(self.psi).lambda_
        signs = np.where(np.diag(lam) < 0.0, -1.0, 1.0)
        flips = np.ones(problem.size)
        for j in range(problem.q):
            flips[problem.column(j)] = signs[j]
        H = self.look.outer if self.curvature.observed is None else self.curvature.observed
        inside = np.zeros(problem.size, dtype=bool)
        inside[self.free] = True
        information = np.where(np.outer(inside, inside), H * np.outer(flips, flips), np.nan)
        return GLMMSolution(
            self.psi * flips, lam * signs, self.look.loglik, information, _inverse(information, inside), converged,
            self._singular(lam), score, self.evaluations, message, self.look.rough, self.trace,
        )  # fmt: skip

    def _singular(self, lam: Array) -> bool:
        """Whether a covariance matrix, in units of what a block tells about it, is not of full rank (tolerance ZERO²)."""
        if not len(lam):
            return False
        return bool(self.zero) or bool(np.linalg.eigvalsh(lam.T @ self.problem.typical @ lam)[0] < ZERO**2)


def _whitened(H: Array) -> Array:
    """Columns v_k with v_j'Hv_k = δ_jk, where H is positive definite; else along its own curvatures' sizes."""
    d = np.sqrt(np.maximum(np.abs(np.diag(H)), 1e-300))
    scaled = H / np.outer(d, d)
    if definite(H):
        return np.asarray(np.linalg.inv(np.linalg.cholesky(scaled)).T / d[:, None])
    values, vectors = np.linalg.eigh(scaled)
    return np.asarray(vectors / np.sqrt(np.maximum(np.abs(values), 1e-4)) / d[:, None])


def _inverse(information: Array, inside: np.ndarray) -> Array:
    out = np.full_like(information, np.nan)
    at = np.ix_(inside, inside)
    try:
        out[at] = np.linalg.inv(information[at])
    except np.linalg.LinAlgError:
        pass
    return out
