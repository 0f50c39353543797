"""Rows to predict, and the modes of their levels: the engine gives the fixed part, the random features and the keys of each row, the modes
are looked up here. So any number of factors needs no join, which would lose the rows' order and make sorting them as long again."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from . import effects
from .arrays import column, doubles
from .effects import coefficient_names
from .engines.base import Columns
from .levels import Levels
from .predictions import random_features, size_names, statement_of, value_names

if TYPE_CHECKING:
    import pyarrow as pa

    from .engines.base import Engine
    from .result import MixedFit
    from .sql import Names

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
    """A source's rows in their order, with `parts` of a scoring statement, the keys of grouping factors and, where there are any, the
    random features."""

    def __init__(
        self, fit: MixedFit, engine: Engine, names: Names, shown: dict[str, int], parts: Sequence[str], keys: Sequence[str]
    ) -> None:
        recipe = fit.recipe
        self.features = random_features(recipe) if keys else []
        self.parts = list(dict.fromkeys([*(name for name in self.features if name), *parts]))
        hidden = [name for name in keys if name not in shown]
        statement = statement_of(fit, names, shown, self.parts).select(*(names.key(name) for name in hidden), copy=False)
        used = value_names(recipe, bool({"residual", "observed"} & set(self.parts)))
        used += size_names(recipe) if "size" in self.parts else []
        values = frozenset(names.positions[name] for name in used)
        read = Columns(values, frozenset(names.positions[name] for name in hidden), everything=True)
        self.reader = engine.query(statement, read)
        self.first = len(shown)
        self.place = {name: i for i, name in enumerate(shown)} | {name: i for i, name in enumerate(hidden, len(shown) + len(self.parts))}
        self.fields = [self.reader.schema.field(i).with_name(name).with_nullable(True) for i, name in enumerate(shown)]

    def __iter__(self) -> Iterator[tuple[pa.RecordBatch, dict[str, np.ndarray], np.ndarray]]:
        """(batch, parts by name, random features (k, n))."""
        for batch in self.reader:
            held = {part: doubles(batch.column(self.first + k)) for k, part in enumerate(self.parts)}
            rows = [held[name] if name else np.ones(batch.num_rows) for name in self.features]
            yield batch, held, np.stack(rows) if rows else np.zeros((0, batch.num_rows))

    def codes(self, batch: pa.RecordBatch, levels: Levels) -> np.ndarray:
        """The level (n,) of each row, -1 where it is not known."""
        return levels.codes([batch.column(self.place[name]) for name in levels.columns])
