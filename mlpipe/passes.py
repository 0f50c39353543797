"""A generalized model over a spool: its start, and the passes of the block kernel that find the estimates."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from .errors import ConfigError, DataError
from .features import Recipe
from .formula import Formula
from .options import Options
from .plans import Request
from .progress import Watch, stage
from .reduction import Coding, Fixed, Random, fixed_part, lower_factor, random_part
from .solve.density import Density
from .solve.glm import TAU_BOUND, GLMLook, GLMSolution, glm_look, solve_glm
from .solve.glmm import GLMMProblem, GLMMSolution, solve_glmm
from .solve.hessian import has_hessian, hessian
from .solve.kernel import MAX_NODES, Chunk, Kernel, Look, Point, folded
from .solve.several_factors import squares

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .gather import Gathered

START_SHARE, START_CHUNKS = 1 / 16, 2  # of the chunks that the start is found on
CENTRAL_ROWS = 200_000  # cells up to which the information takes two looks a parameter
START_TOLERANCE = 1e-3


class Planned(Protocol):
    """What a model needs of the plan by which its rows were gathered."""

    @property
    def recipe(self) -> Recipe:
        """What the rows hold."""

    @property
    def request(self) -> Request:
        """What was asked for."""


class Settled(NamedTuple):
    """The same of rows that a store kept."""

    recipe: Recipe
    request: Request


@dataclass(frozen=True)
class Model:
    """A model over a spool: the maps between the user's coordinates and the solver's, and the kernel."""

    plan: Planned
    rows: Gathered
    density: Density
    fixed: Fixed
    random: tuple[Random, ...]
    kernel: Kernel

    @property
    def Q(self) -> np.ndarray:
        """(m, p): gamma over the covariate features = Q beta*."""
        return self.fixed.Q[: self.plan.recipe.n_covariates]


def built(parsed: Formula, plan: Planned, rows: Gathered, made: Density, nagq: int) -> Model:
    """The model of a formula over gathered rows. Raises ConfigError for too many nodes, DataError for fewer than two blocks."""
    recipe = plan.recipe
    coding = Coding(recipe, parsed, None, {})
    sums = _Sums(padded(recipe, rows), rows.size)
    fixed = fixed_part(sums, coding.columns(parsed.fixed), recipe)
    random = tuple(_sign(random_part(sums, bar, coding.columns(bar.terms), recipe)) for bar in parsed.random)
    entries, at = [], 0
    for term in random:
        k = len(term.names)
        entries += [(at + i, at + j) for j in range(k) for i in range(j, k)]
        at += k
    z_map = np.hstack([term.Q for term in random]) if random else np.zeros((len(recipe.z), 0))
    if nagq**at > MAX_NODES:
        needed = f"nagq = {nagq} with {at} random effects a block needs {nagq**at:,} nodes"
        raise ConfigError(f"{needed}, more than {MAX_NODES:,}", hint="lower nagq")
    kernel = Kernel(made, recipe.z, z_map, tuple(entries), nagq)
    if random:
        _check_blocks(plan, rows)
    return Model(plan, rows, made, fixed, random, kernel)


@dataclass
class _Sums:
    gram: np.ndarray
    n: float


def padded(recipe: Recipe, rows: Gathered) -> np.ndarray:
    """The cross-products over all features, those with the response left at 0."""
    gram = np.zeros((len(recipe.features),) * 2)
    gram[: recipe.n_covariates, : recipe.n_covariates] = rows.gram
    return gram


def _sign(term: Random) -> Random:
    """The same with columns of Q turned so that R's diagonal is positive: an intercept's column is then exactly 1."""
    signs = np.where(np.diag(term.R) < 0.0, -1.0, 1.0)
    return replace(term, Q=term.Q * signs, R=term.R * signs[:, None])


def _check_blocks(plan: Planned, rows: Gathered) -> None:
    if rows.spool.n_blocks < 2:
        group = ":".join(plan.recipe.groups)
        raise DataError(f"the grouping factor {group} has fewer than two levels", code="one_level", column=plan.recipe.groups[0])


# -- plain GLM ---------------------------------------------------------------------------------------------------------


def plain(
    model: Model, chosen: Sequence[int] | None, tol: float, max_passes: int, told: Callable[[float], None] | None = None
) -> GLMSolution:
    """The fit without random effects, on all chunks or the chosen ones; `told`: given each pass's log-likelihood."""
    shape, look = model.density.family.shape, plain_looks(model, chosen, told)
    solution = solve_glm(look, _first(model), shape=shape, tau_bound=tau_bound(model), tol=tol, max_passes=max_passes)
    if not math.isfinite(solution.loglik):
        link, family = model.density.link.name, model.density.family.name
        raise DataError(f"the link {link!r} gives means that family {family!r} has not", code="link_domain", hint="use another link")
    return solution


