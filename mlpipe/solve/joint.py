"""A GLMM with several grouping factors: the joint Laplace approximation and its exact gradient (FORMULAS R8; Bates et al. 2015;
Kristensen et al. 2016).

All random effects together have one mode, found by penalized iteratively reweighted least squares: each step factors
M = Λ'Z'WZΛ + I over the same structure as a linear model's, with weights W that change. -½log|M| is differentiated by the leverages of the
rows, and through the mode by one adjoint solve.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Lock

import numpy as np

from .coded_rows import Factored, JointProblem, Part, Solver, Spread, Weights, add_levels
from .kernel import Look, Piece, Point
from .link import Array

SETTLED = 3e-6  # of u, whose prior spread is 1: Newton's next error is its square
CHORD = 1e-2  # step from which a factored M serves further steps, each of which then shrinks by about as much
CHORD_SETTLED = 1e-9
MAX_STEPS, MAX_HALVINGS = 100, 20


@dataclass
class State:
    """The mode at a point: `u` (all,), the Laplace approximation's parts there."""

    point: Point
    u: Array
    value: float
    by_gamma: Array
    c: Array
    weights: Weights
    M: Factored
    observed: Weights
    M_o: Factored
    shape: float = 0.0
    c_shape: Array | None = None
    gram: Array | None = None
    ZWX: Array | None = None
    shape_information: float = 0.0

    @property
    def loglik(self) -> float:
        """log f - ½u'u - ½log|M|."""
        return self.value - 0.5 * float(self.u @ self.u) - 0.5 * self.M.logdet


@dataclass
class _Joint:
    """log f and Λ'Z'ℓ' at some u; Z'WZ where it was asked for."""

    value: float
    g: Array
    weights: Weights | None
    u: Array

    @property
    def merit(self) -> float:
        """The joint log-density."""
        return self.value - 0.5 * float(self.u @ self.u)


