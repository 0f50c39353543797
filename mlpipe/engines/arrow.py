"""Arrow data: the order of levels a schema declares, datasets of files, one-shot streams spooled to disk."""
from __future__ import annotations

import datetime as dt
import os
import re
from collections.abc import Collection, Container, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import DataError, ResourceError
from .base import BATCH_ROWS
from .files import Merged, Variant, hive_values, merge

if TYPE_CHECKING:
    import pyarrow as pa

    from .files import Workspace

_POLARS_ENUM = b"_PL_ENUM_VALUES2"


def declared_levels(field: pa.Field, dictionary: pa.Array | None) -> tuple[str, ...] | None:
    """The order of levels that a field declares: a Polars Enum by its metadata, an ordered dictionary of text by its values."""
    import pyarrow as pa

    if field.metadata and _POLARS_ENUM in field.metadata:
        return _enum_values(field.metadata[_POLARS_ENUM])
    if dictionary is None or not pa.types.is_dictionary(field.type) or not field.type.ordered or not is_text(field.type.value_type):
        return None
    return tuple(value for value in dictionary.to_pylist() if value is not None)


def _enum_values(text: bytes) -> tuple[str, ...]:
    """Polars writes `<bytes>;<value>` for each category, one after the other."""
    values = []
    while text:
        length, _, rest = text.partition(b";")
        values.append(rest[: int(length)].decode())
        text = rest[int(length) :]
    return tuple(values)


def is_text(data_type: pa.DataType) -> bool:
    """Whether an Arrow type is one of the string types."""
    import pyarrow as pa

    return bool(pa.types.is_string(data_type) or pa.types.is_large_string(data_type) or pa.types.is_string_view(data_type))


def ordered_columns(schema: pa.Schema) -> list[str]:
    """The names of the columns that are ordered dictionaries."""
    import pyarrow as pa

    return [field.name for field in schema if pa.types.is_dictionary(field.type) and field.type.ordered]


def ordered_head(data: Any, problems: Container[str]) -> pa.RecordBatch | None:
    """The first row of the ordered dictionaries of a table or dataset, but for those with a problem, which is told when they are used.

    Raises DataError where the files of a dataset do not hold them as its schema says.
    """
    import pyarrow as pa

    ordered = [name for name in ordered_columns(data.schema) if name not in problems]
    if not ordered:
        return None
    try:
        head = data.slice(0, 1).select(ordered) if isinstance(data, pa.Table) else data.head(1, columns=ordered)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"the columns {', '.join(map(repr, ordered))} cannot be read from {', '.join(data.files[:3])} by the dataset's schema: {error}",
            code="column_files", column=ordered[0], hint="write the files with one schema",
        ) from error  # fmt: skip
    return next(iter(head.to_batches()), None)


def levels_of(schema: pa.Schema, first: pa.RecordBatch | None) -> dict[str, tuple[str, ...]]:
    """The declared orders of levels by column name; ordered dictionaries are read from the first batch."""
    found = {}
    for field in schema:
        held = first.column(field.name) if first is not None and field.name in first.schema.names else None
        levels = declared_levels(field, getattr(held, "dictionary", None))
        if levels is not None:
            found[field.name] = levels
    return found


def _readable(schema: pa.Schema) -> pa.Schema:
    """The schema with numbers of half precision, which DuckDB does not have, as single ones. Raises DataError for two columns of one name
    and for types that no engine reads."""
    import pyarrow as pa

    for i, field in enumerate(schema):
        if schema.names.count(field.name) > 1:
            raise DataError(f"two columns are called {field.name!r}", code="column_repeated", column=field.name)
        if pa.types.is_decimal256(field.type):
            raise DataError(f"column {field.name!r} has type {field.type}", code="column_type", column=field.name, hint="cast it first")
        if pa.types.is_float16(field.type):
            schema = schema.set(i, field.with_type(pa.float32()))
    return schema


