"""Generalized linear mixed models with several grouping factors: gathered rows -> the joint solver's problem -> estimates with names."""
from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import DataError, ResourceError
from .gather import usual_evaluations
from .generalized_result import GLMMFit, common
from .levels import levels_of
from .passes import CENTRAL_ROWS, START_CHUNKS, START_SHARE, START_TOLERANCE, Model, plain, tau_bound
from .progress import Watch, stage
from .reduction import check_levels, stacked_inverse
from .result import RandomTerm
from .solve.coded_rows import Exactly, JointProblem, Part
from .solve.glmm import GLMMProblem, GLMMSolution, solve_glmm
from .solve.joint import Joint
from .solve.joint_iterative import SAMPLES, JointSolution, solve_joint
from .solve.kernel import Chunk, Kernel, Point, Rows
from .solve.meetings import Pairs, Pattern, stays_sparse
from .solve.probes import Probed, chosen, filling, probes_for
from .term_order import TermOrder

if TYPE_CHECKING:
    import pyarrow as pa

    from .checkpoint import Checkpoint
    from .options import Options

Array = np.ndarray

CELL_BYTES = 64  # of a combination of levels, per pair of factors: its codes, cell, weights and their place in sparse matrices
SPARSE = 6.0  # trials per level below which the Laplace approximation of 0/1 data is worth a note