@dataclass
class Joint:
    """Evaluations of the joint Laplace approximation."""

    problem: JointProblem
    solver: Solver
    u: Array = field(init=False)

    def __post_init__(self) -> None:
        self.u = np.zeros(self.problem.ends[-1])

    def __call__(self, points: Sequence[Point], main: bool) -> list[Look]:
        """A `scan` for `glmm.solve_glmm`, whose Q is the identity."""
        looks = []
        for point in points:
            look, u = self.look(point, self.u, outer=main)
            if main and math.isfinite(look.loglik):
                self.u = u
            looks.append(look)
        return looks

    def look(self, point: Point, u: Array, *, outer: bool) -> tuple[Look, Array]:
        """Log-likelihood and score, and (if `outer`) an approximation of the information; and the mode, from u nearby."""
        with np.errstate(all="ignore"):  # what is not finite ends as a likelihood of zero
            try:
                u, rough = self.mode(point, u)
                state = self.state(point, u, outer=outer)
                score = self.score(state)
            except np.linalg.LinAlgError:
                return self._failed(), u
            loglik = state.loglik
            information = self.information(state) if outer else np.zeros((len(score),) * 2)
        if not (math.isfinite(loglik) and np.isfinite(score).all() and np.isfinite(information).all()):
            return self._failed(), u
        return Look(loglik, score, information, rough), u

    def _failed(self) -> Look:
        size = self.problem.p + len(self.problem.entries) + self.problem.density.family.shape
        return Look(-math.inf, np.zeros(size), np.zeros((size, size)))

    def moments(self, point: Point) -> tuple[Array, Array]:
        """A start for theta from Σ(c² - S) / ΣS² over levels per random effect at Λ = 0, c = Z'ℓ', S = Z'WZ, one factor at a time; and the
        mean of S, block-diagonal over factors. The point's Λ is the identity."""
        problem = self.problem
        with np.errstate(all="ignore"):
            at = self._joint(point, np.zeros(problem.ends[-1]), weighted=True)
        assert at.weights is not None
        typical, sds = np.zeros((problem.offsets[-1],) * 2), list[float]()
        for c, S, first, last in zip(problem.split(at.g[:, None]), at.weights.S, problem.offsets[:-1], problem.offsets[1:], strict=True):
            typical[first:last, first:last] = S.mean(axis=2)
            diagonal = np.einsum("aam->am", S)
            mean = np.maximum(diagonal.mean(axis=1), 1e-300)
            variance = (c[:, 0] ** 2 - diagonal).sum(axis=1) / np.maximum((diagonal**2).sum(axis=1), 1e-300)
            sds += np.sqrt(np.clip(variance, 0.05 / mean, np.maximum(25.0, 1e3 / mean))).tolist()
        return np.array([sds[i] if i == j else 0.0 for i, j in problem.entries]), typical

    def posterior(self, point: Point) -> tuple[Array, list[Array]]:
        """The modes (all,) and the conditional covariances ΛM⁻¹Λ' of each level, (q_k, q_k, m_k) per factor."""
        with np.errstate(all="ignore"):
            u, _ = self.mode(point, self.u)
            at = self.state(point, u, outer=False)
            return u, self.solver.spread(self.problem, point.lambda_, at.weights, at.M).blocks

    # -- rows ----------------------------------------------------------------------------------------------------

    def linear(self, point: Point, u: Array) -> Callable[[Part, Sequence[Piece]], Array]:
        """A function that gives the linear predictor of some rows."""
        gamma, effects = self.problem.Q @ point.gamma, self.effects(self.problem.scaled(point.lambda_, u[:, None]))

        def eta(part: Part, pieces: Sequence[Piece]) -> Array:
            out = gamma @ part.rows.F + effects(part, pieces)[0]
            return np.asarray(out if part.rows.offset is None else out + part.rows.offset)

        return eta

    def effects(self, b: Array) -> Callable[[Part, Sequence[Piece]], Array]:
        """A function that gives Zb (k, n) of some rows, for b over single effects (all, k)."""
        parts = [np.ascontiguousarray(part.transpose(1, 0, 2)) for part in self.problem.split(b)]

        def at_rows(part: Part, pieces: Sequence[Piece]) -> Array:
            out = np.zeros((b.shape[1], part.rows.F.shape[1]))
            for piece, code, own in zip(pieces, part.codes, parts, strict=True):
                for row, columns in zip(out, own, strict=True):
                    for a, values in enumerate(columns):
                        row += piece.times(a, values[code])
            return out

        return at_rows

    def pieces(self, part: Part) -> list[Piece]:
        """The random columns of some rows, by factor."""
        return [Piece(part.rows, kernel) for kernel in self.problem.kernels]

    def level_sums(self, columns: int) -> list[Array]:
        """Nothing summed yet, (q_k, columns, m_k) for every factor."""
        return [np.zeros((kernel.q, columns, m)) for kernel, m in zip(self.problem.kernels, self.problem.levels, strict=True)]

    # -- the mode ------------------------------------------------------------------------------------------------

    def mode(self, point: Point, u: Array) -> tuple[Array, int]:
        """The joint mode, and 1 where the search did not settle."""
        at, size = self._joint(point, u, weighted=True), math.inf
        for _ in range(MAX_STEPS):
            assert at.weights is not None
            M = self._step_matrix(point, at)
            step = M.solve((at.g - at.u)[:, None])[:, 0]
            size = float(np.abs(step).max(initial=0.0))
            if size < SETTLED:
                return at.u + step, 0
            if size < CHORD and (found := self._chord(point, at, step, M)) is not None:
                return found, 0
            moved = self._halved(point, at, step)
            if moved is None:
                return at.u, int(not size < CHORD)
            at = moved
        return at.u, 1

    def _step_matrix(self, point: Point, at: _Joint) -> Factored:
        """M, or with a curvature that is never negative where it is not positive definite."""
        assert at.weights is not None
        try:
            return self.solver.factored(self.problem, point.lambda_, at.weights)
        except np.linalg.LinAlgError:
            safe = self._joint(point, at.u, weighted=True, safe=True).weights
            assert safe is not None
            return self.solver.factored(self.problem, point.lambda_, safe)

    def _chord(self, point: Point, at: _Joint, step: Array, M: Factored) -> Array | None:
        """The mode by further steps with the same M, None where they do not shrink."""
        u, size = at.u + step, float(np.abs(step).max())
        for _ in range(MAX_STEPS):
            near = self._joint(point, u, weighted=False)
            step = M.solve((near.g - u)[:, None])[:, 0]
            new = float(np.abs(step).max())
            if not new < 0.3 * size:
                return u if new < SETTLED else None
            u, size = u + step, new
            if size < CHORD_SETTLED:
                return u
        return None

    def _halved(self, point: Point, at: _Joint, step: Array) -> _Joint | None:
        """The first of u + step, u + step/2, … whose joint density is not lower."""
        slack = 1e-11 * abs(at.merit)
        for k in range(MAX_HALVINGS):
            tried = self._joint(point, at.u + step * 0.5**k, weighted=True)
            if tried.merit >= at.merit - slack and np.isfinite(tried.g).all():
                return tried
        return None

    def _joint(self, point: Point, u: Array, *, weighted: bool, safe: bool = False) -> _Joint:
        problem, density, eta = self.problem, self.problem.density, self.linear(point, u)
        weights = Weights.zeros(problem) if weighted else None
        values, lock = [0.0], Lock()
        c = self.level_sums(1)

        def work(part: Part) -> None:
            pieces = self.pieces(part)
            at = eta(part, pieces)
            score, w = density.newton(at, part.rows.cells, point.tau)
            if safe:
                w = density.safe_curvature(at, part.rows.cells, point.tau)
            value = float(density.loglik(at, part.rows.cells, point.tau).sum()) if weighted else 0.0
            with lock:
                values.append(value)
                add_levels(c, part, pieces, [score])
                if weights is not None:
                    weights.add(part, pieces, w)

        problem.scan(work)
        g = problem.scaled(point.lambda_, problem.joined(c), transpose=True)[:, 0]
        return _Joint(math.fsum(values), g, weights.finished() if weights is not None else None, u)

    # -- likelihood and score ------------------------------------------------------------------------------------

    def state(self, point: Point, u: Array, *, outer: bool) -> State:
        """What the likelihood, the score and (if `outer`) the information need, at the mode u."""
        problem, density, eta = self.problem, self.problem.density, self.linear(point, u)
        weights, split = Weights.zeros(problem), density.expected
        observed = Weights.zeros(problem) if split else weights
        shaped, p = density.family.shape, problem.p
        lock, values, shapes, informations = Lock(), [0.0], [0.0], [0.0]
        gram, tops, by_gamma = np.zeros((p, p)), 1 + shaped, np.zeros(len(problem.Q))
        c = self.level_sums(tops)
        ZWX = self.level_sums(p if outer else 0)

        def work(part: Part) -> None:
            pieces = self.pieces(part)
            at = eta(part, pieces)
            terms = density.terms(at, part.rows.cells, point.tau)
            X = problem.Q.T @ part.rows.F if outer else None
            second = density.by_shape(at, part.rows.cells, point.tau).second if shaped and outer else None
            with lock:
                values.append(float(terms.value.sum()))
                by_gamma[:] += part.rows.F @ terms.score
                add_levels(c, part, pieces, [terms.score] if terms.score_shape is None else [terms.score, terms.score_shape])
                weights.add(part, pieces, terms.curvature)
                if split:
                    observed.add(part, pieces, terms.observed)
                if shaped:
                    shapes.append(float(terms.shape.sum()))  # type: ignore[union-attr]
                if X is not None:
                    weighted = X * terms.curvature
                    gram[:] += weighted @ X.T
                    add_levels(ZWX, part, pieces, weighted)
                if second is not None:
                    informations.append(max(-float(second.sum()), 0.1 * float(np.abs(second).sum())))

        problem.scan(work)
        sums, products = problem.joined(c), problem.joined(ZWX)
        weights.finished()
        M = self.solver.factored(problem, point.lambda_, weights)
        M_o = self.solver.factored(problem, point.lambda_, observed.finished()) if split else M
        return State(
            point, u, math.fsum(values), by_gamma, sums[:, 0], weights, M, observed, M_o, math.fsum(shapes), sums[:, 1] if shaped else None,
            gram, products if outer else None, math.fsum(informations),
        )  # fmt: skip

    def score(self, at: State) -> Array:
        """∂L by (beta*, the entries of Λ, tau) (R8)."""
        problem, lam = self.problem, at.point.lambda_
        spread = self.solver.spread(problem, lam, at.weights, at.M)
        zq, by_gamma, by_shape = self._through(at, spread)
        a = at.M_o.solve(problem.scaled(lam, zq[:, None], transpose=True))
        b = problem.scaled(lam, a)
        z_kappa = zq - at.observed.times(problem, b)[:, 0]
        by_beta = problem.Q.T @ (at.by_gamma - 0.5 * by_gamma) + 0.5 * self._mediated(at, b)
        inner = at.c - 0.5 * z_kappa
        traces = spread.traces
        if spread.trace_parts is not None:
            traces = [T + each.mean(axis=2) for T, each in zip(traces, spread.trace_parts, strict=True)]
        parts = zip(traces, *(problem.split(v[:, None]) for v in (inner, at.u, at.c, a[:, 0])), strict=True)
        full = np.zeros_like(lam)
        for (T, i, u, c, own), first, last in zip(parts, problem.offsets[:-1], problem.offsets[1:], strict=True):
            full[first:last, first:last] = i[:, 0] @ u[:, 0].T - 0.5 * c[:, 0] @ own[:, 0].T - T
        out = [by_beta, np.array([full[i, j] for i, j in problem.entries])]
        if at.c_shape is not None:
            out.append(np.array([at.shape - 0.5 * by_shape - 0.5 * float(b[:, 0] @ at.c_shape)]))
        return np.concatenate(out)

    def row_terms(self, at: State) -> Callable[[Part, Sequence[Piece]], tuple[Array, Array, Array]]:
        """A function that gives ℓ', W with the observed curvature, and κ of some rows: the score by beta is X'(ℓ' - ½κ)."""
        lam, eta = at.point.lambda_, self.linear(at.point, at.u)
        spread = self.solver.spread(self.problem, lam, at.weights, at.M)
        zq, _, _ = self._through(at, spread)
        a = at.M_o.solve(self.problem.scaled(lam, zq[:, None], transpose=True))
        leverages, shift = self.leverages(spread), self.effects(self.problem.scaled(lam, a))

        def at_rows(part: Part, pieces: Sequence[Piece]) -> tuple[Array, Array, Array]:
            terms = self.problem.density.terms(eta(part, pieces), part.rows.cells, at.point.tau)
            kappa = leverages(part, pieces) * terms.slope - terms.observed * shift(part, pieces)[0]
            return terms.score, terms.observed, kappa

        return at_rows

    def _through(self, at: State, spread: Spread) -> tuple[Array, Array, float]:
        """Z'q, q = h ∂W/∂η; Fq; and Σ h ∂W/∂tau."""
        problem, eta, leverages = self.problem, self.linear(at.point, at.u), self.leverages(spread)
        lock, shapes, by_gamma = Lock(), [0.0], np.zeros(len(problem.Q))
        zq = self.level_sums(1)

        def work(part: Part) -> None:
            pieces = self.pieces(part)
            terms = problem.density.terms(eta(part, pieces), part.rows.cells, at.point.tau)
            h = leverages(part, pieces)
            q = h * terms.slope
            with lock:
                add_levels(zq, part, pieces, [q])
                by_gamma[:] += part.rows.F @ q
                if terms.curvature_shape is not None:
                    shapes.append(float(h @ terms.curvature_shape))

        problem.scan(work)
        return problem.joined(zq)[:, 0], by_gamma, math.fsum(shapes)

    def _mediated(self, at: State, b: Array) -> Array:
        """X'WZb (p,) with the observed W."""
        if at.ZWX is not None and at.observed is at.weights:
            return np.asarray(at.ZWX.T @ b[:, 0])
        problem, eta = self.problem, self.linear(at.point, at.u)
        shift, lock, total = self.effects(b), Lock(), np.zeros(len(problem.Q))

        def work(part: Part) -> None:
            pieces = self.pieces(part)
            _, observed = problem.density.newton(eta(part, pieces), part.rows.cells, at.point.tau)
            with lock:
                total[:] += part.rows.F @ (observed * shift(part, pieces)[0])

        problem.scan(work)
        return np.asarray(problem.Q.T @ total)

    def leverages(self, spread: Spread) -> Callable[[Part, Sequence[Piece]], Array]:
        """A function that gives h_j = z_j'ΛM⁻¹Λ'z_j of some rows."""
        more = None if spread.more is None else self.products(*spread.more)

        def at_rows(part: Part, pieces: Sequence[Piece]) -> Array:
            h = np.zeros(part.rows.F.shape[1])
            for piece, code, block in zip(pieces, part.codes, spread.blocks, strict=True):
                for i in range(len(block)):
                    for j in range(i + 1):
                        h += piece.times(i, piece.times(j, (block[i, j] * (1.0 if i == j else 2.0))[code]))
            for (k, o), block in spread.cells.items():
                cell = part.cells[k, o]
                for i in range(len(block)):
                    for j in range(block.shape[1]):
                        h += pieces[k].times(i, pieces[o].times(j, 2.0 * block[i, j][cell]))
            return h if more is None else h + more(part, pieces).mean(axis=1)

        return at_rows

    def products(self, left: Array, right: Array) -> Callable[[Part, Sequence[Piece]], Array]:
        """A function that gives (Z left)·(Z right) (n, k) of some rows, column by column of what is over single effects (all, k)."""
        sides = [[np.ascontiguousarray(part.transpose(0, 2, 1)) for part in self.problem.split(v)] for v in (left, right)]

        def at_rows(part: Part, pieces: Sequence[Piece]) -> Array:
            both = []
            for side in sides:
                total = np.zeros((part.rows.F.shape[1], left.shape[1]))
                for piece, code, own in zip(pieces, part.codes, side, strict=True):
                    for a, values in enumerate(own):
                        z = piece.Z[a]
                        total += values[code] if z is None else z[:, None] * values[code]
                both.append(total)
            return np.asarray(both[0] * both[1])

        return at_rows

    def information(self, at: State) -> Array:
        """An approximation of the information to start from: the expected one of the working linear model, beta and Λ apart, the family's
        parameter on its own (R5's average information with a known residual variance)."""
        problem, lam, p, r = self.problem, at.point.lambda_, self.problem.p, len(self.problem.entries)
        assert at.ZWX is not None and at.gram is not None
        G = self._working(at)
        SG = at.weights.times(problem, G)
        rhs = problem.scaled(lam, np.hstack([at.ZWX, SG]), transpose=True)
        solved = self.solver.roughly(at.M, rhs)
        out = np.zeros((p + r + problem.density.family.shape,) * 2)
        out[:p, :p] = at.gram - rhs[:, :p].T @ solved[:, :p]
        AI = 0.5 * (G.T @ SG - rhs[:, p:].T @ solved[:, p:])
        out[p : p + r, p : p + r] = (AI + AI.T) / 2.0
        if problem.density.family.shape:
            out[-1, -1] = at.shape_information
        return out

    def _working(self, at: State) -> Array:
        """g_D = D u + Λ D'c for each entry D of Λ, over single effects (all, entries)."""
        problem, columns, ends = self.problem, [], self.problem.ends
        lams = problem.lambdas(at.point.lambda_)
        u, c = problem.split(at.u[:, None]), problem.split(at.c[:, None])
        for i, j in problem.entries:
            k = int(np.searchsorted(problem.offsets, i, side="right")) - 1
            a, b = i - problem.offsets[k], j - problem.offsets[k]
            g = lams[k][:, b][:, None] * c[k][a, 0][None]
            g[a] += u[k][b, 0]
            column = np.zeros(ends[-1])
            column[ends[k] : ends[k + 1]] = g.T.ravel()
            columns.append(column)
        return np.column_stack(columns)