def in_memory(data: Any) -> pa.Table | None:
    """Data that lies in memory (pyarrow, pandas, narwhals) as an Arrow table; None for other objects. Raises DataError."""
    import pyarrow as pa

    package = type(data).__module__.partition(".")[0]
    try:
        if isinstance(data, pa.RecordBatch):
            return pa.Table.from_batches([data])
        if package == "pandas" and hasattr(data, "columns"):
            return pa.Table.from_pandas(data, preserve_index=False)
        return data if isinstance(data, pa.Table) else pa.table(data) if package == "narwhals" else None
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise DataError(f"the {type(data).__name__} cannot become an Arrow table: {error}", code="arrow") from error


def spool(data: Any, path: str) -> tuple[pa.Table, pa.Schema, dict[str, tuple[str, ...]], bool]:
    """A stream (anything with `__arrow_c_stream__`) written to an Arrow file and mapped into memory, its own schema, the levels it
    declares, and whether the object gives another stream. Raises DataError when the stream fails, ResourceError when the disk does."""
    import pyarrow as pa

    try:
        reader = pa.RecordBatchReader.from_stream(data)
        again = not isinstance(data, pa.RecordBatchReader) and _streams_again(data)
        levels = _write(reader, path)
        return pa.ipc.open_file(pa.memory_map(path)).read_all(), _readable(reader.schema), levels, again
    except OSError as error:
        raise ResourceError(f"the stream could not be spooled to {path}: {error}", code="spool") from error
    except DataError:
        raise
    except Exception as error:  # whatever the object's own code raises
        raise DataError(f"the Arrow stream of {type(data).__name__} failed: {error}", code="arrow") from error


def _streams_again(data: Any) -> bool:
    import pyarrow as pa

    try:
        return pa.RecordBatchReader.from_stream(data) is not None
    except Exception:  # whatever a foreign object raises means no
        return False


def _write(reader: pa.RecordBatchReader, path: str) -> dict[str, tuple[str, ...]]:
    """Dictionaries are written as plain values: the file format has no room for one that changes between batches."""
    import pyarrow as pa

    plain = pa.schema([
        pa.field(field.name, field.type.value_type if pa.types.is_dictionary(field.type) else field.type)
        for field in _readable(reader.schema)
    ])  # fmt: skip
    levels = levels_of(reader.schema, None)
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, plain) as writer:
        for i, batch in enumerate(reader):
            levels = levels_of(reader.schema, batch) if i == 0 else levels
            writer.write_table(pa.Table.from_batches([batch]).cast(plain), max_chunksize=BATCH_ROWS)
    return levels


def file_dataset(files: Sequence[str], form: str, filesystem: Any = None, hive: bool = False) -> tuple[Any, Merged]:
    """A dataset over Arrow or Parquet files with the widest types over them, and the account of it by exact name.

    `form`: "ipc" or "parquet"; `filesystem`: a pyarrow filesystem. Raises DataError for files that cannot be read.
    """
    import pyarrow as pa
    import pyarrow.dataset as ds

    keys = _hive_schema(files) if hive else pa.schema([])
    try:
        data = ds.dataset(list(files), format=form, filesystem=filesystem)
        schemas = [(fragment.path, fragment.physical_schema) for fragment in data.get_fragments()]
        variants = list(_variants(schemas))
        merged = merge(variants)
        for name in keys.names:  # those of directories win over columns of their name
            merged.problems.pop(name, None)
            merged.key_problems.pop(name, None)
        if len(variants) > 1 or hive or not _readable(data.schema).equals(data.schema):
            common = _readable(_common_schema(data.schema, [schema for _, schema in schemas], merged, keys))
            parts = ds.partitioning(keys, flavor="hive") if hive else None
            data = ds.dataset(list(files), schema=common, format=form, filesystem=filesystem, partitioning=parts)
        return data, merged
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{files[0]}: {error}", code="file_unreadable") from error


