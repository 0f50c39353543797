"""Generalized linear models, plain and mixed: rows -> spool -> passes of the block kernel -> estimates."""
from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from . import robust_mixed
from .checkpoint import Checkpoint
from .errors import ConfigError, did_you_mean
from .families import check_mixed, check_plain, check_weights, checked_family
from .findings import noted
from .formula import Formula, parse
from .options import METHODS, Options
from .passes import Estimates, Model, Settled, block_sandwich, built, plain, solved
from .planning import prepare
from .plans import Plan, Request
from .progress import Watch, stage
from .robust import checked, names_of
from .solve.density import Density, density
from .solve.sandwich import cluster_factor
from .verdict import report

if TYPE_CHECKING:
    from .compressed import Compressed
    from .gather import Gathered
    from .generalized_result import GLMFit, GLMMFit
    from .solve.glmm import GLMMSolution


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
    cluster: str | Sequence[str] | None = None,
    vcov: str | None = None,
    method: str = "auto",
    start: Sequence[float] | None = None,
    checkpoint: Any = None,
    options: Options | None = None,
) -> GLMMFit:
    """Fits a generalized linear mixed model by maximum likelihood: of one grouping factor by quadrature, of several by the joint Laplace
    approximation.

    Args:
        formula: lme4's syntax, `y ~ x + (1 + x | g)`; a binomial response may be `cbind(successes, failures)`.
        family: "binomial", "poisson", "negbinomial", "negbinomial1", "gamma", "inverse_gaussian", "gaussian", "beta".
        link: the family's customary one if None.
        nagq: 1 for the Laplace approximation, k for adaptive Gauss-Hermite quadrature with k nodes a random effect (Pinheiro and
            Chao 2006).
        trials: numbers of trials of a binomial proportion.
        weights: prior weights (variance phi / w), for families with a dispersion.
        freq: rows that stand for several.
        cluster: the grouping factor, for a sandwich covariance of the coefficients over its blocks: "CR0" or "CR1" (the default) by
            `vcov`.
        start: theta to start from.
        checkpoint: a file that keeps the state, from which the same fit goes on.
        options: limits, tolerances, and `curvature`, the Hessian in the Laplace determinant.

    `data`, `offset`, `levels`, `contrasts`, `na` and `method` are as in `mlpipe.lmm`.

    Family parameters (shape, dispersion) are estimated by maximum likelihood too; the log-likelihood has all its constants.
    Raises FormulaError, ConfigError, DataError, ResourceError; warns by SingularFitWarning, RankWarning, SeparationWarning,
    ConvergenceWarning.
    """
    began = time.perf_counter()
    options = options or Options()
    request = request_of(
        formula, family=family, link=link, nagq=nagq, trials=trials, weights=weights, freq=freq, offset=offset, levels=levels,
        contrasts=contrasts, na=na, options=options,
    )  # fmt: skip
    parsed, made = _checked(formula, method), _density(request, options)
    clusters, kind = robust_mixed.checked_generalized(parsed, cluster, vcov)
    plan, rows = gathered(data, request, options, compress=True)
    with rows.spool:
        model = built(parsed, plan, rows, made, nagq)
        settings = (request.family, request.link, nagq, options.curvature)
        state = Checkpoint(checkpoint, plan, rows.info, settings) if checkpoint is not None else None
        fit, solution = _mixed(formula, model, data, start, options, state, method)
        if kind is not None and solution is not None:
            meat = block_sandwich(model, solution)
            fit.spread = fit.spread.of(meat * cluster_factor(kind, rows.spool.n_blocks, rows.nobs, len(fit.names)))
            robust_mixed.noted(fit, kind, clusters, rows.spool.n_blocks)
    return _told(fit, model, began, options)


def refitted(kept: Compressed, request: Request, before: Estimates | None) -> GLMMFit:
    """The mixed model of rows that a store kept, from where another fit of it ended, if it is given; its `info` goes on in the fit's.

    Errors and warnings as in `glmm`.
    """
    from .keeping import spooled

    began, options = time.perf_counter(), request.options
    parsed, made = _checked(request.formula, "auto"), _density(request, options)
    rows = spooled(kept, options)
    with rows.spool:
        model = built(parsed, Settled(kept.recipe, request), rows, made, request.nagq)
        fit, _ = _mixed(request.formula, model, None, None, options, None, "auto", before)
    return _told(fit, model, began, options)


