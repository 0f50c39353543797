"""Many models from the scans of one: a model per value of some columns, and several formulas over the same rows.

The rows are summed once, grouped by the values and the grouping factor; each value's sums are then statistics of their own. Shifts, scales
and data-dependent bases are those of all rows; the levels of a factor are those that occur with the value.
"""
from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING, Any

import numpy as np

from . import statements
from .arrays import column
from .blocks import Blocks, Collector
from .collect import changed, not_finite, parts_of
from .errors import ConfigError, DataError, FormulaError, MlpipeError, MlpipeWarning
from .expr import Column, label
from .features import Recipe
from .fit import lmm
from .formula import Formula, parse
from .options import Options
from .planning import prepare
from .plans import Plan, Request
from .present import over_present
from .progress import stage
from .sources import open_source
from .stats import SuffStats

if TYPE_CHECKING:
    import pyarrow as pa

    from .engines.base import Engine
    from .result import LMMFit
    from .sql import Expression

FEW = 8  # fits that are printed whole, and failures that are named


@dataclass(frozen=True)
class Model:
    """One of several models over the same rows."""

    name: str
    formula: str
    reml: bool = True


@dataclass
class Fitted:
    """A model of one value: `by`, its columns and their values (empty without any); `fit`, or the `error` that it ended in."""

    model: str
    by: dict[str, Any]
    fit: LMMFit | None
    error: MlpipeError | None = None

    @property
    def label(self) -> str:
        """The model and its values, for messages."""
        return " ".join([self.model, *(f"{name}={value}" for name, value in self.by.items())])


@dataclass
class Fits:
    """All fits of a scan; `by`: the columns' types; `info`: of the scan (passes, seconds by stage, rows read)."""

    fits: list[Fitted]
    by: pa.Schema
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> list[Fitted]:
        """Those without a fit."""
        return [one for one in self.fits if one.fit is None]

    def told(self) -> str:
        """What came out, as text: the summaries of a few fits, counts of many, and the first that failed or did not converge."""
        good = [one.fit for one in self.fits if one.fit is not None]
        lines = [f"{one.label}\n{one.fit.summary()}\n" for one in self.fits if one.fit is not None] if len(self.fits) <= FEW else []
        loose = [one for one in self.fits if one.fit is not None and not one.fit.converged]
        singular = sum(fit.singular for fit in good)
        lines.append(f"{len(self.fits)} fits: {len(good) - len(loose)} converged, {singular} of all singular, {len(self.failed)} failed")
        lines += [f"not converged: {one.label}" for one in loose[:FEW]]
        lines += [f"failed: {one.label}: {one.error.message}" for one in self.failed[:FEW] if one.error is not None]
        return "\n".join(lines)


def fit_many(models: Sequence[Model], data: Any, request: Request) -> Fits:
    """Fits linear mixed models over the same rows, one per value of the columns `request.by`, from the scans of a single fit.

    Rows are those complete for all of the models. A value whose model cannot be fitted has the error in place of the fit.
    Raises what `mlpipe.lmm` raises for mistakes that concern all values; ConfigError for models over different grouping factors.
    """
    began = time.perf_counter()
    request = united(models, request)
    with closing(open_source(data, options=request.options)) as engine:
        plan = prepare(engine, request)
        if plan.recipe.factors:
            raise ConfigError("models of several grouping factors have no shared scan", code="not_available")
        _check_by(request.by, engine)
        identity = engine.identity()
        schema, found, info = collected(plan)
    info.update(fingerprint=identity.fingerprint, rescannable=False, bytes=identity.bytes)
    seconds: dict[str, float] = info["seconds"]
    out: list[Fitted] = []
    with stage("fits", seconds, None, request.options) as fields, warnings.catch_warnings():
        warnings.simplefilter("ignore", MlpipeWarning)  # a fit's fields say the same, for thousands of them
        for values, stats, rows_read in found:
            rows = stats.rows if isinstance(stats, SuffStats) else 0
            own = {**info, "rows_read": rows_read, "rows_dropped": rows_read - rows, "seconds": {}}
            own["sql"] = engine.ran if not out else []  # once: thousands of fits share the scan
            out += [_fitted(model, dict(zip(schema.names, values, strict=True)), stats, own, request.options) for model in models]
        fields |= {"fits": len(out), "failed": sum(one.fit is None for one in out)}
    seconds["total"] = time.perf_counter() - began
    return Fits(out, schema, info)


