"""Generalized estimating equations: rows -> spool -> passes over whole blocks -> population-averaged estimates."""
from __future__ import annotations

import time as clock
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import ConfigError, DataError, did_you_mean
from .estimating_result import KINDS, GEEFit
from .families import check_plain, check_weights, checked_family
from .findings import DISCRETE, SETTLED, running
from .formula import parse
from .options import Options
from .passes import START_CHUNKS, START_SHARE, START_TOLERANCE, Model, built, plain
from .planning import prepare
from .plans import Plan, Request
from .progress import Watch, stage
from .robust import few, names_of
from .solve.density import density
from .solve.gee import CORRELATIONS, GEESolution, Look, Working, solve_gee
from .solve.kernel import Chunk
from .verdict import report

if TYPE_CHECKING:
    from .engines.base import Engine
    from .gather import Gathered

    Array = np.ndarray

FAMILIES = ("gaussian", "binomial", "poisson", "gamma", "inverse_gaussian", "quasibinomial", "quasipoisson")
ONE_EVENT = 1.0  # information along a direction that one event gives at least
MOST_TIMES = 200  # levels of time of an unstructured correlation


def gee(
    formula: str,
    data: Any,
    *,
    groups: str | Sequence[str],
    family: str = "gaussian",
    link: str | None = None,
    corr: str = "exchangeable",
    time: str | None = None,
    vcov: str | None = None,
    trials: str | None = None,
    weights: str | None = None,
    freq: str | None = None,
    offset: str | None = None,
    levels: Mapping[str, Sequence[Any]] | None = None,
    contrasts: Mapping[str, str] | None = None,
    na: str = "drop",
    options: Options | None = None,
) -> GEEFit:
    """Fits a marginal model by generalized estimating equations (Liang and Zeger 1986), reading the rows once into a spool.

    Args:
        formula: `y ~ x`, without random terms.
        groups: column(s) whose combinations are the blocks of correlated rows.
        family: "gaussian", "binomial", "poisson", "gamma", "inverse_gaussian", "quasibinomial", "quasipoisson".
        corr: "independence", "exchangeable", "ar1" (alpha to the difference of the ranks of `time` within the block) or "unstructured"
            (one parameter a pair of levels of `time`).
        time: what orders the rows of a block, a column or an expression; "ar1" takes the source's own row order without it.
        vcov: "robust" (None), "model", or a sandwich corrected for few blocks: "kauermann-carroll" or "mancl-derouen" (both 2001).
        freq: for "independence" and "exchangeable" only, where it is no time twice.

    `trials`, `weights`, `offset`, `levels`, `contrasts`, `na` and `options` are as in `mlpipe.glmm`.

    alpha and phi are moment estimators without degrees of freedom taken off, as geepack's.
    Raises FormulaError, ConfigError, DataError (two rows of one block at one time, too), ResourceError; warns by RankWarning and
    ConvergenceWarning.
    """
    began = clock.perf_counter()
    options = options or Options()
    request, kind = request_of(
        formula, options, groups=groups, family=family, link=link, corr=corr, time=time, vcov=vcov, trials=trials, weights=weights,
        freq=freq, offset=offset, levels=levels, contrasts=contrasts, na=na,
    )  # fmt: skip
    plan, rows = _rows(data, request, corr, options)
    with rows.spool:
        if kind != "model":
            few(kind, [rows.spool.n_blocks])
        model = built(parse(formula), plan, rows, density(*checked_family(family, link, quasi=True)), 1)
        times = _times(model, corr)
        working = Working(model.density, model.Q, corr, times, bool(freq))
        watch = Watch(lambda: rows.spool.passes)
        with stage("fit", rows.info["seconds"], None, options, live=watch) as fields:
            solution = _solved(model, working, options, watch)
            fields |= {"passes": solution.passes, "score": solution.score}
        fit = GEEFit.from_solution(formula, model, solution, data, options, family, corr, kind, times)
        fit.info["separation"] = _separated(model, solution, options)
        fit.info["notes"] += _unseen(working, solution)
    fit.info["passes"] = round(rows.spool.passes, 2)
    fit.info["seconds"]["total"] = fit.seconds = clock.perf_counter() - began
    report(fit, options)
    return fit


