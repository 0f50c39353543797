"""Plan -> statistics of several grouping factors: sums per level, and the cells of pairs of levels that occur together."""
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from sqlglot import exp

from . import statements
from .arrays import column
from .engines.base import Columns
from .errors import DataError, ResourceError
from .features import Recipe
from .levels import Levels
from .sql import Names, both, finite, named, skeleton

if TYPE_CHECKING:
    import pyarrow as pa

    from .planning import Plan

TOGETHER = 500_000  # rows that are added up at once
REPEATED = 1.5  # rows per combination of all keys from which the engine groups by all of them first


@dataclass
class FactorSums:
    """One factor: its levels, the rows of each (m,), and the sums (K, m) of `Recipe.pairs()` per level."""

    levels: Levels
    rows: np.ndarray
    sums: np.ndarray


@dataclass
class Crossed:
    """Several factors: sums per level, and rows (or combinations of keys) as codes (n,) of each factor, with the sums (z pairs, n) of
    products of random features; `pairs` names these. None of sums means one row each, and nothing but a constant."""

    factors: list[FactorSums]
    codes: list[np.ndarray]
    pairs: list[tuple[int, int]]
    products: np.ndarray | None

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        held = sum(code.nbytes for code in self.codes) + sum(f.sums.nbytes for f in self.factors)
        return held + (self.products.nbytes if self.products is not None else 0)


def crossed(plan: Plan, rows: int) -> Crossed:
    """The statistics of all factors, in one pass over the rows (or over the combinations of keys, where these are fewer).

    Raises ResourceError where the cells exceed the memory limit, DataError for a factor with one level or one a row.
    """
    recipe, limit = plan.recipe, plan.request.options.memory_bytes
    levels = [_levels(plan, groups) for groups in recipe.factors]
    combinations = _combinations(plan)
    grouped = combinations * REPEATED < rows
    cells = round(combinations) if grouped else rows
    pairs = [(a, b) for i, a in enumerate(recipe.z) for b in recipe.z[i:]]
    needed = cells * (4 * len(levels) + 8 * len(pairs))
    if needed > limit * 3 // 4:
        raise ResourceError(
            f"about {cells:,} cells of {len(levels)} grouping factors need {needed / 1e6:,.0f} MB, "
            f"the memory limit is {limit / 1e6:,.0f} MB",
            code="memory_limit", hint="raise memory_limit",
        )  # fmt: skip
    adder = _Adder(recipe, levels, pairs, grouped=grouped)
    statement = statements.block_sums(recipe, plan.names) if grouped else statements.used_rows(recipe, plan.names, keys=True)
    keys = {group: plan.names.key(group).name for group in recipe.groups}
    for batches in _together(plan.engine.query(statement, plan.columns)):
        adder.add(batches, keys)
    return adder.finish()


def _levels(plan: Plan, groups: tuple[str, ...]) -> Levels:
    import pyarrow as pa

    names = plan.names
    keys = [names.key(group) for group in groups]
    statement = skeleton("rows").select(*keys, append=False, copy=False).distinct(copy=False).where(_present(groups, names), copy=False)
    positions = frozenset(names.positions[group] for group in groups)
    values = frozenset(names.positions[group] for group in groups if names.kinds[group] == "number")
    table = plan.engine.query(statement.order_by(*(key.copy() for key in keys), copy=False), Columns(values, positions)).read_all()
    return Levels(":".join(groups), groups, pa.table({group: table.column(i) for i, group in enumerate(groups)}))


def _present(groups: Sequence[str], names: Names) -> exp.Expr:
    conditions: list[exp.Expr] = []
    for group in groups:
        present = exp.Not(this=exp.Is(this=names.key(group), expression=exp.Null()))
        conditions.append(finite(names.value(group)) if names.kinds[group] == "number" else present)
    return both(conditions)


def _combinations(plan: Plan) -> float:
    """About how many combinations of all keys there are."""
    recipe, names = plan.recipe, plan.names
    keys: list[exp.Expr] = [names.key(group) for group in recipe.groups]
    columns = Columns(keys=plan.columns.keys)
    if plan.engine.dialect == "duckdb":
        hashed = exp.Anonymous(this="hash", expressions=keys)
        statement = skeleton("rows").select(named(exp.ApproxDistinct(this=hashed), "found"), append=False, copy=False)
    else:
        distinct = skeleton("rows").select(*keys, append=False, copy=False).distinct(copy=False)
        statement = exp.select(named(exp.Count(this=exp.Star()), "found")).from_(distinct.subquery("distinct_keys", copy=False))
    return float(plan.engine.query(statement, columns).read_all().column("found")[0].as_py())


