"""Predictions where the rows are: every row of a source, in its order, with the linear predictor."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np

from . import effects as modes
from .errors import ColumnNotFoundError, ConfigError, DataError, did_you_mean
from .features import Recipe
from .lookup import MODE_VARIANCE, Modes, Reading
from .planning import check_types
from .predictions import Output, made, size_names, value_names

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
    return _scored(fit, data, outputs, factors, new_levels, None, options)


def augment(fit: MixedFit, data: Any, *, columns: Sequence[str] | None, prefix: str, options: Options | None) -> pa.RecordBatchReader:
    """See `MixedFit.augment`. Raises DataError as `predict`, and where the fit's own source is gone or changed."""
    best = "conditional" if fit.terms else "population"
    outputs = {f"{prefix}fitted": fit.output(best), f"{prefix}resid": fit.output("residual")}
    outputs[f"{prefix}fitted_fixed"] = fit.output("population")
    return _scored(fit, data, outputs, fit.groups, "population", columns, options)


def scored(
    fit: MixedFit, data: Any, outputs: dict[str, Output], conditional: Sequence[str], options: Options | None, *,
    columns: Sequence[str] | None,
) -> pa.RecordBatchReader:  # fmt: skip
    """The columns `columns` of the source (None: all) with `outputs`, null where a level is not known to the fit."""
    return _scored(fit, data, outputs, conditional, "null", columns, options)


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
    columns: Sequence[str] | None,
    options: Options | None,
) -> pa.RecordBatchReader:
    if new_levels not in ("population", "null", "raise"):
        hint = did_you_mean(str(new_levels), ["population", "null", "raise"])
        raise ConfigError(f'new_levels = {new_levels!r} is not one of "population", "null", "raise"', hint=hint)
    recipe = fit.recipe
    factors = [groups for groups in recipe.factors or (recipe.groups,) if ":".join(groups) in conditional]
    stack = ExitStack()
    try:
        engine = stack.enter_context(_engine(fit, data, options))
        fit.info["rows_to_score"] = engine.row_count()
        parts = list(dict.fromkeys(part for output in outputs.values() for part in output.parts))
        sizes = size_names(recipe) if "size" in parts else []
        keys = list(dict.fromkeys(name for groups in factors for name in groups))
        names = located(engine, recipe, bool({"residual", "observed"} & set(parts)), keys, sizes)
        shown = shown_columns(engine, columns, list(outputs))
        modes = [Modes(fit, ":".join(groups), groups) for groups in factors]
        asked_for = ["population" if part == "conditional" else part for part in parts if part != MODE_VARIANCE]
        reading = Reading(fit, engine, names, shown, asked_for, keys)
    except BaseException:
        stack.close()
        raise
    return _finished(fit, reading, modes, len(shown), parts, outputs, new_levels, stack)


def _engine(fit: MixedFit, data: Any, options: Options | None) -> Any:
    from contextlib import closing

    from .sources import open_source

    return modes.reopened(fit, options) if data is None else closing(open_source(data, options=options))


def located(engine: Engine, recipe: Recipe, observed: bool, keys: Sequence[str], more: Sequence[str] = ()) -> Names:
    """Where the columns that scoring needs stand in a source. Raises where one is missing or of another kind."""
    return found(engine, recipe, [*value_names(recipe, observed), *more], keys)


def found(engine: Engine, recipe: Recipe, values: Sequence[str], keys: Sequence[str] = ()) -> Names:
    """Where all columns of a source stand. Raises where a covariate or a key is missing or of another kind than the fit's."""
    from .sql import Names

    schema = engine.schema()
    for name in (*values, *keys):
        if name not in schema:
            raise ColumnNotFoundError(f"there is no column {name!r}", column=name, hint=did_you_mean(name, list(schema)))
    check_types(schema, recipe, values, keys)
    return Names.of(schema, recipe.kinds)


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


def _finished(
    fit: MixedFit, reading: Reading, modes: list[Modes], width: int, parts: Sequence[str], outputs: dict[str, Output], new_levels: str,
    stack: ExitStack,
) -> pa.RecordBatchReader:  # fmt: skip
    """The first `width` columns of the source with the outputs, levels that are not known treated and counted; closes the source at its
    end."""
    import pyarrow as pa

    schema = pa.schema([*reading.fields, *(pa.field(name, pa.float64()) for name in outputs)])
    counts = {"rows": 0, "unseen_levels": 0, "null_predictions": 0}

    def batches() -> Iterator[pa.RecordBatch]:
        fit.info["scored"] = counts  # growing: whoever reads may stop before the last batch
        with stack:
            for batch, held, features in reading:
                if modes:
                    _add_modes(reading, modes, batch, held, features, parts, new_levels, counts)
                columns = [made(output, held) for output in outputs.values()]
                counts["rows"] += batch.num_rows
                counts["null_predictions"] += columns[0].null_count
                yield pa.RecordBatch.from_arrays([*(batch.column(i) for i in range(width)), *columns], schema=schema)

    return pa.RecordBatchReader.from_batches(schema, batches())


def _add_modes(
    reading: Reading, modes: list[Modes], batch: pa.RecordBatch, held: dict[str, np.ndarray], features: np.ndarray, parts: Sequence[str],
    new_levels: str, counts: dict[str, int],
) -> None:  # fmt: skip
    """Adds the random part to what is conditional on it; levels that are not known are counted and treated as asked."""
    random, spread, unseen = np.zeros(batch.num_rows), np.zeros(batch.num_rows), np.zeros(batch.num_rows, dtype=bool)
    for mode in modes:
        code = reading.codes(batch, mode.levels)
        random, unseen = random + mode.part(code, features), unseen | (code < 0)
        if MODE_VARIANCE in parts:
            spread = spread + mode.spread(code, features)
    held[MODE_VARIANCE] = spread
    number = int(unseen.sum())
    counts["unseen_levels"] += number
    if number and new_levels == "raise":
        raise DataError(f"at least {number:,} rows have a level of a grouping factor that the fit has not seen", code="new_levels")
    if "conditional" in parts:
        held["conditional"] = held["population"] + random
    if "residual" in parts:
        held["residual"] = held["residual"] - random
    if number and new_levels == "null":
        for name in held:
            held[name] = np.where(unseen, np.nan, held[name])
