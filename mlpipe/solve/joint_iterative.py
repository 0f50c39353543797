"""GLMMs with crossed factors too large to factor: the root of a score whose leverages and traces come from probes (FORMULAS R5 to R8).

With fixed probes the score is a smooth function of the parameters, but not the gradient of the stochastic likelihood.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import cast

import numpy as np

from .coded_rows import Part, add_levels
from .conditional import sd_error, split_covariance
from .glm import TAU_STEP, inverse, newton_step, vanished
from .glmm import ZERO, GLMMSolution
from .joint import Joint, State
from .kernel import Point
from .link import Array
from .probes import CG_TIGHT, Iterated, Probed

MOST_PROBES = 256
ERROR = 0.05  # Monte Carlo error of a parameter, as a share of its standard error, that is good enough
NEAR = 0.1  # scaled score from which probes are solved tightly and the score's own derivatives are found by differences
ENOUGH = 1e-3  # scaled score that ends the search: far below the Monte Carlo error
DIFFERENCE = 1e-2  # step of the differences in standard errors
LEAST = 0.03  # diagonal of Λ, in units of what a level tells, that stands for zero on the way
SAMPLES = 32  # for conditional variances, whose error is told
PAIRS, MOST_SHRINKS = 4, 4


@dataclass
class JointSolution:
    """A GLMMSolution; `error`, the Monte Carlo error of each parameter as a share of its standard error (None: there is none);
    `loglik_error`; how many `probes`; the modes `u`, and `covariances` (q_k, q_k, m_k) of the random effects given the data, with the
    `sd_error` that sampling them left."""

    solution: GLMMSolution
    error: Array | None
    loglik_error: float
    probes: int
    u: Array
    covariances: list[Array]
    sd_error: float = 0.0


def solve_joint(
    joint: Joint, solver: Probed, start: Array, typical: Array, *, tol: float, max_evaluations: int, tau_bound: float,
    saved: Callable[[Array], None] | None = None,
) -> JointSolution:  # fmt: skip
    """The root of the score from psi = (beta*, theta, tau). Raises LinAlgError where the start has no mode."""
    with np.errstate(all="ignore"):
        return _Root(joint, solver, start, typical, saved).run(max(tol, ENOUGH), max_evaluations, tau_bound)


@dataclass
class _At:
    """The score at a point, and an approximation of the information."""

    psi: Array
    state: State
    score: Array
    rough: int


class _Root:
    """The state of a search. A diagonal element of Λ at its floor that wants to fall further is held there, and is zero in the end."""

    def __init__(self, joint: Joint, solver: Probed, start: Array, typical: Array, saved: Callable[[Array], None] | None) -> None:
        self.joint, self.problem, self.solver, self.saved = joint, joint.problem, solver, saved
        self.typical, self.psi, self.evaluations = typical, start.copy(), 0
        self.first, self.shape = self.problem.p, self.problem.density.family.shape
        self.floor = LEAST / np.sqrt(np.maximum(np.diag(typical), 1e-300))
        self.pairs: list[tuple[Array, Array]] = []
        self.observed: Array | None = None
        for k, (i, j) in enumerate(self.problem.entries):
            if i == j:
                self.psi[self.first + k] = max(self.psi[self.first + k], self.floor[i])

    def point(self, psi: Array) -> Point:
        """Parameters as the passes take them."""
        lam = np.zeros((self.problem.offsets[-1],) * 2)
        for (i, j), value in zip(self.problem.entries, psi[self.first :], strict=False):
            lam[i, j] = value
        return Point(psi[: self.first], lam, float(psi[-1]) if self.shape else 0.0)

    def look(self, psi: Array, *, outer: bool) -> _At | None:
        """The score at psi; None where there is no mode."""
        point = self.point(psi)
        self.evaluations += 1
        try:
            u, rough = self.joint.mode(point, self.joint.u)
            state = self.joint.state(point, u, outer=outer)
            score = self.joint.score(state)
        except np.linalg.LinAlgError:
            return None
        return _At(psi, state, score, rough) if np.isfinite(score).all() and math.isfinite(state.value) else None

    def run(self, tol: float, max_evaluations: int, tau_bound: float) -> JointSolution:
        """Steps until the score is small and the Monte Carlo error too."""
        message, converged, length, last = "out of evaluations", False, math.inf, math.inf
        found = self._first()
        at, share, error = found, 1.0, np.zeros(len(self.psi))
        while self.evaluations < max_evaluations:
            self.joint.u = at.state.u
            H, held = self._hessian(at), self._held(at)
            step = self._step(H, at.score, held)
            length = math.sqrt(max(float(step @ at.score), 0.0))
            if length < NEAR and (self.observed is None or self.solver.tol > CG_TIGHT):
                at = self._tightened(at)
                continue
            if length < tol and self.observed is not None:
                error = self.error(at, H, held)
                count = self.solver.probes.shape[1]
                if error.max(initial=0.0) <= ERROR or count >= MOST_PROBES:
                    converged, message = not at.rough, "the scaled score is small"
                    break
                wanted = math.ceil(1.3 * count * float(error.max() / ERROR) ** 2)
                self.solver.add(min(wanted, MOST_PROBES) - count)
                at, self.pairs = self._again(at), []
                continue
            if self.shape and vanished(float(at.psi[-1]), tau_bound):
                message = "the family's parameter goes to infinity"
                break
            share = max(0.25, share * 0.5) if length > 2.0 * last else min(1.0, share * 2.0)
            last = length
            moved = self._moved(at, self._limited(at.psi, share * step))
            if moved is None:
                message = "no step leads to a mode"
                break
            self.pairs = [*self.pairs, (moved.psi - at.psi, at.score - moved.score)][-PAIRS:]
            at = moved
            if self.saved is not None:
                self.saved(at.psi)
        return self._ended(at, self._held(at), error, converged, message, length)

    def _first(self) -> _At:
        """The start, or one with less spread where there is no mode. Raises LinAlgError where there is none either."""
        for _ in range(MOST_SHRINKS):
            found = self.look(self.psi, outer=True)
            if found is not None:
                return found
            at = slice(self.first, self.first + len(self.problem.entries))
            self.psi[at] *= 0.3
        raise np.linalg.LinAlgError("no mode at the start")

    # -- steps ---------------------------------------------------------------------------------------------------

    def _again(self, at: _At) -> _At:
        """The same point with other probes or tolerances."""
        found = self.look(at.psi, outer=True)
        return at if found is None else found

    def _tightened(self, at: _At) -> _At:
        """The same point with tight solves, and the derivatives of the score there by differences in standard errors."""
        self.solver.tol = CG_TIGHT
        at = self._again(at)
        self.joint.u = at.state.u
        H, held = self.joint.information(at.state), self._held(at)
        free = np.flatnonzero(~held)
        steps = DIFFERENCE / np.sqrt(np.maximum(np.diag(H), 1e-300))
        J = H.copy()
        for i in free:
            tried = at.psi.copy()
            tried[i] += steps[i]
            ahead = self.look(tried, outer=False)
            if ahead is not None:
                J[:, i] = (at.score - ahead.score) / steps[i]
        block = J[np.ix_(free, free)]
        self.observed = H
        self.observed[np.ix_(free, free)] = (block + block.T) / 2.0
        self.pairs = []
        return at

    def _hessian(self, at: _At) -> Array:
        """The information, corrected by BFGS updates by what the scores showed since."""
        H, held = self.joint.information(at.state) if self.observed is None else self.observed, self._held(at)
        for delta, change in self.pairs:
            delta, change = np.where(held, 0.0, delta), np.where(held, 0.0, change)
            curvature, Hd = float(delta @ change), H @ delta
            size = float(delta @ Hd)
            if size > 0.0 and 0.1 * size < curvature < 10.0 * size:
                H = H - np.outer(Hd, Hd) / size + np.outer(change, change) / curvature
        return np.asarray(H)

    def _held(self, at: _At) -> np.ndarray:
        """The parameters that are at the boundary: a diagonal element at its floor, and the rest of its column."""
        held = np.zeros(len(at.psi), dtype=bool)
        entries = self.problem.entries
        for k, (i, j) in enumerate(entries):
            at_floor = i == j and abs(at.psi[self.first + k]) <= self.floor[i] * (1.0 + 1e-9)
            if at_floor and at.score[self.first + k] <= 0.0:
                held[self.first + k] = True
        return held

    def _step(self, H: Array, score: Array, held: np.ndarray) -> Array:
        free = np.flatnonzero(~held)
        out = np.zeros_like(score)
        out[free] = newton_step(H[np.ix_(free, free)], score[free])
        return out

    def _limited(self, psi: Array, step: Array) -> Array:
        """The step, shortened as a whole where Λ or tau would change too much, no diagonal of Λ below its floor."""
        share = 1.0
        for k, (i, j) in enumerate(self.problem.entries):
            at = self.first + k
            room = max(abs(psi[at]), 0.5 / math.sqrt(max(self.typical[i, i], 1e-300)))
            if i == j and step[at] < 0.0 and psi[at] > 3.0 * self.floor[i]:
                room = 0.6 * psi[at]
            share = min(share, room / max(abs(step[at]), 1e-300))
        if self.shape:
            share = min(share, TAU_STEP / max(abs(step[-1]), 1e-300))
        out = psi + step * share
        for k, (i, j) in enumerate(self.problem.entries):
            if i == j:
                out[self.first + k] = max(out[self.first + k], self.floor[i])
        return np.asarray(out)

    def _moved(self, at: _At, target: Array) -> _At | None:
        """The point a step leads to, or one on the way there that has a mode."""
        for k in range(8):
            found = self.look(at.psi + (target - at.psi) * 0.5**k, outer=True)
            if found is not None:
                return found
        return None

    # -- errors --------------------------------------------------------------------------------------------------

    def error(self, at: _At, H: Array, held: np.ndarray) -> Array:
        """The Monte Carlo error of each parameter over its standard error."""
        free, out = np.flatnonzero(~held), np.zeros(len(at.psi))
        each = self._each(at)[free]
        V = np.linalg.pinv(H[np.ix_(free, free)], hermitian=True)
        spread = V @ np.cov(each).reshape(len(free), len(free)) @ V / each.shape[1]
        out[free] = np.sqrt(np.maximum(np.diag(spread), 0.0) / np.maximum(np.diag(V), 1e-300))
        return out

    def _each(self, at: _At) -> Array:
        """The probes' part of the score, per probe (parameters, k): -½ Σ_j h_j ∂W_j/∂ψ along the mode, and -T_k."""
        joint, problem, lam = self.joint, self.problem, at.state.point.lambda_
        spread = self.solver.spread(problem, lam, at.state.weights, at.state.M)
        assert spread.more is not None and spread.trace_parts is not None
        own, moved = self._tangents(at)
        eta, products = joint.linear(at.state.point, at.state.u), joint.products(*spread.more)
        mediated, direct = joint.effects(moved), joint.effects(own)
        p, r = self.first, len(problem.entries)
        out, lock = np.zeros((len(at.psi), self.solver.probes.shape[1])), Lock()

        def work(part: Part) -> None:
            pieces = joint.pieces(part)
            terms = problem.density.terms(eta(part, pieces), part.rows.cells, at.state.point.tau)
            h = products(part, pieces)
            change = mediated(part, pieces)
            change[:p] += problem.Q.T @ part.rows.F
            change[p : p + r] += direct(part, pieces)
            found = (change * terms.slope) @ h
            if terms.curvature_shape is not None:
                found[-1] += terms.curvature_shape @ h
            with lock:
                out[:] -= 0.5 * found

        problem.scan(work)
        for k, (i, j) in enumerate(problem.entries):
            f = int(np.searchsorted(problem.offsets, i, side="right")) - 1
            out[p + k] -= spread.trace_parts[f][i - problem.offsets[f], j - problem.offsets[f]]
        return out

    def _tangents(self, at: _At) -> tuple[Array, Array]:
        """Per entry D of Λ its own part D u of b; and, per parameter, Λ dû: both over single effects."""
        state, problem, lam = at.state, self.problem, at.state.point.lambda_
        assert state.ZWX is not None
        u, c, ends = problem.split(state.u[:, None]), problem.split(state.c[:, None]), problem.ends
        own, back = np.zeros((ends[-1], len(problem.entries))), np.zeros((ends[-1], len(problem.entries)))
        for k, (i, j) in enumerate(problem.entries):
            f = int(np.searchsorted(problem.offsets, i, side="right")) - 1
            a, b, q = i - problem.offsets[f], j - problem.offsets[f], problem.kernels[f].q
            own[ends[f] + a : ends[f + 1] : q, k] = u[f][b, 0]
            back[ends[f] + b : ends[f + 1] : q, k] = c[f][a, 0]
        rhs = [-problem.scaled(lam, state.ZWX, transpose=True)]
        rhs.append(back - problem.scaled(lam, state.observed.times(problem, own), transpose=True))
        if state.c_shape is not None:
            rhs.append(problem.scaled(lam, state.c_shape[:, None], transpose=True))
        return own, problem.scaled(lam, self.solver.roughly(state.M_o, np.hstack(rhs)))

    def _ended(self, at: _At, held: np.ndarray, error: Array, converged: bool, message: str, length: float) -> JointSolution:
        psi = np.where(held, 0.0, at.psi)
        lam = self.point(psi).lambda_
        signs = np.where(np.diag(lam) < 0.0, -1.0, 1.0)
        flips = np.ones(len(psi))
        for k, (_, j) in enumerate(self.problem.entries):
            flips[self.first + k] = signs[j]
        H = self._hessian(at)
        inside = ~held
        information = np.where(np.outer(inside, inside), H * np.outer(flips, flips), np.nan)
        vcov, free = np.full_like(H, np.nan), np.flatnonzero(inside)
        vcov[np.ix_(free, free)] = inverse(information[np.ix_(free, free)])
        singular = bool(held.any()) or bool(np.linalg.eigvalsh(lam.T @ self.typical @ lam)[0] < ZERO**2)
        point = self.point(psi * flips)
        u = self.joint.mode(point, np.zeros_like(at.state.u) if (flips < 0.0).any() else at.state.u)[0]
        state = self.joint.state(point, u, outer=False)  # where an element was held at its floor, it is zero here
        logdet, logdet_error = cast(Iterated, state.M).lanczos()
        loglik = state.value - 0.5 * float(u @ u) - 0.5 * logdet
        solution = GLMMSolution(
            psi * flips, lam * signs, loglik, information, vcov, converged, singular, length, self.evaluations, message, at.rough
        )
        return JointSolution(solution, error, logdet_error / 2.0, self.solver.probes.shape[1], u, *self._covariances(state))

    def _covariances(self, state: State) -> tuple[list[Array], float]:
        """ΛM⁻¹Λ' per level, from samples v ~ N(0, M⁻¹) (R7), and the error of the standard deviations."""
        joint, problem, point, u = self.joint, self.problem, state.point, state.u
        eta, sums, lock = joint.linear(point, u), joint.level_sums(SAMPLES), Lock()

        def work(part: Part) -> None:
            pieces = joint.pieces(part)
            root = np.sqrt(np.maximum(problem.density.terms(eta(part, pieces), part.rows.cells, point.tau).curvature, 0.0))
            rng = np.random.default_rng((self.solver.seed, 1, *part.place))
            noise = (rng.integers(0, 2, (SAMPLES, len(root)), dtype=np.int8) * 2.0 - 1.0) * root
            with lock:
                add_levels(sums, part, pieces, noise)

        problem.scan(work)
        rng = np.random.default_rng((self.solver.seed, 2))
        rhs = problem.scaled(point.lambda_, problem.joined(sums), transpose=True)
        rhs = rhs + rng.standard_normal(rhs.shape)
        v = self.solver.roughly(state.M, rhs)
        blocks = state.weights.spherical(problem, point.lambda_).S
        parts = [split_covariance(D, r, x) for D, r, x in zip(blocks, problem.split(rhs), problem.split(v), strict=True)]
        known, sampled = [own for own, _ in parts], [total / SAMPLES for _, total in parts]
        each = zip(problem.lambdas(point.lambda_), known, sampled, strict=True)
        out = [np.einsum("ia,abm,jb->ijm", lam, own + part, lam) for lam, own, part in each]
        return out, sd_error(known, sampled, SAMPLES)
