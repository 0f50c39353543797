"""Polars: DataFrames and LazyFrames through their own SQL, streaming. Positions, not names, select the columns."""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from traceback import walk_tb
from typing import TYPE_CHECKING, NamedTuple

import polars as pl
from polars.exceptions import PanicException, PolarsError

from ..errors import DataError, MlpipeError, ResourceError
from .base import BATCH_ROWS, SAMPLE_SLICES, SLICE_ROWS, Columns, ColumnType, Identity, Kind, buffered, fingerprint, noted
from .dialects import render

if TYPE_CHECKING:
    import pyarrow as pa
    from sqlglot import exp

_SAMPLE_ROWS = SAMPLE_SLICES * SLICE_ROWS
_KEY_SHARE = 64
_UNITS = {"date": pl.Date, "timestamp": pl.Datetime, "duration": pl.Duration, "time": pl.Time}
_PER_SECOND = {"ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
_EXPORTED: dict[object, pl.DataType] = {
    pl.Int128: pl.Decimal(38, 0), pl.UInt128: pl.Decimal(38, 0), pl.Float16: pl.Float32()
}  # fmt: skip
_FAILURES = (PolarsError, PanicException, OSError, MemoryError)


class PolarsEngine:
    """The Engine over a frame. Raises DataError where the schema of a LazyFrame cannot be found."""

    dialect, spills = "polars", False

    def __init__(self, frame: pl.DataFrame | pl.LazyFrame) -> None:
        self._frame = frame
        self.ran: list[str] = []
        self._lazy = frame.lazy()
        with translating():
            self._schema = self._lazy.collect_schema()
        if not self._schema:
            raise DataError("the source has no columns", code="no_columns")

    def schema(self) -> dict[str, ColumnType]:
        """Exact names and types, in the frame's order."""
        return {name: _column_type(dtype) for name, dtype in self._schema.items()}

    def identity(self) -> Identity:
        """The fingerprint is of schema and height (DataFrame), or of schema and plan (LazyFrame)."""
        if isinstance(self._frame, pl.DataFrame):
            return Identity(fingerprint(self._schema, self._frame.height), True, True, int(self._frame.estimated_size()))
        return Identity(fingerprint(self._schema, self._lazy.explain(optimized=False)), True, True)

    def row_count(self) -> int | None:
        """The height of a DataFrame; None for a LazyFrame."""
        return self._frame.height if isinstance(self._frame, pl.DataFrame) else None

    def without_nulls(self, positions: Iterable[int]) -> bool:
        """Of a DataFrame, which counts them."""
        frame = self._frame
        return isinstance(frame, pl.DataFrame) and not any(frame.to_series(i).null_count() for i in positions)

    def table_room(self) -> int | None:
        """Polars does not spill."""
        return None

    def key_ranges(self, statement: exp.Query, columns: Columns, key: int, rows: int) -> list[tuple[int, int]]:
        """Polars has no tables of this kind."""
        return []

    def key_count(self, keys: Sequence[int]) -> int:
        """See Engine. From those keys whose hash is a multiple of _KEY_SHARE, so that few are held."""
        hashed = self._lazy.select(pl.struct(pl.nth(i).alias(f"k{i}") for i in keys).hash().alias("hash"))
        kept = hashed.filter(pl.col("hash") % _KEY_SHARE == 0).unique().select(pl.len())
        with translating():
            return int(kept.collect(engine="streaming").item()) * _KEY_SHARE

    def check_columns(self, columns: Columns) -> None:
        """A frame has one schema: every column can be read."""

    def check_unchanged(self) -> None:
        """A DataFrame cannot change under us; what a LazyFrame scans is not known here, so its row counts tell."""

    def query(self, statement: exp.Query, columns: Columns, *, sample: bool = False) -> pa.RecordBatchReader:
        """See Engine. Results beyond 32 MB stream."""
        sql = render(statement, "polars")
        noted(self.ran, sql)
        with translating():
            with pl.SQLContext({"src": self._source(columns, sample)}, eager=False) as context:
                result = _exportable(context.execute(sql))
            empty = pl.DataFrame(schema=result.collect_schema())
        return buffered(_table(empty).schema, _batches(result))

    def cancel(self) -> None:
        """Polars has no way to stop a query from another thread; Ctrl-C stops the one that waits."""

    def progress(self) -> float | None:
        """Not known."""
        return None

    def close(self) -> None:
        """Nothing is held but the user's frame."""

    def _source(self, columns: Columns, sample: bool) -> pl.LazyFrame:
        types = list(self._schema.items())
        chosen = [_value(i, *types[i]).alias(f"c{i}") for i in sorted(columns.values)]
        chosen += [pl.nth(i).alias(f"k{i}") for i in sorted(columns.keys)]
        chosen += [pl.nth(i).alias(f"r{i}") for i in range(len(types))] if columns.everything else []
        out = self._lazy.select(*(chosen or [pl.nth(0).is_null().or_(True).alias("present")]))
        if columns.row_number:
            out = out.with_row_index("rn").select(pl.all().exclude("rn"), pl.col("rn").cast(pl.Int64))
        if not sample:
            return out
        if isinstance(self._frame, pl.LazyFrame):
            return out.head(_SAMPLE_ROWS)
        return out.gather_every(max(1, -(-self._frame.height // _SAMPLE_ROWS)))


class _Converted(NamedTuple):
    kind: Kind
    per_unit: int


def _converted(dtype: pl.DataType) -> _Converted:
    """The kind of covariate a type gives, and its physical units per day or second."""
    if isinstance(dtype, pl.Datetime | pl.Duration):
        return _Converted("number", _PER_SECOND[dtype.time_unit])
    if isinstance(dtype, pl.Time):
        return _Converted("number", _PER_SECOND["ns"])
    if dtype.is_numeric() or isinstance(dtype, pl.Date | pl.Null):
        return _Converted("number", 1)
    if isinstance(dtype, pl.String | pl.Categorical | pl.Enum):
        return _Converted("text", 1)
    return _Converted("logical" if isinstance(dtype, pl.Boolean) else "other", 1)


def _column_type(dtype: pl.DataType) -> ColumnType:
    levels = tuple(dtype.categories) if isinstance(dtype, pl.Enum) else None
    unit = next((name for name, kind in _UNITS.items() if isinstance(dtype, kind)), "")
    return ColumnType(_converted(dtype).kind, str(dtype), levels, dtype.is_integer(), untyped=dtype == pl.Null, unit=unit)


def _value(i: int, name: str, dtype: pl.DataType) -> pl.Expr:
    kind, per_unit = _converted(dtype)
    if kind == "other":
        raise DataError(f"column {name!r} has type {dtype}, which cannot be a covariate", code="column_type", column=name)
    if kind == "logical" or dtype == pl.Null:
        return pl.nth(i)
    if kind == "text":
        return pl.nth(i).cast(pl.String)
    column = pl.nth(i).to_physical() if dtype.is_temporal() else pl.nth(i)
    if per_unit == 1:
        return column.cast(pl.Float64)
    # whole and fraction apart: Polars divides by a constant as it multiplies by the reciprocal, off in the last digit
    return (column // per_unit).cast(pl.Float64) + (column % per_unit).cast(pl.Float64) / float(per_unit)


def _exportable(result: pl.LazyFrame) -> pl.LazyFrame:
    """128-bit integers, which Arrow does not have, as the decimals that DuckDB makes of its own; numbers of half precision, which DuckDB
    does not have, as single ones."""
    dtypes = result.collect_schema().dtypes()
    casts = [pl.nth(i).cast(_EXPORTED[dtype]) for i, dtype in enumerate(dtypes) if dtype in _EXPORTED]
    return result.with_columns(casts) if casts else result


def _table(frame: pl.DataFrame) -> pa.Table:
    # the newest layout has string views, which parts of pyarrow cannot work on
    return frame.to_arrow(compat_level=pl.CompatLevel.oldest())


def _batches(result: pl.LazyFrame) -> Iterator[pa.RecordBatch]:
    with translating():
        for frame in result.collect_batches(chunk_size=BATCH_ROWS, maintain_order=True, engine="streaming"):
            yield from _table(frame).to_batches()


@contextmanager
def translating() -> Iterator[None]:
    """Errors of Polars become ours, and so do those of a user's functions in a LazyFrame, which Polars passes on as they are."""
    try:
        yield
    except MlpipeError:
        raise
    except _FAILURES as error:
        raise explained(error) from error
    except Exception as error:
        name = _function(error)
        if name is None:  # a mistake of ours
            raise
        said = " ".join(str(error).split("\n\nThis error occurred")[0].split())[:300]
        message = f"the function {name} in the LazyFrame failed: {type(error).__name__}: {said}"
        raise DataError(message, code="user_function", hint="see the traceback of the cause") from error


def _function(error: BaseException) -> str | None:
    """The function that Polars called when it failed: the first on the way that is neither Polars' nor ours."""
    own = (__name__.partition(".")[0], "polars", "contextlib")
    for frame, line in walk_tb(error.__traceback__):
        if str(frame.f_globals.get("__name__", "")).partition(".")[0] not in own:
            return f"{frame.f_code.co_name} ({frame.f_code.co_filename}, line {line})"
    return None


def explained(error: BaseException) -> MlpipeError:
    """The error that users see for one of Polars': ResourceError for memory and disk, else DataError."""
    message = " ".join(str(error).split("\n\n")[0].split())[:300]
    if isinstance(error, FileNotFoundError):
        return DataError(message, code="file_not_found")
    if isinstance(error, PolarsError):
        return DataError(message, code="engine_refused")
    return ResourceError(message or "out of memory", code="out_of_memory" if isinstance(error, MemoryError) else "engine")
