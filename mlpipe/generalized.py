"""Generalized linear models, plain and mixed: rows -> spool -> passes of the block kernel -> estimates."""
from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .checkpoint import Checkpoint
from .errors import (
    ConfigError,
    ConvergenceError,
    ConvergenceWarning,
    DataError,
    RankWarning,
    SeparationWarning,
    SingularFitWarning,
    did_you_mean,
)  # fmt: skip
from .families import check_mixed, check_plain, check_weights, checked_family
from .features import Recipe
from .formula import Formula, parse
from .marginal import spreads
from .options import Options
from .planning import Plan, Request, prepare
from .progress import stage
from .reduction import Coding, Fixed, Random
from .solve.density import Density, density
from .solve.glm import GLMLook, GLMSolution, glm_look, solve_glm
from .solve.glmm import GLMMProblem, GLMMSolution, solve_glmm
from .solve.kernel import MAX_NODES, Chunk, Kernel, Look, Point, folded

if TYPE_CHECKING:
    from .gather import Gathered
    from .generalized_result import GLMFit, GLMMFit

START_SHARE, START_CHUNKS = 1 / 16, 2  # of the chunks that the start is found on
CENTRAL_ROWS = 200_000  # cells up to which the information takes two looks a parameter
SPARSE = 6.0  # rows per block below which the Laplace approximation of 0/1 data is worth a warning
SEPARATED = 1e-8  # information along a direction, relative to the largest, that only separation leaves
START_TOLERANCE = 1e-3


def glmm(
    formula: str,
    data: Any,
    *,
    family: str,
    link: str | None = None,
    nagq: int = 1,
    trials: str | None = None,
    weights: str | None = None,
    freq: str | None = None,
    offset: str | None = None,
    levels: Mapping[str, Sequence[Any]] | None = None,
    contrasts: Mapping[str, str] | None = None,
    na: str = "drop",
    method: str = "auto",
    start: Sequence[float] | None = None,
    checkpoint: Any = None,
    options: Options | None = None,
) -> GLMMFit:
    """Fits a generalized linear mixed model with one grouping factor by maximum likelihood.

    Args:
        formula: lme4's syntax, `y ~ x + (1 + x | g)`; a binomial response may be `cbind(successes, failures)`.
        family: "binomial", "poisson", "negbinomial", "negbinomial1", "gamma", "inverse_gaussian", "gaussian", "beta".
        link: the family's customary one if None.
        nagq: 1 for the Laplace approximation, k for adaptive Gauss-Hermite quadrature with k nodes a random effect (Pinheiro and
            Chao 2006).
        trials: numbers of trials of a binomial proportion.
        weights: prior weights (variance phi / w), for families with a dispersion. freq: rows that stand for several.
        start: theta to start from. checkpoint: a file that keeps the state, from which the same fit goes on.
        options: limits, tolerances, and `curvature`, the Hessian in the Laplace determinant.
        data, offset, levels, contrasts, na, method: as in `mlpipe.lmm`.

    Family parameters (shape, dispersion) are estimated by maximum likelihood too; the log-likelihood has all its constants.
    Raises FormulaError, ConfigError, DataError, ResourceError; warns by SingularFitWarning, RankWarning, SeparationWarning,
    ConvergenceWarning.
    """
    from .generalized_result import GLMMFit

    began = time.perf_counter()
    options = options or Options()
    family, link = checked_family(family, link)
    made = _density(family, link, options)
    parsed = _checked(formula, family, weights, nagq, method)
    request = Request(
        formula, weights=weights, freq=freq, offset=offset, levels=levels, contrasts=contrasts, na=na, family=family, link=link,
        trials=trials, nagq=nagq, options=options,
    )  # fmt: skip
    plan, rows = _rows(data, request, options, compress=True)
    with rows.spool:
        model = _model(parsed, plan, rows, made, nagq)
        state = Checkpoint(checkpoint, plan, rows.info, (family, link, nagq, options.curvature)) if checkpoint is not None else None
        solution = _solved(model, start, options, state)
        fit = GLMMFit.from_solution(formula, model, solution, data, options)
    _noted(fit, model, nagq)
    fit.info["seconds"]["total"] = fit.seconds = time.perf_counter() - began
    _report(fit, options)
    return fit


