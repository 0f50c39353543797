"""Least squares: rows or statistics -> pooled and within estimates, with the covariance that was asked for."""
from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from . import robust
from .arrays import column
from .errors import ConfigError, DataError, ResourceError
from .formula import Formula, parse
from .least_squares import Projection, Solution, cells_of, loglik, pooled, solved, within
from .levels import Levels
from .linear_result import OLSFit, absorbed_term
from .options import Options
from .progress import stage
from .reduction import response_vector
from .robust import Fitted, Meat, Source
from .solve.sandwich import CR, LEVERED, cluster_factor, covariance, half, row_factor, ways
from .verdict import report

if TYPE_CHECKING:
    from .plans import Plan, Request
    from .solve.absorb import Leverages
    from .stats import SuffStats

Array = np.ndarray

LOST = 1e-12  # share below which statistics have no digits left of it
ROUNDING = 1e-26  # share below which nothing but rounding errors is left


def ols(
    formula: str,
    data: Any,
    *,
    absorb: str | Sequence[str] | None = None,
    cluster: str | Sequence[str] | None = None,
    vcov: str | None = None,
    weights: str | None = None,
    freq: str | None = None,
    offset: str | None = None,
    levels: Mapping[str, Sequence[Any]] | None = None,
    contrasts: Mapping[str, str] | None = None,
    na: str = "drop",
    options: Options | None = None,
) -> OLSFit:
    """Fits a linear model by (weighted) least squares from sums over the rows, in one scan.

    Args:
        formula: `y ~ x`, without random terms.
        data: as in `mlpipe.lmm`; SuffStats too.
        absorb: factor(s) whose effects are taken out without being listed: the within (fixed-effects) estimator. One factor comes from
            its block sums; several from conjugate gradients on the cells of their levels.
        cluster: column(s) whose rows may be correlated; several cluster in several ways (Cameron, Gelbach and Miller 2011).
        vcov: "HC0" to "HC3" (White 1980; MacKinnon and White 1985); with `cluster` "CR0", "CR1" (the default) or "CR2" (Bell and
            McCaffrey 2002, for rows of variance sigma²/w; absorbed factors must lie within the clusters); None for sigma² (X'WX)⁻¹.
            They read the rows once more. Absorbed effects have leverages as their indicators would.

    `weights`, `freq`, `offset`, `levels`, `contrasts`, `na` and `options` are as in `mlpipe.lmm`.

    CR1 has the factor G/(G - 1) (n - 1)/(n - k), in which absorbed effects within the clusters do not count in k.
    Raises FormulaError, ConfigError, DataError, ResourceError, ConvergenceError; warns by RankWarning.
    """
    began = time.perf_counter()
    options = options or Options()
    parsed = parse(formula)
    if parsed.random:
        raise ConfigError("the formula has a random term", code="random_term", hint="fit it by lmm, or absorb its factor")
    factors, clusters = robust.names_of(absorb, "absorb"), robust.names_of(cluster, "cluster")
    kind = robust.checked(vcov, bool(clusters))
    coding = {"contrasts": contrasts, "levels": levels}
    settled = {"weights": weights, "freq": freq, "offset": offset, "na": na}
    from .stats import SuffStats

    if isinstance(data, SuffStats):
        stats = replace(data, info=deepcopy(data.info))
        fit = _from_statistics(formula, parsed, stats, factors, clusters, kind, settled, coding, options)
    else:
        fit = _from_rows(formula, parsed, data, factors, clusters, kind, settled | coding, options)
    fit.info["seconds"]["total"] = fit.seconds = time.perf_counter() - began
    report(fit, options)
    return fit


def request_of(
    formula: str, absorb: str | Sequence[str] | None, cluster: str | Sequence[str] | None, arguments: Mapping[str, Any], options: Options
) -> Request:
    """What is read of the rows: absorbed factors stand as random intercepts, whose sums are the same."""
    from .expr import Column, label
    from .plans import Request

    factors = robust.names_of(absorb, "absorb")
    text = formula + "".join(f" + (1 | {label(Column(name))})" for name in factors)
    return Request(text, clusters=robust.names_of(cluster, "cluster"), options=options, **arguments)


def planned(plan: Plan, vcov: str | None) -> Plan:
    """The plan of the sums, with a note on the passes that a robust covariance adds. Raises ConfigError for one that does not fit."""
    clusters = plan.request.clusters
    kind = robust.checked(vcov, bool(clusters))
    if kind is not None:
        count = len(ways(clusters)) if kind in CR and not plan.recipe.groups else 1
        plan.notes.append(f"{kind} errors read the rows {'once' if count == 1 else f'{count} times'} more")
    return plan


