"""Whatever a user passes as `data` -> an engine that reads it. Heavy packages load only for data that needs them."""
from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from .errors import ConfigError, DataError
from .options import Options

if TYPE_CHECKING:
    from .engines.base import Engine

_ACCEPTED = (
    "a path, a list of paths, a glob or a directory; a DuckDB relation, mp.table or mp.query; a polars frame; "
    "a pyarrow dataset or anything with an Arrow stream (pyarrow, pandas, narwhals)"
)


@dataclass(frozen=True)
class Table:
    """A table or view: its name, quoted as in SQL where it is odd, and the DuckDB connection or database file it is in."""

    name: str
    con: Any


@dataclass(frozen=True)
class Query:
    """One SELECT statement, and the DuckDB connection or database file it runs on."""

    sql: str
    con: Any


@dataclass(frozen=True)
class PathSource:
    """Files, with DuckDB types by exact column name for CSV and JSON; `hive`: whether `key=value` folders are columns, None to look;
    `keys`: DuckDB types of such columns, else what their values here look like."""

    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
    types: Mapping[str, str] = field(default_factory=dict)
    hive: bool | None = None
    keys: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Subset:
    """The rows of other data for which the expression `where` holds and each column of `keys` has one of the values that the texts
    stand for in the column's own type (None: null)."""

    data: Any
    where: str | None = None
    keys: Mapping[str, tuple[str | None, ...]] = field(default_factory=dict)


def table(name: str, con: Any) -> Table:
    """A table or view as data. `con`: a DuckDB connection (only SELECT runs on it), or a database file, opened read-only."""
    return Table(name, con)


def query(sql: str, con: Any) -> Query:
    """One SELECT statement as data. `con`: as for `table`."""
    return Query(sql, con)


def source(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], *, types: Mapping[str, str] | None = None
) -> PathSource:
    """Files as data; `types`: DuckDB types by exact column name, for CSV and JSON, in place of those found in the files."""
    return PathSource(path, dict(types or {}))


def open_source(data: Any, *, options: Options | None = None, types: Mapping[str, str] | None = None) -> Engine:
    """The engine for `data`; close it when done.

    Tried in this order: paths, DuckDB, Polars, Arrow. Raises DataError (code "source_type" for what is none of these),
    ConfigError for options that cannot apply to the source, ResourceError where memory or disk fail.
    """
    options = options or Options()
    if _is_a(data, "narwhals", "LazyFrame"):
        data = data.to_native()  # read where it lies: a polars LazyFrame, a DuckDB relation
    if isinstance(data, Subset):
        return _open_subset(data, options)
    if isinstance(data, str | os.PathLike | list | tuple):
        data = PathSource(data, dict(types or {}))
    elif types and not isinstance(data, PathSource):
        raise ConfigError("types= is for CSV and JSON files", code="types")
    if isinstance(data, PathSource):
        return _open_paths(data, options)
    if isinstance(data, Table | Query):
        return _open_database(data, options)
    if _is_a(data, "duckdb", "DuckDBPyRelation"):
        from .engines import duckdb

        _refuse_settings(options)
        return duckdb.open_relation(data)
    if _is_a(data, "polars", "DataFrame", "LazyFrame"):
        return _open_polars(data, options)
    if _is_a(data, "pyarrow.dataset", "Dataset") or hasattr(data, "__arrow_c_stream__"):
        from .engines import duckdb

        return duckdb.open_arrow(data, options)
    hint = 'name a table of it: mp.table("…", con)' if _is_connection(data) else f"accepted are {_ACCEPTED}"
    raise DataError(f"{type(data).__name__} is not data", code="source_type", hint=hint)


def _open_subset(data: Subset, options: Options) -> Engine:
    from .subset import filtered

    inner = open_source(data.data, options=options)
    try:
        return filtered(inner, data.where, data.keys)
    except BaseException:
        inner.close()
        raise