def glm(
    formula: str,
    data: Any,
    *,
    family: str,
    link: str | None = None,
    trials: str | None = None,
    cluster: str | Sequence[str] | None = None,
    vcov: str | None = None,
    weights: str | None = None,
    freq: str | None = None,
    offset: str | None = None,
    levels: Mapping[str, Sequence[Any]] | None = None,
    contrasts: Mapping[str, str] | None = None,
    na: str = "drop",
    options: Options | None = None,
) -> GLMFit:
    """Fits a generalized linear model by maximum likelihood, reading the rows once into a spool (McCullagh and Nelder 1989).

    Args:
        family: as in `glmm`, and "quasibinomial", "quasipoisson" (Pearson dispersion, no likelihood).
        cluster: column(s) whose blocks of rows may be correlated: the covariance is the sandwich of Liang and Zeger (1986).
        vcov: "CR0" or "CR1" (with `cluster`; CR1 is the default), "HC0" or "HC1" (without), None for the model's own.

    Other arguments and errors as in `glmm`.
    """
    from .generalized_result import GLMFit

    began = time.perf_counter()
    options = options or Options()
    base, link = checked_family(family, link, quasi=True)
    made = _density(base, link, options)
    parsed = parse(formula)
    check_plain(parsed)
    check_weights(base, weights)
    clusters = (cluster,) if isinstance(cluster, str) else tuple(cluster or ())
    robust = _robust(vcov, bool(clusters))
    request = Request(
        formula, weights=weights, freq=freq, offset=offset, levels=levels, contrasts=contrasts, na=na, family=base, link=link,
        trials=trials, groups=clusters, options=options,
    )  # fmt: skip
    plan, rows = _rows(data, request, options, compress=False)
    with rows.spool:
        model = _model(parsed, plan, rows, made, 1)
        with stage("fit", rows.info["seconds"], None, options):
            solution = _glm(model, None, options.tol, options.max_passes)
            fit = GLMFit.from_glm(formula, model, solution, data, options, family, robust)
    _noted(fit, model, 1)
    fit.info["seconds"]["total"] = fit.seconds = time.perf_counter() - began
    _report(fit, options)
    return fit


def _density(family: str, link: str, options: Options) -> Density:
    made = density(family, link, expected=options.curvature == "expected")
    if made.expected and not made.family.expected:
        raise ConfigError(f"the expected curvature of family {family!r} has no closed form", hint='curvature="observed"')
    return made


def _checked(formula: str, family: str, weights: str | None, nagq: int, method: str) -> Formula:
    parsed = parse(formula)
    check_mixed(parsed, nagq)
    if method not in ("auto", "exact"):
        raise ConfigError(f"method = {method!r}: one grouping factor is solved exactly", hint=did_you_mean(str(method), ["auto", "exact"]))
    check_weights(family, weights)
    return parsed


def _robust(vcov: str | None, clustered: bool) -> str | None:
    known = ["CR0", "CR1"] if clustered else ["HC0", "HC1"]
    if vcov is not None and vcov not in known:
        why = "with cluster" if clustered else "without cluster"
        raise ConfigError(f"vcov = {vcov!r} is not available {why} for a GLM", hint=f"known: {', '.join(known)}")
    return vcov or ("CR1" if clustered else None)


def _rows(data: Any, request: Request, options: Options, *, compress: bool) -> tuple[Plan, Gathered]:
    from .gather import gather
    from .sources import open_source
    from .stats import SuffStats

    if isinstance(data, SuffStats):
        raise ConfigError("sufficient statistics of a linear model do not hold what a generalized one needs", hint="pass the rows")
    with closing(open_source(data, options=options)) as engine:
        plan = prepare(engine, request)
        return plan, gather(plan, compress=compress)