# -- from rows ---------------------------------------------------------------------------------------------------------


def _from_rows(
    formula: str, parsed: Formula, data: Any, absorb: tuple[str, ...], clusters: tuple[str, ...], kind: str | None,
    arguments: Mapping[str, Any], options: Options,
) -> OLSFit:  # fmt: skip
    from .collect import collected
    from .planning import prepare
    from .sources import open_source

    request = request_of(formula, absorb, clusters, arguments, options)
    with closing(open_source(data, options=options)) as engine:
        stats, plan = collected(prepare(engine, request))
        identity = engine.identity()
        stats.info.update(fingerprint=identity.fingerprint, rescannable=identity.rescannable, bytes=identity.bytes)
        recipe = stats.recipe
        stats, left, solution, beta = _solution(stats, parsed, absorb, plan, options)
        fit = _result(formula, stats, left, solution, beta, kind, clusters, options)
        fit.recipe = recipe
        if kind is not None:
            with stage("robust", stats.info["seconds"], engine, options):
                _robust(fit, stats, solution, left, absorb, Source(engine, plan.names), kind, clusters)
            engine.check_unchanged()
        fit.source = data if identity.rescannable else None
        if absorb:
            _keep_effects(fit, stats, left, solution, engine if not identity.rescannable else None)
    return fit


def _solution(
    stats: SuffStats, parsed: Formula, absorb: Sequence[str], plan: Plan, options: Options
) -> tuple[SuffStats, Projection, Solution, Array]:
    """The statistics it comes from, the estimate and its coefficients; where the model explains nearly all of the response, from its
    residuals, read again."""
    from .digits import EXPLAINED, of_residuals

    with stage("solve", stats.info.setdefault("seconds", {}), None, options):
        left = within(stats) if absorb else pooled(stats)
        first = solved(stats, parsed, left)
    _check_varies(first)
    if first.rss > EXPLAINED * first.within_tss:
        return stats, left, first, first.coefficients
    spread = math.sqrt(max(first.rss, 1e-30 * first.within_tss) / stats.n)
    again = of_residuals(stats, plan, first.gamma, first.response, spread)
    left = within(again) if absorb else pooled(again)
    second = solved(again, parsed, left)
    if second.rss <= ROUNDING * first.within_tss:
        raise DataError("the response is fitted exactly", code="no_residual")
    return again, left, replace(second, tss=first.tss, within_tss=first.within_tss), second.coefficients


def _check_varies(solution: Solution) -> None:
    """Raises DataError for a response that is constant, or within absorbed factors, but for what sums cannot tell from rounding."""
    if solution.tss <= 0.0:
        raise DataError("the response does not vary", code="no_residual")
    if solution.within_tss <= LOST * solution.tss:
        raise DataError("the response does not vary within the absorbed factors", code="no_residual")


def _result(
    formula: str, stats: SuffStats, left: Projection, solution: Solution, beta: Array, kind: str | None, clusters: tuple[str, ...],
    options: Options,
) -> OLSFit:  # fmt: skip
    """The fit with its model-based covariance. Raises DataError where no degrees of freedom are left."""
    p, n = len(beta), stats.n
    df = n - p - left.rank
    if df <= 0:
        raise DataError(f"{p + left.rank:,} coefficients leave no degrees of freedom of {n:,.15g} rows", code="no_residual")
    sigma2 = solution.rss / df
    info = {**stats.info, "notes": [*stats.info.get("notes", []), *left.notes]}
    if left.groups:
        info["levels"] = _level_counts(stats)
    if solution.absorbed:
        info["notes"] = [*info["notes"], f"absorbed, for they do not vary within the factors: {', '.join(solution.absorbed)}"]
    return OLSFit(
        formula=formula, recipe=stats.recipe, response=solution.response, reml=False, names=solution.fixed.names,
        dropped=(*solution.fixed.dropped, *solution.absorbed), beta=beta, spread=solution.fixed.spread(solution.bread * sigma2),
        gamma=solution.gamma, terms=tuple(absorbed_term(group, stats.recipe) for group in left.groups), sigma=math.sqrt(sigma2),
        loglik=loglik(solution.rss, n, stats.sum_log_w), nobs=n, rows=stats.rows, n_blocks=max(info.get("levels", {"": 0}).values()),
        converged=True, singular=False, score=0.0, evaluations=1, message="", theta_covariance=np.zeros((0, 0)), info=info, options=options,
        robust=kind, cluster=clusters, df_residual=df, df_test=df, rss=solution.rss, tss=solution.tss, within_tss=solution.within_tss,
        centred=solution.centred, absorbed_rank=left.rank,
    )  # fmt: skip