def _together(reader: pa.RecordBatchReader) -> Iterator[list[pa.RecordBatch]]:
    held: list[pa.RecordBatch] = []
    for batch in reader:
        if batch.num_rows:
            held.append(batch)
        if sum(part.num_rows for part in held) >= TOGETHER:
            yield held
            held = []
    if held:
        yield held


class _Adder:
    """Adds rows, or combinations with their sums, to every factor's levels, and keeps their codes."""

    def __init__(self, recipe: Recipe, levels: list[Levels], pairs: list[tuple[int, int]], *, grouped: bool) -> None:
        self.recipe, self.levels, self.pairs, self.grouped = recipe, levels, pairs, grouped
        self.rows = [np.zeros(len(level)) for level in levels]
        self.sums = [np.zeros((len(recipe.pairs()), len(level))) for level in levels]
        self.codes: list[list[np.ndarray]] = [[] for _ in levels]
        self.products: list[np.ndarray] = []
        self.counted = not grouped and not statements.weight_columns(recipe) and len(recipe.z) == 1 and not recipe.features[recipe.z[0]]

    def add(self, batches: list[pa.RecordBatch], keys: dict[str, str]) -> None:
        """Takes in rows of some batches."""
        values = self._values(batches)
        rows = np.concatenate([column(batch, "row_count") for batch in batches]).astype(float) if self.grouped else None
        for k, level in enumerate(self.levels):
            code = np.concatenate([level.codes([batch.column(keys[group]) for group in level.columns]) for batch in batches])
            if (code < 0).any():
                raise DataError("the source changed while it was read", code="source_changed", hint="fit a snapshot of it")
            self.codes[k].append(code.astype(np.int32))
            self.rows[k] += np.bincount(code, rows, minlength=len(level))
            for place, value in enumerate(values.values()):
                self.sums[k][place] += np.bincount(code, value, minlength=len(level))
        if not self.counted:
            self.products.append(np.stack([self._product(values, a, b, len(code)) for a, b in self.pairs]))

    def _product(self, values: dict[tuple[int, int], np.ndarray | None], a: int, b: int, n: int) -> np.ndarray:
        value = values[(a, b)] if (a, b) in values else values[(b, a)]
        return np.ones(n) if value is None else value

    def _values(self, batches: list[pa.RecordBatch]) -> dict[tuple[int, int], np.ndarray | None]:
        """The summands of each of `Recipe.pairs()`, None where they are all 1."""

        def read(name: str) -> np.ndarray:
            return np.concatenate([column(batch, name) for batch in batches]).astype(float, copy=False)

        pairs = self.recipe.pairs()
        if self.grouped:
            return {pair: read(f"s{k}") for k, pair in enumerate(pairs)}
        weights = [read(name) for name in statements.weight_columns(self.recipe)]
        features = {i: read(f"f{i}") for i in {i for pair in pairs for i in pair} if self.recipe.features[i]}
        out: dict[tuple[int, int], np.ndarray | None] = {}
        for pair in pairs:
            factors = [*weights, *(features[i] for i in pair if i in features)]
            out[pair] = math.prod(factors[1:], start=factors[0]) if factors else None
        return out

    def finish(self) -> Crossed:
        """The statistics, levels without used rows left out."""
        import pyarrow as pa

        factors, codes = [], []
        for level, rows, sums, parts in zip(self.levels, self.rows, self.sums, self.codes, strict=True):
            kept = np.flatnonzero(rows)
            if len(kept) < 2:
                raise DataError(f"the grouping factor {level.group} has fewer than two levels", code="one_level", column=level.columns[0])
            code = np.concatenate(parts)
            if len(kept) < len(rows):
                place = np.full(len(rows), -1, dtype=np.int32)
                place[kept] = np.arange(len(kept))
                code = place[code]
                level = Levels(level.group, level.columns, level.keys.take(pa.array(kept)))
            factors.append(FactorSums(level, rows[kept], np.ascontiguousarray(sums[:, kept])))
            codes.append(code)
        return Crossed(factors, codes, self.pairs, None if self.counted else np.concatenate(self.products, axis=1))
