"""Arrow columns as numpy arrays, and back, without the detour that imports pandas where it is installed (0.2 s)."""
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa


def column(table: pa.Table | pa.RecordBatch, name: str) -> np.ndarray:
    """A numeric column (n,) without nulls; of a batch it is a view."""
    data = table.column(name)
    chunks = data.chunks if hasattr(data, "chunks") else [data]
    parts = [np.from_dlpack(chunk) for chunk in chunks if len(chunk)]
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.zeros(0)


def arrow(values: np.ndarray, kind: pa.DataType | None = None) -> pa.Array:
    """Numbers (n,) as an Arrow array of this type (DOUBLE if None), over the same memory where that is contiguous."""
    import pyarrow as pa

    data = np.ascontiguousarray(values)
    return pa.Array.from_buffers(kind or pa.float64(), len(data), [None, pa.py_buffer(data)])


def doubles(values: pa.Array) -> np.ndarray:
    """Doubles (n,) with nulls as NaN; of nothing but nulls where there is no type."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_null(values.type):
        return np.full(len(values), np.nan)
    return np.from_dlpack(pc.fill_null(values, float("nan")) if values.null_count else values)


def plain_interval(values: pa.Array) -> pa.Array:
    """DuckDB's intervals as durations in microseconds, a month being 30 days as where DuckDB compares them; other values as they are.

    What were durations in Arrow and Polars become ones again, and neither Parquet nor Arrow's own functions take intervals.
    """
    import pyarrow as pa

    if values.type != pa.month_day_nano_interval():
        return values
    parts = np.dtype([("months", "<i4"), ("days", "<i4"), ("nanos", "<i8")])
    held = np.frombuffer(values.buffers()[1], parts, len(values), values.offset * parts.itemsize)
    micros = (held["months"].astype(np.int64) * 30 + held["days"]) * 86_400_000_000 + held["nanos"] // 1_000
    return arrow(micros, pa.duration("us"))


def in_type(values: pa.ChunkedArray, kind: pa.DataType, levels: Sequence[str] | None = None) -> pa.ChunkedArray:
    """Values in another Arrow type; as they are where Arrow does not convert them. `levels`: the order of a dictionary's values."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if values.type == kind:
        return values
    try:
        if not pa.types.is_dictionary(kind):
            return values.cast(kind)
        plain = values.cast(kind.value_type).combine_chunks()
        order = pa.array(levels, kind.value_type) if levels is not None else plain.unique()
        codes = pc.index_in(plain, value_set=order).cast(kind.index_type)
        return pa.chunked_array([pa.DictionaryArray.from_arrays(codes, order, ordered=kind.ordered)])
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        return values
