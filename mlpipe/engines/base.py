"""The protocol every engine follows, and what the engines share.

A statement never sees the names of the source: it reads a table `src` whose columns are named by position (`c3`, `k3`,
`r3`), so an engine's own rules for names (case-blind, regular expressions) cannot pick the wrong column.
"""
from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import pyarrow as pa
    from sqlglot import exp

Kind = Literal["number", "logical", "text", "other"]

SAMPLE_SLICES, SLICE_ROWS = 8, 2_048
BATCH_ROWS = 65_536
BUFFER_BYTES = 32_000_000
MOST_SQL = 200_000  # characters of the statements that are noted


@dataclass(frozen=True)
class ColumnType:
    """The type of a source's column.

    `kind`: what a covariate of this type becomes, "other" (lists, structs, binary) for what cannot be one; `name`: the
    engine's own name of the type, for messages; `levels`: the order the type declares (Polars Enum, DuckDB ENUM, ordered
    Arrow or pandas dictionary, the Arrow schema in a Parquet footer), else None; `exact_integer`: integers, whose values
    beyond 2⁵³ lose digits as DOUBLE; `own`: the column's Arrow type where the source has one, which results of queries need not have;
    `untyped`: a column of nothing but nulls that was written without a type; `unit`: what a time becomes a number of ("date" days,
    "timestamp" and "duration" and "time" seconds), "" for all else.
    """

    kind: Kind
    name: str
    levels: tuple[str, ...] | None = None
    exact_integer: bool = False
    own: pa.DataType | None = None
    untyped: bool = False
    unit: str = ""


@dataclass(frozen=True)
class Columns:
    """What the table `src` offers to a statement; `i` is a position in the schema.

    `values`: `c{i}`, DOUBLE for numbers (dates as days, timestamps and durations as seconds, since 1970-01-01 UTC),
    BOOLEAN for logicals, VARCHAR for text; `keys`: `k{i}`, the source's own type, unchanged; `everything`: `r{i}` for all
    columns, unchanged; `row_number`: `rn`, BIGINT from 0 in the source's own order. Where none is asked for, one column
    `present` stands in, so that rows can be counted.
    """

    values: frozenset[int] = frozenset()
    keys: frozenset[int] = frozenset()
    everything: bool = False
    row_number: bool = False


@dataclass(frozen=True)
class Identity:
    """What a source is: `fingerprint` (equal for unchanged data), `rescannable` (it can be opened again), `ordered` (rows
    have an order of their own), `bytes` (None where unknown), `files`, and `notes` on how it is read, for `fit.info`."""

    fingerprint: str
    rescannable: bool
    ordered: bool
    bytes: int | None = None
    files: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Engine(Protocol):
    """Runs statements over one source. Errors of the engine surface as DataError or ResourceError, theirs being the cause."""

    dialect: str
    spills: bool  # what exceeds the memory limit goes to disk
    ran: list[str]  # the statements that it was handed, in their order, each once: see `noted`

    def schema(self) -> dict[str, ColumnType]:
        """Exact names and types, in the source's order."""

    def identity(self) -> Identity:
        """See Identity."""

    def query(self, statement: exp.Query, columns: Columns, *, sample: bool = False) -> pa.RecordBatchReader:
        """The rows of a statement over `src`, in its order where the statement neither joins nor groups. `sample`: `src` is a small,
        cheap, deterministic part from all over."""

    def row_count(self) -> int | None:
        """The number of rows where it is known without a scan."""

    def without_nulls(self, positions: Iterable[int]) -> bool:
        """Whether it is known without a scan that these columns hold no NULL."""

    def table_room(self) -> int | None:
        """Bytes that the table of a grouped aggregate may take before the engine spills; None where it does not."""

    def key_ranges(self, statement: exp.Query, columns: Columns, key: int, rows: int) -> list[tuple[int, int]]:
        """Ranges of the whole-number column at `key`, from the least value to the greatest, each so narrow that the aggregate of
        `rows` rows that a statement groups by it takes a table addressed by the key, which fits the engine's memory; none where the
        engine has no such tables, does not know the values without a scan, or would fill few of the slots."""

    def key_count(self, keys: Sequence[int]) -> int:
        """About how many distinct keys the columns at `keys` hold, from a scan of these columns."""

    def check_columns(self, columns: Columns) -> None:
        """Raises DataError for a column whose files disagree: no lossless common type, absent from some, or, for a key, of a
        common type in which different keys can become equal."""

    def check_unchanged(self) -> None:
        """Raises DataError (code "source_changed") when the source is not what it was at open, as far as can be seen."""

    def cancel(self) -> None:
        """Stop what runs, from another thread."""

    def progress(self) -> float | None:
        """The part done of what runs, 0 to 1, where the engine knows."""

    def close(self) -> None:
        """Release connections and temporary files; may be called again."""


def noted(ran: list[str], sql: str) -> None:
    """Adds a statement to those that ran, unless it is among them or there are MOST_SQL characters of them."""
    if sql not in ran and len(sql) + sum(map(len, ran)) <= MOST_SQL:
        ran.append(sql)


def fingerprint(*parts: object) -> str:
    """A 128-bit hexadecimal digest of the parts."""
    return hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=16).hexdigest()


def spread(total: int, slices: int = SAMPLE_SLICES, length: int = SLICE_ROWS) -> list[tuple[int, int]]:
    """Up to `slices` ranges (start, stop) of `length` rows, evenly spaced over `total` rows from the first to the last."""
    if total <= slices * length:
        return [(0, total)]
    return [(start, start + length) for start in (i * (total - length) // (slices - 1) for i in range(slices))]


def buffered(schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> pa.RecordBatchReader:
    """A reader over batches, read ahead up to BUFFER_BYTES: of a small result nothing stays open once this returns."""
    import pyarrow as pa

    ahead: list[pa.RecordBatch] = []
    size = 0
    for batch in batches:
        ahead.append(batch)
        size += batch.nbytes
        if size > BUFFER_BYTES:
            return pa.RecordBatchReader.from_batches(schema, _chain(ahead, batches))
    return pa.RecordBatchReader.from_batches(schema, ahead)


def _chain(ahead: list[pa.RecordBatch], batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    while ahead:
        yield ahead.pop(0)
    yield from batches
