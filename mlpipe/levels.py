"""Levels of grouping factors as whole numbers: keys of any type, in one column or several."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .arrays import arrow, plain_interval
from .errors import DataError
from .places import Known, Places

if TYPE_CHECKING:
    import pyarrow as pa

DIGITS = 20  # of the largest whole number of 64 bits


class Index:
    """The place of each value among the distinct ones of a key column `name`; -1 for null and unknown values."""

    def __init__(self, name: str, values: pa.Array) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        self.name, self.values = name, pc.unique(_bare(values))
        self.whole = _signed(self.values.type)  # then of any width
        self.known = Known(self.values.cast(pa.int64()) if self.whole else self.values)

    def codes(self, values: pa.Array) -> np.ndarray:
        """The codes (n,) of values. Raises DataError for a type that cannot hold the same values."""
        import pyarrow as pa

        values = _bare(values)
        if not (self.whole and _signed(values.type)):
            values = self._alike(values)
        return self.known.find(values.cast(pa.int64()) if self.whole else values)

    def _alike(self, values: pa.Array) -> pa.Array:
        """The values in the type of the known ones; null where that type cannot hold them."""
        import pyarrow as pa
        import pyarrow.compute as pc

        kind, known = values.type, self.values.type
        if kind == known:
            return values
        if pa.types.is_null(kind):
            return pa.nulls(len(values), known)
        try:
            if pa.types.is_temporal(kind) != pa.types.is_temporal(known):
                raise pa.ArrowNotImplementedError("Arrow takes numbers for times in whatever unit the type has")
            exact = pa.decimal256(DIGITS)
            if pa.types.is_integer(kind) and (pa.types.is_decimal(known) or pa.types.is_uint64(known) != pa.types.is_uint64(kind)):
                values = values.cast(exact)  # the unsigned wrap round there and back
            cast = _cast(values, known)
            back = exact if pa.types.is_integer(known) and pa.types.is_decimal(values.type) else values.type
            return pc.if_else(pc.equal(_cast(cast, back), values), cast, None)
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
        columns = [self.keys.column(i).combine_chunks() for i in range(self.keys.num_columns)]
        self.indices = [Index(name, values) for name, values in zip(self.keys.column_names, columns, strict=True)]
        # column by column, each with the places of the combinations that occur: those of many columns stay numbers of 64 bits
        self.steps: list[tuple[Index, int, Places]] = []
        code = self.indices[0].codes(columns[0])
        for index, values in zip(self.indices[1:], columns[1:], strict=True):
            size = len(index.values)
            combined = code * size + index.codes(values)
            last = index is self.indices[-1]  # all differ, and the place is the level's
            places = Places(combined if last else np.unique(combined))
            code = places.find(combined)
            self.steps.append((index, size, places))

    def __len__(self) -> int:
        return len(self.keys)

    def codes(self, values: list[Any]) -> np.ndarray:
        """The level (n,) of each row from its key columns; -1 for one that is not known."""
        out = self.indices[0].codes(values[0])
        for (index, size, places), more in zip(self.steps, values[1:], strict=True):
            code = index.codes(more)
            bad = (out < 0) | (code < 0)
            out = places.find(np.where(bad, -1, out * size + code))
        return out


def union(a: Levels, b: Levels) -> tuple[Levels, np.ndarray, np.ndarray]:
    """The levels of both in the order of their keys, and the places (m,) there of those of each.

    Raises DataError where the keys are of types that cannot be compared.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    both, bare = stacked(a.keys, b.keys, a.group)
    names = bare.column_names
    numbered = bare.append_column("row", pa.array(np.arange(len(bare))))
    first = numbered.group_by(names, use_threads=False).aggregate([("row", "min")]).column("row_min")
    order = pc.sort_indices(bare.take(first), sort_keys=[(name, "ascending") for name in names])
    levels = Levels(a.group, a.columns, both.take(first.take(order)).rename_columns(list(a.columns)))
    codes = levels.codes([keys.combine_chunks() for keys in both.columns])
    return levels, codes[: len(a)], codes[len(a) :]


def stacked(a: pa.Table, b: pa.Table, group: str) -> tuple[pa.Table, pa.Table]:
    """The keys of both, one under the other, as they are and as values that can be compared; columns are named by their place.

    Raises DataError where they are of types that cannot be compared.
    """
    import pyarrow as pa

    names = [f"k{i}" for i in range(a.num_columns)]
    try:
        parts = [_plain(keys.rename_columns(names), other) for keys, other in ((a, b), (b, a))]
        both = pa.concat_tables(parts, promote_options="permissive").combine_chunks()
        return both, pa.table([_bare(keys.combine_chunks()) for keys in both.columns], names=names)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        raise DataError(f"the keys of {group} in the statistics have different types", code="not_mergeable") from error


def _plain(keys: pa.Table, other: pa.Table) -> pa.Table:
    """The keys, dictionaries that differ from the other's type replaced by their values."""
    import pyarrow as pa

    out = []
    for column, theirs in zip(keys.columns, other.columns, strict=True):
        decode = pa.types.is_dictionary(column.type) and (column.type != theirs.type or not column.type.ordered)
        out.append(column.cast(column.type.value_type) if decode else column)
    return pa.table(out, names=keys.column_names)


def _cast(values: pa.Array, kind: pa.DataType) -> pa.Array:
    """The values in another type, whatever those that it cannot hold; decimals as the nearest doubles, which Arrow's products are not."""
    import pyarrow as pa

    if pa.types.is_decimal(values.type) and pa.types.is_floating(kind):
        values = values.cast(pa.string())
    return values.cast(kind, safe=False)


def _signed(kind: pa.DataType) -> bool:
    """Whether all values of a type are 64-bit integers with a sign."""
    import pyarrow as pa

    return bool(pa.types.is_integer(kind) and not pa.types.is_uint64(kind))


def _bare(values: pa.Array) -> pa.Array:
    """Values that stand for themselves: out of dictionaries and extensions, intervals as durations, and zero without its sign."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_string_view(values.type):
        values = values.cast(pa.large_string())
    values = plain_interval(values)
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