def _check_by(by: Sequence[str], engine: Engine) -> None:
    """Raises DataError for values that no text stands for, by which a fit is named in files, reports and scoring SQL."""
    schema = engine.schema()
    for name in by:
        if schema[name].kind == "other" or schema[name].name == "INTERVAL":
            message = f"the column {name!r} of type {schema[name].name} cannot say what a model is for"
            raise DataError(message, code="column_type", column=name, hint="cast it to text or a number")


def _fitted(
    model: Model, by: dict[str, Any], stats: SuffStats | DataError | FormulaError, info: dict[str, Any], options: Options
) -> Fitted:
    if not isinstance(stats, SuffStats):
        return Fitted(model.name, by, None, stats)
    try:
        return Fitted(model.name, by, lmm(model.formula, replace(stats, info=info), reml=model.reml, options=options))
    except (DataError, FormulaError, ConfigError) as error:
        return Fitted(model.name, by, None, error)


def united(models: Sequence[Model], request: Request) -> Request:
    """The request whose statistics serve all models: every term of any of them, and their responses."""
    parsed = [parse(model.formula) for model in models]
    groups = {bar.groups for formula in parsed for bar in formula.random}
    for model, formula in zip(models, parsed, strict=True):
        if formula.response is None or not formula.random:
            what = "random term" if formula.response is not None else "response"
            raise ConfigError(f"the formula {model.formula!r} has no {what}", code="no_random_term")
    if len(groups) > 1 or len({formula.offsets for formula in parsed}) > 1:
        raise ConfigError("models over different grouping factors or offsets have no shared scan", code="not_available")
    if shared := set(request.by) & {key for keys in groups for key in keys}:
        raise ConfigError(f"{sorted(shared)[0]!r} is the grouping factor, and by asks for a model per value of it", code="by")
    if len(models) == 1:
        return replace(request, formula=models[0].formula, collect="blocks")
    first, *rest = dict.fromkeys(label(formula.response) for formula in parsed if formula.response is not None)
    terms = dict.fromkeys(":".join(map(label, term.variables)) or "1" for formula in parsed for term in formula.fixed)
    bars = dict.fromkeys(_bar(formula) for formula in parsed)
    offsets = [f"offset({label(node)})" for node in parsed[0].offsets]
    text = f"{first} ~ {' + '.join([*(terms or ['0']), *offsets, *bars])}"
    return replace(request, formula=text, responses=tuple(rest), collect="blocks")


def _bar(formula: Formula) -> str:
    terms = dict.fromkeys(":".join(map(label, term.variables)) or "1" for bar in formula.random for term in bar.terms)
    return f"({' + '.join(['1', *(term for term in terms if term != '1')])} | {':'.join(map(_quoted, formula.random[0].groups))})"


def _quoted(name: str) -> str:
    return label(Column(name))


Found = list[tuple[tuple[Any, ...], SuffStats | DataError | FormulaError, int]]


def collected(plan: Plan) -> tuple[pa.Schema, Found, dict[str, Any]]:
    """The statistics of each value of the plan's `by` columns, in the values' order, with how many rows the source has of it.

    Raises DataError as `collect` does.
    """
    import pyarrow as pa

    seconds: dict[str, float] = {}
    engine, options, recipe = plan.engine, plan.request.options, plan.recipe
    by, total = plan.request.by, plan.engine.row_count()
    with stage("cross_products", seconds, engine, options, rows=total) as fields:
        counts = engine.query(statements.row_counts(by, plan.names), plan.columns).read_all()
        sums = engine.query(statements.cross_products(recipe, plan.names, by), plan.columns).read_all()
        fields |= {"values": len(sums)}
    keys = [plan.names.key(name).name for name in by]
    _check_finite(plan, sums, keys)
    with stage("blocks", seconds, engine, options, rows=total) as fields:
        parts = parts_of(plan, sum(sums.column("row_count").to_pylist()))
        blocks = _blocks(plan, keys, parts)
        fields |= {"blocks": blocks.n_blocks}
    engine.check_unchanged()
    own = replace(recipe, groups=recipe.groups[len(by) :])
    pieces = _pieces(blocks, keys)
    held = {tuple(row[key] for key in keys): row for row in sums.to_pylist()}
    if set(held) != set(pieces):
        raise changed()
    read = {tuple(row[key] for key in keys): int(row["row_count"]) for row in counts.to_pylist()}
    found: Found = []
    for values in sorted(read, key=_order):
        row = held.get(values)
        found.append((values, _statistics(own, row, pieces[values], blocks) if row is not None else _nothing(), read[values]))
    schema = pa.schema([pa.field(name, counts.schema.field(key).type) for name, key in zip(by, keys, strict=True)])
    info = {
        "dropped": {}, "passes": 2 + len(parts), "seconds": seconds, "notes": list(plan.notes), "path": "blocks",
        "engine": engine.dialect, "blocks": blocks.n_blocks, "rows_read": sum(read.values()),
    }  # fmt: skip
    return schema, found, info