def _hive_schema(files: Sequence[str]) -> pa.Schema:
    """The keys of `key=value` directories, of the types that DuckDB gives those of local files: dates, 64-bit whole numbers, else text."""
    import pyarrow as pa

    return pa.schema([(key, _hive_type(texts)) for key, texts in hive_values(files).items()])


def _hive_type(texts: Collection[str]) -> pa.DataType:
    import pyarrow as pa

    if texts and all(_is_date(text) for text in texts):
        return pa.date32()
    whole = all(re.fullmatch(r"-?(0|[1-9]\d{0,18})", text, re.ASCII) and -(2**63) <= int(text) < 2**63 for text in texts)
    return pa.int64() if texts and whole else pa.string()


def _is_date(text: str) -> bool:
    try:
        return len(text) == len("2020-01-31") and dt.date.fromisoformat(text) is not None
    except ValueError:
        return False


def _common_schema(given: pa.Schema, schemas: Sequence[pa.Schema], merged: Merged, keys: pa.Schema) -> pa.Schema:
    """The widest type of each column; that of the first file for columns with a problem; then the keys of directories."""
    import pyarrow as pa

    skipped = {*merged.problems, *keys.names}
    usable = [pa.schema([field for field in schema if field.name not in skipped]) for schema in schemas]
    widest = pa.unify_schemas(usable, promote_options="permissive")
    disputed = [next(schema.field(name) for schema in schemas if name in schema.names) for name in merged.problems]
    fields = {field.name: field for field in (*given, *widest, *disputed, *keys)}
    return pa.schema([fields[name] for name in dict.fromkeys([*merged.types, *given.names, *keys.names])])


def _variants(schemas: Sequence[tuple[str, pa.Schema]]) -> Iterator[Variant]:
    groups: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for path, schema in schemas:
        groups.setdefault(tuple((field.name, duckdb_name(field.type)) for field in schema), []).append(path)
    for signature, files in groups.items():
        yield Variant(tuple(files), dict(signature))


_DUCKDB_NAMES = (("timestamp", "TIMESTAMP"), ("date", "DATE"), ("time", "TIME"), ("duration", "INTERVAL"), ("decimal", "DECIMAL"))


def duckdb_name(data_type: pa.DataType) -> str:
    """DuckDB's name of an Arrow type, or the Arrow name where DuckDB has no scalar for it."""
    import pyarrow as pa

    types = pa.types
    if types.is_dictionary(data_type):
        return duckdb_name(data_type.value_type)
    if is_text(data_type):
        return "VARCHAR"
    if types.is_boolean(data_type):
        return "BOOLEAN"
    if types.is_integer(data_type):
        return {"int32": "INTEGER", "uint32": "UINTEGER"}.get(str(data_type), "BIGINT" if types.is_signed_integer(data_type) else "UBIGINT")
    if types.is_floating(data_type):
        return "DOUBLE" if str(data_type) == "double" else "FLOAT"
    return next((name for prefix, name in _DUCKDB_NAMES if str(data_type).startswith(prefix)), str(data_type))


def rows_of(data: Any, workspace: Workspace, problems: Container[str]) -> tuple[Any, pa.Schema, dict[str, tuple[str, ...]], bool]:
    """A table or dataset, the schema of the data as they came, the level orders it declares, and whether the caller's object can be
    read again."""
    dataset = type(data).__module__ == "pyarrow._dataset" and hasattr(data, "scanner")
    files = dataset and hasattr(data, "files")
    if dataset and not (files and _readable(data.schema).equals(data.schema)):
        # it may hold a stream that is gone after one scan, or numbers that must be cast
        data, dataset = data.scanner().to_reader(), False
    table = data if dataset else in_memory(data)
    if table is None:
        spooled, schema, levels, again = spool(data, os.path.join(workspace.path(), "stream.arrow"))
        return spooled, schema, levels, again or files
    schema = _readable(table.schema)
    table = table if dataset or schema.equals(table.schema) else table.cast(schema)
    return table, table.schema, levels_of(schema, ordered_head(table, problems)), True