def _is_a(data: Any, package: str, *names: str) -> bool:
    """Whether data is of one of a package's classes; a package that nobody imported made no object."""
    module = sys.modules.get(package)
    return module is not None and any(isinstance(data, getattr(module, name)) for name in names)


def _is_connection(data: Any) -> bool:
    return all(hasattr(data, name) for name in ("sql", "execute", "cursor"))


def _refuse_settings(options: Options) -> None:
    if options.engine_settings:
        raise ConfigError(
            f"{', '.join(options.engine_settings)} cannot be set for a connection of yours",
            code="connection_options", hint="set them on your connection",
        )  # fmt: skip


def _open_polars(data: Any, options: Options) -> Engine:
    if options.threads is not None:
        raise ConfigError(
            "threads cannot be set for a Polars source",
            code="polars_threads", hint="set the environment variable POLARS_MAX_THREADS before polars is imported",
        )  # fmt: skip
    from .engines.polars import PolarsEngine

    return PolarsEngine(data)


def _open_database(data: Table | Query, options: Options) -> Engine:
    from .engines import duckdb

    if isinstance(data.con, str | os.PathLike):
        path = os.path.expanduser(os.fspath(data.con))
        if isinstance(data, Table):
            return duckdb.open_database(path, options, table=data.name)
        return duckdb.open_database(path, options, sql=data.sql)
    if not _is_connection(data.con):
        raise DataError(f"{type(data.con).__name__} is neither a DuckDB connection nor a database file", code="source_type")
    _refuse_settings(options)
    return duckdb.open_table(data.name, data.con) if isinstance(data, Table) else duckdb.open_query(data.sql, data.con)


def _open_paths(data: PathSource, options: Options) -> Engine:
    from .engines import duckdb, files

    paths = data.path if isinstance(data.path, Sequence) and not isinstance(data.path, str | bytes) else [data.path]
    for path in paths:
        if not isinstance(path, str | os.PathLike):
            raise DataError(f"{type(path).__name__} is not a path", code="source_type", hint="a list of data holds paths")
    given = [_local(os.fspath(path)) for path in paths]
    if not given:
        raise DataError("the list of paths is empty", code="source_type")
    if any("://" in path for path in given):
        return _open_urls(given, data, options)
    found = [file for path in given for file in files.locate(path)]
    form = _format(found, data.types)
    hive = files.is_hive(found, given) if data.hive is None else data.hive
    if form == "arrow":
        return duckdb.open_dataset(found, "ipc", options, hive=hive)
    return duckdb.open_files(found, hive, form, options, data.types, keys=data.keys)


def _local(path: str) -> str:
    return unquote(path.removeprefix("file://")) if path.startswith("file://") else path


def _format(found: list[str], types: Mapping[str, str]) -> str:
    from .engines import files

    form = files.one_format(found)
    if types and form not in ("csv", "json"):
        raise ConfigError(f"types= is for CSV and JSON files, and these are {form}", code="types")
    return form


def _open_urls(urls: list[str], data: PathSource, options: Options) -> Engine:
    """Parquet and Arrow files are read in place, CSV and JSON files from a copy, as every scan reads them whole."""
    from .engines import duckdb, files, remote

    filesystem, found = remote.locate(urls)
    form = _format(found, data.types)
    hive = files.is_hive(found, ()) if data.hive is None else data.hive
    if form in ("parquet", "arrow"):
        kind = "ipc" if form == "arrow" else form
        return duckdb.open_dataset(found, kind, options, hive=hive, filesystem=filesystem)
    workspace = files.Workspace(options.temp_directory)
    copies = remote.copied(filesystem, found, workspace)
    return duckdb.open_files(copies, hive, form, options, data.types, workspace)


def row_count(engine: Engine) -> int:
    """The rows of an open source, used or not: known, or counted by a scan."""
    from . import statements
    from .engines.base import Columns
    from .sql import Names

    known = engine.row_count()
    if known is not None:
        return known
    statement = statements.missing((), (), {}, Names({}, {}))
    return int(engine.query(statement, Columns()).read_all().column("row_count")[0].as_py())
