"""Plan -> statistics of several grouping factors: sums per level, and the cells of pairs of levels that occur together."""
from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from sqlglot import exp

from . import statements
from .arrays import arrow, column
from .engines.base import Columns
from .errors import DataError, ResourceError
from .factors import Crossed, FactorSums, oriented, products_of
from .features import Recipe
from .levels import Levels
from .options import Options
from .pairs import PairAdder
from .sql import Names, both, named, skeleton

if TYPE_CHECKING:
    import pyarrow as pa

    from .plans import Plan

TOGETHER = 500_000  # rows that are added up at once
HELD = 4  # share of the memory limit, as its inverse, that combinations of keys may take which are read before they are added up
NUMBERS, ROWS_EACH = 1 << 16, 10  # whole numbers, or rows for each, up to which (from which) every number between two keys may be a level
REPEATED = 1.5  # rows per combination of all keys from which the engine groups by all of them first


def crossed(plan: Plan, rows: int) -> Crossed:
    """The statistics of all factors, in one pass over the rows (or over the combinations of keys, where these are fewer). Cells above a
    quarter of the memory limit go to a mapped file.

    Raises ResourceError where the sums of the levels exceed the memory limit.
    """
    recipe, options = plan.recipe, plan.request.options
    found = combinations(plan, recipe.groups)
    grouped = found * REPEATED < rows
    statement = statements.used_rows(recipe, plan.names, keys=True)
    held: pa.Table | None = None
    if grouped:
        keys = [plan.names.key(group) for group in recipe.groups]
        statement = statements.block_sums(recipe, plan.names).order_by(*keys, copy=False)
        if found * 8 * (len(keys) + 1 + len(recipe.pairs())) < options.memory_bytes // HELD:
            held = plan.engine.query(statement, plan.columns).read_all()
    levels = _levels(plan, held, rows)
    most = len(held) if held is not None else rows
    adder = _Adder(recipe, levels, most, options, grouped=grouped)
    names = {group: plan.names.key(group).name for group in recipe.groups}
    for batches in _together(held.to_batches(TOGETHER) if held is not None else plan.engine.query(statement, plan.columns)):
        adder.add(batches, names)
    return adder.finish()


def _levels(plan: Plan, held: pa.Table | None, rows: int) -> list[Levels]:
    """The levels of each factor in the order of their keys, and perhaps some without rows: from the combinations, or another factor's
    keys, that begin with its own columns, where these are at hand; all whole numbers between least and greatest key, where these are
    not many; else by a query."""
    groups = plan.recipe.groups
    known: list[tuple[tuple[str, ...], pa.Table]] = []
    if held is not None:
        known.append((groups, held.select([plan.names.key(group).name for group in groups]).rename_columns(list(groups))))
    found: dict[tuple[str, ...], pa.Table] = {}
    for columns in sorted(plan.recipe.factors, key=len, reverse=True):
        inner = next((table for more, table in known if more[: len(columns)] == columns), None)
        outer = _outer(inner.select(list(columns))) if inner is not None else None
        if outer is None and len(columns) == 1:
            outer = _every_number(plan, columns[0], rows)
        found[columns] = outer if outer is not None else _queried(plan, columns)
        known.append((columns, found[columns]))
    return [Levels(":".join(columns), columns, found[columns]) for columns in plan.recipe.factors]


def _outer(keys: pa.Table) -> pa.Table | None:
    """The distinct rows of sorted keys in their order; None for types whose equality is the engine's own."""
    import pyarrow as pa
    import pyarrow.compute as pc

    plain = (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_temporal)
    if not all(any(check(kind) for check in plain) and not pa.types.is_interval(kind) for kind in keys.schema.types):
        return None
    new = np.ones(len(keys), dtype=bool)
    new[1:] = False
    for values in (key.combine_chunks() for key in keys.columns):
        new[1:] |= np.from_dlpack(pc.not_equal(values[1:], values[:-1]).cast(pa.uint8())).astype(bool)
    return keys.take(arrow(np.flatnonzero(new), pa.int64()))


