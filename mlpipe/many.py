"""Many models from the scans of one: a model per value of some columns, and several formulas over the same rows.

The rows are summed once, grouped by the values and the grouping factor; each value's sums are then statistics of their own. Shifts, scales
and data-dependent bases are those of all rows; the levels of a factor are those that occur with the value.
"""
from __future__ import annotations

import math
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
from .collect import causes, changed, left_out, none_usable, not_finite, parts_of
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
    def scans(self) -> list[dict[str, Any]]:
        """What is noted of each scan."""
        return list(self.info.get("scans", [self.info]))

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
        lines += dict.fromkeys(scan["nowhere"] for scan in self.scans if scan["nowhere"])
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
        for values, stats, rows_read, dropped in found:
            rows = stats.rows if isinstance(stats, SuffStats) else 0
            own = {**info, "rows_read": rows_read, "rows_dropped": rows_read - rows, "dropped": dropped, "seconds": {}}
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


Found = list[tuple[tuple[Any, ...], SuffStats | DataError | FormulaError, int, dict[str, int]]]


def collected(plan: Plan) -> tuple[pa.Schema, Found, dict[str, Any]]:
    """The statistics of each value of the plan's `by` columns, in the values' order, with how many rows the source has of it and how many
    of these are left out, by cause. Rows without a value are of none.

    Raises DataError as `collect` does where no value can be fitted, and under na="raise" for rows without a value.
    """
    import pyarrow as pa

    seconds: dict[str, float] = {}
    engine, options, by = plan.engine, plan.request.options, plan.request.by
    total, keys = engine.row_count(), [plan.names.key(name).name for name in by]
    with stage("cross_products", seconds, engine, options, rows=total) as fields:
        counts = engine.query(statements.missing((), (), {}, plan.names, by), plan.columns).read_all()
        sums = engine.query(statements.cross_products(plan.recipe, plan.names, by), plan.columns).read_all()
        read = {tuple(row[key] for key in keys): int(row["row_count"]) for row in counts.to_pylist()}
        held = {tuple(row[key] for key in keys): row for row in sums.to_pylist() if row["row_count"]}
        left = _left_out(plan, read, held)
        fields |= {"values": len(held)}
    with stage("blocks", seconds, engine, options, rows=total) as fields:
        parts = parts_of(plan, sum(int(row["row_count"]) for row in held.values()))
        blocks = _blocks(plan, keys, parts)
        fields |= {"blocks": blocks.n_blocks}
    engine.check_unchanged()
    pieces = _pieces(blocks, keys)
    if set(held) != set(pieces):
        raise changed()
    own = replace(plan.recipe, groups=plan.recipe.groups[len(by) :])
    found: Found = []
    for values in sorted(left.dropped):
        error = left.errors.get(values)
        stats = error if error is not None else _statistics(own, held[values], pieces[values], blocks)
        found.append((values, stats, read[values], left.dropped[values]))
    schema = pa.schema([pa.field(name, counts.schema.field(key).type) for name, key in zip(by, keys, strict=True)])
    info = {
        "dropped": left.by_cause(), "passes": 2 + len(parts), "seconds": seconds, "path": "blocks", "engine": engine.dialect,
        "notes": [*plan.notes, *filter(None, [left.note()])], "blocks": blocks.n_blocks,
        "rows_read": sum(read.values()), "rows_nowhere": left.rows_nowhere, "nowhere": left.note(),
    }  # fmt: skip
    return schema, found, info


@dataclass
class _LeftOut:
    """Of each value's rows those `dropped`, by cause, and the `errors` of values whose rows are refused; `nowhere`: in how many rows a
    column of the values is missing, so that they are of no model, `rows_nowhere` in all."""

    dropped: dict[tuple[Any, ...], dict[str, int]]
    errors: dict[tuple[Any, ...], DataError] = field(default_factory=dict)
    nowhere: dict[str, int] = field(default_factory=dict)
    rows_nowhere: int = 0

    def by_cause(self) -> dict[str, int]:
        """The rows that are left out of all models."""
        out: dict[str, int] = {}
        for found in (*self.dropped.values(), self.nowhere):
            for cause, count in found.items():
                out[cause] = out.get(cause, 0) + count
        return out

    def note(self) -> str:
        """How many rows are of no model, as text; "" where there are none."""
        named = ", ".join(f"{name!r} is missing in {count:,}" for name, count in self.nowhere.items())
        return f"{self.rows_nowhere:,} rows are of no model: {named}" if self.nowhere else ""


def _left_out(plan: Plan, read: Mapping[tuple[Any, ...], int], held: Mapping[tuple[Any, ...], Mapping[str, Any]]) -> _LeftOut:
    """What becomes of the rows that are in no sum. Raises DataError where there is nothing to fit, as `collect` does."""
    by = plan.request.by
    used = {values: int(held[values]["row_count"]) if values in held else 0 for values in read}
    why = causes(plan, by) if used != read or not all(used.values()) else {}
    out = _LeftOut({values: {} for values in read if not any(map(_missing, values))})
    for values in read.keys() - out.dropped.keys():
        out.rows_nowhere += read[values]
        for name in (name for name, value in zip(by, values, strict=True) if _missing(value)):
            out.nowhere[name] = out.nowhere.get(name, 0) + read[values]
    if out.nowhere and plan.request.na == "raise":
        raise DataError(out.note(), code="missing_values", column=next(iter(out.nowhere)))
    endless: DataError | None = None
    for values in sorted(out.dropped):
        try:
            if not used[values]:
                raise none_usable(why[values], read[values])
            if used[values] != read[values]:
                out.dropped[values] = left_out(plan, why[values], read[values] - used[values])
            if not _finite(held[values]):
                endless = endless or not_finite(plan)
                raise endless
        except DataError as error:
            out.errors[values] = error
    if len(out.errors) == len(out.dropped):
        raise _no_value(by, out, sum(read.values()))
    return out


def _no_value(by: Sequence[str], out: _LeftOut, total: int) -> DataError:
    """The error where no value can be fitted: that of the first."""
    if not out.errors:
        return none_usable({"missing": out.nowhere, "zero": {}, "infinite": {}, "negative": {}}, total)
    values, first = next(iter(out.errors.items()))
    if by:
        named = " ".join(f"{name}={value}" for name, value in zip(by, values, strict=True))
        first.message = f"there is no value of {', '.join(by)} that can be fitted; {named}: {first.message}"
    return first


def _missing(value: Any) -> bool:
    return value is None or value != value


def _finite(row: Mapping[str, Any]) -> bool:
    return all(math.isfinite(value) for name, value in row.items() if name.startswith("g_") or name in ("n", "sum_log_w"))


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
