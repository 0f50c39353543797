"""The one place that joins an engine to a solver: rows -> statistics -> estimates."""
from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .design import level_label
from .errors import ConfigError, DataError, did_you_mean
from .options import METHODS, Options
from .progress import stage
from .verdict import report

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from .engines.base import Engine
    from .held import Held
    from .plans import Plan
    from .reduction import Reduced
    from .result import LMMFit, MixedFit
    from .solve.lmm import LMMSolution
    from .stats import SuffStats

_OWN = {  # keywords that not every function has
    "lmm": ("reml", "method", "cluster", "vcov"),
    "suffstats": ("responses", "collect"),
    "glmm": ("family", "link", "nagq", "trials", "cluster", "vcov", "checkpoint"),
    "glm": ("family", "link", "trials", "cluster", "vcov"),
    "ols": ("absorb", "cluster", "vcov"),
    "gee": ("groups", "family", "link", "corr", "time", "trials", "vcov"),
}
GENERALIZED = ("glmm", "glm")


def lmm(
    formula: str,
    data: Any,
    *,
    reml: bool = True,
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
    options: Options | None = None,
) -> LMMFit:
    """Fits a linear mixed model by ML or REML (Bates et al. 2015, equations 34 and 41), reading the rows twice (three times where
    a file holds NaN).

    Args:
        formula: lme4's syntax, `y ~ x + (1 + x | g)`.
        data: a path, glob or list of paths, a DuckDB relation, `mp.table`, `mp.query`, a Polars frame, anything Arrow, or SuffStats.
        reml: restricted maximum likelihood (the default), else maximum likelihood.
        weights: precision weights, residual variance sigma²/w: a column or an expression.
        freq: frequency weights: a row that stands for so many.
        offset: added to the linear predictor with coefficient 1.
        levels: level orders of factors.
        contrasts: "treatment", "sum", "helmert" or "poly" per factor.
        na: "drop" rows with missing values and count them, or "raise".
        cluster: a column, the grouping factor or one that it lies within, for cluster-robust errors of the fixed effects: "CR0", "CR1"
            (the default) or "CR2" by `vcov`, from one more scan; over statistics of collect="blocks+xx" their grouping factor, without.
        method: how several grouping factors are solved: "exact", "iterative" (Monte Carlo error stated), "auto" by their size.
        start: theta to start from, in lme4's order.
        options: limits and tolerances.

    Raises FormulaError, ConfigError, DataError, ResourceError; warns by SingularFitWarning, RankWarning, ConvergenceWarning.
    """
    from . import robust_mixed
    from .robust import Source
    from .solve.sandwich import CR

    _check_method(method)
    began = time.perf_counter()
    options = options or Options()
    clusters, kind = robust_mixed.checked(cluster, vcov, CR)
    arguments = _arguments(locals()) | {"clusters": clusters}
    if _given(data, arguments):
        own = replace(data, info=deepcopy(data.info))  # what one fit notes is not the statistics' nor the next fit's
        fit = _fitted(formula, own, data, reml, start, options, method, coding={"contrasts": contrasts, "levels": levels})
        if kind is not None:
            robust_mixed.of_statistics(fit, own, kind, clusters)
        fit.info |= _spreads(fit, own) | ({"coding": {"contrasts": contrasts, "levels": levels}} if contrasts or levels else {})
    else:
        with _collected(formula, data, arguments, options) as (stats, plan_):
            fit = _fitted(formula, stats, data, reml, start, options, method, plan_)
            if kind is not None:
                with stage("robust", stats.info["seconds"], plan_.engine, options):
                    robust_mixed.of_lmm(fit, stats, Source(plan_.engine, plan_.names), kind, clusters)
            fit.info |= _spreads(fit, stats)
            if not stats.info["rescannable"] and not stats.recipe.factors:  # the rows are gone with the engine: what needs them comes first
                fit.effects_table, fit.source = _modes(fit, plan_.engine), None
    fit.info["seconds"]["total"] = fit.seconds = time.perf_counter() - began
    report(fit, options)
    return fit


def _check_method(method: str) -> None:
    if method not in METHODS:
        raise ConfigError(f"method = {method!r} is not known", hint=did_you_mean(str(method), list(METHODS)))


