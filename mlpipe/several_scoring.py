"""Predictions of a fit with several grouping factors: the engine gives the fixed part, the random features and the keys of each row, the
modes of their levels are looked up here, so that any number of factors needs no join and keeps the rows' order."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np

from . import effects
from .arrays import arrow, column
from .effects import coefficient_names
from .engines.base import Columns
from .errors import DataError
from .levels import Levels
from .predictions import Output, made, random_features, size_names, statement_of, value_names

if TYPE_CHECKING:
    import pyarrow as pa

    from .engines.base import Engine
    from .result import MixedFit
    from .sql import Names

UNSEEN = "unseen_levels"
MODE_VARIANCE = "mode variance"


class Modes:
    """The modes of one factor's levels over the random features, and their conditional variances where a level has one coefficient."""

    def __init__(self, fit: MixedFit, group: str, columns: tuple[str, ...]) -> None:
        import pyarrow as pa

        terms = [term for term in fit.terms if term.group == group]
        table = effects.ranef(fit, wide=True, stream=False, group=group)
        names = coefficient_names(terms)
        keys = table.column_names[: table.num_columns - 2 * len(names)]
        self.levels = Levels(group, columns, pa.table({name: table.column(key) for name, key in zip(columns, keys, strict=True)}))
        self.design = np.column_stack([term.design for term in terms])
        b = np.column_stack([column(table, name) for name in names])
        self.h = np.vstack([b @ self.design.T, np.zeros(self.design.shape[0])])  # the last row is for a level that is not known
        se = np.column_stack([column(table, f"{name}_se") for name in names])
        psi = np.concatenate([np.sum((fit.effect_scale * term.factor) ** 2, axis=1) for term in terms])
        self.variance = np.vstack([se**2, psi])

    def part(self, code: np.ndarray, features: np.ndarray) -> np.ndarray:
        """Zb at each row (n,)."""
        return np.asarray(np.einsum("kn,nk->n", features, self.h[code]))

    def spread(self, code: np.ndarray, features: np.ndarray) -> np.ndarray:
        """The conditional variance of Zb at each row, that of the population where the level is not known."""
        return np.asarray((self.design.T @ features)[0] ** 2 * self.variance[code, 0])


class Reading:
    """A source's rows with the linear predictor of the fixed part, the random features, further `parts` of a scoring statement, and the
    keys of grouping factors."""

    def __init__(
        self, fit: MixedFit, engine: Engine, names: Names, shown: dict[str, int], parts: Sequence[str], keys: Sequence[str], ordered: bool
    ) -> None:
        recipe = fit.recipe
        self.features = random_features(recipe)
        self.parts = list(dict.fromkeys(["population", *self.features, *parts]))
        statement = statement_of(fit, names, shown, self.parts, None, ordered).select(*(names.key(name) for name in keys), copy=False)
        used = value_names(recipe, bool({"residual", "observed"} & set(self.parts)))
        used += size_names(recipe) if "size" in self.parts else []
        values = frozenset(names.positions[name] for name in used)
        read = Columns(values, frozenset(names.positions[name] for name in keys), everything=True, row_number=ordered)
        self.reader = engine.query(statement, read)
        self.first, self.place = len(shown), {name: len(shown) + len(self.parts) + i for i, name in enumerate(keys)}
        self.fields = [self.reader.schema.field(i).with_name(name).with_nullable(True) for i, name in enumerate(shown)]

    def __iter__(self) -> Iterator[tuple[pa.RecordBatch, dict[str, np.ndarray], np.ndarray]]:
        """(batch, parts by name, random features (k, n))."""
        for batch in self.reader:
            held = {part: _plain(batch.column(self.first + k)) for k, part in enumerate(self.parts)}
            rows = [held[name] for name in self.features]
            yield batch, held, np.stack(rows) if rows else np.zeros((0, batch.num_rows))

    def codes(self, batch: pa.RecordBatch, levels: Levels) -> np.ndarray:
        """The level (n,) of each row, -1 where it is not known."""
        return levels.codes([batch.column(self.place[name]) for name in levels.columns])


def scored(
    fit: MixedFit, engine: Engine, names: Names, shown: dict[str, int], outputs: dict[str, Output], factors: Sequence[str],
    new_levels: str, ordered: bool, stack: ExitStack,
) -> pa.RecordBatchReader:  # fmt: skip
    """The reader of `scoring`'s functions for the modes of `factors` (labels of groups); closes the source at its end."""
    import pyarrow as pa

    recipe = fit.recipe
    modes = [Modes(fit, ":".join(groups), groups) for groups in recipe.factors or (recipe.groups,) if ":".join(groups) in factors]
    wanted = dict.fromkeys(part for output in outputs.values() for part in output.parts)
    keys = list(dict.fromkeys(name for mode in modes for name in mode.levels.columns))
    made_here = ("conditional", MODE_VARIANCE)
    reading = Reading(fit, engine, names, shown, [part for part in wanted if part not in made_here], keys, ordered)
    schema = pa.schema([*reading.fields, *(pa.field(name, pa.float64()) for name in outputs)])
    counts = {"rows": 0, UNSEEN: 0, "null_predictions": 0}

    def batches() -> Iterator[pa.RecordBatch]:
        fit.info["scored"] = counts
        with stack:
            for batch, held, features in reading:
                random, spread, unseen = np.zeros(batch.num_rows), np.zeros(batch.num_rows), np.zeros(batch.num_rows, dtype=bool)
                for mode in modes:
                    code = reading.codes(batch, mode.levels)
                    random, unseen = random + mode.part(code, features), unseen | (code < 0)
                    if MODE_VARIANCE in wanted:
                        spread = spread + mode.spread(code, features)
                held[MODE_VARIANCE] = spread
                _settle(held, random, unseen, new_levels, counts)
                columns = [made(output, {name: _arrow(value) for name, value in held.items()}) for output in outputs.values()]
                counts["rows"] += batch.num_rows
                counts["null_predictions"] += columns[0].null_count
                yield pa.RecordBatch.from_arrays([*(batch.column(i) for i in range(len(shown))), *columns], schema=schema)

    return pa.RecordBatchReader.from_batches(schema, batches())


def _settle(held: dict[str, np.ndarray], random: np.ndarray, unseen: np.ndarray, new_levels: str, counts: dict[str, int]) -> None:
    """Adds the random part to what is conditional on it; unseen levels are counted and treated as asked."""
    number = int(unseen.sum())
    counts[UNSEEN] += number
    if number and new_levels == "raise":
        raise DataError(f"at least {number:,} rows have a level of a grouping factor that the fit has not seen", code="new_levels")
    held["conditional"] = held["population"] + random
    if "residual" in held:
        held["residual"] = held["residual"] - random
    if number and new_levels == "null":
        for name in held:
            held[name] = np.where(unseen, np.nan, held[name])


def _plain(values: pa.Array) -> np.ndarray:
    """Doubles with nulls as NaN."""
    import pyarrow.compute as pc

    return np.from_dlpack(pc.fill_null(values, float("nan")) if values.null_count else values)


def _arrow(values: np.ndarray) -> pa.Array:
    """Doubles with NaN as null."""
    import pyarrow.compute as pc

    out = arrow(values)
    return pc.if_else(pc.is_finite(out), out, None) if not np.isfinite(values).all() else out
