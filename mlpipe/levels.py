"""Levels of grouping factors as whole numbers: keys of any type, in one column or several."""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np


if TYPE_CHECKING:
    import pyarrow as pa

SPAN = 1 << 26  # of whole-number keys, up to which codes are looked up in a table


class Index:
    """The place of each value among sorted distinct ones; -1 for null and unknown values."""

    def __init__(self, values: pa.Array) -> None:
        import pyarrow as pa

        self.values, self.table, self.first = values, None, 0
        self.whole = pa.types.is_integer(values.type) and not pa.types.is_uint64(values.type)
        if self.whole and len(values):
            plain = np.from_dlpack(values).astype(np.int64)
            self.first, span = int(plain.min()), int(plain.max()) - int(plain.min()) + 1
            self.whole = span <= SPAN
            if self.whole:
                self.table = np.full(span, -1, dtype=np.int64)
                self.table[plain - self.first] = np.arange(len(plain))

    def codes(self, values: pa.Array) -> np.ndarray:
        """The codes (n,) of values."""
        import pyarrow as pa

        if self.table is not None and pa.types.is_integer(values.type) and values.null_count == 0:
            at = np.from_dlpack(values).astype(np.int64) - self.first
            inside = (at >= 0) & (at < len(self.table))
            return np.where(inside, self.table[np.where(inside, at, 0)], -1)
        import pyarrow.compute as pc

        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        if values.type != self.values.type:
            values = values.cast(self.values.type, safe=False)
        found = pc.index_in(values, value_set=self.values)
        return np.from_dlpack(pc.fill_null(found, -1)).astype(np.int64)


@dataclass
class Levels:
    """The levels of one factor: `group`, its label; `columns`, its key columns; `keys`, one row a level, sorted."""

    group: str
    columns: tuple[str, ...]
    keys: pa.Table

    def __post_init__(self) -> None:
        self.indices = [Index(_distinct(self.keys.column(i))) for i in range(self.keys.num_columns)]
        self.sizes = [len(index.values) for index in self.indices]
        # the engine's order of the keys (an enum's own, say) need not be that of the values
        combined = self._combined([self.keys.column(i).combine_chunks() for i in range(self.keys.num_columns)])
        self.order = np.argsort(combined, kind="stable")
        self.combined = combined[self.order]

    def __len__(self) -> int:
        return len(self.keys)

    def _combined(self, values: list[Any]) -> np.ndarray:
        out = self.indices[0].codes(values[0])
        bad = out < 0
        for index, size, more in zip(self.indices[1:], self.sizes[1:], values[1:], strict=True):
            code = index.codes(more)
            bad |= code < 0
            out = out * size + code
        return np.where(bad, -1, out)

    def codes(self, values: list[Any]) -> np.ndarray:
        """The level (n,) of each row from its key columns; -1 for one that is not known."""
        if len(self.indices) == 1:
            code = self.indices[0].codes(values[0])
            return np.where(code >= 0, self.order[code], -1)
        combined = self._combined(values)
        at = np.minimum(np.searchsorted(self.combined, combined), len(self.combined) - 1)
        return np.where(self.combined[at] == combined, self.order[at], -1)


def _distinct(values: pa.ChunkedArray) -> pa.Array:
    """Sorted distinct values, in the type they have when they stand for themselves."""
    import pyarrow as pa

    array = values.combine_chunks()
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_integer(array.type) and array.null_count == 0 and len(array) and not pa.types.is_uint64(array.type):
        plain = np.from_dlpack(array)
        if (plain[1:] > plain[:-1]).all():
            return array
    import pyarrow.compute as pc

    found = pc.unique(array)
    return found.take(pc.sort_indices(found))