def suffstats(
    formula: str,
    data: Any,
    *,
    responses: Sequence[str] | None = None,
    collect: str = "blocks",
    weights: str | None = None,
    freq: str | None = None,
    offset: str | None = None,
    levels: Mapping[str, Sequence[Any]] | None = None,
    contrasts: Mapping[str, str] | None = None,
    na: str = "drop",
    options: Options | None = None,
) -> SuffStats:
    """Collects the sufficient statistics of a formula and of all its sub-models, to fit, merge, save and update.

    `responses`: further responses to collect together (rows are complete for all). `collect`: "blocks" (per-block sums;
    mergeable, saved), "blocks+xx" (each block's own cross-products X'X, X'y, y'y too) or "fit" (least). Other arguments and errors as in
    `lmm`.
    """
    arguments = _arguments(locals()) | {"responses": tuple(responses or ()), "collect": collect}
    with _collected(formula, data, arguments, options or Options()) as (stats, _):
        return stats


def plan(
    function: str,
    formula: str,
    data: Any,
    *,
    reml: bool | None = None,
    method: str | None = None,
    responses: Sequence[str] | None = None,
    collect: str | None = None,
    family: str | None = None,
    link: str | None = None,
    nagq: int | None = None,
    trials: str | None = None,
    cluster: str | Sequence[str] | None = None,
    vcov: str | None = None,
    absorb: str | Sequence[str] | None = None,
    groups: str | Sequence[str] | None = None,
    corr: str | None = None,
    time: str | None = None,
    weights: str | None = None,
    freq: str | None = None,
    offset: str | None = None,
    levels: Mapping[str, Sequence[Any]] | None = None,
    contrasts: Mapping[str, str] | None = None,
    na: str = "drop",
    options: Options | None = None,
) -> Plan:
    """What a fit would do: SQL, passes, memory. Runs nothing but the preparatory looks.

    `function`: "lmm", "suffstats", "glmm", "glm", "ols" or "gee". Other arguments and errors as in the function of that name.
    """
    from .planning import prepare
    from .sources import open_source

    if function not in _OWN:
        raise ConfigError(f"there is no function {function!r} to plan", hint=did_you_mean(function, list(_OWN)))
    default = "blocks" if function == "suffstats" else "fit"
    arguments = _arguments(locals()) | {"collect": collect or default, "responses": tuple(responses or ())}
    own = {
        "reml": reml, "method": method, "responses": responses, "collect": collect, "family": family, "link": link, "nagq": nagq,
        "trials": trials, "cluster": cluster, "absorb": absorb, "vcov": vcov, "groups": groups, "corr": corr, "time": time,
    }  # fmt: skip
    given = {name: value for name, value in own.items() if value is not None}
    check_keywords(function, given)
    _check_method(method or "auto")
    options = options or Options()
    if function == "ols":
        from .linear import planned, request_of

        request = request_of(formula, absorb, cluster, arguments, options)
        with closing(open_source(data, options=options)) as engine:
            return planned(prepare(engine, request), vcov)
    if function == "gee":
        return _planned_gee(formula, data, given, arguments, options)
    clusters, kind = _robust(function, formula, cluster, vcov)
    more = _generalized(function, formula, given, weights) if function in GENERALIZED else {"clusters": clusters}
    request = _request(formula, arguments | more, options)
    with closing(open_source(data, options=options)) as engine:
        prepared = prepare(engine, request)
        if kind is not None and function == "lmm":
            prepared.notes.append(f"{kind} errors read the rows once more")
        if prepared.path == "crossed":
            from .several import expected as of_several

            prepared.several = of_several(prepared)
        if prepared.path == "spool":
            from .gather import expected

            prepared.expected = expected(prepared, compress=function == "glmm")
        return prepared


def _robust(
    function: str, formula: str, cluster: str | Sequence[str] | None, vcov: str | None
) -> tuple[tuple[str, ...], str | None]:
    """The clusters and the kind of robust errors of a model that is planned; raises ConfigError as the fit would."""
    from . import robust_mixed
    from .formula import parse
    from .robust import checked, names_of
    from .solve.sandwich import CR

    if function == "glmm":
        return robust_mixed.checked_generalized(parse(formula), cluster, vcov)
    if function == "lmm":
        return robust_mixed.checked(cluster, vcov, CR)
    return names_of(cluster, "cluster"), checked(vcov, cluster is not None) if function == "glm" else None