def _level_counts(stats: SuffStats) -> dict[str, int]:
    if stats.crossed is not None:
        return {factor.levels.group: len(factor.levels) for factor in stats.crossed.factors}
    assert stats.blocks is not None
    return {":".join(stats.recipe.groups): stats.blocks.n_blocks}


def _robust(
    fit: OLSFit, stats: SuffStats, solution: Solution, left: Projection, absorb: tuple[str, ...], source: Source, kind: str,
    clusters: tuple[str, ...],
) -> None:  # fmt: skip
    """The robust covariance in place of the model's own, by one more look at the rows."""
    one = len(absorb) == 1
    fitted = Fitted(stats.recipe, solution.fixed.Q, solution.e, half(solution.bread), left.effects)
    own = one and clusters == absorb  # the clusters' own sums tell what was absorbed
    counts: Array | None = None
    if one and not own:
        levels, means, counts = _means(source, stats)
        fitted = replace(fitted, absorbed=((levels, means),))
        fit.info["passes"] += 1
    if absorb and kind in LEVERED:
        fitted = replace(fitted, leverages=_leverages(stats, counts, fit.options))
    if kind not in CR:
        fit.info["passes"] += 1
        meat = robust.of_rows(source, fitted, kind).matrix * row_factor(kind, stats.n, len(fit.beta) + left.rank)
        fit.spread = fit.spread.of(covariance(solution.bread, meat))
        return
    found = ways(clusters)
    nested: list[set[str]] = [set(left.groups) if own else set() for _ in found]
    if absorb and not own:
        meats, nested = robust.streamed(source, fitted, [keys for keys, _ in found], kind)
        fit.info["passes"] += 1
    else:
        meats = [robust.of_clusters(source, fitted, keys, kind, within=own) for keys, _ in found]
        fit.info["passes"] += len(meats)
    if kind == "CR2" and any(inside != set(left.groups) for inside in nested):
        raise ConfigError(
            "CR2 needs absorbed factors that lie within the clusters: across them their effects have leverages too", code="vcov",
            hint='vcov="CR1", or the factor as a term of the formula',
        )  # fmt: skip
    _combined(fit, solution, left, kind, clusters, meats, nested)


def _leverages(stats: SuffStats, counts: Array | None, options: Options | None) -> Leverages:
    """Of absorbed effects: of one factor by the weights of its levels. Raises ResourceError where those of several need too much memory."""
    from .solve.absorb import Cells, Leverages

    cells = Cells([counts], {}) if counts is not None else cells_of(stats)[0]
    limit, needed = (options or Options()).memory_bytes, Leverages.bytes(cells.sizes)
    if needed > limit // 2:
        raise ResourceError(
            f"the leverages of {' and '.join(f'{m:,}' for m in cells.sizes)} absorbed levels need {needed / 1e6:,.0f} MB, more than half "
            f"the memory limit of {limit / 1e6:,.0f} MB", code="memory_limit", hint='vcov="HC1", or raise memory_limit',
        )  # fmt: skip
    return Leverages(cells)


def _combined(
    fit: OLSFit, solution: Solution, left: Projection, kind: str, clusters: tuple[str, ...], meats: list[Meat], nested: list[set[str]]
) -> None:
    """The meats of all clusterings, each with its own factor, with the signs of inclusion and exclusion."""
    total = np.zeros_like(solution.bread)
    for (_, sign), meat, inside in zip(ways(clusters), meats, nested, strict=True):
        k = len(fit.beta) + left.counted(inside)
        total += sign * cluster_factor(kind, meat.clusters, fit.nobs, k) * meat.matrix
    counts = [meat.clusters for (keys, _), meat in zip(ways(clusters), meats, strict=True) if len(keys) == 1]
    robust.few(kind, counts)
    fit.n_clusters, fit.df_test = tuple(counts), min(counts) - 1.0
    fit.spread = fit.spread.of(covariance(solution.bread, total))
    if (np.diag(fit.covariance) < 0.0).any():
        fit.info["notes"] = [*fit.info["notes"], "clustering in several ways gave a negative variance: too few clusters for it"]