def _mixed(
    formula: str, model: Model, data: Any, start: Sequence[float] | None, options: Options, state: Checkpoint | None, method: str,
    before: Estimates | None = None,
) -> tuple[GLMMFit, GLMMSolution | None]:  # fmt: skip
    """The fit over gathered rows, and the solution that it is made of where there is one grouping factor."""
    if model.plan.recipe.factors:
        from . import several_generalized

        start = before.theta if before is not None else start
        return several_generalized.fitted(formula, model, data, start, options, state, method), None
    from .generalized_result import GLMMFit

    solution = solved(model, start, options, state, before)
    return GLMMFit.from_solution(formula, model, solution, data, options), solution


def _told(fit: GLMMFit, model: Model, began: float, options: Options) -> GLMMFit:
    noted(fit, model, fit.nagq)
    fit.info["seconds"]["total"] = fit.seconds = time.perf_counter() - began
    report(fit, options)
    return fit


def request_of(
    formula: str, *, family: str, link: str | None = None, nagq: int = 1, trials: str | None = None, weights: str | None = None,
    freq: str | None = None, offset: str | None = None, levels: Mapping[str, Sequence[Any]] | None = None,
    contrasts: Mapping[str, str] | None = None, na: str = "drop", collect: str = "fit", options: Options,
) -> Request:  # fmt: skip
    """What is read of the rows of a mixed model. Raises ConfigError for a family, link or weights that it has not."""
    family, link = checked_family(family, link)
    check_mixed(parse(formula), nagq)
    check_weights(family, weights)
    return Request(
        formula, weights=weights, freq=freq, offset=offset, levels=levels, contrasts=contrasts, na=na, collect=collect, family=family,
        link=link, trials=trials, nagq=nagq, options=options,
    )  # fmt: skip


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
        cluster: column(s) whose combinations are blocks of rows that may be correlated: the covariance is the sandwich of Liang and
            Zeger (1986).
        vcov: "CR0", "CR1" or "CR2" (with `cluster`; CR1 is the default), "HC0" to "HC3" (without), None for the model's own.

    Other arguments and errors as in `glmm`.
    """
    from .generalized_result import GLMFit

    began = time.perf_counter()
    options = options or Options()
    base, link = checked_family(family, link, quasi=True)
    parsed = parse(formula)
    check_plain(parsed)
    check_weights(base, weights)
    clusters = names_of(cluster, "cluster")
    robust = checked(vcov, bool(clusters))
    request = Request(
        formula, weights=weights, freq=freq, offset=offset, levels=levels, contrasts=contrasts, na=na, family=base, link=link,
        trials=trials, groups=clusters, options=options,
    )  # fmt: skip
    made = _density(request, options)
    plan, rows = gathered(data, request, options, compress=False)
    with rows.spool:
        model = built(parsed, plan, rows, made, 1)
        watch = Watch(lambda: rows.spool.passes, math.nan if family.startswith("quasi") else rows.spool.constant)
        with stage("fit", rows.info["seconds"], None, options, live=watch):
            solution = plain(model, None, options.tol, options.max_passes, watch.told)
            fit = GLMFit.from_glm(formula, model, solution, data, options, family, robust)
    noted(fit, model, 1)
    fit.info["seconds"]["total"] = fit.seconds = time.perf_counter() - began
    report(fit, options)
    return fit


def _density(request: Request, options: Options) -> Density:
    assert request.family is not None and request.link is not None
    made = density(request.family, request.link, expected=options.curvature == "expected")
    if made.expected and not made.family.expected:
        raise ConfigError(f"the expected curvature of family {request.family!r} has no closed form", hint='curvature="observed"')
    return made


def _checked(formula: str, method: str) -> Formula:
    parsed = parse(formula)
    if method not in METHODS:
        raise ConfigError(f"method = {method!r} is not known", hint=did_you_mean(str(method), list(METHODS)))
    if method == "iterative" and len({bar.groups for bar in parsed.random}) == 1:
        raise ConfigError("one grouping factor is solved exactly", hint='method="auto"')
    return parsed


def gathered(data: Any, request: Request, options: Options, *, compress: bool, repeatable: bool = False) -> tuple[Plan, Gathered]:
    """The plan of a request and the rows it reads, as `gather` does, in a spool that is the caller's to close. Raises ConfigError for
    statistics."""
    from .gather import gather
    from .sources import open_source
    from .stats import SuffStats

    if isinstance(data, SuffStats):
        raise ConfigError("sufficient statistics of a linear model do not hold what a generalized one needs", hint="pass the rows")
    with closing(open_source(data, options=options)) as engine:
        plan = prepare(engine, request)
        return plan, gather(plan, compress=compress, repeatable=repeatable)
