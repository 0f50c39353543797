"""Predictions where the rows are: every row of a source, in its order, with the linear predictor."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np

from . import effects as modes
from .arrays import column
from .errors import ColumnNotFoundError, ConfigError, DataError, did_you_mean
from .features import Recipe
from .predictions import Output, made, size_names, statement_of, value_names

if TYPE_CHECKING:
    import pyarrow as pa

    from .engines.base import Engine
    from .options import Options
    from .result import MixedFit
    from .sql import Names


def predict(
    fit: MixedFit,
    data: Any,
    *,
    effects: str | Sequence[str],
    kind: str,
    interval: str | None,
    level: float,
    new_levels: str,
    ordered: bool,
    prefix: str,
    options: Options | None,
) -> pa.RecordBatchReader:
    """See `MixedFit.predict`. Raises DataError for missing columns, columns of another kind, a name that is taken."""
    wanted, factors = asked(fit, effects, kind)
    output = Output((wanted,)) if kind == "link" and wanted != "marginal" else fit.output(wanted)
    outputs = {f"{prefix}predicted": output}
    if interval is not None:
        from .bands import bands

        lower, upper = bands(fit, wanted, kind, interval, level, factors)
        outputs |= {f"{prefix}lower": lower, f"{prefix}upper": upper}
    return _scored(fit, data, outputs, factors, new_levels, ordered, None, options)


def augment(fit: MixedFit, data: Any, *, columns: Sequence[str] | None, prefix: str, options: Options | None) -> pa.RecordBatchReader:
    """See `MixedFit.augment`. Raises DataError as `predict`, and where the fit's own source is gone or changed."""
    best = "conditional" if fit.terms else "population"
    outputs = {f"{prefix}fitted": fit.output(best), f"{prefix}resid": fit.output("residual")}
    outputs[f"{prefix}fitted_fixed"] = fit.output("population")
    return _scored(fit, data, outputs, fit.groups, "population", True, columns, options)


def scored(
    fit: MixedFit, data: Any, outputs: dict[str, Output], conditional: Sequence[str], options: Options | None, *,
    columns: Sequence[str] | None,
) -> pa.RecordBatchReader:  # fmt: skip
    """The columns `columns` of the source (None: all, and in its order) with `outputs`, null where a level is not known to the fit."""
    return _scored(fit, data, outputs, conditional, "null", columns is None, columns, options)


def asked(fit: MixedFit, effects: str | Sequence[str], kind: str) -> tuple[str, list[str]]:
    """Which prediction `effects` asks for, and the grouping factors it is conditional on. Raises ConfigError for what is not known."""
    if kind not in ("response", "link"):
        raise ConfigError(f"kind = {kind!r} is not known", hint=did_you_mean(str(kind), ["response", "link"]))
    wanted = _wanted(fit, effects)
    if kind == "link" and wanted == "marginal" and fit.recipe.family is not None:
        raise ConfigError("a mean over the random effects has no linear predictor", hint='kind="response", or effects="population"')
    return wanted, [] if wanted != "conditional" else fit.groups if isinstance(effects, str) else list(effects)


def _wanted(fit: MixedFit, effects: str | Sequence[str]) -> str:
    """Which prediction `effects` asks for."""
    if isinstance(effects, str):
        if effects not in ("conditional", "population", "marginal"):
            hint = did_you_mean(effects, ["conditional", "population", "marginal"])
            raise ConfigError(f"effects = {effects!r} is not known", hint=hint)
        return effects if fit.terms else "population"
    known = {term.group for term in fit.terms}
    for name in effects:
        if name not in known:
            raise ConfigError(f"there is no grouping factor {name!r}", hint=did_you_mean(name, sorted(known)))
    return "conditional" if effects else "population"