def _means(source: Source, stats: SuffStats) -> tuple[Levels, Array, Array]:
    """The levels of one absorbed factor, the means of all features in each and their weights, by a grouped query."""
    import pyarrow as pa

    from . import statements
    from .looks import used_columns

    recipe = stats.recipe
    constant = recipe.features.index(())
    pairs = [(min(constant, j), max(constant, j)) for j in range(len(recipe.features))]
    statement = statements.cluster_sums(recipe, source.names, recipe.groups, pairs, np.zeros(len(recipe.features)).tolist())
    table = source.engine.query(statement, used_columns(recipe, source.names)).read_all()
    sums = np.stack([column(table, f"p_{i}_{j}") for i, j in pairs], axis=1)
    keys = pa.table({group: table.column(source.names.key(group).name) for group in recipe.groups})
    levels = Levels(":".join(recipe.groups), recipe.groups, keys)
    return levels, sums / sums[:, [constant]], sums[:, constant]


def _keep_effects(fit: OLSFit, stats: SuffStats, left: Projection, solution: Solution, engine: Any) -> None:
    """The estimates of several factors' effects stay with the fit; those of one are looked up when they are asked for, unless its rows
    are gone by then."""
    from . import effects

    if not left.effects:
        if engine is not None:
            fit.effects_table = effects.table_of(fit, effects.from_rows(fit, engine))
        return
    import pyarrow as pa

    residual = response_vector(stats.recipe, solution.response) - solution.gamma
    for (levels, found), factor in zip(left.effects, stats.crossed.factors if stats.crossed else (), strict=True):
        term = next(term for term in fit.terms if term.group == levels.group)
        a = found @ residual
        counts = factor.sums[stats.recipe.pairs().index((stats.recipe.features.index(()),) * 2)]
        names = effects.key_names([term], levels.columns)
        a = a - float(counts @ a) / float(counts.sum())
        keys = dict(zip(names, levels.keys.columns, strict=True))
        fit.effects_tables[levels.group] = pa.table({**keys, "(Intercept)": a, "(Intercept)_se": np.full(len(a), math.nan)})


# -- from statistics ---------------------------------------------------------------------------------------------------


def _from_statistics(
    formula: str, parsed: Formula, stats: SuffStats, absorb: tuple[str, ...], clusters: tuple[str, ...], kind: str | None,
    settled: Mapping[str, Any], coding: Mapping[str, Any], options: Options,
) -> OLSFit:  # fmt: skip
    from .digits import EXPLAINED
    from .stats import check_settled

    check_settled(stats, settled)
    recipe = stats.recipe
    held = recipe.factors or ((recipe.groups,) if recipe.groups else ())
    if absorb and set(held) != {(name,) for name in absorb}:
        shown = ", ".join(":".join(groups) for groups in held) or "no grouping factor"
        raise DataError(f"the statistics are over {shown}, not {', '.join(absorb)}", code="not_collected")
    if kind is not None and (kind not in CR or clusters != recipe.groups or stats.collect != "blocks+xx" or stats.crossed is not None):
        raise DataError(
            f"the statistics do not hold what vcov={kind!r} needs", code="not_collected",
            hint='fit from the rows, or collect="blocks+xx" over the cluster for cluster-robust errors',
        )  # fmt: skip
    with stage("solve", stats.info.setdefault("seconds", {}), None, options):
        left = within(stats) if absorb else pooled(stats)
        solution = solved(stats, parsed, left, **coding)
    _check_varies(solution)
    if solution.rss <= LOST * solution.within_tss:
        raise DataError("the response is fitted exactly, or so nearly that the statistics cannot tell", code="no_residual")
    if solution.rss <= EXPLAINED * solution.within_tss:
        note = "nearly all of the response is explained: fit from the rows for more digits"
        stats.info["notes"] = [*stats.info.get("notes", []), note]
    fit = _result(formula, stats, left, solution, solution.coefficients, kind, clusters, options)
    fit.source = stats
    if kind is not None:
        fitted = Fitted(recipe, solution.fixed.Q, solution.e, half(solution.bread))
        meat = robust.of_statistics(stats, fitted, kind, within=bool(absorb))
        _combined(fit, solution, left, kind, clusters, [meat], [set(left.groups)])
    if left.effects:
        _keep_effects(fit, stats, left, solution, None)
    return fit
