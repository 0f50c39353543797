"""Levels of grouping factors as whole numbers: keys of any type, in one column or several."""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .arrays import arrow, plain_interval
from .errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

LOOKED_UP = 1 << 20  # combined codes up to which levels are looked up in a table
SPAN = 1 << 26  # of whole-number keys, up to which codes are looked up in a table


class Index:
    """The place of each value among the distinct ones of a key column `name`; -1 for null and unknown values."""

    def __init__(self, name: str, values: pa.Array) -> None:
        import pyarrow.compute as pc

        self.name, self.table, self.first = name, None, 0
        self.values = pc.unique(_bare(values))
        if _signed(self.values.type) and len(self.values):
            plain = np.from_dlpack(self.values).astype(np.int64)
            self.first, span = int(plain.min()), int(plain.max()) - int(plain.min()) + 1
            if span <= SPAN:
                self.table = np.full(span, -1, dtype=np.int64)
                self.table[plain - self.first] = np.arange(len(plain))

    def codes(self, values: pa.Array) -> np.ndarray:
        """The codes (n,) of values. Raises DataError for a type that cannot hold the same values."""
        import pyarrow.compute as pc

        values = _bare(values)
        if self.table is not None and _signed(values.type) and values.null_count == 0:
            return _looked_up(self.table, np.from_dlpack(values).astype(np.int64, copy=False) - self.first)
        found = pc.index_in(self._alike(values), value_set=self.values)
        return np.from_dlpack(pc.fill_null(found, -1) if found.null_count else found).astype(np.int64)

    def _alike(self, values: pa.Array) -> pa.Array:
        """The values in the type of the known ones; null where that type cannot hold them."""
        import pyarrow as pa
        import pyarrow.compute as pc

        kind, known = values.type, self.values.type
        if kind == known:
            return values
        values = plain_interval(values)
        try:
            if pa.types.is_uint64(known) != pa.types.is_uint64(kind) and pa.types.is_integer(kind):  # these wrap round there and back
                values = values.cast(pa.decimal128(20))
            cast = values.cast(known, safe=False)
            return pc.if_else(pc.equal(cast.cast(values.type, safe=False), values), cast, None)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            message = f"the column {self.name!r} is of type {kind}, the fit had {known}"
            raise DataError(message, code="column_type", column=self.name, hint="cast it") from error


@dataclass
class Levels:
    """The levels of one factor: `group`, its label; `columns`, its key columns; `keys`, one row a level."""

    group: str
    columns: tuple[str, ...]
    keys: pa.Table

    def __post_init__(self) -> None:
        self.indices = [Index(name, self.keys.column(name).combine_chunks()) for name in self.keys.column_names]
        self.sizes = [len(index.values) for index in self.indices]
        # the engine's order of the keys (an enum's own, say) need not be that of the values
        combined = self._combined([self.keys.column(i).combine_chunks() for i in range(self.keys.num_columns)])
        self.order = np.argsort(combined, kind="stable")
        self.combined = combined[self.order]
        self.table: np.ndarray | None = None  # from combined codes to levels, where that is not much larger than the levels are many
        span = math.prod(self.sizes)
        if span <= max(LOOKED_UP, 4 * len(combined)):
            self.table = np.full(span, -1, dtype=np.int64)
            self.table[combined] = np.arange(len(combined))

    def __len__(self) -> int:
        return len(self.keys)

    def _combined(self, values: list[Any]) -> np.ndarray:
        out = self.indices[0].codes(values[0])
        bad = out < 0
        for index, size, more in zip(self.indices[1:], self.sizes[1:], values[1:], strict=True):
            code = index.codes(more)
            bad |= code < 0
            out = out * size + code
        return np.where(bad, -1, out) if bad.any() else out

    def codes(self, values: list[Any]) -> np.ndarray:
        """The level (n,) of each row from its key columns; -1 for one that is not known."""
        combined = self._combined(values)
        if self.table is not None:
            return _looked_up(self.table, combined)
        at = np.minimum(np.searchsorted(self.combined, combined), len(self.combined) - 1)
        return np.where(self.combined[at] == combined, self.order[at], -1)


def _looked_up(table: np.ndarray, at: np.ndarray) -> np.ndarray:
    """table[at], -1 for places outside."""
    if len(at) == 0 or (at.min() >= 0 and at.max() < len(table)):
        return np.asarray(table[at])
    inside = (at >= 0) & (at < len(table))
    return np.where(inside, table[np.where(inside, at, 0)], -1)