def _scored(
    fit: MixedFit,
    data: Any,
    outputs: dict[str, Output],
    conditional: Sequence[str],
    new_levels: str,
    ordered: bool,
    columns: Sequence[str] | None,
    options: Options | None,
) -> pa.RecordBatchReader:
    if new_levels not in ("population", "null", "raise"):
        hint = did_you_mean(str(new_levels), ["population", "null", "raise"])
        raise ConfigError(f'new_levels = {new_levels!r} is not one of "population", "null", "raise"', hint=hint)
    stack = ExitStack()
    try:
        engine = stack.enter_context(_engine(fit, data, options))
        fit.info["rows_to_score"] = engine.row_count()
        parts = list(dict.fromkeys(part for output in outputs.values() for part in output.parts))
        observed = "residual" in parts or "observed" in parts
        sizes = size_names(fit.recipe) if "size" in parts else []
        names = located(engine, fit.recipe, observed, bool(conditional), sizes)
        shown = shown_columns(engine, columns, list(outputs))
        from . import several_scoring

        if conditional and (fit.recipe.factors or several_scoring.MODE_VARIANCE in parts):

            return several_scoring.scored(fit, engine, names, shown, outputs, conditional, new_levels, ordered, stack)
        joined = _joined(fit, engine, names) if conditional else None
        statement = statement_of(fit, names, shown, parts, joined.schema if joined is not None else None, ordered)
        from .engines.base import Columns

        groups = fit.recipe.groups if conditional else ()
        values = frozenset(names.positions[name] for name in (*value_names(fit.recipe, observed), *sizes))
        values |= {names.positions[name] for name in groups if fit.recipe.kinds[name] in ("number", "text")}
        wanted = Columns(values, frozenset(names.positions[name] for name in groups), everything=True, row_number=ordered)
        reader = engine.query(statement, wanted, joined=joined)
        return _finished(fit, reader, list(shown), parts, outputs, new_levels, stack)
    except BaseException:
        stack.close()
        raise


def _engine(fit: MixedFit, data: Any, options: Options | None) -> Any:
    from contextlib import closing

    from .sources import open_source

    return modes.reopened(fit, options) if data is None else closing(open_source(data, options=options))


def located(engine: Engine, recipe: Recipe, observed: bool, conditional: bool, more: Sequence[str] = ()) -> Names:
    """Where the columns that scoring needs stand in a source. Raises where one is missing or of another kind."""
    return found(engine, recipe, [*value_names(recipe, observed), *(recipe.groups if conditional else ()), *more])


def found(engine: Engine, recipe: Recipe, wanted: Sequence[str]) -> Names:
    """Where all columns of a source stand. Raises where one that is wanted is missing or of another kind than the fit's."""
    from .sql import Names

    schema = engine.schema()
    for name in wanted:
        if name not in schema:
            raise ColumnNotFoundError(f"there is no column {name!r}", column=name, hint=did_you_mean(name, list(schema)))
    for name in wanted:
        if schema[name].kind != recipe.kinds[name]:
            raise DataError(
                f"the column {name!r} is of kind {schema[name].kind} ({schema[name].name}), the fit had {recipe.kinds[name]}",
                code="column_type",
                column=name,
                hint="cast it; for CSV and JSON files give mp.source types",
            )
    return Names({name: i for i, name in enumerate(schema)}, recipe.kinds)


def shown_columns(engine: Engine, columns: Sequence[str] | None, outputs: Sequence[str]) -> dict[str, int]:
    """The source's columns that are handed on, with their positions."""
    positions = {name: i for i, name in enumerate(engine.schema())}
    for name in columns or ():
        if name not in positions:
            raise ColumnNotFoundError(f"there is no column {name!r}", column=name, hint=did_you_mean(name, list(positions)))
    shown = positions if columns is None else {name: positions[name] for name in columns}
    for name in outputs:
        if name in shown:
            raise DataError(f"the source already has a column {name!r}", code="name_taken", column=name, hint='pass prefix="…"')
    return shown


def _joined(fit: MixedFit, engine: Engine, names: Names) -> pa.Table:
    """The conditional modes by level: keys j0, j1, …, and h0, h1, …, their coefficients over the random features."""
    import pyarrow as pa

    table = modes.ranef(fit, wide=True, stream=False)
    b = np.column_stack([column(table, name) for name in modes.coefficient_names(fit.terms)])
    h = b @ np.column_stack([term.design for term in fit.terms]).T
    keys = zip(fit.recipe.groups, modes.key_names(fit.terms, fit.recipe.groups), _key_types(engine, fit.recipe, names), strict=True)
    columns = {f"j{i}": _comparable(group, table.column(key), kind) for i, (group, key, kind) in enumerate(keys)}
    return pa.table({**columns, **{f"h{k}": h[:, k] for k in range(h.shape[1])}})


