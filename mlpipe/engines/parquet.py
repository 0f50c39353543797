"""Parquet files as DuckDB reads them: true names, types over many files, level order, rows by number."""
from __future__ import annotations

import base64
import glob
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlglot import exp

from ..errors import DataError
from .arrow import declared_levels, ordered_columns
from .base import spread
from .dialects import Convert, call, cast, render
from .files import Variant, agree, merge, refuse_case

if TYPE_CHECKING:
    import pyarrow as pa
    from duckdb import DuckDBPyConnection

LARGE = 100_000  # rows of a file from which joining files by name pays: DuckDB then knows what all footers tell of a column's range
_LEVEL_FILES, _SLICE_FILES = 16, 64
DECIMAL_DIGITS = 38  # of DuckDB's widest decimal: it reads wider ones as DOUBLE
_MAGIC = b"PAR1"
_SCHEMAS = """
    select signature, list(file_name) as files
    from (
        select file_name, list((name, type, type_length, converted_type, scale, precision, logical_type, num_children) order by column_id)
            as signature
        from {files} group by file_name
    ) group by signature
"""

_WITHOUT_NULLS = """
    select path_in_schema from {files} group by path_in_schema
    having sum(stats_null_count) = 0 and count(stats_null_count) = count(*)
"""


@dataclass(frozen=True)
class FileTable:
    """Files as one table: `from_`, the FROM item that reads them; exact `names`; `levels` and `problems` by name; `notes`.

    `rows`: their number where known; `raw`: by position, what restores a type that DuckDB does not see; `row_number`: an
    expression over the table's alias `q`, or None where only a window gives it; `sample`: a condition over `q` that keeps a
    spread part, or None where only the head is cheap; `without_nulls`: reads which columns hold no NULL, where files tell.
    """

    from_: exp.Expr
    names: tuple[str, ...]
    levels: dict[str, tuple[str, ...]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    key_problems: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    rows: int | None = None
    raw: dict[int, Convert] = field(default_factory=dict)
    row_number: exp.Expr | None = None
    sample: exp.Expr | None = None
    without_nulls: Callable[[], frozenset[str]] | None = None


def parquet_table(con: DuckDBPyConnection, files: Sequence[str], hive: bool, keys: Mapping[str, str]) -> FileTable:
    """The table of Parquet files; `keys`: types of columns that are folders.

    Raises DataError for names that differ only by case between files; duckdb errors pass.
    """
    variants, wide = _variants(con, files)
    refuse_case(variants)
    merged = merge(variants)
    key_problems = wide | merged.key_problems
    counts = dict(con.sql(render(exp.select("file_name", "num_rows").from_(_read("parquet_file_metadata", files)), "duckdb")).fetchall())
    starts = [0]
    for file in files:
        starts.append(starts[-1] + counts[file])
    together = len(variants) > 1 or (len(files) > 1 and starts[-1] >= LARGE * len(files))
    options = {"hive_partitioning": hive} | ({"union_by_name": True} if together else {}) | ({"hive_types": struct(keys)} if keys else {})
    read = _read("read_parquet", files, **options)
    bound = con.sql(render(exp.select("*").from_(read.copy()), "duckdb")).columns if hive else []
    names = (*merged.types, *bound[len(merged.types) :])
    if hive:
        check_hive(files, merged.types)
    numbered = not {"file_row_number", "file_index", "filename"} & {name.lower() for name in names}
    schemas, unread = _arrow_schemas(con, files)
    levels, notes = _levels(schemas, files)
    return FileTable(
        read, names, levels, merged.problems, key_problems, (*merged.notes, *notes, *unread), starts[-1],
        _durations(schemas, names), _row_number(starts) if numbered else None, _slices(files, starts) if numbered else None,
        partial(_without_nulls, con, files),
    )  # fmt: skip


def _without_nulls(con: DuckDBPyConnection, files: Sequence[str]) -> frozenset[str]:
    """The columns whose NULLs the footers of all files count, and find none."""
    metadata = render(_read("parquet_metadata", files), "duckdb")
    return frozenset(name for (name,) in con.sql(_WITHOUT_NULLS.format(files=metadata)).fetchall())


def refuse_other(files: Iterable[str], cause: Exception) -> None:
    """Raises DataError (code "file_format") for a file that does not begin and end as a Parquet file does."""
    for file in files:
        with open(file, "rb") as stream:
            begin, size = stream.read(4), stream.seek(0, 2)
            stream.seek(max(0, size - 4))
            end = stream.read()
        if begin != _MAGIC:
            raise DataError(f"{file} is not a Parquet file", code="file_format", hint="files are read as their suffix says") from cause
        if end != _MAGIC:
            raise DataError(f"{file} is cut off: a Parquet file ends with its footer", code="file_format", hint="write it again") from cause


def literals(files: Iterable[str]) -> exp.Expr:
    """A list of paths that DuckDB takes literally, whatever glob characters they hold."""
    return exp.Array(expressions=[exp.Literal.string(glob.escape(file)) for file in files])


def struct(values: Mapping[str, str]) -> exp.Struct:
    """Names and DuckDB types as a struct of texts."""
    return exp.Struct(
        expressions=[exp.PropertyEQ(this=exp.to_identifier(n, quoted=True), expression=exp.Literal.string(t)) for n, t in values.items()]
    )


def _read(function: str, files: Sequence[str], **options: Any) -> exp.Expr:
    given = [exp.EQ(this=exp.column(key), expression=exp.convert(value)) for key, value in options.items()]
    return call(function, literals(files), *given)


def _variants(con: DuckDBPyConnection, files: Sequence[str]) -> tuple[list[Variant], dict[str, str]]:
    """The files by schema, in the order of the first file of each; one that is listed twice counts once here. And what is wrong with keys
    that are decimals too wide for DuckDB."""
    place = {file: i for i, file in enumerate(dict.fromkeys(files))}
    rows = con.sql(_SCHEMAS.format(files=render(_read("parquet_schema", list(place)), "duckdb"))).fetchall()
    groups = [(_top_level(signature), sorted(found, key=place.__getitem__)) for signature, found in rows]
    out, wide = [], {}
    for names, found in sorted(groups, key=lambda group: place[group[1][0]]):
        for name, digits in names.items():
            if digits > DECIMAL_DIGITS:
                what = f"column {name!r} is a decimal of {digits} digits in {found[0]}"
                wide[name] = f"{what}: read as DOUBLE, its keys beyond 2^53 would fall together"
        types = con.sql(render(exp.select("*").from_(_read("read_parquet", found[:1], hive_partitioning=False)), "duckdb")).types
        out.append(Variant(tuple(found), dict(zip(names, map(str, types), strict=True))))
    return out, wide


def _top_level(signature: Sequence[Sequence[object]]) -> dict[str, int]:
    """The top-level names of a schema listed depth first, each row with its number of children, and the digits of decimals (else 0);
    repeated names get a number."""
    names: dict[str, int] = {}
    position = 1
    while position < len(signature):
        name = str(signature[position][0])
        names[name if name not in names else f"{name}_{len(names)}"] = int(str(signature[position][5] or 0))
        pending = 1
        while pending:
            pending += int(str(signature[position][7] or 0)) - 1
            position += 1
    return names


def check_hive(files: Sequence[str], names: Iterable[str]) -> None:
    """Raises DataError where DuckDB, blind to case, would put the value of a `key=value` directory in a column of the files."""
    keys = {part.partition("=")[0] for part in Path(files[0]).parent.parts if "=" in part}
    for name in names:
        if name not in keys and name.lower() in {key.lower() for key in keys}:
            raise DataError(f"column {name!r} and a key of the directories differ only by case", code="column_case", column=name)


def _row_number(starts: Sequence[int]) -> exp.Expr:
    own = exp.column("file_row_number", "q")
    if len(starts) == 2:
        return own
    first = call("list_value", *(cast(exp.Literal.number(start), "BIGINT") for start in starts[:-1]))
    place = exp.Add(this=cast(exp.column("file_index", "q"), "BIGINT"), expression=exp.Literal.number(1))
    return exp.Add(this=call("list_extract", first, place), expression=own)


def _slices(files: Sequence[str], starts: Sequence[int]) -> exp.Expr | None:
    """Slices of rows evenly spread over all files. The ranges alone let DuckDB skip row groups, the names skip files."""
    if len(slices := spread(starts[-1])) == 1:
        return None
    parts = [part for start, stop in slices for part in _parts(starts, start, stop)]
    ranges = exp.or_(*(_between(low, high) for _, low, high in parts))
    if len(files) == 1:
        return ranges
    names = exp.In(
        this=exp.column("filename", "q"), expressions=[exp.Literal.string(files[i]) for i in dict.fromkeys(i for i, _, _ in parts)]
    )
    exact = exp.or_(
        *(exp.and_(exp.column("file_index", "q").eq(exp.Literal.number(i)), _between(low, high)) for i, low, high in parts)
    )
    return exp.and_(ranges, names, exact)


def _between(low: int, high: int) -> exp.Expr:
    return exp.Between(
        this=exp.column("file_row_number", "q"), low=exp.Literal.number(low), high=exp.Literal.number(high - 1)
    )


def _parts(starts: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """The rows [start, stop) as (file, low, high) with rows counted within each file; of a slice the first 64 files."""
    first = bisect_right(starts, start) - 1
    for i in range(first, min(first + _SLICE_FILES, len(starts) - 1)):
        low, high = max(start, starts[i]) - starts[i], min(stop, starts[i + 1]) - starts[i]
        if high > low:
            yield i, low, high
        if starts[i + 1] >= stop:
            return


def _arrow_schemas(con: DuckDBPyConnection, files: Sequence[str]) -> tuple[list[pa.Schema], tuple[str, ...]]:
    """The different Arrow schemas in the footers, and a note where there is one that this version of Arrow does not know."""
    import pyarrow as pa

    query = exp.select("value").distinct().from_(_read("parquet_kv_metadata", files)).where("key = 'ARROW:schema'::BLOB", dialect="duckdb")
    schemas: list[pa.Schema] = []
    notes: dict[str, None] = {}
    for (value,) in con.sql(render(query, "duckdb")).fetchall():
        try:
            schemas.append(pa.ipc.read_schema(pa.py_buffer(base64.b64decode(value))))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:  # Polars' integers of 128 bits
            notes[f"orders of levels and durations that the files' Arrow schema declares are not known: {error}"] = None
    return schemas, tuple(notes)


def _durations(schemas: Iterable[pa.Schema], names: Sequence[str]) -> dict[int, Convert]:
    """Parquet has no durations: Arrow writes them as integers, in the unit that its own schema tells."""
    import pyarrow as pa

    units = {field.name: field.type.unit for schema in schemas for field in schema if pa.types.is_duration(field.type)}
    return {names.index(name): _interval(unit) for name, unit in units.items() if name in names}


def _interval(unit: str) -> Convert:
    if unit == "ns":
        return lambda column: call("to_microseconds", exp.IntDiv(this=column, expression=exp.Literal.number(1000)))
    factor = {"us": 1, "ms": 1000, "s": 1_000_000}[unit]
    return lambda column: call("to_microseconds", exp.Mul(this=column, expression=exp.Literal.number(factor)))


def _levels(schemas: Iterable[pa.Schema], files: Sequence[str]) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """The level order that Arrow schemas of the files declare, and a note for each column whose files disagree."""
    found: dict[str, list[tuple[str, ...] | None]] = {}
    ordered: set[str] = set()
    for schema in schemas:
        for arrow_field in schema:
            if (levels := declared_levels(arrow_field, None)) is not None:
                found.setdefault(arrow_field.name, []).append(levels)
        ordered |= {name for name in ordered_columns(schema) if name not in found}
    for name in ordered:
        found[name] = [declared_levels(*pair) for pair in _dictionaries(files, name)]
    agreed = {name: agree(orders) for name, orders in found.items()}
    notes = tuple(f"column {n!r}: the files declare different orders of levels, none is used" for n in agreed if agreed[n] is None)
    return {name: levels for name, levels in agreed.items() if levels is not None}, notes


def _dictionaries(files: Sequence[str], name: str) -> Iterator[tuple[pa.Field, pa.Array]]:
    """The dictionaries of an ordered column, which the footer does not hold: from the first row group of up to 16 files."""
    import pyarrow.parquet as pq

    for start, _ in spread(len(files), _LEVEL_FILES, 1) if len(files) > _LEVEL_FILES else [(i, i) for i in range(len(files))]:
        with pq.ParquetFile(files[start]) as file:
            if name in file.schema_arrow.names and file.num_row_groups:
                column = file.read_row_group(0, columns=[name]).column(name)
                yield file.schema_arrow.field(name), column.chunk(0).dictionary