def _planned_gee(formula: str, data: Any, given: Mapping[str, Any], arguments: dict[str, Any], options: Options) -> Plan:
    from .estimating import check_order, request_of
    from .gather import expected
    from .planning import prepare
    from .sources import open_source

    request, _ = request_of(formula, options, **given, **{name: value for name, value in arguments.items() if name != "collect"})
    with closing(open_source(data, options=options)) as engine:
        check_order(engine, request)
        prepared = prepare(engine, request)
        prepared.expected = expected(prepared, compress=False)
        return prepared


def _generalized(function: str, formula: str, given: Mapping[str, Any], weights: str | None) -> dict[str, Any]:
    """What a request for a generalized model has more; raises ConfigError as the fit would."""
    from .families import check_mixed, check_plain, check_weights, checked_family
    from .formula import parse

    settings = {name: value for name, value in given.items() if name not in ("cluster", "vcov")}
    family, settings["link"] = checked_family(given["family"], given.get("link"), quasi=function == "glm")
    if function == "glmm":
        check_mixed(parse(formula), given.get("nagq", 1))
    else:
        check_plain(parse(formula))
        cluster = given.get("cluster", ())
        settings["groups"] = (cluster,) if isinstance(cluster, str) else tuple(cluster)
    check_weights(family, weights)
    return settings | {"family": family}


def fitted(function: str, formula: str, data: Any, options: Options, settings: Mapping[str, Any]) -> MixedFit:
    """The fit by the function of that name, as the command line and jobs ask for it. Raises ConfigError for settings it has not."""
    check_keywords(function, settings)
    if function == "lmm":
        return lmm(formula, data, options=options, **settings)
    if function == "ols":
        from .linear import ols

        return ols(formula, data, options=options, **settings)
    if function == "gee":
        from .estimating import gee

        return gee(formula, data, options=options, **settings)
    from . import generalized

    made: MixedFit = getattr(generalized, function)(formula, data, options=options, **settings)
    return made


def check_keywords(function: str, settings: Mapping[str, Any]) -> None:
    """Raises ConfigError for a keyword that belongs to other functions, and for a generalized model without a family or groups."""
    for name in settings:
        owners = [other for other, names in _OWN.items() if name in names]
        if owners and function not in owners:
            raise ConfigError(f"{name} does not belong to {function}", hint=f"it is for {' and '.join(owners)}")
    if function == "gee" and "groups" not in settings:
        raise ConfigError("gee needs groups", hint="the column(s) that tell blocks of correlated rows apart")
    if function in GENERALIZED and "family" not in settings:
        raise ConfigError(f"{function} needs a family", hint='such as "binomial" or "poisson"')


def _arguments(scope: dict[str, Any]) -> dict[str, Any]:
    return {name: scope[name] for name in ("weights", "freq", "offset", "levels", "contrasts", "na")}


def _request(formula: str, arguments: dict[str, Any], options: Options) -> Any:
    from .plans import Request

    return Request(formula, options=options, **arguments)


def _given(data: Any, arguments: dict[str, Any]) -> bool:
    """Whether the data are statistics; raises ConfigError for arguments that were settled when they were collected."""
    from .stats import SuffStats, check_settled

    if not isinstance(data, SuffStats):
        return False
    check_settled(data, arguments)
    return True


@contextmanager
def _collected(formula: str, data: Any, arguments: dict[str, Any], options: Options) -> Iterator[tuple[SuffStats, Plan]]:
    """The statistics, and their plan while its engine is open."""
    from .collect import collected
    from .planning import prepare
    from .sources import open_source

    request = _request(formula, arguments, options)
    with closing(open_source(data, options=options)) as engine:
        stats, plan = collected(prepare(engine, request))
        identity = engine.identity()
        stats.info.update(fingerprint=identity.fingerprint, rescannable=identity.rescannable, bytes=identity.bytes)
        yield stats, plan