def _every_number(plan: Plan, group: str, rows: int) -> pa.Table | None:
    """All whole numbers from the least to the greatest key; None for other types, and where they are many for the rows."""
    import pyarrow as pa

    if plan.names.kinds[group] != "number":
        return None
    key = plan.names.key(group)
    position = frozenset({plan.names.positions[group]})
    ends = [named(end, name) for end, name in ((exp.Min(this=key), "low"), (exp.Max(this=key.copy()), "high"))]
    statement = skeleton("rows").select(*ends, append=False, copy=False).where(_present((group,), plan.names), copy=False)
    table = plan.engine.query(statement, Columns(position, position)).read_all()
    kind, low, high = table.schema.field("low").type, table.column("low")[0].as_py(), table.column("high")[0].as_py()
    if not pa.types.is_integer(kind) or low is None or high >= 2**63 or high - low >= max(NUMBERS, rows // ROWS_EACH):
        return None
    return pa.table({group: arrow(low + np.arange(high - low + 1), pa.int64()).cast(kind)})


def _queried(plan: Plan, groups: tuple[str, ...]) -> pa.Table:
    import pyarrow as pa

    names = plan.names
    keys = [names.key(group) for group in groups]
    statement = skeleton("rows").select(*keys, append=False, copy=False).distinct(copy=False).where(_present(groups, names), copy=False)
    positions = frozenset(names.positions[group] for group in groups)
    values = frozenset(names.positions[group] for group in groups if names.kinds[group] == "number")
    table = plan.engine.query(statement.order_by(*(key.copy() for key in keys), copy=False), Columns(values, positions)).read_all()
    return pa.table({group: table.column(i) for i, group in enumerate(groups)})


def _present(groups: Sequence[str], names: Names) -> exp.Expr:
    return both(names.present(group, key=True) for group in groups)


def combinations(plan: Plan, groups: Sequence[str]) -> float:
    """About how many combinations of these keys there are."""
    names = plan.names
    keys: list[exp.Expr] = [names.key(group) for group in groups]
    columns = Columns(keys=frozenset(names.positions[group] for group in groups))
    if plan.engine.dialect == "duckdb":
        hashed = exp.Anonymous(this="hash", expressions=keys)
        statement = skeleton("rows").select(named(exp.ApproxDistinct(this=hashed), "found"), append=False, copy=False)
    else:
        distinct = skeleton("rows").select(*keys, append=False, copy=False).distinct(copy=False)
        statement = exp.select(named(exp.Count(this=exp.Star()), "found")).from_(distinct.subquery("distinct_keys", copy=False))
    return float(plan.engine.query(statement, columns).read_all().column("found")[0].as_py())


def _together(batches: Iterable[pa.RecordBatch]) -> Iterator[list[pa.RecordBatch]]:
    held: list[pa.RecordBatch] = []
    for batch in batches:
        if batch.num_rows:
            held.append(batch)
        if sum(part.num_rows for part in held) >= TOGETHER:
            yield held
            held = []
    if held:
        yield held


class _Adder:
    """Adds rows, or combinations with their sums, to every factor's levels and to the cells of every pair of factors."""

    def __init__(self, recipe: Recipe, levels: list[Levels], most: int, options: Options, *, grouped: bool) -> None:
        self.recipe, self.levels, self.grouped = recipe, levels, grouped
        self.pairs = products_of(recipe.z)
        needed = 8 * sum(len(level) for level in levels) * (1 + len(recipe.pairs()))
        if needed > options.memory_bytes // 2:
            many = ", ".join(f"{level.group} {len(level):,}" for level in levels)
            raise ResourceError(
                f"the sums of the levels ({many}) need {needed / 1e6:,.0f} MB, the memory limit is {options.memory_bytes / 1e6:,.0f} MB",
                code="memory_limit", hint="raise memory_limit",
            )  # fmt: skip
        self.rows = [np.zeros(len(level)) for level in levels]
        self.sums = [np.zeros((len(recipe.pairs()), len(level))) for level in levels]
        whole = not statements.weight_columns(recipe) and len(recipe.z) == 1 and not recipe.features[recipe.z[0]]
        sizes = [len(level) for level in levels]
        pairs = oriented(sizes)
        share = options.memory_bytes // 4 // len(pairs)
        self.counted = whole and not grouped
        self.cells = {
            (k, h): PairAdder((sizes[k], sizes[h]), len(self.pairs), most, weighted=not self.counted, whole=whole, budget=share,
                              parent=options.temp_directory)
            for k, h in pairs
        }  # fmt: skip

    def add(self, batches: list[pa.RecordBatch], keys: dict[str, str]) -> None:
        """Takes in rows of some batches."""
        values = self._values(batches)
        rows = np.concatenate([column(batch, "row_count") for batch in batches]).astype(float) if self.grouped else None
        codes = [self._coded(level, batches, keys) for level in self.levels]
        for code, counts, sums, level in zip(codes, self.rows, self.sums, self.levels, strict=True):
            found = np.bincount(code, rows, minlength=len(level))
            counts += found
            for place, value in enumerate(values.values()):
                sums[place] += found if value is None and rows is None else np.bincount(code, value, minlength=len(level))
        products = None if self.counted else np.stack([self._product(values, a, b, len(codes[0])) for a, b in self.pairs])
        for (k, h), adder in self.cells.items():
            adder.add(codes[k], codes[h], products)

    def _coded(self, level: Levels, batches: list[pa.RecordBatch], keys: dict[str, str]) -> np.ndarray:
        code = np.concatenate([level.codes([batch.column(keys[group]) for group in level.columns]) for batch in batches])
        if (code < 0).any():
            raise DataError("the source changed while it was read", code="source_changed", hint="fit a snapshot of it")
        return code

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

        kept = [np.flatnonzero(rows) for rows in self.rows]
        cells = {pair: adder.finish() for pair, adder in self.cells.items()}
        factors = []
        for level, rows, sums, at in zip(self.levels, self.rows, self.sums, kept, strict=True):
            if len(at) < len(rows):
                level = Levels(level.group, level.columns, level.keys.take(arrow(at, pa.int64())))
                rows, sums = rows[at], np.ascontiguousarray(sums[:, at])
            factors.append(FactorSums(level, rows, sums))
        for k, h in cells:
            if len(kept[k]) < len(self.rows[k]) or len(kept[h]) < len(self.rows[h]):
                cells[k, h] = cells[k, h].only(kept[k], kept[h])
        return Crossed(factors, self.pairs, cells)