def plain_looks(
    model: Model, chosen: Sequence[int] | None, told: Callable[[float], None] | None = None
) -> Callable[[np.ndarray, bool], GLMLook]:
    """Passes over all or the chosen chunks without random effects, at (beta*, tau); see `solve.glm` and `plain`."""
    Q, spool, shape = model.Q, model.rows.spool, model.density.family.shape
    J = np.zeros((len(Q) + shape, Q.shape[1] + shape))
    J[: len(Q), : Q.shape[1]] = Q
    J[len(Q) :, Q.shape[1] :] = np.eye(int(shape))

    def look(psi: np.ndarray, safe: bool) -> GLMLook:
        gamma, tau = Q @ psi[: Q.shape[1]], float(psi[-1]) if shape else 0.0

        def one(chunk: Chunk) -> GLMLook:
            total = glm_look(model.density, chunk.pieces[0], gamma, tau, safe=safe)
            for rows in chunk.pieces[1:]:
                total = total + glm_look(model.density, rows, gamma, tau, safe=safe)
            return total

        looks = spool.map(one, chosen)
        total = looks[0]
        for part in looks[1:]:
            total = total + part
        if told is not None:
            told(total.loglik)
        return GLMLook(total.loglik, J.T @ total.score, J.T @ total.information @ J, total.sizes)

    return look


def tau_bound(model: Model) -> float:
    """tau beyond which counts have no overdispersion, below or above 0: a share of their variance, which nb2 measures by the mean; other
    shapes have no limit that means anything."""
    sign = model.density.family.vanishing
    return sign * TAU_BOUND + (math.log(max(model.rows.mean, 1.0)) if sign > 0 else 0.0) if sign else math.inf


def _first(model: Model) -> np.ndarray:
    """A start: the mean response on the constant, the family's parameter by moments."""
    rows, family = model.rows, model.density.family
    mean, variance = rows.mean, rows.variance
    if family.name == "binomial":
        mean = (mean * rows.size + 0.5) / (rows.size + 1.0)
    elif family.constant == "factorial":
        mean = max(mean, 0.5 / rows.size)
    link = model.density.link
    if math.isfinite(link.low):  # a response of either sign under a link whose means are positive: start just inside
        mean = max(mean, link.low + 0.01 * math.sqrt(variance))
    if math.isfinite(link.high):
        mean = min(mean, link.high - 0.01 * min(math.sqrt(variance), link.high - link.low))
    eta = link.function(mean) - rows.offset
    psi = model.Q.T @ rows.sums * eta / rows.size
    if not family.shape:
        return np.asarray(psi)
    return np.append(psi, first_tau(model))


def first_tau(model: Model) -> float:
    """The family's parameter by moments of the response, as if nothing explained it; weights divide a dispersion."""
    mean, variance, family = model.rows.mean, model.rows.variance, model.density.family
    mean = max(mean, 0.5 / model.rows.size) if family.constant == "factorial" else mean
    excess = max(variance - mean, 0.05 * mean)
    match family.name:
        case "negbinomial":
            tau = mean / excess * mean
        case "negbinomial1":
            tau = excess / mean
        case "gamma":
            tau = mean / variance * mean
        case "inverse_gaussian":
            tau = mean / variance * mean * mean
        case "beta":
            tau = max(mean * (1.0 - mean) / variance - 1.0, 0.1)
        case _:
            tau = 1.0 / variance
    return math.log(tau) - math.log(model.rows.weight)


# -- mixed model -------------------------------------------------------------------------------------------------------


