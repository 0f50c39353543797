"""Plan -> spool: the rows of an iterative fit, checked, compressed where that pays, in the order of their blocks."""
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from . import cells, expr, statements
from .arrays import column
from .collect import causes, dropped_rows, none_usable, not_finite
from .compressed import columns_of
from .design import code
from .engines.base import Columns
from .errors import DataError
from .features import Recipe
from .options import Options
from .outcome import TRIALS
from .plans import Expected, Joint, Plan, key_types
from .progress import stage
from .solve.kernel import Chunk
from .sources import row_count
from .spool import Layout, Spool, build
from .sql import over

if TYPE_CHECKING:
    import pyarrow as pa
    from sqlglot import exp

WORTHWHILE = 1.3  # rows per cell from which cells are held instead of rows
REPEATING = 0.5  # distinct design rows per row of a sample, above which they are not looked at further


@dataclass
class Gathered:
    """The rows of a fit: the `spool`; the counts `rows`, `nobs` (with frequencies), `size` (with trials); `mean` and `variance` of the
    response and the mean `offset`; cross-products `gram` (m, m) and `sums` (m,) of the covariate features; `flat` blocks whose
    response does not vary; `info`; `weight`, the mean prior weight."""

    spool: Spool
    rows: int
    nobs: float
    size: float
    mean: float
    variance: float
    offset: float
    gram: np.ndarray
    sums: np.ndarray
    flat: int
    info: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0


def gather(plan: Plan, *, compress: bool, repeatable: bool = False) -> Gathered:
    """Reads the rows into the spool and checks them there; `compress`: whether rows may be held as cells; `repeatable`: whether their order
    must not depend on that in which they come.

    Raises DataError: no usable rows, a response the family cannot give, non-finite terms, rows dropped under na="raise", a source that
    changed; ResourceError for a full disk.
    """
    seconds: dict[str, float] = {}
    engine, options = plan.engine, plan.request.options
    total = row_count(plan.engine)
    ratio = compression(plan, total) if compress else 1.0
    with stage("spool", seconds, engine, options, rows=total) as fields:
        spool = _spooled(plan, compressed=ratio >= WORTHWHILE, repeatable=repeatable)
        fields |= {"cells": spool.n_rows, "blocks": spool.n_blocks}
    engine.check_unchanged()
    try:
        found = _survey(plan.recipe, spool)
        rows, nobs = counts(plan, spool.n_rows, found.size, compressed=ratio >= WORTHWHILE)
        check_rows(plan, rows, total)
        dropped = dropped_rows(plan, total, rows)
        terms = bool(np.isfinite(found.gram).all()) and math.isfinite(found.offset)
        check_finite(plan, found.size == 0.0 or math.isfinite(found.mean), terms)
        _check(plan.recipe, found)
    except BaseException:
        spool.close()
        raise
    sums = ",".join(f"{value:.9g}" for value in (rows, found.size, found.mean, found.variance, *np.diag(found.gram)))
    info = _info(plan, total, rows, dropped, seconds, spool, ratio, sums)
    return _gathered(spool, found, rows, nobs, info)


def surveyed(recipe: Recipe, spool: Spool, rows: int, nobs: float, info: dict[str, Any]) -> Gathered:
    """The rows of a spool that were checked when they were read; closes it where they cannot be fitted. Raises DataError."""
    try:
        found = _survey(recipe, spool)
        _check(recipe, found)
    except BaseException:
        spool.close()
        raise
    return _gathered(spool, found, rows, nobs, info)


def _gathered(spool: Spool, found: _Survey, rows: int, nobs: float, info: dict[str, Any]) -> Gathered:
    return Gathered(
        spool, rows, nobs, found.size, found.mean, found.variance, found.offset / found.size, found.gram, found.sums, found.flat, info,
        found.weight / found.size,
    )


def expected(plan: Plan, *, compress: bool) -> Expected:
    """What `gather` would keep, from the number of rows and a sample."""
    rows = row_count(plan.engine)
    ratio = compression(plan, rows) if compress else 1.0
    ratio = ratio if ratio >= WORTHWHILE else 1.0
    stored = columns_of(plan.recipe, merges=ratio > 1.0)
    joint = _joint(plan, rows) if plan.recipe.factors and compress else None
    return Expected(rows, ratio, round(rows / ratio) * len(stored) * 8, joint)