def _key_types(engine: Engine, recipe: Recipe, names: Names) -> list[pa.DataType]:
    """The Arrow types of the grouping columns of a source."""
    from sqlglot import exp

    from .engines.base import Columns
    from .sql import skeleton

    keys = [names.key(group) for group in recipe.groups]
    nothing = skeleton("rows").select(*keys, append=False, copy=False).where(exp.false(), copy=False)
    schema = engine.query(nothing, Columns(keys=frozenset(names.positions[group] for group in recipe.groups))).schema
    return [schema.field(key.name).type for key in keys]


def _comparable(group: str, keys: pa.ChunkedArray, source: pa.DataType) -> pa.ChunkedArray:
    """The keys in a type that `_key` compares with the source's by value: text for enums and the like, 64-bit integers for
    integers of different widths, decimals for wider ones, doubles for other numbers of different types, the source's own type for times,
    null where that cannot hold them. Raises DataError for other types that differ."""
    import pyarrow as pa

    kind = keys.type.value_type if pa.types.is_dictionary(keys.type) else keys.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return keys.cast(pa.large_string())
    if _narrow(kind) and _narrow(source):
        return keys.cast(pa.int64())
    if _whole(kind) and _whole(source):
        return keys.cast(pa.decimal128(38, 0))
    if kind == source or (pa.types.is_duration(kind) and source == pa.month_day_nano_interval()):
        return keys
    if any(_alike(test, kind, source) for test in (pa.types.is_timestamp, pa.types.is_duration, pa.types.is_time)):
        return _exactly(keys, source)
    if _number(kind) and _number(source):
        return keys.cast(pa.float64(), safe=False)
    raise DataError(f"the column {group!r} is of type {source}, the fit had {kind}", code="column_type", column=group, hint="cast it")


def _alike(test: Callable[[pa.DataType], bool], kind: pa.DataType, source: pa.DataType) -> bool:
    """Whether both types pass a test, and both or neither have a time zone."""
    return test(kind) and test(source) and (getattr(kind, "tz", None) is None) == (getattr(source, "tz", None) is None)


def _exactly(keys: pa.ChunkedArray, source: pa.DataType) -> pa.ChunkedArray:
    """The keys in another type of time, null where that cannot hold them."""
    import pyarrow.compute as pc

    cast = keys.cast(source, safe=False)
    return pc.if_else(pc.equal(cast.cast(keys.type, safe=False), keys), cast, None)


def _whole(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_integer(kind) or (pa.types.is_decimal(kind) and kind.scale == 0))


def _narrow(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_integer(kind) and kind != pa.uint64())


def _number(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _finished(
    fit: MixedFit,
    reader: pa.RecordBatchReader,
    shown: list[str],
    parts: list[str],
    outputs: dict[str, Output],
    new_levels: str,
    stack: ExitStack,
) -> pa.RecordBatchReader:
    """The reader with the true names, unseen levels treated and counted; closes the source at its end."""
    import pyarrow as pa

    keep = len(shown) + len(parts)
    fields = [reader.schema.field(i).with_name(name).with_nullable(True) for i, name in enumerate(shown)]
    schema = pa.schema([*fields, *(pa.field(name, pa.float64()) for name in outputs)])
    counts = {"rows": 0, "unseen_levels": 0, "null_predictions": 0}

    def batches() -> Iterator[pa.RecordBatch]:
        fit.info["scored"] = counts  # growing: whoever reads may stop before the last batch
        with stack:
            for batch in reader:
                held = {part: batch.column(len(shown) + k) for k, part in enumerate(parts)}
                arrays = [batch.column(i) for i in range(len(shown))] + [made(output, held) for output in outputs.values()]
                if batch.num_columns > keep:
                    arrays = _unseen(batch, arrays, len(shown), new_levels, counts)
                counts["rows"] += batch.num_rows
                counts["null_predictions"] += arrays[len(shown)].null_count
                yield pa.RecordBatch.from_arrays(arrays, schema=schema)

    return pa.RecordBatchReader.from_batches(schema, batches())


def _unseen(batch: pa.RecordBatch, arrays: list[Any], first: int, new_levels: str, counts: dict[str, int]) -> list[Any]:
    import pyarrow as pa

    unseen = column(batch, "unseen") > 0
    number = int(unseen.sum())
    counts["unseen_levels"] += number
    if number and new_levels == "raise":
        raise DataError(f"{number:,} rows have a level of the grouping factor that the fit has not seen", code="new_levels")
    if number and new_levels == "null":
        import pyarrow.compute as pc

        arrays = [array if i < first else pc.if_else(pa.array(~unseen), array, None) for i, array in enumerate(arrays)]
    return arrays