class JointModel:
    """A model of several factors over a spool whose blocks are the combinations of all keys, in the solver's order of `terms`."""

    def __init__(self, model: Model) -> None:
        import pyarrow as pa

        self.model, recipe, spool = model, model.plan.recipe, model.rows.spool
        assert spool.keys is not None
        keys = pa.table(dict(zip(recipe.groups, spool.keys.columns, strict=True)))
        coded = [levels_of(columns, keys) for columns in recipe.factors]
        self.terms = TermOrder.of([levels for levels, _ in coded], recipe.factors, recipe.formula, model.random)
        for levels in self.terms.levels:
            check_levels(levels.group, levels.columns[0], len(levels))
        if (model.density.family.name, model.density.link.name) == ("gaussian", "identity") and recipe.weights is None:
            self.terms.check_separable(model.rows.rows)
        self._check_memory()
        self.codes = [coded[k][1] for k in self.terms.order]
        sizes = [len(self.terms.levels[k]) for k in self.terms.order]
        kernels = tuple(Kernel(model.density, recipe.z, Z, ()) for Z in self.terms.maps())
        pairs, self.cells = self._cells(sizes, [kernel.q for kernel in kernels])
        self.problem = JointProblem(model.density, model.Q, kernels, tuple(sizes), self.terms.sizes, pairs, self.scan)

    def _check_memory(self) -> None:
        factors, limit = len(self.terms.levels), self.model.plan.request.options.memory_bytes
        combinations, pairs = self.model.rows.spool.n_blocks, factors * (factors - 1) // 2
        needed = combinations * (4 * factors + CELL_BYTES * pairs)
        if needed > limit * 3 // 4:
            raise ResourceError(
                f"{combinations:,} combinations of levels of {factors} grouping factors need {needed / 1e6:,.0f} MB, "
                f"the memory limit is {limit / 1e6:,.0f} MB", code="memory_limit", hint="raise memory_limit",
            )  # fmt: skip

    def _cells(self, levels: Sequence[int], q: Sequence[int]) -> tuple[Pairs, dict[tuple[int, int], np.ndarray]]:
        """The cells of every pair of factors, and the cell of each combination of keys."""
        pairs, places = {}, {}
        for k in range(len(q)):
            for h in range(k + 1, len(q)):
                met, place = np.unique(self.codes[k].astype(np.int64) * levels[h] + self.codes[h], return_inverse=True)
                pairs[k, h] = Pattern(met // levels[h], met % levels[h], (q[k], q[h]), (levels[k], levels[h]))
                places[k, h] = place.astype(np.int32)
        return pairs, places

    @property
    def sizes(self) -> tuple[int, ...]:
        """Coefficients of each term, in the solver's order."""
        return tuple(size for sizes in self.terms.sizes for size in sizes)

    def over(self, model: Model) -> JointModel:
        """The same over the same rows with other responses."""
        out = copy(self)
        out.model, out.problem = model, replace(self.problem, scan=out.scan)
        return out

    def scan(self, work: Callable[[Part], None]) -> None:
        """Calls work on every piece of the spool, in threads: one pass."""

        def each(chunk: Chunk) -> None:
            for number, rows in enumerate(chunk.pieces):
                work(self._part(chunk, rows, (chunk.first, number)))

        self.model.rows.spool.map(each)

    def _part(self, chunk: Chunk, rows: Rows, place: tuple[int, int]) -> Part:
        cells = {pair: _spread(chunk, rows, cell) for pair, cell in self.cells.items()}
        return Part(rows, self.codes_of(chunk, rows), cells, place)

    def codes_of(self, chunk: Chunk, rows: Rows) -> tuple[np.ndarray, ...]:
        """Per factor in the solver's order the level (n,) of each row of a piece."""
        return tuple(_spread(chunk, rows, code) for code in self.codes)

    def path(self, method: str, limit: int) -> str:
        """"exact" or "iterative": the exact one where nested, or where its dense rest and the work to fill it are small.

        Raises ResourceError where the exact one was asked for and its rest exceeds half the memory limit.
        """
        if stays_sparse(self.problem.pairs):
            return "iterative" if method == "iterative" else "exact"
        rest = self.problem.ends[-1] - self.problem.ends[1]
        path = chosen(method, rest, filling(self.problem), limit)
        if path == "too large":
            message = f"the crossed factors leave a dense matrix of {rest:,} rows, {8 * rest**2 / 1e6:,.0f} MB"
            raise ResourceError(message, code="memory_limit", hint='method="iterative", or raise memory_limit')
        return path


def _spread(chunk: Chunk, rows: Rows, values: np.ndarray) -> np.ndarray:
    """Values of blocks at the rows of a piece of a chunk."""
    return values[chunk.blocks] if len(rows.starts) == rows.F.shape[1] else np.repeat(values[chunk.blocks], rows.lengths)


def fitted(
    text: str, model: Model, data: Any, start: Sequence[float] | None, options: Options, state: Checkpoint | None, method: str
) -> GLMMFit:
    """The fit over gathered rows. Raises DataError for a factor with one level, ResourceError where the exact path does not fit."""
    joint = JointModel(model)
    how = joint.path(method, options.memory_bytes)
    probed = probes_for(joint.problem, options.seed, options.threads or os.cpu_count() or 1) if how == "iterative" else None
    solver, rows = Joint(joint.problem, probed or Exactly()), model.rows
    with stage("start", rows.info["seconds"], None, options):
        psi = state.psi() if state is not None else None
        first, typical = _started(joint, solver, psi, options)
        if start is not None and psi is None:
            p = joint.problem.p
            first[p : p + len(joint.problem.entries)] = joint.terms.theta_star(start)
    saved = state.save if state is not None else None
    watch = Watch(lambda: rows.spool.passes, rows.spool.constant, usual_evaluations(len(first), exact=probed is None))
    with stage("fit", rows.info["seconds"], None, options, live=watch) as fields:
        if probed is None:
            found = _exactly(joint, solver, first, typical, options, saved, watch)
        else:
            found = _iterated(joint, solver, probed, first, typical, options, _watched(saved, watch))
        fields |= {"evaluations": found.solution.evaluations, "score": found.solution.score}
    return _result(text, joint, found, data, options)


def _watched(saved: Callable[[Array], None] | None, watch: Watch) -> Callable[[Array], None]:
    """What is told of every step: it is counted, and saved."""

    def stepped(psi: Array) -> None:
        watch.told()
        if saved is not None:
            saved(psi)

    return stepped


def _exactly(
    joint: JointModel, solver: Joint, first: Array, typical: Array, options: Options, saved: Callable[[Array], None] | None, watch: Watch
) -> JointSolution:
    """The maximum by the search of one-factor models, without Monte Carlo error."""
    problem, search = joint.problem, _search(joint, solver, typical)
    search = replace(search, scan=watch.over(solver))
    solution = solve_glmm(search, first, tol=options.tol, max_evaluations=options.max_passes, saved=saved)
    tau = float(solution.psi[-1]) if search.shape else 0.0
    u, covariances = solver.posterior(Point(solution.psi[: problem.p], solution.lambda_, tau))
    return JointSolution(solution, None, 0.0, 0, u, covariances)


def _search(joint: JointModel, solver: Joint, typical: Array) -> GLMMProblem:
    problem, central = joint.problem, joint.model.rows.spool.n_rows <= CENTRAL_ROWS
    shape, bound = joint.model.density.family.shape, tau_bound(joint.model)
    constant = joint.model.rows.spool.constant
    return GLMMProblem(solver, np.eye(problem.p), problem.entries, problem.offsets[-1], shape, typical, central, bound, constant=constant)


def resumed(joint: JointModel, psi: Array, options: Options) -> tuple[GLMMProblem, GLMMSolution]:
    """The problem of the exact path and its optimum, from a point nearby."""
    solver = Joint(joint.problem, Exactly())
    search = _search(joint, solver, _started(joint, solver, psi, options)[1])
    return search, solve_glmm(search, psi, tol=options.tol, max_evaluations=options.max_passes)


def with_squares(joint: JointModel, search: GLMMProblem) -> GLMMProblem:
    """The same with all elements of the terms' factors free: for a profile, whose factors are not triangular."""
    whole = replace(joint.problem, square=True)
    return replace(search, scan=Joint(whole, Exactly()), entries=whole.entries)


def _iterated(
    joint: JointModel, solver: Joint, probed: Probed, first: Array, typical: Array, options: Options, saved: Callable[[Array], None] | None
) -> JointSolution:
    bound = tau_bound(joint.model)
    try:
        return solve_joint(
            solver, probed, first, typical, tol=options.tol, max_evaluations=options.max_passes, tau_bound=bound, saved=saved
        )
    except np.linalg.LinAlgError as error:
        link, family = joint.model.density.link.name, joint.model.density.family.name
        message = f"there is no mode of the random effects to start from, for family {family!r} with link {link!r}"
        raise DataError(message, code="no_mode", hint="give start=, or use another link") from error


def _started(joint: JointModel, solver: Joint, psi: Array | None, options: Options) -> tuple[Array, Array]:
    """psi from a GLM on some rows and moments of the scores per level at Λ = 0 (unless it is given), and the mean Z'WZ of a level."""
    model, problem = joint.model, joint.problem
    if psi is None:
        spool, p = model.rows.spool, problem.p
        plain_psi = plain(model, spool.some(START_SHARE, START_CHUNKS), START_TOLERANCE, options.max_passes).psi
        tau = float(plain_psi[-1]) if model.density.family.shape else 0.0
        theta, typical = solver.moments(Point(plain_psi[:p], np.eye(problem.offsets[-1]), tau))
        return np.concatenate([plain_psi[:p], theta, plain_psi[p:]]), typical
    tau = float(psi[-1]) if model.density.family.shape else 0.0
    return psi, solver.moments(Point(psi[: problem.p], np.eye(problem.offsets[-1]), tau))[1]


def _result(text: str, joint: JointModel, found: JointSolution, data: Any, options: Options) -> GLMMFit:
    model, problem, solution = joint.model, joint.problem, found.solution
    p, r, shape = problem.p, len(problem.entries), model.density.family.shape
    terms, rows = [], joint.terms.rows()
    for term, at in ((model.random[i], rows[i]) for i in joint.terms.sequence):
        star = solution.lambda_[at, at]
        terms.append(RandomTerm(term.group, term.names, term.raw(star), term.Q, term.R, star))
    order = [p + place for place in joint.terms.theta_places()]
    tau = float(solution.psi[-1]) if shape else 0.0
    fit = GLMMFit(
        **common(text, model, solution.psi[:p], solution.vcov[:p, :p], data, options),
        terms=tuple(terms),
        loglik=solution.loglik + model.rows.spool.constant,
        converged=solution.converged and not solution.rough,
        singular=solution.singular,
        score=solution.score,
        evaluations=solution.evaluations,
        message="the joint mode of the random effects was not found" if solution.rough else solution.message,
        theta_covariance=solution.vcov[np.ix_(order, order)],
        nagq=1,
        curvature=options.curvature,
        tau=tau,
        tau_variance=float(solution.vcov[-1, -1]) if shape else math.nan,
    )
    assert r == len(order)
    every = [*range(p), *order, *range(p + r, p + r + shape)]
    fit.joint = solution.vcov[np.ix_(every, every)].tolist()
    fit.sigma = math.sqrt(fit.dispersion) if fit.has_residual else math.nan
    levels = {factor.group: len(factor) for factor in joint.terms.levels}
    fit.n_blocks = max(levels.values())
    fit.info |= {
        "evaluations": solution.evaluations, "score": solution.score, "information": solution.information, "levels": levels,
        "blocks": fit.n_blocks,
    }  # fmt: skip
    fit.info["notes"] = [*fit.info["notes"], *_notes(joint)]
    fit.info["method"] = "exact" if found.error is None else "iterative"
    if found.error is not None:
        _carlo(fit, joint, found, found.error)
    fit.effects_tables = _modes(joint, found)
    return fit


def _carlo(fit: GLMMFit, joint: JointModel, found: JointSolution, error: Array) -> None:
    """The Monte Carlo error of the iterative path, for `info` and the printed summary."""
    p = joint.problem.p
    fit.info["monte_carlo"] = {
        "probes": found.probes, "error": error[p : p + len(joint.problem.entries)].tolist(), "error_fixed": error[:p].tolist(),
        "loglik_error": found.loglik_error, "samples": SAMPLES, "sd_error": found.sd_error,
    }  # fmt: skip
    fit.info["notes"].append(
        f"iterative solver: Monte Carlo error at most {error.max():.1%} of a standard error ({found.probes} probes); log-likelihood to "
        f"about {found.loglik_error:.2g}; conditional standard deviations of the random effects to "
        f"{found.sd_error:.1%} ({SAMPLES} samples)"
    )


def _notes(joint: JointModel) -> list[str]:
    """What nests within what, and levels of few trials."""
    out = joint.terms.nested({pair: len(cells.rows) for pair, cells in joint.problem.pairs.items()})
    if joint.model.density.family.name == "binomial":
        for factor in (joint.terms.levels[k] for k in joint.terms.order):
            if (each := joint.model.rows.size / len(factor)) < SPARSE:
                out.append(f"levels of {factor.group} have {each:.1f} trials on average: the Laplace approximation may be biased")
    return out


def _modes(joint: JointModel, found: JointSolution) -> dict[str, pa.Table]:
    """Per group: its key columns, and per coefficient the mode and its conditional standard deviation."""
    from .effects import mode_table

    problem, out = joint.problem, {}
    modes = problem.split(problem.scaled(found.solution.lambda_, found.u[:, None]))
    for k, mode, covariance in zip(joint.terms.order, modes, found.covariances, strict=True):
        factor, terms = joint.terms.levels[k], [joint.model.random[i] for i in joint.terms.bars[k]]
        back = stacked_inverse([term.R for term in terms])
        values = back @ mode[:, 0]
        sds = np.sqrt(np.maximum(np.einsum("ia,abm,ib->im", back, covariance, back), 0.0))
        out[factor.group] = mode_table(terms, factor, values, sds)
    return out
