"""Generalized linear models, plain and mixed: rows -> spool -> passes of the block kernel -> estimates."""
from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

from .checkpoint import Checkpoint
from .design import level_label
from .errors import ConfigError, DataError, did_you_mean
from .families import check_mixed, check_plain, check_weights, checked_family
from .findings import noted, report
from .formula import Formula, parse
from .options import METHODS, Options
from .passes import Model, built, plain, resumed, solved
from .planning import Plan, Request, prepare
from .progress import stage
from .solve.density import Density, density

if TYPE_CHECKING:
    from .gather import Gathered
    from .generalized_result import GLMFit, GLMMFit
    from .solve.glmm import GLMMProblem, GLMMSolution


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
    """Fits a generalized linear mixed model by maximum likelihood: of one grouping factor by quadrature, of several by the joint Laplace
    approximation.

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
        model = built(parsed, plan, rows, made, nagq)
        settings = (family, link, nagq, options.curvature)
        state = Checkpoint(checkpoint, plan, rows.info, settings) if checkpoint is not None else None
        if plan.recipe.factors:
            from . import several_generalized

            fit = several_generalized.fitted(formula, model, data, start, options, state, method)
        else:
            fit = GLMMFit.from_solution(formula, model, solved(model, start, options, state), data, options)
    noted(fit, model, nagq)
    fit.info["seconds"]["total"] = fit.seconds = time.perf_counter() - began
    report(fit, options)
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
        model = built(parsed, plan, rows, made, 1)
        with stage("fit", rows.info["seconds"], None, options):
            solution = plain(model, None, options.tol, options.max_passes)
            fit = GLMFit.from_glm(formula, model, solution, data, options, family, robust)
    noted(fit, model, 1)
    fit.info["seconds"]["total"] = fit.seconds = time.perf_counter() - began
    report(fit, options)
    return fit


@contextmanager
def respooled(fit: GLMMFit, *, compress: bool = True) -> Iterator[tuple[GLMMProblem, GLMMSolution, Model]]:
    """The rows of a fit once more: its problem over a new spool, its optimum there, and the model; noted in `info`.

    Raises DataError where the source is gone or has changed.
    """
    recipe, options = fit.recipe, fit.options or Options()
    if recipe.factors:
        raise ConfigError(
            "profiles and bootstraps of generalized models are for one grouping factor", code="several_factors", hint='method="wald"'
        )
    if fit.source is None:
        raise DataError("the fit has no data, and a generalized model keeps no statistics", code="no_source", hint="fit it again")
    levels = {v.label: [level_label(level) for level in v.levels] for v in recipe.variables.values() if v.kind == "category"}
    request = Request(
        fit.formula, weights=recipe.weights, freq=recipe.freq, offset=recipe.offset, levels=levels, contrasts=recipe.contrasts,
        family=recipe.family, link=fit.link, trials=recipe.trials, nagq=fit.nagq, options=options,
    )  # fmt: skip
    plan, rows = _rows(fit.source, request, options, compress=compress)
    with rows.spool:
        if rows.rows != fit.rows:
            raise DataError("the source changed since the fit", code="source_changed", hint="fit it again")
        made = density(fit.base_family, fit.link, expected=fit.curvature == "expected")
        model = built(parse(fit.formula), plan, rows, made, fit.nagq)
        problem, solution = resumed(model, fit.beta, [term.factor for term in fit.terms], fit.tau, options)
        fit.info["notes"] = [*fit.info.get("notes", []), "the rows were read once more for inference"]
        yield problem, solution, model


def _density(family: str, link: str, options: Options) -> Density:
    made = density(family, link, expected=options.curvature == "expected")
    if made.expected and not made.family.expected:
        raise ConfigError(f"the expected curvature of family {family!r} has no closed form", hint='curvature="observed"')
    return made


def _checked(formula: str, family: str, weights: str | None, nagq: int, method: str) -> Formula:
    parsed = parse(formula)
    check_mixed(parsed, nagq)
    if method not in METHODS:
        raise ConfigError(f"method = {method!r} is not known", hint=did_you_mean(str(method), list(METHODS)))
    if method == "iterative" and len({bar.groups for bar in parsed.random}) == 1:
        raise ConfigError("one grouping factor is solved exactly", hint='method="auto"')
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