@dataclass(frozen=True)
class Model:
    """A model over a spool: the maps between the user's coordinates and the solver's, and the kernel."""

    plan: Plan
    rows: Gathered
    density: Density
    fixed: Fixed
    random: tuple[Random, ...]
    kernel: Kernel

    @property
    def Q(self) -> np.ndarray:
        """(m, p): gamma over the covariate features = Q beta*."""
        return self.fixed.Q[: self.plan.recipe.n_covariates]


def _model(parsed: Formula, plan: Plan, rows: Gathered, made: Density, nagq: int) -> Model:
    from .reduction import fixed_part, random_part

    recipe = plan.recipe
    coding = Coding(recipe, parsed, None, {})
    sums = _Sums(_padded(recipe, rows), rows.size)
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


def _padded(recipe: Recipe, rows: Gathered) -> np.ndarray:
    """The cross-products over all features, those with the response left at 0."""
    gram = np.zeros((len(recipe.features),) * 2)
    gram[: recipe.n_covariates, : recipe.n_covariates] = rows.gram
    return gram


def _sign(term: Random) -> Random:
    """The same with columns of Q turned so that R's diagonal is positive: an intercept's column is then exactly 1."""
    signs = np.where(np.diag(term.R) < 0.0, -1.0, 1.0)
    return replace(term, Q=term.Q * signs, R=term.R * signs[:, None])


def _check_blocks(plan: Plan, rows: Gathered) -> None:
    if rows.spool.n_blocks < 2:
        group = ":".join(plan.recipe.groups)
        raise DataError(f"the grouping factor {group} has fewer than two levels", code="one_level", column=plan.recipe.groups[0])


# -- plain GLM ---------------------------------------------------------------------------------------------------------


def _glm(model: Model, chosen: Sequence[int] | None, tol: float, max_passes: int) -> GLMSolution:
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
        return GLMLook(total.loglik, J.T @ total.score, J.T @ total.information @ J)

    return solve_glm(look, _first(model), shape=shape, tol=tol, max_passes=max_passes)


def _first(model: Model) -> np.ndarray:
    """A start: the mean response on the constant, the family's parameter by moments."""
    rows, family = model.rows, model.density.family
    mean, variance = rows.mean, max(rows.variance, 1e-12)
    if family.name == "binomial":
        mean = (mean * rows.size + 0.5) / (rows.size + 1.0)
    elif family.low == 0.0:
        mean = max(mean, 0.5 / rows.size)
    eta = model.density.link.function(mean) - rows.offset
    psi = model.Q.T @ rows.sums * eta / rows.size
    if not family.shape:
        return np.asarray(psi)
    excess = max(variance - mean, 0.05 * mean)
    tau = {
        "negbinomial": mean**2 / excess, "negbinomial1": excess / max(mean, 1e-12), "gamma": mean**2 / variance,
        "inverse_gaussian": mean**3 / variance, "gaussian": 1.0 / variance, "beta": max(mean * (1.0 - mean) / variance - 1.0, 0.1),
    }[family.name]  # fmt: skip
    return np.append(psi, math.log(tau))


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


def _solved(model: Model, start: Sequence[float] | None, options: Options, state: Checkpoint | None) -> GLMMSolution:
    rows, spool = model.rows, model.rows.spool
    u = np.zeros((model.kernel.q, spool.n_blocks))
    some = spool.some(START_SHARE, START_CHUNKS)
    with stage("start", rows.info["seconds"], None, options):
        psi = state.psi() if state is not None else None
        if psi is None:
            psi, typical = _start(model, some, options)
            if start is not None:
                psi = _given(model, psi, start)
            if len(some) < len(spool.parts):
                problem = _problem(model, _Passes(model, some, u), typical)
                psi = solve_glmm(problem, psi, max_evaluations=50, loose=True).psi
        else:
            typical = _moments(model, psi, some)[1]
    with stage("fit", rows.info["seconds"], None, options) as fields:
        problem = _problem(model, _Passes(model, None, u), typical)
        saved = state.save if state is not None else None
        solution = solve_glmm(problem, psi, tol=options.tol, max_evaluations=options.max_passes, saved=saved)
        fields |= {"evaluations": solution.evaluations, "score": solution.score}
    model.rows.info["modes"] = u
    return solution