class _Passes:
    """Passes of the kernel over (some of) the chunks, with the modes of the last."""

    def __init__(self, model: Model, chosen: Sequence[int] | None, u: np.ndarray) -> None:
        self.model, self.chosen, self.u = model, chosen, u

    def __call__(self, points: Sequence[Point], main: bool) -> list[Look]:
        kernel, spool = self.model.kernel, self.model.rows.spool

        def work(chunk: Chunk) -> list[Look]:
            u = self.u[:, chunk.blocks]
            if not main:
                return [kernel.look(chunk, point, u, outer=False)[0] for point in points]
            look, self.u[:, chunk.blocks] = kernel.look(chunk, points[0], u)  # no other thread has these blocks
            return [look]

        parts = spool.map(work, self.chosen)
        return [folded(looks) for looks in zip(*parts, strict=True)]

    def second(self, point: Point) -> np.ndarray:
        """The second derivatives of the log-likelihood, see `solve.hessian`."""
        kernel = self.model.kernel
        parts = self.model.rows.spool.map(lambda chunk: hessian(kernel, chunk, point, self.u[:, chunk.blocks]), self.chosen)
        return np.asarray(sum(parts[1:], parts[0]))


class Estimates(NamedTuple):
    """Where another fit ended: names and values of the fixed effects, theta by the user, tau."""

    names: tuple[str, ...]
    beta: np.ndarray
    theta: Sequence[float]
    tau: float


def solved(
    model: Model, start: Sequence[float] | None, options: Options, state: Checkpoint | None, before: Estimates | None = None
) -> GLMMSolution:
    """The fit from a start on some chunks, or from where a checkpoint, or another fit of the same parameters, left it."""
    rows, spool = model.rows, model.rows.spool
    u = np.zeros((model.kernel.q, spool.n_blocks))
    some = spool.some(START_SHARE, START_CHUNKS)
    with stage("start", rows.info["seconds"], None, options):
        psi = state.psi() if state is not None else None
        if psi is None and before is not None and before.names == model.fixed.names:
            psi = _from(model, before)
        if psi is None:
            psi, typical = _start(model, some, options)
            if start is not None:
                psi = _given(model, psi, start)
            if len(some) < len(spool.parts):
                problem = _problem(model, _Passes(model, some, u), typical)
                psi = solve_glmm(problem, psi, max_evaluations=50, loose=True).psi
        else:
            typical = _moments(model, psi, some)[1]
    watch = Watch(lambda: spool.passes, spool.constant)
    with stage("fit", rows.info["seconds"], None, options, live=watch) as fields:
        passes = _Passes(model, None, u)
        problem = replace(_problem(model, passes, typical), scan=watch.over(passes))
        saved = state.save if state is not None else None
        solution = solve_glmm(problem, psi, tol=options.tol, max_evaluations=options.max_passes, saved=saved)
        fields |= {"evaluations": solution.evaluations, "score": solution.score}
    model.rows.info["modes"] = u
    return solution


def _from(model: Model, before: Estimates) -> np.ndarray:
    """psi where another fit ended."""
    shape = model.density.family.shape
    psi = np.concatenate([model.fixed.R @ before.beta, np.zeros(len(model.kernel.entries)), [before.tau] if shape else []])
    return _given(model, psi, before.theta)


def block_sandwich(model: Model, solution: GLMMSolution) -> np.ndarray:
    """H⁻¹ Σ s s' H⁻¹ (p, p) of the coefficients, s the scores of blocks by all parameters that are not on the boundary (Huber 1967)."""
    u = model.rows.info["modes"]
    look = _problem(model, _Passes(model, None, u), np.eye(model.kernel.q)).look(solution.psi)
    inside = np.flatnonzero(np.isfinite(np.diag(solution.vcov)))
    at, p = np.ix_(inside, inside), model.Q.shape[1]
    return np.asarray((solution.vcov[at] @ look.outer[at] @ solution.vcov[at])[:p, :p])


def star_point(model: Model, beta: np.ndarray, factors: Sequence[np.ndarray], tau: float) -> np.ndarray:
    """(beta*, theta*, tau) from estimates in the user's coordinates."""
    theta = [lower_factor(term.R @ factor) for term, factor in zip(model.random, factors, strict=True)]
    elements = [star[i, j] for star in theta for j in range(len(star)) for i in range(j, len(star))]
    return np.concatenate([model.fixed.R @ beta, elements, [tau] if model.density.family.shape else []])