def _joint(plan: Plan, rows: int) -> Joint:
    """How several factors will be solved, from about how many levels and combinations of levels there are."""
    from .solve.probes import PROBES, chosen

    recipe, formula = plan.recipe, plan.recipe.formula
    levels = {columns: _distinct(plan, columns) for columns in recipe.factors}
    q = dict.fromkeys(recipe.factors, 0)
    for bar in formula.random:
        q[bar.groups] += len(code(bar.terms, recipe.variables))
    sizes = sorted((levels[columns] * q[columns] for columns in recipe.factors), reverse=True)
    combinations, most = min(rows, _distinct(plan, recipe.groups)), max(levels.values())
    rest, met = sum(sizes[1:]), combinations * len(q) * (len(q) - 1) // 2
    nested = combinations <= 1.02 * most
    path = "exact" if nested else chosen("auto", rest, combinations**2 / most, plan.request.options.memory_bytes)
    dense = 0 if nested else 3 * 8 * rest**2 if path == "exact" else 8 * 8 * PROBES * sum(sizes)
    parameters = len(code(formula.fixed, recipe.variables)) + sum(n * (n + 1) // 2 for n in q.values()) + cells.family_of(recipe).shape
    evaluations = usual_evaluations(parameters, exact=path == "exact")
    return Joint({":".join(columns): n for columns, n in levels.items()}, path, 48 * met + dense, evaluations)


def usual_evaluations(parameters: int, *, exact: bool) -> int:
    """About how many evaluations of the likelihood a model of several factors takes: its steps, and the information by differences."""
    return 10 + (2 if exact else 1) * parameters


def _distinct(plan: Plan, columns: tuple[str, ...]) -> int:
    """About how many combinations of some keys there are."""
    statement = cells.block_count(replace(plan.recipe, groups=columns), plan.names, approximate=plan.engine.dialect == "duckdb")
    keys = Columns(keys=frozenset(plan.names.positions[name] for name in columns))
    return max(int(plan.engine.query(statement, keys).read_all().column("blocks")[0].as_py()), 1)


def _info(
    plan: Plan, total: int, rows: int, dropped: dict[str, int], seconds: dict[str, float], spool: Spool, ratio: float, sums: str
) -> dict[str, Any]:
    notes = list(plan.notes)
    if ratio >= WORTHWHILE and spool.n_rows < total:
        notes.append(f"{rows:,} rows are held as {spool.n_rows:,} cells of equal design row within a block")
    identity = plan.engine.identity()
    return {
        "key_types": key_types(plan),
        "rows_read": total, "rows_dropped": total - rows, "dropped": dropped, "blocks": spool.n_blocks if plan.recipe.groups else 0,
        "cells": spool.n_rows, "spool": {"bytes": spool.nbytes, "mapped": spool.mapped}, "expected_compression": round(ratio, 3),
        "seconds": seconds, "notes": notes, "path": "spool", "engine": plan.engine.dialect, "fingerprint": identity.fingerprint,
        "content": sums, "rescannable": identity.rescannable, "bytes": identity.bytes, "sql": plan.engine.ran,
    }  # fmt: skip


def counts(plan: Plan, n_cells: int, size: float, *, compressed: bool) -> tuple[int, float]:
    """Rows, and rows with frequencies: from the cells' sizes where these are nothing else, else counted apart."""
    recipe = plan.recipe
    trials = TRIALS in recipe.responses
    if not compressed and not (recipe.freq and trials):
        return n_cells, size if recipe.freq else float(n_cells)
    if compressed and not recipe.freq and not trials and math.isfinite(size):
        return round(size), float(round(size))
    row = _outcome(plan)
    return int(row["row_count"]), float(row["n"] or 0.0)


def _outcome(plan: Plan) -> dict[str, Any]:
    return dict(plan.engine.query(cells.outcome(plan.recipe, plan.names), plan.columns).read_all().to_pylist()[0])


def check_rows(plan: Plan, rows: int, total: int) -> None:
    """Raises DataError (code "no_rows") where none of the rows entered."""
    if not rows:
        raise none_usable(causes(plan)[()], total)


def check_finite(plan: Plan, response: bool, terms: bool) -> None:
    """Raises DataError for a term, or a response, that is not finite in some row although all raw values are."""
    if not terms:
        raise not_finite(plan)
    if not response:
        bad = _outcome(plan)["bad"]
        raise _outside(plan, int(bad)) if bad else not_finite(plan)


def _check(recipe: Recipe, found: _Survey) -> None:
    """Raises where there are no trials, the response does not vary, or its variance cannot be computed."""
    if found.size == 0.0:
        raise DataError("there are no trials in any row", code="no_rows")
    family = cells.family_of(recipe)
    if family.shape and (not math.isfinite(found.variance) or found.variance == 0.0 < found.high - found.low):
        size = "large" if found.variance else "small"
        raise DataError(f"the response is too {size} for its variance to be computed", code="response_scale", hint="scale it")
    constant = {"binomial": found.mean in (0.0, 1.0), "factorial": found.mean == 0.0}  # any other constant count has a maximum
    if constant.get(family.constant, found.variance == 0.0):
        raise DataError(f"the response is {found.mean:g} in every row", code="no_variation")


def _outside(plan: Plan, count: int) -> DataError:
    """The error for responses outside the family's domain: how many, and the first."""
    recipe, family = plan.recipe, cells.family_of(plan.recipe)
    ordered = plan.engine.identity().ordered
    wanted = Columns(plan.columns.values, plan.columns.keys, row_number=ordered)
    first = plan.engine.query(cells.first_outside(recipe, plan.names, ordered=ordered), wanted).read_all().to_pylist()[0]
    label = recipe.responses[0].removesuffix(" ~")
    shown = f"{first['y']:g}" + (f" of {first['trials']:g}" if "trials" in first else "")
    domain = {
        "binomial": "0 or 1" if "trials" not in first else "from 0 to its trials", "poisson": "a whole number from 0",
        "negbinomial": "a whole number from 0", "negbinomial1": "a whole number from 0", "gamma": "above 0",
        "inverse_gaussian": "above 0", "beta": "between 0 and 1",
    }[family.name]  # fmt: skip
    hint = "a proportion needs trials=…, or write cbind(successes, failures) ~ …" if domain == "0 or 1" else None
    node = recipe.formula.response
    return DataError(
        f"the response {label} of family {family.name} must be {domain}: {count:,} rows are not, the first of them {shown}",
        code="response_domain", column=next(iter(expr.columns(node)), None) if node is not None else None, hint=hint,
    )  # fmt: skip


def compression(plan: Plan, rows: int) -> float:
    """Expected rows per cell: from the design rows of a sample and the number of blocks (1 where a sample's hardly repeat)."""
    recipe, names = plan.recipe, plan.names
    sample = plan.engine.query(cells.design_rows(recipe, names), plan.columns, sample=True).read_all()
    counts = column(sample, "row_count").astype(float)
    if not recipe.groups or not len(counts) or len(counts) > REPEATING * counts.sum():
        return 1.0
    per_block = rows / _distinct(plan, recipe.groups)
    share = counts / counts.sum()
    distinct = -np.expm1(per_block * np.log1p(-np.minimum(share, 1.0 - 1e-15))).sum()
    return float(per_block / max(distinct, 1e-300)) if per_block > 1 else 1.0


def layout_of(recipe: Recipe, *, merges: bool) -> Layout:
    """What the columns of the spool are."""
    constant = next((i for i, f in enumerate(recipe.features[: recipe.n_covariates]) if not f), None)
    places = tuple(i for i in range(recipe.n_covariates) if i != constant)
    return Layout(columns_of(recipe, merges=merges), places, recipe.n_covariates, len(cells.family_of(recipe).statistics))


def _spooled(plan: Plan, *, compressed: bool, repeatable: bool) -> Spool:
    recipe, options = plan.recipe, plan.request.options
    layout = layout_of(recipe, merges=compressed)
    keys = [plan.names.key(group).name for group in recipe.groups]
    batches = made(plan, cells.arranged(recipe, keys, compressed=compressed, repeatable=repeatable), options)
    return build(batches, layout, keys, budget=options.memory_bytes // 4, parent=options.temp_directory, threads=options.threads)


def made(plan: Plan, statement: exp.Select, options: Options) -> Iterator[pa.RecordBatch]:
    """The batches of a statement over the table `used`, the plan's rows: by the engine itself where it is DuckDB, else by one of ours."""
    rows = statements.used_rows(plan.recipe, plan.names, keys=True)
    if plan.engine.dialect == "duckdb":
        yield from plan.engine.query(over(statement, rows, "used"), plan.columns)
        return
    from .engines.arrange import arranged

    yield from arranged(plan.engine.query(rows, plan.columns), statement, options)


@dataclass
class _Survey:
    """Sums over all cells: see Gathered; `y1`, `y2` of size times y and y² about `about`, `offset` and `weight` of size times offset and
    prior weight; `low`, `high`: the least and the largest y."""

    gram: np.ndarray
    sums: np.ndarray
    size: float
    y1: float
    y2: float
    offset: float
    flat: int
    low: float
    high: float
    about: float
    weight: float = 0.0

    @property
    def mean(self) -> float:
        """The mean response."""
        return self.about + self.y1 / self.size

    @property
    def variance(self) -> float:
        """The variance of the response over its mean."""
        mean = self.y1 / self.size
        return max(self.y2 / self.size - mean * mean, 0.0)


def _survey(recipe: Recipe, spool: Spool) -> _Survey:
    """One look at the spool before the fit; the blocks whose responses do not vary are counted for a binomial family."""
    family, m = cells.family_of(recipe), recipe.n_covariates
    binary, square = family.name == "binomial", family.statistics.index("square") if "square" in family.statistics else None
    about = float(spool.chunk(0).pieces[0].cells.y[0]) if spool.parts else 0.0

    def look(chunk: Chunk) -> _Survey:
        total = _Survey(np.zeros((m, m)), np.zeros(m), 0.0, 0.0, 0.0, 0.0, 0, math.inf, -math.inf, about)
        y_sums, sizes = np.zeros(chunk.n_blocks), np.zeros(chunk.n_blocks)
        for rows in chunk.pieces:
            a, y = rows.cells.size, rows.cells.y
            weighted, ay = (rows.F, y) if a is None else (rows.F * a, a * y)
            d = y - about
            ad = d if a is None else a * d
            inside = 0.0 if square is None else rows.cells.statistics[square] * (1.0 if a is None else a)
            total.gram, total.sums = total.gram + weighted @ rows.F.T, total.sums + weighted.sum(axis=1)
            total.size += (size := float(len(y) if a is None else a.sum()))
            w = rows.cells.weight
            total.weight += size if w is None else float(w.sum() if a is None else a @ w)
            with np.errstate(over="ignore"):  # said by `_check`
                total.y1, total.y2 = total.y1 + float(ad.sum()), total.y2 + float(ad @ d) + float(np.sum(inside))
            total.low, total.high = min(total.low, float(y.min())), max(total.high, float(y.max()))
            if rows.offset is not None:
                total.offset += float(rows.offset.sum() if a is None else a @ rows.offset)
            if binary:
                y_sums, sizes = y_sums + rows.sums(ay), sizes + (rows.lengths if a is None else rows.sums(a))
        total.flat = int(((y_sums == 0.0) | (y_sums == sizes)).sum()) if binary else 0
        return total

    parts = spool.map(look)
    spool.rows_read = 0  # passes count what the fit reads
    sizes = {name: math.fsum(getattr(part, name) for part in parts) for name in ("size", "y1", "y2", "offset", "weight")}
    gram, sums = np.zeros((m, m)), np.zeros(m)
    for part in parts:
        gram, sums = gram + part.gram, sums + part.sums
    low, high = min((part.low for part in parts), default=0.0), max((part.high for part in parts), default=0.0)
    return _Survey(gram, sums, flat=sum(part.flat for part in parts), low=low, high=high, about=about, **sizes)