def _nothing() -> DataError:
    return DataError("no row of this value can be used", code="no_rows")


def _order(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """By value, nulls last."""
    return tuple((value is None, value) if value is not None else (True, 0) for value in values)


def _check_finite(plan: Plan, sums: pa.Table, keys: Sequence[str]) -> None:
    if not column(sums, "row_count").any():  # without by there is a row of sums in any case
        raise DataError("there is no row that can be used", code="no_rows")
    for name in sums.column_names:
        if name not in keys and name != "row_count" and not np.isfinite(column(sums, name)).all():
            raise not_finite(plan)


def _blocks(plan: Plan, keys: Sequence[str], parts: Sequence[Expression | None]) -> Blocks:
    """The sums per value and block, those of a value together."""
    from sqlglot import exp

    options = plan.request.options
    names = [f"s{k}" for k in range(len(plan.recipe.pairs()))]
    collector = Collector(names, [], keep_keys=True, budget=options.memory_bytes // 4, parent=options.temp_directory)
    for part in parts:
        statement = plan.grouped(part)
        if keys:
            statement = statement.order_by(*(exp.column(key) for key in keys), copy=False)
        for batch in plan.engine.query(statement, plan.columns):
            collector.add(batch)
    return collector.finish()


def _pieces(blocks: Blocks, keys: Sequence[str]) -> dict[tuple[Any, ...], pa.Table]:
    """The rows of each value, without copying them; a value may stand in several places, one for each part that was summed."""
    import pyarrow as pa

    assert blocks.table is not None
    table = blocks.table
    if not keys:
        return {(): table}
    codes = np.stack([_codes(table.column(key)) for key in keys])
    starts = np.flatnonzero(np.r_[True, (codes[:, 1:] != codes[:, :-1]).any(axis=0)])
    values = table.select(list(keys)).take(pa.array(starts)).to_pylist()
    rest = table.drop_columns(list(keys))
    found: dict[tuple[Any, ...], list[pa.Table]] = {}
    for start, stop, row in zip(starts, [*starts[1:], len(table)], values, strict=True):
        found.setdefault(tuple(row[key] for key in keys), []).append(rest.slice(start, stop - start))
    return {value: pa.concat_tables(tables) for value, tables in found.items()}


def _codes(column_: pa.ChunkedArray) -> np.ndarray:
    import pyarrow as pa

    whole = column_.combine_chunks()
    whole = whole if pa.types.is_dictionary(whole.type) else whole.dictionary_encode()
    return np.asarray(whole.indices.to_numpy(zero_copy_only=False))


def _statistics(
    recipe: Recipe, row: Mapping[str, Any], table: pa.Table, blocks: Blocks
) -> SuffStats | DataError | FormulaError:
    """One value's statistics, over the levels that occur with it; an error where the model cannot be coded over these."""
    size = len(recipe.features)
    gram = np.zeros((size, size))
    for i, j in combinations_with_replacement(range(size), 2):
        gram[i, j] = gram[j, i] = row[f"g_{i}_{j}"]
    rows = int(row["row_count"])
    counts = column(table, "row_count")
    own = Blocks(blocks.names, len(table), table, directory=blocks.directory, largest=float(counts.max()), smallest=float(counts.min()))
    stats = SuffStats(recipe, rows, float(row.get("n", rows)), float(row.get("sum_log_w", 0.0)), gram, own, "blocks")
    try:
        return over_present(stats)
    except (DataError, FormulaError) as error:
        return error