def resumed(model: Model, psi: np.ndarray, options: Options) -> tuple[GLMMProblem, GLMMSolution]:
    """The problem over all rows and its optimum, from a point nearby."""
    u = np.zeros((model.kernel.q, model.rows.spool.n_blocks))
    typical = _moments(model, psi, model.rows.spool.some(START_SHARE, START_CHUNKS))[1]
    problem = _problem(model, _Passes(model, None, u), typical)
    return problem, solve_glmm(problem, psi, tol=options.tol, max_evaluations=options.max_passes)


def with_squares(model: Model, problem: GLMMProblem, sizes: tuple[int, ...]) -> GLMMProblem:
    """The problem with all elements of the terms' factors, of these sizes, free: for a profile, whose factors are not triangular."""
    entries = squares(sizes)
    whole = replace(model, kernel=replace(model.kernel, entries=entries))
    return replace(problem, scan=_Passes(whole, None, np.zeros((model.kernel.q, model.rows.spool.n_blocks))), entries=entries)


def _problem(model: Model, scan: _Passes, typical: np.ndarray) -> GLMMProblem:
    central = model.rows.spool.n_rows <= CENTRAL_ROWS
    shape, bound = model.density.family.shape, tau_bound(model)
    second = scan.second if has_hessian(model.kernel) else None
    return GLMMProblem(
        scan, model.Q, model.kernel.entries, model.kernel.q, shape, typical, central, bound, second, constant=model.rows.spool.constant
    )


def _start(model: Model, some: Sequence[int], options: Options) -> tuple[np.ndarray, np.ndarray]:
    """psi from a GLM and moments of its block scores, on some chunks."""
    solution = plain(model, some, START_TOLERANCE, options.max_passes)
    psi = solution.psi
    theta, typical = _moments(model, psi, some)
    p = model.Q.shape[1]
    return np.concatenate([psi[:p], theta, psi[p:]]), typical


def _moments(model: Model, psi: np.ndarray, some: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """A start for theta from Σ(c² - S) / ΣS² per random effect at Λ = 0, and the mean of S = Z'WZ over blocks."""
    kernel, p = model.kernel, model.Q.shape[1]
    point = Point(model.Q @ psi[:p], np.zeros((kernel.q, kernel.q)), float(psi[-1]) if model.density.family.shape else 0.0)
    parts = model.rows.spool.map(lambda chunk: kernel.moments(chunk, point), some)
    excess, squares, S, blocks = (sum(part[k] for part in parts) for k in range(4))
    typical = np.asarray(S) / blocks
    diagonal = np.maximum(np.diag(typical), 1e-300)
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = np.where(np.asarray(squares) > 0.0, np.asarray(excess) / np.asarray(squares), 0.0)
    sd = np.sqrt(np.clip(variance, 0.05 / diagonal, np.maximum(25.0, 1e3 / diagonal)))
    return np.array([sd[i] if i == j else 0.0 for i, j in kernel.entries]), typical


def _given(model: Model, psi: np.ndarray, theta: Sequence[float]) -> np.ndarray:
    """psi with the user's theta (lower triangles by column, terms in order). Raises ConfigError for what is not as many numbers."""
    try:
        values = np.asarray(theta, dtype=float)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"start = {theta!r} is not a list of numbers", code="start") from error
    at, out = 0, []
    if not np.isfinite(values).all():
        raise ConfigError("start holds a value that is not finite", code="start")
    if values.shape != (len(model.kernel.entries),):
        raise ConfigError(f"start has {values.size} values, the model {len(model.kernel.entries)} covariance parameters")
    for term in model.random:
        k = len(term.names)
        lower = np.zeros((k, k))
        lower.T[np.triu_indices(k)] = values[at : at + k * (k + 1) // 2]
        at += k * (k + 1) // 2
        star = lower_factor(term.R @ lower)
        out += [star[i, j] for j in range(k) for i in range(j, k)]
    p = model.Q.shape[1]
    return np.concatenate([psi[:p], out, psi[p + len(out) :]])