def _fitted(
    formula: str, stats: SuffStats, data: Any, reml: bool, start: Sequence[float] | None, options: Options, method: str,
    plan: Plan | None = None, coding: dict[str, Any] | None = None
) -> LMMFit:
    """The fit from statistics; `plan`: how to read the rows once more where the statistics have lost too many digits.

    `coding`: contrasts and level orders other than those the statistics were collected with.
    """
    from .digits import with_digits
    from .formula import parse
    from .held import of_reduced
    from .reduction import check_levels, check_separable, reduce
    from .result import LMMFit

    parsed = parse(formula)
    if not parsed.random:
        raise ConfigError("the formula has no random term", code="no_random_term", hint="write one, such as (1 | group), or fit by ols")
    if stats.crossed is not None:
        from . import several

        return several.fitted(formula, parsed, stats, data, reml, start, options, method, plan, coding)
    if method == "iterative":
        raise ConfigError("one grouping factor is solved exactly", hint='method="auto"')
    if stats.blocks is None:
        raise DataError("the statistics have no grouping factor", code="not_collected")
    group, column, levels = ":".join(stats.recipe.groups), stats.recipe.groups[0], stats.blocks.n_blocks
    check_levels(group, column, levels)
    coding = coding or {}
    summed, parts = with_digits(stats, parsed, coding, plan)
    reduced = reduce(summed, parts, reml=reml)
    if stats.recipe.weights is None:
        check_separable(group, column, levels, max(reduced.problem.sizes), stats.n)
    found = _solved(reduced, start, options, summed)
    fit = LMMFit.from_solution(formula, parsed, summed, reduced, *found, data, options, of_reduced(summed, reduced, coding))
    fit.recipe = stats.recipe
    return fit


def _spreads(fit: LMMFit, stats: SuffStats) -> dict[str, float]:
    """What R² needs, from the sums; with precision weights these are not those of the rows."""
    from .variance import spreads

    return {} if stats.recipe.weights else spreads(fit, stats.gram, stats.n)


def _solved(reduced: Reduced, start: Sequence[float] | None, options: Options, stats: SuffStats) -> tuple[LMMSolution, np.ndarray]:
    """The optimum, and the covariance of (theta, log sigma) there."""
    from .digits import lost
    from .solve.lmm import information, solve

    initial = reduced.theta_star(start) if start is not None else None
    with stage("solve", stats.info.setdefault("seconds", {}), None, options) as fields:
        solution = solve(reduced.problem, start=initial, tol=options.tol, max_evaluations=options.max_passes)
        found = information(reduced.problem, solution)
        fields |= {"evaluations": solution.evaluations, "score": solution.score}
    if notes := lost(solution.sigma2 * reduced.problem.dof / reduced.problem.A[-1, -1]):
        stats.info["notes"] = [*stats.info.get("notes", []), *notes]
    if found.flat:
        group = reduced.random[0].group
        what = f"the rows do not tell the variances over {group}: their likelihood is flat (do fixed effects tell its levels apart?)"
        stats.info["notes"] = [*stats.info.get("notes", []), what]
    return solution, found.vcov


def recollected(fit: LMMFit) -> Held:
    """The statistics of a fit again, by one more scan of its source. Raises DataError where the source has changed since."""
    recipe = fit.recipe
    levels = {v.label: [level_label(level) for level in v.levels] for v in recipe.variables.values() if v.kind == "category"}
    own: dict[str, Any] = {"weights": recipe.weights, "freq": recipe.freq, "offset": recipe.offset, "contrasts": recipe.contrasts}
    if _given(fit.source, dict.fromkeys(("weights", "freq", "offset", "na"))):
        own = {}
    else:
        own["levels"] = levels
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = lmm(fit.formula, fit.source, reml=fit.reml, start=fit.theta.tolist(), options=fit.options, **own)
    if again.rows != fit.rows or not math.isclose(again.loglik, fit.loglik, rel_tol=1e-6, abs_tol=1e-4) or again.held is None:
        raise DataError("the source changed since the fit", code="source_changed", hint="fit it again")
    note = "the statistics were gone: the rows were read once more for inference"
    fit.info["notes"] = [*fit.info.get("notes", []), note]
    fit.info["passes"] = fit.info.get("passes", 0) + again.info.get("passes", 0)
    return again.held


def _modes(fit: LMMFit, engine: Engine) -> pa.Table:
    from . import effects

    return effects.table_of(fit, effects.from_rows(fit, engine))