def request_of(
    formula: str, options: Options, *, groups: str | Sequence[str], family: str = "gaussian", link: str | None = None,
    corr: str = "exchangeable", time: str | None = None, vcov: str | None = None, **arguments: Any,
) -> tuple[Request, str]:  # fmt: skip
    """What is read of the rows, and the kind of covariance. Raises ConfigError for what a marginal model has not."""
    if corr not in CORRELATIONS:
        raise ConfigError(f"corr = {corr!r} is not known", hint=did_you_mean(str(corr), list(CORRELATIONS)))
    if family not in FAMILIES:
        raise ConfigError(f"family = {family!r} is not one of estimating equations", hint=did_you_mean(str(family), list(FAMILIES)))
    if vcov is not None and vcov not in KINDS:
        raise ConfigError(f"vcov = {vcov!r} is not one of {', '.join(KINDS)}", hint=did_you_mean(str(vcov), list(KINDS)), code="vcov")
    base, link = checked_family(family, link, quasi=True)
    check_plain(parse(formula))
    check_weights(base, arguments.get("weights"))
    blocks = names_of(groups, "groups")
    if not blocks:
        raise ConfigError("groups names no column", code="groups")
    if time is None and corr == "unstructured":
        raise ConfigError("an unstructured correlation needs time=", code="time", hint="the column that tells a block's rows apart")
    if arguments.get("freq") is not None and (arguments.get("trials") is not None or corr not in ("independence", "exchangeable")):
        what = "trials" if arguments.get("trials") is not None else f"corr={corr!r}"
        raise ConfigError(f"freq does not go with {what}: a row that stands for several has one place in its block", code="freq")
    by_row = corr == "ar1" and time is None
    request = Request(formula, family=base, link=link, groups=blocks, time=time, by_row=by_row, options=options, **arguments)
    return request, vcov or "robust"


def check_order(engine: Engine, request: Request) -> None:
    """Raises ConfigError where rows are to be taken in the source's order and it has none."""
    if request.by_row and not engine.identity().ordered:
        raise ConfigError("the source has no row order of its own: an AR(1) correlation needs time=", code="time")


def _rows(data: Any, request: Request, corr: str, options: Options) -> tuple[Plan, Gathered]:
    from .gather import gather
    from .sources import open_source
    from .stats import SuffStats

    if isinstance(data, SuffStats):
        raise ConfigError("sufficient statistics do not hold what estimating equations need", hint="pass the rows")
    with closing(open_source(data, options=options)) as engine:
        check_order(engine, request)
        plan = prepare(engine, request)
        if request.by_row:
            plan.notes.append("rows of a block are in the source's own order: no time was given")
        rows = gather(plan, compress=False)
    try:
        _check_times(rows, request)
    except BaseException:
        rows.spool.close()
        raise
    return plan, rows


def _check_times(rows: Gathered, request: Request) -> None:
    """Raises DataError where a block has two rows at one time."""

    def repeated(chunk: Chunk) -> int:
        count, last = 0, np.nan
        for part in chunk.pieces:
            assert part.time is not None
            same = np.diff(part.time, prepend=last) == 0.0
            if len(chunk.pieces) == 1:
                same[part.starts] = False
            count, last = count + int(same.sum()), part.time[-1]
        return count

    if request.time is None:
        return
    if found := sum(rows.spool.map(repeated)):
        blocks = ":".join(request.groups)
        message = f"{found:,} rows are at the same {request.time} as another row of their block of {blocks}"
        raise DataError(message, code="duplicate_time", hint="a block has one row a time; blocks may be told apart by more columns")


def _times(model: Model, corr: str) -> Array:
    """The levels of time of an unstructured correlation. Raises ConfigError for too many."""
    if corr != "unstructured":
        return np.zeros(0)

    def levels(chunk: Chunk) -> Array:
        return np.unique(np.concatenate([part.time for part in chunk.pieces if part.time is not None]))

    times = np.unique(np.concatenate(model.rows.spool.map(levels)))
    if len(times) > MOST_TIMES:
        raise ConfigError(f"{len(times):,} levels of time are too many for an unstructured correlation", code="time", hint='corr="ar1"')
    return times


def _separated(model: Model, solution: GEESolution, options: Options) -> list[str]:
    """The coefficients that run away, as independent rows have them, where there is little information or none."""
    if model.density.family.name not in DISCRETE or not model.fixed.names:
        return []
    information = solution.look.independence
    if solution.converged and np.linalg.eigvalsh(information)[0] > ONE_EVENT:
        return []
    found, p = plain(model, None, options.tol, options.max_passes), len(model.fixed.names)
    if not found.score < SETTLED:
        return []
    return running(model, np.linalg.solve(model.fixed.R, found.psi[:p]), found.information[:p, :p])


def _unseen(working: Working, solution: GEESolution) -> list[str]:
    """Notes on correlations that no pair of rows speaks of."""
    pairs = solution.look.moments.pairs
    if working.corr == "independence":
        return []
    if not pairs.sum() - np.trace(np.atleast_2d(pairs)) * (working.corr == "unstructured"):
        return ["no block has two rows: the correlation is taken as 0"]
    if working.corr != "unstructured":
        return []
    missing = int((pairs[np.triu_indices(len(working.times), 1)] == 0.0).sum())
    return [f"no block has rows at both of {missing:,} pairs of times: their correlations are taken as 0"] if missing else []


def _solved(model: Model, working: Working, options: Options, watch: Watch) -> GEESolution:
    """The estimates, from those of independent rows on some chunks."""
    spool = model.rows.spool
    some = spool.some(START_SHARE, START_CHUNKS)
    start = plain(model, some, START_TOLERANCE, options.max_passes).psi[: model.Q.shape[1]]

    def look(beta: Array, alpha: Array, bread: Array | None) -> Look:
        parts = spool.map(lambda chunk: working.look(chunk, beta, alpha, bread))
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        watch.told()
        return total

    return solve_gee(look, working, start, tol=options.tol, max_passes=options.max_passes)