def union(a: Levels, b: Levels) -> tuple[Levels, np.ndarray, np.ndarray]:
    """The levels of both in the order of their keys, and the places (m,) there of those of each.

    Raises DataError where the keys are of types that cannot be compared.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    names = [f"k{i}" for i in range(len(a.columns))]
    try:
        parts = [_plain(levels.keys.rename_columns(names), other.keys) for levels, other in ((a, b), (b, a))]
        both = pa.concat_tables(parts, promote_options="permissive").combine_chunks()
        bare = pa.table([_bare(keys.combine_chunks()) for keys in both.columns], names=names)
        numbered = bare.append_column("row", pa.array(np.arange(len(bare))))
        first = numbered.group_by(names, use_threads=False).aggregate([("row", "min")]).column("row_min")
        order = pc.sort_indices(bare.take(first), sort_keys=[(name, "ascending") for name in names])
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        raise DataError(f"the keys of {a.group} in the statistics have different types", code="not_mergeable") from error
    levels = Levels(a.group, a.columns, both.take(first.take(order)).rename_columns(list(a.columns)))
    codes = levels.codes([keys.combine_chunks() for keys in both.columns])
    return levels, codes[: len(a)], codes[len(a) :]


def _plain(keys: pa.Table, other: pa.Table) -> pa.Table:
    """The keys, dictionaries that differ from the other's type replaced by their values."""
    import pyarrow as pa

    out = []
    for column, theirs in zip(keys.columns, other.columns, strict=True):
        decode = pa.types.is_dictionary(column.type) and (column.type != theirs.type or not column.type.ordered)
        out.append(column.cast(column.type.value_type) if decode else column)
    return pa.table(out, names=keys.column_names)


def _signed(kind: pa.DataType) -> bool:
    """Whether all values of a type are 64-bit integers with a sign."""
    import pyarrow as pa

    return bool(pa.types.is_integer(kind) and not pa.types.is_uint64(kind))


def _bare(values: pa.Array) -> pa.Array:
    """Values that stand for themselves: out of dictionaries and extensions, and zero without its sign."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_string_view(values.type):
        values = values.cast(pa.large_string())
    return pc.add(values, 0.0) if pa.types.is_float32(values.type) or pa.types.is_float64(values.type) else values


def levels_of(columns: tuple[str, ...], keys: pa.Table) -> tuple[Levels, np.ndarray]:
    """The levels of the factor of these key columns, in their order, and the level (n,) of each row of the table; no key is null."""
    import pyarrow as pa

    own = keys.select(list(columns)).unify_dictionaries().combine_chunks()
    codes: np.ndarray = np.zeros(len(own), dtype=np.int64)
    for name in columns:
        values = _bare(own.column(name).combine_chunks()).dictionary_encode()
        codes = codes * len(values.dictionary) + np.from_dlpack(values.indices)
    if len(columns) > 1:
        codes = np.unique(codes, return_inverse=True)[1].astype(np.int64)
    first = np.empty(int(codes.max(initial=-1)) + 1, dtype=np.int64)
    first[codes[::-1]] = np.arange(len(codes))[::-1]
    found = own.take(arrow(first, pa.int64()))
    order = places(found, columns)
    if order is not None:
        found = found.take(order)
        rank = np.empty(len(first), dtype=np.int64)
        rank[np.from_dlpack(order).astype(np.int64)] = np.arange(len(first))
        codes = rank[codes]
    return Levels(":".join(columns), columns, found), codes.astype(np.int32)


def places(table: pa.Table, names: Sequence[str]) -> pa.Array | None:
    """Which rows come one after the other in the order of these columns, level codes by their own; None for a type without an order."""
    import pyarrow as pa
    import pyarrow.compute as pc

    columns = [table.column(name).combine_chunks() for name in names]
    codes = [column.indices if pa.types.is_dictionary(column.type) else column for column in columns]
    proxy = pa.table({f"k{i}": code for i, code in enumerate(codes)})
    try:
        return pc.sort_indices(proxy, sort_keys=[(name, "ascending") for name in proxy.column_names])
    except (pa.ArrowNotImplementedError, pa.ArrowTypeError):
        return None
