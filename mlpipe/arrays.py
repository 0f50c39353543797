"""Arrow columns as numpy arrays, and back, without the detour that imports pandas where it is installed (0.2 s)."""
from __future__ import annotations

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