def _problem(model: Model, scan: _Passes, typical: np.ndarray) -> GLMMProblem:
    return GLMMProblem(
        scan, model.Q, model.kernel.entries, model.kernel.q, model.density.family.shape, typical, model.rows.spool.n_rows <= CENTRAL_ROWS
    )


def _start(model: Model, some: Sequence[int], options: Options) -> tuple[np.ndarray, np.ndarray]:
    """psi from a GLM and moments of its block scores, on some chunks."""
    solution = _glm(model, some, START_TOLERANCE, options.max_passes)
    if not math.isfinite(solution.loglik):
        link, family = model.density.link.name, model.density.family.name
        raise DataError(f"the link {link!r} gives means that family {family!r} has not", code="link_domain", hint="use another link")
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
    """psi with the user's theta (lower triangles by column, terms in order). Raises ConfigError for a wrong number."""
    from .reduction import lower_factor

    values, at, out = np.asarray(theta, dtype=float), 0, []
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


# -- what is worth saying ----------------------------------------------------------------------------------------------


def _noted(fit: Any, model: Model, nagq: int) -> None:
    """Notes on what the numbers mean, and separation, into `fit.info`."""
    rows, notes = model.rows, fit.info["notes"]
    fit.info["passes"] = round(rows.spool.rows_read / max(rows.spool.n_rows, 1), 2)
    per_block = rows.size / max(rows.spool.n_blocks, 1)
    if model.random:
        fit.info["per_block"] = round(per_block, 2)
    if model.random and model.density.family.name == "binomial":
        fit.info["blocks_without_variation"] = rows.flat
        if per_block < SPARSE and nagq == 1:
            notes.append(f"blocks have {per_block:.1f} trials on average: the Laplace approximation may be biased, compare nagq=7 or more")
    fit.info |= spreads(model, fit.gamma, fit.terms)
    fit.info["separation"] = separated(fit, model)


def separated(fit: Any, model: Model) -> list[str]:
    """Coefficients along which a binomial likelihood has no maximum: directions without information (Albert and Anderson 1984)."""
    p = len(fit.names)
    information = fit.info.pop("information")[:p, :p]
    if model.density.family.name != "binomial" or not p or not np.isfinite(information).all():
        return []
    values, vectors = np.linalg.eigh(information)
    scale = np.sqrt(np.maximum(np.diag(model.fixed.T.T @ _padded(model.plan.recipe, model.rows) @ model.fixed.T) / model.rows.size, 1e-300))
    found: dict[str, None] = {}
    for k in np.flatnonzero(values < SEPARATED * max(values[-1], 0.25e-3 * model.rows.size)):
        direction = np.abs(np.linalg.solve(model.fixed.R, vectors[:, k])) * scale
        found.update(dict.fromkeys(name for name, share in zip(fit.names, direction, strict=True) if share > 0.5 * direction.max()))
    return list(found)


def _report(fit: Any, options: Options) -> None:
    """Warnings for what the result's fields say; raises where the options ask for it."""
    if fit.dropped:
        warnings.warn(f"fixed effects repeat others and were dropped: {', '.join(fit.dropped)}", RankWarning, stacklevel=3)
    if fit.info["separation"]:
        names = ", ".join(fit.info["separation"])
        warnings.warn(f"{names} separate(s) the outcomes: these estimates go to infinity", SeparationWarning, stacklevel=3)
    if fit.singular:
        warnings.warn("the fit is singular: a random-effects covariance is on the boundary", SingularFitWarning, stacklevel=3)
    if not fit.converged:
        message = f"the fit did not converge: {fit.message} (scaled score {fit.score:.2g} after {fit.evaluations} evaluations)"
        if options.on_nonconvergence == "raise":
            raise ConvergenceError(message)
        warnings.warn(message, ConvergenceWarning, stacklevel=3)

